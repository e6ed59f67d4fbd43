"""Optimizers with the settings usual for language models."""

import math
from collections.abc import Sequence

import keras
import tensorflow as tf
from keras import ops

from kerasllm.training.guard import Guarded
from kerasllm.training.shards import Sharded

Rate = float | keras.optimizers.schedules.LearningRateSchedule

_NOT_DECAYED = (r"\bbias\b", r"\bhead_bias\b", r"\bscale\b")


class _Optimizer(Guarded):
    """What the optimizers here have in common; a mixin, before a Keras optimizer.

    Unlike a list set by `exclude_from_weight_decay`, the exclusions survive saving.
    """

    def __init__(self, *, not_decayed: Sequence[str], **kwargs):
        super().__init__(**kwargs)
        self.not_decayed = tuple(not_decayed)
        self.exclude_from_weight_decay(var_names=list(self.not_decayed))

    def _apply_weight_decay(self, variables):
        # Keras's Muon has two decays, and looks for what is not decayed in the name without the path.
        if keras.backend.backend() != "tensorflow":
            keras.optimizers.Optimizer._apply_weight_decay(self, variables)

    def _distributed_tf_update_step(self, distribution, grads_and_vars, learning_rate):
        # Keras calls it on TensorFlow, outside of the replicas.
        if self.weight_decay:
            # Not before the gradients are there: what the step still reads would have to be copied.
            with tf.control_dependencies(tf.nest.flatten([gradient for gradient, _ in grads_and_vars])):
                self._decay(distribution, [variable for _, variable in grads_and_vars])
        self._update_all(distribution, grads_and_vars, learning_rate)

    def _update_all(self, distribution, grads_and_vars, learning_rate):
        """Updates each variable by its gradient, on all replicas."""
        super()._distributed_tf_update_step(distribution, grads_and_vars, learning_rate)

    def _decay(self, distribution, variables):
        rate = self.learning_rate * self.weight_decay

        def decay(variable):
            return tf.raw_ops.ResourceApplyGradientDescent(
                var=variable.handle, alpha=tf.cast(rate, variable.dtype), delta=variable.read_value()
            )

        before = []
        for variable in filter(self._use_weight_decay, variables):
            # One after the other, for TensorFlow copies a variable that is subtracted from itself.
            with tf.control_dependencies(before):
                before = [distribution.extended.update(variable, decay)]

    def get_config(self):
        return {**super().get_config(), "not_decayed": list(self.not_decayed)}


@keras.saving.register_keras_serializable(package="kerasllm")
class AdamW(_Optimizer, Sharded, keras.optimizers.AdamW):
    """Keras's AdamW that decays matrices and embeddings, but not biases and norm gains.

    Loshchilov, Hutter: "Decoupled Weight Decay Regularization" (2019).

    Args:
        learning_rate: Step size or schedule.
        weight_decay: Fraction of a weight, times the learning rate, taken off per step.
        beta_1: Decay of the mean of the gradients.
        beta_2: Decay of the mean of their squares.
        epsilon: Added to the root of the latter.
        global_clipnorm: Largest norm of all gradients together; None does not clip.
        not_decayed: Regular expressions; a weight in whose name one of them is found is not decayed.
        **kwargs: As in Keras, those of `Guarded`, `skip_above` and `skip_window`, and that of `Sharded`:
            `shard_state`, whether replicas share the momentums.
    """

    def __init__(
        self,
        learning_rate: Rate = 3e-4,
        weight_decay: float | None = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-8,
        global_clipnorm: float | None = 1.0,
        not_decayed: Sequence[str] = _NOT_DECAYED,
        **kwargs,
    ):
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay or 0.0,  # Keras takes no None here
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            global_clipnorm=global_clipnorm,
            not_decayed=not_decayed,
            **kwargs,
        )

    def _update_all(self, distribution, grads_and_vars, learning_rate):
        if self.amsgrad:
            super()._update_all(distribution, grads_and_vars, learning_rate)
            return
        # TensorFlow's one operation reads and writes each array once: four times as fast as Keras's steps.
        step = ops.convert_to_tensor(self.iterations) + 1
        scalars = {}  # by dtype, once for all variables
        for dtype in {variable.dtype for _, variable in grads_and_vars}:
            beta_1, beta_2 = (tf.cast(beta, dtype) for beta in (self.beta_1, self.beta_2))
            scalars[dtype] = {
                "beta1_power": tf.pow(beta_1, tf.cast(step, dtype)),
                "beta2_power": tf.pow(beta_2, tf.cast(step, dtype)),
                "lr": tf.cast(self.learning_rate, dtype),
                "beta1": beta_1,
                "beta2": beta_2,
                "epsilon": tf.cast(self.epsilon, dtype),
            }

        def update(variable, gradient):
            index = self._get_variable_index(variable)
            slots = (self._momentums[index].value, self._velocities[index].value)
            handles = (each.handle for each in (variable, *slots))
            tf.raw_ops.ResourceApplyAdam(
                **dict(zip(("var", "m", "v"), handles, strict=True)),
                **scalars[variable.dtype],
                grad=tf.cast(gradient, variable.dtype),
            )

        for gradient, variable in grads_and_vars:
            distribution.extended.update(variable, update, args=(gradient,), group=False)


