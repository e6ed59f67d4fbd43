"""Byte-level BPE with each pre-tokenizer in use, equal to `tokenizers` on texts made to differ."""

import json
import random

import pytest
import tensorflow as tf
import tokenizers
from reference.tokenizer_kinds import BYTE_LEVEL_KINDS, SPECIAL_TOKENS, train_byte_level
from reference.tokenizer_texts import (
    INVALID_BYTES,
    WRITTEN_TEXTS,
    random_bytes,
    random_code_points,
    random_texts,
)

from kerasllm.tokenizers import ByteBPETokenizer, Tokenizer

CORPUS = [*WRITTEN_TEXTS, *random_texts(300, seed=1), *random_code_points(20, seed=2)] * 2
# So that there are merges across every border that a pre-tokenizer may cut at, or not: also between a
# space or a dot and the first bytes of the new digits, which these have in common with their neighbours.
CORPUS += [f"a{c}.{c} {c}{c}1{c}\n{c}" * 10 for c in [*"🙂日éĀ", *map(chr, range(0x11DC0, 0x11DDC))]]
# What the patterns treat in ways of their own, in every order.
PIECES = (
    *(
        "'s",
        "'S",
        "'ſ",
        "'ll",
        "'LL",
        "ab",
        "Ab",
        "AB",
        "aB",
        "ǅ",
        "ʰ",
        "ª",
        "日",
        "か",
        "가",
        "é",
        "e\u0301",
        "\u0301",
    ),
    *(
        "1",
        "12345",
        "²",
        "Ⅷ",
        "१",
        "!",
        "/",
        "//",
        "#x",
        "€",
        "+",
        "~",
        "_",
        "«",
        "\x00",
        "\u200d",
        "🙂",
        "\ue000",
    ),
    *(
        " ",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\r",
        "\t",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\u0085",
        "\x1c",
        "!\n",
        " \n\n",
    ),
    *SPECIAL_TOKENS,
)

# What the pre-tokenizer Digits takes for digits, and regular expressions of an older Unicode do not.
NEW_DIGITS = [*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]


def composed(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(PIECES, k=generator.randrange(1, 12))) for _ in range(count)]


def assert_equal(tokenizer: Tokenizer, reference: tokenizers.Tokenizer, texts: list) -> None:
    raw = [text if isinstance(text, bytes) else text.encode() for text in texts]
    readable = [text.decode("utf-8", errors="replace") for text in raw]
    expected = [e.ids for e in reference.encode_batch(readable, add_special_tokens=False)]
    received = tokenizer.tokenize(tf.constant(raw), parse_special=True).to_list()
    for text, ids, expected_ids in zip(readable, received, expected, strict=True):
        assert ids == expected_ids, f"{text[:200]!a}"


