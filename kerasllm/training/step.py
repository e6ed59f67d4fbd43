"""The training step: Keras's compile, fit and callbacks around a step that is right on many replicas.

Keras's own step clips and averages per replica, hands rows of a gradient that may repeat to the optimizer,
draws the same dropout everywhere, and weights each replica alike, whatever it holds. Here the order is:
sum over microbatches, densify, sum over replicas, check the loss scale, clip, update; and everything is
divided by the weight of the whole batch, which is known before.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import keras
import tensorflow as tf
from keras import ops

from kerasllm.layers.gradient import REMATS, traced_for_gradient
from kerasllm.layers.rounding import weights_rounded_with
from kerasllm.training import jax_step
from kerasllm.training.checkpoint import find_checkpoints, fit_from_checkpoint, is_multi_worker
from kerasllm.training.dropout import dropout_by_row
from kerasllm.training.layouts import check_layouts
from kerasllm.training.loss import chunked_token_loss, chunked_token_sums, token_sums
from kerasllm.training.optimizer import AdamW
from kerasllm.training.quantization import make_rounding
from kerasllm.version import __version__

_STRATEGIES = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
    tf.distribute.OneDeviceStrategy,
    tf.distribute.TPUStrategy,
)


@keras.saving.register_keras_serializable(package="kerasllm")
class Perplexity(keras.metrics.Mean):
    """The exponential of the mean of the losses that `update_state` gets."""

    def result(self):
        return ops.exp(super().result())


class BatchPart(NamedTuple):
    """What a part of a batch contributes.

    Attributes:
        objective: The sum of what training minimises.
        sums: By name of a mean metric, the sum of its values.
        weight: What the sums are divided by.
        predictions: What the compiled metrics look at, `[rows, ...]`; None if there are none.
    """

    objective: Any
    sums: dict[str, Any]
    weight: Any
    predictions: Any


class Training:
    """Trains a Keras model with a step that gives the same on one replica and on many.

    A mixin, before `keras.Model`. A task says in `_weigh`, `_differentiate` and `_measure` what its loss is
    a sum of, and for the JAX backend in `_sum`; see `TokenTraining`.
    """

    # Metrics that are means over all that counts, besides the loss.
    mean_metrics: ClassVar[dict[str, type[keras.metrics.Mean]]] = {}

    def compile(
        self,
        optimizer=None,
        *,
        microbatches: int = 1,
        seed: int = 0,
        jit_compile: bool | str = "auto",
        remat: str | None = None,
        quantization_aware: str | None = None,
        **kwargs,
    ):
        """Prepares the model for training; see `keras.Model.compile`.

        Args:
            optimizer: A Keras optimizer or its name. None: `AdamW()`.
            microbatches: Parts in which a replica computes its share of a batch, one after the other, for
                one update: the memory of a small batch, the result of a large one. On JAX, the parts that
                all devices compute together.
            seed: Of the dropout masks, from 0 to 2^32 - 1. They follow from it, the number of the update
                and the row in the batch, however many replicas and microbatches there are.
            jit_compile: Whether XLA compiles the step; on several replicas, the forward and backward
                computation of each. "auto": where there is one replica.
            remat: What is computed again for the gradient instead of being kept: `"cheap"`: norms,
                activations and attention weights; `"blocks"`: all inside of the blocks, which takes a third
                more time and least memory; None: nothing.
            quantization_aware: `"int8"` or `"int4"`, for models that continue texts: `fit` and `evaluate`
                compute with the matrices and the token table rounded as a LiteRT export with that
                `quantize` rounds them (that of `"int8"` smooths the activations first, so its numbers are
                not the same), while the optimizer changes the exact weights. Elsewhere, such as
                in `generate`, the model has the exact ones, until `CausalLM.round_weights`. None: nothing
                is rounded.
            **kwargs: As in Keras.

        Raises:
            ValueError: If an argument is out of range, or the combination is not supported.
        """
        strategy = self.distribute_strategy
        if jax_step.IS_JAX:
            check_layouts(self)
        _check_compile(strategy, optimizer, microbatches, seed, remat, kwargs)
        self._rounding = make_rounding(getattr(self, "model", None), quantization_aware)
        self._compile_options = {
            "microbatches": microbatches,
            "seed": seed,
            "jit_compile": jit_compile,
            "remat": remat,
            "quantization_aware": quantization_aware,
        }
        is_spread = strategy.num_replicas_in_sync > 1 or is_multi_worker(strategy)
        # XLA cannot compile what crosses replicas, so it gets what is computed inside of each.
        self._jit_replica = is_spread and jit_compile is True
        with strategy.scope():
            if not hasattr(self, "_means"):
                self._means = {name: kind(name=name) for name, kind in self.mean_metrics.items()}
            super().compile(
                optimizer=AdamW() if optimizer is None else optimizer,
                jit_compile=False if is_spread else jit_compile,
                **kwargs,
            )
            # Now, for variables that are made while a step is traced make TensorFlow trace it twice.
            with jax_step.slots_laid_out(self.trainable_variables):
                self.optimizer.build(self.trainable_variables)
        for each in (self.optimizer, getattr(self.optimizer, "inner_optimizer", None)):
            if each is not None:  # the gradients that it gets are sums over the replicas already
                each._all_reduce_sum_gradients = list

    def get_compile_config(self):
        """Returns what `compile` got, to be saved; Keras calls it."""
        config = super().get_compile_config()
        return {**config, **self._compile_options} if config else config

    def compile_from_config(self, config):
        """Compiles as before the model was saved; Keras calls it."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def fit(self, x=None, y=None, **kwargs):
        """Trains; see `keras.Model.fit`. With `Checkpoints` among the callbacks, from the last save on."""
        if jax_step.IS_JAX:
            check_layouts(self)
        self._check_batches(x)
        if is_multi_worker(self.distribute_strategy):
            self._check_workers_agree()
        x = jax_step.fill_batches(x)
        if kwargs.get("validation_data") is not None:
            kwargs["validation_data"] = jax_step.fill_batches(kwargs["validation_data"])
        checkpoints = find_checkpoints(kwargs.get("callbacks"))
        if not checkpoints:
            return super().fit(x, y, **kwargs)
        if len(checkpoints) > 1 or y is not None:
            raise ValueError(
                "A training has one `Checkpoints` callback, and is on a dataset of batches. Received: "
                f"{len(checkpoints)} callbacks, y given: {y is not None}"
            )
        kwargs["callbacks"] = keras.tree.flatten(kwargs["callbacks"])
        return fit_from_checkpoint(super().fit, self, x, checkpoints[0], **kwargs)

    def _fit_texts(self, make_batches: Callable[..., tf.data.Dataset], **kwargs):
        """Trains on batches made of texts; with `Checkpoints` in orders that another run repeats.

        Args:
            make_batches: Makes them, of some of the arguments `seed`, `passes` and `repeat` of the datasets
                of `kerasllm.data`.
            **kwargs: Of `fit`.
        """
        epochs, options = kwargs.get("epochs", 1), {}
        if find_checkpoints(kwargs.get("callbacks")):
            # With `steps_per_epoch` an epoch is no pass.
            order = {"repeat": True} if kwargs.get("steps_per_epoch") else {"passes": epochs}
            options = {"seed": self._compile_options["seed"], **order}
        batches = make_batches(**options)
        if "passes" in options:
            kwargs["steps_per_epoch"] = int(batches.cardinality()) // epochs
        return Training.fit(self, batches, shuffle=False, **kwargs)

    def evaluate(self, x=None, y=None, **kwargs):
        """Measures; see `keras.Model.evaluate`."""
        return super().evaluate(jax_step.fill_batches(x), y, **kwargs)

    @property
    def distribute_strategy(self):
        """The strategy of tf.distribute; on JAX, where there is none, that of one replica."""
        return tf.distribute.get_strategy() if jax_step.IS_JAX else super().distribute_strategy

    def _check_batches(self, x) -> None:
        """Refuses batches of a known size that would leave replicas without a row."""
        replicas = self.distribute_strategy.num_replicas_in_sync
        if not isinstance(x, tf.data.Dataset) or replicas == 1:
            return
        sizes = [spec.shape[0] for spec in tf.nest.flatten(x.element_spec) if spec.shape.rank]
        if sizes and sizes[0] is not None and sizes[0] < replicas:
            raise ValueError(
                "A batch must have a row for each replica. "
                f"Received: batches of {sizes[0]} rows, {replicas} replicas"
            )

    def _check_workers_agree(self) -> None:
        """Refuses workers that would train something else than the others."""
        optimizer = keras.saving.serialize_keras_object(self.optimizer)
        shapes = [(variable.shape, variable.dtype) for variable in self.variables]
        facts = [__version__, self.get_config(), shapes, optimizer, self._compile_options]
        text = json.dumps(facts, sort_keys=True, default=str)
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") // 2

        @tf.function(autograph=False)
        def gather():
            context = tf.distribute.get_replica_context()
            return context.all_gather(tf.constant([digest], tf.int32), axis=0)

        strategy = self.distribute_strategy
        digests = strategy.experimental_local_results(strategy.run(gather))[0].numpy()
        if len(set(digests)) > 1:
            others = [number for number, each in enumerate(digests) if each != digests[0]]
            raise ValueError(
                "All workers must have the same version of kerasllm, model, optimizer and settings. "
                f"Received others than in worker 0 from {others} of {len(digests)}"
            )

    # What a task says; each gets a part of a batch.

    def _weigh(self, x, y, sample_weight):
        """What the sums are divided by: a float scalar, from the data alone."""
        raise NotImplementedError

    def _differentiate(self, x, y, sample_weight, variables, scale) -> tuple[BatchPart, list]:
        """The sums in training, and the gradients of `scale * objective` for the variables."""
        raise NotImplementedError

    def _measure(self, x, y, sample_weight) -> BatchPart:
        """The sums without dropout."""
        raise NotImplementedError

    def _sum(self, x, y, sample_weight, training: bool) -> BatchPart:
        """The sums in training or without dropout, for JAX, which differentiates them itself."""
        raise NotImplementedError

    # The steps

    def train_step(self, *data):
        """Updates the weights on one batch; Keras calls it in each replica, on JAX with the state too."""
        if self.losses:
            raise ValueError(f"Losses of layers (`add_loss`) are not supported. Received: {self.losses}")
        if jax_step.IS_JAX:
            return jax_step.train_step(self, *data)
        batch = keras.utils.unpack_x_y_sample_weight(*data)
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        weight = own_weight = tf.cast(self._weigh(*batch), self._sum_dtype)
        first_row = tf.constant(0)
        if replicas > 1:
            index = tf.cast(context.replica_id_in_sync_group, tf.int32)
            counts = tf.one_hot(index, replicas, dtype=weight.dtype) * tf.cast(_rows(batch), weight.dtype)
            weight, counts = _sum_over_replicas([weight, counts])
            first_row = tf.cast(tf.reduce_sum(counts[:index]), tf.int32)
        scale = self.optimizer.scale_loss(tf.math.divide_no_nan(tf.ones([], weight.dtype), weight))
        step = tf.convert_to_tensor(self.optimizer.iterations.value)
        compute = self._sum_microbatches
        if self._jit_replica:
            compute = tf.function(compute, jit_compile=True, autograph=False)
        part, gradients = compute(batch, own_weight, scale, step, first_row)
        if replicas > 1:
            gradients = _sum_over_replicas(gradients)
        self.optimizer.apply(gradients, self.trainable_weights)
        return self._report(batch, part)

    def test_step(self, *data):
        """Measures one batch; Keras calls it in each replica, on JAX with the state too."""
        if jax_step.IS_JAX:
            return jax_step.test_step(self, *data)
        batch = keras.utils.unpack_x_y_sample_weight(*data)
        with weights_rounded_with(self._rounding):
            part = self._measure(*batch)
        return self._report(batch, part)

    @property
    def _sum_dtype(self) -> str:
        return "float64" if self.variable_dtype == "float64" else "float32"

    def _sum_microbatches(self, batch, weight, scale, step, first_row):
        """The sums of this replica's rows, which have a weight, and its part of the gradient."""
        variables = [variable.value for variable in self.trainable_weights]
        rows, count = _rows(batch), self._compile_options["microbatches"]
        if count == 1 and tf.distribute.get_replica_context().num_replicas_in_sync == 1:
            with self._traced(step, first_row, rows):
                return self._differentiate(*batch, variables, scale)
        # Rows of no weight fill the last microbatch, and the share of a replica that got no rows. A task
        # that weighs rows would count them.
        size = tf.maximum(1, (rows + count - 1) // count)
        x, y, sample_weight = batch
        sample_weight = tf.ones([rows], self._sum_dtype) if sample_weight is None else sample_weight

        def split(values):
            padding = [[0, size * count - rows]] + [[0, 0]] * (values.shape.rank - 1)
            values = tf.pad(values, padding)
            return tf.reshape(values, tf.concat([[count, size], tf.shape(values)[1:]], axis=0))

        parts = tf.nest.map_structure(split, (x, y, sample_weight))

        def compute(number):
            with self._traced(step, first_row + number * size, size):
                microbatch = tf.nest.map_structure(lambda values: values[number], parts)
                return self._differentiate(*microbatch, variables, scale)

        if count == 1:
            part, gradients = compute(0)
            predictions = None if part.predictions is None else part.predictions[:rows]
            return part._replace(weight=weight, predictions=predictions), gradients
        # None has no place in a loop: the predictions are a list of one array or of none.
        shapes = []

        def add(number, objective, sums, gradients, predictions):
            part, more = compute(number)
            if predictions:
                shapes.append(part.predictions.shape)
                predictions = [predictions[0].write(number, part.predictions)]
            objective += tf.cast(part.objective, objective.dtype)
            sums = {name: total + tf.cast(part.sums[name], total.dtype) for name, total in sums.items()}
            return number + 1, objective, sums, _add(gradients, more), predictions

        zero = tf.zeros([], self._sum_dtype)
        predictions = []
        if self._compile_metrics is not None:
            predictions = [tf.TensorArray(self.compute_dtype, count, infer_shape=False)]
        _, objective, sums, gradients, predictions = tf.while_loop(
            lambda number, *_: number < count,
            add,
            (
                tf.constant(0),
                zero,
                dict.fromkeys(self.mean_metrics, zero),
                [tf.zeros(variable.shape, variable.dtype) for variable in variables],
                predictions,
            ),
            parallel_iterations=1,
            maximum_iterations=count,
        )
        outputs = None
        if predictions:
            outputs = predictions[0].concat()[:rows]
            outputs.set_shape([None, *shapes[0][1:]])
        return BatchPart(objective, sums, weight, outputs), gradients

    def _count(self, batch, part: BatchPart) -> None:
        """Counts a part into the metrics."""
        self._loss_tracker.update_state(
            ops.divide_no_nan(part.objective, part.weight), sample_weight=part.weight
        )
        for name, total in part.sums.items():
            mean = ops.divide_no_nan(total, part.weight)
            self._means[name].update_state(mean, sample_weight=part.weight)
        if part.predictions is not None:
            self.compute_metrics(batch[0], batch[1], part.predictions, sample_weight=batch[2])

    @contextlib.contextmanager
    def _traced(self, step, first_row, rows):
        """How layers behave in a step."""
        options = self._compile_options
        with (
            dropout_by_row(options["seed"], step, first_row, rows),
            traced_for_gradient(options["remat"]),
            weights_rounded_with(self._rounding),
        ):
            yield

    def _report(self, batch, part: BatchPart):
        """Counts a part into the metrics and returns their values over all replicas."""
        self._count(batch, part)
        context = tf.distribute.get_replica_context()
        states = [[tf.convert_to_tensor(v.value) for v in metric.variables] for metric in self.metrics]
        if context.num_replicas_in_sync > 1:
            # Keras would take the mean of the replicas' means, whatever each has counted.
            states = _sum_over_replicas(states)
        results = {}
        for metric, state in zip(self.metrics, states, strict=True):
            result = metric.stateless_result(state)
            results.update(result if isinstance(result, dict) else {metric.name: result})
        if is_multi_worker(self.distribute_strategy):  # Keras reduces these along an axis
            results = {name: tf.reshape(value, [1]) for name, value in results.items()}
        return results

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras would take the mean of the replicas' batches, which integers do not have.
        if self._distribute_strategy is None:
            return
        if iterator is not None:
            local = self.distribute_strategy.experimental_local_results
            for _, _, batches in iterator:
                data_batch = keras.tree.map_structure(lambda values: local(values)[0], next(batches))
                break
        with self.distribute_strategy.scope():
            self._symbolic_build(data_batch=data_batch)


class TokenTraining(Training):
    """The training of a model that predicts tokens: the loss is the mean over the tokens that count.

    Batches are `(x, labels, weights)`: what the task's `call` takes, integers `[batch, length]`, and floats
    `[batch, length]`, where 0 leaves a token out. Every token counts the same, whatever the padding of its
    batch and the replica it is on. The logits of a whole batch are made only if there are compiled metrics
    that want them.

    `perplexity` is the exponential of the cross-entropy, `token_accuracy` the part of the tokens whose
    label has the highest logit.
    """

    mean_metrics = {"perplexity": Perplexity, "token_accuracy": keras.metrics.Mean}

    def compile(
        self, optimizer=None, loss=None, *, label_smoothing: float = 0.0, z_loss: float = 0.0, **kwargs
    ):
        """Prepares the model for training; see `keras.Model.compile`.

        Args:
            optimizer: A Keras optimizer or its name. None: `AdamW()`.
            loss: Must be None: the loss is the cross-entropy of the tokens.
            label_smoothing: Part of the label's probability that is spread over all tokens, while training.
            z_loss: Factor of the squared logarithm of the softmax's normaliser, while training.
            **kwargs: As in `Training.compile` (`microbatches`, `seed`, `jit_compile`) and in Keras.

        Raises:
            ValueError: If a loss is given, or as in `Training.compile`.
        """
        if loss is not None:
            raise ValueError(f"A language model brings its own loss; leave `loss` out. Received: {loss!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"`label_smoothing` must be from 0 to below 1. Received: label_smoothing={label_smoothing}"
            )
        if z_loss < 0:
            raise ValueError(f"`z_loss` must not be negative. Received: z_loss={z_loss}")
        super().compile(optimizer, **kwargs)
        self._loss_options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        self._compile_options |= self._loss_options

    def _hidden(self, x, training: bool):
        """What the head reads, floats `[batch, length, dim]`."""
        raise NotImplementedError

    def _weigh(self, x, y, sample_weight):
        return ops.sum(ops.cast(sample_weight, self._sum_dtype))

    def _differentiate(self, x, y, sample_weight, variables, scale):
        logits = None
        with tf.GradientTape() as tape:
            hidden = self._hidden(x, training=True)
            if self._compile_metrics is not None:
                logits = self.model.score_tokens(hidden)
                sums = token_sums(logits, y, sample_weight, **self._loss_options)
                target = sums.objective * tf.cast(scale, sums.objective.dtype)
        if logits is not None:
            gradients = tape.gradient(target, variables)
        else:
            sums, to_hidden, of_head = chunked_token_loss(
                hidden,
                y,
                sample_weight,
                self.model.score_tokens,
                variables,
                scale,
                self.model.config.vocabulary_size,
                **self._loss_options,
            )
            gradients = tape.gradient(hidden, variables, output_gradients=to_hidden)
            gradients = _add(gradients, of_head)
        return self._part(sums, logits), dense(gradients, variables)

    def _measure(self, x, y, sample_weight):
        hidden = self._hidden(x, training=False)
        if self._compile_metrics is None:
            size = self.model.config.vocabulary_size
            sums = chunked_token_sums(hidden, y, sample_weight, self.model.score_tokens, size)
            return self._part(sums, None)
        logits = self.model.score_tokens(hidden)
        return self._part(token_sums(logits, y, sample_weight), logits)

    def _sum(self, x, y, sample_weight, training):
        logits = self.model.score_tokens(self._hidden(x, training))
        options = self._loss_options if training else {}
        return self._part(token_sums(logits, y, sample_weight, **options), logits)

    @staticmethod
    def _part(sums, logits) -> BatchPart:
        means = {"perplexity": sums.loss, "token_accuracy": sums.correct}
        return BatchPart(sums.objective, means, sums.weight, logits)


def _rows(batch):
    """The number of rows of a batch: an integer tensor."""
    return tf.shape(tf.nest.flatten(batch)[0])[0]


def _sum_over_replicas(values):
    """Sums tensors in any structure; in a replica."""
    # An identity is on the replica's device, which TensorFlow asks for; what was read may be on none.
    values = tf.nest.map_structure(tf.identity, values)
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)


