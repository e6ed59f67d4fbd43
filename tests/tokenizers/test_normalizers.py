"""The normalizers in the graph do what those of the `tokenizers` library do."""

import base64
import importlib.machinery
import importlib.util
import itertools
import json
import random
import struct

import pytest
import tensorflow as tf
import tokenizers
from reference.tokenizer_texts import WRITTEN_TEXTS, random_code_points, random_texts
from tokenizers import normalizers

from kerasllm.tokenizers.code_points import unicode_tables
from kerasllm.tokenizers.normalizers import build_normalizer
from kerasllm.tokenizers.precompiled import read_rules

DOUBLE_SPACES = normalizers.Replace(tokenizers.Regex(" {2,}"), "▁")


@pytest.fixture(scope="module")
def charsmap(pytestconfig):
    """The function that compiles rules, from the tool that makes the tables."""
    path = str(pytestconfig.rootpath / "tools" / "make_unicode_tables")
    loader = importlib.machinery.SourceFileLoader("make_unicode_tables", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module.charsmap


def alphabets() -> list[list[str]]:
    """Groups of characters that combine, within a group or with others."""
    tables = unicode_tables()
    ranges = [tables[name] for name in tables if name.startswith(("grapheme", "pictographic", "conjunct"))]
    ranges += [[pair for pairs in tables["combining_class"].values() for pair in pairs]]
    groups = [[chr(c) for first, last in pairs for c in range(first, last + 1)] for pairs in ranges]
    for name in ("decomposition", "compatibility_decomposition", "lowercase"):
        groups.append([chr(int(key, 16)) for key in tables[name]])
    groups += [[pair[0] for pair in tables["composition"]], [pair[1] for pair in tables["composition"]]]
    groups.append(
        [chr(c) for c in (*range(0x1100, 0x1200), *range(0xA960, 0xA97D), *range(0xAC00, 0xAC40))]
    )
    groups.append([*"aeo ™℡ﬁ①☎©®‼\r\n\0\u0958\u0915\u094d\u200d가각\u0344Å\u212b\u00a0\u3000\u1e9b\u0323"])
    return [[character for character in group if not 0xD800 <= ord(character) < 0xE000] for group in groups]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = random.Random(1)
    groups = alphabets()
    texts = [*WRITTEN_TEXTS, *random_texts(200, seed=2), *random_code_points(100, seed=3)]
    for longest, count in ((8, 4000), (60, 300)):
        for _ in range(count):
            some = generator.sample(groups, 3)
            length = generator.randrange(1, longest)
            texts.append("".join(generator.choice(generator.choice(some)) for _ in range(length)))
    return [*texts, "a" + "\u0301\u0323" * 2000]


NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFD": normalizers.NFD(),
    "NFKC": normalizers.NFKC(),
    "NFKD": normalizers.NFKD(),
    "Lowercase": normalizers.Lowercase(),
    "StripAccents": normalizers.StripAccents(),
    "Nmt": normalizers.Nmt(),
    "Strip": normalizers.Strip(),
    "T5": normalizers.Sequence([normalizers.Strip(left=False, right=True), DOUBLE_SPACES]),
    "Llama": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    "ALBERT": normalizers.Sequence(
        [
            normalizers.Replace("``", "\\1"),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
        ]
    ),
}


def assert_same(normalizer: normalizers.Normalizer, texts: list[str]) -> None:
    rewrite = tf.function(build_normalizer(json.loads(normalizer.__getstate__())), autograph=False)
    received = rewrite(tf.constant([text.encode() for text in texts])).numpy()
    changed = 0
    for text, result in zip(texts, received, strict=True):
        expected = normalizer.normalize_str(text)
        changed += expected != text
        assert result.decode() == expected, ascii(text[:100])
    assert changed


@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_normalizers(name, texts):
    assert_same(NORMALIZERS[name], texts)


