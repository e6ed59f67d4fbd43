"""GPT-2: a decoder with learned positions, layer norms before the branches and a tied head."""

import dataclasses
import math
from typing import Any, ClassVar

import keras
from keras import ops

from kerasllm.layers import DecoderBlock, LayerNorm, LearnedPositionEmbedding, TokenEmbedding
from kerasllm.models.base import SAME, SPLIT_IN_THREE, LanguageModel, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPT2Config(ModelConfig):
    """Configuration of `GPT2`; the defaults are GPT-2 small.

    Args:
        vocabulary_size: Number of tokens.
        context_length: Longest sequence, in tokens.
        num_layers: Number of blocks.
        num_heads: Number of attention heads.
        dim: Width of the residual stream.
        intermediate_dim: Width inside the feed-forward network; None: `4 * dim`.
        activation: Activation of the feed-forward network, see `FeedForward`.
        use_bias: Whether matrices and norms have biases.
        dropout: Fraction set to zero while training.
        layer_norm_epsilon: Epsilon of the norms.
        tie_embeddings: Whether the output head is the token embedding.
        initializer_range: Standard deviation of the normal initialisation; matrices that write to the
            residual stream start smaller by `sqrt(2 * num_layers)`.
    """

    huggingface_names: ClassVar[dict[str, str]] = {
        "vocab_size": "vocabulary_size",
        "n_positions": "context_length",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "n_embd": "dim",
        "n_inner": "intermediate_dim",
        "activation_function": "activation",
        "use_bias": "use_bias",
        "attn_pdrop": "dropout",
        "embd_pdrop": "dropout",
        "resid_pdrop": "dropout",
        "layer_norm_epsilon": "layer_norm_epsilon",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "initializer_range",
    }
    huggingface_fixed: ClassVar[dict[str, Any]] = {
        "add_cross_attention": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    }
    # The `summary_*` names belong to a head of another task; upcasting is what the layers always do.
    huggingface_ignored: ClassVar[frozenset[str]] = frozenset(
        "n_ctx reorder_and_upcast_attn summary_activation "
        "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj".split()
    )

    vocabulary_size: int = 50257
    context_length: int = 1024
    num_layers: int = 12
    num_heads: int = 12
    dim: int = 768
    intermediate_dim: int | None = None
    activation: str = "gelu_tanh"
    use_bias: bool = True
    dropout: float = 0.1
    layer_norm_epsilon: float = 1e-5
    tie_embeddings: bool = True
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.num_layers < 1:
            raise ValueError(f"`num_layers` must be at least 1. Received: {self.num_layers}")


