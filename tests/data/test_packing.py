"""Packing against a slow reference in plain Python, and the promises on order, shards and shapes."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasllm.data.packing import language_model_dataset, tokenize_documents, windows_dataset
from kerasllm.tokenizers import train_tokenizer

DOCUMENTS = ["To be, or not to be.", "", "That is the question:", "Whether 'tis nobler", "ä → ∂"]
TEXT = "".join(DOCUMENTS)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("character", DOCUMENTS)


def reference_windows(tokens, length, stride, score_overlap):
    """[(inputs, labels, weights)], one token at a time."""
    windows = []
    scored_until = 0  # position of the last label so far
    start = 0
    while scored_until < len(tokens) - 1:
        inputs, labels, weights = [], [], []
        for position in range(start, start + length):
            inputs.append(tokens[position] if position < len(tokens) else 0)
            exists = position + 1 < len(tokens)
            labels.append(tokens[position + 1] if exists else 0)
            is_new = position + 1 > scored_until
            weights.append(float(exists and (score_overlap or is_new)))
        windows.append((inputs, labels, weights))
        scored_until = start + length
        start += stride
    return windows


def windows_of(dataset):
    """The windows of a finite dataset as a list of (inputs, labels, weights) lists."""
    return [
        tuple(part.tolist() for part in window)
        for batch in dataset.as_numpy_iterator()
        for window in zip(*batch, strict=True)
    ]


@pytest.mark.parametrize("score_overlap", [True, False])
@pytest.mark.parametrize("stride", [None, 3, 7])
@pytest.mark.parametrize("token_count", [2, 9, 10, 17])
def test_windows_equal_the_reference(token_count, stride, score_overlap):
    tokens = np.random.default_rng(0).integers(1, 50, token_count)
    dataset = windows_dataset(tokens, 8, 3, stride=stride, score_overlap=score_overlap)
    expected = reference_windows(tokens.tolist(), 8, stride or 8, score_overlap)
    assert windows_of(dataset) == expected
    assert dataset.cardinality() == -(-len(expected) // 3)


@pytest.mark.parametrize("stride", [1, 5, 8])
def test_without_overlap_every_label_counts_once_with_the_most_context(stride):
    tokens = np.arange(1, 46)
    scored = [
        (label, inputs.index(label - 1))
        for inputs, labels, weights in windows_of(
            windows_dataset(tokens, 8, 4, stride=stride, score_overlap=False)
        )
        for label, weight in zip(labels, weights, strict=True)
        if weight
    ]
    assert [label for label, _ in scored] == tokens[1:].tolist()
    assert all(context >= 8 - stride for _, context in scored[8:])


def test_types_and_shapes():
    batch = next(iter(windows_dataset(np.arange(100), 8, 4)))
    assert [part.dtype for part in batch] == [tf.int32, tf.int32, tf.float32]
    assert [part.shape for part in batch] == [(4, 8)] * 3


@pytest.mark.parametrize("options", [{"repeat": True}, {"drop_remainder": True}])
def test_batch_size_is_static_with_repeat_or_drop_remainder(options):
    dataset = windows_dataset(np.arange(100), 8, 4, **options)
    assert [spec.shape.as_list() for spec in dataset.element_spec] == [[4, 8]] * 3
    free = windows_dataset(np.arange(100), 8, 4)
    assert [spec.shape.as_list() for spec in free.element_spec] == [[None, 8]] * 3


def test_drop_remainder_drops_the_last_partial_batch_only():
    tokens = np.arange(100)  # 13 windows of 8 labels
    every, dropped = (windows_dataset(tokens, 8, 4, drop_remainder=drop) for drop in (False, True))
    assert windows_of(dropped) == windows_of(every)[:12]
    assert (every.cardinality(), dropped.cardinality()) == (4, 3)


def test_documents_are_tokenized_and_ended(tokenizer):
    token_ids, lengths = tokenize_documents(DOCUMENTS, tokenizer)
    expected = [ids + [tokenizer.eos_id] for ids in tokenizer.encode(DOCUMENTS)]
    assert token_ids.tolist() == list(itertools.chain(*expected))
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert token_ids.dtype == np.int32


def test_documents_without_an_end_of_text_token():
    tokenizer = train_tokenizer("character", DOCUMENTS, special_tokens=())
    assert tokenizer.eos_id is None
    token_ids, lengths = tokenize_documents(DOCUMENTS, tokenizer)
    assert tokenizer.decode(token_ids) == TEXT
    assert lengths.tolist() == [len(document) for document in DOCUMENTS]


def test_many_documents_keep_their_order(tokenizer):
    documents = [f"be {'to' * (i % 7)} {i % 3}" for i in range(300)]
    token_ids, _ = tokenize_documents(documents, tokenizer)
    from_dataset, _ = tokenize_documents(tf.data.Dataset.from_tensor_slices(documents), tokenizer)
    expected = itertools.chain(*(ids + [tokenizer.eos_id] for ids in tokenizer.encode(documents)))
    assert token_ids.tolist() == from_dataset.tolist() == list(expected)


def test_language_model_dataset_is_the_packed_stream(tokenizer):
    token_ids, _ = tokenize_documents(DOCUMENTS, tokenizer)
    options = {"stride": 5, "score_overlap": False, "shard": (1, 2), "drop_remainder": True}
    dataset = language_model_dataset(DOCUMENTS, tokenizer, 16, 2, **options)
    assert windows_of(dataset) == windows_of(windows_dataset(token_ids, 16, 2, **options))
    plain = windows_of(language_model_dataset(DOCUMENTS, tokenizer, 16, 2))
    assert plain == reference_windows(token_ids.tolist(), 16, 16, True)


def shuffled(**options):
    lengths = [30, 1, 0, 40, 20, 10]
    return windows_dataset(np.arange(1, 102), 8, 3, document_lengths=lengths, shuffle=True, **options)


def test_shuffling_orders_documents_and_windows():
    lengths = np.array([10, 20, 30, 40])
    document_of_token = np.repeat(np.arange(4), lengths)
    ids = document_of_token * 100 + np.concatenate([np.arange(n) for n in lengths])
    dataset = windows_dataset(ids, 9, 4, document_lengths=lengths, shuffle=True, seed=1)
    windows = windows_of(dataset)
    # The windows put back into a stream are the documents in another order, each in one piece.
    by_end = {tuple(inputs[:1]): (inputs, labels, weights) for inputs, labels, weights in windows}
    following = {labels[-1] for _, labels, weights in windows if weights[-1]}
    (start,) = [key for key in by_end if key[0] not in following]
    stream, order = [start[0]], []
    while (stream[-1],) in by_end and len(stream) < 100:
        _, labels, weights = by_end[(stream[-1],)]
        order.append(windows.index(by_end[(stream[-1],)]))
        stream += [label for label, weight in zip(labels, weights, strict=True) if weight]
    documents = [list(group) for _, group in itertools.groupby(stream, lambda id: id // 100)]
    assert sorted(documents) == [(i * 100 + np.arange(n)).tolist() for i, n in enumerate(lengths)]
    assert stream != ids.tolist(), "documents are not shuffled"
    assert order != sorted(order), "windows are not shuffled"


def test_every_pass_has_an_order_of_its_own_and_the_seed_decides():
    first, again = shuffled(seed=1), shuffled(seed=1)
    passes = [windows_of(first) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert [windows_of(again) for _ in range(3)] == passes
    assert windows_of(shuffled(seed=2)) not in passes


def test_repeat_goes_on_with_new_orders_and_without_loss():
    dataset = shuffled(repeat=True)
    assert dataset.cardinality() == tf.data.INFINITE_CARDINALITY
    windows_per_pass = 13  # not a multiple of the batch size 3: batches run over the end of a pass
    windows = windows_of(dataset.take(windows_per_pass))
    passes = [windows[i * windows_per_pass : (i + 1) * windows_per_pass] for i in range(3)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    for windows in passes:
        labels = [
            label
            for _, labels, weights in windows
            for label, weight in zip(labels, weights, strict=True)
            if weight
        ]
        # All tokens but the one that came first in this pass.
        assert len(labels) == len(set(labels)) == 100
        assert set(labels) < set(range(1, 102))


def test_orders_of_repeat_follow_from_the_seed_alone():
    before = windows_of(shuffled(seed=1, repeat=True).take(6))
    keras.utils.set_random_seed(7)
    assert windows_of(shuffled(seed=1, repeat=True).take(6)) == before
    assert windows_of(shuffled(seed=2, repeat=True).take(6)) != before


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [3])
def test_shards_are_disjoint_and_cover_everything(count, shuffle):
    tokens = np.arange(1, 201)
    options = {"shuffle": shuffle, "document_lengths": [50, 100, 50], "seed": 4}
    whole = windows_of(windows_dataset(tokens, 8, 3, **options))
    shards = [windows_of(windows_dataset(tokens, 8, 3, shard=(i, count), **options)) for i in range(count)]
    assert sorted(itertools.chain(*shards)) == sorted(whole)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert [windows[0] for windows in shards] == whole[:count]


def test_fit_sees_another_order_in_every_epoch():
    class Recorder(keras.Model):
        first_tokens = []

        def train_step(self, data):
            self.first_tokens.append(data[0][:, 0].numpy().tolist())
            return {"loss": 0.0}

    model = Recorder()
    model.compile(run_eagerly=True)
    model.fit(shuffled(), epochs=2, verbose=0)
    batches = 5
    assert len(model.first_tokens) == 2 * batches
    assert model.first_tokens[:batches] != model.first_tokens[batches:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 9}, "skips tokens. Received: stride=9, sequence_length=8"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"shard": (-1, 2)}, r"shard=\(-1, 2\)"),
        ({"shard": (0, 0)}, r"shard=\(0, 0\)"),
        ({"shard": (13, 14)}, "every shard must get a window"),
        ({"token_ids": np.arange(1)}, "at least two tokens"),
        ({"token_ids": np.zeros([2, 3], int)}, r"1-D .* shape=\(2, 3\)"),
        ({"token_ids": np.zeros([9])}, "dtype=float64"),
        ({"token_ids": np.arange(8), "repeat": True}, "8 tokens, sequence_length=8"),
        ({"token_ids": np.arange(8), "drop_remainder": True}, "8 tokens, sequence_length=8"),
        ({"batch_size": 14, "drop_remainder": True}, "13 windows of 100 tokens, batch_size=14"),
        ({"document_lengths": [50, 49]}, "a sum of 99, 100 tokens"),
        ({"document_lengths": [101, -1]}, "must not be negative"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    arguments = {"token_ids": np.arange(100), "sequence_length": 8, "batch_size": 4} | options
    with pytest.raises(ValueError, match=message):
        windows_dataset(**arguments)


def test_bad_documents_are_refused(tokenizer):
    with pytest.raises(ValueError, match="at least one document"):
        language_model_dataset([], tokenizer, 8, 4)
    with pytest.raises(TypeError, match="one string"):
        language_model_dataset("a text", tokenizer, 8, 4)
    with pytest.raises(TypeError, match="Received: int"):
        language_model_dataset(["a", 5], tokenizer, 8, 4)
    with pytest.raises(ValueError, match="at least two tokens"):
        language_model_dataset([""], tokenizer, 8, 4)
