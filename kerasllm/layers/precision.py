"""The precision of what must not be computed in half of it."""

import keras
from keras import ops


def widen(x):
    """Casts half-precision floats to float32, for norms, rotations and the softmax; leaves wider ones."""
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        return x
    return ops.cast(x, "float32")
