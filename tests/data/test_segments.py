"""Packing with segments: nothing crosses a border, nothing is lost, little is empty."""

import numpy as np
import pytest
import tensorflow as tf

from kerasllm.data import generate_stories, packed_dataset, tokenize_documents
from kerasllm.data.segments import pack_pieces
from kerasllm.tokenizers import train_tokenizer

LENGTH = 16
DOCUMENTS = ["To be, or not to be.", "", "That", "is the question:" * 4, "a", "Whether 'tis nobler", "in"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("character", DOCUMENTS)


def rows_of(dataset):
    """The rows of a finite dataset as (token_ids, segment_ids, positions, labels, weights) lists."""
    return [
        tuple(part.tolist() for part in row)
        for inputs, labels, weights in dataset.as_numpy_iterator()
        for row in zip(
            inputs["token_ids"], inputs["segment_ids"], inputs["positions"], labels, weights, strict=True
        )
    ]


def reference_pieces(documents):
    """[(tokens, labels)] of every piece of every document, one token at a time."""
    pieces = []
    for document in documents:
        tokens, labels = [], []
        for token, label in zip(document[:-1], document[1:], strict=True):
            tokens.append(token)
            labels.append(label)
            if len(tokens) == LENGTH:
                pieces.append((tokens, labels))
                tokens, labels = [], []
        if tokens:
            pieces.append((tokens, labels))
    return pieces


def pieces_of(row):
    """[(tokens, labels)] of the segments of one row, and checks that each is whole and in one place."""
    token_ids, segment_ids, positions, labels, weights = row
    assert weights == [float(segment > 0) for segment in segment_ids]
    filled = sum(segment > 0 for segment in segment_ids)
    assert not any(token_ids[filled:] + segment_ids[filled:] + positions[filled:] + labels[filled:])
    assert sorted(set(segment_ids[:filled])) == list(range(1, segment_ids[filled - 1] + 1))
    assert segment_ids[:filled] == sorted(segment_ids[:filled])
    pieces = []
    for segment in range(1, max(segment_ids) + 1):
        places = [place for place in range(filled) if segment_ids[place] == segment]
        assert [positions[place] for place in places] == list(range(len(places)))
        pieces.append(([token_ids[place] for place in places], [labels[place] for place in places]))
    return pieces


def test_segments_are_the_pieces_of_the_documents(tokenizer):
    encoded = [ids + [tokenizer.eos_id] for ids in tokenizer.encode(DOCUMENTS)]
    rows = rows_of(packed_dataset(DOCUMENTS, tokenizer, LENGTH, 2))
    pieces = [piece for row in rows for piece in pieces_of(row)]
    expected = reference_pieces(encoded)
    assert len(expected) > len(rows), "no row holds several pieces, so nothing is tested"
    assert sorted(pieces) == sorted(expected)


def test_tokens_may_be_given(tokenizer):
    tokens = tokenize_documents(DOCUMENTS, tokenizer)
    options = {"shuffle": True, "seed": 2}
    expected = rows_of(packed_dataset(DOCUMENTS, tokenizer, LENGTH, 2, **options))
    assert rows_of(packed_dataset(tokens, tokenizer, LENGTH, 2, **options)) == expected


def test_without_an_end_of_text_token_the_last_token_is_a_label_only():
    tokenizer = train_tokenizer("character", DOCUMENTS, special_tokens=())
    rows = rows_of(packed_dataset(DOCUMENTS, tokenizer, LENGTH, 2))
    pieces = [piece for row in rows for piece in pieces_of(row)]
    assert sorted(pieces) == sorted(reference_pieces(tokenizer.encode(DOCUMENTS)))


def test_types_and_shapes(tokenizer):
    dataset = packed_dataset(DOCUMENTS, tokenizer, LENGTH, 2, repeat=True)
    inputs, labels, weights = dataset.element_spec
    for spec in (*inputs.values(), labels):
        assert (spec.shape.as_list(), spec.dtype) == ([2, LENGTH], tf.int32)
    assert (weights.shape.as_list(), weights.dtype) == ([2, LENGTH], tf.float32)


@pytest.mark.parametrize(
    ("lengths", "row_length"),
    [
        ([1], 1),
        ([5, 5, 5], 5),
        ([4, 3, 3, 2, 2, 1, 1], 8),
        (np.random.default_rng(0).integers(1, 101, 3000), 100),
        (np.random.default_rng(1).integers(34, 60, 3000), 100),
    ],
)
def test_packing_is_best_fit_decreasing(lengths, row_length):
    lengths = np.array(lengths)
    space = []  # The slow way: look at every row for every piece.
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row in range(len(space)) if space[row] >= length]
        if fitting:
            space[min(fitting, key=lambda row: space[row])] -= length
        else:
            space.append(row_length - length)
    filled = np.bincount(pack_pieces(lengths, row_length), weights=lengths)
    assert sorted((row_length - filled).tolist()) == sorted(space)


