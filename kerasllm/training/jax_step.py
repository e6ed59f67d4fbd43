"""The training step on the JAX backend, where one program runs on all devices.

A batch is one array there, wherever its rows lie, and so is each weight. A sum over the batch is one over
all devices, and the order that `kerasllm.training.step` keeps by hand comes by itself: the loss is divided
by the weight of the whole batch, and gradients are whole before they are clipped.
"""

import collections
import contextlib

import keras
import tensorflow as tf
from keras import ops

from kerasllm.layers.dropout import dropout_chosen_by
from kerasllm.layers.gradient import traced_for_gradient
from kerasllm.training.layouts import Layouts

IS_JAX = keras.backend.backend() == "jax"
if IS_JAX:
    import jax
    import jax.numpy as jnp


def train_step(model, state, data):
    """Updates the weights on one batch; `Training.train_step` on JAX.

    Args:
        model: The task; it says what its loss is a sum of in `_sum`.
        state: The values of the trainable and of the other variables, the optimizer's and the metrics'.
        data: The batch.

    Returns:
        The values of the metrics by name, and the new state.
    """
    trainable, non_trainable, optimizer, metrics = state
    batch, options = keras.utils.unpack_x_y_sample_weight(data), model._compile_options
    weight, count = model._weigh(*batch), options["microbatches"]

    def differentiate(trainable, non_trainable, batch, rows):
        values = _pairs(model, trainable, non_trainable)
        values += zip(model.optimizer.variables, optimizer, strict=True)
        with keras.StatelessScope(state_mapping=values) as scope:
            step = ops.convert_to_tensor(model.optimizer.iterations)
            with dropout_by_step(options["seed"], step, rows), traced_for_gradient(options["remat"]):
                part = model._sum(*batch, training=True)
            loss = model.optimizer.scale_loss(ops.divide_no_nan(part.objective, weight))
            non_trainable = [scope.get_current_value(each) for each in model.non_trainable_variables]
        if model._compile_metrics is None:
            part = part._replace(predictions=None)
        return loss, (part, non_trainable)

    differentiate = jax.grad(differentiate, has_aux=True)
    rows = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        gradients, (part, non_trainable) = differentiate(trainable, non_trainable, batch, jnp.arange(rows))
    else:
        size = -(-rows // count)
        x, y, sample_weight = batch
        sample_weight = jnp.ones(rows) if sample_weight is None else sample_weight

        def split(values):
            # Every `count`-th row, so that each device has its share of each microbatch. Rows of no weight
            # fill the last ones.
            values = jnp.pad(values, [(0, size * count - rows)] + [(0, 0)] * (values.ndim - 1))
            return jnp.swapaxes(values.reshape(size, count, *values.shape[1:]), 0, 1)

        def add(sums, microbatch):
            gradients, part, non_trainable = sums
            more, (new, non_trainable) = differentiate(trainable, non_trainable, *microbatch)
            sums = jax.tree.map(jnp.add, (gradients, part), (more, new._replace(predictions=None)))
            return (*sums, non_trainable), new.predictions

        microbatches = jax.tree.map(split, ((x, y, sample_weight), jnp.arange(rows)))
        first = jax.tree.map(lambda values: values[0], microbatches)
        gradients, (part, _) = jax.eval_shape(differentiate, trainable, non_trainable, *first)
        zeros = jax.tree.map(jnp.zeros_like, (gradients, part._replace(predictions=None)))
        (gradients, part, non_trainable), predictions = jax.lax.scan(
            add, (*zeros, non_trainable), microbatches
        )
        if predictions is not None:
            predictions = jnp.swapaxes(predictions, 0, 1).reshape(-1, *predictions.shape[2:])[:rows]
        part = part._replace(weight=weight, predictions=predictions)
    trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
    logs, metrics = _report(model, batch, part, metrics)
    return logs, (trainable, non_trainable, optimizer, metrics)


def test_step(model, state, data):
    """Measures one batch; `Training.test_step` on JAX.

    Args:
        model: The task.
        state: The values of the trainable and of the other variables, and the metrics'.
        data: The batch.

    Returns:
        The values of the metrics by name, and the new state.
    """
    trainable, non_trainable, metrics = state
    batch = keras.utils.unpack_x_y_sample_weight(data)
    with keras.StatelessScope(state_mapping=_pairs(model, trainable, non_trainable)):
        part = model._sum(*batch, training=False)
    logs, metrics = _report(model, batch, part, metrics)
    return logs, (trainable, non_trainable, metrics)


def _pairs(model, trainable, non_trainable) -> list:
    pairs = zip(model.trainable_variables, trainable, strict=True)
    return [*pairs, *zip(model.non_trainable_variables, non_trainable, strict=True)]


def _report(model, batch, part, metrics):
    """Counts a part into the metrics; returns their values, and the state of the metrics."""
    values = list(zip(model.metrics_variables, metrics, strict=True))
    with keras.StatelessScope(state_mapping=values) as scope:
        model._count(batch, part)
        logs = model.get_metrics_result()
    return logs, [scope.get_current_value(each) for each in model.metrics_variables]


def dropout_by_step(seed, step, rows):
    """While this is open, the masks of every `kerasllm.layers.Dropout` follow from the seed and the step.

    They are the same on any number of devices, with any number of microbatches and after a restart, but
    others than on TensorFlow. The key is made of the seed, the step, the number of the layer, in the order
    in which a step comes to them, and the number of the row.

    Args:
        seed: Integer, from 0 to 2^32 - 1.
        step: Integer scalar: the update.
        rows: Integers `[rows]`, the numbers of the rows in the batch. Inputs may have any shape, rows
            first.

    Returns:
        A context manager.
    """
    numbers: dict[int, int] = {}

    def drop(layer, inputs):
        number = numbers.setdefault(id(layer), len(numbers))
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), number)
        width = inputs.size // rows.size  # inputs may be [batch * length, dim]

        def draw(row):
            return jax.random.bernoulli(jax.random.fold_in(key, row), 1.0 - layer.rate, (width,))

        kept = ops.reshape(jax.vmap(draw)(rows), inputs.shape)
        return inputs * ops.cast(1.0 / (1.0 - layer.rate), inputs.dtype) * ops.cast(kept, inputs.dtype)

    return dropout_chosen_by(drop)


