"""N-gram baselines against plain Python loops, and as probability distributions."""

import math
from collections import Counter

import numpy as np
import pytest

from kerasllm.evaluation.ngram import ngram_log_probabilities, ngram_perplexity

VOCABULARY_SIZE = 7
RNG = np.random.default_rng(0)
# Token 6 is never seen in training and token 5 only at its end, where nothing follows.
TRAIN = np.append(RNG.choice(5, 60, p=[0.5, 0.2, 0.15, 0.1, 0.05]), 5)
VALIDATION = np.concatenate([RNG.integers(0, VOCABULARY_SIZE, 40), [6, 6, 5, 0]])


def reference_perplexity(train, validation, vocabulary_size, order):
    train, validation = train.tolist(), validation.tolist()
    unigrams = Counter(train)
    bigrams = Counter(zip(train, train[1:], strict=False))

    def unigram(word):
        return (unigrams[word] + 1) / (len(train) + vocabulary_size)

    def bigram(context, word):
        seen = sum(count for (first, _), count in bigrams.items() if first == context)
        kinds = sum(1 for first, _ in bigrams if first == context)
        if seen == 0:
            return unigram(word)
        return (bigrams[context, word] + kinds * unigram(word)) / (seen + kinds)

    total = 0.0
    for context, word in zip(validation, validation[1:], strict=False):
        total -= math.log(unigram(word) if order == 1 else bigram(context, word))
    return math.exp(total / (len(validation) - 1))


@pytest.mark.parametrize("order", [1, 2])
def test_perplexity_equals_the_reference(order):
    received = ngram_perplexity(TRAIN, VALIDATION, VOCABULARY_SIZE, order)
    expected = reference_perplexity(TRAIN, VALIDATION, VOCABULARY_SIZE, order)
    assert received == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("context", range(VOCABULARY_SIZE))
def test_probabilities_sum_to_one_after_every_context(context, order):
    pairs = np.array([[context, word] for word in range(VOCABULARY_SIZE)])
    logs = [ngram_log_probabilities(TRAIN, pair, VOCABULARY_SIZE, order)[0] for pair in pairs]
    assert np.exp(logs).sum() == pytest.approx(1.0, rel=1e-12)
    assert np.isfinite(logs).all()


def test_no_train_pairs_at_all_falls_back_to_the_unigram():
    one, two = (ngram_perplexity(np.array([3]), VALIDATION, VOCABULARY_SIZE, o) for o in (1, 2))
    assert one == pytest.approx(two)


def test_bigram_is_better_where_order_matters():
    train, validation = np.tile([0, 1, 2, 3], 100), np.tile([0, 1, 2, 3], 10)
    assert ngram_perplexity(train, validation, 4, 1) == pytest.approx(4.0)
    assert ngram_perplexity(train, validation, 4, 2) < 1.02


def test_large_vocabulary_does_not_overflow():
    size = 100_000
    train = np.random.default_rng(1).integers(size - 50, size, 2_000).astype(np.int32)
    expected = reference_perplexity(train, train[:50], size, 2)
    assert ngram_perplexity(train, train[:50], size, 2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 3}, "order=3"),
        ({"order": 0}, "order=0"),
        ({"train_ids": np.array([], int)}, "`train_ids` must hold at least 1"),
        ({"validation_ids": np.array([1])}, "must hold at least 2"),
        ({"train_ids": np.array([1.0, 2.0])}, "dtype=float64"),
        ({"train_ids": np.array([[1, 2]])}, r"shape=\(1, 2\)"),
        ({"validation_ids": np.array([1, 7])}, "ids from 1 to 7, vocabulary_size=7"),
        ({"train_ids": np.array([-1, 2])}, "ids from -1 to 2"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    arguments = {
        "train_ids": TRAIN,
        "validation_ids": VALIDATION,
        "vocabulary_size": VOCABULARY_SIZE,
        "order": 2,
    }
    with pytest.raises(ValueError, match=message):
        ngram_perplexity(**(arguments | options))
