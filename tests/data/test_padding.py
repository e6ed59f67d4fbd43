"""Padded batches: every row once, as long as need be, in few lengths, the same from one seed."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasllm.data import padded_batches

LENGTHS = np.random.default_rng(0).integers(1, 33, 101)
ROWS = [
    {"token_ids": [100 + number] * length, "attention_mask": [1] * length}
    for number, length in enumerate(LENGTHS.tolist())
]
LABELS = np.arange(101) * 2
BUCKETS = [8, 16, 32]


def batches_of(dataset):
    """The batches of a finite dataset as ([(number, length, label)], width), checked for padding."""
    batches = []
    for inputs, labels in dataset.as_numpy_iterator():
        rows = []
        for token_ids, mask, label in zip(
            inputs["token_ids"], inputs["attention_mask"], labels, strict=True
        ):
            length = mask.sum()
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert set(token_ids[:length].tolist()) == {token_ids[0]}
            assert (token_ids[length:] == 7).all()
            rows.append((int(token_ids[0]) - 100, int(length), int(label)))
        batches.append((rows, inputs["token_ids"].shape[1]))
    return batches


def rows_of(dataset):
    return [row for rows, _ in batches_of(dataset) for row in rows]


def batched(**options):
    return padded_batches(ROWS, LABELS, 8, pad_values={"token_ids": 7}, **options)


ALL = [(number, length, 2 * number) for number, length in enumerate(LENGTHS.tolist())]


def test_without_buckets_rows_keep_their_order_and_batches_are_as_long_as_need_be():
    batches = batches_of(batched())
    assert [row for rows, _ in batches for row in rows] == ALL
    assert [len(rows) for rows, _ in batches] == [8] * 12 + [5]
    assert all(width == max(length for _, length, _ in rows) for rows, width in batches)


@pytest.mark.parametrize("shuffle", [False, True])
def test_with_buckets_batches_have_few_lengths_and_little_padding(shuffle):
    batches = batches_of(batched(buckets=BUCKETS, shuffle=shuffle))
    rows = [row for rows, _ in batches for row in rows]
    assert sorted(rows) == ALL
    assert sorted(len(rows) for rows, _ in batches) == [5] + [8] * 12, "one batch only is short"
    for rows, width in batches:
        longest = max(length for _, length, _ in rows)
        assert width == min(bucket for bucket in BUCKETS if bucket >= longest)
    mixed = [
        rows
        for rows, width in batches
        if len({min(bucket for bucket in BUCKETS if bucket >= length) for _, length, _ in rows}) > 1
    ]
    assert len(mixed) <= len(BUCKETS) - 1, "batches hold rows of several buckets"
    widths = [width for _, width in batches]
    assert (widths == sorted(widths)) == (not shuffle)


def test_with_buckets_equal_lengths_keep_their_order():
    batches = batches_of(batched(buckets=BUCKETS))
    numbers = [number for rows, _ in batches for number, length, _ in rows if length <= 8]
    assert numbers == [number for number, length, _ in ALL if length <= 8]


def test_shuffling_orders_rows_anew_in_each_pass_and_the_seed_decides():
    for options in ({}, {"buckets": BUCKETS}):
        first, again = (batched(shuffle=True, seed=1, **options) for _ in range(2))
        passes = [batches_of(first) for _ in range(3)]
        assert passes[0] != passes[1] != passes[2] != passes[0]
        # Other rows are together, too.
        together = [{frozenset(rows) for rows, _ in batches} for batches in passes]
        assert not together[0] & together[1]
        assert [batches_of(again) for _ in range(3)] == passes
        assert batches_of(batched(shuffle=True, seed=2, **options)) not in passes


@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_shards_are_disjoint_and_cover_everything(buckets):
    options = {"shuffle": True, "seed": 4, "buckets": buckets}
    whole = batches_of(batched(**options))
    shards = [batches_of(batched(shard=(i, 3), **options)) for i in range(3)]
    assert sorted(itertools.chain(*shards)) == sorted(whole)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert batched(shard=(2, 3), **options).cardinality() == len(shards[2])


def test_skip_goes_on_where_training_stopped():
    options = {"shuffle": True, "repeat": True, "buckets": BUCKETS, "seed": 3}
    assert batched(**options).cardinality() == tf.data.INFINITE_CARDINALITY
    whole = batches_of(batched(**options).take(40))
    keras.utils.set_random_seed(9)
    assert batches_of(batched(**options).skip(17).take(23)) == whole[17:]
    for start in (0, 13, 26):  # passes
        assert sorted(row for rows, _ in whole[start : start + 13] for row in rows) == ALL


def test_drop_remainder_leaves_out_the_short_batch_only():
    batches = batches_of(batched(drop_remainder=True))
    assert [row for rows, _ in batches for row in rows] == ALL[:96]
    in_buckets = batches_of(batched(drop_remainder=True, buckets=BUCKETS, shuffle=True))
    assert [len(rows) for rows, _ in in_buckets] == [8] * 12
    left_out = set(ALL) - {row for rows, _ in in_buckets for row in rows}
    assert len(left_out) == 5 and min(length for _, length, _ in left_out) > 16


def test_types_and_shapes():
    inputs, labels = batched().element_spec
    assert {name: spec.shape.as_list() for name, spec in inputs.items()} == {
        "token_ids": [None, None],
        "attention_mask": [None, None],
    }
    assert {spec.dtype for spec in (*inputs.values(), labels)} == {tf.int32}
    inputs, labels = batched(buckets=[40], drop_remainder=True).element_spec
    assert (inputs["token_ids"].shape, labels.shape) == ((8, 40), (8,))
    floats = padded_batches(ROWS, np.zeros([101, 3]), 8).element_spec[1]
    assert (floats.shape.as_list(), floats.dtype) == ([None, 3], tf.float32)
    flags = padded_batches(ROWS, [True] * 101, 8).element_spec[1]
    assert flags.dtype == tf.int32


def test_without_labels_there_are_inputs_only():
    (batch,) = padded_batches(ROWS[:3], batch_size=4)
    assert batch.keys() == {"token_ids", "attention_mask"}
    assert batch["token_ids"].shape == (3, LENGTHS[:3].max())


def test_the_dataset_runs_in_a_graph_that_can_be_saved(tmp_path):
    # What calls Python, as tf.numpy_function does, can neither be saved nor sent to a worker.
    batched(buckets=BUCKETS).take(2).save(str(tmp_path))
    first, _ = next(iter(tf.data.Dataset.load(str(tmp_path))))
    assert first["token_ids"].shape == (8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": []}, "at least one row"),
        ({"rows": [{}]}, "an empty mapping"),
        ({"rows": [{"a": [1]}, {"b": [1]}]}, "row 1 with .'b'."),
        ({"rows": [{"a": [1], "b": [1, 2]}]}, r"row 0 with \{'a': \(1,\), 'b': \(2,\)\}"),
        ({"rows": [{"a": []}]}, r"at least one.*row 0"),
        ({"rows": [{"a": [[1]]}]}, r"row 0 with \{'a': \(1, 1\)\}"),
        ({"rows": [{"a": [1.0]}]}, "row 0, 'a' of dtype=float64"),
        ({"labels": [1]}, "101 rows, 1 labels"),
        ({"labels": ["a"] * 101}, "integers or floats"),
        ({"labels": 5}, r"shape=\(\)"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard": (3, 3)}, r"shard=\(3, 3\)"),
        ({"shard": (13, 14)}, "every shard must get a batch"),
        ({"batch_size": 102, "drop_remainder": True}, "101 rows, batch_size=102"),
        ({"pad_values": {"ids": 0}}, r"Received: \['ids'\]"),
        ({"buckets": []}, r"buckets=\[\]"),
        ({"buckets": [16, 8, 32]}, r"buckets=\[16, 8, 32\]"),
        ({"buckets": [8, 8, 32]}, r"buckets=\[8, 8, 32\]"),
        ({"buckets": [0, 32]}, r"buckets=\[0, 32\]"),
        ({"buckets": [8, 16]}, "longer than the last bucket, 16. Received: row .* of length 32"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    arguments = {"rows": ROWS, "batch_size": 8} | options
    with pytest.raises(ValueError, match=message):
        padded_batches(**arguments)
