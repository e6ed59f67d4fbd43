"""From a GGUF file to a model: Hugging Face's config, tensor names and layouts of llama.cpp's."""

import dataclasses
import math
import os
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import gguf
import numpy as np

from kerasllm.checkpoints.folder import Checkpoint
from kerasllm.checkpoints.gguf_file import GGUFFile
from kerasllm.checkpoints.gguf_tokenizer import read_tokenizer
from kerasllm.checkpoints.tensors import TensorSource
from kerasllm.checkpoints.weights import load_model
from kerasllm.models import find_model_class

# Metadata that say nothing about the computation here, or are read elsewhere.
_SAYS_NOTHING = frozenset(
    "vocab_size pooling_type rope.scaling.type rope.scaling.factor rope.scaling.finetuned "
    "rope.scaling.original_context_length".split()
)
# llama.cpp's numbers of poolings: what `TextEmbedder` calls them.
_POOLINGS = {0: None, 1: "mean", 2: "cls", 3: "last"}
# Metadata that must be the width of a head.
_HEAD_WIDTHS = ("rope.dimension_count", "attention.value_length")
# Factors by which rotary frequencies are divided; they stand for a kind of scaling in config.json.
_ROPE_FACTORS = "rope_freqs.weight"
_GEMMA3_LOCAL_ROPE_BASE = 10_000.0

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """How llama.cpp stores one family.

    Args:
        model_type: That of Hugging Face.
        names: Metadata keys, without the family's prefix, to names in config.json.
        fixed: Settings of config.json that the metadata imply.
        rotated: Whether the rows of query and key matrices lie so that neighbours are rotated, where
            Hugging Face rotates the first half with the second.
        norm_offset: What was added to the gains of the norms.
        transposed: Endings of tensors that are transposed.
        finish: Last changes to the config; gets it and the file.
    """

    model_type: str
    names: dict[str, str]
    fixed: Values = dataclasses.field(default_factory=dict)
    rotated: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    finish: Callable[[Values, GGUFFile], None] = lambda values, file: None


_DECODER_NAMES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_SOFT_CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_GEMMA_FIXED = {"hidden_activation": "gelu_pytorch_tanh"}


def _set_attention_scale(largest: int) -> Callable[[Values, GGUFFile], None]:
    """Gemma's attention divides by the root of a number that llama.cpp takes from the number of layers."""

    def finish(values: Values, file: GGUFFile) -> None:
        heads = values["num_attention_heads"]
        is_largest = values["num_hidden_layers"] == largest
        scale = values["hidden_size"] // heads if is_largest else values["head_dim"]
        values["query_pre_attn_scalar"] = scale

    return finish


def _finish_llama(values: Values, file: GGUFFile) -> None:
    if "sliding_window" in values:
        values["model_type"] = "mistral"


def _finish_bert(values: Values, file: GGUFFile) -> None:
    values["type_vocab_size"] = file.shapes["token_types.weight"][0]


_ARCHITECTURES = {
    "llama": _Architecture("llama", _DECODER_NAMES | _WINDOW, rotated=True, finish=_finish_llama),
    "smollm3": _Architecture("smollm3", _DECODER_NAMES, rotated=True),
    "qwen2": _Architecture("qwen2", _DECODER_NAMES),
    "qwen3": _Architecture("qwen3", _DECODER_NAMES),
    "gemma": _Architecture("gemma", _DECODER_NAMES, _GEMMA_FIXED, norm_offset=1.0),
    "gemma2": _Architecture(
        "gemma2",
        _DECODER_NAMES | _WINDOW | _SOFT_CAPS,
        _GEMMA_FIXED,
        norm_offset=1.0,
        finish=_set_attention_scale(largest=46),
    ),
    "gemma3": _Architecture(
        "gemma3_text",
        _DECODER_NAMES | _WINDOW | _SOFT_CAPS | {"rope.freq_base_swa": "rope_local_base_freq"},
        {**_GEMMA_FIXED, "rope_local_base_freq": _GEMMA3_LOCAL_ROPE_BASE},
        norm_offset=1.0,
        finish=_set_attention_scale(largest=62),
    ),
    "gpt2": _Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        transposed=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
    ),
    "bert": _Architecture(
        "bert",
        {
            "context_length": "max_position_embeddings",
            "block_count": "num_hidden_layers",
            "embedding_length": "hidden_size",
            "feed_forward_length": "intermediate_size",
            "attention.head_count": "num_attention_heads",
            "attention.layer_norm_epsilon": "layer_norm_eps",
        },
        {"architectures": ["BertModel"]},
        finish=_finish_bert,
    ),
}


