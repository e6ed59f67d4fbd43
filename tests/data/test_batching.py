"""The passes of all datasets over their rows."""

import numpy as np
import pytest

from kerasllm import train_tokenizer
from kerasllm.data import language_model_dataset, masked_lm_dataset, padded_batches

TEXTS = [" ".join(str((number * step) % 10) for step in range(1, 8)) for number in range(1, 12)]
ROWS = [{"token_ids": [number, number + 1]} for number in range(11)]


def make(name, **options):
    options = {"batch_size": 4, "shuffle": True, **options}
    if name == "padded":
        return padded_batches(ROWS, **options)
    tokenizer = train_tokenizer("wordpiece" if name == "masked" else "word", TEXTS, None)
    dataset = masked_lm_dataset if name == "masked" else language_model_dataset
    return dataset(TEXTS, tokenizer, 9 if name == "masked" else 7, **options)


def ids_of(dataset):
    batches = [batch[0] if isinstance(batch, tuple) else batch for batch in dataset.as_numpy_iterator()]
    return [batch["token_ids"] if isinstance(batch, dict) else batch for batch in batches]


@pytest.mark.parametrize("name", ["windows", "masked", "padded"])
def test_the_order_of_a_pass_follows_from_the_seed_and_its_number(name):
    three = make(name, seed=5, passes=3)
    got = ids_of(three)
    count = int(three.cardinality()) // 3
    assert len(got) == 3 * count == 3 * len(ids_of(make(name)))
    rows = [len(batch) for batch in got]
    for number in range(3):  # each pass has a short batch
        assert sorted(rows[number * count : (number + 1) * count])[:2] == [min(rows), 4] != [4, 4]
    for again in (ids_of(three), ids_of(make(name, seed=5, passes=4))):
        for ours, wanted in zip(again, got, strict=False):
            np.testing.assert_array_equal(ours, wanted)
    passes = [np.concatenate(got[number * count : (number + 1) * count]) for number in range(3)]
    assert not (passes[0] == passes[1]).all() and not (passes[1] == passes[2]).all()
    if name == "padded":
        assert all(sorted(rows[:, 0]) == list(range(11)) for rows in passes)
    first = np.concatenate(ids_of(make(name, seed=6, passes=1)))
    assert not (first == passes[0]).all()
    for ours, wanted in zip(ids_of(three.skip(count + 1)), got[count + 1 :], strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("options", [{"passes": 0}, {"passes": 2, "repeat": True}])
def test_passes_out_of_range(options):
    with pytest.raises(ValueError, match="`passes` must be None or at least 1, without `repeat`"):
        make("padded", **options)
