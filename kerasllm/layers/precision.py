"""The precision of weights, and of what must not be computed in half of it."""

import keras
from keras import ops


def widen(x):
    """Casts half-precision floats to float32, for norms, rotations and the softmax; leaves wider ones."""
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        return x
    return ops.cast(x, "float32")


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
