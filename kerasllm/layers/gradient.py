"""How a function is traced that is going to be differentiated: what it keeps for that, and what not."""

import contextlib
import contextvars

import keras

# What `traced_for_gradient` takes.
REMATS = (None, "cheap", "blocks")

_NOT_OPEN = "not open"
_REMAT = contextvars.ContextVar("remat", default=_NOT_OPEN)


@contextlib.contextmanager
def traced_for_gradient(remat: str | None = None):
    """While this is open, functions are traced whose gradient is taken.

    Args:
        remat: What is computed again for the gradient, instead of being kept (rematerialisation, Chen et
            al.: "Training Deep Nets with Sublinear Memory Cost", 2016). `"cheap"`: norms, activations and
            the weights of the attention, but no product with weights; `"blocks"`: all that is inside of
            a block; None: nothing.
    """
    token = _REMAT.set(remat)
    try:
        yield
    finally:
        _REMAT.reset(token)


def is_traced_for_gradient() -> bool:
    """Returns whether `traced_for_gradient` is open."""
    return _REMAT.get() != _NOT_OPEN


def forget_inside(function, *inputs):
    """Calls a function that is cheap to compute again, keeping only its inputs for the gradient.

    A product with weights may end it: the gradient does not need what comes out of that, so only what
    goes into it is computed again.

    Args:
        function: Gets the inputs. Tensors that it knows from elsewhere get no gradient; variables do.
        *inputs: Tensors.

    Returns:
        What the function returns.
    """
    return keras.remat(function)(*inputs) if _REMAT.get() == "cheap" else function(*inputs)


def forget_block(function, *inputs):
    """As `forget_inside`, for a whole block."""
    return keras.remat(function)(*inputs) if _REMAT.get() == "blocks" else function(*inputs)
