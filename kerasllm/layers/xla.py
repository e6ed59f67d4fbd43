"""Whether a function is being traced for XLA, where other forms of the same maths are the quick ones."""

import contextlib
import contextvars

_TRACED_FOR_XLA = contextvars.ContextVar("traced_for_xla", default=False)


@contextlib.contextmanager
def traced_for_xla():
    """While this is open, functions are traced that XLA is going to compile."""
    token = _TRACED_FOR_XLA.set(True)
    try:
        yield
    finally:
        _TRACED_FOR_XLA.reset(token)


def is_traced_for_xla() -> bool:
    """Returns whether `traced_for_xla` is open."""
    return _TRACED_FOR_XLA.get()
