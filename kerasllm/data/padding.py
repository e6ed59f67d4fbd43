"""Rows of different lengths → padded batches, of similar lengths if so asked."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kerasllm.data.batching import check_batching, finish_dataset, for_each_pass, pass_seeds, shuffle_values


def padded_batches(
    rows: Sequence[Mapping[str, Sequence[int]]],
    labels: Any = None,
    batch_size: int = 32,
    *,
    pad_values: Mapping[str, int] | None = None,
    buckets: Sequence[int] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    repeat: bool = False,
    passes: int | None = None,
    drop_remainder: bool = False,
) -> tf.data.Dataset:
    """Makes padded batches of encoded texts, such as those of a classifier.

    Without buckets a batch is as long as its longest row. With them the rows are put into the order of
    their buckets, cut into batches, and each batch is as long as the smallest bucket that all of its rows
    fit into: little is padding, and XLA compiles for no more lengths than there are buckets. Batches then
    come by length, or in random order with `shuffle`.

    Args:
        rows: the texts, each a mapping of a name to integers [length]; all have the same names, and all
            integers of a row the same length, such as `{"token_ids": [5, 8], "attention_mask": [1, 1]}`.
        labels: integers or floats [rows, ...]; None for none.
        batch_size: rows per batch.
        pad_values: name → what to fill up with on the right, 0 for names that are left out.
        buckets: lengths that batches are padded to, in ascending order.
        shuffle: whether rows, and with buckets the batches, come in random order, a new one in each pass:
            in each round of `repeat`, and otherwise each time the dataset is iterated.
        seed: chooses the random orders; with `repeat` or `passes` they follow from it alone, otherwise
            also from `tf.random.set_seed`.
        shard: (index, count) of the part to return; whole batches are dealt out in turn.
        repeat: whether to go on without end. One batch of each pass may be short.
        passes: how many passes, the n-th in an order that follows from `seed` and n; None: one, in another
            order each time the dataset is iterated.
        drop_remainder: whether to leave out the short batch of a pass. With buckets its rows are of the
            longest bucket; `shuffle` leaves out others each time.

    Returns:
        A dataset of (inputs, labels), or of inputs without labels: inputs are a dictionary of int32
        [batch, length] with the names of the rows, labels int32 or float32 [batch, ...]. The batch size
        is static with `drop_remainder`, the length where one bucket holds all rows.

    Raises:
        ValueError: an argument is out of range; the rows differ in names, or a row in lengths; a row is
            empty or longer than the last bucket; or there are too few rows: no batch for the shard.
    """
    check_batching(batch_size, shard)
    columns, lengths = _read_rows(rows)
    labels = None if labels is None else _read_labels(labels, len(lengths))
    pad_values = {name: 0 for name in columns} | dict(pad_values or {})
    if pad_values.keys() != columns.keys():
        raise ValueError(
            f"`pad_values` must be of the names of rows, {sorted(columns)}. "
            f"Received: {sorted(pad_values.keys() - columns.keys())}"
        )
    bucket_of_row = _choose_buckets(lengths, buckets)
    batch_count = len(lengths) // batch_size if drop_remainder else -(-len(lengths) // batch_size)
    shard_index, shard_count = shard
    shard_size = len(range(shard_index, batch_count, shard_count))
    if shard_size == 0:
        raise ValueError(
            f"every shard must get a batch. Received: {len(lengths)} rows, batch_size={batch_size}, "
            f"shard={(shard_index, shard_count)}, drop_remainder={drop_remainder}"
        )
    widths = None
    if buckets is not None:
        # The last row of each batch is of its largest bucket; which rows come there changes, that not.
        ends = np.minimum(np.arange(1, batch_count + 1) * batch_size, len(lengths))
        widths = np.array(buckets, np.int64)[np.sort(bucket_of_row)[ends - 1]]
    static_width = int(widths[0]) if widths is not None and len(set(widths.tolist())) == 1 else None
    static_shape = [batch_size if drop_remainder else None, static_width]

    with tf.device("CPU:0"):  # tf.data runs there; tensors that it captures should lie there.
        columns = {
            name: tf.RaggedTensor.from_row_lengths(tf.constant(values), lengths)
            for name, values in columns.items()
        }
        lengths, bucket_of_row = tf.constant(lengths), tf.constant(bucket_of_row)
        labels = None if labels is None else tf.constant(labels)
        widths = None if widths is None else tf.constant(widths)

    @tf.autograph.experimental.do_not_convert
    def batches_of_pass(pass_number: tf.Tensor) -> tf.data.Dataset:
        row_seed, batch_seed = pass_seeds(seed, pass_number)
        order = tf.range(tf.size(lengths))
        numbers = tf.range(batch_count)
        if shuffle:
            order = shuffle_values(order, row_seed)
            numbers = shuffle_values(numbers, batch_seed)
        order = tf.gather(order, tf.argsort(tf.gather(bucket_of_row, order), stable=True))

        @tf.autograph.experimental.do_not_convert
        def make_batch(number: tf.Tensor) -> Any:
            rows = order[number * batch_size : (number + 1) * batch_size]
            width = tf.reduce_max(tf.gather(lengths, rows)) if widths is None else widths[number]
            shape = tf.stack([-1, width])
            inputs = {
                name: tf.ensure_shape(
                    tf.gather(column, rows).to_tensor(pad_values[name], shape=shape), static_shape
                )
                for name, column in columns.items()
            }
            if labels is None:
                return inputs
            batch_labels = tf.gather(labels, rows)
            return inputs, tf.ensure_shape(batch_labels, [static_shape[0], *labels.shape[1:]])

        shard_numbers = tf.data.Dataset.from_tensor_slices(numbers[shard_index::shard_count])
        return shard_numbers.map(make_batch, num_parallel_calls=tf.data.AUTOTUNE)

    dataset = for_each_pass(batches_of_pass, seed, repeat, passes)
    return finish_dataset(dataset, shard_size, shard, repeat, passes)


def _read_rows(rows: Sequence[Mapping[str, Sequence[int]]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Each name's integers end to end, and the lengths of rows, int64 [rows]."""
    if not len(rows):
        raise ValueError("`rows` must hold at least one row. Received: none")
    names = list(rows[0])
    if not names:
        raise ValueError("a row must map names to integers. Received: row 0, an empty mapping")
    lengths = []
    parts = {name: [] for name in names}
    for number, row in enumerate(rows):
        if set(row) != set(names):
            raise ValueError(
                f"all rows must have the names of the first one, {names}. "
                f"Received: row {number} with {list(row)}"
            )
        values = {name: np.asarray(row[name]) for name in names}
        shapes = {name: array.shape for name, array in values.items()}
        shape = shapes[names[0]]
        if len(shape) != 1 or shape[0] == 0 or set(shapes.values()) != {shape}:
            raise ValueError(
                "the integers of a row must be [length], at least one, and of the same length for all "
                f"names. Received: row {number} with {shapes}"
            )
        for name, array in values.items():
            if not np.issubdtype(array.dtype, np.integer):
                raise ValueError(
                    f"a row must hold integers. Received: row {number}, {name!r} of dtype={array.dtype}"
                )
            parts[name].append(array.astype(np.int32))
        lengths.append(shape[0])
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}, np.array(lengths, np.int64)


def _read_labels(labels: Any, row_count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iufb" or labels.ndim == 0:
        raise ValueError(
            "`labels` must be integers or floats [rows, ...]. "
            f"Received: shape={labels.shape}, dtype={labels.dtype}"
        )
    if len(labels) != row_count:
        raise ValueError(f"each row must have a label. Received: {row_count} rows, {len(labels)} labels")
    return labels.astype(np.float32 if labels.dtype.kind == "f" else np.int32)


def _choose_buckets(lengths: np.ndarray, buckets: Sequence[int] | None) -> np.ndarray:
    """The number of the smallest bucket that each row fits into, int64 [rows]; 0 without buckets."""
    if buckets is None:
        return np.zeros(len(lengths), np.int64)
    buckets = list(buckets)
    if not buckets or buckets[0] < 1 or sorted(set(buckets)) != buckets:
        raise ValueError(f"`buckets` must be lengths in ascending order. Received: buckets={buckets}")
    if lengths.max() > buckets[-1]:
        raise ValueError(
            f"no row may be longer than the last bucket, {buckets[-1]}. "
            f"Received: row {int(lengths.argmax())} of length {lengths.max()}"
        )
    return np.searchsorted(buckets, lengths).astype(np.int64)
