"""Building a Keras model without giving its weights values or memory."""

import collections
import contextlib
import math
import mmap
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state

_PENDING = "uninitialized_variables"


def build_without_values(build: Callable[[], keras.Model]) -> keras.Model:
    """Calls `build` so that the variables it makes have a shape and a dtype, but no value yet.

    Keras would draw random numbers that a checkpoint replaces at once: time, and memory for both.
    Inside a `keras.StatelessScope` Keras puts that off until the scope ends, or for good if asked to; it
    keeps a list of such variables for the end of the next scope, from which they are taken out here.

    Args:
        build: Makes the model.

    Returns:
        The model. `set_value` gives its variables their values, `initialize_rest` the others.
    """
    earlier = global_state.get_global_attribute(_PENDING)
    global_state.set_global_attribute(_PENDING, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            return build()
    finally:
        global_state.set_global_attribute(_PENDING, earlier or [])


class WeightMemory:
    """Memory for the weights of a model, in huge pages where the system has them.

    Decoding reads all weights for each token; from pages of 4 KiB a tenth slower than from these. Each
    weight has a mapping of its own, which goes when the weight gets another value. They are made before
    the first is written to: lying side by side, they share huge pages.

    Args:
        layout: Shape and dtype of each weight, in the order in which they will be asked for.
    """

    def __init__(self, layout: Iterable[tuple[Sequence[int], str]]):
        self._arrays = collections.deque(self._make(shape, np.dtype(dtype)) for shape, dtype in layout)

    @staticmethod
    def _make(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, max(math.prod(shape) * dtype.itemsize, 1), **flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without huge pages gives what it has
                memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)

    def empty(self) -> np.ndarray:
        """Returns an array for the next weight, which holds nothing yet."""
        return self._arrays.popleft()


def set_value(variable: keras.Variable, value: np.ndarray) -> None:
    """Gives a variable of `build_without_values` its first value; TensorFlow takes over its memory."""
    with tf.init_scope():
        variable._initialize(_tensor_in_place(value) if keras.backend.backend() == "tensorflow" else value)
    variable._initializer = None


def _tensor_in_place(array: np.ndarray) -> tf.Tensor:
    """A tensor in the memory of an array, which nobody may change any more."""
    if array.dtype != tf.bfloat16.as_numpy_dtype:
        return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    # NumPy's own types do not include it.
    return tf.bitcast(tf.experimental.dlpack.from_dlpack(array.view("uint16").__dlpack__()), tf.bfloat16)


def initialize_rest(model: keras.Model) -> None:
    """Initialises, as Keras would have, the variables that have no value: states of dropout, say."""
    for variable in model.variables:
        if variable._value is None:
            variable._deferred_initialize()
