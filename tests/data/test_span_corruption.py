"""Span corruption against a slow reference, token by token, and T5's own numbers."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from kerasllm.data import span_corruption_dataset, tokenize_documents
from kerasllm.data.span_corruption import count_noise, draw_noise, replace_spans
from kerasllm.tokenizers import train_tokenizer

PAD, END = 0, 1
FIRST_SENTINEL = 2  # of the test's tokenizer: <extra_id_0>; the others follow
START = 5


@pytest.fixture(scope="module")
def tokens(stories, t5_tokenizer):
    return tokenize_documents(stories[:6], t5_tokenizer, end_of_text=False)


def corrupted(tokens, tokenizer, length=64, batch_size=8, **options):
    return span_corruption_dataset(tokens, tokenizer, length, batch_size, decoder_start_id=START, **options)


def rows_of(dataset):
    """The rows of a finite dataset as (source_ids, memory_mask, token_ids, labels, weights) lists."""
    return [
        tuple(part.tolist() for part in row)
        for inputs, labels, weights in dataset.as_numpy_iterator()
        for row in zip(
            inputs["source_ids"], inputs["memory_mask"], inputs["token_ids"], labels, weights, strict=True
        )
    ]


def reference_replace(ids, is_hidden, sentinels):
    """Hidden spans replaced by sentinels, one token at a time."""
    replaced, sentinels = [], list(sentinels)
    for place, id in enumerate(ids):
        if not is_hidden[place]:
            replaced.append(id)
        elif place == 0 or not is_hidden[place - 1]:
            replaced.append(sentinels.pop(0))
    return replaced


def reference_parts(count, part_count, seed):
    """T5's random segmentation: a 0/1 list with a 1 for each part but one, shuffled."""
    keys = tf.random.stateless_uniform(
        [count - 1], seed, minval=None, maxval=None, dtype=tf.int64, alg="philox"
    ).numpy()
    begins = [int(i < part_count - 1) for i in range(count - 1)]
    begins = [begins[i] for i in sorted(range(count - 1), key=lambda i: keys[i])]
    lengths = [1]
    for begin in begins:
        if begin:
            lengths.append(0)
        lengths[-1] += 1
    return lengths


def filled(ids, mask):
    return ids[: int(sum(mask))]


def restored(source, target):
    """The text before corruption, from a source and a target without their ends."""
    spans = {}
    for id in target:
        if FIRST_SENTINEL <= id < FIRST_SENTINEL + 100:
            spans[id] = []
            last = id
        else:
            spans[last].append(id)
    return list(itertools.chain(*(spans.get(id, [id]) for id in source))), list(spans)


def test_lengths_are_those_of_t5(tokens, t5_tokenizer):
    assert count_noise(512, 0.15, 3.0) == (77, 26)
    first, *_ = rows_of(corrupted(tokens, t5_tokenizer, 512))
    source_ids, memory_mask, token_ids, labels, weights = first
    assert len(source_ids) == sum(memory_mask) == 461 + 1
    assert len(token_ids) == len(labels) == sum(weights) == 103 + 1
    assert source_ids[-1] == labels[-1] == END
    sentinels = [id for id in labels if FIRST_SENTINEL <= id < FIRST_SENTINEL + 100]
    assert sentinels == list(range(FIRST_SENTINEL, FIRST_SENTINEL + 26))


def test_source_and_target_together_are_the_text(tokens, t5_tokenizer):
    texts = []
    for source, memory_mask, token_ids, labels, weights in rows_of(corrupted(tokens, t5_tokenizer)):
        assert token_ids == [START, *labels[:-1]]
        assert memory_mask == sorted(memory_mask, reverse=True)
        assert weights == sorted(weights, reverse=True)
        assert not any(source[sum(memory_mask) :] + labels[int(sum(weights)) :])
        source, target = filled(source, memory_mask), filled(labels, weights)
        assert source.pop() == target.pop() == END
        text, sentinels = restored(source, target)
        assert sentinels == [id for id in source if id in sentinels] == sorted(sentinels)
        assert target[0] == FIRST_SENTINEL and source[0] != FIRST_SENTINEL
        texts += text
    assert texts == tokens[0].tolist()


@pytest.mark.parametrize("length", [2, 3, 7, 20, 21, 33, 100, 512])
@pytest.mark.parametrize(("rate", "span"), [(0.15, 3.0), (0.5, 1.0), (0.9, 2.0), (0.3, 10.0)])
def test_noise_equals_the_reference(length, rate, span):
    seed = tf.constant([length, 7], tf.int64)
    noise_count, span_count = count_noise(length, rate, span)
    is_noise = draw_noise(*(tf.constant(n) for n in (length, noise_count, span_count)), seed).numpy()
    noise_seed, kept_seed = tf.random.split(seed, alg="philox").numpy()
    expected = []
    for kept, noise in zip(
        reference_parts(length - noise_count, span_count, kept_seed),
        reference_parts(noise_count, span_count, noise_seed),
        strict=True,
    ):
        expected += [False] * kept + [True] * noise
    assert is_noise.tolist() == expected
    assert is_noise.sum() == noise_count
    ids, sentinels = np.arange(100, 100 + length), list(range(1000, 1300))
    for is_hidden in (is_noise, ~is_noise):
        replaced = replace_spans(tf.constant(ids, tf.int32), is_hidden, tf.constant(sentinels)).numpy()
        assert replaced.tolist() == reference_replace(ids.tolist(), is_hidden, sentinels)