@keras.saving.register_keras_serializable(package="kerasllm")
class Lion(_Optimizer, Sharded, keras.optimizers.Lion):
    """Keras's Lion: the sign of a mean of the gradients, which takes half of the memory of AdamW.

    Chen et al.: "Symbolic Discovery of Optimization Algorithms" (2023). Every weight moves by the learning
    rate, so this is to be 3 to 10 times smaller than AdamW's, and the decay as many times larger; nothing
    is rescaled here.

    Args:
        learning_rate: Step size or schedule.
        weight_decay: Fraction of a weight, times the learning rate, taken off per step.
        beta_1: Part of the mean of the gradients in what the sign is taken of; here and for `beta_2` the
            values of the paper's language models.
        beta_2: Decay of the mean of the gradients.
        global_clipnorm: Largest norm of all gradients together; None does not clip.
        not_decayed: Regular expressions; a weight in whose name one of them is found is not decayed.
        **kwargs: As in Keras, those of `Guarded`, `skip_above` and `skip_window`, and that of `Sharded`:
            `shard_state`, whether replicas share the momentums.
    """

    def __init__(
        self,
        learning_rate: Rate = 1e-4,
        weight_decay: float | None = 0.3,
        beta_1: float = 0.95,
        beta_2: float = 0.98,
        global_clipnorm: float | None = 1.0,
        not_decayed: Sequence[str] = _NOT_DECAYED,
        **kwargs,
    ):
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            beta_1=beta_1,
            beta_2=beta_2,
            global_clipnorm=global_clipnorm,
            not_decayed=not_decayed,
            **kwargs,
        )


