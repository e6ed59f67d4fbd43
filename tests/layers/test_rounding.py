"""Rounded weights beside NumPy, eagerly and as XLA compiles them."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

from kerasllm.export import litert_worker
from kerasllm.layers.rounding import round_to_4_bits, round_to_8_bits

RNG = np.random.default_rng(0)


def bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype("float32")


def reference_4_bits(kernel):
    """Each block by itself, with the first of the scales that lose least."""
    result = np.empty_like(kernel)
    for unit in range(kernel.shape[1]):
        for begin in range(0, kernel.shape[0], 32):
            block = kernel[begin : begin + 32, unit]
            tries = []
            for divisor in (7, 7.5, 8, 8.5):
                scale = max(bfloat16(np.abs(block).max() / np.float32(divisor)), np.float32(2.0**-14))
                tries.append(np.clip(np.rint(block / scale), -8, 7) * scale)
            losses = [np.square(block - each).sum() for each in tries]
            result[begin : begin + 32, unit] = tries[int(np.argmin(losses))]
    return result


def reference_8_bits(rows):
    scales = bfloat16(np.abs(rows).max(-1, keepdims=True) / np.float32(127))
    return np.rint(rows / np.where(scales > 0, scales, 1)) * scales


def kernel_with_zeros():
    kernel = RNG.standard_t(5, size=(96, 40)).astype("float32")
    kernel[:32, 0] = 0
    kernel[:, 1] = 0
    kernel[32:64, 2] *= 1e-6  # below the least scale of float16
    return kernel


@pytest.mark.parametrize("jit_compile", [False, True])
def test_4_bits_equal_the_definition(jit_compile):
    kernel = kernel_with_zeros()
    rounded = tf.function(round_to_4_bits, jit_compile=jit_compile)(kernel).numpy()
    np.testing.assert_array_equal(rounded, reference_4_bits(kernel))
    again = tf.function(round_to_4_bits, jit_compile=jit_compile)(rounded).numpy()
    np.testing.assert_array_equal(again, rounded)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_8_bits_equal_the_definition(jit_compile):
    rows = kernel_with_zeros().T.copy()
    by_rows = tf.function(lambda x: round_to_8_bits(x, -1), jit_compile=jit_compile)
    rounded = by_rows(rows).numpy()
    np.testing.assert_array_equal(rounded, reference_8_bits(rows))
    np.testing.assert_array_equal(by_rows(rounded).numpy(), rounded)
    by_columns = tf.function(lambda x: round_to_8_bits(x, 0), jit_compile=jit_compile)
    np.testing.assert_array_equal(by_columns(rows.T.copy()).numpy(), rounded.T)


def test_an_export_finds_the_same_numbers_again():
    """What it does with the nearest integers; its scale of 8 bits is a 127th of the largest weight."""
    kernel = kernel_with_zeros()
    matrix = round_to_4_bits(kernel).numpy().T
    scales = np.repeat(litert_worker.block_scales(matrix), 32, axis=1)
    np.testing.assert_array_equal(litert_worker.round_to_integers(matrix, scales) * scales, matrix)
    # Of few scales, about as well as with the export's many.
    scales = np.repeat(litert_worker.block_scales(kernel.T), 32, axis=1)
    best = litert_worker.round_to_integers(kernel.T, scales) * scales
    assert np.square(matrix - kernel.T).sum() < 1.05 * np.square(best - kernel.T).sum()

    rows = round_to_8_bits(kernel.T.copy(), -1).numpy()
    scales = np.maximum(np.abs(rows).max(-1, keepdims=True), np.float32(1e-9)) / 127
    np.testing.assert_array_equal(np.rint(rows / scales).astype("int8") * scales, rows)


@pytest.mark.parametrize("function", [round_to_4_bits, lambda x: round_to_8_bits(x, -1)])
def test_the_gradient_goes_straight_through(function):
    weights, factors = tf.Variable(kernel_with_zeros()), RNG.normal(size=(96, 40)).astype("float32")
    with tf.GradientTape() as tape:
        # Of the second order in what comes out, which is where the gradient is taken.
        total = tf.reduce_sum(factors * tf.square(function(tf.convert_to_tensor(weights))))
    wanted = 2 * factors * function(weights.numpy()).numpy()
    np.testing.assert_allclose(tape.gradient(total, weights), wanted, rtol=1e-6)
