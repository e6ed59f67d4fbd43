"""A checkpoint folder that kerasllm and transformers both load."""

import json
import os
import pathlib
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from keras import ops

from kerasllm.files import new_file, write_json
from kerasllm.models import MODELS, LanguageModel
from kerasllm.tokenizers import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
GENERATION = "generation_config.json"


def save_folder(
    folder: str | os.PathLike,
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    generation: dict[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a model in Hugging Face's layout; each file is written whole or not at all.

    Args:
        folder: Where to write; made if it is not there. Files of an earlier save are replaced.
        model: The model.
        tokenizer: Its tokenizer, or None to write none.
        generation: Content of `generation_config.json`, or None to write none.

    Returns:
        The folder.
    """
    folder = pathlib.Path(folder)
    variables = model.variables_by_path()
    tensors = {}
    for name, (paths, transform) in model.weight_map().items():
        arrays = [ops.convert_to_numpy(variables.pop(path)) for path in paths]
        tensors[name] = np.ascontiguousarray(transform.to_tensor(arrays))
    if variables:
        raise ValueError(f"The weight table of {type(model).__name__} lacks: {sorted(variables)}")
    eos_id = None if tokenizer is None else tokenizer.eos_id
    config = {
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        **model.huggingface_config(),
    }
    # The config goes first and comes last: a folder with a config is a whole checkpoint, and of one
    # save, also where there was another before.
    for name in (CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    with new_file(folder / WEIGHTS) as file:
        # transformers reads a file only if it says which framework it was made for.
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)
    if generation is not None:
        write_json(folder / GENERATION, generation)
    write_json(folder / CONFIG, config)
    return folder


def load_folder(
    folder: str | os.PathLike, dtype: str | None = None
) -> tuple[LanguageModel, Tokenizer | None, dict[str, Any]]:
    """Reads a model in Hugging Face's layout; the family is found from `config.json`.

    Args:
        folder: The folder.
        dtype: Keras dtype policy of the model. None: Keras's default.

    Returns:
        The model, its tokenizer or None, and the content of `generation_config.json` (empty if there
        is none).

    Raises:
        FileNotFoundError: If the folder, its config or its weights are missing.
        ValueError: If a file is damaged, the family is unknown, or weights are missing, left over or
            of another shape.
    """
    folder = pathlib.Path(folder)
    for file in (folder / CONFIG, folder / WEIGHTS):
        if not file.is_file():
            raise FileNotFoundError(f"A checkpoint folder holds {CONFIG} and {WEIGHTS}. No file: {file}")
    values = _read_json(folder / CONFIG)
    if (model_type := values.get("model_type")) not in MODELS:
        raise ValueError(f"`model_type` must be one of {sorted(MODELS)}. Received: {model_type!r}")
    family = MODELS[model_type]
    model = family(family.config_class.from_huggingface(values), dtype=dtype)
    _load_weights(model, folder / WEIGHTS)
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_folder(folder)
    generation = _read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    return model, tokenizer, generation


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} must be JSON. Received: {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} must hold a JSON object. Received: {type(values).__name__}")
    return values


def _load_weights(model: LanguageModel, path: pathlib.Path) -> None:
    """Fills a model from a safetensors file, tensor by tensor."""
    variables, wanted = model.variables_by_path(), model.weight_map()
    try:
        file = safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(f"Not a safetensors file, or a damaged one: {path} ({error})") from error
    with file:
        names = set(file.keys())
        missing, left_over = sorted(set(wanted) - names), sorted(names - set(wanted))
        if missing or left_over:
            raise ValueError(
                f"The tensors of {path} must be those of {type(model).__name__}. "
                f"Missing: {missing}. Left over: {left_over}"
            )
        for name, (paths, transform) in wanted.items():
            arrays = transform.to_variables(file.get_tensor(name))
            for variable_path, array in zip(paths, arrays, strict=True):
                variable = variables[variable_path]
                if tuple(variable.shape) != array.shape:
                    raise ValueError(
                        f"{name} must fill {variable_path} of shape {tuple(variable.shape)}. "
                        f"Received: {array.shape}"
                    )
                variable.assign(array)
