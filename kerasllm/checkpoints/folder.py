"""Checkpoint folders in Hugging Face's layout, which kerasllm and transformers both load."""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from kerasllm.checkpoints.safetensors_file import SafetensorsFile, write_safetensors
from kerasllm.checkpoints.tensors import TensorSource, parse_json_object
from kerasllm.checkpoints.weights import load_model
from kerasllm.files import replaced_folder, write_json
from kerasllm.models import LanguageModel
from kerasllm.models.base import GENERATION_NAMES
from kerasllm.tokenizers import Tokenizer

CONFIG = "config.json"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = frozenset(
    "added_tokens.json chat_template.jinja chat_template.json merges.txt "
    "sentencepiece.bpe.model special_tokens_map.json spiece.model tokenizer.json tokenizer.model "
    "tokenizer_config.json vocab.json vocab.txt".split()
)
_SENTENCE_TRANSFORMERS_FILES = frozenset(
    "1_Pooling 2_Normalize config_sentence_transformers.json modules.json sentence_bert_config.json".split()
)
_OWN_FILES = TOKENIZER_FILES | _SENTENCE_TRANSFORMERS_FILES | {CONFIG, GENERATION}
_WEIGHT_FILE = re.compile(r"(model|pytorch_model)[^/]*\.(safetensors|bin)(\.index\.json)?")
_NEEDED = "A checkpoint folder holds config.json and model.safetensors. No file: {}"
_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        model: The model.
        tokenizer: Its tokenizer, or None if there is none.
        generation: The content of `generation_config.json`; if there is none, what config.json has of it.
        pooling: How an embedder pools hidden states, as in `TextEmbedder`, or None if nothing is said.
    """

    model: LanguageModel
    tokenizer: Tokenizer | None
    generation: dict[str, Any]
    pooling: str | None = None


# Writing


def save_folder(
    folder: str | os.PathLike,
    model: LanguageModel,
    tokenizer: Tokenizer | None = None,
    generation: dict[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    more_files: Mapping[str, dict[str, Any]] | None = None,
) -> pathlib.Path:
    """Writes a model in Hugging Face's layout; the folder is there whole or not at all.

    Args:
        folder: Where to write; made if it is not there. It takes the place of an earlier checkpoint;
            files in the folder that belong to no checkpoint stay.
        model: The model.
        tokenizer: Its tokenizer, or None to write none.
        generation: Content of `generation_config.json`, or None to write none.
        max_shard_size: Most bytes of a file of weights, as a number or such as `"500MB"`; a single tensor
            may be larger. With more than one file, an index says where each tensor is.
        more_files: Further JSON files by their path in the folder.

    Returns:
        The folder.

    Raises:
        ValueError: If `max_shard_size` is no size, the model's weight table lacks a weight, or the folder
            is a file, a mount point, or the current working directory or one of its parents.
    """
    most_bytes = _parse_size(max_shard_size)
    tensors, read = _checkpoint_tensors(model)
    # Where one is left out, transformers takes that of the family's first model.
    config = {
        "bos_token_id": None if tokenizer is None else tokenizer.bos_id,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
        "pad_token_id": _pad_id(tokenizer, model),
        "dtype": model.dtype_policy.variable_dtype,
        **model.huggingface_config(),
    }
    with replaced_folder(folder, _belongs_to_a_checkpoint) as new:
        write_json(new / CONFIG, config)
        if tokenizer is not None:
            tokenizer.save(new)
        if generation is not None:
            write_json(new / GENERATION, generation)
        for name, values in (more_files or {}).items():
            write_json(new / name, values)
        _write_weights(new, tensors, read, most_bytes)
    return pathlib.Path(folder)


def _pad_id(tokenizer: Tokenizer | None, model: LanguageModel) -> int | None:
    """The id that fills rows up; transformers classifies no batch and shifts no labels without one."""
    if tokenizer is None:
        return getattr(model.config, "decoder_start_id", None)
    return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def _belongs_to_a_checkpoint(name: str) -> bool:
    return name in _OWN_FILES or _WEIGHT_FILE.fullmatch(name) is not None


# dtype and shape by name
Layout = dict[str, tuple[np.dtype, tuple[int, ...]]]


def _checkpoint_tensors(model: LanguageModel) -> tuple[Layout, Callable[[str], np.ndarray]]:
    """The dtype and shape of each tensor of a model's checkpoint, and a function that makes it."""
    variables, table = model.variables_by_path(), model.weight_map()
    filled = {path for paths, _ in table.values() for path in paths}
    if lacking := sorted(set(variables) - filled):
        raise ValueError(f"The weight table of {type(model).__name__} lacks: {lacking}")
    layout = {}
    for name, (paths, transform) in table.items():
        dummies = [np.broadcast_to(np.zeros((), "uint8"), variables[path].shape) for path in paths]
        layout[name] = (np.dtype(variables[paths[0]].dtype), transform.to_tensor(dummies).shape)

    def read(name: str) -> np.ndarray:
        paths, transform = table[name]
        return transform.to_tensor([_to_numpy(variables[path]) for path in paths])

    return layout, read


