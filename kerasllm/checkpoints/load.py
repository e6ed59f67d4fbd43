"""One entry to every kind of checkpoint."""

import os
import pathlib
from collections.abc import Sequence

from kerasllm.checkpoints.folder import Checkpoint, load_folder, pickle_message, save_folder
from kerasllm.checkpoints.gguf_model import load_gguf
from kerasllm.checkpoints.hub import download
from kerasllm.checkpoints.kerashub import is_kerashub_preset, load_kerashub

_PICKLE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def find_checkpoint(source: str | os.PathLike, revision: str | None = None) -> pathlib.Path:
    """Returns where a checkpoint lies, fetched from a hub if it is not here.

    Args:
        source, revision: As in `load_checkpoint`.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If a revision is given of what is here.
    """
    path = pathlib.Path(source)
    if not path.exists():
        return download(str(source), revision)
    if revision is not None:
        raise ValueError(f"`revision` is for the hub; {path} is here. Received: revision={revision!r}")
    return path


def load_checkpoint(
    source: str | os.PathLike,
    head: str | None = "default",
    dtype: str | None = None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
) -> Checkpoint:
    """Loads a model from a folder, a GGUF file, a hub or a KerasHub preset.

    Nothing that comes with a checkpoint is executed: no pickle, no Python file, no `auto_map`.

    Args:
        source: A folder in Hugging Face's layout or of a KerasHub preset, a `.gguf` file, or what
            `checkpoints.hub.download` fetches, such as `"HuggingFaceTB/SmolLM2-135M-Instruct"`.
        head: One of the family's `heads`. `"default"`: the one that the checkpoint names.
        dtype: Keras dtype policy of the model, such as `"bfloat16"`. None: Keras's default.
        revision: Branch, tag or commit on the hub. None: its main branch.
        labels: Names of a classifier's classes, instead of those that the checkpoint names. None: those.

    Returns:
        The model with its tokenizer and generation settings.

    Raises:
        FileNotFoundError: If there is no such checkpoint, or a file of it is missing.
        ValueError: If a file is damaged, the family is unknown, or weights are missing, left over, pickled
            or of another shape.
    """
    path = find_checkpoint(source, revision)
    if path.is_file():
        if path.suffix in _PICKLE:
            raise ValueError(pickle_message([path.name]))
        if path.suffix != ".gguf":
            raise ValueError(f"A checkpoint must be a folder or a .gguf file. Received: {path}")
        return load_gguf(path, head, dtype, labels)
    if is_kerashub_preset(path):
        return load_kerashub(path, head, dtype, labels)
    return load_folder(path, head, dtype, labels)


def convert(source: str | os.PathLike, folder: str | os.PathLike, dtype: str | None = None) -> pathlib.Path:
    """Loads a checkpoint of any kind and writes it in Hugging Face's layout.

    Args:
        source: As in `load_checkpoint`.
        folder: Where to write, see `save_folder`.
        dtype: What the weights are stored in, such as `"bfloat16"`. None: Keras's default.

    Returns:
        The folder.

    Raises:
        FileNotFoundError, ValueError: As in `load_checkpoint`.
    """
    path = find_checkpoint(source)
    if (path / "modules.json").is_file():
        raise ValueError(
            "A model of sentence-transformers is more than its checkpoint: convert it with "
            f"TextEmbedder.from_pretrained(…).save_pretrained(…). Received: {source}"
        )
    checkpoint = load_checkpoint(path, dtype=dtype)
    return save_folder(folder, checkpoint.model, checkpoint.tokenizer, checkpoint.generation or None)
