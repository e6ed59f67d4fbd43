"""Reading KerasHub's presets: config.json, model.weights.h5 and the tokenizer's assets.

The files are read as data, KerasHub itself is not needed: its config.json names classes, of which nothing
is instantiated, and an HDF5 file may point to other files, which is refused.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from kerasllm.checkpoints.folder import Checkpoint, read_json
from kerasllm.checkpoints.gguf_tokenizer import read_tokenizer
from kerasllm.checkpoints.tensors import TensorSource
from kerasllm.checkpoints.weights import load_model
from kerasllm.tokenizers import Tokenizer

_CONFIG = "config.json"
_WEIGHTS = "model.weights.h5"
_ASSETS = "assets/tokenizer"

Values = dict[str, Any]
# Hugging Face's name -> datasets of the HDF5 file, and how to make the tensor of their arrays. `{}` stands
# for the layer's number, `{suffix}` for Keras's way to number the layers of a kind: "", "_1", "_2" …
Table = dict[str, tuple[tuple[str, ...], Callable[[Sequence[np.ndarray]], np.ndarray]]]


def _same(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0]


def _flat(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The bias of all heads."""
    return arrays[0].reshape(-1)


def _linear(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """`[in, out]`, where `out` may be heads and their width, to `[out, in]`."""
    return arrays[0].reshape(arrays[0].shape[0], -1).T


def _merging_linear(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """`[heads, width, out]` to `[out, in]`."""
    return arrays[0].reshape(-1, arrays[0].shape[-1]).T


def _merging(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """`[heads, width, out]` to `[in, out]`."""
    return arrays[0].reshape(-1, arrays[0].shape[-1])


def _side_by_side(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Queries, keys and values `[in, heads, width]` to one `[in, 3 * out]`."""
    return np.concatenate([array.reshape(array.shape[0], -1) for array in arrays], axis=1)


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array in arrays])


def _dense(theirs: str, ours: str, kernel: Callable = _linear, bias: Callable = _same) -> Table:
    return {
        f"{theirs}.weight": ((f"{ours}/vars/0",), kernel),
        f"{theirs}.bias": ((f"{ours}/vars/1",), bias),
    }


def _norm(theirs: str, ours: str) -> Table:
    return _dense(theirs, ours, kernel=_same)


_EMBEDDING = "reversible_embedding/vars/0"


def _gpt2_table(values: Values) -> Table:
    ours, theirs = "transformer_decoder{suffix}", "transformer.h.{}"
    attention = [f"{ours}/_self_attention_layer/{name}_dense" for name in ("query", "key", "value")]
    return {
        "transformer.wte.weight": ((_EMBEDDING,), _same),
        "transformer.wpe.weight": (("position_embedding/vars/0",), _same),
        **_norm("transformer.ln_f", "layer_normalization"),
        **_norm(f"{theirs}.ln_1", f"{ours}/_self_attention_layer_norm"),
        f"{theirs}.attn.c_attn.weight": (tuple(f"{part}/vars/0" for part in attention), _side_by_side),
        f"{theirs}.attn.c_attn.bias": (tuple(f"{part}/vars/1" for part in attention), _joined),
        **_dense(f"{theirs}.attn.c_proj", f"{ours}/_self_attention_layer/output_dense", _merging),
        **_norm(f"{theirs}.ln_2", f"{ours}/_feedforward_layer_norm"),
        **_dense(f"{theirs}.mlp.c_fc", f"{ours}/_feedforward_intermediate_dense", _same),
        **_dense(f"{theirs}.mlp.c_proj", f"{ours}/_feedforward_output_dense", _same),
    }


def _llama_table(values: Values) -> Table:
    ours, theirs = "llama_transformer_decoder{suffix}", "model.layers.{}"
    attention, feed_forward = f"{ours}/_self_attention_layer", f"{ours}/_feedforward"
    matrices = {
        f"{theirs}.self_attn.q_proj": (f"{attention}/_query_dense", _linear),
        f"{theirs}.self_attn.k_proj": (f"{attention}/_key_dense", _linear),
        f"{theirs}.self_attn.v_proj": (f"{attention}/_value_dense", _linear),
        f"{theirs}.self_attn.o_proj": (f"{attention}/_output_dense", _merging_linear),
        f"{theirs}.mlp.gate_proj": (f"{feed_forward}_gate_dense", _linear),
        f"{theirs}.mlp.up_proj": (f"{feed_forward}_intermediate_dense", _linear),
        f"{theirs}.mlp.down_proj": (f"{feed_forward}_output_dense", _linear),
        f"{theirs}.input_layernorm": (f"{ours}/_self_attention_layernorm", _same),
        f"{theirs}.post_attention_layernorm": (f"{feed_forward}_layernorm", _same),
        "model.norm": ("llama_layer_norm", _same),
    }
    return {
        "model.embed_tokens.weight": ((_EMBEDDING,), _same),
        "lm_head.weight": (("reversible_embedding/vars/1",), _linear),
        **{f"{name}.weight": ((f"{path}/vars/0",), change) for name, (path, change) in matrices.items()},
    }


def _bert_table(values: Values) -> Table:
    ours, theirs = "transformer_encoder{suffix}", "bert.encoder.layer.{}"
    attention = f"{ours}/_self_attention_layer"
    return {
        "bert.embeddings.word_embeddings.weight": ((_EMBEDDING,), _same),
        "bert.embeddings.position_embeddings.weight": (("position_embedding/vars/0",), _same),
        "bert.embeddings.token_type_embeddings.weight": (("embedding/vars/0",), _same),
        **_norm("bert.embeddings.LayerNorm", "layer_normalization"),
        **_dense("bert.pooler.dense", "dense"),
        **_dense(f"{theirs}.attention.self.query", f"{attention}/query_dense", bias=_flat),
        **_dense(f"{theirs}.attention.self.key", f"{attention}/key_dense", bias=_flat),
        **_dense(f"{theirs}.attention.self.value", f"{attention}/value_dense", bias=_flat),
        **_dense(f"{theirs}.attention.output.dense", f"{attention}/output_dense", _merging_linear),
        **_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/_self_attention_layer_norm"),
        **_dense(f"{theirs}.intermediate.dense", f"{ours}/_feedforward_intermediate_dense"),
        **_dense(f"{theirs}.output.dense", f"{ours}/_feedforward_output_dense"),
        **_norm(f"{theirs}.output.LayerNorm", f"{ours}/_feedforward_layer_norm"),
    }


def _t5_table(values: Values) -> Table:
    table = {
        "shared.weight": ((_EMBEDDING,), _same),
        "lm_head.weight": (("reversible_embedding/vars/1",), _linear),
        "encoder.final_layer_norm.weight": (("t5_layer_norm/vars/0",), _same),
        "decoder.final_layer_norm.weight": (("t5_layer_norm_1/vars/0",), _same),
    }
    is_gated = values["feed_forward_proj"].startswith("gated")
    # The decoder's layers are numbered on after the encoder's.
    for stack, first in (("encoder", 0), ("decoder", values["num_layers"])):
        for number in range(values["num_layers"]):
            ours = "t5_transformer_layer" + _suffix(first + number)
            theirs = f"{stack}.block.{number}.layer"
            last = 1 if stack == "encoder" else 2
            attentions = [(f"{theirs}.0", "SelfAttention", "self_attention")]
            if stack == "decoder":
                attentions.append((f"{theirs}.1", "EncDecAttention", "cross_attention"))
            for layer, name, path in attentions:
                for letter, part in zip("qkvo", ("query", "key", "value", "output"), strict=True):
                    dataset = f"{ours}/{path}/{part}_projector/vars/0"
                    table[f"{layer}.{name}.{letter}.weight"] = ((dataset,), _linear)
                table[f"{layer}.layer_norm.weight"] = ((f"{ours}/{path}_layer_norm/vars/0",), _same)
            if number == 0:
                bias = f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
                table[bias] = ((f"{ours}/self_attention/vars/0",), _same)
            dense = f"{theirs}.{last}.DenseReluDense"
            names = {"wi_0": "input", "wi_1": "gate"} if is_gated else {"wi": "input"}
            for name, part in {**names, "wo": "output"}.items():
                table[f"{dense}.{name}.weight"] = ((f"{ours}/{part}_projector/vars/0",), _linear)
            table[f"{theirs}.{last}.layer_norm.weight"] = ((f"{ours}/layer_norm/vars/0",), _same)
    return table


@dataclasses.dataclass(frozen=True)
class _Backbone:
    """How KerasHub stores one family.

    Args:
        model_type: That of Hugging Face.
        names: KerasHub's names of settings to those of config.json.
        fixed: Settings of config.json that KerasHub's class implies.
        table: From the content of config.json to the table of tensors.
        assets: Files of the tokenizer to their names in Hugging Face's layout.
        tokenizer: Settings of the tokenizer, as in tokenizer_config.json.
        finish: Last changes to the content of config.json; gets it and KerasHub's settings.
    """

    model_type: str
    names: dict[str, str]
    fixed: Values
    table: Callable[[Values], Table]
    assets: dict[str, str]
    tokenizer: Values
    finish: Callable[[Values, Values], None] = lambda values, settings: None


def _finish_llama(values: Values, settings: Values) -> None:
    if (factor := settings.get("rope_frequency_adjustment_factor")) is not None:
        original = settings["rope_pretraining_sequence_length"]
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": settings["rope_low_freq_factor"],
            "high_freq_factor": settings["rope_high_freq_factor"],
            "original_max_position_embeddings": original,
        }
        values["max_position_embeddings"] = int(factor * original)
    elif (factor := settings.get("rope_position_scaling_factor", 1.0)) != 1.0:
        values["rope_scaling"] = {"rope_type": "linear", "factor": factor}


def _finish_t5(values: Values, settings: Values) -> None:
    activation = settings["activation"]
    if isinstance(activation, dict):  # A function, serialised by Keras.
        activation = str(activation.get("config")).removeprefix("keras_hub>")
    known = {
        ("relu", False): "relu",
        ("relu", True): "gated-relu",
        ("gelu_approximate", True): "gated-gelu",
    }
    is_gated = bool(settings["use_gated_activation"])
    if (activation, is_gated) not in known:
        raise ValueError(
            f"A T5 must have one of the activations {sorted(known)} (name, gated). "
            f"Received: {activation!r}, use_gated_activation={is_gated}"
        )
    values["feed_forward_proj"] = known[activation, is_gated]
    values["d_kv"] = settings.get("key_value_dim") or settings["hidden_dim"] // settings["num_heads"]


_LLAMA_NAMES = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_query_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "rope_max_wavelength": "rope_theta",
    "layer_norm_epsilon": "rms_norm_eps",
}
_BPE_ASSETS = {"vocabulary.json": "vocab.json", "merges.txt": "merges.txt"}
# KerasHub's Llama says nothing of the longest sequence; these are the models' own.
_BACKBONES = {
    "GPT2Backbone": _Backbone(
        "gpt2",
        {
            "vocabulary_size": "vocab_size",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "hidden_dim": "n_embd",
            "intermediate_dim": "n_inner",
            "max_sequence_length": "n_positions",
        },
        {"layer_norm_epsilon": 1e-5},
        _gpt2_table,
        _BPE_ASSETS,
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "LlamaBackbone": _Backbone(
        "llama",
        _LLAMA_NAMES,
        {"max_position_embeddings": 4096},
        _llama_table,
        {"vocabulary.spm": "tokenizer.model"},
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
        },
        _finish_llama,
    ),
    "BertBackbone": _Backbone(
        "bert",
        {
            "vocabulary_size": "vocab_size",
            "num_layers": "num_hidden_layers",
            "num_heads": "num_attention_heads",
            "hidden_dim": "hidden_size",
            "intermediate_dim": "intermediate_size",
            "max_sequence_length": "max_position_embeddings",
            "num_segments": "type_vocab_size",
        },
        {"layer_norm_eps": 1e-12, "hidden_act": "gelu_pytorch_tanh", "architectures": ["BertModel"]},
        _bert_table,
        {"vocabulary.txt": "vocab.txt"},
        {"tokenizer_class": "BertTokenizer"},
    ),
    "T5Backbone": _Backbone(
        "t5",
        {
            "vocabulary_size": "vocab_size",
            "num_layers": "num_layers",
            "num_heads": "num_heads",
            "hidden_dim": "d_model",
            "intermediate_dim": "d_ff",
            "layer_norm_epsilon": "layer_norm_epsilon",
            "tie_embedding_weights": "tie_word_embeddings",
        },
        {"decoder_start_token_id": 0, "pad_token_id": 0},
        _t5_table,
        {"vocabulary.spm": "spiece.model"},
        {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        _finish_t5,
    ),
}
_BACKBONES["Llama3Backbone"] = dataclasses.replace(
    _BACKBONES["LlamaBackbone"],
    fixed={"max_position_embeddings": 8192},
    assets=_BPE_ASSETS,
    tokenizer={
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
    },
)


def is_kerashub_preset(folder: pathlib.Path) -> bool:
    """Whether a folder holds a preset of KerasHub."""
    if not (folder / _CONFIG).is_file():
        return False
    return isinstance(read_json(folder / _CONFIG).get("registered_name"), str)


def load_kerashub(
    folder: str | os.PathLike,
    head: str | None = "default",
    dtype: str | None = None,
    labels: Sequence[str] | None = None,
) -> Checkpoint:
    """Loads a preset of KerasHub: GPT-2, Llama, BERT or T5.

    Args:
        folder: The preset's folder.
        head: One of the family's `heads`. `"default"`: the one that the preset has.
        dtype: Keras dtype policy of the model. None: Keras's default.
        labels: As in `load_checkpoint`.

    Returns:
        The model with its tokenizer and, of a Llama 3, the tokens that end a text.

    Raises:
        FileNotFoundError: If the weights are missing.
        ValueError: If a file is damaged, the backbone is unknown, or weights are missing, left over or of
            another shape.
    """
    folder = pathlib.Path(folder)
    values, backbone = _read_config(folder)
    if not (folder / _WEIGHTS).is_file():
        raise FileNotFoundError(
            f"A KerasHub preset holds its weights in {_WEIGHTS}. No file: {folder / _WEIGHTS}"
        )
    with _H5Weights(folder / _WEIGHTS, values, backbone) as source:
        values.setdefault("tie_word_embeddings", "lm_head.weight" not in source.shapes)
        model = load_model(values, source, head, dtype, labels)
    return Checkpoint(model, *_read_tokenizer(folder, backbone))


def _read_config(folder: pathlib.Path) -> tuple[Values, _Backbone]:
    """The content of config.json in Hugging Face's words, and how the family is stored."""
    content = read_json(folder / _CONFIG)
    name, settings = content.get("class_name"), content.get("config")
    if not isinstance(name, str) or name not in _BACKBONES or not isinstance(settings, dict):
        raise ValueError(
            f"A KerasHub preset must be one of {sorted(_BACKBONES)}. Received: {folder}: {name!r}"
        )
    backbone = _BACKBONES[name]
    values = {"model_type": backbone.model_type, **backbone.fixed}
    try:
        values |= {theirs: settings[ours] for ours, theirs in backbone.names.items()}
        backbone.finish(values, settings)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder / _CONFIG} lacks a setting of {name}: {error}") from error
    return values, backbone


class _H5Weights(TensorSource):
    """The tensors of a Keras weights file under Hugging Face's names and in Hugging Face's layouts."""

    def __init__(self, path: pathlib.Path, values: Values, backbone: _Backbone):
        self.description = str(path)
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"Not an HDF5 file, or a damaged one: {path} ({error})") from error
        try:
            datasets = _find_datasets(self._file)
            layers = values[backbone.names["num_layers"]]
            if not isinstance(layers, int) or layers > len(datasets):
                raise ValueError(
                    f"{path} must hold the tensors of every layer, but the config says {layers=}"
                )
            self._sources = self._spell(backbone.table(values), layers, datasets)
            used = {dataset for paths, _ in self._sources.values() for dataset in paths}
            self._sources |= {name: ((name,), _same) for name in set(datasets) - used}
            self.shapes = {}
            for name, (paths, change) in self._sources.items():
                shapes = [datasets[dataset].shape for dataset in paths]
                self.shapes[name] = change([np.broadcast_to(np.uint8(0), s) for s in shapes]).shape
        except BaseException:
            self.close()
            raise
        self._datasets = datasets

    @staticmethod
    def _spell(table: Table, layers: int, datasets: dict[str, h5py.Dataset]) -> Table:
        """Writes the layers' numbers into a table and leaves out what the file does not have."""
        spelled = {}
        for name, (paths, change) in table.items():
            for number in range(layers) if "{}" in name else (0,):
                filled = tuple(path.format(suffix=_suffix(number)) for path in paths)
                if all(path in datasets for path in filled):
                    spelled[name.format(number)] = (filled, change)
        return spelled

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        paths, change = self._sources[name]
        if change is _same and self.shapes[name]:
            return _numbers(self._datasets[paths[0]][start:stop])
        return change([_numbers(self._datasets[path][()]) for path in paths])[start:stop]


def _suffix(number: int) -> str:
    return f"_{number}" if number else ""


def _is_bfloat16(dataset: h5py.Dataset) -> bool:
    """Whether Keras wrote it: HDF5 has no such numbers, so that they lie there as two bytes and a name."""
    is_named = str(dataset.attrs.get("dtype")) == "bfloat16"
    return dataset.dtype.kind == "V" and dataset.dtype.itemsize == 2 and is_named


def _numbers(array: np.ndarray) -> np.ndarray:
    # `_find_datasets` has refused all other void ones.
    return array.view(ml_dtypes.bfloat16) if array.dtype.kind == "V" else array


def _find_datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """All datasets below `layers` that hold their numbers themselves; ValueError for any other."""
    found = {}
    # Two hard links to one group, level by level, make a small file a huge tree.
    addresses = {h5py.h5o.get_info(file.id).addr}

    def search(group: h5py.Group, prefix: str, depth: int) -> None:
        for key in group:
            path = f"{prefix}{key}"
            if not isinstance(group.get(key, getlink=True), h5py.HardLink) or depth > 8:
                raise ValueError(
                    f"An HDF5 file of weights must have no links. Received: {file.filename}: {path}"
                )
            item = group[key]
            address = h5py.h5o.get_info(item.id).addr
            if address in addresses:
                raise ValueError(
                    "A file of weights must hold every group and dataset once. "
                    f"Received: {file.filename}: {path}"
                )
            addresses.add(address)
            if isinstance(item, h5py.Group):
                search(item, path + "/", depth + 1)
            elif item.is_virtual or item.external or item.id.get_storage_size() != item.nbytes:
                raise ValueError(
                    "A file of weights must hold all numbers, uncompressed. "
                    f"Received: {file.filename}: {path}"
                )
            elif item.dtype.kind not in "biuf" and not _is_bfloat16(item):
                raise ValueError(
                    f"A file of weights must hold numbers. Received: {file.filename}: {path} of the dtype "
                    f"{item.attrs.get('dtype', item.dtype)!s:.100}"
                )
            else:
                found[path] = item

    try:
        addresses.add(h5py.h5o.get_info(file["layers"].id).addr)
        search(file["layers"], "", 0)
    except (KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ValueError(f"Not a file of weights, or a damaged one: {file.filename} ({error})") from error
    return found


def _read_tokenizer(folder: pathlib.Path, backbone: _Backbone) -> tuple[Tokenizer | None, Values]:
    """The tokenizer, and what generation_config.json would say of its tokens.

    It is read from its assets under the names that they have in Hugging Face's layout.
    """
    assets = folder / _ASSETS
    if not all((assets / name).is_file() for name in backbone.assets):
        return None, {}
    settings = dict(backbone.tokenizer)
    if (folder / "tokenizer.json").is_file():
        given = read_json(folder / "tokenizer.json").get("config")
        if isinstance(given, dict) and isinstance(given.get("lowercase"), bool):
            settings["do_lower_case"] = given["lowercase"]
    if backbone is _BACKBONES["Llama3Backbone"]:
        return _read_llama3_tokenizer(assets, settings)
    with tempfile.TemporaryDirectory() as temporary:
        for name, new_name in backbone.assets.items():
            shutil.copyfile(assets / name, pathlib.Path(temporary, new_name))
        pathlib.Path(temporary, "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return Tokenizer.from_folder(temporary), {}


def _read_llama3_tokenizer(assets: pathlib.Path, settings: Values) -> tuple[Tokenizer | None, Values]:
    """The tokenizer of Llama 3, whose files say neither how it cuts texts nor which tokens are special."""
    ids = read_json(assets / "vocabulary.json")
    tokens = sorted(ids, key=lambda token: ids[token] if isinstance(ids[token], int) else -1)
    if [ids[token] for token in tokens] != list(range(len(ids))):
        raise ValueError(
            f"A vocabulary must number its tokens from 0. Received: {assets / 'vocabulary.json'}"
        )
    lines = (assets / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.removesuffix("\r") for line in lines if line and not line.startswith("#version")]
    normal, control = 1, 3
    is_special = re.compile(r"<\|.*\|>").fullmatch
    metadata: Values = {
        "model": "gpt2",
        "pre": "llama3",
        "tokens": tokens,
        "token_type": np.array([control if is_special(token) else normal for token in tokens]),
        "merges": merges,
    }
    # An instruct model ends its answer with the end of a turn, or of a message that calls a tool.
    named = {"bos": settings["bos_token"], "eos": settings["eos_token"]}
    named |= {"eot": "<|eot_id|>", "eom": "<|eom_id|>"}
    for name, token in named.items():
        if token in ids:
            metadata[f"{name}_token_id"] = ids[token]
    # Said in llama.cpp's words, which name the same pre-tokenizer.
    return read_tokenizer({f"tokenizer.ggml.{name}": value for name, value in metadata.items()})