def _to_numpy(variable) -> np.ndarray:
    # Keras's conversion makes float32 of bfloat16.
    return np.asarray(ops.convert_to_numpy(variable), dtype=np.dtype(variable.dtype))


def _write_weights(
    folder: pathlib.Path, tensors: Layout, read: Callable[[str], np.ndarray], most_bytes: int
) -> None:
    shards: list[Layout] = [{}]
    shard_size = total_size = 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * dtype.itemsize
        if shards[-1] and shard_size + size > most_bytes:
            shards.append({})
            shard_size = 0
        shards[-1][name] = (dtype, shape)
        shard_size += size
        total_size += size
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, tensors, read)
        return
    files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / file, shard, read)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _parse_size(size: int | str) -> int:
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"(\d+) ?(|KB|MB|GB)", str(size).upper())
    if match is None or int(match[1]) < 1:
        raise ValueError(f"`max_shard_size` must be such as 1000 or '5GB'. Received: {size!r}")
    return int(match[1]) * units[match[2]]


# Reading


def load_folder(
    folder: str | os.PathLike,
    head: str | None = "default",
    dtype: str | None = None,
    labels: Sequence[str] | None = None,
) -> Checkpoint:
    """Reads a model in Hugging Face's layout; the family is found from `config.json`.

    Python code that comes with a checkpoint (`auto_map`) is never run, and pickled weights are never
    opened.

    Args:
        folder: The folder.
        head: One of the family's `heads`. `"default"`: the one that config.json names.
        dtype: Keras dtype policy of the model. None: Keras's default.
        labels: As in `load_checkpoint`.

    Returns:
        The model with its tokenizer and generation settings.

    Raises:
        FileNotFoundError: If the folder, its config or its weights are missing.
        ValueError: If a file is damaged, the family is unknown, or weights are missing, left over, pickled
            or of another shape.
    """
    folder = pathlib.Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(_NEEDED.format(folder / CONFIG))
    values = read_json(folder / CONFIG)
    with open_weights(folder) as source:
        model = load_model(values, source, head, dtype, labels)
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None
    if (folder / GENERATION).is_file():
        generation = read_json(folder / GENERATION)
    else:
        generation = {
            name: values[name] for name in GENERATION_NAMES & set(values) if values[name] is not None
        }
    return Checkpoint(model, tokenizer, generation)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object; ValueError if it does not."""
    return parse_json_object(path.read_bytes(), str(path))


def open_weights(folder: pathlib.Path) -> TensorSource:
    """Opens the weights of a checkpoint folder.

    Args:
        folder: A folder with model.safetensors, or model.safetensors.index.json and its files.

    Returns:
        The tensors.

    Raises:
        FileNotFoundError: If there are no weights, or not all.
        ValueError: If they are damaged, or there are only pickled ones.
    """
    if (folder / WEIGHTS).is_file():
        return SafetensorsFile(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _ShardedFiles(folder)
    if pickled := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE):
        raise ValueError(pickle_message(pickled))
    raise FileNotFoundError(_NEEDED.format(folder / WEIGHTS))


def pickle_message(names: list[str]) -> str:
    """Says why pickled weights are refused and what to do."""
    return (
        "Weights must be safetensors: a pickle may run any code when it is opened. Convert it where you "
        "trust it: transformers.AutoModel.from_pretrained(folder).save_pretrained(new_folder). "
        f"Received: {names}"
    )


class _ShardedFiles(TensorSource):
    """Several safetensors files and the index that says which tensor is in which."""

    def __init__(self, folder: pathlib.Path):
        self.description = str(folder / INDEX)
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ValueError(
                f"`weight_map` must map tensors to files. Received: {self.description}, {type(weight_map)}"
            )
        for file in set(weight_map.values()):
            if not re.fullmatch(r"[\w.-]+\.safetensors", file) or file.startswith("."):
                raise ValueError(
                    "An index must name safetensors files in its own folder. "
                    f"Received: {self.description}: {file!r}"
                )
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{self.description} needs a file that is missing: {folder / file}")
        with contextlib.ExitStack() as stack:
            files = {
                file: stack.enter_context(SafetensorsFile(folder / file))
                for file in sorted(set(weight_map.values()))
            }
            held = {(name, file) for file, source in files.items() for name in source.shapes}
            if different := sorted(held ^ set(weight_map.items())):
                raise ValueError(
                    "Each tensor must be in the file that the index says and in no other. "
                    f"Received: {self.description}: {different[:5]}"
                )
            self._files = {name: files[file] for name, file in weight_map.items()}
            self.shapes = {name: source.shapes[name] for name, source in self._files.items()}
            self._stack = stack.pop_all()

    def close(self) -> None:
        self._stack.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._files[name].read(name, start, stop)
