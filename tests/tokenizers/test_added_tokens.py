"""Special and plain added tokens, with their options, are found where `tokenizers` finds them."""

import json
import random

import pytest
import tensorflow as tf
import tokenizers
from reference.tokenizer_kinds import train_byte_level

from kerasllm.tokenizers import Tokenizer

BEGINNINGS = ("<a>", "<a")  # The longer one counts.
SPELLINGS = (
    "a>",
    "ab",
    "b",
    "a_1",
    " ",
    "  ",
    "\n",
    " b",
    "<A>",
    "É",
    "é",
    "<|x|>",
    "|x|>",
    ">>",
)
OPTIONS = ("special", "single_word", "lstrip", "rstrip", "normalized")
ALPHABET = [
    "a",
    "b",
    "A",
    "_",
    "1",
    "é",
    "É",
    " ",
    " ",
    "\n",
    "\u00a0",
    "\t",
    "<",
    ">",
    ".",
    "日",
    "\x00",
    "\u2028",
]


@pytest.fixture(scope="module")
def plain() -> tokenizers.Tokenizer:
    return train_byte_level("gpt2", ["a b ab <a> <|x|>"] * 2, 300, special_tokens=[])


def with_added(plain, added, normalizer=None) -> str:
    config = json.loads(plain.to_str())
    first = plain.get_vocab_size()
    vocabulary = plain.get_vocab()
    config["added_tokens"] = []
    for token in added:
        token_id = vocabulary.get(token["content"])
        if token_id is None:
            token_id, first = first, first + 1
        config["added_tokens"].append({"id": token_id} | dict.fromkeys(OPTIONS, False) | token)
    config["normalizer"] = normalizer
    return json.dumps(config)


def assert_equal(text: str, texts: list[str]) -> None:
    reference = tokenizers.Tokenizer.from_str(text)
    tokenizer = Tokenizer.from_json(text)
    for parse_special in (True, False):
        reference.encode_special_tokens = not parse_special
        expected = [e.ids for e in reference.encode_batch(texts, add_special_tokens=False)]
        received = tokenizer.tokenize(tf.constant(texts), parse_special).to_list()
        for one, ids, expected_ids in zip(texts, received, expected, strict=True):
            assert ids == expected_ids, f"{one!a} {parse_special=} {json.loads(text)['added_tokens']}"


@pytest.mark.parametrize("seed", range(6))
def test_random_tokens_with_random_options(plain, seed):
    generator = random.Random(seed)
    added = [
        {"content": spelling} | {name: generator.random() < 0.3 for name in OPTIONS}
        for spelling in (*BEGINNINGS, *generator.sample(SPELLINGS, 5))
    ]
    if any(token["rstrip"] for token in added):
        # The library panics where a token begins among the spaces that went with the one before.
        added = [token for token in added if not token["content"][0].isspace()]
    pieces = [*ALPHABET, *[token["content"] for token in added] * 3]
    texts = ["".join(generator.choice(pieces) for _ in range(generator.randrange(12))) for _ in range(1000)]
    # Lowercase makes two spellings one, which is refused.
    spellings = [t["content"].lower() if t["normalized"] else t["content"] for t in added]
    lowercase = len({(s, t["normalized"]) for s, t in zip(spellings, added, strict=True)}) == len(added)
    normalizer = {"type": "Lowercase"} if seed % 2 and lowercase else None
    assert_equal(with_added(plain, added, normalizer), texts)


def test_mask_of_roberta_takes_the_space_before_it(plain):
    text = with_added(plain, [{"content": "<mask>", "special": True, "lstrip": True, "normalized": False}])
    tokenizer = Tokenizer.from_json(text)
    a, mask, b = tokenizer.encode("a")[0], tokenizer.vocabulary_size - 1, tokenizer.encode(" b")[0]
    assert tokenizer.encode("a \n <mask> b", parse_special=True) == [a, mask, b]
    assert mask not in tokenizer.encode("a \n <mask> b")


def test_plain_added_tokens_count_in_any_text(plain):
    added = [{"content": "<think>", "special": False}, {"content": "<|end|>", "special": True}]
    tokenizer = Tokenizer.from_json(with_added(plain, added))
    think, end = tokenizer.token_to_id("<think>"), tokenizer.token_to_id("<|end|>")
    assert tokenizer.special_tokens == {"<|end|>": end}
    ids = tokenizer.encode("<think><|end|>")
    assert ids[0] == think and end not in ids
    assert tokenizer.encode("<think><|end|>", parse_special=True) == [think, end]
    assert tokenizer.decode([think, end]) == "<think>"
    assert tokenizer.decode([think, end], skip_special_tokens=False) == "<think><|end|>"


def test_the_word_characters_and_spaces_beside_a_token(plain):
    """The library asks another Unicode about them than its regular expressions do."""
    every_character = [chr(c) for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    for option in ("single_word", "rstrip"):
        text = with_added(plain, [{"content": "<x>", "special": True, option: True}])
        reference, tokenizer = tokenizers.Tokenizer.from_str(text), Tokenizer.from_json(text)
        # Many in one text, or it takes long: every token's neighbours are its own.
        texts = [
            "".join(f".<x>{character}" for character in every_character[i : i + 64])
            for i in range(0, len(every_character), 64)
        ]
        expected = [e.ids for e in reference.encode_batch(texts)]
        assert tokenizer.tokenize(tf.constant(texts), parse_special=True).to_list() == expected


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([{"content": ""}], "must not be empty"),
        ([{"content": 5}], "`content` must be of the type str"),
        ([{"content": "x", "special": "yes"}], "`special` must be of the type bool"),
        ([{"content": "x", "id": "7"}], "`id` must be of the type int"),
        ([{"content": "x", "id": True}], "`id` must be of the type int"),
        ([{"content": "x", "id": 10**30}], "expected id"),
        ([{"content": "x", "id": -1}], "expected id"),
        (["x"], "must be an object"),
        ("x", "`added_tokens` must be of the type list"),
    ],
)
def test_damaged_entries_are_refused(plain, added, message):
    config = json.loads(plain.to_str())
    first = plain.get_vocab_size()
    config["added_tokens"] = (
        [{"id": first} | token if isinstance(token, dict) else token for token in added]
        if isinstance(added, list)
        else added
    )
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_json(json.dumps(config))


def test_spellings_that_normalizing_makes_equal_are_refused(plain):
    added = [{"content": "<A>", "normalized": True}, {"content": "<a>", "normalized": True}]
    with pytest.raises(ValueError, match="must differ, also when normalized"):
        Tokenizer.from_json(with_added(plain, added, {"type": "Lowercase"}))
