"""Keras layers of language models, in pure `keras.ops`, with plain arguments."""

from kerasllm.layers.attention import (
    CausalSelfAttention,
    MultiHeadAttention,
    SelfAttention,
    SimplifiedSelfAttention,
)
from kerasllm.layers.embedding import TokenEmbedding
from kerasllm.layers.feed_forward import FeedForward, GatedFeedForward
from kerasllm.layers.norm import LayerNorm, RMSNorm
from kerasllm.layers.position import (
    LearnedPositionEmbedding,
    RelativePositionBias,
    RotaryEmbedding,
    SinusoidalPositionEncoding,
)
from kerasllm.layers.transformer import DecoderBlock, EncoderBlock

__all__ = [
    "CausalSelfAttention",
    "DecoderBlock",
    "EncoderBlock",
    "FeedForward",
    "GatedFeedForward",
    "LayerNorm",
    "LearnedPositionEmbedding",
    "MultiHeadAttention",
    "RMSNorm",
    "RelativePositionBias",
    "RotaryEmbedding",
    "SelfAttention",
    "SimplifiedSelfAttention",
    "SinusoidalPositionEncoding",
    "TokenEmbedding",
]
