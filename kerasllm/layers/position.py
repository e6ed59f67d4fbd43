"""Ways to tell a transformer where a token stands."""

import keras
import numpy as np
from keras import ops


def _check_even(name: str, value: int) -> None:
    if value < 2 or value % 2:
        raise ValueError(f"`{name}` must be a positive even number. Received: {name}={value}")


def _angles(positions, dim: int, max_wavelength: float):
    """Angles `[..., dim / 2]` in radians: position times a geometric series of frequencies."""
    frequencies = max_wavelength ** (-np.arange(0, dim, 2, dtype="float64") / dim)
    return ops.cast(positions, "float32")[..., None] * frequencies.astype("float32")


@keras.saving.register_keras_serializable(package="kerasllm")
class LearnedPositionEmbedding(keras.layers.Layer):
    """A trained vector for each position, as in GPT-2 and BERT.

    Args:
        max_length: Number of positions.
        dim: Width of a vector.
        initializer_range: Standard deviation of the normal initialisation.
    """

    def __init__(self, max_length: int, dim: int, initializer_range: float = 0.02, **kwargs):
        super().__init__(**kwargs)
        for name, value in (("max_length", max_length), ("dim", dim)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")
        self.max_length = max_length
        self.dim = dim
        self.initializer_range = initializer_range

    def build(self, input_shape=None):
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.max_length, self.dim),
            initializer=keras.initializers.RandomNormal(stddev=self.initializer_range),
        )

    def call(self, positions):
        """Looks up position vectors.

        Args:
            positions: Integers of any shape `[...]`, each in `[0, max_length)`.

        Returns:
            Floats `[..., dim]`.
        """
        return ops.take(ops.convert_to_tensor(self.embeddings), positions, axis=0)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.dim)


@keras.saving.register_keras_serializable(package="kerasllm")
class SinusoidalPositionEncoding(keras.layers.Layer):
    """Fixed sines and cosines of geometrically spaced wavelengths, interleaved.

    Vaswani et al.: "Attention Is All You Need" (2017), section 3.5.

    Args:
        dim: Width of a vector, even.
        max_wavelength: The longest wavelength, in positions, divided by 2 pi.
    """

    def __init__(self, dim: int, max_wavelength: float = 10000.0, **kwargs):
        super().__init__(**kwargs)
        _check_even("dim", dim)
        self.dim = dim
        self.max_wavelength = max_wavelength

    def call(self, positions):
        """Encodes positions.

        Args:
            positions: Integers of any shape `[...]`.

        Returns:
            Floats `[..., dim]`: sines at the even places, cosines at the odd ones.
        """
        angles = _angles(positions, self.dim, self.max_wavelength)
        pairs = ops.stack([ops.sin(angles), ops.cos(angles)], axis=-1)
        encoded = ops.reshape(pairs, (*ops.shape(positions), self.dim))
        return ops.cast(encoded, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.dim)


@keras.saving.register_keras_serializable(package="kerasllm")
class RotaryEmbedding(keras.layers.Layer):
    """Rotates pairs of query and key components by an angle proportional to the position.

    The product of a rotated query and a rotated key depends on their distance only. Component `i` is
    paired with component `i + head_dim / 2`, the layout of Llama checkpoints in Hugging Face format.
    Su et al.: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Args:
        head_dim: Width of a head, even.
        max_wavelength: The longest wavelength, in positions, divided by 2 pi (`rope_theta`).
    """

    def __init__(self, head_dim: int, max_wavelength: float = 10000.0, **kwargs):
        super().__init__(**kwargs)
        _check_even("head_dim", head_dim)
        self.head_dim = head_dim
        self.max_wavelength = max_wavelength

    def call(self, x, positions):
        """Rotates heads.

        Args:
            x: Floats `[batch, length, heads, head_dim]`.
            positions: Integers `[length]` or `[batch, length]`.

        Returns:
            Floats of the shape and dtype of `x`.
        """
        angles = _angles(positions, self.head_dim, self.max_wavelength)[..., None, :]
        cos, sin = ops.cos(angles), ops.sin(angles)
        first, second = ops.split(ops.cast(x, "float32"), 2, axis=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return ops.cast(ops.concatenate(rotated, axis=-1), self.compute_dtype)

    def compute_output_shape(self, x_shape, positions_shape):
        return x_shape
