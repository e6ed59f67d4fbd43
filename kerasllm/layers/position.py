"""Ways to tell a transformer where a token stands."""

import inspect
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from kerasllm.layers.precision import widen


def _check_even(name: str, value: int) -> None:
    if value < 2 or value % 2:
        raise ValueError(f"`{name}` must be a positive even number. Received: {name}={value}")


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number. Received: {name}={value}")


def _frequencies(dim: int, max_wavelength: float) -> np.ndarray:
    """Geometric series `[dim / 2]` of angles per position, in radians.

    Rounded to float32 at every step, for so it was when the models were trained.
    """
    exponents = np.arange(0, dim, 2, dtype="float32") / np.float32(dim)
    powers = np.power(max_wavelength, exponents, dtype="float64").astype("float32")
    return np.float32(1.0) / powers


def _angles(positions, frequencies: np.ndarray):
    """Angles `[..., dim / 2]` in radians: positions times frequencies."""
    return ops.cast(positions, "float32")[..., None] * frequencies


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
        angles = _angles(positions, _frequencies(self.dim, self.max_wavelength))
        pairs = ops.stack([ops.sin(angles), ops.cos(angles)], axis=-1)
        encoded = ops.reshape(pairs, (*ops.shape(positions), self.dim))
        return ops.cast(encoded, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.dim)


# How a rotary embedding trained on short texts is stretched to long ones. Each function takes frequencies
# and their `max_wavelength`, and by keyword what a Hugging Face config.json calls so; it returns the
# frequencies to use and what multiplies the rotated vectors.


def _scale_linear(frequencies, max_wavelength, *, factor):
    """Chen et al.: "Extending Context Window of LLMs via Positional Interpolation" (2023)."""
    return frequencies / factor, 1.0


def _scale_llama3(
    frequencies,
    max_wavelength,
    *,
    factor,
    low_freq_factor,
    high_freq_factor,
    original_max_position_embeddings,
):
    """Llama 3.1: stretches slow pairs, keeps fast ones, and blends in between."""
    # Products with reciprocals, for so PyTorch divides a number by a tensor.
    wavelengths = 2 * math.pi * np.reciprocal(frequencies)
    turns = original_max_position_embeddings * np.reciprocal(wavelengths)
    kept = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (1.0 - kept) * frequencies / factor + kept * frequencies, 1.0


