"""Fetching checkpoints from the Hugging Face hub and from Kaggle."""

import pathlib
import re

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from kerasllm.checkpoints.folder import pickle_message

# What a checkpoint consists of. Neither Python code nor pickled weights are ever fetched.
_WANTED = (
    "config.json generation_config.json model*.safetensors model.safetensors.index.json tokenizer*.json "
    "special_tokens_map.json added_tokens.json vocab.json vocab.txt merges.txt tokenizer.model "
    "spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json modules.json "
    "sentence_bert_config.json config_sentence_transformers.json *_Pooling/config.json "
    "model.weights.h5 metadata.json assets/tokenizer/*"
).split()
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def download(name: str, revision: str | None = None) -> pathlib.Path:
    """Fetches a checkpoint, or finds it in the cache of an earlier time.

    Args:
        name: `"owner/name"` on the Hugging Face hub, `"owner/name/file.gguf"` for one file of it, or
            `"kaggle://owner/model/framework/variation"`.
        revision: Branch, tag or commit on the hub. None: its main branch.

    Returns:
        The folder, or the GGUF file.

    Raises:
        FileNotFoundError: If the name is neither a path nor an id of the hub, the hub does not have it, or
            it cannot be reached and the cache does not have it.
        ValueError: If the repository has only pickled weights.
    """
    if name.startswith("kaggle://"):
        return _download_from_kaggle(name.removeprefix("kaggle://"))
    repository, file = _parse(name.removeprefix("hf://"))
    try:
        if file:
            return pathlib.Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        folder = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_WANTED)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{name!r} is no file or folder here, and the hub could not give it"
            f"{'' if revision is None else f' in revision {revision!r}'}: {error}"
        ) from error
    folder = pathlib.Path(folder)
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.h5")):
        raise ValueError(f"{name!r} has no safetensors on the hub. {pickle_message(['its other files'])}")
    return folder


def _parse(name: str) -> tuple[str, str]:
    """A name into repository and file (empty: the whole repository)."""
    owner, _, rest = name.partition("/")
    model, _, file = rest.partition("/")
    repository = f"{owner}/{model}"
    is_file = file.endswith(".gguf") and ".." not in file.split("/")
    if not _REPOSITORY.fullmatch(repository) or ".." in repository or (file and not is_file):
        raise FileNotFoundError(
            "A checkpoint must be a folder, a .gguf file, or an id of the hub such as 'owner/name' or "
            f"'owner/name/file.gguf'. There is none at: {name!r}"
        )
    return repository, file


def _download_from_kaggle(handle: str) -> pathlib.Path:
    try:
        import kagglehub
    except ImportError as error:
        raise ImportError("Presets from Kaggle need: pip install 'kerasllm[kerashub]'") from error
    return pathlib.Path(kagglehub.model_download(handle))
