"""A training of a few steps, for tests of what is seen of one."""

import math

import keras
import numpy as np
import tensorflow as tf

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.training import AdamW, cosine_schedule

CONFIG = GPT2Config(vocabulary_size=20, context_length=8, num_layers=1, num_heads=2, dim=8, dropout=0.0)


def make_model(**kwargs):
    keras.utils.set_random_seed(0)
    model = CausalLM(GPT2(CONFIG))
    model.compile(AdamW(cosine_schedule(1e-2, 20, 2), **kwargs), run_eagerly=True)
    return model


def make_batches(spoilt=()):
    """Endless batches of 2 rows; those of the numbers `spoilt` have a loss that is no number."""
    ids = np.random.default_rng(0).integers(0, 20, (2 * 40, 9)).astype("int32")
    weights = np.ones((2 * 40, 8), "float32")
    for number in spoilt:
        weights[2 * number] = math.nan
    return tf.data.Dataset.from_tensor_slices((ids[:, :-1], ids[:, 1:], weights)).batch(2)


class Stop(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == self.step:
            raise KeyboardInterrupt