def _scale_yarn(
    frequencies,
    max_wavelength,
    *,
    factor,
    original_max_position_embeddings,
    attention_factor=None,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=None,
    mscale_all_dim=None,
    truncate=True,
):
    """Peng et al.: "YaRN: Efficient Context Window Extension of Large Language Models" (2023)."""
    dim = 2 * len(frequencies)

    def pair_with(turns):
        """The number of the pair, with a fraction, that turns so often in the original length."""
        wavelength = original_max_position_embeddings / (2 * math.pi * turns)
        return dim * math.log(wavelength) / (2 * math.log(max_wavelength))

    def temperature(weight):
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    first, last = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    stretched = np.clip((np.arange(dim // 2, dtype="float32") - first) / width, 0.0, 1.0)
    if attention_factor is None:
        attention_factor = temperature(1.0)
        if mscale and mscale_all_dim:
            attention_factor = temperature(mscale) / temperature(mscale_all_dim)
    return frequencies / factor * stretched + frequencies * (1.0 - stretched), attention_factor


ROTARY_SCALINGS = {"linear": _scale_linear, "llama3": _scale_llama3, "yarn": _scale_yarn}


def _scale(frequencies, max_wavelength: float, scaling: dict[str, Any] | None):
    """Applies the function of `ROTARY_SCALINGS` that `scaling` names, and checks its keys."""
    if scaling is None:
        return frequencies, 1.0
    arguments = dict(scaling)
    rope_type = arguments.pop("rope_type", None)
    if rope_type not in ROTARY_SCALINGS:
        raise ValueError(
            f"`rope_type` of a rotary scaling must be one of {sorted(ROTARY_SCALINGS)}. "
            f"Received: {rope_type!r}"
        )
    function = ROTARY_SCALINGS[rope_type]
    keys = list(inspect.signature(function).parameters.values())[2:]
    needed = {key.name for key in keys if key.default is key.empty}
    known = {key.name for key in keys}
    if not needed <= set(arguments) <= known:
        raise ValueError(
            f"A rotary scaling of the `rope_type` {rope_type!r} needs {sorted(needed)} and may have "
            f"{sorted(known - needed)}. Received: {scaling}"
        )
    _check_positive("factor", arguments["factor"])
    with np.errstate(all="ignore"):
        scaled, magnitude = function(frequencies, max_wavelength, **arguments)
    if not np.isfinite(scaled).all() or not math.isfinite(magnitude):
        raise ValueError(f"A rotary scaling must give finite angles. Received: {scaling}")
    return scaled, magnitude


@keras.saving.register_keras_serializable(package="kerasllm")
class RotaryEmbedding(keras.layers.Layer):
    """Rotates pairs of query and key components by an angle proportional to the position.

    The product of a rotated query and a rotated key depends on their distance only. Component `i` is
    paired with component `i + head_dim / 2`, the layout of Llama checkpoints in Hugging Face format.
    Su et al.: "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Args:
        head_dim: Width of a head, even.
        max_wavelength: The longest wavelength, in positions, divided by 2 pi (`rope_theta`).
        scaling: How the embedding is stretched to longer texts than it was trained on, in the words of
            a Hugging Face config.json: a `rope_type`, one of `ROTARY_SCALINGS`, and what that needs,
            such as `{"rope_type": "linear", "factor": 2.0}`. None: it is not.
        fraction: Which fraction of a head, from its first component on, is rotated; the rest stays.

    Raises:
        ValueError: If the rotated width is not even, the wavelength is not positive, or the scaling is
            unknown, incomplete or gives no finite angles.
    """

    def __init__(
        self,
        head_dim: int,
        max_wavelength: float = 10000.0,
        scaling: dict[str, Any] | None = None,
        fraction: float = 1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_even("head_dim", head_dim)
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"`fraction` must be in (0, 1]. Received: fraction={fraction}")
        _check_positive("max_wavelength", max_wavelength)
        self.head_dim = head_dim
        self.max_wavelength = max_wavelength
        self.scaling = scaling
        self.fraction = fraction
        self.rotary_dim = int(head_dim * fraction)
        _check_even("head_dim * fraction", self.rotary_dim)
        self._frequencies, self._magnitude = _scale(
            _frequencies(self.rotary_dim, max_wavelength), max_wavelength, scaling
        )

    def call(self, x, positions):
        """Rotates heads.

        Args:
            x: Floats `[batch, length, heads, head_dim]`.
            positions: Integers `[length]` or `[batch, length]`.

        Returns:
            Floats of the shape and dtype of `x`.
        """
        return self.rotate(x, *self.waves(positions))

    def waves(self, positions):
        """Computes what `rotate` needs, once for queries and keys.

        Args:
            positions: As in `call`.

        Returns:
            Cosines and sines `[..., length, 1, rotated]` in float32, each pair's sine first negative.
        """
        angles = _angles(positions, self._frequencies)[..., None, :]
        cos, sin = self._magnitude * ops.cos(angles), self._magnitude * ops.sin(angles)
        return ops.concatenate([cos, cos], axis=-1), ops.concatenate([-sin, sin], axis=-1)

    def rotate(self, x, cos, sin):
        """Rotates heads by waves that are there already; see `call`."""
        x, rest = widen(x), []
        cos, sin = ops.cast(cos, x.dtype), ops.cast(sin, x.dtype)
        # Not by slices: the gradient of each would be an array of the whole size, mostly zeros.
        if self.rotary_dim < self.head_dim:
            x, *rest = ops.split(x, [self.rotary_dim], axis=-1)
        first, second = ops.split(x, 2, axis=-1)
        # Both halves at once: a graph that nobody compiles has fewer operations.
        x = x * cos + ops.concatenate([second, first], axis=-1) * sin
        return ops.cast(ops.concatenate([x, *rest], axis=-1) if rest else x, self.compute_dtype)

    def compute_output_shape(self, x_shape, positions_shape):
        return x_shape


@keras.saving.register_keras_serializable(package="kerasllm")
class RelativePositionBias(keras.layers.Layer):
    """A trained number per head that attention adds to a score, by how far the key is from the query.

    Near distances have a bucket each, far ones share buckets of logarithmic width. Raffel et al.:
    "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020), section
    2.1.

    Args:
        num_heads: Number of heads.
        num_buckets: Number of buckets; with `bidirectional` each direction has half of them.
        max_distance: Distance from which on all keys share the last bucket.
        bidirectional: Whether keys after the query have buckets of their own; otherwise they share the
            query's, for causal attention hides them.
        initializer_range: Standard deviation of the normal initialisation.

    Raises:
        ValueError: If there are too few buckets, or not more distances than buckets.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if num_heads < 1:
            raise ValueError(f"`num_heads` must be at least 1. Received: num_heads={num_heads}")
        exact = num_buckets // (4 if bidirectional else 2)
        if not 1 <= exact < max_distance:
            raise ValueError(
                "`num_buckets` must leave at least one bucket to near distances in each direction, and "
                "`max_distance` must lie beyond them. "
                f"Received: num_buckets={num_buckets}, max_distance={max_distance}"
            )
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.initializer_range = initializer_range

    def build(self, input_shape=None):
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.num_buckets, self.num_heads),
            initializer=keras.initializers.RandomNormal(stddev=self.initializer_range),
        )

    def _buckets(self):
        """The bucket of each distance from `-max_distance` (the key before) to `max_distance`."""
        distance = np.arange(-self.max_distance, self.max_distance + 1)
        count, offset = self.num_buckets, 0
        if self.bidirectional:
            count //= 2
            offset = np.where(distance > 0, count, 0)
            distance = np.abs(distance)
        else:
            distance = np.maximum(-distance, 0)
        exact = count // 2
        # In float32, for that is how the models were trained; the last digit decides at powers of two.
        growth = np.log(np.maximum(distance, 1).astype("float32") / np.float32(exact))
        growth = growth / np.float32(math.log(self.max_distance / exact)) * np.float32(count - exact)
        far = np.minimum(exact + growth.astype("int32"), count - 1)
        return (offset + np.where(distance < exact, distance, far)).astype("int32")

    def call(self, query_positions, key_length):
        """Looks up what is added to the scores.

        Args:
            query_positions: Integers `[queries]` or `[batch, queries]`, the places of the queries.
            key_length: Number of keys, whose places count from 0.

        Returns:
            Floats `[1 or batch, num_heads, queries, key_length]`.
        """
        by_distance = ops.take(ops.convert_to_tensor(self.embeddings), self._buckets(), axis=0)
        places = ops.expand_dims(ops.cast(query_positions, "int32"), -1)
        distance = ops.arange(key_length, dtype="int32") - places
        index = ops.clip(distance, -self.max_distance, self.max_distance) + self.max_distance
        bias = ops.take(by_distance, index, axis=0)  # [..., queries, keys, heads]
        if len(bias.shape) == 3:
            bias = bias[None]
        return ops.transpose(bias, (0, 3, 1, 2))
