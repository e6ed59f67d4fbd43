"""The precision of weights, and of what must not be computed in half of it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops

_WAIT = contextvars.ContextVar("wait", default=None)


def widen(x):
    """Casts half-precision floats to float32, for norms, rotations and the softmax; leaves wider ones."""
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        return x
    return ops.cast(x, "float32")


@contextlib.contextmanager
def weights_widened_in_turn(wait: Callable[[Any], contextlib.AbstractContextManager]) -> Iterator[None]:
    """While this is open, a block's operations wait for its input, the conversions of its weights too.

    Nothing else holds a conversion back that needs only the weights: a graph would make wide copies of all
    of them at once.

    Args:
        wait: From a tensor to a context manager in which operations are made that wait for it.
    """
    token = _WAIT.set(wait)
    try:
        yield
    finally:
        _WAIT.reset(token)


def waiting_for(x) -> contextlib.AbstractContextManager:
    """What `weights_widened_in_turn` says of a tensor."""
    wait = _WAIT.get()
    return contextlib.nullcontext() if wait is None else wait(x)


@keras.saving.register_keras_serializable(package="kerasllm")
class StoredHalfPolicy(keras.DTypePolicy):
    """Weights in half precision, each widened where it is used, so that all is computed in float32.

    Keras's own policies compute in the precision of the weights or in a lower one. TensorFlow adds up
    products of float16 in float16 on a CPU; these sums are float32's.

    Args:
        name: The precision of the weights: `"float16"` or `"bfloat16"`.
    """

    @property
    def compute_dtype(self) -> str:
        return "float32"