@pytest.mark.parametrize("count", [400, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", BYTE_LEVEL_KINDS)
def test_pre_tokenizer(kind, count):
    reference = train_byte_level(kind, CORPUS)
    tokenizer = Tokenizer.from_json(reference.to_str())
    assert type(tokenizer) is ByteBPETokenizer
    texts = [*composed(count, seed=3), *random_texts(count // 10, seed=4), *random_code_points(50, seed=5)]
    texts += [*WRITTEN_TEXTS, *INVALID_BYTES, *random_bytes(100, seed=6)]
    code_points = [c for c in range(0x3400) if not 0xD800 <= c < 0xE000]
    code_points += [*range(0xA000, 0xAC10), *range(0xF900, 0x10500), *range(0x1D400, 0x1D800, 7)]
    code_points += NEW_DIGITS
    texts += [
        "".join(f"a{chr(c)}.{chr(c)} " for c in code_points[i : i + 64])
        for i in range(0, len(code_points), 64)
    ]
    assert_equal(tokenizer, reference, texts)


def test_normalized_texts_one_by_one():
    """In a batch of many texts there is always one with something to compose."""
    reference = train_byte_level("gpt-neox", CORPUS)
    tokenizer = Tokenizer.from_json(reference.to_str())
    for text in ("\ufb1d", "a\U00016af0b", "e\u0301", "\u0301", "a\u0316\u0301", "\u1100\u1161\u11a8", ""):
        assert_equal(tokenizer, reference, [text])


def change(reference: tokenizers.Tokenizer, **entries) -> str:
    config = json.loads(reference.to_str())
    config["model"] |= entries.pop("model", {})
    return json.dumps(config | entries)


def test_ignore_merges_looks_words_up_first():
    reference = train_byte_level("llama3", ["lower lower newest"] * 3, 400)
    # A word of the vocabulary that no merges lead to.
    config = json.loads(reference.to_str())
    config["model"]["vocab"] |= {"Ġxyz": reference.get_vocab_size()}
    config["added_tokens"] = []
    tokens = sorted(config["model"]["vocab"], key=config["model"]["vocab"].get)
    config["model"]["vocab"] = {
        token: i for i, token in enumerate(t for t in tokens if t not in SPECIAL_TOKENS)
    }
    for ignore_merges in (False, True):
        config["model"]["ignore_merges"] = ignore_merges
        text = json.dumps(config)
        tokenizer = Tokenizer.from_json(text)
        ids = tokenizer.encode("a xyz lower")
        assert ids == tokenizers.Tokenizer.from_str(text).encode("a xyz lower").ids
        assert (tokenizer.token_to_id("Ġxyz") in ids) == ignore_merges


@pytest.mark.parametrize("seed", range(3))
def test_random_merges(seed):
    """Merges that no training would give, of every token with every other."""
    generator = random.Random(seed)
    alphabet = [*"abcĠ"] if seed else tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate(sorted(alphabet))}
    last = dict.fromkeys(vocabulary, -1)
    merges = []
    while len(merges) < 150:
        left, right = generator.choices(sorted(vocabulary), k=2)
        if (left, right) in merges or len(left + right) > 12 or left + right in last:
            continue
        last[left + right] = len(merges)
        merges.append((left, right))
        vocabulary.setdefault(left + right, len(vocabulary))
    reference = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = ["".join(generator.choices("abc ", k=generator.randrange(1, 300))) for _ in range(400)]
    texts += [generator.randbytes(20).decode("utf-8", errors="replace") for _ in range(200)]
    assert_equal(Tokenizer.from_json(reference.to_str()), reference, texts)


SPLIT = {"type": "Split", "pattern": {"Regex": r"\s?\p{L}+"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
REFUSED = {
    "unknown step": (
        {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, BYTES]},
        "'Punctuation'",
    ),
    "unknown pattern": (
        {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": "(a+)+$"}}, BYTES]},
        r"one of those known.*\(a\+\)\+",
    ),
    "string pattern": (
        {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"String": " "}}, BYTES]},
        "one of those known",
    ),
    "pattern of a wrong type": (
        {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": 5}}, BYTES]},
        "one of those known",
    ),
    "behavior": (
        {"type": "Sequence", "pretokenizers": [SPLIT | {"behavior": "Removed"}, BYTES]},
        "`behavior`.*Removed",
    ),
    # Between its matches something is left, which the reference would remove.
    "inverted": (
        {"type": "Sequence", "pretokenizers": [SPLIT | {"behavior": "Removed", "invert": True}, BYTES]},
        "`behavior`.*Removed",
    ),
    "prefix of every piece": (
        {"type": "Sequence", "pretokenizers": [SPLIT, BYTES | {"add_prefix_space": True}]},
        "`add_prefix_space`",
    ),
    "bytes first": ({"type": "Sequence", "pretokenizers": [BYTES, SPLIT]}, "must be of type ByteLevel"),
    "bytes twice": ({"type": "Sequence", "pretokenizers": [BYTES, BYTES]}, "must be of type ByteLevel"),
    "no type": ({"type": "Sequence", "pretokenizers": [{}, BYTES]}, "`type` must be of the type str"),
    "no steps": ({"type": "Sequence"}, "`pretokenizers` must be of the type list"),
    "no object": ([BYTES], "must be an object with a `type`"),
    "wrong type": (BYTES | {"use_regex": "yes"}, "`use_regex` must be of the type bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unknown_is_refused(name):
    pre_tokenizer, message = REFUSED[name]
    reference = train_byte_level("gpt2", ["a"], 257)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_json(change(reference, pre_tokenizer=pre_tokenizer))


def test_an_unk_token_counts_only_where_no_byte_is_lacking():
    reference = train_byte_level("gpt2", ["a"], 257)
    named = change(reference, model={"unk_token": "<|endoftext|>"})
    assert Tokenizer.from_json(named).encode("é") == reference.encode("é").ids
    config = json.loads(named)
    config["model"]["vocab"] = {"<|endoftext|>": 0, "a": 1}
    config["added_tokens"] = []
    with pytest.raises(ValueError, match="must have a token for each byte"):
        Tokenizer.from_json(json.dumps(config))
