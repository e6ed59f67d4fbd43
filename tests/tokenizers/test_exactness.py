"""Ids and texts equal those of the `tokenizers` library on every string tried."""

import json
import random
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
import tokenizers
from reference.assets import asset
from reference.tokenizer_corpora import CORPORA, differences, take
from reference.tokenizer_kinds import BYTE_LEVEL_KINDS, train_byte_level
from reference.tokenizer_texts import random_texts, reference_of

from kerasllm.tokenizers import Tokenizer, train_tokenizer


def assert_equal_ids(tokenizer, texts, parse_special=False):
    """Compares the ids of texts (str, or bytes that may be invalid) with the reference's."""
    raw = [text if isinstance(text, bytes) else text.encode() for text in texts]
    reference = reference_of(tokenizer, parse_special)
    decoded = [text.decode("utf-8", errors="replace") for text in raw]
    expected = [e.ids for e in reference.encode_batch(decoded, add_special_tokens=False)]
    received = tokenizer.tokenize(tf.constant(raw), parse_special).to_list()
    assert len(received) == len(expected)
    for text, ids, expected_ids in zip(decoded, received, expected, strict=True):
        assert ids == expected_ids, f"{text[:200]!a}: {ids[:40]} != {expected_ids[:40]}"
    return expected


@pytest.mark.parametrize("parse_special", [False, True])
def test_adversarial_texts_and_invalid_bytes(tokenizer, adversarial, parse_special):
    ids = assert_equal_ids(tokenizer, adversarial, parse_special)
    special_ids = set(tokenizer.special_tokens.values()) - {tokenizer.unk_id}
    assert any(special_ids & set(row) for row in ids) == parse_special


@pytest.mark.parametrize("template", ["a%cb", " %c", "%c\n%c %c"])
def test_every_code_point_of_some_blocks(tokenizer, template):
    blocks = [(0, 0x700), (0x900, 0x980), (0x1680, 0x1690), (0x2000, 0x2200), (0x3000, 0x3100)]
    blocks += [(0xA640, 0xA720), (0xFE00, 0x10080), (0x1D7C0, 0x1D800), (0x1F300, 0x1F400)]
    assert_equal_ids(
        tokenizer,
        [template.replace("%c", chr(c)) for first, end in blocks for c in range(first, end)],
    )


def test_every_code_point():
    """Letters, punctuation and code points in turn: ids show where the words begin and end."""
    code_points = [*range(0xD800), *range(0xE000, 0x33480), *range(0xE0000, 0xE0200)]
    code_points += range(0x33480, sys.maxunicode, 61)  # None is assigned there, but for private use.
    texts = [
        "".join(f"a{chr(c)}." for c in code_points[first : first + 64])
        for first in range(0, len(code_points), 64)
    ]
    for kind, size in (("word", None), ("byte_bpe", 300)):
        assert_equal_ids(train_tokenizer(kind, ["a.aa..aé.a日.a🙂."], size), texts)


@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_decoding(tokenizer, adversarial, skip_special_tokens):
    reference = reference_of(tokenizer, parse_special=True)
    generator = random.Random(6)
    rows = tokenizer.tokenize(tf.constant(adversarial), parse_special=True).to_list()
    # Ids no text has: they cut characters into halves, and some are not in the vocabulary.
    limit = tokenizer.vocabulary_size + 5
    rows += [[generator.randrange(limit) for _ in range(generator.randrange(30))] for _ in range(500)]
    expected = reference.decode_batch(rows, skip_special_tokens=skip_special_tokens)
    assert tokenizer.decode(rows, skip_special_tokens) == expected


@pytest.mark.parametrize("kind", ["word", "character", "byte_bpe"])
def test_round_trip_is_lossless(kind, corpus):
    tokenizer = train_tokenizer(kind, corpus)
    assert tokenizer.decode(tokenizer.tokenize(corpus)) == corpus
    if kind == "byte_bpe":
        unseen = random_texts(200, seed=7)
        assert tokenizer.decode(tokenizer.tokenize(unseen)) == unseen


def test_long_pieces(trained):
    generator = random.Random(8)
    noise = "".join(generator.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(100_000))
    tokenizer = trained["byte_bpe"]
    texts = [
        "a" * 100_000,
        "ab" * 5_000,
        # Windows inside the run have no token in common, those outside do.
        noise[:3000] + "a" * 1001 + noise[:3000] + "b" * 777 + noise[:100],
        noise[:500] + " " + noise[:20] + " " + noise[:129] + " " + noise[:128] + "!" * 1000,
        "日本語" * 5_000,
        "".join(chr(generator.randrange(0x4E00, 0x9FFF)) for _ in range(3_000)),
    ]
    reference = reference_of(tokenizer, parse_special=False)
    assert tokenizer.encode(texts) == [e.ids for e in reference.encode_batch(texts)]
    start = time.process_time()
    ids = tokenizer.encode(noise)
    # A merge loop over the whole word takes several times as long as this allows.
    assert time.process_time() - start < 3
    assert ids == reference.encode(noise).ids


