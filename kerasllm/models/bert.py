"""BERT and its kin: encoders with learned positions and layer norms after the branches."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from kerasllm.layers import (
    EncoderBlock,
    LayerNorm,
    LearnedPositionEmbedding,
    TokenEmbedding,
)
from kerasllm.layers.dropout import Dropout
from kerasllm.layers.feed_forward import ACTIVATIONS
from kerasllm.models.base import SAME, TRANSPOSE, Dialect, LanguageModel, ModelConfig, WeightsTable


def _dense(theirs: str, ours: str) -> WeightsTable:
    return {f"{theirs}.weight": (f"{ours}/kernel", TRANSPOSE), f"{theirs}.bias": (f"{ours}/bias", SAME)}


def _norm(theirs: str, ours: str) -> WeightsTable:
    return {f"{theirs}.weight": (f"{ours}/scale", SAME), f"{theirs}.bias": (f"{ours}/bias", SAME)}


_EMBEDDINGS = {
    "embeddings.word_embeddings.weight": ("token_embedding/embeddings", SAME),
    "embeddings.position_embeddings.weight": ("position_embedding/embeddings", SAME),
    "embeddings.token_type_embeddings.weight": ("token_type_embedding/embeddings", SAME),
    **_norm("embeddings.LayerNorm", "embedding_norm"),
}
_BERT_LAYER = "encoder.layer.{}."
_BERT = Dialect(
    names={
        "vocab_size": "vocabulary_size",
        "max_position_embeddings": "context_length",
        "type_vocab_size": "token_types",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "hidden_size": "dim",
        "intermediate_size": "intermediate_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
        "classifier_dropout": "classifier_dropout",
        "layer_norm_eps": "layer_norm_epsilon",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "initializer_range",
    },
    fixed={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
    # The `pooler_*` names come from the first BERT files and were never used.
    ignored=frozenset(
        "directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
        "pooler_size_per_head pooler_type sbert_ce_default_activation_function "
        "sentence_transformers".split()
    ),
    prefix="bert.",
    weights={
        **_EMBEDDINGS,
        **_dense(_BERT_LAYER + "attention.self.query", "block_{}/attention/query"),
        **_dense(_BERT_LAYER + "attention.self.key", "block_{}/attention/key"),
        **_dense(_BERT_LAYER + "attention.self.value", "block_{}/attention/value"),
        **_dense(_BERT_LAYER + "attention.output.dense", "block_{}/attention/output"),
        **_norm(_BERT_LAYER + "attention.output.LayerNorm", "block_{}/attention_norm"),
        **_dense(_BERT_LAYER + "intermediate.dense", "block_{}/feed_forward/up"),
        **_dense(_BERT_LAYER + "output.dense", "block_{}/feed_forward/down"),
        **_norm(_BERT_LAYER + "output.LayerNorm", "block_{}/feed_forward_norm"),
    },
    head_weights={
        "masked_lm": {
            **_dense("cls.predictions.transform.dense", "head_dense"),
            **_norm("cls.predictions.transform.LayerNorm", "head_norm"),
            "cls.predictions.decoder.weight": ("head/kernel", TRANSPOSE),
            "cls.predictions.decoder.bias": ("head_bias", SAME),
        },
        # The pooler stands among BERT's own tensors, but only a classifier reads it.
        "classifier": {
            **_dense("bert.pooler.dense", "classifier_dense"),
            **_dense("classifier", "classifier"),
        },
    },
    architectures={
        "masked_lm": "BertForMaskedLM",
        "classifier": "BertForSequenceClassification",
        None: "BertModel",
    },
    # Numbers of the positions, and the head that tells whether two sentences follow each other.
    ignored_tensors=(r"embeddings\.(position|token_type)_ids$", r"^cls\.seq_relationship\."),
    renamed=(
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
        (r"^cls\.predictions\.bias$", "cls.predictions.decoder.bias"),
    ),
)


def _read_roberta(values: dict[str, Any]) -> dict[str, Any]:
    padding_id = values.get("pad_token_id", 1)
    if padding_id is None:
        raise ValueError("RoBERTa counts positions from `pad_token_id` on. Received: pad_token_id=None")
    table_length = values.get("max_position_embeddings", 512)
    return {
        **values,
        "pad_token_id": padding_id,
        "max_position_embeddings": table_length - padding_id - 1,
    }


def _write_roberta(values: dict[str, Any], config: "BertConfig") -> dict[str, Any]:
    return {**values, "max_position_embeddings": config.context_length + config.padding_id + 1}


_ROBERTA = dataclasses.replace(
    _BERT,
    names={**_BERT.names, "pad_token_id": "padding_id"},
    defaults={
        "vocabulary_size": 50265,
        "head_activation": "gelu",
        "drop_classifier_input": True,
    },
    prefix="roberta.",
    head_weights={
        "masked_lm": {
            **_dense("lm_head.dense", "head_dense"),
            **_norm("lm_head.layer_norm", "head_norm"),
            "lm_head.decoder.weight": ("head/kernel", TRANSPOSE),
            "lm_head.decoder.bias": ("head_bias", SAME),
        },
        "classifier": {
            **_dense("classifier.dense", "classifier_dense"),
            **_dense("classifier.out_proj", "classifier"),
        },
    },
    architectures={
        "masked_lm": "RobertaForMaskedLM",
        "classifier": "RobertaForSequenceClassification",
        None: "RobertaModel",
    },
    # No head of this family reads RoBERTa's pooler.
    ignored_tensors=(*_BERT.ignored_tensors, r"^(roberta\.)?pooler\."),
    renamed=((r"^lm_head\.bias$", "lm_head.decoder.bias"),),
    read=_read_roberta,
    write=_write_roberta,
)
_XLM_ROBERTA = dataclasses.replace(
    _ROBERTA,
    defaults={**_ROBERTA.defaults, "vocabulary_size": 30522},
    architectures={
        "masked_lm": "XLMRobertaForMaskedLM",
        "classifier": "XLMRobertaForSequenceClassification",
        None: "XLMRobertaModel",
    },
)

_DISTILBERT_LAYER = "transformer.layer.{}."
_DISTILBERT = Dialect(
    names={
        "vocab_size": "vocabulary_size",
        "max_position_embeddings": "context_length",
        "n_layers": "num_layers",
        "n_heads": "num_heads",
        "dim": "dim",
        "hidden_dim": "intermediate_dim",
        "activation": "activation",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "seq_classif_dropout": "classifier_dropout",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "initializer_range",
    },
    fixed={"tie_weights_": True},
    # Sinusoidal positions are how the table starts, not how it is read.
    ignored=frozenset("qa_dropout sinusoidal_pos_embds".split()),
    defaults={
        "token_types": 0,
        "num_layers": 6,
        "attention_output_dropout": 0.0,
        "classifier_dropout": 0.2,
        "classifier_activation": "relu",
        "layer_norm_epsilon": 1e-12,
    },
    prefix="distilbert.",
    weights={
        **{name: target for name, target in _EMBEDDINGS.items() if "token_type" not in name},
        **_dense(_DISTILBERT_LAYER + "attention.q_lin", "block_{}/attention/query"),
        **_dense(_DISTILBERT_LAYER + "attention.k_lin", "block_{}/attention/key"),
        **_dense(_DISTILBERT_LAYER + "attention.v_lin", "block_{}/attention/value"),
        **_dense(_DISTILBERT_LAYER + "attention.out_lin", "block_{}/attention/output"),
        **_norm(_DISTILBERT_LAYER + "sa_layer_norm", "block_{}/attention_norm"),
        **_dense(_DISTILBERT_LAYER + "ffn.lin1", "block_{}/feed_forward/up"),
        **_dense(_DISTILBERT_LAYER + "ffn.lin2", "block_{}/feed_forward/down"),
        **_norm(_DISTILBERT_LAYER + "output_layer_norm", "block_{}/feed_forward_norm"),
    },
    head_weights={
        "masked_lm": {
            **_dense("vocab_transform", "head_dense"),
            **_norm("vocab_layer_norm", "head_norm"),
            "vocab_projector.weight": ("head/kernel", TRANSPOSE),
            "vocab_projector.bias": ("head_bias", SAME),
        },
        "classifier": {
            **_dense("pre_classifier", "classifier_dense"),
            **_dense("classifier", "classifier"),
        },
    },
    architectures={
        "masked_lm": "DistilBertForMaskedLM",
        "classifier": "DistilBertForSequenceClassification",
        None: "DistilBertModel",
    },
    ignored_tensors=(r"embeddings\.position_ids$",),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(ModelConfig):
    """Configuration of `Bert`; the defaults are BERT base.

    Args:
        vocabulary_size: Number of tokens.
        context_length: Longest sequence, in tokens.
        token_types: Number of token types; 0: the model knows none.
        padding_id: Id of the padding token, where positions are counted over the other tokens only and
            from `padding_id + 1` on (RoBERTa). None: a token's position is its place.
        num_layers: Number of blocks.
        num_heads: Number of attention heads.
        dim: Width of the residual stream.
        intermediate_dim: Width inside the feed-forward network.
        activation: Activation of the feed-forward network, see `FeedForward`.
        dropout: Fraction of the embeddings and of each branch's output set to zero while training.
        attention_dropout: The same for the attention weights.
        attention_output_dropout: The same for what the attention returns; None: `dropout`.
        layer_norm_epsilon: Epsilon of the norms.
        tie_embeddings: Whether the masked-token head scores against the token embedding.
        head_activation: Activation of the masked-token head; None: `activation`.
        classifier_activation: Activation of the classifier's dense layer: `"tanh"` or `"relu"`.
        classifier_dropout: Fraction of that layer's output set to zero while training; None: `dropout`.
        drop_classifier_input: Whether the same fraction of that layer's input is.
        initializer_range: Standard deviation of the normal initialisation.
    """

    dialects = {"bert": _BERT, "roberta": _ROBERTA, "xlm-roberta": _XLM_ROBERTA, "distilbert": _DISTILBERT}

    vocabulary_size: int = 30522
    context_length: int = 512
    token_types: int = 2
    padding_id: int | None = None
    num_layers: int = 12
    num_heads: int = 12
    dim: int = 768
    intermediate_dim: int = 3072
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    attention_output_dropout: float | None = None
    layer_norm_epsilon: float = 1e-12
    tie_embeddings: bool = True
    head_activation: str | None = None
    classifier_activation: str = "tanh"
    classifier_dropout: float | None = None
    drop_classifier_input: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        if self.token_types < 0:
            raise ValueError(f"`token_types` must be at least 0. Received: token_types={self.token_types}")
        if self.head_activation not in (None, *ACTIVATIONS):
            raise ValueError(
                f"`head_activation` must be None or one of {sorted(ACTIVATIONS)}. "
                f"Received: {self.head_activation!r}"
            )
        if self.classifier_activation not in ("tanh", "relu"):
            raise ValueError(
                '`classifier_activation` must be "tanh" or "relu". '
                f"Received: {self.classifier_activation!r}"
            )


@keras.saving.register_keras_serializable(package="kerasllm")
class Bert(LanguageModel):
    """BERT, RoBERTa, XLM-RoBERTa, DistilBERT and MiniLM as a Keras model: token ids in, scores out.

    Devlin et al.: "BERT" (2019); Liu et al.: "RoBERTa" (2019); Conneau et al.: "Unsupervised
    Cross-lingual Representation Learning at Scale" (2020); Sanh et al.: "DistilBERT" (2019).

    The pooler of a BERT checkpoint belongs to its classifier. Without that head it is not read, and a
    model saved without a head has none.

    Args:
        config: A `BertConfig`.
        head: `"masked_lm"`, `"classifier"` or None, see `call`.
    """

    config_class = BertConfig
    heads = ("masked_lm", "classifier", None)

    def __init__(self, config: BertConfig, head: str | None = "masked_lm", **kwargs):
        super().__init__(config, head, **kwargs)
        shared = {"initializer_range": config.initializer_range, "dtype": self.dtype_policy}
        first_position = 0 if config.padding_id is None else config.padding_id + 1
        self.token_embedding = TokenEmbedding(
            config.vocabulary_size, config.dim, name="token_embedding", **shared
        )
        self.position_embedding = LearnedPositionEmbedding(
            first_position + config.context_length, config.dim, name="position_embedding", **shared
        )
        self.token_type_embedding = None
        if config.token_types:
            self.token_type_embedding = TokenEmbedding(
                config.token_types, config.dim, name="token_type_embedding", **shared
            )
        self.embedding_norm = self._make_norm("embedding_norm")
        self.embedding_dropout = Dropout(config.dropout, dtype=self.dtype_policy)
        self.blocks = [
            EncoderBlock(
                config.dim,
                config.num_heads,
                config.intermediate_dim,
                norm_first=False,
                norm_epsilon=config.layer_norm_epsilon,
                activation=config.activation,
                dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                attention_output_dropout=config.attention_output_dropout,
                name=f"block_{number}",
                **shared,
            )
            for number in range(config.num_layers)
        ]
        # The names of the heads' layers, in the order in which they are applied.
        self.head_dense = self.head_norm = self.untied_head = None
        self.classifier_dense = self.classifier = None
        if head == "masked_lm":
            self.head_dense = self._make_dense(config.dim, "head_dense")
            self.head_norm = self._make_norm("head_norm")
            if not config.tie_embeddings:
                self.untied_head = self._make_dense(config.vocabulary_size, "head", use_bias=False)
        elif head == "classifier":
            dropout = config.dropout if config.classifier_dropout is None else config.classifier_dropout
            self.classifier_dense = self._make_dense(
                config.dim, "classifier_dense", activation=config.classifier_activation
            )
            self.classifier_dropout = Dropout(dropout, dtype=self.dtype_policy)
            self.classifier = self._make_dense(len(config.labels), "classifier")
        self.build((None, None))

    def checkpoint_names(self, names: Iterable[str]) -> dict[str, str]:
        # An untied head of transformers 5 has its bias under today's name and, under the older one, a
        # tensor that it does not use.
        found = super().checkpoint_names(names)
        return {name: own for name, own in found.items() if name == own or own not in found}

    def _make_dense(self, units, name, **kwargs):
        return keras.layers.Dense(
            units,
            kernel_initializer=keras.initializers.RandomNormal(stddev=self.config.initializer_range),
            name=name,
            dtype=self.dtype_policy,
            **kwargs,
        )

    def _make_norm(self, name):
        return LayerNorm(self.config.layer_norm_epsilon, name=name, dtype=self.dtype_policy)

    def build(self, input_shape):
        stream = (None, None, self.config.dim)
        for layer in (self.token_embedding, self.position_embedding, self.token_type_embedding):
            if layer is not None:
                layer.build()
        heads = (self.head_dense, self.head_norm, self.untied_head, self.classifier_dense, self.classifier)
        for layer in (self.embedding_norm, *self.blocks, *heads):
            if layer is not None:
                layer.build(stream)
        if self.head == "masked_lm":
            self.head_bias = self.add_weight(
                name="head_bias", shape=(self.config.vocabulary_size,), initializer="zeros"
            )
        self.built = True

    def call(
        self,
        token_ids,
        attention_mask=None,
        token_type_ids=None,
        training: bool = False,
        with_head: bool = True,
    ):
        """Scores each token or each sequence, or gives hidden states.

        Args:
            token_ids: Integers `[batch, length]`.
            attention_mask: Which tokens count, see `layers.attention.mask_bias`. None: all.
            token_type_ids: Integers `[batch, length]`, each below the config's `token_types`, such as 0
                for the first text of a pair and 1 for the second. None: zeros.
            training: Whether dropout is on.
            with_head: Whether the head is applied; otherwise the result is what `score_tokens` takes.

        Returns:
            Floats. `"masked_lm"`: logits `[batch, length, vocabulary_size]`. `"classifier"`: scores
            `[batch, labels]`, made of the first token. None: hidden states `[batch, length, dim]`.

        Raises:
            ValueError: If the sequence does not fit into the context, or the model knows no token types.
        """
        self._check_call(token_ids, None, None)
        x = self._embed(token_ids, token_type_ids)
        x = self.embedding_dropout(self.embedding_norm(x), training=training)
        for block in self.blocks:
            x = block(x, attention_mask=attention_mask, training=training)
        if self.head == "masked_lm" and with_head:
            return self.score_tokens(x)
        if self.head == "classifier" and with_head:
            return self._classify(x[:, 0], training)
        return x

    def _embed(self, token_ids, token_type_ids):
        x = self.token_embedding(token_ids)
        if self.token_type_embedding is not None:
            types = ops.zeros_like(token_ids) if token_type_ids is None else token_type_ids
            x = x + self.token_type_embedding(types)
        elif token_type_ids is not None:
            raise ValueError("`token_type_ids` must be None, for the model knows no token types.")
        return x + self.position_embedding(self._token_positions(token_ids))

    def _token_positions(self, token_ids):
        """Where in the table each token's position stands: `[length]` or `[batch, length]`."""
        padding_id = self.config.padding_id
        if padding_id is None:
            return self._positions(token_ids, None)
        counted = ops.cast(ops.not_equal(token_ids, padding_id), "int32")
        return ops.cumsum(counted, axis=1) * counted + padding_id

    def score_tokens(self, hidden):
        config = self.config
        x = ACTIVATIONS[config.head_activation or config.activation](self.head_dense(hidden))
        x = self.head_norm(x)
        if self.untied_head is None:
            x = self.token_embedding(x, reverse=True)
        else:
            x = self.untied_head(x)
        return x + ops.cast(self.head_bias, x.dtype)

    def _classify(self, x, training):
        if self.config.drop_classifier_input:
            x = self.classifier_dropout(x, training=training)
        x = self.classifier_dropout(self.classifier_dense(x), training=training)
        return self.classifier(x)
