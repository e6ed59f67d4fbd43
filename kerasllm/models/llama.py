"""Llama and its kin: decoders with rotary positions, RMS norms and gated feed-forward networks.

Mistral, Qwen, SmolLM and Gemma differ from Llama in fields of the configuration only.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from kerasllm.layers import DecoderBlock, RMSNorm, TokenEmbedding
from kerasllm.models.base import SAME, TRANSPOSE, DecoderModel, Dialect, ModelConfig, WeightsTable

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Step:
    """Something that a config.json spells in several ways: from there to plain names, and back."""

    read: Callable[[Values], Values]
    write: Callable[[Values], Values]


# --- Rotary embeddings: `rope_parameters` since transformers 5, before it `rope_theta` and `rope_scaling`.
# The older names are the plain ones.


def _split_rope(parameters: Values, context_length: int) -> tuple[float | None, Values | None]:
    """Splits `rope_parameters`, or an older `rope_scaling`, into the wavelength and the scaling."""
    scaling = {name: value for name, value in parameters.items() if value is not None}
    wavelength = scaling.pop("rope_theta", None)
    older_name = scaling.pop("type", "default")
    scaling.setdefault("rope_type", older_name)
    if scaling["rope_type"] in ("llama3", "yarn"):
        scaling.setdefault("original_max_position_embeddings", context_length)
    return wavelength, None if scaling == {"rope_type": "default"} else scaling


def _join_rope(wavelength: float, scaling: Values | None) -> Values:
    return {"rope_type": "default", "rope_theta": wavelength, **(scaling or {})}


def _read_rope(values: Values) -> Values:
    parameters = values.pop("rope_parameters", None) or values.pop("rope_scaling", None) or {}
    wavelength, scaling = _split_rope(parameters, values["max_position_embeddings"])
    return {**values, "rope_theta": wavelength or values["rope_theta"], "rope_scaling": scaling}


def _write_rope(values: Values) -> Values:
    parameters = _join_rope(values.pop("rope_theta"), values.pop("rope_scaling"))
    return {**values, "rope_parameters": parameters}


def _read_two_ropes(values: Values) -> Values:
    parameters = values.pop("rope_parameters", None) or {}
    if unknown := sorted(set(parameters) - {"full_attention", "sliding_attention"}):
        raise ValueError(
            "`rope_parameters` of layers with and without a window are called sliding_attention and "
            f"full_attention. Received: {unknown}"
        )
    full = parameters.get("full_attention") or values.pop("rope_scaling", None) or {}
    wavelength, scaling = _split_rope(full, values["max_position_embeddings"])
    local = parameters.get("sliding_attention") or {}
    local_wavelength, local_scaling = _split_rope(local, values["max_position_embeddings"])
    return {
        **values,
        "rope_theta": wavelength or values["rope_theta"],
        "rope_scaling": scaling,
        "rope_local_base_freq": local_wavelength or values["rope_local_base_freq"],
        "rope_local_scaling": local_scaling,
    }


def _write_two_ropes(values: Values) -> Values:
    full = _join_rope(values.pop("rope_theta"), values.pop("rope_scaling"))
    local = _join_rope(values.pop("rope_local_base_freq"), values.pop("rope_local_scaling"))
    return {**values, "rope_parameters": {"full_attention": full, "sliding_attention": local}}


_ROPE = _Step(_read_rope, _write_rope)
_TWO_ROPES = _Step(_read_two_ropes, _write_two_ropes)  # one for layers with a window, one for the others


# --- Which layers have a window: `layer_types`, or in older files a rule. Plain: `window_layers`.


def _windows(rule: Callable[[int, Values], bool], switch: bool = False) -> _Step:
    """Makes a step.

    Args:
        rule: Tells of a layer's number and the values whether it has a window, where `layer_types` does
            not say so.
        switch: Whether there is a window only if `use_sliding_window` is true.
    """
    kinds = {"full_attention": False, "sliding_attention": True}

    def read(values: Values) -> Values:
        types = values.pop("layer_types", None)
        if switch and not values.pop("use_sliding_window", False):
            values["sliding_window"] = None
        if values["sliding_window"] is None:
            return {**values, "window_layers": None}
        if types is None:
            layers = [rule(number, values) for number in range(values["num_hidden_layers"])]
            return {**values, "window_layers": layers}
        if unknown := sorted(set(types) - set(kinds)):
            raise ValueError(f"`layer_types` must be of {sorted(kinds)}. Received: {unknown}")
        return {**values, "window_layers": [kinds[kind] for kind in types]}

    def write(values: Values) -> Values:
        has_window = values["sliding_window"] is not None
        layers = values.pop("window_layers") or [has_window] * values["num_hidden_layers"]
        if switch:
            values["use_sliding_window"] = has_window
        names = {kinds[name]: name for name in kinds}
        return {**values, "layer_types": [names[layer] for layer in layers]}

    return _Step(read, write)


# --- Which layers have a rotary embedding: `no_rope_layers`, where 1 stands for a layer that has one.


def _read_rotary_layers(values: Values) -> Values:
    count, interval = values["num_hidden_layers"], values.pop("no_rope_layer_interval")
    layers = values.pop("no_rope_layers", None)
    if layers is None:
        layers = [(number + 1) % interval for number in range(count)]
    return {**values, "rotary_layers": [bool(layer) for layer in layers[:count]]}


def _write_rotary_layers(values: Values) -> Values:
    layers = values.pop("rotary_layers") or [True] * values["num_hidden_layers"]
    return {**values, "no_rope_layers": [int(layer) for layer in layers]}


_ROTARY_LAYERS = _Step(_read_rotary_layers, _write_rotary_layers)


# --- The activation of the first Gemma was published under a wrong name, which transformers corrects too.


def _read_gemma_activation(values: Values) -> Values:
    exact = values["hidden_act"] == "gelu"
    return {**values, "hidden_act": "gelu_pytorch_tanh" if exact else values["hidden_act"]}


_GEMMA_ACTIVATION = _Step(_read_gemma_activation, lambda values: values)


# --- Tensors ---


def _dense(theirs: str, ours: str) -> WeightsTable:
    return {f"{theirs}.weight": (f"{ours}/kernel", TRANSPOSE), f"{theirs}.bias": (f"{ours}/bias", SAME)}


def _weights(**norms: str) -> WeightsTable:
    """The tensors of the body; `norms` maps the names of a layer's norms to ours."""
    layer = "layers.{}."
    return {
        "embed_tokens.weight": ("token_embedding/embeddings", SAME),
        **{f"{layer}{theirs}.weight": (f"block_{{}}/{ours}/scale", SAME) for theirs, ours in norms.items()},
        **_dense(layer + "self_attn.q_proj", "block_{}/attention/query"),
        **_dense(layer + "self_attn.k_proj", "block_{}/attention/key"),
        **_dense(layer + "self_attn.v_proj", "block_{}/attention/value"),
        **_dense(layer + "self_attn.o_proj", "block_{}/attention/output"),
        layer + "self_attn.q_norm.weight": ("block_{}/attention/query_norm/scale", SAME),
        layer + "self_attn.k_norm.weight": ("block_{}/attention/key_norm/scale", SAME),
        **_dense(layer + "mlp.gate_proj", "block_{}/feed_forward/gate"),
        **_dense(layer + "mlp.up_proj", "block_{}/feed_forward/up"),
        **_dense(layer + "mlp.down_proj", "block_{}/feed_forward/down"),
        "norm.weight": ("final_norm/scale", SAME),
    }


