"""WordPiece: ids and texts equal those of the `tokenizers` library."""

import json
import random
import subprocess
import sys

import pytest
import tokenizers
from reference.assets import asset
from reference.tokenizer_checks import assert_same_ids, assert_same_in_graphs, assert_same_texts
from reference.tokenizer_texts import (
    INVALID_BYTES,
    WRITTEN_TEXTS,
    random_bytes,
    random_code_points,
    random_texts,
)
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from kerasllm.tokenizers import Tokenizer, WordPieceTokenizer

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NORMALIZERS = {
    "uncased": {},
    "cased": {"lowercase": False},
    "cased, Chinese in words": {"lowercase": False, "strip_accents": True, "handle_chinese_chars": False},
    "with accents and control characters": {"strip_accents": False, "clean_text": False},
}
# Marks that do and do not move past each other, and letters that hold some.
MARKS = "aéA가각\u1100\u1161\u11a8\u200d\u0301\u0316\u0334\u0345\u302e\u302f\u0323\u05b0\u3099\u0902"
MARKS += "\u1baa\U0001d165\U0001d16d"


def trained(size: int = 1200, **normalizer) -> str:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    texts = [*WRITTEN_TEXTS, *random_texts(300, seed=1), *random_code_points(20, seed=2)]
    tokenizer.train_from_iterator(texts * 2, trainer)
    return tokenizer.to_str()


@pytest.fixture(scope="module", params=list(NORMALIZERS))
def tokenizer(request) -> Tokenizer:
    return Tokenizer.from_json(trained(**NORMALIZERS[request.param]))


@pytest.fixture(scope="module")
def uncased() -> Tokenizer:
    return Tokenizer.from_json(trained())


@pytest.fixture(scope="module")
def texts() -> list[bytes]:
    generator = random.Random(3)
    marks = ["".join(generator.choices(MARKS, k=generator.randrange(1, 12))) for _ in range(300)]
    special = ["[CLS]a[SEP]", "[MASK] [MASK]x", "[UNK][unk]", "##a a##b # #", "[PAD"]
    texts = [*WRITTEN_TEXTS, *random_texts(300, seed=4), *random_code_points(40, seed=5), *marks, *special]
    return [text.encode() for text in texts] + INVALID_BYTES + random_bytes(60, seed=6)


def long_words() -> list[str]:
    """Words about as long as max_input_chars_per_word, in characters of one to four bytes."""
    words = [letter * length for letter in "aé日😀ſ" for length in (99, 100, 101, 400)]
    return [
        *words,
        "aé" * 50,
        "aé" * 51,
        "a" * 100_000,
        "e" + "\u0301" * 30_000,
        ". " * 20_000,
        "\n" * 9_000 + "x",
    ]


def test_ids(tokenizer, texts):
    assert isinstance(tokenizer, WordPieceTokenizer)
    for parse_special in (False, True):
        ids = assert_same_ids(tokenizer, texts, parse_special)
        assert any(tokenizer.token_to_id("[MASK]") in row for row in ids) == parse_special
    assert_same_ids(tokenizer, long_words())


def test_decoding(uncased, texts):
    rows = uncased.tokenize(texts).to_list()
    assert_same_texts(uncased, rows)
    cleaned = ["do not", "can ' t", "a . b", "n't", "isn't", "he ' s"]
    assert_same_texts(uncased, uncased.encode(cleaned))
    config = json.loads(uncased.to_json())
    config["decoder"] = {"type": "WordPiece", "prefix": "#", "cleanup": False}
    assert_same_texts(Tokenizer.from_json(json.dumps(config)), rows)


def test_in_graphs(uncased, texts, tmp_path):
    assert_same_in_graphs(uncased, texts[:150], tmp_path)


@pytest.mark.parametrize("template", ["a%cb", "%c"])
def test_every_code_point(uncased, template):
    code_points = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 97)]
    parts = [template.replace("%c", chr(c)) for c in code_points]
    assert_same_ids(uncased, [" ".join(parts[i : i + 64]) for i in range(0, len(parts), 64)])


@pytest.mark.parametrize("seed", range(3))
def test_random_vocabularies(seed):
    """Words of few letters and tokens of any kind: a part may be missing anywhere in a word."""
    generator = random.Random(seed)

    def word(longest: int) -> str:
        return "".join(generator.choices("abé", k=generator.randrange(1, longest)))

    prefix = ("##", "", "a")[seed]
    tokens = {
        "[UNK]",
        *(word(5) for _ in range(20)),
        *(prefix + word(5) for _ in range(20 + 60 * (seed > 0))),
    }
    config = {
        "normalizer": None,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": prefix, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": prefix,
            "max_input_chars_per_word": 30,
            "vocab": {token: i for i, token in enumerate(sorted(tokens))},
        },
    }
    tokenizer = Tokenizer.from_json(json.dumps(config))
    ids = assert_same_ids(tokenizer, [" ".join(word(12) for _ in range(20)) + word(60) for _ in range(200)])
    assert any(tokenizer.unk_id in row for row in ids)
    assert any(set(row) - {tokenizer.unk_id} for row in ids)


