"""Updates that are left out: of gradients that are not finite, or far larger than those before."""

import keras
import tensorflow as tf
from keras import ops

from kerasllm.layers.precision import widen


class Guarded:
    """Notes the norm of the gradients, and lets an optimizer leave out updates that would harm.

    A mixin, before a Keras optimizer.

    The norm of all gradients together, before they are clipped, is compared with those of the batches
    before; Chowdhery et al.: "PaLM" (2022) got over their spikes of the loss by leaving out the batches
    around them. An update that is left out changes neither the weights nor the state of the optimizer nor
    its count of updates, as in `keras.optimizers.LossScaleOptimizer`, inside of which this works too.

    Args:
        skip_above: An update is left out if the norm is not finite, or above this times the median of the
            last norms. `math.inf`: only if it is not finite; None: never.
        skip_window: Number of the last norms. As long as there are fewer, only what is not finite is left
            out.
        **kwargs: Of the optimizer.

    Attributes:
        gradient_norm: The last norm, before clipping: a variable.
        skipped_updates: With `skip_above`, the number of updates that were left out: a variable.

    Raises:
        ValueError: If an argument is out of range, or the optimizer accumulates gradients.
    """

    def __init__(self, *, skip_above: float | None = None, skip_window: int = 100, **kwargs):
        if skip_above is not None and not skip_above > 1:
            raise ValueError(f"`skip_above` must be None or above 1. Received: skip_above={skip_above}")
        if skip_window < 1:
            raise ValueError(f"`skip_window` must be at least 1. Received: skip_window={skip_window}")
        if skip_above is not None and kwargs.get("gradient_accumulation_steps"):
            raise ValueError(
                "With `skip_above` gradients are accumulated by `compile(microbatches=...)`. Received: "
                f"gradient_accumulation_steps={kwargs['gradient_accumulation_steps']}"
            )
        super().__init__(**kwargs)
        self.skip_above = skip_above
        self.skip_window = skip_window

    def build(self, variables):
        """Makes the variables of the optimizer; Keras calls it."""
        if self.built:
            return
        super().build(variables)
        # As the optimizer's count of updates: the same on all replicas.
        shared = {"aggregation": "only_first_replica"}
        self.gradient_norm = self.add_variable((), dtype="float32", name="gradient_norm", **shared)
        if self.skip_above is None:
            return
        self.skipped_updates = self.add_variable((), dtype="int", name="skipped_updates", **shared)
        self._norms = self.add_variable((self.skip_window,), dtype="float32", name="norms", **shared)
        self._norm_count = self.add_variable((), dtype="int", name="norm_count", **shared)

    def apply(self, grads, trainable_variables=None):
        """Updates the variables, or leaves it; see `keras.optimizers.Optimizer.apply`."""
        update = super().apply
        if not self.built and trainable_variables is not None:
            self.build(list(trainable_variables))
        # Without gradients Keras has something to say about it.
        if self.skip_above is None or not (self.built and len(grads)):
            update(grads, trainable_variables)
            return
        if keras.backend.backend() != "tensorflow":
            self._apply_and_take_back(grads, trainable_variables, update)
            return
        if tf.__internal__.distribute.strategy_supports_no_merge_call():
            is_good = self._judge(self._measure(grads))
            ops.cond(is_good, lambda: update(grads, trainable_variables), lambda: None)
            return

        # The update of a replica calls `merge_call`, which is not allowed in a branch there; so the branch
        # is taken outside of the replicas.
        def apply_everywhere(strategy, grads, trainable_variables):
            norms = strategy.extended.call_for_each_replica(self._measure, args=(grads,))
            # The gradients are sums over the replicas, so all have the same norm.
            is_good = self._judge(strategy.experimental_local_results(norms)[0])

            def apply():
                strategy.extended.call_for_each_replica(update, args=(grads, trainable_variables))

            ops.cond(is_good, apply, lambda: None)

        tf.distribute.get_replica_context().merge_call(apply_everywhere, args=(grads, trainable_variables))

    def _apply_and_take_back(self, grads, trainable_variables, update):
        """As `apply`, for backends whose branches cannot assign."""
        is_good = self._judge(self._measure(grads))
        if trainable_variables is None:
            trainable_variables = self._trainable_variables
        variables = [*trainable_variables, *self.variables]
        before = [ops.convert_to_tensor(variable) for variable in variables]
        update(grads, trainable_variables)
        for variable, old in zip(variables, before, strict=True):
            variable.assign(ops.where(is_good, ops.convert_to_tensor(variable), old))

    def _measure(self, gradients):
        """The norm of all gradients together."""
        return ops.cast(_norm(gradients), "float32") / (self.loss_scale_factor or 1.0)

    def _clip_gradients(self, grads):
        # Keras calls it; it would take the norm of all once more.
        if self.skip_above is not None and not self.global_clipnorm:
            return super()._clip_gradients(grads)
        norm = _norm(grads)
        if self.skip_above is None:
            self.gradient_norm.assign(ops.cast(norm, "float32"))
        if not self.global_clipnorm or self.clipnorm:
            return super()._clip_gradients(grads)
        factor = self.global_clipnorm / ops.maximum(norm, self.global_clipnorm)
        factor += norm - norm  # NaN if the norm is not finite
        return [g if g is None else g * ops.cast(factor, g.dtype) for g in grads]

    def _judge(self, norm):
        """Takes note of a norm and returns whether to update."""
        is_finite = ops.isfinite(norm)
        norms, count = ops.convert_to_tensor(self._norms), ops.convert_to_tensor(self._norm_count)
        median = ops.sort(norms)[self.skip_window // 2]
        is_spike = ops.logical_and(count >= self.skip_window, norm > self.skip_above * median)
        is_good = ops.logical_and(is_finite, ops.logical_not(is_spike))
        # Spikes count too, or a training whose gradients have grown for good would never go on.
        is_oldest = ops.arange(self.skip_window, dtype=self._norm_count.dtype) == count % self.skip_window
        self._norms.assign(ops.where(ops.logical_and(is_finite, is_oldest), norm, norms))
        self._norm_count.assign_add(ops.cast(is_finite, self._norm_count.dtype))
        self.gradient_norm.assign(norm)
        self.skipped_updates.assign_add(ops.cast(ops.logical_not(is_good), self.skipped_updates.dtype))
        return is_good

    def get_config(self):
        return {**super().get_config(), "skip_above": self.skip_above, "skip_window": self.skip_window}


def _norm(gradients):
    """The norm of all gradients together, in the widest of their dtypes, at least float32."""
    # TensorFlow's rows of a gradient that may repeat have to be summed first.
    gradients = [tf.convert_to_tensor(g) if isinstance(g, tf.IndexedSlices) else g for g in gradients]
    gradients = [widen(g) for g in gradients if g is not None]
    if keras.backend.backend() == "tensorflow":  # which has an operation that writes no array of squares
        return ops.sqrt(2 * ops.sum(ops.stack([tf.nn.l2_loss(g) for g in gradients])))
    return ops.sqrt(sum(ops.sum(ops.square(g)) for g in gradients))
