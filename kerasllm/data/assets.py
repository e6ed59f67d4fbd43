"""Where the real models and corpora lie that tools/fetch_assets brings."""

import os
from pathlib import Path

# {name: path below the cache}; a file where the asset is one file (beside its licence), else the
# folder of the asset. tools/fetch_assets has the same names; a test compares the two.
ASSETS = {
    "moby": "moby/moby.txt",
    "sotu": "sotu/sotu.txt",
    "spam": "spam/spam.jsonl",
    "gpt2-vocab": "gpt2-vocab",
    "smollm2": "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "minilm": "minilm",
    "botchan": "botchan/botchan.txt",
    "schemas": "schemas",
    "kserve": "kserve/fields.json",
    "openai-api": "openai-api/openapi.yml",
}


def cache_folder() -> Path:
    """Returns the folder of fetched assets: `$KERASLLM_CACHE`, or `~/.cache/kerasllm`."""
    return Path(os.environ.get("KERASLLM_CACHE") or "~/.cache/kerasllm").expanduser()


def asset_path(name: str) -> Path:
    """Returns where a fetched asset lies: a file, or the folder of an asset of several files.

    Args:
        name: one of `ASSETS`.

    Returns:
        A path that exists.

    Raises:
        ValueError: the name is unknown.
        FileNotFoundError: the asset has not been fetched yet; the message says how to.
    """
    if name not in ASSETS:
        raise ValueError(f"`name` must be one of {sorted(ASSETS)}. Received: name={name!r}")
    path = cache_folder() / ASSETS[name]
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run tools/fetch_assets {name}")
    return path
