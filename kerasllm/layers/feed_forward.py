"""The position-wise network of a transformer block: plain and gated."""

import keras
from keras import ops

from kerasllm.layers.dense import Dense
from kerasllm.layers.dropout import Dropout
from kerasllm.layers.gradient import forget_inside
from kerasllm.layers.shapes import flatten, unflatten

ACTIVATIONS = {
    "gelu": lambda x: ops.gelu(x, approximate=False),
    "gelu_tanh": lambda x: ops.gelu(x, approximate=True),
    "relu": ops.relu,
    "silu": ops.silu,
}


class _FeedForward(keras.layers.Layer):
    """What both forms share: arguments, checks and the matrices into and out of the wide layer."""

    input_names = ()

    def __init__(
        self,
        intermediate_dim: int,
        activation: str,
        use_bias: bool = True,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
        initializer_range: float = 0.02,
        output_initializer_range: float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if intermediate_dim < 1:
            raise ValueError(
                f"`intermediate_dim` must be at least 1. Received: intermediate_dim={intermediate_dim}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {sorted(ACTIVATIONS)}. Received: {activation!r}")
        self.intermediate_dim = intermediate_dim
        self.activation = activation
        self.use_bias = use_bias
        self.dropout = dropout
        self.activation_dropout = activation_dropout
        self.initializer_range = initializer_range
        self.output_initializer_range = (
            initializer_range if output_initializer_range is None else output_initializer_range
        )
        self.hidden_dropout_layer = Dropout(activation_dropout, dtype=self.dtype_policy)
        self.output_dropout_layer = Dropout(dropout, dtype=self.dtype_policy)

    def build(self, input_shape):
        dim = input_shape[-1]

        def dense(name, units, width, initializer_range):
            layer = Dense(
                units,
                use_bias=self.use_bias,
                kernel_initializer=keras.initializers.RandomNormal(stddev=initializer_range),
                dtype=self.dtype_policy,
                name=name,
            )
            layer.build((None, None, width))
            return layer

        for name in self.input_names:
            setattr(self, name, dense(name, self.intermediate_dim, dim, self.initializer_range))
        self.down = dense("down", dim, self.intermediate_dim, self.output_initializer_range)

    def _activate(self, *wide):
        """From what the matrices of `input_names` give to the layer in the middle."""
        raise NotImplementedError

    def call(self, x, training: bool = False):
        """Transforms each position by itself.

        Args:
            x: Floats `[batch, length, dim]`.
            training: Whether dropout is on.

        Returns:
            Floats `[batch, length, dim]`.
        """
        flat = flatten(x)

        def narrow(*wide):
            return self.down(self.hidden_dropout_layer(self._activate(*wide), training=training))

        flat = forget_inside(narrow, *(getattr(self, name)(flat) for name in self.input_names))
        return self.output_dropout_layer(unflatten(flat, x), training=training)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(package="kerasllm")
class FeedForward(_FeedForward):
    """Two matrices with an activation between them: `down(activation(up(x)))`.

    Args:
        intermediate_dim: Width of the layer in the middle.
        activation: `"gelu"` (exact), `"gelu_tanh"` (GPT-2's approximation), `"relu"` or `"silu"`.
        use_bias: Whether the matrices have biases.
        dropout: Fraction of the outputs set to zero while training.
        activation_dropout: The same for the wide layer.
        initializer_range: Standard deviation of the normal initialisation.
        output_initializer_range: The same for `down`; None takes `initializer_range`.
    """

    input_names = ("up",)

    def __init__(self, intermediate_dim: int, activation: str = "gelu", **kwargs):
        super().__init__(intermediate_dim, activation, **kwargs)

    def _activate(self, up):
        return ACTIVATIONS[self.activation](up)


@keras.saving.register_keras_serializable(package="kerasllm")
class GatedFeedForward(_FeedForward):
    """A feed-forward network whose activation is on a gate: `down(activation(gate(x)) * up(x))`.

    Shazeer: "GLU Variants Improve Transformer" (2020); with `"silu"` it is Llama's SwiGLU.

    Args:
        intermediate_dim: Width of the layer in the middle.
        activation: `"silu"`, `"gelu"`, `"gelu_tanh"` or `"relu"`, applied to the gate only.
        use_bias: Whether the matrices have biases.
        dropout: Fraction of the outputs set to zero while training.
        activation_dropout: The same for the wide layer.
        initializer_range: Standard deviation of the normal initialisation.
        output_initializer_range: The same for `down`; None takes `initializer_range`.
    """

    input_names = ("gate", "up")

    def __init__(self, intermediate_dim: int, activation: str = "silu", use_bias: bool = False, **kwargs):
        super().__init__(intermediate_dim, activation, use_bias, **kwargs)

    def _activate(self, gate, up):
        return ACTIVATIONS[self.activation](gate) * up
