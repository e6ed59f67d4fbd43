"""Ragged tensors as flat arrays: what the in-graph tokenizers count, cut and put together with.

The functions stand in for tf.repeat and RaggedTensor.value_rowids, which build a mask of the size
rows * longest row.
"""

import tensorflow as tf


def cumulative(lengths: tf.Tensor) -> tf.Tensor:
    """`[n]` lengths or flags -> `[n + 1]` int64 sums of those before."""
    return tf.concat([tf.zeros([1], tf.int64), tf.cumsum(tf.cast(lengths, tf.int64))], 0)


def rows_of_splits(splits: tf.Tensor, value_count: tf.Tensor) -> tf.Tensor:
    """`[rows + 1]` splits -> `[values]` int64, the row of each value."""
    return tf.searchsorted(splits, tf.range(value_count), side="right", out_type=tf.int64) - 1


def row_ids(ragged: tf.RaggedTensor) -> tf.Tensor:
    return rows_of_splits(ragged.row_splits, tf.size(ragged.values, out_type=tf.int64))


def slices(values: tf.Tensor, starts: tf.Tensor, ends: tf.Tensor) -> tf.RaggedTensor:
    """`[slices, None]`, the values from each start up to each end; slices may overlap."""
    splits = cumulative(ends - starts)
    row = rows_of_splits(splits, splits[-1])
    positions = tf.range(splits[-1]) + tf.gather(starts - splits[:-1], row)
    return tf.RaggedTensor.from_row_splits(tf.gather(values, positions), splits, validate=False)


def count(rows: tf.Tensor, row_count: tf.Tensor) -> tf.Tensor:
    """How often each of the numbers below `row_count` is in `rows`."""
    return tf.math.unsorted_segment_sum(tf.ones_like(rows, tf.int64), rows, row_count)


def one_each(values: tf.Tensor) -> tf.RaggedTensor:
    """`[n]` values -> `[n, 1]` ragged."""
    splits = tf.range(tf.size(values, out_type=tf.int64) + 1)
    return tf.RaggedTensor.from_row_splits(values, splits, validate=False)


def interleave(
    first_rows: tf.Tensor, first: tf.RaggedTensor, second_rows: tf.Tensor, second: tf.RaggedTensor
) -> tf.RaggedTensor:
    """One ragged tensor: its rows `first_rows` are those of `first`, the others of `second`."""
    second_splits = second.row_splits[1:] + first.row_splits[-1]
    both = tf.RaggedTensor.from_row_splits(
        tf.concat([first.values, second.values], 0),
        tf.concat([first.row_splits, second_splits], 0),
        validate=False,
    )
    return tf.gather(both, tf.math.invert_permutation(tf.concat([first_rows, second_rows], 0)))


def empty_like(values: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """`[0]`, to begin a loop with that makes it grow.

    With a constant, TensorFlow's graph optimizer may take the size after the loop for 0.
    """
    return tf.cast(tf.gather(values, tf.where(values != values)[:, 0]), dtype)
