"""SentencePiece's BPE and unigram models: ids and texts equal those of the `tokenizers` library."""

import io
import json
import random

import pytest
import sentencepiece
import tokenizers
from reference.assets import asset
from reference.tokenizer_checks import (
    assert_same_ids,
    assert_same_in_graphs,
    assert_same_texts,
    reference_for,
)
from reference.tokenizer_texts import (
    INVALID_BYTES,
    WRITTEN_TEXTS,
    random_bytes,
    random_code_points,
    random_texts,
)
from sentencepiece import sentencepiece_model_pb2

from kerasllm.tokenizers import SentencePieceBPETokenizer, Tokenizer, UnigramTokenizer
from kerasllm.tokenizers.merging import live_merges
from kerasllm.tokenizers.sentencepiece_model import json_from_model
from kerasllm.tokenizers.unigram import _float_of_serde

WORDS = "the whale swam then there and these other old men sang of harpoons, wearing 100 warm, worn coats."
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
WHITESPACE_SPLIT = {"type": "WhitespaceSplit"}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def metaspace(scheme: str, split: bool) -> dict:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def sequence(*steps: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": [*steps]}


def trained_model(kind: str, lines: list[str] | None = None, **options) -> bytes:
    model = io.BytesIO()
    generator = random.Random(1)
    words = WORDS.split()
    if lines is None:
        lines = [" ".join(generator.choices(words, k=20)) for _ in range(400)]
        lines += [*WRITTEN_TEXTS, *random_texts(300, seed=1)]
        lines = [line.replace("\n", " ").replace("\0", "") for line in lines]
    settings = {
        "vocab_size": 700,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, **settings | options
    )
    return model.getvalue()


def save(folder, model: bytes, **settings) -> None:
    folder.joinpath("tokenizer.model").write_bytes(model)
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def models_trained(tmp_path_factory) -> dict[str, tuple[bytes, str]]:
    """Kind -> model, and the tokenizer.json made from it."""
    trained = {}
    for kind, options in {"bpe": {}, "unigram": {"normalization_rule_name": "nmt_nfkc"}}.items():
        folder = tmp_path_factory.mktemp(kind)
        model = trained_model(kind, **options)
        save(folder, model)
        trained[kind] = model, Tokenizer.from_folder(folder).to_json()
    return trained


@pytest.fixture(scope="module")
def made(models_trained) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.from_json(text) for kind, (_, text) in models_trained.items()}


@pytest.fixture(scope="module")
def texts() -> list[bytes]:
    generator = random.Random(3)
    parts = ["▁", " ", "a", "th", "e", "é", "\n", "<s>", "<unk>", "<0x41>", "Q日", "\u0301", "00", "1", "ﬁ"]
    mixed = ["".join(generator.choices(parts, k=generator.randrange(1, 25))) for _ in range(250)]
    texts = [*WRITTEN_TEXTS, *random_texts(150, seed=4), *random_code_points(30, seed=5), *mixed, WORDS * 3]
    return [text.encode() for text in texts] + INVALID_BYTES + random_bytes(60, seed=6)


def with_parts(text: str, model: dict | None = None, **parts) -> Tokenizer:
    config = json.loads(text) | parts
    config["model"] |= model or {}
    return Tokenizer.from_json(json.dumps(config))


def default_and_slow(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in names]


BPE_PARTS = {
    "Llama 2": {
        "normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]},
        "pre_tokenizer": None,
    },
    "first": {"normalizer": None, "pre_tokenizer": metaspace("first", False)},
    "always, split": {"normalizer": None, "pre_tokenizer": metaspace("always", True)},
    "Gemma": {"normalizer": REPLACE, "pre_tokenizer": SPLIT},
    "unknown": {"normalizer": REPLACE, "model": {"byte_fallback": False}},
    "unknown, each": {"normalizer": REPLACE, "model": {"byte_fallback": False, "fuse_unk": False}},
    "dropped": {"normalizer": REPLACE, "model": {"byte_fallback": False, "unk_token": None}},
    "merges ignored": {"normalizer": REPLACE, "pre_tokenizer": SPLIT, "model": {"ignore_merges": True}},
}


