"""Reading the tensors of a checkpoint one at a time, whatever the file's format."""

import abc
import json
from collections.abc import Iterator
from typing import Any

import numpy as np


class TensorSource(abc.ABC):
    """Tensors by name, read from files one at a time.

    A source is a context manager that closes its files. The names, shapes and places in the file are
    checked when it is opened, so that nothing is read or allocated for a damaged file.

    Attributes:
        description: What error messages call the source, such as its path.
        shapes: The shape of each tensor by its name, in the order of the file.
    """

    description: str
    shapes: dict[str, tuple[int, ...]]

    @abc.abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads a tensor, or some of its rows.

        Args:
            name: One of `shapes`.
            start: The first row (place in the first axis).
            stop: The row to stop before; None: after the last.

        Returns:
            An array of its own; changing it changes no file.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Closes the files."""

    def __enter__(self) -> "TensorSource":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def row_ranges(shape: tuple[int, ...], max_elements: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Cuts a tensor into runs of rows that hold at most so many numbers, but at least one row.

    Args:
        shape: The tensor's shape, of rank 1 at least.
        max_elements: Most numbers in a run.

    Yields:
        First row and the row to stop before.
    """
    row_size = int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, max_elements // max(1, row_size))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def parse_json_object(text: str | bytes, description: str) -> dict[str, Any]:
    """Parses a JSON object, in which no name may come twice.

    Args:
        text: The JSON.
        description: What error messages call it.

    Returns:
        The object.

    Raises:
        ValueError: If it is no JSON object or a name comes twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = {}
        for name, value in pairs:
            if name in values:
                raise ValueError(f"a name must come once. Received twice: {name!r}")
            values[name] = value
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"It must be JSON. Received: {description}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"It must be a JSON object. Received: {description}: {type(values).__name__}")
    return values
