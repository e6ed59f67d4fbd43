"""Dropout masks that follow from the seed, the step and the number of the row, and from nothing else."""

import tensorflow as tf

from kerasllm.layers.dropout import dropout_chosen_by

_PHILOX = 1
_NUMBERS_PER_COUNT = 4


def dropout_by_row(seed, step, first_row, rows):
    """While this is open, every `kerasllm.layers.Dropout` gives each row of the batch a mask of its own.

    The masks are the same however a batch is divided among replicas and into microbatches, when a block is
    computed a second time for its gradient, and after a restart. The numbers are Philox's (Salmon et al.:
    "Parallel Random Numbers: As Easy as 1, 2, 3", 2011), whose n-th one is computed without those before:
    the key is made of the seed and the number of the layer, in the order in which a step comes to them;
    the count, of the step and the row. A layer that is called twice in a step has the same mask both times.

    Args:
        seed: Integer, from 0 to 2^32 - 1.
        step: Integer scalar: the update.
        first_row: Integer scalar: the number of the first row in the batch of all replicas.
        rows: Integer scalar: the number of rows here. Inputs may have any shape, rows first.

    Returns:
        A context manager.
    """
    numbers: dict[int, int] = {}
    step, first_row, rows = (tf.cast(value, tf.int64) for value in (step, first_row, rows))

    def drop(layer, inputs):
        number = numbers.setdefault(id(layer), len(numbers))
        size = tf.size(inputs, out_type=tf.int64)
        width = size // tf.maximum(rows, 1)
        counts = (width + _NUMBERS_PER_COUNT - 1) // _NUMBERS_PER_COUNT  # each row begins a new one
        bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=tf.stack([rows * counts * _NUMBERS_PER_COUNT]),
            key=tf.constant([seed << 32 | number], tf.uint64),
            counter=tf.cast(tf.stack([first_row * counts, step]), tf.uint64),
            alg=_PHILOX,
            dtype=tf.int32,
        )
        bits = tf.reshape(bits, [-1, counts * _NUMBERS_PER_COUNT])[:, :width]
        kept = tf.reshape(bits, tf.shape(inputs)) >= round(layer.rate * 2**32) - 2**31
        return inputs * tf.cast(1.0 / (1.0 - layer.rate), inputs.dtype) * tf.cast(kept, inputs.dtype)

    return dropout_chosen_by(drop)
