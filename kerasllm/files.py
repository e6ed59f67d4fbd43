"""Writing files and folders that are there whole or not at all."""

import contextlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Any


def _temporary_name(path: pathlib.Path) -> str:
    # Not by process id: in containers all processes have the same few.
    return f".incomplete-{uuid.uuid4().hex[:12]}-{path.name}"


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Fills a file beside its final place and renames it there when all is written.

    A file that was there before is replaced at that moment; if anything fails, it stays as it was.

    Args:
        path: The file to make; its parents are made too.

    Yields:
        The temporary file's path, in the same folder, with the same ending.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / _temporary_name(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Fills a folder beside its final place and renames it there when all is written.

    A server that looks for numbered folders never sees a half-written one: until the end the folder's
    name starts with a dot. If anything fails, nothing is left.

    Args:
        path: The folder to make; its parents are made too.

    Yields:
        The temporary folder to write into.

    Raises:
        FileExistsError: If `path` exists.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise FileExistsError(f"An export never overwrites; choose a new folder. Received: {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