def load_gguf(
    path: str | os.PathLike,
    head: str | None = "default",
    dtype: str | None = None,
    labels: Sequence[str] | None = None,
) -> Checkpoint:
    """Loads a model with its tokenizer from a GGUF file; quantised weights become floats.

    Args:
        path: The file.
        head: One of the family's `heads`. `"default"`: the one that the file has.
        dtype: Keras dtype policy of the model. None: Keras's default.
        labels: As in `load_checkpoint`.

    Returns:
        The model with its tokenizer and generation settings.

    Raises:
        ValueError: If the file is damaged, its architecture is unknown, or weights are missing, left over
            or of another shape.
    """
    with GGUFFile(path) as file:
        architecture = _find_architecture(file)
        values = huggingface_config(file)
        model = load_model(values, _NamedTensors(file, architecture, values), head, dtype, labels)
        tokenizer, generation = read_tokenizer(file.metadata)
        pooling = _read_pooling(file)
    return Checkpoint(model, tokenizer, generation, pooling)


def _read_pooling(file: GGUFFile) -> str | None:
    key = f"{file.metadata['general.architecture']}.pooling_type"
    kind = file.metadata.get(key, 0)
    if not isinstance(kind, int) or kind not in _POOLINGS:
        raise ValueError(f"{key} must be one of {_POOLINGS}. Received: {reprlib.repr(kind)}")
    return _POOLINGS[kind]


def _find_architecture(file: GGUFFile) -> _Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise ValueError(
            f"general.architecture of a GGUF file must be one of {sorted(_ARCHITECTURES)}. "
            f"Received: {file.description}: {name!r}"
        )
    return _ARCHITECTURES[name]


def huggingface_config(file: GGUFFile) -> Values:
    """Translates the metadata of a GGUF file into the content of a config.json.

    Args:
        file: An open GGUF file.

    Returns:
        The content of the config.json.

    Raises:
        ValueError: If metadata are missing, of a wrong kind, or ask for what is not known here.
    """
    architecture = _find_architecture(file)
    prefix = file.metadata["general.architecture"] + "."
    values: Values = {"model_type": architecture.model_type, **architecture.fixed}
    for key, name in architecture.names.items():
        if (value := file.metadata.get(prefix + key)) is not None:
            values[name] = _number(prefix + key, value)
    for name in (architecture.names[key] for key in ("block_count", "embedding_length")):
        if name not in values or "token_embd.weight" not in file.shapes:
            raise ValueError(f"{file.description} lacks block_count, embedding_length or token_embd")
    _check_known(file.metadata, prefix, architecture, values)
    values["vocab_size"] = file.shapes["token_embd.weight"][0]
    if "lm_head.weight" in _head_names(values):
        values["tie_word_embeddings"] = "output.weight" not in file.shapes
    if (scaling := _rope_scaling(file, prefix, values)) is not None:
        values["rope_scaling"] = scaling
    try:
        architecture.finish(values, file)
    except (KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{file.description} lacks metadata or a tensor: {error}") from error
    return values


def _check_known(metadata: Values, prefix: str, architecture: _Architecture, values: Values) -> None:
    """What a file says of its family must be known, or the model would compute something else."""
    width = values.get("head_dim")
    if width is None and values.get("num_attention_heads"):
        width = values["hidden_size"] // values["num_attention_heads"]
    for key, value in metadata.items():
        name = key.removeprefix(prefix)
        if name == key or name in architecture.names or name in _SAYS_NOTHING:
            continue
        differs = value != width if name in _HEAD_WIDTHS else value
        if differs.any() if isinstance(differs, np.ndarray) else differs:
            raise ValueError(
                "Metadata of a GGUF file must be known, and heads of one width. "
                f"Received: {key}={reprlib.repr(value)} for heads of width {width}"
            )


def _number(key: str, value: Any) -> int | float:
    """A number of the metadata; of a list (one per layer) the number, if they are all the same."""
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        value = value[0].item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be one number for all layers. Received: {reprlib.repr(value)}")
    return value


def _rope_scaling(file: GGUFFile, prefix: str, values: Values) -> Values | None:
    """What config.json says of a longer context than the model was first trained for."""
    kind = file.metadata.get(prefix + "rope.scaling.type", "none")
    factor = file.metadata.get(prefix + "rope.scaling.factor")
    original = file.metadata.get(prefix + "rope.scaling.original_context_length")
    if _ROPE_FACTORS in file.shapes:
        return _llama3_scaling(file, values)
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{prefix}rope.scaling.type must be none, linear or yarn. Received: {kind!r}")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": _number(prefix + "rope.scaling.factor", factor)}
    if kind == "yarn" and original is not None:
        key = prefix + "rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = _number(key, original)
    return scaling


