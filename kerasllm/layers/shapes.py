"""Batch and length as one axis, for a product over two axes costs less than one over three."""

from keras import ops


def flatten(x):
    """`[batch, ..., width]` to `[batch * ..., width]`."""
    return ops.reshape(x, (-1, x.shape[-1]))


def unflatten(flat, like):
    """`[batch * ..., width]` to `[batch, ..., width]`, with the axes in between as `like` has them."""
    return ops.reshape(flat, (-1, *ops.shape(like)[1:-1], flat.shape[-1]))
