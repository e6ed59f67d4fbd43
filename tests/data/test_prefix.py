"""Prompts and completions: what is learned, what is seen, and the promises on order and shards."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from kerasllm.data import prefix_lm_dataset
from kerasllm.tokenizers import train_tokenizer

PAIRS = [("What is it?", "A cat."), ("Go", ""), ("a", "bc"), ("To be, or", " not to be")]
LENGTH = 20


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("character", [text for pair in PAIRS for text in pair])


def rows_of(dataset):
    """The rows of a finite dataset as (token_ids, labels, weights) lists."""
    rows = []
    for parts in dataset.as_numpy_iterator():
        rows += [tuple(part.tolist() for part in row) for row in zip(*parts, strict=True)]
    return rows


def reference_row(prompt, completion):
    """One token at a time."""
    tokens = prompt + completion
    token_ids, labels, weights = [], [], []
    for place in range(LENGTH):
        has_label = place + 1 < len(tokens)
        token_ids.append(tokens[place] if has_label else 0)
        labels.append(tokens[place + 1] if has_label else 0)
        weights.append(1.0 if has_label and place + 1 >= len(prompt) else 0.0)
    return token_ids, labels, weights


def encoded(tokenizer):
    return [
        (tokenizer.encode(prompt), tokenizer.encode(completion) + [tokenizer.eos_id])
        for prompt, completion in PAIRS
    ]


def test_rows_equal_the_reference(tokenizer):
    rows = rows_of(prefix_lm_dataset(PAIRS, tokenizer, LENGTH, 3))
    assert rows == [reference_row(*pair) for pair in encoded(tokenizer)]


def test_ids_are_taken_as_they_are(tokenizer):
    expected = rows_of(prefix_lm_dataset(PAIRS, tokenizer, LENGTH, 3))
    assert rows_of(prefix_lm_dataset(encoded(tokenizer), tokenizer, LENGTH, 3)) == expected
    (row,) = rows_of(prefix_lm_dataset([([3, 4], [5])], tokenizer, 3, 1))
    assert row == ([3, 4, 0], [4, 5, 0], [0.0, 1.0, 0.0])


def test_the_longest_pair_that_fits_fills_the_row(tokenizer):
    pair = ([3] * 4, [4] * 3)
    (row,) = rows_of(prefix_lm_dataset([pair], tokenizer, 6, 1))
    assert row == ([3, 3, 3, 3, 4, 4], [3, 3, 3, 4, 4, 4], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="1 tokens, 6; .*Received: pair 0 of 7 tokens"):
        prefix_lm_dataset([pair], tokenizer, 5, 1)


def test_pairs_that_are_too_long_can_be_dropped(tokenizer):
    kept = rows_of(prefix_lm_dataset(PAIRS, tokenizer, 8, 3, too_long="drop"))
    assert kept == rows_of(prefix_lm_dataset(PAIRS[1:3], tokenizer, 8, 3))
    assert len(kept) == 2
    with pytest.raises(ValueError, match="4 pairs, none of which does"):
        prefix_lm_dataset(PAIRS, tokenizer, 1, 3, too_long="drop")


def test_types_and_shapes(tokenizer):
    for options in ({"repeat": True}, {"drop_remainder": True}):
        dataset = prefix_lm_dataset(PAIRS, tokenizer, LENGTH, 2, **options)
        ids, labels, weights = dataset.element_spec
        for spec, dtype in ((ids, tf.int32), (labels, tf.int32), (weights, tf.float32)):
            assert (spec.shape, spec.dtype) == ((2, LENGTH), dtype)


def shuffled(tokenizer, **options):
    pairs = [([3] * (1 + i % 5), [4, 3 + i % 2] * (1 + i % 7)) for i in range(35)]
    return prefix_lm_dataset(pairs, tokenizer, LENGTH, 4, shuffle=True, **options)


def test_order_shards_and_skip(tokenizer):
    first, again = shuffled(tokenizer, seed=1), shuffled(tokenizer, seed=1)
    passes = [rows_of(first) for _ in range(2)]
    assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])
    assert [rows_of(again) for _ in range(2)] == passes
    shards = [rows_of(shuffled(tokenizer, seed=1, shard=(i, 3))) for i in range(3)]
    assert sorted(itertools.chain(*shards)) == sorted(passes[0])
    whole = rows_of(shuffled(tokenizer, repeat=True).take(20))
    assert rows_of(shuffled(tokenizer, repeat=True).skip(7).take(13)) == whole[7 * 4 :]


@pytest.mark.parametrize(
    ("pairs", "options", "error", "message"),
    [
        ([], {}, ValueError, "at least one pair"),
        (["ab"], {}, TypeError, "str as pair 0"),
        ([("a", "b", "c")], {}, TypeError, "tuple as pair 0"),
        ([("a", "b"), ("a", [1])], {}, TypeError, "pair 0 with str"),
        ([([1.5], [1])], {}, TypeError, "pair 0 with list"),
        ([([1], [1000])], {}, ValueError, "ids from 1000 to 1000"),
        ([("a", "b"), ("", "b")], {}, ValueError, "pair 1 with an empty prompt"),
        ([([1], [])], {}, ValueError, "pair 0 with an empty completion"),
        (PAIRS, {"sequence_length": 0}, ValueError, "sequence_length=0"),
        (PAIRS, {"batch_size": 0}, ValueError, "batch_size=0"),
        (PAIRS, {"shard": (5, 6)}, ValueError, "every shard must get a row"),
        (PAIRS, {"too_long": "cut"}, ValueError, "too_long='cut'"),
    ],
)
def test_bad_arguments_are_refused(tokenizer, pairs, options, error, message):
    with pytest.raises(error, match=message):
        prefix_lm_dataset(pairs, tokenizer, **{"sequence_length": LENGTH, "batch_size": 2} | options)


def test_weights_sum_to_the_tokens_of_completions(tokenizer):
    weights = np.array([row[2] for row in rows_of(prefix_lm_dataset(PAIRS, tokenizer, LENGTH, 4))])
    assert weights.sum(axis=1).tolist() == [len(completion) + 1 for _, completion in PAIRS]
