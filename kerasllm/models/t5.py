"""T5: an encoder and a decoder with relative positions, and attention from one to the other."""

import dataclasses
from typing import Any

import keras
from keras import ops

from kerasllm.layers import (
    DecoderBlock,
    EncoderBlock,
    RelativePositionBias,
    RMSNorm,
    TokenEmbedding,
)
from kerasllm.layers.attention import cache_length
from kerasllm.layers.dropout import Dropout
from kerasllm.models.base import (
    SAME,
    TRANSPOSE,
    Dialect,
    LanguageModel,
    ModelConfig,
    Transform,
    WeightsTable,
)


def _matrix(theirs: str, ours: str) -> WeightsTable:
    return {f"{theirs}.weight": (f"{ours}/kernel", TRANSPOSE)}


def _norm(theirs: str, ours: str) -> WeightsTable:
    return {f"{theirs}.weight": (f"{ours}/scale", SAME)}


def _attention(theirs: str, ours: str) -> WeightsTable:
    return {
        **_matrix(f"{theirs}.q", f"{ours}/query"),
        **_matrix(f"{theirs}.k", f"{ours}/key"),
        **_matrix(f"{theirs}.v", f"{ours}/value"),
        **_matrix(f"{theirs}.o", f"{ours}/output"),
    }


def _feed_forward(theirs: str, ours: str) -> WeightsTable:
    return {
        **_matrix(f"{theirs}.wi", f"{ours}/up"),
        **_matrix(f"{theirs}.wi_0", f"{ours}/gate"),
        **_matrix(f"{theirs}.wi_1", f"{ours}/up"),
        **_matrix(f"{theirs}.wo", f"{ours}/down"),
    }


def _stack(name: str) -> WeightsTable:
    """What the encoder and the decoder have alike."""
    first = f"{name}.block.0.layer.0.SelfAttention"
    layer, block = f"{name}.block.{{}}.layer.0", f"{name}_block_{{}}"
    return {
        f"{first}.relative_attention_bias.weight": (f"{name}_position_bias/embeddings", SAME),
        **_attention(f"{layer}.SelfAttention", f"{block}/attention"),
        **_norm(f"{layer}.layer_norm", f"{block}/attention_norm"),
        **_norm(f"{name}.final_layer_norm", f"{name}_norm"),
    }


_ENCODER_LAYER, _DECODER_LAYER = "encoder.block.{}.layer", "decoder.block.{}.layer"
_ENCODER = {
    **_stack("encoder"),
    **_feed_forward(f"{_ENCODER_LAYER}.1.DenseReluDense", "encoder_block_{}/feed_forward"),
    **_norm(f"{_ENCODER_LAYER}.1.layer_norm", "encoder_block_{}/feed_forward_norm"),
}
_DECODER = {
    **_stack("decoder"),
    **_attention(f"{_DECODER_LAYER}.1.EncDecAttention", "decoder_block_{}/memory_attention"),
    **_norm(f"{_DECODER_LAYER}.1.layer_norm", "decoder_block_{}/memory_norm"),
    **_feed_forward(f"{_DECODER_LAYER}.2.DenseReluDense", "decoder_block_{}/feed_forward"),
    **_norm(f"{_DECODER_LAYER}.2.layer_norm", "decoder_block_{}/feed_forward_norm"),
}


def _read_activation(values: dict[str, Any], default: str) -> dict[str, Any]:
    """`"gated-gelu"` and its kin in two names; T5 means the approximated GELU there."""
    projection = values.pop("feed_forward_proj", default)
    *kind, activation = projection.split("-")
    if kind not in ([], ["gated"]):
        raise ValueError(
            f'`feed_forward_proj` must be such as "relu" or "gated-gelu". Received: {projection!r}'
        )
    gated = bool(kind)
    named = "gelu_new" if gated and activation == "gelu" else activation
    return {"dense_act_fn": named, "is_gated_act": gated, **values}


def _read_t5(values: dict[str, Any]) -> dict[str, Any]:
    tied = values.pop("tie_word_embeddings", True)
    # transformers 5 says in each file that the head is tied, and by this name whether that is so: an
    # untied head has an unscaled input.
    scaled = values.pop("scale_decoder_outputs", tied)
    return {**_read_activation(values, "relu"), "tie_word_embeddings": tied and scaled}


def _read_mt5(values: dict[str, Any]) -> dict[str, Any]:
    return {**_read_activation(values, "gated-gelu"), "tie_word_embeddings": False}


def _write(values: dict[str, Any], config: "T5Config") -> dict[str, Any]:
    activation = "gelu" if values["dense_act_fn"] == "gelu_new" and config.gated else values["dense_act_fn"]
    return {**values, "feed_forward_proj": f"gated-{activation}" if config.gated else activation}


