"""Transformer blocks: attention and feed-forward, each with a norm and a residual connection."""

from typing import Any

import keras

from kerasllm.layers.attention import MultiHeadAttention
from kerasllm.layers.feed_forward import FeedForward, GatedFeedForward
from kerasllm.layers.gradient import forget_block, forget_inside
from kerasllm.layers.norm import LayerNorm, RMSNorm
from kerasllm.layers.precision import waiting_for


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
        query_scale: float | None = None,
        score_cap: float | None = None,
        sliding_window: int | None = None,
        rotary_wavelength: float | None = None,
        rotary_scaling: dict[str, Any] | None = None,
        rotary_fraction: float = 1.0,
        qk_norm: bool = False,
        cross_attention: bool = False,
        norm: str = "layer",
        norm_first: bool = True,
        norm_last: bool = False,
        norm_epsilon: float = 1e-5,
        norm_unit_offset: bool = False,
        activation: str = "gelu_tanh",
        gated: bool = False,
        use_bias: bool = True,
        attention_bias: bool | None = None,
        attention_output_bias: bool | None = None,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        attention_output_dropout: float | None = None,
        activation_dropout: float = 0.0,
        initializer_range: float = 0.02,
        output_initializer_range: float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if norm not in ("layer", "rms"):
            raise ValueError(f'`norm` must be "layer" or "rms". Received: {norm!r}')
        if norm_unit_offset and norm != "rms":
            raise ValueError(f'`norm_unit_offset` needs `norm` to be "rms". Received: {norm!r}')
        if norm_last and not norm_first:
            raise ValueError("`norm_last` needs `norm_first`. Received: norm_first=False")
        self.cross_attention = cross_attention
        self.norm_first = norm_first
        shared = {
            "initializer_range": initializer_range,
            "output_initializer_range": output_initializer_range,
            "dtype": self.dtype_policy,
        }

        def make_norm(name):
            if norm == "rms":
                return RMSNorm(norm_epsilon, norm_unit_offset, name=name, dtype=self.dtype_policy)
            return LayerNorm(norm_epsilon, use_bias, name=name, dtype=self.dtype_policy)

        def make_attention(name, **arguments):
            return MultiHeadAttention(
                dim,
                num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                query_scale=query_scale,
                score_cap=score_cap,
                qk_norm=qk_norm,
                norm_epsilon=norm_epsilon,
                norm_unit_offset=norm_unit_offset,
                use_bias=use_bias if attention_bias is None else attention_bias,
                output_bias=attention_output_bias,
                dropout=dropout if attention_output_dropout is None else attention_output_dropout,
                attention_dropout=dropout if attention_dropout is None else attention_dropout,
                name=name,
                **arguments,
                **shared,
            )

        self.attention_norm = make_norm("attention_norm")
        self.attention = make_attention(
            "attention",
            causal=self.causal,
            sliding_window=sliding_window,
            rotary_wavelength=rotary_wavelength,
            rotary_scaling=rotary_scaling,
            rotary_fraction=rotary_fraction,
        )
        if cross_attention:
            self.memory_norm = make_norm("memory_norm")
            self.memory_attention = make_attention("memory_attention")
        self.feed_forward_norm = make_norm("feed_forward_norm")
        self.feed_forward = (GatedFeedForward if gated else FeedForward)(
            intermediate_dim,
            activation,
            use_bias=use_bias,
            dropout=dropout,
            activation_dropout=activation_dropout,
            name="feed_forward",
            **shared,
        )
        # The second norms of the branches.
        self.attention_last_norm = self.memory_last_norm = self.feed_forward_last_norm = None
        if norm_last:
            self.attention_last_norm = make_norm("attention_last_norm")
            if cross_attention:
                self.memory_last_norm = make_norm("memory_last_norm")
            self.feed_forward_last_norm = make_norm("feed_forward_last_norm")

    def build(self, x_shape, memory_shape=None):
        self.attention_norm.build(x_shape)
        self.attention.build(x_shape)
        if self.cross_attention:
            self.memory_norm.build(x_shape)
            self.memory_attention.build(x_shape, memory_shape)
        self.feed_forward_norm.build(x_shape)
        self.feed_forward.build(x_shape)
        for norm in (self.attention_last_norm, self.memory_last_norm, self.feed_forward_last_norm):
            if norm is not None:
                norm.build(x_shape)

    def __call__(self, x, memory=None, position_bias=None, **kwargs):
        # What has a gradient must be among the inputs of what is computed again.
        inputs = {"memory": memory, "position_bias": position_bias}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        call = super().__call__
        with waiting_for(x):
            return forget_block(
                lambda x, *others: call(x, **dict(zip(inputs, others, strict=True)), **kwargs),
                x,
                *inputs.values(),
            )

    def _residual(self, x, norm, branch, last_norm):
        """Adds a branch to the stream, with the norm before the branch or after the sum."""
        if not self.norm_first:
            return forget_inside(norm, x + branch(x))
        y = branch(forget_inside(norm, x))
        return x + (y if last_norm is None else forget_inside(last_norm, y))

    def _feed_forward(self, x, training):
        return self._residual(
            x,
            self.feed_forward_norm,
            lambda y: self.feed_forward(y, training=training),
            self.feed_forward_last_norm,
        )


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

    def call(self, x, attention_mask=None, position_bias=None, positions=None, training: bool = False):
        """Transforms a sequence.

        Args:
            x: Floats `[batch, length, dim]`.
            attention_mask: Which keys count, see `mask_bias`.
            position_bias: Added to the scores of the attention, see `MultiHeadAttention`.
            positions: Integers `[length]` or `[batch, length]` for the rotary embedding.
            training: Whether dropout is on.

        Returns:
            Floats `[batch, length, dim]`.
        """

        def attend(y):
            return self.attention(
                y,
                attention_mask=attention_mask,
                position_bias=position_bias,
                positions=positions,
                training=training,
            )

        x = self._residual(x, self.attention_norm, attend, self.attention_last_norm)
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
        query_scale: Multiplies the queries; None: `1 / sqrt(head_dim)`.
        score_cap: Bound that the scores of the attention approach; None: no bound.
        sliding_window: Number of keys that a query sees, its own place included; None: all before it.
            Not for an encoder.
        rotary_wavelength: `max_wavelength` of the rotary embedding; None: no rotary embedding.
        rotary_scaling: `scaling` of the rotary embedding, see `RotaryEmbedding`.
        rotary_fraction: `fraction` of the rotary embedding.
        qk_norm: Whether each head of queries and keys is normalised.
        cross_attention: Whether a second attention reads a memory.
        norm: `"layer"` or `"rms"`.
        norm_first: Whether the norm comes before each branch (GPT-2, Llama) or after each sum (BERT).
        norm_last: Whether there is another norm at the end of each branch, before the sum (Gemma 2).
        norm_epsilon: Epsilon of the norms.
        norm_unit_offset: `unit_offset` of the norms, see `RMSNorm`.
        activation: Activation of the feed-forward network, see `FeedForward`.
        gated: Whether the feed-forward network is gated.
        use_bias: Whether matrices and layer norms have biases.
        attention_bias: Whether queries, keys and values have biases; None: as `use_bias`.
        attention_output_bias: Whether the output matrix of the attention has one; None: as they have.
        dropout: Fraction of each branch's output set to zero while training.
        attention_dropout: The same for the attention weights; None: `dropout`.
        attention_output_dropout: The same for what the attention returns; None: `dropout`.
        activation_dropout: The same for the wide layer of the feed-forward network.
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
        position_bias=None,
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
            position_bias: Added to the scores of the self-attention, see `MultiHeadAttention`.
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
                position_bias=position_bias,
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

        x = self._residual(x, self.attention_norm, attend, self.attention_last_norm)
        if self.cross_attention:
            x = self._residual(x, self.memory_norm, attend_to_memory, self.memory_last_norm)
        x = self._feed_forward(x, training)
        return x if cache_index is None else (x, updated[0])
