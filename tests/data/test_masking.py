"""Masks: how many, where, of what; the same from one seed, and never a special token."""

import itertools
import json

import numpy as np
import pytest
import tensorflow as tf

from kerasllm.data import masked_lm_dataset, tokenize_documents
from kerasllm.data.masking import word_table
from kerasllm.tokenizers import Tokenizer, train_tokenizer

LENGTH = 64
CLS, SEP, MASK = 2, 3, 4
SPECIAL = range(5)


@pytest.fixture(scope="module")
def tokens(stories, bert_tokenizer):
    return tokenize_documents(stories, bert_tokenizer, end_of_text=False)


@pytest.fixture(scope="module")
def few(tokens):
    token_ids, lengths = tokens
    return token_ids[: lengths[:40].sum()], lengths[:40]


def rows_of(dataset):
    """The rows of a finite dataset as (token_ids, attention_mask, labels, weights) lists."""
    return [
        tuple(part.tolist() for part in row)
        for inputs, labels, weights in dataset.as_numpy_iterator()
        for row in zip(inputs["token_ids"], inputs["attention_mask"], labels, weights, strict=True)
    ]


def arrays_of(dataset):
    """(token_ids, attention_mask, labels, weights) of a finite dataset, [rows, length] each."""
    return [np.array(part) for part in zip(*rows_of(dataset), strict=True)]


def reference_rows(documents, room):
    """[CLS] piece [SEP], of every document in turn."""
    rows = []
    for document in documents:
        while document:
            rows.append([CLS, *document[:room], SEP])
            document = document[room:]
    return rows


def test_labels_are_the_documents_with_special_tokens_around(stories, bert_tokenizer):
    documents = [stories[0], "", "Tim", *stories[1:5]]
    rows = rows_of(masked_lm_dataset(documents, bert_tokenizer, LENGTH, 4))
    expected = reference_rows(bert_tokenizer.encode(documents), LENGTH - 2)
    assert [[id for id, real in zip(row[2], row[1], strict=True) if real] for row in rows] == expected
    for token_ids, attention_mask, labels, weights in rows:
        length = sum(attention_mask)
        assert attention_mask == [1] * length + [0] * (LENGTH - length)
        assert not any(token_ids[length:] + labels[length:] + weights[length:])  # [PAD] is 0
        unselected = [place for place in range(LENGTH) if not weights[place]]
        assert all(token_ids[place] == labels[place] for place in unselected)


def test_types_and_shapes(tokens, bert_tokenizer):
    inputs, labels, weights = masked_lm_dataset(tokens, bert_tokenizer, LENGTH, 4, repeat=True).element_spec
    for spec in (*inputs.values(), labels):
        assert (spec.shape.as_list(), spec.dtype) == ([4, LENGTH], tf.int32)
    assert (weights.shape.as_list(), weights.dtype) == ([4, LENGTH], tf.float32)


@pytest.mark.parametrize("whole_words", [False, True])
def test_rates_are_those_of_bert(tokens, bert_tokenizer, whole_words):
    dataset = masked_lm_dataset(tokens, bert_tokenizer, LENGTH, 32, whole_words=whole_words)
    token_ids, attention_mask, labels, weights = arrays_of(dataset)
    is_ordinary = (attention_mask == 1) & ~np.isin(labels, SPECIAL)
    is_selected = weights == 1
    assert is_ordinary.sum() > 50_000 and np.isin(weights, (0, 1)).all()
    assert abs(is_selected.sum() / is_ordinary.sum() - 0.15) < (0.008 if whole_words else 0.005)
    is_mask = token_ids[is_selected] == MASK
    is_kept = token_ids[is_selected] == labels[is_selected]
    assert abs(is_mask.mean() - 0.8) < 0.015
    # A random token is the right one now and then.
    assert abs(is_kept.mean() - (0.1 + 0.1 / 195)) < 0.012
    assert abs((~is_mask & ~is_kept).mean() - 0.1) < 0.012


