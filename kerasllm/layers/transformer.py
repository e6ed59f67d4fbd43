"""Transformer blocks: attention and feed-forward, each with a norm and a residual connection."""

import keras

from kerasllm.layers.attention import MultiHeadAttention
from kerasllm.layers.feed_forward import FeedForward, GatedFeedForward
from kerasllm.layers.norm import LayerNorm, RMSNorm


class _Block(keras.layers.Layer):
    """What both blocks share. Every argument is described at `DecoderBlock`."""

    causal = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        intermediate_dim: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary_wavelength: float | None = None,
        cross_attention: bool = False,
        norm: str = "layer",
        norm_first: bool = True,
        norm_epsilon: float = 1e-5,
        activation: str = "gelu_tanh",
        gated: bool = False,
        use_bias: bool = True,
        dropout: float = 0.0,
        initializer_range: float = 0.02,
        output_initializer_range: float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if norm not in ("layer", "rms"):
            raise ValueError(f'`norm` must be "layer" or "rms". Received: {norm!r}')
        self.dim = dim
        self.num_heads = num_heads
        self.intermediate_dim = intermediate_dim
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rotary_wavelength = rotary_wavelength
        self.cross_attention = cross_attention
        self.norm = norm
        self.norm_first = norm_first
        self.norm_epsilon = norm_epsilon
        self.activation = activation
        self.gated = gated
        self.use_bias = use_bias
        self.dropout = dropout
        self.initializer_range = initializer_range
        self.output_initializer_range = output_initializer_range

        shared = {
            "use_bias": use_bias,
            "dropout": dropout,
            "initializer_range": initializer_range,
            "output_initializer_range": output_initializer_range,
            "dtype": self.dtype_policy,
        }

        def make_norm(name):
            if norm == "rms":
                return RMSNorm(norm_epsilon, name=name, dtype=self.dtype_policy)
            return LayerNorm(norm_epsilon, use_bias, name=name, dtype=self.dtype_policy)

        def make_attention(name, causal, rotary_wavelength):
            return MultiHeadAttention(
                dim,
                num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                causal=causal,
                rotary_wavelength=rotary_wavelength,
                name=name,
                **shared,
            )

        self.attention_norm = make_norm("attention_norm")
        self.attention = make_attention("attention", self.causal, rotary_wavelength)
        if cross_attention:
            self.memory_norm = make_norm("memory_norm")
            self.memory_attention = make_attention("memory_attention", False, None)
        self.feed_forward_norm = make_norm("feed_forward_norm")
        self.feed_forward = (GatedFeedForward if gated else FeedForward)(
            intermediate_dim, activation, name="feed_forward", **shared
        )

    def build(self, x_shape, memory_shape=None):
        self.attention_norm.build(x_shape)
        self.attention.build(x_shape)
        if self.cross_attention:
            self.memory_norm.build(x_shape)
            self.memory_attention.build(x_shape, memory_shape)
        self.feed_forward_norm.build(x_shape)
        self.feed_forward.build(x_shape)

    def _residual(self, x, norm, branch):
        """Adds a branch to the stream, with the norm before the branch or after the sum."""
        return x + branch(norm(x)) if self.norm_first else norm(x + branch(x))

    def _feed_forward(self, x, training):
        return self._residual(x, self.feed_forward_norm, lambda y: self.feed_forward(y, training=training))