def _llama3_scaling(file: GGUFFile, values: Values) -> Values:
    """Llama 3's scaling, of which a GGUF file holds only the resulting factors.

    All published models have the same limits; whether they explain the factors is checked.
    """
    factors = file.read(_ROPE_FACTORS).astype("float64")
    scaling = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    frequencies = values.get("rope_theta", 10_000.0) ** (-np.arange(factors.size) / factors.size)
    turns = 8192 * frequencies / (2 * math.pi)
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    expected = 1 / ((1 - smooth) / scaling["factor"] + smooth)
    if not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError(
            f"{_ROPE_FACTORS} must be those of Llama 3's rope scaling. Received: {file.description}: "
            f"{factors[:4].tolist()}…"
        )
    return scaling


def _head_names(values: Values) -> dict:
    """The weight table of the head that the family's GGUF files have."""
    family = find_model_class(values)
    return family.config_class.dialects[values["model_type"]].head_weights.get(family.heads[0], {})


class _NamedTensors(TensorSource):
    """The tensors of a GGUF file under Hugging Face's names and in Hugging Face's layouts."""

    def __init__(self, file: GGUFFile, architecture: _Architecture, values: Values):
        self.description = file.description
        self._file = file
        self._architecture = architecture
        self._heads = {
            "attn_q": values.get("num_attention_heads"),
            "attn_k": values.get("num_key_value_heads", values.get("num_attention_heads")),
        }
        self._names = _huggingface_names(file, values)
        self.shapes = {name: self._shape(stored) for name, stored in self._names.items()}

    def close(self) -> None:
        self._file.close()

    def _shape(self, stored: str) -> tuple[int, ...]:
        shape = self._file.shapes[stored]
        return shape[::-1] if stored.endswith(self._architecture.transposed) else shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        stored = self._names[name]
        if stored.endswith(self._architecture.transposed):
            return self._file.read(stored).T[start:stop]
        heads = self._heads.get(stored.rpartition(".")[0].rpartition(".")[2])
        if self._architecture.rotated and heads:
            return _unrotated(self._file.read(stored), heads)[start:stop]
        array = self._file.read(stored, start, stop)
        if self._architecture.norm_offset and stored.endswith("norm.weight"):
            array = array - np.array(self._architecture.norm_offset, array.dtype)
        return array


def _unrotated(array: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's order of the rows of query and key matrices."""
    if array.shape[0] % (2 * heads):
        raise ValueError(f"{heads} heads must divide the rows of a query or key. Received: {array.shape}")
    rows = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return rows.swapaxes(1, 2).reshape(array.shape)


def _huggingface_names(file: GGUFFile, values: Values) -> dict[str, str]:
    """Hugging Face's name to the file's name of each tensor; those without one keep the file's."""
    dialect = find_model_class(values).config_class.dialects[values["model_type"]]
    name = file.metadata["general.architecture"]
    kind = next(kind for kind, its_name in gguf.MODEL_ARCH_NAMES.items() if its_name == name)
    layers = file.metadata[f"{name}.block_count"]
    if not isinstance(layers, int) or not 0 < layers <= len(file.shapes):
        raise ValueError(f"{file.description} must hold the tensors of every layer, but says {layers=}")
    stored_names = gguf.get_tensor_name_map(kind, layers)
    named = {}
    templates = [(dialect.prefix + name, name) for name in dialect.weights]
    templates += [(name, name) for name in _head_names(values)]
    for full, bare in templates:
        for number in range(layers) if "{}" in full else (0,):
            for candidate in (full.format(number), bare.format(number)):
                stored = stored_names.get_name(candidate, try_suffixes=(".weight", ".bias"))
                if stored in file.shapes:
                    named[full.format(number)] = stored
                    break
    rest = set(file.shapes) - set(named.values()) - {_ROPE_FACTORS}
    return named | {name: name for name in rest}
