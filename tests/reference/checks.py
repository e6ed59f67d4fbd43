"""What must hold for every layer and model, whatever it computes."""

import json
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf


def to_numpy(tensor):
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


def assert_close(actual, expected, tolerance=1e-5):
    """Compares shapes and values; the tolerance is relative to the largest expected value."""
    actual, expected = to_numpy(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def check_layer(layer, *inputs, no_gradient=()):
    """Runs every check of this file.

    Args:
        layer: A built layer or model with random weights.
        inputs: Arrays `[batch, length, ...]` for its positional arguments, with at least two rows.
        no_gradient: Endings of the paths of weights whose gradient is zero by the maths.
    """
    check_rows_are_independent(layer, *inputs)
    check_graphs(layer, *inputs)
    check_gradients(layer, *inputs, no_gradient=no_gradient)
    check_config(layer, *inputs)
    check_precision(layer, "mixed_float16", 2e-2, *inputs)
    bfloat16 = check_precision(layer, "mixed_bfloat16", 1e-1, *inputs)
    check_saving(bfloat16, *inputs)


def check_rows_are_independent(layer, *inputs):
    """A row's result is the same to the last bit whatever the other rows are."""
    neighbours_changed = [np.concatenate([array[:1], array[1:][..., ::-1]]) for array in inputs]
    before, after = to_numpy(layer(*inputs)), to_numpy(layer(*neighbours_changed))
    np.testing.assert_array_equal(before[0], after[0])


def check_graphs(layer, *inputs):
    """One graph serves every batch size and length, and XLA computes the same."""
    traces = []

    def call(*tensors):
        traces.append(1)
        return layer(*tensors)

    specs = [tf.TensorSpec((None, None, *array.shape[2:]), array.dtype) for array in inputs]
    graph = tf.function(call, input_signature=specs, autograph=False)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using a softmax")  # over the only token
        for rows, length in ((len(inputs[0]), None), (1, 1), (1, 3)):
            parts = [array[:rows, :length] for array in inputs]
            assert_close(graph(*parts), to_numpy(layer(*parts)))
    assert len(traces) == 1

    compiled = tf.function(layer, jit_compile=True, autograph=False)
    assert_close(compiled(*map(tf.constant, inputs)), to_numpy(layer(*inputs)))


def check_gradients(layer, *inputs, no_gradient=()):
    """Every trainable weight moves the output."""
    with tf.GradientTape() as tape:
        outputs = layer(*inputs)
        direction = np.random.default_rng(2).standard_normal(outputs.shape).astype("float32")
        loss = tf.reduce_sum(outputs * direction)
    gradients = tape.gradient(loss, [weight.value for weight in layer.trainable_weights])
    for weight, gradient in zip(layer.trainable_weights, gradients, strict=True):
        assert gradient is not None, weight.path
        if not weight.path.endswith(tuple(no_gradient)):
            assert np.abs(tf.convert_to_tensor(gradient)).max() > 1e-3, weight.path
    assert len(layer.trainable_weights) == len(layer.weights)


def clone(layer, *inputs, dtype=None):
    """Makes the layer again from its configuration, with the same weights."""
    config = layer.get_config() if dtype is None else {**layer.get_config(), "dtype": dtype}
    copy = type(layer).from_config(config)
    copy(*inputs)
    copy.set_weights(layer.get_weights())
    return copy


def check_config(layer, *inputs):
    """The configuration is plain JSON and holds everything that decides what the layer computes."""
    copy = clone(layer, *inputs)
    assert json.loads(json.dumps(copy.get_config())) == json.loads(json.dumps(layer.get_config()))
    assert [w.path for w in copy.weights] == [w.path for w in layer.weights]
    np.testing.assert_array_equal(to_numpy(copy(*inputs)), to_numpy(layer(*inputs)))


def check_precision(layer, policy, tolerance, *inputs):
    """Computes in the dtype of the policy all the way down, with the weights in float32."""
    copy = clone(layer, *inputs, dtype=policy)
    outputs = copy(*inputs)
    assert keras.backend.standardize_dtype(outputs.dtype) == copy.compute_dtype
    assert {sublayer.dtype_policy.name for sublayer in copy._flatten_layers()} == {policy}
    assert {weight.dtype for weight in copy.weights} <= {"float32"}
    assert_close(outputs, to_numpy(layer(*inputs)), tolerance)
    return copy


def check_saving(layer, *inputs):
    """A `.keras` file gives back the same outputs, dtype and number of weights; so does `keras.Input`."""
    model, expected = layer, layer(*inputs)
    symbolic = [keras.Input((None, *a.shape[2:]), dtype=str(a.dtype)) for a in inputs]
    symbolic_outputs = layer(*symbolic)
    assert symbolic_outputs.shape == (None, None, *expected.shape[2:])
    assert symbolic_outputs.dtype == layer.compute_dtype
    if not isinstance(layer, keras.Model):
        model = keras.Model(symbolic, symbolic_outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.keras")
        model.save(path)
        reloaded = keras.models.load_model(path)
    arguments = inputs if model is layer else [list(inputs)]
    actual = reloaded(*arguments)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(to_numpy(actual), to_numpy(expected))
    assert [w.shape for w in reloaded.weights] == [w.shape for w in model.weights]
    for mine, theirs in zip(reloaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