@keras.saving.register_keras_serializable(package="kerasllm")
class GPT2(LanguageModel):
    """GPT-2 as a Keras model: token ids in, logits out.

    Radford et al.: "Language Models are Unsupervised Multitask Learners" (2019).

    Args:
        config: A `GPT2Config`.
    """

    config_class = GPT2Config
    huggingface_architecture = "GPT2LMHeadModel"
    weights_table = {
        "transformer.wte.weight": ("token_embedding/embeddings", SAME),
        "transformer.wpe.weight": ("position_embedding/embeddings", SAME),
        "transformer.h.{}.ln_1.weight": ("block_{}/attention_norm/scale", SAME),
        "transformer.h.{}.ln_1.bias": ("block_{}/attention_norm/bias", SAME),
        "transformer.h.{}.attn.c_attn.weight": (
            tuple(f"block_{{}}/attention/{name}/kernel" for name in ("query", "key", "value")),
            SPLIT_IN_THREE,
        ),
        "transformer.h.{}.attn.c_attn.bias": (
            tuple(f"block_{{}}/attention/{name}/bias" for name in ("query", "key", "value")),
            SPLIT_IN_THREE,
        ),
        "transformer.h.{}.attn.c_proj.weight": ("block_{}/attention/output/kernel", SAME),
        "transformer.h.{}.attn.c_proj.bias": ("block_{}/attention/output/bias", SAME),
        "transformer.h.{}.ln_2.weight": ("block_{}/feed_forward_norm/scale", SAME),
        "transformer.h.{}.ln_2.bias": ("block_{}/feed_forward_norm/bias", SAME),
        "transformer.h.{}.mlp.c_fc.weight": ("block_{}/feed_forward/up/kernel", SAME),
        "transformer.h.{}.mlp.c_fc.bias": ("block_{}/feed_forward/up/bias", SAME),
        "transformer.h.{}.mlp.c_proj.weight": ("block_{}/feed_forward/down/kernel", SAME),
        "transformer.h.{}.mlp.c_proj.bias": ("block_{}/feed_forward/down/bias", SAME),
        "transformer.ln_f.weight": ("final_norm/scale", SAME),
        "transformer.ln_f.bias": ("final_norm/bias", SAME),
        "lm_head.weight": ("head/embeddings", SAME),
    }

    def __init__(self, config: GPT2Config, **kwargs):
        super().__init__(config, **kwargs)
        dtype = self.dtype_policy
        self.token_embedding = TokenEmbedding(
            config.vocabulary_size,
            config.dim,
            config.initializer_range,
            name="token_embedding",
            dtype=dtype,
        )
        self.position_embedding = LearnedPositionEmbedding(
            config.context_length,
            config.dim,
            config.initializer_range,
            name="position_embedding",
            dtype=dtype,
        )
        self.embedding_dropout = keras.layers.Dropout(config.dropout, dtype=dtype)
        self.blocks = [
            DecoderBlock(
                config.dim,
                config.num_heads,
                4 * config.dim if config.intermediate_dim is None else config.intermediate_dim,
                norm_epsilon=config.layer_norm_epsilon,
                activation=config.activation,
                use_bias=config.use_bias,
                dropout=config.dropout,
                initializer_range=config.initializer_range,
                output_initializer_range=config.initializer_range / math.sqrt(2 * config.num_layers),
                name=f"block_{number}",
                dtype=dtype,
            )
            for number in range(config.num_layers)
        ]
        self.final_norm = LayerNorm(
            config.layer_norm_epsilon, config.use_bias, name="final_norm", dtype=dtype
        )
        self.head = self.token_embedding
        if not config.tie_embeddings:
            self.head = TokenEmbedding(
                config.vocabulary_size,
                config.dim,
                config.initializer_range,
                name="head",
                dtype=dtype,
            )
        # The shapes follow from the configuration, so the weights exist from the start.
        self.build((None, None))

    def build(self, input_shape):
        stream = (None, None, self.config.dim)
        self.token_embedding.build()
        self.position_embedding.build()
        for layer in (*self.blocks, self.final_norm):
            layer.build(stream)
        if self.head is not self.token_embedding:
            self.head.build()
        self.built = True

    def call(
        self,
        token_ids,
        attention_mask=None,
        cache=None,
        cache_index=None,
        last_index=None,
        training: bool = False,
    ):
        """Predicts the token after each token.

        Args:
            token_ids: Integers `[batch, length]`.
            attention_mask: Which keys count besides the causal rule, see `layers.attention.mask_bias`.
            cache: Key-value cache from `make_cache`.
            cache_index: Column of the first token in the cache, see `MultiHeadAttention`; needed if
                and only if there is a cache.
            last_index: Integers `[batch]`: return the logits of this place of each row only.
            training: Whether dropout is on.

        Returns:
            Float logits `[batch, length, vocabulary_size]`, or `[batch, 1, vocabulary_size]` with
            `last_index`; with a cache also the updated cache.
        """
        self._check_call(token_ids, cache, cache_index)
        x = self.token_embedding(token_ids)
        x = x + self.position_embedding(self._positions(token_ids, cache_index))
        x = self.embedding_dropout(x, training=training)
        updated = []
        for number, block in enumerate(self.blocks):
            if cache is None:
                x = block(x, attention_mask=attention_mask, training=training)
            else:
                x, layer_cache = block(
                    x,
                    attention_mask=attention_mask,
                    cache=cache[number],
                    cache_index=cache_index,
                    training=training,
                )
                updated.append(layer_cache)
        if last_index is not None:
            x = ops.take_along_axis(x, ops.reshape(last_index, (-1, 1, 1)), axis=1)
        logits = self.head(self.final_norm(x), reverse=True)
        return logits if cache is None else (logits, updated)
