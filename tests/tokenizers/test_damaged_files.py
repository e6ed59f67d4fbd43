"""Files that are damaged at random load, or are refused with a ValueError."""

import copy
import json
import random

import pytest
import tensorflow as tf
from sentencepiece import sentencepiece_model_pb2

from kerasllm.tokenizers import Tokenizer
from kerasllm.tokenizers.decoding import BYTE_TO_CHARACTER

TEXT = "ab <s> a\u0301b é\n"
SETTINGS = {
    "bos_token": "<s>",
    "eos_token": {"content": "</s>", "lstrip": False},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    "model_max_length": 10,
}
OPTIONS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
VALUES = [
    None,
    -1,
    0,
    3,
    0.5,
    10**400,
    1 << 40,
    float("inf"),
    "",
    "a",
    "<s>",
    "[",
    [],
    [0],
    {},
    {"a": 0},
    True,
]


def file_of(tokens: list[str], model: dict, **parts) -> dict:
    tokens = [*tokens, "<s>", "</s>"]
    scored = [[token, -float(i)] for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": ids[token], "content": token, "special": True} | OPTIONS for token in ("<s>", "</s>")
        ],
        "normalizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}},
        },
        "model": {"vocab": scored if model["type"] == "Unigram" else ids} | model,
    } | parts


FILES = {
    "byte BPE": file_of(
        [*BYTE_TO_CHARACTER, "ab", "Ġa"],
        {"type": "BPE", "merges": [["a", "b"], "Ġ a"], "ignore_merges": False, "dropout": None},
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
        },
        decoder=BYTE_LEVEL,
    ),
    "WordPiece": file_of(
        ["[UNK]", "a", "b", "##b", "ab", "é"],
        {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    ),
    "unigram": file_of(
        ["<unk>", "▁", "a", "b", "▁ab", "é"],
        {"type": "Unigram", "unk_id": 0, "byte_fallback": False},
        normalizer={"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        pre_tokenizer=METASPACE,
        decoder=METASPACE,
    ),
    "SentencePiece BPE": file_of(
        ["<unk>", "▁", "a", "b", "ab", "▁ab"],
        {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": False,
            "merges": [["a", "b"], ["▁", "ab"]],
        },
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    ),
}


@pytest.fixture(autouse=True)
def no_tracing():
    """Each tokenizer encodes one text only, and tracing takes longer than all else."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def damage(content: dict, generator: random.Random) -> None:
    """Takes one entry away, or puts another value there."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = generator.choice(keys)
        if isinstance(content[key], dict | list) and content[key] and generator.random() < 0.9:
            content = content[key]
        elif generator.random() < 0.25:
            del content[key]
            return
        else:
            content[key] = copy.deepcopy(generator.choice(VALUES))
            return


def loads_and_encodes(load) -> bool:
    try:
        tokenizer = load()
        tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=True))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", FILES)
def test_damaged_json(kind):
    generator = random.Random(kind)
    assert loads_and_encodes(lambda: Tokenizer.from_json(json.dumps(FILES[kind]), settings=dict(SETTINGS)))
    loaded, count = 0, 20
    for _ in range(count):
        files = copy.deepcopy({"tokenizer": FILES[kind], "settings": SETTINGS})
        damage(files[generator.choice(["tokenizer", "tokenizer", "tokenizer", "settings"])], generator)
        text, settings = json.dumps(files["tokenizer"]), files["settings"]
        loaded += loads_and_encodes(lambda: Tokenizer.from_json(text, settings=settings))  # noqa: B023
    assert 0 < loaded < count


@pytest.mark.parametrize("model_type", [1, 2])
def test_damaged_models(model_type, tmp_path):
    generator = random.Random(model_type)
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, piece_type in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        proto.pieces.add(piece=piece, score=0.0, type=piece_type)
    for i, piece in enumerate(["ab", "▁a", "▁ab", "▁", "a", "b", "é"]):
        proto.pieces.add(piece=piece, score=-i)
    proto.trainer_spec.model_type = model_type
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    content = proto.SerializeToString()
    loaded, count = 0, 40
    for i in range(count + 1):
        damaged = bytearray(content)
        for _ in range(min(i, generator.choice([1, 1, 2, 5]))):  # The first one is whole.
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        tmp_path.joinpath("tokenizer.model").write_bytes(damaged)
        is_loaded = loads_and_encodes(lambda: Tokenizer.from_folder(tmp_path))
        assert i or is_loaded
        loaded += is_loaded
    assert 1 < loaded < count