_T5 = Dialect(
    names={
        "vocab_size": "vocabulary_size",
        "max_position_embeddings": "context_length",
        "num_layers": "num_layers",
        "num_decoder_layers": "num_decoder_layers",
        "num_heads": "num_heads",
        "d_model": "dim",
        "d_kv": "head_dim",
        "d_ff": "intermediate_dim",
        "dense_act_fn": "activation",
        "is_gated_act": "gated",
        "relative_attention_num_buckets": "num_buckets",
        "relative_attention_max_distance": "max_distance",
        "dropout_rate": "dropout",
        "layer_norm_epsilon": "norm_epsilon",
        "tie_word_embeddings": "tie_embeddings",
        "decoder_start_token_id": "decoder_start_id",
        "initializer_factor": "initializer_factor",
    },
    fixed={"is_decoder": False},
    # Relative positions have no end, so `n_positions` is not read by anyone.
    ignored=frozenset("classifier_dropout n_positions tokenizer_class".split()),
    prefix="",
    weights={"shared.weight": ("token_embedding/embeddings", SAME), **_ENCODER},
    head_weights={"seq2seq": {**_DECODER, **_matrix("lm_head", "head")}},
    architectures={"seq2seq": "T5ForConditionalGeneration", None: "T5EncoderModel"},
    # A bias of cross-attention that some files hold and that was never used.
    ignored_tensors=(r"EncDecAttention\.relative_attention_bias\.weight$",),
    # Copies of the token embedding.
    renamed=((r"^(encoder|decoder)\.embed_tokens\.weight$", "shared.weight"),),
    read=_read_t5,
    write=_write,
)
_MT5 = dataclasses.replace(
    _T5,
    architectures={"seq2seq": "MT5ForConditionalGeneration", None: "MT5EncoderModel"},
    defaults={
        "vocabulary_size": 250112,
        "num_layers": 8,
        "num_heads": 6,
        "intermediate_dim": 1024,
    },
    read=_read_mt5,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """Configuration of `T5`; the defaults are T5 small.

    Args:
        vocabulary_size: Number of tokens.
        context_length: Longest source and longest target, in tokens. Relative positions have no end, so
            this is a matter of memory and of what the weights were trained on.
        num_layers: Number of the encoder's blocks.
        num_decoder_layers: Number of the decoder's blocks; None: `num_layers`.
        num_heads: Number of attention heads.
        dim: Width of the residual stream.
        head_dim: Width of a head.
        intermediate_dim: Width inside the feed-forward network.
        activation: Activation of the feed-forward network, see `FeedForward`.
        gated: Whether the feed-forward network is gated, as in T5 v1.1.
        num_buckets: Number of the classes of distances, each with a bias for each head.
        max_distance: Distance in tokens from which on all have the same bias.
        dropout: Fraction set to zero while training.
        norm_epsilon: Epsilon of the norms.
        tie_embeddings: Whether the output head is the token embedding; its input is then scaled by
            `1 / sqrt(dim)`.
        decoder_start_id: The token that every target starts with.
        initializer_factor: Scale of the initialisation.
    """

    dialects = {"t5": _T5, "mt5": _MT5}

    vocabulary_size: int = 32128
    context_length: int = 32768
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    dim: int = 512
    head_dim: int = 64
    intermediate_dim: int = 2048
    activation: str = "relu"
    gated: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    dropout: float = 0.1
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    decoder_start_id: int = 0
    initializer_factor: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.num_decoder_layers is None:
            object.__setattr__(self, "num_decoder_layers", self.num_layers)
        if self.num_decoder_layers < 1:
            raise ValueError(
                "`num_decoder_layers` must be at least 1. "
                f"Received: num_decoder_layers={self.num_decoder_layers}"
            )


@keras.saving.register_keras_serializable(package="kerasllm")
class T5(LanguageModel):
    """T5 and T5 v1.1 (Flan-T5, mT5) as a Keras model: a source and a target in, logits out.

    Raffel et al.: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
    (2020).

    To generate, encode the source once, project it once, and feed the target token by token:

    ```python
    memory_cache = model.make_memory_cache(model.encode(source_ids, source_mask))
    cache = model.make_cache(batch_size, length)
    logits, cache = model(
        token_ids, memory_cache=memory_cache, memory_mask=source_mask, cache=cache, cache_index=0
    )
    ```

    Args:
        config: A `T5Config`.
        head: `"seq2seq"`, or None for the encoder alone, see `call`.
    """

    config_class = T5Config
    heads = ("seq2seq", None)

    def __init__(self, config: T5Config, head: str | None = "seq2seq", **kwargs):
        super().__init__(config, head, **kwargs)
        self.token_embedding = TokenEmbedding(
            config.vocabulary_size,
            config.dim,
            config.initializer_factor,
            name="token_embedding",
            dtype=self.dtype_policy,
        )
        # One for each place, for a training step may tie a layer to its mask.
        for place in ("source", "memory", "target", "output"):
            setattr(self, f"{place}_dropout", Dropout(config.dropout, dtype=self.dtype_policy))
        self.encoder_position_bias = self._make_position_bias("encoder_position_bias", bidirectional=True)
        self.encoder_blocks = [
            self._make_block(EncoderBlock, f"encoder_block_{number}") for number in range(config.num_layers)
        ]
        self.encoder_norm = self._make_norm("encoder_norm")
        if head == "seq2seq":
            self.decoder_position_bias = self._make_position_bias(
                "decoder_position_bias", bidirectional=False
            )
            self.decoder_blocks = [
                self._make_block(DecoderBlock, f"decoder_block_{number}", cross_attention=True)
                for number in range(config.num_decoder_layers)
            ]
            self.decoder_norm = self._make_norm("decoder_norm")
            self.untied_head = None
            if not config.tie_embeddings:
                self.untied_head = keras.layers.Dense(
                    config.vocabulary_size,
                    use_bias=False,
                    kernel_initializer=self._normal(1.0),
                    name="head",
                    dtype=self.dtype_policy,
                )
        self.build((None, None))

    def _normal(self, scale):
        return keras.initializers.RandomNormal(stddev=self.config.initializer_factor * scale)

    def _make_position_bias(self, name, bidirectional):
        config = self.config
        return RelativePositionBias(
            config.num_heads,
            num_buckets=config.num_buckets,
            max_distance=config.max_distance,
            bidirectional=bidirectional,
            initializer_range=config.initializer_factor * config.dim**-0.5,
            name=name,
            dtype=self.dtype_policy,
        )

    def _make_block(self, kind, name, **kwargs):
        config = self.config
        block = kind(
            config.dim,
            config.num_heads,
            config.intermediate_dim,
            head_dim=config.head_dim,
            query_scale=1.0,
            norm="rms",
            norm_epsilon=config.norm_epsilon,
            activation=config.activation,
            gated=config.gated,
            use_bias=False,
            dropout=config.dropout,
            activation_dropout=config.dropout,
            initializer_range=config.initializer_factor * config.dim**-0.5,
            output_initializer_range=config.initializer_factor * config.intermediate_dim**-0.5,
            name=name,
            dtype=self.dtype_policy,
            **kwargs,
        )
        # Scores are not divided by the root of the width; the queries start smaller by it instead.
        for attention in (block.attention, getattr(block, "memory_attention", None)):
            if attention is not None:
                attention.query.kernel_initializer = self._normal((config.dim * config.head_dim) ** -0.5)
                attention.output_dense.kernel_initializer = self._normal(
                    (config.num_heads * config.head_dim) ** -0.5
                )
        return block

    def _make_norm(self, name):
        return RMSNorm(self.config.norm_epsilon, name=name, dtype=self.dtype_policy)

    def build(self, input_shape):
        stream = (None, None, self.config.dim)
        self.token_embedding.build()
        self.encoder_position_bias.build()
        for layer in (*self.encoder_blocks, self.encoder_norm):
            layer.build(stream)
        if self.head == "seq2seq":
            self.decoder_position_bias.build()
            for block in self.decoder_blocks:
                block.build(stream, stream)
            self.decoder_norm.build(stream)
            if self.untied_head is not None:
                self.untied_head.build(stream)
        self.built = True

    # Hugging Face's names

    def weight_map(self) -> dict[str, tuple[tuple[str, ...], Transform]]:
        # What enters a feed-forward network is called `wi`, with a gate beside it `wi_1`.
        absent = ".wi.weight" if self.config.gated else ".wi_1.weight"
        return {name: target for name, target in super().weight_map().items() if not name.endswith(absent)}

    def _count_layers(self) -> int:
        return max(self.config.num_layers, self.config.num_decoder_layers)

    # Computation

    def encode(self, source_ids, attention_mask=None, training: bool = False):
        """Runs the encoder.

        Args:
            source_ids: Integers `[batch, source_length]`.
            attention_mask: Which tokens of the source count, see `layers.attention.mask_bias`. None: all.
            training: Whether dropout is on.

        Returns:
            The memory that the decoder reads: floats `[batch, source_length, dim]`.

        Raises:
            ValueError: If the source does not fit into the context.
        """
        self._check_call(source_ids, None, None)
        position_bias = self.encoder_position_bias(
            self._positions(source_ids, None), key_length=ops.shape(source_ids)[1]
        )
        x = self.source_dropout(self.token_embedding(source_ids), training=training)
        for block in self.encoder_blocks:
            x = block(x, attention_mask=attention_mask, position_bias=position_bias, training=training)
        return self.memory_dropout(self.encoder_norm(x), training=training)

    def make_cache(self, batch_size: int, length: int) -> list[tuple[Any, Any]]:
        return [block.attention.make_cache(batch_size, length) for block in self.decoder_blocks]

    def make_memory_cache(self, memory) -> list[tuple[Any, Any]]:
        """Projects an encoded source once for all steps of the decoder.

        Args:
            memory: Floats `[batch, source_length, dim]` from `encode`.

        Returns:
            A list of (keys, values), one pair per block of the decoder, laid out as
            `MultiHeadAttention.make_cache` says.
        """
        return [block.memory_attention.memory_cache(memory) for block in self.decoder_blocks]

    def shift_right(self, labels):
        """Makes the decoder's input of the tokens that it shall predict.

        Args:
            labels: Integers `[batch, length]`.

        Returns:
            `decoder_start_id` and then the labels without the last: integers `[batch, length]`.
        """
        start = ops.full_like(labels[:, :1], self.config.decoder_start_id)
        return ops.concatenate([start, labels[:, :-1]], axis=1)

    def call(
        self,
        token_ids,
        source_ids=None,
        memory=None,
        memory_cache=None,
        memory_mask=None,
        attention_mask=None,
        cache=None,
        cache_index=None,
        last_index=None,
        training: bool = False,
        with_head: bool = True,
    ):
        """Predicts the token after each token of the target; without a head, encodes.

        The source comes in one of three forms: as `source_ids`, as `memory` or as `memory_cache`.

        Args:
            token_ids: Integers `[batch, length]`: the target, which starts with the config's
                `decoder_start_id` (`shift_right`). Without a head: the source.
            source_ids: Integers `[batch, source_length]`.
            memory: What `encode` gave.
            memory_cache: What `make_memory_cache` gave.
            memory_mask: Integers `[batch, source_length]`, which tokens of the source count. None: all.
            attention_mask: Which tokens of `token_ids` count, for the decoder besides the causal rule,
                see `layers.attention.mask_bias`.
            cache: Key-value cache from `make_cache`.
            cache_index: Column of the first token in the cache, see `MultiHeadAttention`; needed if and
                only if there is a cache.
            last_index: Integers `[batch]`: return the result at this place of each row only.
            training: Whether dropout is on.
            with_head: Whether the head is applied; otherwise the result is what `score_tokens` takes.

        Returns:
            Logits `[batch, length, vocabulary_size]`, or `[batch, 1, …]` with `last_index`; with a cache
            also the updated cache. Without a head: hidden states `[batch, length, dim]`.

        Raises:
            ValueError: If the source is not given once, or something does not fit.
        """
        sources = {"source_ids": source_ids, "memory": memory, "memory_cache": memory_cache}
        given = [name for name, value in sources.items() if value is not None]
        if self.head is None:
            if given or cache is not None or last_index is not None:
                raise ValueError(
                    "A T5 without a head is the encoder alone and takes `token_ids` and `attention_mask`. "
                    f"Received: {given}, cache given: {cache is not None}"
                )
            return self.encode(token_ids, attention_mask, training)
        if len(given) != 1:
            raise ValueError(
                f"The source must be given once, by one of {sorted(sources)}. Received: {given}"
            )
        self._check_call(token_ids, cache, cache_index)
        if source_ids is not None:
            memory = self.encode(source_ids, memory_mask, training)
        key_length = ops.shape(token_ids)[1] if cache is None else cache_length(cache[0])
        position_bias = self.decoder_position_bias(
            self._positions(token_ids, cache_index), key_length=key_length
        )
        x = self.target_dropout(self.token_embedding(token_ids), training=training)
        updated = []
        for number, block in enumerate(self.decoder_blocks):
            result = block(
                x,
                memory=memory,
                attention_mask=attention_mask,
                memory_mask=memory_mask,
                position_bias=position_bias,
                cache=None if cache is None else cache[number],
                cache_index=cache_index,
                memory_cache=None if memory_cache is None else memory_cache[number],
                training=training,
            )
            if cache is None:
                x = result
            else:
                x, layer_cache = result
                updated.append(layer_cache)
        if last_index is not None:
            x = ops.take_along_axis(x, ops.reshape(last_index, (-1, 1, 1)), axis=1)
        x = self.output_dropout(self.decoder_norm(x), training=training)
        outputs = self.score_tokens(x) if with_head else x
        return outputs if cache is None else (outputs, updated)

    def score_tokens(self, hidden):
        if self.untied_head is not None:
            return self.untied_head(hidden)
        return self.token_embedding(hidden * self.config.dim**-0.5, reverse=True)