@pytest.mark.parametrize("seed", range(3))
def test_compiled_rules(seed, texts, charsmap):
    """Rules for single characters, some of which begin longer ones, and for letters with marks."""
    generator = random.Random(seed)
    groups = alphabets()
    rules = {}
    for _ in range(500):
        length = generator.choice([1, 1, 1, 2, 2, 3])
        text = "".join(generator.choice(generator.choice(groups)) for _ in range(length))
        if "\0" not in text:
            rules[text] = generator.choice(["", "x", "yz", " ", "\u0301", "日"])
    assert_same(normalizers.Precompiled(charsmap(rules)), texts)


def test_rules_and_joined_pictures_and_consonants(charsmap):
    """All strings of some characters; a mark after a replaced one shows where graphemes begin."""
    rules = dict.fromkeys("\N{TRADE MARK SIGN}\N{DEVANAGARI LETTER QA}", ".")
    some = "x\N{BLACK TELEPHONE}\N{DEVANAGARI LETTER KA}\N{DEVANAGARI SIGN VIRAMA}\u200d\u0301" + "".join(
        rules
    )
    strings = [
        "".join(letters) for length in range(1, 6) for letters in itertools.product(some, repeat=length)
    ]
    assert_same(normalizers.Precompiled(charsmap(rules)), strings)


def test_rules_are_read_back(charsmap):
    rules = {"a": "b", "é": "", "日本": "x", "abc": "never used"}
    content = charsmap(rules)
    assert read_rules(base64.b64encode(content).decode()) == {"a": "b", "é": ""}


def test_damaged_rules(charsmap):
    content = charsmap({"a": "b", "é": "c", "日": "d"})
    for damaged in (b"", b"\0\0\0\0", b"\xff" * 8, content[:100], content[:-7] + b"\xff" * 7):
        with pytest.raises(ValueError, match="precompiled_charsmap"):
            read_rules(base64.b64encode(damaged).decode())
    # Each of 255 bytes leads back to the root: 255 ** 5 ways through the trie.
    loops = struct.pack("<I256I", 1024, *[byte | byte << 10 for byte in range(256)])
    with pytest.raises(ValueError, match="loop"):
        read_rules(base64.b64encode(loops).decode())
    with pytest.raises(ValueError, match="Base64"):
        read_rules("no base64!")


def test_rules_must_not_fill_the_memory(charsmap):
    rules = {"a": "b" * 256, "é": "c"}
    assert read_rules(base64.b64encode(charsmap(rules)).decode()) == rules
    rules["a"] += "b"
    with pytest.raises(ValueError, match="more than 256 bytes"):
        read_rules(base64.b64encode(charsmap(rules)).decode())
    # Each of 127 bytes leads to the same node, where each of them ends a rule: 16,129 of 256 units.
    root = [0, *(byte | (128 ^ byte) << 10 for byte in range(1, 128))]
    units = [*root, *(byte | 1 << 8 for byte in range(128))]
    shared = struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + bytes(1024)
    with pytest.raises(ValueError, match="loop"):
        read_rules(base64.b64encode(shared).decode())


def test_rules_of_noise_end_in_an_error_or_rules(charsmap):
    content = bytearray(charsmap({"a": "b", "é": "c", "日": "d"}))
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(4):
            # Mostly where something is; the rest of the trie is empty.
            used = [i for i, byte in enumerate(content) if byte]
            damaged[generator.choice(used)] = generator.randrange(256)
        try:
            read_rules(base64.b64encode(damaged).decode())
        except ValueError as error:
            assert "precompiled_charsmap" in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    "config, message",
    [
        ({"type": "Precompiled"}, "precompiled_charsmap"),
        ({"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""}, "pattern"),
        ({"type": "Replace", "pattern": {"String": ""}, "content": ""}, "pattern"),
        ({"type": "Strip", "strip_left": "yes", "strip_right": False}, "strip_left"),
        ({"type": "Prepend", "prepend": 3}, "prepend"),
        ({"type": "Sequence", "normalizers": {"type": "NFC"}}, "normalizers"),
        ({"type": "ByteLevel"}, "must be made of"),
        ({"type": []}, "type"),
        ("NFC", "must be an object"),
    ],
)
def test_unsupported(config, message):
    with pytest.raises(ValueError, match=message):
        build_normalizer(config)