def test_special_tokens_are_neither_selected_nor_drawn(tokens, bert_tokenizer):
    dataset = masked_lm_dataset(tokens, bert_tokenizer, LENGTH, 32, mask_rate=1.0)
    token_ids, attention_mask, labels, weights = arrays_of(dataset)
    # Even [UNK] inside of a text, and everything else is selected at this rate.
    np.testing.assert_array_equal(weights == 1, (attention_mask == 1) & ~np.isin(labels, SPECIAL))
    dataset = masked_lm_dataset(
        tokens, bert_tokenizer, LENGTH, 32, mask_rate=1.0, mask_fraction=0, random_fraction=1
    )
    token_ids, _, labels, weights = arrays_of(dataset)
    drawn = np.bincount(token_ids[weights == 1], minlength=bert_tokenizer.vocabulary_size)
    assert not drawn[: len(SPECIAL)].any()
    ordinary = drawn[len(SPECIAL) :]
    assert (abs(ordinary - ordinary.mean()) < 6 * np.sqrt(ordinary.mean())).all(), "not uniform"


def test_unknown_words_are_not_selected(bert_tokenizer):
    documents = ["the boy and the 日本 ran to the girl"] * 8
    _, _, labels, weights = arrays_of(masked_lm_dataset(documents, bert_tokenizer, 32, 8, mask_rate=1.0))
    assert (labels == 1).any() and not weights[labels == 1].any()


def test_fractions_may_be_other_ones(tokens, bert_tokenizer):
    options = {"mask_rate": 0.4, "mask_fraction": 0.5, "random_fraction": 0.0}
    token_ids, _, labels, weights = arrays_of(
        masked_lm_dataset(tokens, bert_tokenizer, LENGTH, 32, **options)
    )
    selected = weights == 1
    assert abs((token_ids[selected] == MASK).mean() - 0.5) < 0.015
    assert abs((token_ids[selected] == labels[selected]).mean() - 0.5) < 0.015


def test_whole_words_are_selected_whole(tokens, bert_tokenizer):
    rows = rows_of(masked_lm_dataset(tokens, bert_tokenizer, LENGTH, 32, whole_words=True, mask_rate=0.3))
    words = []
    for _, _, labels, weights in rows:
        previous = CLS
        for label, weight in zip(labels, weights, strict=True):
            # A document may be cut inside of a word.
            if not bert_tokenizer.id_to_token(label).startswith("##") or previous == CLS:
                words.append([])
            words[-1].append(weight)
            previous = label
    assert all(len(set(word)) == 1 for word in words)
    assert {(len(word) > 3, word[0]) for word in words} == set(itertools.product([False, True], [0.0, 1.0]))
    # Neighbouring words are selected each for itself.
    by_token = rows_of(masked_lm_dataset(tokens, bert_tokenizer, LENGTH, 32, mask_rate=0.3))
    assert by_token != rows


def words_of(tokenizer, text):
    """The words that the table makes of a text."""
    begins_word, ends_line = word_table(tokenizer)
    words, line_ended = [], True
    for id in tokenizer.encode(text):
        if begins_word[id] or line_ended:
            words.append([])
        words[-1].append(id)
        line_ended = ends_line[id]
    return [tokenizer.decode(word) for word in words]


@pytest.mark.parametrize("kind", ["byte_bpe", "character"])
def test_words_begin_with_white_space(kind):
    texts = ["She saw the cat, and\nhe ran away.", "the cats ran"]
    tokenizer = train_tokenizer(kind, texts, *([270] if kind == "byte_bpe" else []))
    expected = ["She", " saw", " the", " cat,", " and", "\n", "he", " ran", " away."]
    assert words_of(tokenizer, texts[0]) == expected


def test_words_of_sentencepiece_begin_with_the_mark():
    vocabulary = [["<unk>", 0.0], ["▁the", -1.0], ["▁c", -1.0], ["at", -1.0], ["s", -1.5], ["▁", -2.0]]
    mark = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    config = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": mark, "decoder": mark, "post_processor": None,
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": vocabulary},
    }  # fmt: skip
    tokenizer = Tokenizer.from_json(json.dumps(config))
    assert tokenizer.encode("the cats at") == [1, 2, 3, 4, 5, 3]
    assert words_of(tokenizer, "the cats at") == ["the", "cats", "at"]