_TWO_NORMS = _weights(input_layernorm="attention_norm", post_attention_layernorm="feed_forward_norm")
_FOUR_NORMS = _weights(
    input_layernorm="attention_norm",
    post_attention_layernorm="attention_last_norm",
    pre_feedforward_layernorm="feed_forward_norm",
    post_feedforward_layernorm="feed_forward_last_norm",
)


# --- Dialects ---


def _dialect(
    names: dict[str, str],
    absent: Values,
    *steps: _Step,
    model: str,
    causal_lm: str,
    classifier: str,
    ignored: str = "",
    **more: Any,
) -> Dialect:
    """Makes a dialect.

    Args:
        names: The names of config.json besides those that all have.
        absent: What a config.json stands for that leaves these names out.
        *steps: In the order of reading.
        model, causal_lm, classifier: The classes of transformers.
        ignored: Names of config.json that say nothing about the computation.
        more: Further fields of `Dialect`.
    """

    def read(values: Values) -> Values:
        values = {**absent, **values}
        for step in steps:
            values = step.read(values)
        return values

    def write(values: Values, config: ModelConfig) -> Values:
        for step in reversed(steps):
            values = step.write(values)
        # The same function in other words, which no GPT-2 but every Gemma uses.
        same = {"gelu_new": "gelu_pytorch_tanh"}
        for name in {"hidden_act", "hidden_activation"} & set(values):
            values[name] = same.get(values[name], values[name])
        return values

    ignored = (
        f"cache_implementation max_sequence_length pretraining_tp unsloth_fixed unsloth_version {ignored}"
    )
    return Dialect(
        **{"weights": _TWO_NORMS, "ignored_tensors": (r"rotary_emb\.inv_freq$",), **more},
        names={
            "vocab_size": "vocabulary_size",
            "max_position_embeddings": "context_length",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "num_key_value_heads": "num_kv_heads",
            "head_dim": "head_dim",
            "hidden_size": "dim",
            "intermediate_size": "intermediate_dim",
            "rms_norm_eps": "norm_epsilon",
            "rope_theta": "rotary_wavelength",
            "rope_scaling": "rotary_scaling",
            "attention_dropout": "attention_dropout",
            "tie_word_embeddings": "tie_embeddings",
            "initializer_range": "initializer_range",
            **names,
        },
        ignored=frozenset(ignored.split()),
        prefix="model.",
        head_weights={
            "causal_lm": {"lm_head.weight": ("head/embeddings", SAME)},
            "classifier": {"score.weight": ("classifier/kernel", TRANSPOSE)},
        },
        architectures={"causal_lm": causal_lm, "classifier": classifier, None: model},
        read=read,
        write=write,
    )