@pytest.mark.parametrize(("rate", "span"), [(0.15, 3.0), (0.5, 1.0), (0.9, 2.0), (0.3, 10.0)])
def test_a_shorter_row_has_no_longer_source_and_target(rate, span):
    counts = np.array([count_noise(length, rate, span) for length in range(2, 700)])
    source_lengths = np.arange(2, 700) - counts[:, 0] + counts[:, 1]
    target_lengths = counts.sum(axis=1)
    assert (np.diff(target_lengths) >= 0).all()
    assert (np.diff(source_lengths) >= 0).all()


@pytest.mark.parametrize(("left_over", "row_count"), [(0, 1), (1, 1), (2, 2), (39, 2)])
def test_last_row_may_be_short_but_not_a_single_token(t5_tokenizer, left_over, row_count):
    tokens = np.full(40 + left_over, 110, np.int32), [40 + left_over]
    rows = rows_of(corrupted(tokens, t5_tokenizer, 40, 2))
    assert len(rows) == row_count


def test_every_way_to_cut_spans_is_as_likely():
    # Of 12 tokens 3 in 2 spans; the first token always stays.
    @tf.function
    def draw(seeds):
        def draw_one(seed):
            return draw_noise(tf.constant(12), tf.constant(3), tf.constant(2), seed)

        return tf.map_fn(draw_one, seeds, fn_output_signature=tf.TensorSpec([12], tf.bool))

    rows = draw(tf.stack([tf.zeros(4000, tf.int64), tf.range(4000, dtype=tf.int64)], axis=1)).numpy()
    # 8 ways to split 9 tokens in two, times 2 ways to split 3 in two.
    ways, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(ways) == 16
    assert (abs(counts - 250) < 5 * np.sqrt(250)).all()


def test_types_and_shapes(tokens, t5_tokenizer):
    inputs, labels, weights = corrupted(tokens, t5_tokenizer, 512, 4, repeat=True).element_spec
    shapes = {name: spec.shape.as_list() for name, spec in inputs.items()}
    assert shapes == {"source_ids": [4, 462], "memory_mask": [4, 462], "token_ids": [4, 104]}
    assert {spec.dtype for spec in (*inputs.values(), labels)} == {tf.int32}
    assert (labels.shape, weights.shape, weights.dtype) == ((4, 104), (4, 104), tf.float32)


def test_every_pass_has_spans_of_its_own_and_the_seed_decides(tokens, t5_tokenizer):
    first, again = corrupted(tokens, t5_tokenizer, seed=1), corrupted(tokens, t5_tokenizer, seed=1)
    passes = [rows_of(first) for _ in range(2)]
    assert passes[0] != passes[1]
    assert [rows_of(again) for _ in range(2)] == passes
    assert rows_of(corrupted(tokens, t5_tokenizer, seed=2)) not in passes
    fixed = corrupted(tokens, t5_tokenizer, new_spans=False)
    assert rows_of(fixed) == rows_of(fixed)


def test_shards_are_disjoint_and_cover_everything(tokens, t5_tokenizer):
    options = {"shuffle": True, "seed": 4}
    whole = rows_of(corrupted(tokens, t5_tokenizer, **options))
    shards = [rows_of(corrupted(tokens, t5_tokenizer, shard=(i, 3), **options)) for i in range(3)]
    assert sorted(itertools.chain(*shards)) == sorted(whole)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_skip_goes_on_where_training_stopped(tokens, t5_tokenizer):
    few = tokens[0][:2000], [2000]
    options = {"shuffle": True, "repeat": True, "seed": 3}
    whole = rows_of(corrupted(few, t5_tokenizer, **options).take(12))
    assert rows_of(corrupted(few, t5_tokenizer, **options).skip(7).take(5)) == whole[7 * 8 :]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "at least 2.*sequence_length=1"),
        ({"noise_rate": 0.0}, "noise_rate=0.0"),
        ({"noise_rate": 1.0}, "noise_rate=1.0"),
        ({"mean_span_length": 0.5}, "mean_span_length=0.5"),
        ({"mean_span_length": float("nan")}, "mean_span_length=nan"),
        ({"decoder_start_id": -1}, "decoder_start_id=-1"),
        ({"decoder_start_id": 5000}, "decoder_start_id=5000"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"documents": ["a"]}, "at least two tokens.* Received: 1"),
        ({"documents": []}, "at least one document"),
        ({"sequence_length": 4000}, "<extra_id_0> to <extra_id_199>.*without <extra_id_100>"),
    ],
)
def test_bad_arguments_are_refused(t5_tokenizer, options, message):
    arguments = {"documents": ["the boy"], "sequence_length": 8, "batch_size": 1, "decoder_start_id": 0}
    with pytest.raises(ValueError, match=message):
        span_corruption_dataset(tokenizer=t5_tokenizer, **arguments | options)


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    tokenizer = train_tokenizer("character", ["abc"], special_tokens=["<extra_id_0>"])
    with pytest.raises(ValueError, match="must have an end-of-text token"):
        span_corruption_dataset(["abc"], tokenizer, 3, 1, decoder_start_id=0)