@pytest.mark.parametrize("seed", range(4))
def test_overlapping_merges(seed):
    """Words of two letters: every pair overlaps with itself or another, windows hardly agree."""
    generator = random.Random(seed)

    def word(longest):
        return "".join(generator.choices("ab", [1 + seed, 1], k=generator.randrange(1, longest)))

    tokenizer = train_tokenizer("byte_bpe", [word(300) for _ in range(50)], 257 + 20 * seed + 3)
    assert_equal_ids(tokenizer, [word(600) for _ in range(300)])


def test_bytes_without_a_token_are_dropped(trained):
    config = json.loads(trained["byte_bpe"].to_json())
    merged = {token for merge in config["model"]["merges"] for token in merge}
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    missing = set(alphabet) - merged
    assert missing
    kept = [token for token in config["model"]["vocab"] if token not in missing]
    config["model"]["vocab"] = {token: token_id for token_id, token in enumerate(kept)}
    tokenizer = Tokenizer.from_json(json.dumps(config))
    assert tokenizer.vocabulary_size == trained["byte_bpe"].vocabulary_size - len(missing)
    texts = [*random_texts(200, seed=9), "".join(map(chr, range(256))) * 3]
    texts += [chr(code_point) * 300 for code_point in range(128)]  # Long ones may become empty.
    assert_equal_ids(tokenizer, texts)


def test_special_tokens_that_merging_leads_to():
    """The model then has the special token's id for plain text as well."""
    texts = ["the then there"] * 3
    tokenizer = train_tokenizer("byte_bpe", texts, 270, special_tokens=["the", " the", "e", "zz"])
    texts += ["the the", "zz z z", "bathe the", "e"]
    for parse_special in (False, True):
        ids = assert_equal_ids(tokenizer, texts, parse_special)
        expected = reference_of(tokenizer, parse_special).decode_batch(ids)
        assert tokenizer.decode(ids) == expected


def test_longest_special_token_wins(trained):
    tokenizer = trained["byte_bpe"]
    assert tokenizer.encode("<|user|>!", parse_special=True) == [tokenizer.token_to_id("<|user|>!")]
    assert len(tokenizer.encode("<|user|>!")) > 1


def test_empty_batches_and_rows(tokenizer):
    assert tokenizer.tokenize(tf.constant([], tf.string)).to_list() == []
    assert tokenizer.tokenize(tf.constant(["", "a", ""])).row_lengths().numpy().tolist() == [0, 1, 0]
    assert tokenizer.encode([]) == [] and tokenizer.encode("") == [] and tokenizer.encode([""]) == [[]]
    assert tokenizer.detokenize(tf.zeros([0, 3], tf.int32)).shape == [0]
    assert tokenizer.decode([]) == "" and tokenizer.decode([[]]) == [""]


def test_decode_takes_lists_arrays_and_ragged_tensors(tokenizer):
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert tokenizer.decode([a, b]) == "ab"
    assert tokenizer.decode(np.array([a, b], np.int32)) == "ab"
    assert tokenizer.decode([[a], [a, b]]) == ["a", "ab"]
    assert tokenizer.decode(np.array([[a, b], [b, -1]])) == ["ab", "b"]
    assert tokenizer.decode(tf.constant([[a, b]])) == ["ab"]
    assert tokenizer.decode(tf.ragged.constant([[a], [b, a]])) == ["a", "ba"]


def test_dense_ids_may_be_padded(tokenizer):
    ids = tokenizer.tokenize(tf.constant(["a", "b a"]))
    dense = tokenizer.detokenize(ids.to_tensor(-1))
    assert dense.numpy().tolist() == tokenizer.detokenize(ids).numpy().tolist() == [b"a", b"b a"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_corpora(kind):
    """A vocabulary of each kind on a megabyte of each corpus; tools/benchmark_tokenizers has more."""
    for name in ("moby", "sotu", "spam"):
        asset(name)
    texts = [text.decode() for text in take(CORPORA["moby"](), 1_000_000)]
    reference = train_byte_level(kind, texts, 8000)
    tokenizer = Tokenizer.from_json(reference.to_str())
    for name, corpus in CORPORA.items():
        assert differences(tokenizer, reference, take(corpus(), 1_000_000)) == [], name