_LLAMA_NAMES = {
    "hidden_act": "activation",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
_LLAMA_ABSENT = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_LLAMA = _dialect(
    _LLAMA_NAMES,
    _LLAMA_ABSENT,
    _ROPE,
    model="LlamaModel",
    causal_lm="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
)

_MISTRAL = _dialect(
    {"hidden_act": "activation", "sliding_window": "sliding_window"},
    {
        **_LLAMA_ABSENT,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "sliding_window": 4096,
    },
    _ROPE,
    model="MistralModel",
    causal_lm="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
)

_QWEN_NAMES = {
    "hidden_act": "activation",
    "sliding_window": "sliding_window",
    "window_layers": "window_layers",
}
_QWEN_ABSENT = {
    **_LLAMA_ABSENT,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN_WINDOWS = _windows(lambda number, values: number >= values["max_window_layers"], switch=True)
_QWEN2 = _dialect(
    _QWEN_NAMES,
    _QWEN_ABSENT,
    _ROPE,
    _QWEN_WINDOWS,
    model="Qwen2Model",
    causal_lm="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    ignored="max_window_layers",
    defaults={"attention_bias": True, "attention_output_bias": False},
)
_QWEN3 = _dialect(
    {**_QWEN_NAMES, "attention_bias": "attention_bias"},
    {**_QWEN_ABSENT, "head_dim": 128},
    _ROPE,
    _QWEN_WINDOWS,
    model="Qwen3Model",
    causal_lm="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    ignored="max_window_layers",
    defaults={"qk_norm": True},
)

_SMOLLM3 = _dialect(
    {
        **_LLAMA_NAMES,
        "sliding_window": "sliding_window",
        "window_layers": "window_layers",
        "rotary_layers": "rotary_layers",
    },
    {
        **_LLAMA_ABSENT,
        "vocab_size": 128256,
        "max_position_embeddings": 32768,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "hidden_size": 2048,
        "rope_theta": 2000000.0,
        "sliding_window": None,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    _ROPE,
    _ROTARY_LAYERS,
    _windows(lambda number, values: not values["rotary_layers"][number], switch=True),
    model="SmolLM3Model",
    causal_lm="SmolLM3ForCausalLM",
    classifier="SmolLM3ForSequenceClassification",
    ignored="max_window_layers",
)

_GEMMA_FIELDS = {"norm_unit_offset": True, "scale_embeddings": True}
_GEMMA_ABSENT = {
    **_LLAMA_ABSENT,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
_GEMMA = _dialect(
    {"hidden_act": "activation", "attention_bias": "attention_bias"},
    _GEMMA_ABSENT,
    _ROPE,
    _GEMMA_ACTIVATION,
    model="GemmaModel",
    causal_lm="GemmaForCausalLM",
    classifier="GemmaForSequenceClassification",
    ignored="hidden_activation",
    defaults=_GEMMA_FIELDS,
)

_GEMMA2_NAMES = {
    "hidden_activation": "activation",
    "attention_bias": "attention_bias",
    "query_pre_attn_scalar": "query_pre_attention_scalar",
    "sliding_window": "sliding_window",
    "window_layers": "window_layers",
    "final_logit_softcapping": "logit_cap",
}
_GEMMA2_ABSENT = {
    **_GEMMA_ABSENT,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_GEMMA2 = _dialect(
    {**_GEMMA2_NAMES, "attn_logit_softcapping": "score_cap"},
    _GEMMA2_ABSENT,
    _ROPE,
    _windows(lambda number, values: number % 2 == 0),
    model="Gemma2Model",
    causal_lm="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    ignored="hidden_act",
    weights=_FOUR_NORMS,
    defaults={**_GEMMA_FIELDS, "norm_last": True},
)
_GEMMA3 = _dialect(
    {
        **_GEMMA2_NAMES,
        "rope_local_base_freq": "local_rotary_wavelength",
        "rope_local_scaling": "local_rotary_scaling",
    },
    {
        **_GEMMA2_ABSENT,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    _TWO_ROPES,
    _windows(lambda number, values: (number + 1) % values["sliding_window_pattern"] != 0),
    model="Gemma3TextModel",
    causal_lm="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    ignored="hidden_act sliding_window_pattern _sliding_window_pattern",
    weights=_FOUR_NORMS,
    fixed={"attn_logit_softcapping": None},
    defaults={**_GEMMA_FIELDS, "norm_last": True, "qk_norm": True},
    # In checkpoints that read images too; of old, and today.
    ignored_tensors=(r"^(model\.)?(vision_tower|multi_modal_projector)\.",),
    renamed=((r"^language_model\.(?=model\.|lm_head\.)", ""), (r"^model\.language_model\.", "model.")),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Configuration of `Llama`; the defaults are Llama 2 with 7 billion parameters.

    Args:
        vocabulary_size: Number of tokens.
        context_length: Longest sequence, in tokens.
        num_layers: Number of blocks.
        num_heads: Number of query heads.
        num_kv_heads: Number of key-value heads; None: `num_heads`.
        head_dim: Width of a head; None: `dim / num_heads`.
        dim: Width of the residual stream.
        intermediate_dim: Width inside the feed-forward network.
        activation: Activation of the feed-forward network's gate, see `GatedFeedForward`.
        attention_bias: Whether queries, keys and values have biases.
        attention_output_bias: Whether the output matrix of the attention has one; None: as they have.
        mlp_bias: Whether the matrices of the feed-forward network have biases.
        qk_norm: Whether each head of queries and keys is normalised.
        query_pre_attention_scalar: Queries are divided by its square root; None: `head_dim`.
        score_cap: Bound that the scores of the attention approach; None: no bound.
        logit_cap: Bound that the logits approach; None: no bound.
        norm_epsilon: Epsilon of the norms.
        norm_unit_offset: `unit_offset` of the norms, see `RMSNorm`.
        norm_last: Whether there is another norm at the end of each branch.
        scale_embeddings: Whether the vectors of tokens are multiplied by the square root of `dim`.
        rotary_wavelength: `max_wavelength` of the rotary embeddings.
        rotary_scaling: `scaling` of the rotary embeddings, see `RotaryEmbedding`; besides what is said
            there, `{"rope_type": "dynamic", …}`, which begins where the context of the model ends.
        rotary_layers: Of each layer, whether it has a rotary embedding; None: all have.
        sliding_window: Number of tokens that a token sees, itself included; None: all before it.
        window_layers: Of each layer, whether it has that window; None: all have.
        local_rotary_wavelength: `rotary_wavelength` in layers with a window; None: as in the others,
            scaling included.
        local_rotary_scaling: `rotary_scaling` in layers with a window that have a wavelength of their own.
        attention_dropout: Fraction of the attention weights set to zero while training.
        tie_embeddings: Whether the output head is the token embedding.
        initializer_range: Standard deviation of the normal initialisation.
    """

    dialects = {
        "llama": _LLAMA,
        "mistral": _MISTRAL,
        "qwen2": _QWEN2,
        "qwen3": _QWEN3,
        "smollm3": _SMOLLM3,
        "gemma": _GEMMA,
        "gemma2": _GEMMA2,
        "gemma3_text": _GEMMA3,
    }

    vocabulary_size: int = 32000
    context_length: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    dim: int = 4096
    intermediate_dim: int = 11008
    activation: str = "silu"
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: bool = False
    query_pre_attention_scalar: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    norm_epsilon: float = 1e-5
    norm_unit_offset: bool = False
    norm_last: bool = False
    scale_embeddings: bool = False
    rotary_wavelength: float = 10000.0
    rotary_scaling: dict[str, Any] | None = None
    rotary_layers: tuple[bool, ...] | None = None
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    local_rotary_wavelength: float | None = None
    local_rotary_scaling: dict[str, Any] | None = None
    attention_dropout: float = 0.0
    tie_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        super().__post_init__()
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            if self.dim % self.num_heads:
                raise ValueError(
                    "`num_heads` must divide `dim`, or `head_dim` must be given. "
                    f"Received: num_heads={self.num_heads}, dim={self.dim}"
                )
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        for name in ("rotary_layers", "window_layers"):
            if (layers := getattr(self, name)) is None:
                continue
            if len(layers) != self.num_layers:
                raise ValueError(
                    f"`{name}` must say of each layer whether it has it. "
                    f"Received: {len(layers)} values, num_layers={self.num_layers}"
                )
            object.__setattr__(self, name, None if all(layers) else tuple(map(bool, layers)))
        for name, needed in (
            ("window_layers", "sliding_window"),
            ("local_rotary_wavelength", "sliding_window"),
            ("local_rotary_scaling", "local_rotary_wavelength"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(
                    f"`{name}` needs `{needed}`. Received: {name}={getattr(self, name)!r}, {needed}=None"
                )


@keras.saving.register_keras_serializable(package="kerasllm")
class Llama(DecoderModel):
    """Llama as a Keras model: token ids in, logits out.

    Touvron et al.: "LLaMA: Open and Efficient Foundation Language Models" (2023); Jiang et al.: "Mistral
    7B" (2023); Riviere et al.: "Gemma 2" (2024); Yang et al.: "Qwen3 Technical Report" (2025).

    Args:
        config: A `LlamaConfig`.
        head: `"causal_lm"`, `"classifier"` or None, see `DecoderModel.call`.
    """

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig, head: str | None = "causal_lm", **kwargs):
        super().__init__(config, head, **kwargs)
        dtype = self.dtype_policy
        self.token_embedding = TokenEmbedding(
            config.vocabulary_size,
            config.dim,
            config.initializer_range,
            name="token_embedding",
            dtype=dtype,
        )
        scalar = config.query_pre_attention_scalar
        self.blocks = [
            DecoderBlock(
                config.dim,
                config.num_heads,
                config.intermediate_dim,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                query_scale=None if scalar is None else scalar**-0.5,
                score_cap=config.score_cap,
                qk_norm=config.qk_norm,
                norm="rms",
                norm_last=config.norm_last,
                norm_epsilon=config.norm_epsilon,
                norm_unit_offset=config.norm_unit_offset,
                activation=config.activation,
                gated=True,
                use_bias=config.mlp_bias,
                attention_bias=config.attention_bias,
                attention_output_bias=config.attention_output_bias,
                attention_dropout=config.attention_dropout,
                initializer_range=config.initializer_range,
                name=f"block_{number}",
                dtype=dtype,
                **self._place_arguments(number),
            )
            for number in range(config.num_layers)
        ]
        self.final_norm = RMSNorm(
            config.norm_epsilon, config.norm_unit_offset, name="final_norm", dtype=dtype
        )
        self._build_all()

    def _place_arguments(self, number: int) -> dict[str, Any]:
        """What a layer knows of places: arguments of its block in which layers differ."""
        config, arguments = self.config, {}
        wavelength, scaling = config.rotary_wavelength, config.rotary_scaling
        windowed = config.window_layers is None or config.window_layers[number]
        if config.sliding_window is not None and windowed:
            arguments["sliding_window"] = config.sliding_window
            if config.local_rotary_wavelength is not None:
                wavelength, scaling = config.local_rotary_wavelength, config.local_rotary_scaling
        if config.rotary_layers is None or config.rotary_layers[number]:
            # A dynamic scaling begins at texts longer than `context_length`, which there are none of.
            dynamic = scaling is not None and scaling.get("rope_type") == "dynamic"
            arguments["rotary_wavelength"] = wavelength
            arguments["rotary_scaling"] = None if dynamic else scaling
        return arguments

    def _embed(self, token_ids, positions, training):
        x = self.token_embedding(token_ids)
        if self.config.scale_embeddings:
            # The factor has the precision of the vectors, as it had when these models were trained.
            x = x * ops.cast(math.sqrt(self.config.dim), x.dtype)
        return x

    def score_tokens(self, hidden):
        logits, cap = super().score_tokens(hidden), self.config.logit_cap
        return logits if cap is None else cap * ops.tanh(logits / cap)
