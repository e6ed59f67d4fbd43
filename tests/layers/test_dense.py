"""Products with matrices, as a graph and as XLA compiles them, beside NumPy in float64."""

import numpy as np
import pytest
import tensorflow as tf

from kerasllm.layers.dense import Dense, multiply_with_rows
from kerasllm.layers.xla import traced_for_xla

WIDTH, UNITS = 6, 10


def compiled(function, *specs):
    with traced_for_xla():
        traced = tf.function(function, jit_compile=True, autograph=False)
        return traced, traced.get_concrete_function(*specs)


def dense(width, **arguments):
    layer = Dense(UNITS, **arguments)
    layer.build((None, width))
    layer.set_weights([np.random.default_rng(3).normal(size=w.shape) for w in layer.weights])
    return layer


@pytest.mark.parametrize("width", [WIDTH, WIDTH + 1])
@pytest.mark.parametrize("arguments", [{"use_bias": False}, {"use_bias": True, "activation": "tanh"}])
def test_any_number_of_rows_gives_the_product(width, arguments):
    layer = dense(width, **arguments)
    _, any_count = compiled(layer, tf.TensorSpec([None, width], tf.float32))
    for count in (1, 2, 5):
        _, run = compiled(layer, tf.TensorSpec([count, width], tf.float32))
        x = np.random.default_rng(count).normal(size=(count, width)).astype(np.float32)
        expected = x.astype(np.float64) @ layer.kernel.numpy().astype(np.float64)
        if arguments["use_bias"]:
            expected = np.tanh(expected + layer.bias.numpy())
        for result in (any_count(tf.constant(x)), run(tf.constant(x)), layer(x)):
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_known", [True, False])
def test_one_row_alone_is_multiplied_in_two_parts(is_known):
    layer, half = dense(WIDTH, use_bias=False), f"f32[2,{WIDTH // 2},{UNITS}]"
    for count in (1, 3):
        spec = tf.TensorSpec([count if is_known else None, WIDTH], tf.float32)
        function, _ = compiled(layer, spec)
        with traced_for_xla():
            program = function.experimental_get_compiler_ir(tf.zeros([count, WIDTH]))(stage="hlo")
        assert (half in program) == (count == 1)


@pytest.mark.parametrize("wide", [UNITS, UNITS + 1])
def test_a_wide_matrix_scores_rows(wide):
    random = np.random.default_rng(5)
    matrix, rows = random.normal(size=(wide, WIDTH)), random.normal(size=(3, WIDTH))
    specs = [tf.TensorSpec([wide, WIDTH], tf.float64), tf.TensorSpec([None, WIDTH], tf.float64)]
    _, run = compiled(multiply_with_rows, *specs)
    for count in (1, 3):
        result = run(tf.constant(matrix), tf.constant(rows[:count]))
        np.testing.assert_allclose(result, rows[:count] @ matrix.T, rtol=1e-12)


def test_xla_keeps_the_parts_of_a_wide_matrix():
    wide = 10 * UNITS
    function, _ = compiled(multiply_with_rows, tf.TensorSpec([wide, WIDTH]), tf.TensorSpec([None, WIDTH]))
    for count in (1, 3):
        arguments = tf.zeros([wide, WIDTH]), tf.zeros([count, WIDTH])
        with traced_for_xla():
            program = function.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")
        assert f"f32[2,{wide // 2}" in next(line for line in program.splitlines() if " dot(" in line)