@keras.saving.register_keras_serializable(package="kerasllm")
class EncoderBlock(_Block):
    """A block in which every token sees every token that the mask leaves.

    Args:
        dim, num_heads, intermediate_dim, ...: As in `DecoderBlock`; `cross_attention` must be False.
    """

    def __init__(self, dim: int, num_heads: int, intermediate_dim: int, **kwargs):
        if kwargs.get("cross_attention"):
            raise ValueError("An encoder block has no memory: `cross_attention` must be False.")
        super().__init__(dim, num_heads, intermediate_dim, **kwargs)

    def build(self, x_shape):
        # Keras allows `build` the shapes of arguments of `call` only, and there is no memory.
        super().build(x_shape)

    def call(self, x, attention_mask=None, positions=None, training: bool = False):
        """Transforms a sequence.

        Args:
            x: Floats `[batch, length, dim]`.
            attention_mask: Which keys count, see `mask_bias`.
            positions: Integers `[length]` or `[batch, length]` for the rotary embedding.
            training: Whether dropout is on.

        Returns:
            Floats `[batch, length, dim]`.
        """

        def attend(y):
            return self.attention(y, attention_mask=attention_mask, positions=positions, training=training)

        x = self._residual(x, self.attention_norm, attend)
        return self._feed_forward(x, training)


@keras.saving.register_keras_serializable(package="kerasllm")
class DecoderBlock(_Block):
    """A block in which no token sees a later one, with optional attention to an encoder's output.

    Args:
        dim: Width of the residual stream.
        num_heads: Number of query heads.
        intermediate_dim: Width inside the feed-forward network.
        num_kv_heads: Number of key-value heads; None: `num_heads`.
        head_dim: Width of a head; None: `dim / num_heads`.
        rotary_wavelength: `max_wavelength` of the rotary embedding; None: no rotary embedding.
        cross_attention: Whether a second attention reads a memory.
        norm: `"layer"` or `"rms"`.
        norm_first: Whether the norm comes before each branch (GPT-2, Llama) or after each sum (BERT).
        norm_epsilon: Epsilon of the norms.
        activation: Activation of the feed-forward network, see `FeedForward`.
        gated: Whether the feed-forward network is gated.
        use_bias: Whether matrices and layer norms have biases.
        dropout: Fraction set to zero while training.
        initializer_range: Standard deviation of the normal initialisation.
        output_initializer_range: The same for the matrices that write to the residual stream.
    """

    causal = True

    def __init__(self, dim: int, num_heads: int, intermediate_dim: int, **kwargs):
        super().__init__(dim, num_heads, intermediate_dim, **kwargs)

    def call(
        self,
        x,
        memory=None,
        attention_mask=None,
        memory_mask=None,
        positions=None,
        cache=None,
        cache_index=None,
        memory_cache=None,
        training: bool = False,
    ):
        """Transforms a sequence.

        Args:
            x: Floats `[batch, length, dim]`.
            memory: Floats `[batch, memory_length, memory_dim]`, an encoder's output.
            attention_mask: Which keys of the sequence count, see `mask_bias`.
            memory_mask: Which keys of the memory count.
            positions: Integers `[length]` or `[batch, length]` for the rotary embedding.
            cache: Key-value cache of the self-attention.
            cache_index: Column of the first token, see `MultiHeadAttention`.
            memory_cache: Instead of `memory`, what `memory_attention.memory_cache(memory)` gave.
            training: Whether dropout is on.

        Returns:
            Floats `[batch, length, dim]`; with `cache_index` also the updated cache.
        """
        has_memory = memory is not None or memory_cache is not None
        if has_memory != self.cross_attention:
            raise ValueError(
                "A memory must be given if and only if `cross_attention` is True. "
                f"Received: cross_attention={self.cross_attention}, memory given: {has_memory}"
            )
        updated = []

        def attend(y):
            result = self.attention(
                y,
                attention_mask=attention_mask,
                positions=positions,
                cache=cache,
                cache_index=cache_index,
                training=training,
            )
            if cache_index is None:
                return result
            updated.append(result[1])
            return result[0]

        def attend_to_memory(y):
            return self.memory_attention(
                y, memory, attention_mask=memory_mask, cache=memory_cache, training=training
            )

        x = self._residual(x, self.attention_norm, attend)
        if self.cross_attention:
            x = self._residual(x, self.memory_norm, attend_to_memory)
        x = self._feed_forward(x, training)
        return x if cache_index is None else (x, updated[0])