def test_vocabulary_of_a_folder(tmp_path, uncased, texts):
    tokens = [uncased.id_to_token(i) for i in range(uncased.vocabulary_size)]
    tmp_path.joinpath("vocab.txt").write_text("\n".join([*tokens, ""]), encoding="utf-8", newline="\n")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.tokenize(texts).to_list() == uncased.tokenize(texts).to_list()
    assert tokenizer.special_tokens == {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    assert (tokenizer.unk_token, tokenizer.mask_token) == ("[UNK]", "[MASK]")

    tmp_path.joinpath("tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = Tokenizer.from_folder(tmp_path)
    assert_same_ids(cased, ["Ab ÀB é"])
    assert cased.encode("AB") != tokenizer.encode("AB")


def test_added_tokens_of_a_folder(tmp_path):
    tokens = [*SPECIAL_TOKENS, "hello", "foo", "##bar"]
    ids = {token: i for i, token in enumerate([*tokens, "FooBar", "<new>", "<end>"])}
    tmp_path.joinpath("vocab.txt").write_text("\n".join(tokens))
    added = {name: ids[name] for name in ("FooBar", "<new>", "<end>")}
    tmp_path.joinpath("added_tokens.json").write_text(json.dumps(added))
    tmp_path.joinpath("tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    tokenizer = Tokenizer.from_folder(tmp_path)
    # As transformers: what has no part in the text's structure is found in normalised text too.
    assert tokenizer.encode("foobar<NEW> hello") == [ids[t] for t in ("FooBar", "<new>", "hello")]
    assert tokenizer.eos_id == ids["<end>"] and "<new>" not in tokenizer.special_tokens
    assert ids["<end>"] not in tokenizer.encode("<end>")


@pytest.mark.parametrize(
    "lines, message",
    [
        ("[UNK]\n[CLS]\n[SEP]\na\na\n", "must differ. Received: several of \\['a'\\]"),
        ("[UNK]\n[CLS]\n", "must hold \\['sep_token'\\]"),
        ("", "must hold \\['unk_token', 'sep_token', 'cls_token'\\]"),
    ],
)
def test_bad_vocabularies(tmp_path, lines, message):
    tmp_path.joinpath("vocab.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "part, entries, message",
    [
        ("model", {"unk_token": "[none]"}, "unk_token"),
        ("model", {"unk_token": None}, "must have an `unk_token`"),
        ("model", {"continuing_subword_prefix": 3}, "continuing_subword_prefix"),
        ("model", {"max_input_chars_per_word": "100"}, "max_input_chars_per_word"),
        ("model", {"max_input_chars_per_word": 10**30}, "max_input_chars_per_word"),
        ("model", {"max_input_chars_per_word": -1}, "max_input_chars_per_word"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer"),
        ("normalizer", {"type": "BertNormalizer", "lowercase": 1}, "lowercase"),
        ("normalizer", {"type": "Bert"}, "must be made of"),
        ("decoder", {"prefix": 1}, "prefix"),
    ],
)
def test_unsupported_parts(uncased, part, entries, message):
    config = json.loads(uncased.to_json())
    config[part] |= entries
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_json(json.dumps(config))


@pytest.mark.slow
def test_tables_are_up_to_date(pytestconfig):
    tool = pytestconfig.rootpath / "tools" / "make_unicode_tables"
    subprocess.run([sys.executable, tool, "--check"], check=True)


@pytest.mark.slow
def test_real_vocabulary_on_real_texts():
    tokenizer = Tokenizer.from_folder(asset("minilm"))
    texts = [asset(name).read_text(encoding="utf-8") for name in ("moby", "sotu", "botchan")]
    mails = asset("spam").read_text(encoding="utf-8").splitlines()
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert_same_ids(tokenizer, paragraphs)
    assert_same_ids(tokenizer, mails)
    code_points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for template in ("a%cb", "%c", "%ca %c", ".%c"):
        parts = [template.replace("%c", character) for character in code_points]
        assert_same_ids(tokenizer, ["|".join(parts[i : i + 64]) for i in range(0, len(parts), 64)])