@pytest.mark.parametrize("name", default_and_slow(BPE_PARTS, slow=("always, split", "unknown, each")))
def test_bpe(name, models_trained, texts):
    tokenizer = with_parts(models_trained["bpe"][1], **BPE_PARTS[name])
    assert isinstance(tokenizer, SentencePieceBPETokenizer)
    for parse_special in (False, True) if name == "first" else (False,):
        ids = assert_same_ids(tokenizer, texts, parse_special)
    assert_same_ids(tokenizer, ["the" * 700, " " * 3000, "▁" * 999 + "x", "日本" * 400, "ab cd" * 300])
    if name == "first":
        assert_same_texts(tokenizer, ids)


UNIGRAM_PARTS = {
    "T5": {"pre_tokenizer": sequence(WHITESPACE_SPLIT, metaspace("always", True))},
    "no marks": {"pre_tokenizer": sequence(WHITESPACE_SPLIT, metaspace("never", True))},
    "first": {"pre_tokenizer": metaspace("first", True), "model": {"byte_fallback": False}},
    "whole texts": {"normalizer": None, "pre_tokenizer": metaspace("always", False)},
}


@pytest.mark.parametrize("name", default_and_slow(UNIGRAM_PARTS, slow=("no marks",)))
def test_unigram(name, models_trained, texts):
    tokenizer = with_parts(models_trained["unigram"][1], **UNIGRAM_PARTS[name])
    assert isinstance(tokenizer, UnigramTokenizer)
    ids = assert_same_ids(tokenizer, texts, parse_special=name == "first")
    assert_same_ids(tokenizer, ["the" * 700, " " * 3000, "▁" * 999 + "x", "日本" * 400, "ab cd" * 300])
    if name == "T5":
        assert_same_texts(tokenizer, ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_in_graphs(kind, made, texts, tmp_path):
    assert_same_in_graphs(made[kind], texts[:150], tmp_path)


@pytest.mark.parametrize("seed", range(2))
def test_unigram_with_ties(seed):
    """Few different scores, so that ways to cut a word are as likely, or nearly; some letters unknown."""
    generator = random.Random(seed)

    def word(longest: int) -> str:
        return "".join(generator.choices("abcé", k=generator.randrange(1, longest)))

    tokens = sorted({word(5) for _ in range(60)} - {"c", "é"}) + ["<0xC3>", "<0xA9>"]
    scores = [
        -generator.choice([1.1, 2.2, 3.3000000000000003, 0.1, 0.2, 0.30000000000000004]) for _ in tokens
    ]
    vocabulary = [["<unk>", 0.0], *map(list, zip(tokens, scores, strict=True))]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": seed == 1}
    tokenizer = Tokenizer.from_json(json.dumps({"added_tokens": [], "model": model}))
    ids = assert_same_ids(tokenizer, [word(30) for _ in range(1000)] + [word(300)])
    assert any(0 in row for row in ids)


@pytest.mark.parametrize("seed", range(2))
def test_bpe_of_random_merges(seed):
    """Every way to cut a token in two is a merge, as in converted models."""
    generator = random.Random(seed)
    tokens = ["a", "b", "▁"]
    while len(tokens) < 40:
        token = generator.choice(tokens) + generator.choice(tokens)
        if token not in tokens:
            tokens.append(token)
    merges = [
        [token[:i], token[i:]]
        for token in tokens
        for i in range(1, len(token))
        if token[:i] in tokens and token[i:] in tokens
    ]
    ids = {token: i for i, token in enumerate(["<unk>", *tokens])}
    model = {"type": "BPE", "vocab": ids, "merges": merges, "unk_token": "<unk>", "fuse_unk": True}
    tokenizer = Tokenizer.from_json(json.dumps({"added_tokens": [], "model": model}))
    texts = ["".join(generator.choices("aaab▁c", k=generator.randrange(1, 300))) for _ in range(300)]
    assert_same_ids(tokenizer, texts)


def test_live_merges_are_those_that_happen():
    ids = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    merges = [("b", "c"), ("a", "bc"), ("ab", "c"), ("a", "b")]
    symbols = {token: [ids[character] for character in token] for token in ids}
    assert live_merges(merges, ids, symbols) == [("b", "c"), ("a", "bc"), ("a", "b")]


def test_scores_are_parsed_as_the_library_does():
    generator = random.Random(0)
    literals = [repr(-generator.random() * 10 ** generator.randrange(-12, 4)) for _ in range(3000)]
    literals += [
        "1e22",
        "-1.5E-7",
        "0.1234567890123456789012345",
        "12345678901234567890123.5",
        "-1e-310",
        "-0.0",
    ]
    vocabulary = ",".join(f'["{i}",{literal}]' for i, literal in enumerate(literals))
    text = f'{{"added_tokens":[],"model":{{"type":"Unigram","unk_id":0,"vocab":[{vocabulary}]}}}}'
    model = json.loads(tokenizers.Tokenizer.from_str(text).to_str())["model"]
    parsed = [_float_of_serde(literal) for literal in literals]
    assert parsed == [score for _, score in model["vocab"]]
    assert parsed != [float(literal) for literal in literals]


def test_long_words(made):
    generator = random.Random(8)
    noise = "".join(generator.choice("abcdefgh") for _ in range(4_000))
    for kind in ("bpe", "unigram"):
        assert_same_ids(made[kind], [noise, "a" * 2_000])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_of_the_sentencepiece_package(kind, models_trained, made):
    model, tokenizer = models_trained[kind][0], made[kind]
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [WORDS, "  two  spaces ", "the 100 whales", "日本 é ñ", "a\nb", *random_texts(100, seed=9)]
    equal = [
        ids == processor.encode(text) for text, ids in zip(texts, tokenizer.encode(texts), strict=True)
    ]
    # Of what differs with a unigram model, see `json_from_model`.
    assert all(equal[:1] + equal[2:5]) and sum(equal) > len(equal) * (0.99 if kind == "bpe" else 0.8)


def test_model_of_a_class(tmp_path, models_trained):
    model = trained_model("unigram", unk_id=2, eos_id=1, pad_id=0, bos_id=-1, byte_fallback=False)
    save(tmp_path, model, tokenizer_class="T5Tokenizer")
    t5 = Tokenizer.from_folder(tmp_path)
    assert (t5.pad_id, t5.eos_id, t5.unk_id) == (0, 1, 2)
    assert t5.token_to_id("<extra_id_0>") == t5.vocabulary_size - 1
    assert reference_for(t5).encode("the whale").ids[-1] == t5.eos_id
    save(tmp_path, models_trained["bpe"][0], tokenizer_class="LlamaTokenizer")
    llama = Tokenizer.from_folder(tmp_path)
    assert reference_for(llama).encode("the whale").ids[0] == llama.bos_id
    assert llama.decode(llama.encode("the whale")) == "the whale"
    save(tmp_path, model, tokenizer_class="AlbertTokenizer")
    with pytest.raises(ValueError, match="tokenizer_class"):
        Tokenizer.from_folder(tmp_path)


def damaged_models(model: bytes):
    yield b"", "must have tokens"
    yield model[: len(model) // 2], "must be readable|must have tokens|unk_id|precompiled"
    yield b"\xff" * 100, "must be readable"
    yield model.replace("▁the".encode(), b"\xff\xfe\xffthe"), "must be UTF-8|must be readable"
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.trainer_spec.model_type = 4
    yield proto.SerializeToString(), "must be unigram"
    proto.trainer_spec.model_type = 1
    proto.trainer_spec.unk_id = 1 << 30
    yield proto.SerializeToString(), "unk_id"
    proto.trainer_spec.unk_id = 0
    proto.pieces[5].piece = proto.pieces[6].piece
    yield proto.SerializeToString(), "must differ"
    proto.pieces[5].piece = "a" * 1025
    yield proto.SerializeToString(), "up to 1024 characters.*one of 1025"
    proto.pieces[5].piece = "other"
    proto.normalizer_spec.precompiled_charsmap = b"\xff\xff\xff\x7f1234"
    yield proto.SerializeToString(), "precompiled_charsmap"


def test_damaged_models(tmp_path, models_trained):
    for content, message in damaged_models(models_trained["bpe"][0]):
        save(tmp_path, content)
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("count", [-1, 10_001, 1 << 60])
def test_too_many_extra_ids(count, tmp_path, models_trained):
    save(tmp_path, models_trained["unigram"][0], tokenizer_class="T5Tokenizer", extra_ids=count)
    with pytest.raises(ValueError, match="`extra_ids` must be from 0 to 10000"):
        Tokenizer.from_folder(tmp_path)


def test_too_many_merges():
    """Each token can be made of any two that are shorter: their number grows with its square."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained_model("bpe"))
    for length in range(2, 800):
        proto.pieces.add(piece="q" * length, score=-length)
    with pytest.raises(ValueError, match="made by up to 32 merges"):
        json_from_model(proto.SerializeToString(), {})


@pytest.mark.parametrize(
    "kind, model, parts, message",
    [
        ("bpe", {"continuing_subword_prefix": "##"}, {}, "continuing_subword_prefix"),
        ("bpe", {"merges": [["a"]]}, {}, "pair of tokens"),
        ("bpe", {"merges": [3]}, {}, "pair of tokens"),
        ("bpe", {"merges": [["<0x41>", "<0x42>"]]}, {}, "in the vocabulary|must not be a byte"),
        ("bpe", {"byte_fallback": "yes"}, {}, "byte_fallback"),
        ("bpe", {}, {"pre_tokenizer": metaspace("sometimes", True)}, "prepend_scheme"),
        ("bpe", {}, {"pre_tokenizer": metaspace("first", True) | {"replacement": "▁▁"}}, "replacement"),
        ("bpe", {}, {"pre_tokenizer": SPLIT | {"behavior": "Isolated"}}, "pre_tokenizer"),
        ("unigram", {"unk_id": None}, {}, "unk_id"),
        ("unigram", {"unk_id": 1 << 40}, {}, "unk_id"),
        ("unigram", {"vocab": [["a"]]}, {}, "pairs of a token and its score"),
        ("unigram", {"vocab": [["a", float("nan")]]}, {}, "finite scores"),
        ("unigram", {"vocab": [["a", 10**400]]}, {}, "finite scores"),
        ("unigram", {"vocab": [["a", True]]}, {}, "finite scores"),
        ("unigram", {"vocab": [["a", 0.0], ["a", 1.0]]}, {}, "must differ"),
        ("unigram", {}, {"pre_tokenizer": sequence(WHITESPACE_SPLIT, metaspace("first", True))}, "first"),
    ],
)
def test_unsupported_parts(kind, model, parts, message, models_trained):
    with pytest.raises(ValueError, match=message):
        with_parts(models_trained[kind][1], model, added_tokens=[], **parts)


def test_some_byte_tokens_missing(models_trained):
    config = json.loads(models_trained["bpe"][1])
    vocabulary = config["model"]["vocab"]
    vocabulary["other"] = vocabulary.pop("<0xE9>")
    with pytest.raises(ValueError, match=r"no tokens for the bytes \[233\]"):
        Tokenizer.from_json(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_real_texts(kind, tmp_path):
    corpora = [asset(name).read_text(encoding="utf-8") for name in ("moby", "botchan", "sotu")]
    lines = [line for text in corpora[:2] for line in text.split("\n")]
    rule = {"bpe": "identity", "unigram": "nmt_nfkc"}[kind]
    save(tmp_path, trained_model(kind, lines, vocab_size=8000, normalization_rule_name=rule))
    tokenizer = Tokenizer.from_folder(tmp_path)
    paragraphs = [paragraph for text in corpora for paragraph in text.split("\n\n")]
    mails = asset("spam").read_text(encoding="utf-8").splitlines()
    for texts in (paragraphs, mails):
        ids = assert_same_ids(tokenizer, texts)
        assert tokenizer.decode(ids[:200]) == reference_for(tokenizer).decode_batch(ids[:200])
    code_points = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for template in ("a%cb", "%c", " %c"):
        parts = [template.replace("%c", character) for character in code_points]
        assert_same_ids(tokenizer, ["".join(parts[i : i + 64]) for i in range(0, len(parts), 64)])
