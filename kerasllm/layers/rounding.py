"""Weights that are rounded where they are used, while what is trained are the exact ones.

The gradient for what comes out of the rounding is taken as that for what goes in, the straight-through
estimator (Bengio et al.: "Estimating or Propagating Gradients Through Stochastic Neurons", 2013). So Jacob
et al. train for integers: "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (2018).
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

# So many weights of 4 bits share a scale.
BLOCK = 32
# The largest weight of a block is so many times the scale. With the integers from -8 to 7 that gives 7 or 8
# steps, for which the first and the third find the same scale again: what is rounded stays what it is.
_DIVISORS = (7.0, 7.5, 8.0, 8.5)


class Rounding(NamedTuple):
    """How weights are rounded.

    Attributes:
        kernel: From the matrix of a dense layer `[inputs, units]` to the same, rounded; float32.
        rows: From rows of a token table `[..., width]` to the same, rounded; float32.
    """

    kernel: Callable[[Any], Any]
    rows: Callable[[Any], Any]


_ROUNDING = contextvars.ContextVar("rounding", default=None)


@contextlib.contextmanager
def weights_rounded_with(rounding: Rounding | None) -> Iterator[None]:
    """While this is open, dense layers and token embeddings round their weights; None: they do not."""
    token = _ROUNDING.set(rounding)
    try:
        yield
    finally:
        _ROUNDING.reset(token)


def weight_rounding() -> Rounding | None:
    """Returns the rounding of the `weights_rounded_with` that is open, or None."""
    return _ROUNDING.get()


@contextlib.contextmanager
def weights_restored(variables: Iterable[keras.Variable]) -> Iterator[None]:
    """While this is open, variables may change; afterwards they are what they were."""
    kept = {id(variable): (variable, variable.numpy()) for variable in variables}
    try:
        yield
    finally:
        for variable, value in kept.values():
            variable.assign(value)


def exact_value(variable):
    """Returns the value of a variable as it is stored, where Keras casts it to the compute dtype."""
    from keras.src.backend import AutocastScope  # Keras has no public way; needed by such trainings only

    with AutocastScope(None):
        # Reshaped, it is a value and no variable, which would want a gradient of its own kind.
        return ops.reshape(variable, variable.shape)


def round_to_4_bits(kernel):
    """Rounds a matrix to integers from -8 to 7 times a scale for each 32 inputs of a unit.

    Args:
        kernel: Float32 `[inputs, units]`.

    Returns:
        Float32 `[inputs, units]`. The scales are bfloat16 and float16 numbers as well, so `block_scales` of
        the LiteRT export finds the same products again.
    """

    def round_blocks(kernel):
        blocks = ops.reshape(kernel, (-1, BLOCK, kernel.shape[1]))
        bound = ops.max(ops.abs(blocks), axis=1, keepdims=True)
        best = least = None
        for divisor in _DIVISORS:
            scale = ops.maximum(_to_bfloat16(bound * (1 / divisor)), np.finfo("float16").tiny)
            rounded = ops.clip(ops.round(blocks / scale), -8.0, 7.0) * scale
            loss = ops.sum(ops.square(blocks - rounded), axis=1, keepdims=True)
            if best is None:
                best, least = rounded, loss
            else:
                best, least = ops.where(loss < least, rounded, best), ops.minimum(loss, least)
        return ops.reshape(best, kernel.shape)

    return _straight_through(round_blocks, kernel)


def round_to_8_bits(weights, axis: int):
    """Rounds weights to integers from -127 to 127 times a scale for each row.

    Args:
        weights: Float32 of any shape.
        axis: The axis that a row lies along.

    Returns:
        Float32 of the same shape. The scales are bfloat16 numbers, of which 127 times one is a float32: the
        scale that an export takes of the largest weight is the same to the bit.
    """

    def round_rows(weights):
        bound = ops.max(ops.abs(weights), axis=axis, keepdims=True)
        # Where a row is zero, its scale is any.
        scale = _to_bfloat16(ops.maximum(bound, 1e-9) * (1 / 127))
        return ops.clip(ops.round(weights / scale), -127.0, 127.0) * scale

    return _straight_through(round_rows, weights)


def _straight_through(function: Callable, weights):
    """`function(weights)` with the gradient of the identity.

    Not `weights + stop_gradient(rounded - weights)`, which is not `rounded` to the bit.
    """

    @ops.custom_gradient
    def forward(weights):
        return function(weights), lambda upstream: upstream

    return forward(weights)


def _to_bfloat16(x):
    """The nearest bfloat16 numbers, as float32. Of two casts XLA may leave both out."""
    bits = ops.view(x, "int32")
    bits = bits + 0x7FFF + ops.bitwise_and(ops.right_shift(bits, 16), 1)
    return ops.view(ops.bitwise_and(bits, -0x10000), "float32")
