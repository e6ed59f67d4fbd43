"""Layer normalisation and root-mean-square normalisation, computed in float32 at least."""

import keras
from keras import ops

from kerasllm.layers.precision import widen


class _Norm(keras.layers.Layer):
    """What both norms share: the epsilon, the gain, and float32 arithmetic in any lower precision."""

    def __init__(self, epsilon: float = 1e-5, **kwargs):
        super().__init__(**kwargs)
        if not epsilon > 0:
            raise ValueError(f"`epsilon` must be positive. Received: epsilon={epsilon}")
        self.epsilon = epsilon

    def build(self, input_shape):
        self.scale = self._vector("scale", input_shape[-1], "ones")

    def _vector(self, name, size, initializer):
        # Gains and biases stay in the variable dtype: half precision would lose them.
        return self.add_weight(name=name, shape=(size,), initializer=initializer, autocast=False)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="kerasllm")
class LayerNorm(_Norm):
    """Normalises each vector to mean 0 and variance 1, then scales and shifts it.

    Ba, Kiros, Hinton: "Layer Normalization" (2016).

    Args:
        epsilon: Added to the variance.
        use_bias: Whether a learned shift follows the scale.
    """

    def __init__(self, epsilon: float = 1e-5, use_bias: bool = True, **kwargs):
        super().__init__(epsilon=epsilon, **kwargs)
        self.use_bias = use_bias

    def build(self, input_shape):
        super().build(input_shape)
        if self.use_bias:
            self.bias = self._vector("bias", input_shape[-1], "zeros")

    def call(self, x):
        """Normalises the last axis.

        Args:
            x: Floats `[..., dim]`.

        Returns:
            Floats of the same shape and dtype.
        """
        wide = widen(x)
        centred = wide - ops.mean(wide, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(centred), axis=-1, keepdims=True)
        # Gain times reciprocal root first: a converter that sees `normalised * gain` last would fold
        # the gain into the next matrix, and a tied output head would no longer be tied.
        y = centred * (ops.rsqrt(variance + self.epsilon) * ops.cast(self.scale, wide.dtype))
        if self.use_bias:
            y = y + ops.cast(self.bias, wide.dtype)
        return ops.cast(y, self.compute_dtype)


@keras.saving.register_keras_serializable(package="kerasllm")
class RMSNorm(_Norm):
    """Divides each vector by its root mean square, then scales it.

    Zhang, Sennrich: "Root Mean Square Layer Normalization" (2019).

    Args:
        epsilon: Added to the mean square.
        unit_offset: Whether the gain is `1 + scale`, with a scale that starts at zero, as in Gemma.
    """

    def __init__(self, epsilon: float = 1e-5, unit_offset: bool = False, **kwargs):
        super().__init__(epsilon=epsilon, **kwargs)
        self.unit_offset = unit_offset

    def build(self, input_shape):
        self.scale = self._vector("scale", input_shape[-1], "zeros" if self.unit_offset else "ones")

    def call(self, x):
        """Normalises the last axis.

        Args:
            x: Floats `[..., dim]`.

        Returns:
            Floats of the same shape and dtype.
        """
        wide = widen(x)
        mean_square = ops.mean(ops.square(wide), axis=-1, keepdims=True)
        gain = ops.cast(self.scale, wide.dtype)
        if self.unit_offset:
            gain = 1.0 + gain
        # The order of the products is that of LayerNorm, for the same reason.
        y = wide * (ops.rsqrt(mean_square + self.epsilon) * gain)
        return ops.cast(y, self.compute_dtype)