def test_rows_keep_the_order_of_documents():
    assert pack_pieces(np.array([4, 8, 3, 1, 5]), 8).tolist() == [0, 1, 2, 0, 2]


def test_little_space_stays_empty():
    stories = generate_stories(200)
    paragraphs = [paragraph for story in stories for paragraph in story.split("\n\n")]
    sentences = [sentence for story in stories[:50] for sentence in story.split(". ")]
    tokenizer = train_tokenizer("character", stories)
    # Documents of one size leave gaps that no packing can close; a few short ones fill them.
    documents_of = {"paragraphs": paragraphs, "all sizes": stories + paragraphs + sentences}
    filled = {
        name: np.mean([row[-1] for row in rows_of(packed_dataset(documents, tokenizer, 1024, 8))])
        for name, documents in documents_of.items()
    }
    print(filled)
    assert filled["paragraphs"] > 0.96 and filled["all sizes"] > 0.99


def shuffled(tokenizer, **options):
    documents = [f"{'be' * (i % 7)} {i}".replace("0", "t") for i in range(100)]
    tokenizer = train_tokenizer("character", documents)
    return packed_dataset(documents, tokenizer, LENGTH, 3, shuffle=True, **options)


def test_every_pass_has_an_order_of_its_own_and_the_seed_decides(tokenizer):
    first, again = shuffled(tokenizer, seed=1), shuffled(tokenizer, seed=1)
    passes = [rows_of(first) for _ in range(3)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert sorted(passes[0]) == sorted(passes[1])
    assert [rows_of(again) for _ in range(3)] == passes
    assert rows_of(shuffled(tokenizer, seed=2)) not in passes


def test_shards_are_disjoint_and_cover_everything(tokenizer):
    whole = rows_of(shuffled(tokenizer))
    shards = [rows_of(shuffled(tokenizer, shard=(i, 3))) for i in range(3)]
    assert sorted(sum(shards, [])) == sorted(whole)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert [shard[0] for shard in shards] == whole[:3]


def test_skip_goes_on_where_training_stopped(tokenizer):
    batch_count = 3 * 20  # more than one pass
    whole = rows_of(shuffled(tokenizer, repeat=True).take(batch_count))
    rest = rows_of(shuffled(tokenizer, repeat=True).skip(25).take(batch_count - 25))
    assert rest == whole[25 * 3 :]
    one_pass = rows_of(shuffled(tokenizer))
    assert rows_of(shuffled(tokenizer).skip(3)) == one_pass[3 * 3 :]


def test_cardinality(tokenizer):
    row_count = len(rows_of(packed_dataset(DOCUMENTS, tokenizer, LENGTH, 2)))
    assert row_count % 2
    assert packed_dataset(DOCUMENTS, tokenizer, LENGTH, 2).cardinality() == row_count // 2 + 1
    dropped = packed_dataset(DOCUMENTS, tokenizer, LENGTH, 2, drop_remainder=True)
    assert dropped.cardinality() == row_count // 2
    assert len(rows_of(dropped)) == row_count - 1


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        (DOCUMENTS, {"sequence_length": 0}, "sequence_length=0"),
        (DOCUMENTS, {"batch_size": 0}, "batch_size=0"),
        (DOCUMENTS, {"shard": (2, 2)}, r"shard=\(2, 2\)"),
        (DOCUMENTS, {"shard": (90, 99)}, r"every shard must get a row.*shard=\(90, 99\)"),
        (DOCUMENTS, {"batch_size": 50, "drop_remainder": True}, "a full batch.*batch_size=50"),
        ([], {}, "at least one document"),
        (["", ""], {}, "2 documents, none of which has"),
        ((np.arange(5), [2, 2]), {}, "a sum of 4, 5 tokens"),
        ((np.arange(5) + 1000, [2, 3]), {}, "ids from 1000 to 1004"),
        ((np.arange(5),), {}, "1 arrays"),
    ],
)
def test_bad_arguments_are_refused(tokenizer, documents, options, message):
    arguments = {"sequence_length": LENGTH, "batch_size": 2} | options
    with pytest.raises(ValueError, match=message):
        packed_dataset(documents, tokenizer, **arguments)