def test_words_of_a_word_tokenizer_are_its_tokens():
    tokenizer = train_tokenizer("word", ["the cat, the dog"])
    assert word_table(tokenizer)[0].all() and not word_table(tokenizer)[1].any()


def masked(few, bert_tokenizer, **options):
    return masked_lm_dataset(few, bert_tokenizer, LENGTH, 16, **options)


def test_every_pass_has_masks_of_its_own_and_the_seed_decides(few, bert_tokenizer):
    first, again = masked(few, bert_tokenizer, seed=1), masked(few, bert_tokenizer, seed=1)
    passes = [rows_of(first) for _ in range(2)]
    assert [row[3] for row in passes[0]] != [row[3] for row in passes[1]]
    assert [row[2] for row in passes[0]] == [row[2] for row in passes[1]], "the texts are the same"
    assert [rows_of(again) for _ in range(2)] == passes
    assert rows_of(masked(few, bert_tokenizer, seed=2)) not in passes


def test_masks_can_stay_the_same_for_validation(few, bert_tokenizer):
    dataset = masked(few, bert_tokenizer, new_masks=False)
    assert rows_of(dataset) == rows_of(dataset)


def test_masks_of_rows_are_not_alike(few, bert_tokenizer):
    weights = {tuple(row[3]) for row in rows_of(masked(few, bert_tokenizer)) if sum(row[1]) == LENGTH}
    full = sum(sum(row[1]) == LENGTH for row in rows_of(masked(few, bert_tokenizer)))
    assert len(weights) > 0.95 * full


@pytest.mark.parametrize("shuffle", [False, True])
def test_shards_are_disjoint_and_cover_everything(few, bert_tokenizer, shuffle):
    options = {"shuffle": shuffle, "seed": 4}
    whole = rows_of(masked(few, bert_tokenizer, **options))
    shards = [rows_of(masked(few, bert_tokenizer, shard=(i, 3), **options)) for i in range(3)]
    assert sorted(itertools.chain(*shards)) == sorted(whole), "a mask depends on shards"
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_batch_size_does_not_change_a_mask(few, bert_tokenizer):
    whole = rows_of(masked_lm_dataset(few, bert_tokenizer, LENGTH, 16))
    assert rows_of(masked_lm_dataset(few, bert_tokenizer, LENGTH, 5)) == whole


def test_skip_goes_on_where_training_stopped(few, bert_tokenizer):
    options = {"shuffle": True, "repeat": True, "whole_words": True, "seed": 3}
    whole = rows_of(masked(few, bert_tokenizer, **options).take(30))
    tf.random.set_seed(9)
    assert rows_of(masked(few, bert_tokenizer, **options).skip(17).take(13)) == whole[17 * 16 :]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_rate": 0.0}, "mask_rate=0.0"),
        ({"mask_rate": 1.1}, "mask_rate=1.1"),
        ({"mask_fraction": -0.1}, "mask_fraction=-0.1"),
        ({"random_fraction": 0.3}, "mask_fraction=0.8, random_fraction=0.3"),
        ({"sequence_length": 0}, "sequence_length=0"),
        ({"sequence_length": 2}, "room beside the 2 special tokens.*sequence_length=2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shard": (1, 1)}, r"shard=\(1, 1\)"),
        ({"documents": ["", ""]}, "a document must have a token. Received: 2 documents"),
        ({"documents": []}, "at least one document"),
    ],
)
def test_bad_arguments_are_refused(bert_tokenizer, options, message):
    arguments = {"documents": ["the boy"], "sequence_length": 8, "batch_size": 1} | options
    with pytest.raises(ValueError, match=message):
        masked_lm_dataset(tokenizer=bert_tokenizer, **arguments)


def test_a_tokenizer_without_a_mask_token_is_refused():
    tokenizer = train_tokenizer("character", ["abc"])
    with pytest.raises(ValueError, match="must have a mask token"):
        masked_lm_dataset(["abc"], tokenizer, 8, 1)
