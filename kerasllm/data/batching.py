"""Rows → batches: one order, shuffling, sharding and repetition for every dataset of this package.

A dataset here is a number of rows and a function that makes row k in the graph. What is random in a row
follows from the seed, the pass and the row's number alone, so that neither the batch size nor the number
of shards changes a row, and `dataset.skip(n)` goes on where n batches ended.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def batch_rows(
    row_count: int,
    make_row: Callable[[tf.Tensor, tf.Tensor], Any],
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    shard: tuple[int, int],
    repeat: bool,
    drop_remainder: bool,
    new_draws: bool = True,
    passes: int | None = None,
) -> tf.data.Dataset:
    """Makes batches of rows of one shape.

    Args:
        row_count: number of rows of all shards together.
        make_row: (row number int64, seed int64 [2]) → a structure of tensors. The seed is another one
            for each row and pass, for stateless random ops.
        batch_size: rows per batch.
        shuffle: whether rows come in random order, a new one in each pass.
        seed: chooses the orders and what is random in rows.
        shard: (index, count) of the part to return; rows are dealt out in turn.
        repeat: whether to go on without end. Batches then run over the end of a pass.
        drop_remainder: whether to leave out the last batch of a pass if it is short.
        new_draws: whether the seeds of rows are new ones in each pass.
        passes: as in `for_each_pass`; each has a short last batch of its own.

    Returns:
        A dataset of batches. The batch size is static with `repeat` or `drop_remainder`.

    Raises:
        ValueError: `batch_size` or `shard` is out of range, or there are too few rows: none for the
            shard, or no full batch with `drop_remainder`.
    """
    check_batching(batch_size, shard)
    shard_index, shard_count = shard
    shard_size = len(range(shard_index, row_count, shard_count))
    if shard_size == 0:
        raise ValueError(
            f"every shard must get a row. Received: {row_count} rows, shard={(shard_index, shard_count)}"
        )
    if drop_remainder and not repeat and shard_size < batch_size:
        raise ValueError(
            "there must be a full batch with `drop_remainder`. "
            f"Received: {shard_size} rows, batch_size={batch_size}"
        )

    @tf.autograph.experimental.do_not_convert
    def rows_of_pass(pass_number: tf.Tensor) -> tf.data.Dataset:
        order_seed, row_seed = pass_seeds(seed, pass_number)
        if not new_draws:
            row_seed = pass_seeds(seed, tf.constant(0, tf.int64))[1]
        order = tf.range(row_count, dtype=tf.int64)
        if shuffle:
            order = shuffle_values(order, order_seed)
        rows = order[shard_index::shard_count]
        # Philox scrambles its seed, so that the number of a row does for the second half.
        seeds = tf.stack([tf.fill(tf.shape(rows), row_seed[0]), rows], axis=1)
        return tf.data.Dataset.from_tensor_slices((rows, seeds))

    make_row = tf.autograph.experimental.do_not_convert(make_row)

    def batch(rows: tf.data.Dataset) -> tf.data.Dataset:
        rows = rows.map(make_row, num_parallel_calls=tf.data.AUTOTUNE)
        return rows.batch(batch_size, drop_remainder=repeat or drop_remainder)

    if repeat:
        dataset = batch(for_each_pass(rows_of_pass, seed, repeat))
    else:

        @tf.autograph.experimental.do_not_convert
        def batches_of_pass(pass_number: tf.Tensor) -> tf.data.Dataset:
            return batch(rows_of_pass(pass_number))

        dataset = for_each_pass(batches_of_pass, seed, repeat, passes)
    batch_count = shard_size // batch_size if drop_remainder else -(-shard_size // batch_size)
    return finish_dataset(dataset, batch_count, shard, repeat, passes)


def for_each_pass(
    make_pass: Callable[[tf.Tensor], tf.data.Dataset], seed: int, repeat: bool, passes: int | None = None
) -> tf.data.Dataset:
    """Puts passes one behind the other.

    Args:
        make_pass: the number of a pass, an int64 → its dataset.
        seed: what the numbers follow from without `repeat`.
        repeat: whether to go on without end, with the numbers 0, 1, 2.
        passes: how many passes there are otherwise, with the same numbers. None: one, of another random
            number each time the dataset is iterated.

    Returns:
        What the datasets of all passes hold.

    Raises:
        ValueError: `passes` is out of range, or given with `repeat`.
    """
    if passes is not None and (repeat or passes < 1):
        raise ValueError(
            f"`passes` must be None or at least 1, without `repeat`. Received: {passes=}, {repeat=}"
        )
    if repeat:
        numbers = tf.data.Dataset.counter()
    elif passes is not None:
        numbers = tf.data.Dataset.range(passes)
    else:
        numbers = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True).take(1)
    return numbers.flat_map(make_pass)


def finish_dataset(
    dataset: tf.data.Dataset, batch_count: int, shard: tuple[int, int], repeat: bool, passes: int | None
) -> tf.data.Dataset:
    """Tells a dataset how many batches it has and that it is a shard already, and reads ahead.

    Args:
        dataset: the batches of all passes.
        batch_count: how many a pass has.
        shard: (index, count) of the part that it is.
        repeat: as in `for_each_pass`.
        passes: as in `for_each_pass`.
    """
    count = tf.data.INFINITE_CARDINALITY if repeat else batch_count * (passes or 1)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(count))
    if shard[1] > 1:
        # A strategy must not shard again what is a shard already.
        options = tf.data.Options()
        options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
        dataset = dataset.with_options(options)
    return dataset.prefetch(tf.data.AUTOTUNE)


def pass_seeds(seed: int, pass_number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Two seeds, int64 [2] each, of one pass."""
    pass_seed = tf.stack([tf.constant(seed, tf.int64), pass_number])
    first, second = tf.unstack(tf.random.split(pass_seed, alg="philox"))
    return first, second


def shuffle_values(values: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Returns the values in an order that follows from the seed, an int64 [2]."""
    # Philox by name: "auto_select" may draw other numbers on another kind of machine.
    keys = tf.random.stateless_uniform(
        tf.shape(values), seed, minval=None, maxval=None, dtype=tf.int64, alg="philox"
    )
    return tf.gather(values, tf.argsort(keys, stable=True))


def pad_row(values: tf.Tensor, length: int, value: int = 0) -> tf.Tensor:
    """Fills a row up on the right.

    Args:
        values: [at most `length`].
        length: the length to reach.
        value: what to fill up with.

    Returns:
        [length], a static shape.
    """
    padded = tf.pad(values, [[0, length - tf.size(values)]], constant_values=value)
    return tf.ensure_shape(padded, [length])


def check_sequence_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise ValueError(
            f"`sequence_length` must be at least 1. Received: sequence_length={sequence_length}"
        )


def check_batching(batch_size: int, shard: tuple[int, int]) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}")
    shard_index, shard_count = shard
    if not 0 <= shard_index < shard_count:
        raise ValueError(
            f"`shard` must be (index, count) with 0 <= index < count. Received: shard={tuple(shard)}"
        )
