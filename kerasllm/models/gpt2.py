"""GPT-2: a decoder with learned positions, layer norms before the branches and a tied head."""

import dataclasses
import math

import keras

from kerasllm.layers import (
    DecoderBlock,
    LayerNorm,
    LearnedPositionEmbedding,
    TokenEmbedding,
)
from kerasllm.layers.dropout import Dropout
from kerasllm.models.base import SAME, SPLIT_IN_THREE, TRANSPOSE, DecoderModel, Dialect, ModelConfig

_DIALECT = Dialect(
    names={
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
    },
    fixed={
        "add_cross_attention": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    },
    # The `summary_*` names belong to a head of another task; upcasting is what the layers always do.
    ignored=frozenset(
        "n_ctx n_special predict_special_tokens reorder_and_upcast_attn summary_activation "
        "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj".split()
    ),
    prefix="transformer.",
    weights={
        "wte.weight": ("token_embedding/embeddings", SAME),
        "wpe.weight": ("position_embedding/embeddings", SAME),
        "h.{}.ln_1.weight": ("block_{}/attention_norm/scale", SAME),
        "h.{}.ln_1.bias": ("block_{}/attention_norm/bias", SAME),
        "h.{}.attn.c_attn.weight": (
            tuple(f"block_{{}}/attention/{name}/kernel" for name in ("query", "key", "value")),
            SPLIT_IN_THREE,
        ),
        "h.{}.attn.c_attn.bias": (
            tuple(f"block_{{}}/attention/{name}/bias" for name in ("query", "key", "value")),
            SPLIT_IN_THREE,
        ),
        "h.{}.attn.c_proj.weight": ("block_{}/attention/output/kernel", SAME),
        "h.{}.attn.c_proj.bias": ("block_{}/attention/output/bias", SAME),
        "h.{}.ln_2.weight": ("block_{}/feed_forward_norm/scale", SAME),
        "h.{}.ln_2.bias": ("block_{}/feed_forward_norm/bias", SAME),
        "h.{}.mlp.c_fc.weight": ("block_{}/feed_forward/up/kernel", SAME),
        "h.{}.mlp.c_fc.bias": ("block_{}/feed_forward/up/bias", SAME),
        "h.{}.mlp.c_proj.weight": ("block_{}/feed_forward/down/kernel", SAME),
        "h.{}.mlp.c_proj.bias": ("block_{}/feed_forward/down/bias", SAME),
        "ln_f.weight": ("final_norm/scale", SAME),
        "ln_f.bias": ("final_norm/bias", SAME),
    },
    head_weights={
        "causal_lm": {"lm_head.weight": ("head/embeddings", SAME)},
        "classifier": {"score.weight": ("classifier/kernel", TRANSPOSE)},
    },
    architectures={
        "causal_lm": "GPT2LMHeadModel",
        "classifier": "GPT2ForSequenceClassification",
        None: "GPT2Model",
    },
    # The causal masks that older files hold.
    ignored_tensors=(r"\.attn\.(masked_)?bias$",),
)


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

    dialects = {"gpt2": _DIALECT}

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


@keras.saving.register_keras_serializable(package="kerasllm")
class GPT2(DecoderModel):
    """GPT-2 as a Keras model: token ids in, logits out.

    Radford et al.: "Language Models are Unsupervised Multitask Learners" (2019).

    Args:
        config: A `GPT2Config`.
        head: `"causal_lm"`, `"classifier"` or None, see `DecoderModel.call`.
    """

    config_class = GPT2Config

    def __init__(self, config: GPT2Config, head: str | None = "causal_lm", **kwargs):
        super().__init__(config, head, **kwargs)
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
        self.embedding_dropout = Dropout(config.dropout, dtype=dtype)
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
        self._build_all(self.position_embedding)

    def _embed(self, token_ids, positions, training):
        x = self.token_embedding(token_ids) + self.position_embedding(positions)
        return self.embedding_dropout(x, training=training)
