"""Writing files and folders that are there whole or not at all."""

import contextlib
import ctypes
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any


def temporary_name(path: pathlib.Path) -> str:
    """A name for what is not whole yet, to be put beside `path`; servers look at no such name."""
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
    temporary = path.parent / temporary_name(path)
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
    temporary = path.parent / temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def replaced_folder(path: str | os.PathLike, is_replaced: Callable[[str], bool]) -> Iterator[pathlib.Path]:
    """Fills a folder beside its final place, which then takes the place of what was there before.

    Whoever looks at `path` sees the old folder or the new one, never a mixture; if anything fails, the
    old one stays as it was. Where the system cannot swap two folders in one step, there is a moment
    without either, and the old one is beside under a name that starts with a dot.

    Args:
        path: The folder to make or replace; its parents are made too.
        is_replaced: From the name of a file or folder that is there now to whether it goes; the others
            are in the new folder too.

    Yields:
        The temporary folder to write into.

    Raises:
        ValueError: If `path` is a file, a mount point, or the current working directory or one of its
            parents: none of them can be swapped for a folder.
    """
    # Of a link, the folder that it leads to is replaced and the link stays.
    path = pathlib.Path(path).resolve()
    check_can_be_swapped(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            for entry in path.iterdir():
                target = temporary / entry.name
                if entry.is_dir() and not is_replaced(entry.name):
                    shutil.copytree(entry, target, symlinks=True, dirs_exist_ok=True)
                elif not is_replaced(entry.name) and not target.exists():
                    shutil.copy2(entry, target, follow_symlinks=False)
            _swap(temporary, path)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_folder(new: str | os.PathLike, path: str | os.PathLike, overwrite: bool = False) -> None:
    """Gives a whole folder its final name, in one step as far as the file system can.

    Args:
        new: The folder, on the same disk.
        path: Its final place.
        overwrite: Whether a folder that is there is replaced; it is deleted then.

    Raises:
        FileExistsError: If `path` exists and must not be replaced.
        ValueError: As in `replaced_folder`.
    """
    path = pathlib.Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(new, path)
        return
    if not overwrite:
        raise FileExistsError(f"The folder exists. Received: {path}")
    path = path.resolve()
    check_can_be_swapped(path)
    _swap(pathlib.Path(new), path)
    shutil.rmtree(new, ignore_errors=True)


def check_can_be_swapped(path: pathlib.Path) -> None:
    """Raises a ValueError if no folder can take the place of what is there.

    To be called before the first byte is written, not after the last.

    Args:
        path: The folder to make or replace, resolved.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"What is written must be a folder, and no file be there. Received: {path}")
    try:
        here = pathlib.Path.cwd()
    except FileNotFoundError:  # It was deleted, which hinders nobody.
        here = None
    # Whoever works in it would go on in the folder that is then deleted.
    if here is not None and here.is_relative_to(path):
        raise ValueError(
            "A folder that is replaced whole must not be the current working directory or a parent of it; "
            f"choose a folder inside. Received: {path}"
        )
    if _is_mount_point(path):
        raise ValueError(
            "A folder that is replaced whole must not be a mount point; choose a folder inside. "
            f"Received: {path}"
        )


def _is_mount_point(path: pathlib.Path) -> bool:
    if os.path.ismount(path):
        return True
    # Linux shows only here that a folder of the same disk is mounted.
    mounts = pathlib.Path("/proc/self/mountinfo")
    lines = mounts.read_text(errors="surrogateescape").splitlines() if mounts.is_file() else []
    return str(path) in (line.split(" ")[4].replace("\\040", " ") for line in lines)


def _swap(new: pathlib.Path, old: pathlib.Path) -> None:
    """Gives each of two folders the other's name."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
        if renameat2(here, os.fsencode(new), here, os.fsencode(old), exchange) == 0:
            return
    # Another system, or a file system that cannot do it in one step.
    aside = old.parent / temporary_name(old)
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
