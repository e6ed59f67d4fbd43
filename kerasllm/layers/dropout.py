"""Dropout whose masks a training step may choose, so that they do not depend on how it is computed."""

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any

import keras

_CHOSEN_BY = contextvars.ContextVar("dropout_chosen_by", default=None)


@contextlib.contextmanager
def dropout_chosen_by(choose: Callable[["Dropout", Any], Any]):
    """While this is open, another function does what `Dropout` layers do in training.

    Args:
        choose: Gets the layer and its inputs, returns the outputs.
    """
    token = _CHOSEN_BY.set(choose)
    try:
        yield
    finally:
        _CHOSEN_BY.reset(token)


@keras.saving.register_keras_serializable(package="kerasllm")
class Dropout(keras.layers.Dropout):
    """Sets a fraction of the inputs to zero while training, and scales the others up.

    Srivastava et al.: "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (2014). The layer
    of Keras, from which this one derives, draws from a state of its own: the same masks on each replica,
    others when a block is computed a second time for its gradient, and others after a restart.
    `dropout_chosen_by` replaces the draw.

    Args:
        rate: Fraction that is set to zero.
        noise_shape: Shape of the masks, which then are always Keras's; None: that of the inputs.
        seed: Of Keras's draw.
    """

    def call(self, inputs, training=False):
        choose = _CHOSEN_BY.get()
        if choose is None or not training or self.rate in (0, 1) or self.noise_shape is not None:
            return super().call(inputs, training=training)
        return choose(self, inputs)