@contextlib.contextmanager
def slots_laid_out(variables):
    """While this is open, an optimizer that is built lays its slots out as the distribution says.

    Args:
        variables: The weights that it is built for, whose layout Keras gives to the slots.
    """
    distribution = keras.distribution.distribution()
    before = []
    if IS_JAX and isinstance(distribution, Layouts):
        before = [(variable, variable._layout) for variable in variables]
        for variable in variables:
            variable._layout = distribution.slot_layout(variable)
    try:
        yield
    finally:
        for variable, layout in before:
            variable._layout = layout


def fill_batches(batches):
    """Adds rows of no weight to batches whose rows the devices could not share evenly.

    Args:
        batches: A dataset of `(x, y, weights)` batches; anything else stays as it is, as does all where no
            distribution is set.

    Returns:
        The dataset.
    """
    distribution = keras.distribution.distribution()
    if not (IS_JAX and isinstance(distribution, Layouts) and isinstance(batches, tf.data.Dataset)):
        return batches
    if not isinstance(batches.element_spec, tuple) or len(batches.element_spec) != 3:
        return batches
    count = distribution.num_model_replicas

    @tf.autograph.experimental.do_not_convert
    def fill(*batch):
        missing = -tf.shape(batch[1])[0] % count
        return tf.nest.map_structure(
            lambda values: tf.pad(values, [[0, missing]] + [[0, 0]] * (values.shape.rank - 1)), batch
        )

    return batches.map(fill, num_parallel_calls=tf.data.AUTOTUNE)


def bytes_per_device(model) -> dict[str, int]:
    """Counts the memory that the fullest device holds of a model.

    Args:
        model: A Keras model on the JAX backend.

    Returns:
        Bytes of the `"weights"` and of the `"optimizer"`, 0 as long as the model is not compiled.

    Raises:
        ValueError: On another backend.
    """
    _require_jax("bytes_per_device")
    optimizer = getattr(model, "optimizer", None)
    parts = {"weights": model.variables, "optimizer": optimizer.variables if optimizer else ()}
    counts = {}
    for name, variables in parts.items():
        held = collections.Counter()
        for variable in variables:
            for shard in variable.value.addressable_shards:
                held[shard.device] += shard.data.nbytes
        counts[name] = max(held.values(), default=0)
    return counts


def lower_train_step(model, batch, platform: str = "tpu"):
    """Lowers the whole train step for a platform, which needs none of its devices.

    Args:
        model: A compiled task on the JAX backend; under its distribution, if it has one.
        batch: A batch as `fit` takes it, of arrays.
        platform: `"tpu"`, `"cuda"`, `"rocm"` or `"cpu"`.

    Returns:
        The `jax.export.Exported`, with the program and the number of devices that it is for.

    Raises:
        ValueError: On another backend.
    """
    _require_jax("lower_train_step")
    from jax import export

    model._symbolic_build(data_batch=keras.utils.unpack_x_y_sample_weight(batch))
    parts = ("trainable", "non_trainable", "optimizer", "metrics")
    state = model._get_jax_state(**{f"{part}_variables": True for part in parts})
    distribution, shardings = keras.distribution.distribution(), None
    if distribution is not None:
        shardings = (None, model._get_state_sharding_spec())
        batch = keras.tree.map_structure(
            lambda values: keras.distribution.distribute_tensor(
                ops.convert_to_tensor(values), distribution.get_data_layout(values.shape)
            ),
            batch,
        )
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=shardings)
    return export.export(step, platforms=(platform,))(state, batch)


def _require_jax(what: str) -> None:
    if not IS_JAX:
        raise ValueError(
            f"`{what}` needs the JAX backend (KERAS_BACKEND=jax). Received: {keras.backend.backend()}"
        )