def _add(gradients: list, others: list) -> list:
    """Sums of gradients, where None stands for zero."""

    def add(old, new):
        if old is None or new is None:
            return new if old is None else old
        return tf.convert_to_tensor(old) + new

    return [add(*pair) for pair in zip(gradients, others, strict=True)]


def dense(gradients: list, variables: list) -> list:
    """Returns gradients as dense tensors; zeros for a variable that has none.

    TensorFlow hands out the gradient of a lookup as rows that may repeat, and an optimizer or a norm over
    those rows counts a repeated row wrongly.
    """
    return [
        tf.zeros(variable.shape, variable.dtype) if gradient is None else tf.convert_to_tensor(gradient)
        for gradient, variable in zip(gradients, variables, strict=True)
    ]


def _check_compile(strategy, optimizer, microbatches, seed, remat, kwargs) -> None:
    if not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"`microbatches` must be an integer from 1 on. Received: {microbatches!r}")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"`seed` must be an integer from 0 to 2^32 - 1. Received: {seed!r}")
    if remat not in REMATS:
        raise ValueError(f"`remat` must be one of {REMATS}. Received: {remat!r}")
    for each in (optimizer, getattr(optimizer, "inner_optimizer", None)):
        if steps := getattr(each, "gradient_accumulation_steps", None):
            raise ValueError(
                "Gradients are accumulated by `compile(microbatches=...)`, on several replicas too. "
                f"Received: an optimizer with gradient_accumulation_steps={steps}"
            )
        if getattr(each, "ema_overwrite_frequency", None) and strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "On several replicas the averages of the weights are taken at the end only. Received: an "
                f"optimizer with ema_overwrite_frequency={each.ema_overwrite_frequency}"
            )
    has_strategy = type(strategy) is not type(tf.distribute.get_strategy()) or tf.distribute.has_strategy()
    if has_strategy and not isinstance(strategy, _STRATEGIES):
        raise ValueError(
            f"The strategy must be one of {[each.__name__ for each in _STRATEGIES]}. "
            f"Received: {type(strategy).__name__}"
        )
    if keras.distribution.distribution() is not None and not jax_step.IS_JAX:
        raise ValueError(
            "On the TensorFlow backend keras.distribution does nothing; use a strategy of tf.distribute "
            f"or the JAX backend. Received: {keras.distribution.distribution()}"
        )
    if is_multi_worker(strategy) and kwargs.get("steps_per_execution", 1) != 1:
        raise ValueError(
            "On several workers TensorFlow runs one step per execution. "
            f"Received: steps_per_execution={kwargs['steps_per_execution']}"
        )
