"""Building a Keras model without giving its weights values or memory."""

from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state

_PENDING = "uninitialized_variables"


def build_without_values(build: Callable[[], keras.Model]) -> keras.Model:
    """Calls `build` so that the variables it makes have a shape and a dtype, but no value yet.

    Keras would draw random numbers that a checkpoint replaces at once: time, and memory for both.
    Inside a `keras.StatelessScope` Keras puts that off until the scope ends, or for good if asked to; it
    keeps a list of such variables for the end of the next scope, from which they are taken out here.

    Args:
        build: Makes the model.

    Returns:
        The model. `set_value` gives its variables their values, `initialize_rest` the others.
    """
    earlier = global_state.get_global_attribute(_PENDING)
    global_state.set_global_attribute(_PENDING, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            return build()
    finally:
        global_state.set_global_attribute(_PENDING, earlier or [])


def set_value(variable: keras.Variable, value: np.ndarray) -> None:
    """Gives a variable of `build_without_values` its first value."""
    with tf.init_scope():
        variable._initialize(value)
    variable._initializer = None


def set_by_rows(variable: keras.Variable, pieces: Iterable[tuple[int, np.ndarray]]) -> None:
    """Fills a variable of `build_without_values` piece by piece, in place.

    Args:
        variable: The variable.
        pieces: First row and the rows from there on; together all rows.
    """
    variable._initializer = keras.initializers.Zeros()
    variable._deferred_initialize()
    for start, rows in pieces:
        variable.value.scatter_update(tf.IndexedSlices(rows, tf.range(start, start + len(rows))))
    # After such an update, TensorFlow would copy the whole variable whenever it is read.
    tf.raw_ops.DisableCopyOnRead(resource=variable.value.handle)


def initialize_rest(model: keras.Model) -> None:
    """Initialises, as Keras would have, the variables that have no value: states of dropout, say."""
    for variable in model.variables:
        if variable._value is None:
            variable._deferred_initialize()
