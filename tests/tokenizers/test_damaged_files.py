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


def sentencepiece_model(model_type: int) -> bytes:
    """A model of a few tokens: unigram (1) or BPE (2)."""
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, piece_type in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        proto.pieces.add(piece=piece, score=0.0, type=piece_type)
    for i, piece in enumerate(["ab", "▁a", "▁ab", "▁", "a", "b", "é"]):
        proto.pieces.add(piece=piece, score=-i)
    proto.trainer_spec.model_type = model_type
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    return proto.SerializeToString()


def settings_of(kind: str, **names) -> dict:
    """A tokenizer_config.json with one of each kind of entry."""
    return {
        "tokenizer_class": f"{kind}Tokenizer",
        "add_prefix_space": True,
        "do_lower_case": True,
        "tokenize_chinese_chars": True,
        "strip_accents": None,
        "add_bos_token": True,
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True} | OPTIONS},
        "chat_template": "{{ messages }}",
    } | names


BYTES = {
    token: i for i, token in enumerate(["<s>", "</s>", "<pad>", "<unk>", "<mask>", *BYTE_TO_CHARACTER])
}
BYTES |= {"ab": len(BYTES), "Ġa": len(BYTES) + 1}
NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "<pad>"}
WORD_PIECES = ["<s>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a", "b", "##b", "ab", "é"]
# The files of folders without a tokenizer.json.
FOLDERS = {
    kind: {
        "vocab.json": BYTES,
        "merges.txt": "#version: 0.2\na b\nĠ a\n",
        "added_tokens.json": {"<extra>": len(BYTES)},
        "special_tokens_map.json": NAMES | {"additional_special_tokens": ["<extra>"]},
        "tokenizer_config.json": settings_of(kind, mask_token={"content": "<mask>", "lstrip": True}),
    }
    for kind in ("GPT2", "Roberta", "Qwen2")
}
# Qwen2's end token must be there.
FOLDERS["Qwen2"]["vocab.json"] = BYTES | {"<|endoftext|>": len(BYTES)}
FOLDERS["Qwen2"]["added_tokens.json"] = {"<extra>": len(BYTES) + 1}
FOLDERS["Bert"] = {
    "vocab.txt": "\n".join(WORD_PIECES) + "\n",
    "added_tokens.json": {"<extra>": len(WORD_PIECES)},
    "special_tokens_map.json": {"unk_token": "[UNK]", "sep_token": {"content": "[SEP]"}},
    "tokenizer_config.json": settings_of("Bert", cls_token="[CLS]", mask_token={"content": "[MASK]"}),
}
for kind, model_type in (("Llama", 2), ("T5", 1), ("XLMRoberta", 1)):
    FOLDERS[kind] = {
        "tokenizer.model": sentencepiece_model(model_type),
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        "tokenizer_config.json": settings_of(
            kind, unk_token="<unk>", add_eos_token=True, legacy=True, extra_ids=2
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


def damaged_text(text: str, generator: random.Random) -> str:
    """Takes a line away, doubles it, or changes a character of it."""
    lines = text.split("\n")
    number = generator.randrange(len(lines))
    line = lines[number]
    place = generator.randrange(len(line) + 1)
    with_other = (
        line[:place] + generator.choice(["", " ", "\r", "\0", "\u2028", "b", "é"]) + line[place + 1 :]
    )
    lines[number : number + 1] = generator.choice([[], [line, line], [""], [with_other], [with_other]])
    return "\n".join(lines)


def write_files(folder, files: dict[str, dict | str | bytes]) -> None:
    for name, content in files.items():
        text = json.dumps(content) if isinstance(content, dict) else content
        folder.joinpath(name).write_bytes(text if isinstance(text, bytes) else text.encode())


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


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("value", [[0], 3, {"content": [0]}], ids=str)
def test_names_that_are_no_tokens(kind, value, tmp_path):
    write_files(tmp_path, FOLDERS[kind])
    for name in ("bos_token", "eos_token", "cls_token", "sep_token", "mask_token"):
        settings = FOLDERS[kind]["tokenizer_config.json"] | {name: value}
        tmp_path.joinpath("tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        with pytest.raises(ValueError, match="must be"):
            Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("kind", FOLDERS)
def test_damaged_folders(kind, tmp_path):
    generator = random.Random(f"{kind} 2")
    write_files(tmp_path, FOLDERS[kind])
    assert loads_and_encodes(lambda: Tokenizer.from_folder(tmp_path))
    loaded, count = 0, 8
    for _ in range(count):
        files = copy.deepcopy(FOLDERS[kind])
        # `test_damaged_models` has those that are no text.
        name = generator.choice([name for name in files if not isinstance(files[name], bytes)])
        if isinstance(files[name], str):
            files[name] = damaged_text(files[name], generator)
        else:
            damage(files[name], generator)
        write_files(tmp_path, files)
        loaded += loads_and_encodes(lambda: Tokenizer.from_folder(tmp_path))
    assert 0 < loaded < count


@pytest.mark.parametrize("model_type", [1, 2])
def test_damaged_models(model_type, tmp_path):
    generator = random.Random(model_type)
    content = sentencepiece_model(model_type)
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
