"""How a table of token vectors is used where a graph is traced for a runtime that has ways of its own."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class TableFunctions(NamedTuple):
    """What stands for the operations of `TokenEmbedding`.

    Args:
        look_up: From the table `[rows, width]` and ids `[...]` to vectors `[..., width]`.
        score: From vectors `[count, width]` and the table to logits `[count, rows]`.
    """

    look_up: Callable[[Any, Any], Any]
    score: Callable[[Any, Any], Any]


_FUNCTIONS = contextvars.ContextVar("table_functions", default=None)


@contextlib.contextmanager
def tables_used_with(functions: TableFunctions) -> Iterator[None]:
    """While this is open, token embeddings use their tables with other functions."""
    token = _FUNCTIONS.set(functions)
    try:
        yield
    finally:
        _FUNCTIONS.reset(token)


def table_functions() -> TableFunctions | None:
    """Returns the functions of the `tables_used_with` that is open, or None."""
    return _FUNCTIONS.get()
