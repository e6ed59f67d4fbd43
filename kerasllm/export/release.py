"""An export that is tested before a server can see it."""

import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from kerasllm.export.extra import name_source
from kerasllm.export.verify import Task, VerificationError, format_checks, verify_export
from kerasllm.files import check_can_be_swapped, put_folder, temporary_name

# Graph, tokenizer and the files beside them; generous, for they are a few MB.
_BESIDE_WEIGHTS = 64 * 2**20


def release(
    task: Task,
    path: str | os.PathLike,
    *,
    overwrite: bool = False,
    verify: bool = False,
    dtype: str | None = None,
    source: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = print,
    **kwargs: Any,
) -> pathlib.Path:
    """Exports a model as a SavedModel and puts it where servers look when all is well.

    Args:
        task: The model, such as a `CausalLM`.
        path: The folder to make, such as `served/my_model/1`.
        overwrite: Whether a folder that is there may be replaced. Servers see the old one until the new
            one is whole.
        verify: Whether to compare the folder with the live model first, see `verify_export`.
        dtype: Precision of the weights, as in the task's `with_dtype`. None: that of the model.
        source: Where the weights are from, see `describe_source`.
        report: Gets the table of the comparisons.
        **kwargs: As in the task's `export`.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder exists and must not be replaced.
        OSError: If there is not enough room.
        ValueError: As the task's `export`, or if a file, a mount point or the working directory is there.
        VerificationError: If the folder does not answer as the live model does. It stays under its
            temporary name, which the message has.
    """
    path = pathlib.Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"A folder is replaced only with `overwrite`. Received: {path}")
    check_can_be_swapped(path.resolve())
    if dtype is not None:
        task = task.with_dtype(dtype)
    check_room(task, path)
    stage = path.resolve().parent / temporary_name(path)
    try:
        task.export(stage, **kwargs)
        if source:
            name_source(stage, source)
        if verify:
            checks = verify_export(stage, task)
            report(format_checks(checks))
            if any(check.problem for check in checks):
                raise VerificationError(
                    f"The exported folder differs from the live model; it stays here: {stage}"
                )
        put_folder(stage, path, overwrite)
    except VerificationError:
        raise
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    return path


def check_room(task: Task, path: str | os.PathLike) -> None:
    """Raises an OSError if the disk has no room for the export.

    Args:
        task: The model.
        path: The folder to make.
    """
    weights = sum(
        variable.value.dtype.size * variable.value.shape.num_elements() for variable in task.model.variables
    )
    needed = weights + _BESIDE_WEIGHTS
    parent = next(folder for folder in pathlib.Path(path).resolve().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"The export needs {needed / 2**20:.0f} MiB and there are {free / 2**20:.0f} MiB free",
            str(parent),
        )