# Not a subclass of Keras's Adafactor (3.15), which (1) keeps an array as large as the weight, when having
# none is what Adafactor is for; (2) makes all of a matrix NaN whose gradient is zero in a row and in a
# column, as that of dead units is; (3) lowers the rate of a schedule to the inverse root of the step.
@keras.saving.register_keras_serializable(package="kerasllm")
class Adafactor(_Optimizer, keras.optimizers.Optimizer):
    """Adafactor, which keeps the means of the rows and of the columns of a matrix's squared gradients.

    Shazeer, Stern: "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (2018), without
    momentum. The learning rate is relative to the size of a weight, about 1e-2 in the paper and for T5.

    Args:
        learning_rate: Step size, as a fraction of the root mean square of the weight, or schedule.
        weight_decay: Fraction of a weight, times the learning rate, taken off per step.
        relative_step: Whether a learning rate that is not a schedule is at most the inverse root of the
            number of the update, as in the paper.
        beta_2_decay: Exponent by which the decay of the mean of the squared gradients nears 1.
        epsilon_1: Added to the squared gradients.
        epsilon_2: Least root mean square of a weight that the learning rate is taken of.
        clip_threshold: Largest root mean square of the update of a weight, before the learning rate.
        global_clipnorm: Largest norm of all gradients together; None does not clip.
        not_decayed: Regular expressions; a weight in whose name one of them is found is not decayed.
        **kwargs: As in Keras, and those of `Guarded`: `skip_above`, `skip_window`.
    """

    def __init__(
        self,
        learning_rate: Rate = 1e-2,
        weight_decay: float | None = None,
        relative_step: bool = True,
        beta_2_decay: float = -0.8,
        epsilon_1: float = 1e-30,
        epsilon_2: float = 1e-3,
        clip_threshold: float = 1.0,
        global_clipnorm: float | None = None,
        not_decayed: Sequence[str] = _NOT_DECAYED,
        **kwargs,
    ):
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            global_clipnorm=global_clipnorm,
            not_decayed=not_decayed,
            **kwargs,
        )
        self.relative_step = relative_step
        self.beta_2_decay = beta_2_decay
        self.epsilon_1 = epsilon_1
        self.epsilon_2 = epsilon_2
        self.clip_threshold = clip_threshold

    def build(self, variables):
        """Makes the means of the squared gradients; Keras calls it."""
        if self.built:
            return
        super().build(variables)
        self._means = []  # of each variable: of its rows and of its columns, or of itself
        for variable in variables:
            shape, path = tuple(variable.shape), variable.path.replace("/", "_")
            shapes = {"squares": shape}
            if len(shape) > 1:
                shapes = {"rows": shape[:-1], "columns": (*shape[:-2], shape[-1])}
            means = [
                self.add_variable(each, dtype=variable.dtype, name=f"{path}_{name}")
                for name, each in shapes.items()
            ]
            self._means.append(means)

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable; Keras calls it."""
        dtype = variable.dtype
        means = self._means[self._get_variable_index(variable)]
        step = ops.cast(self.iterations + 1, dtype)
        rate, gradient = ops.cast(learning_rate, dtype), ops.cast(gradient, dtype)
        if self.relative_step and not callable(self._learning_rate):
            rate = ops.minimum(rate, ops.rsqrt(step))
        beta_2 = 1.0 - ops.power(step, self.beta_2_decay)
        squares = ops.square(gradient) + self.epsilon_1

        def add(mean, new):
            new = beta_2 * ops.convert_to_tensor(mean) + (1.0 - beta_2) * new
            self.assign(mean, new)
            return new

        if len(means) == 1:
            update = gradient * ops.rsqrt(add(means[0], squares))
        else:
            rows, columns = add(means[0], ops.mean(squares, -1)), add(means[1], ops.mean(squares, -2))
            # Not by the product of both, which may be too small for a float.
            rows = rows / ops.mean(rows, -1, keepdims=True)
            update = gradient * ops.rsqrt(rows)[..., None] * ops.rsqrt(columns)[..., None, :]
        update = update / ops.maximum(1.0, _root_mean_square(update) / self.clip_threshold)
        size = ops.maximum(self.epsilon_2, _root_mean_square(variable))
        self.assign_sub(variable, rate * size * update)

    def get_config(self):
        return {
            **super().get_config(),
            "relative_step": self.relative_step,
            "beta_2_decay": self.beta_2_decay,
            "epsilon_1": self.epsilon_1,
            "epsilon_2": self.epsilon_2,
            "clip_threshold": self.clip_threshold,
        }


@keras.saving.register_keras_serializable(package="kerasllm")
class Muon(_Optimizer, keras.optimizers.Muon):
    """Keras's Muon for the matrices inside of the blocks, and AdamW for all else.

    Jordan et al.: "Muon: An optimizer for hidden layers in neural networks" (2024): the mean of the
    gradients of a matrix, with its singular values made about 1. It is scaled as in Liu et al.: "Muon is
    Scalable for LLM Training" (2025), so that learning rate and decay are those of AdamW.

    Args:
        learning_rate: Step size or schedule, of both.
        weight_decay: Fraction of a weight, times the learning rate, taken off per step, of both.
        momentum: Decay of the sum of the gradients, of Muon.
        adam_beta_1: Decay of the mean of the gradients, of AdamW.
        adam_beta_2: Decay of the mean of their squares, of AdamW.
        epsilon: Added to the root of the latter.
        global_clipnorm: Largest norm of all gradients together; None does not clip.
        exclude_layers: Regular expressions; a weight in whose path one of them is found is left to AdamW,
            as are embeddings and all that is no matrix.
        not_decayed: Regular expressions; a weight in whose name one of them is found is not decayed.
        **kwargs: As in Keras, and those of `Guarded`: `skip_above`, `skip_window`.
    """

    def __init__(
        self,
        learning_rate: Rate = 3e-4,
        weight_decay: float | None = 0.1,
        momentum: float = 0.95,
        adam_beta_1: float = 0.9,
        adam_beta_2: float = 0.95,
        epsilon: float = 1e-8,
        global_clipnorm: float | None = 1.0,
        exclude_layers: Sequence[str] = (r"(^|/)(head|classifier)",),
        not_decayed: Sequence[str] = _NOT_DECAYED,
        **kwargs,
    ):
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            momentum=momentum,
            adam_beta_1=adam_beta_1,
            adam_beta_2=adam_beta_2,
            epsilon=epsilon,
            global_clipnorm=global_clipnorm,
            exclude_layers=list(exclude_layers),
            not_decayed=not_decayed,
            **kwargs,
        )

    # Keras multiplies in float32, which TensorFlow refuses for weights in float64.

    def _muon_update_step(self, gradient, variable, lr, m):
        super()._muon_update_step(gradient, variable, ops.cast(lr, variable.dtype), m)

    def lr_adjust(self, x):
        """Scales an update to the size that AdamW's have; Keras calls it."""
        return x if self.rms_rate is None else x * (self.rms_rate * math.sqrt(max(x.shape)))

    def get_config(self):
        config = super().get_config()
        del config["adam_weight_decay"]
        return config


_OPTIMIZERS = {"adamw": AdamW, "lion": Lion, "adafactor": Adafactor, "muon": Muon}


def make_optimizer(
    name: str, learning_rate: Rate | None = None, weight_decay: float | None = None, **kwargs
) -> keras.optimizers.Optimizer:
    """Makes an optimizer with the settings usual for language models.

    A learning rate is good for the optimizer it was found for: Lion's is to be 3 to 10 times smaller than
    AdamW's (and its decay as many times larger), Adafactor's is relative to the size of the weights, Muon's
    is about AdamW's.

    Args:
        name: "adamw", "lion", "adafactor" or "muon".
        learning_rate: Step size or schedule. None: that of the optimizer.
        weight_decay: Fraction of a weight, times the learning rate, taken off per step; 0 for none. None:
            that of the optimizer.
        **kwargs: Of the optimizer.

    Returns:
        The optimizer.

    Raises:
        ValueError: If there is no such optimizer.
    """
    if name not in _OPTIMIZERS:
        raise ValueError(f"`name` must be one of {list(_OPTIMIZERS)}. Received: name={name!r}")
    given = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    given = {key: value for key, value in given.items() if value is not None}
    return _OPTIMIZERS[name](**given, **kwargs)


def _root_mean_square(values):
    return ops.sqrt(ops.mean(ops.square(values)))
