"""Tokens of documents on disk, so that they are made once and read by need."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

Tokens = tuple[np.ndarray, np.ndarray]

_FILES = ("token_ids.npy", "lengths.npy")


def make_key(parts: Iterable[bytes]) -> str:
    """Returns a name for what tokens follow from; other parts, or others in number, have another name."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:40]


def cached_tokens(folder: str | os.PathLike, key: str, make_tokens: Callable[[], Tokens]) -> Tokens:
    """Reads tokens from a folder of the cache, or makes them and writes them there.

    A folder is written under another name and renamed when it is whole, so that one whose writer was
    killed is never read, and several processes may make the same tokens at once.

    Args:
        folder: the cache; made if it does not exist.
        key: the name of the tokens in it.
        make_tokens: makes the tokens if the cache does not have them.

    Returns:
        (token_ids int32 [tokens], lengths int64 [documents]), memory-mapped and read-only.

    Raises:
        ValueError: the files in the cache are damaged.
    """
    path = Path(folder) / key
    if not path.exists():
        _write(path, make_tokens())
    return _read(path)


def _write(path: Path, tokens: Tokens) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by process id: in containers all processes have the same few.
    temporary = path.parent / f".incomplete-{uuid.uuid4().hex[:12]}-{path.name}"
    temporary.mkdir()
    try:
        for name, array in zip(_FILES, tokens, strict=True):
            with open(temporary / name, "wb") as file:
                np.save(file, array)
                file.flush()
                # Else the new name could outlive a power cut and the data not.
                os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.exists():
                raise
            # Another process was faster, with the same tokens.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(path: Path) -> Tokens:
    try:
        token_ids, lengths = (np.load(path / name, mmap_mode="r") for name in _FILES)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            "tokens in the cache must be whole; delete the folder to make them anew. "
            f"Received: {path}: {error}"
        ) from error
    is_right = (
        token_ids.dtype == np.int32 and lengths.dtype == np.int64 and token_ids.ndim == lengths.ndim == 1
    )
    if not is_right or lengths.sum() != token_ids.size:
        raise ValueError(
            "tokens in the cache must be int32 [tokens] and int64 [documents] that add up to them; delete "
            f"the folder to make them anew. Received: {path}: {token_ids.dtype} {token_ids.shape}, "
            f"{lengths.dtype} {lengths.shape}"
        )
    return token_ids, lengths
