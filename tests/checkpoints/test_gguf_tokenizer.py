import json

import numpy as np
import pytest
import tokenizers
from reference.gguf_files import write_gguf
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from kerasllm import train_tokenizer
from kerasllm.checkpoints.gguf_file import GGUFFile
from kerasllm.checkpoints.gguf_tokenizer import read_tokenizer, tokenizer_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
TEXT = "Hello World, it's 12345!  naïve\n\n\t x_y <|end|> 日本 I'LL"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-level BPE tokenizer with two special tokens."""
    return train_tokenizer("byte_bpe", [TEXT * 3, "the thing that 1234 they"], vocabulary_size=300)


@pytest.fixture
def byte_level(trained):
    """The metadata of that tokenizer as llama.cpp's converter writes them."""
    content = json.loads(trained.to_json())
    vocabulary = content["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    tokens += [token for token in special if token not in vocabulary]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([_CONTROL if t in special else _NORMAL for t in tokens]),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": special["<|endoftext|>"],
    }


def through_file(path, metadata):
    """The metadata as they come out of a file."""
    with GGUFFile(write_gguf(path, metadata, {})) as file:
        return file.metadata


def test_byte_level(tmp_path, trained, byte_level):
    byte_level["tokenizer.chat_template"] = "{{ messages[0].content }}"
    tokenizer, generation = read_tokenizer(through_file(tmp_path / "x.gguf", byte_level))
    assert generation == {"eos_token_id": trained.eos_id}
    assert (tokenizer.eos_id, tokenizer.bos_id) == (trained.eos_id, None)
    assert tokenizer.vocabulary_size == trained.vocabulary_size
    for text in (TEXT, "<|endoftext|>"):
        assert tokenizer.encode(text) == trained.encode(text)
        assert tokenizer.encode(text, parse_special=True) == trained.encode(text, parse_special=True)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "hi"


def test_no_tokenizer():
    assert read_tokenizer({}) == (None, {})


# What the regular expressions of the published tokenizers make of a text.
CUTS = {
    "gpt-2": ["it", "'s", " 12345", "!", " ", " na", "x", "\n\n", " I", "'", "LL"],
    "smollm": ["it", "'s", " ", "1", "2", "3", "4", "5", "!", " ", " na", "x", "\n\n", " I", "'", "LL"],
    "llama-bpe": ["it", "'s", " ", "123", "45", "!", " ", " na", "x", "\n\n", " I", "'LL"],
    "qwen2": ["it", "'s", " ", "1", "2", "3", "4", "5", "!", " ", " na", "x", "\n\n", " I", "'LL"],
}


@pytest.mark.parametrize("name", CUTS)
def test_pre_tokenizers(byte_level, name):
    content = tokenizer_json({**byte_level, "tokenizer.ggml.pre": name})
    cut = tokenizers.Tokenizer.from_str(content).pre_tokenizer.pre_tokenize_str
    pieces = [piece for part in ("it's 12345!  na", "x\n\n I'LL") for piece, _ in cut(part)]
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces] == CUTS[name]


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_both_libraries_read_it_alike(byte_level, name):
    content = tokenizer_json({**byte_level, "tokenizer.ggml.pre": name})
    reference = tokenizers.Tokenizer.from_str(content)
    tokenizer, _ = read_tokenizer({**byte_level, "tokenizer.ggml.pre": name})
    assert tokenizer.encode(TEXT) == reference.encode(TEXT, add_special_tokens=False).ids


def test_first_and_last_token(byte_level):
    added = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 5}
    reference = tokenizers.Tokenizer.from_str(tokenizer_json(byte_level | added))
    assert reference.encode("it").ids[0] == 5
    added["tokenizer.ggml.add_eos_token"] = True
    reference = tokenizers.Tokenizer.from_str(tokenizer_json(byte_level | added))
    assert reference.encode("it").ids[-1] == byte_level["tokenizer.ggml.eos_token_id"]


@pytest.mark.parametrize("name", ["llama3", "llama-v3", "llama-bpe", "smaug-bpe", "gpt-2"])
def test_llama3_begins_with_a_token_unless_the_file_says_otherwise(byte_level, name):
    byte_level |= {"tokenizer.ggml.pre": name, "tokenizer.ggml.bos_token_id": 5}
    begins = name.startswith("llama")
    for says, expected in (({}, begins), ({"tokenizer.ggml.add_bos_token": False}, False)):
        reference = tokenizers.Tokenizer.from_str(tokenizer_json(byte_level | says))
        assert (reference.encode("it").ids[0] == 5) == expected
    del byte_level["tokenizer.ggml.bos_token_id"]
    assert json.loads(tokenizer_json(byte_level))["post_processor"] is None


def test_every_token_that_ends_a_turn(byte_level):
    eos = byte_level["tokenizer.ggml.eos_token_id"]
    byte_level["tokenizer.ggml.eot_token_id"] = eos
    assert read_tokenizer(byte_level)[1] == {"eos_token_id": eos}
    byte_level |= {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 6}
    assert read_tokenizer(byte_level)[1] == {"eos_token_id": [eos, 7, 6]}


@pytest.fixture
def sentencepiece():
    """Llama's kind of vocabulary: what has the best score is merged first."""
    words = ["▁", "t", "h", "e", "a", "th", "▁th", "▁the", "he", "▁a", "at", "▁that", "▁t", "that"]
    words += ["b", "c", "ab", "bc"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    scores = [0.0] * 259 + [-float(place) for place in range(len(words))]
    kinds = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256, *[_NORMAL] * len(words)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, "float32"),
        "tokenizer.ggml.token_type": np.array(kinds, "int32"),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def test_sentencepiece(sentencepiece):
    reference = tokenizers.Tokenizer.from_str(tokenizer_json(sentencepiece))
    encoding = reference.encode("the that é")
    assert encoding.tokens == ["<s>", "▁the", "▁that", "▁", "<0xC3>", "<0xA9>"]
    assert reference.decode(encoding.ids) == "the that é"
    assert reference.encode("tabc", add_special_tokens=False).tokens == ["▁t", "ab", "c"]
    sentencepiece["tokenizer.ggml.scores"][-1] = 1  # "bc" before "ab"
    changed = tokenizers.Tokenizer.from_str(tokenizer_json(sentencepiece))
    assert changed.encode("tabc", add_special_tokens=False).tokens == ["▁t", "a", "bc"]
    tokenizer, generation = read_tokenizer(sentencepiece)
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}
    assert tokenizer.encode("the that é") == changed.encode("the that é", add_special_tokens=False).ids


def test_sentencepiece_without_a_space_in_front(sentencepiece):
    sentencepiece["tokenizer.ggml.add_space_prefix"] = False
    reference = tokenizers.Tokenizer.from_str(tokenizer_json(sentencepiece))
    assert reference.encode("that the", add_special_tokens=False).tokens == ["that", "▁the"]
    assert reference.decode(reference.encode(" that").ids) == " that"


def test_a_huge_token(sentencepiece):
    sentencepiece["tokenizer.ggml.tokens"][-1] = "x" * 1025
    with pytest.raises(ValueError, match="up to 1024 characters each. Received: one of 1025"):
        read_tokenizer(sentencepiece)


def test_wordpiece():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁hello", "▁wor", "ld", "▁!", "!"]
    metadata = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([_CONTROL] * 5 + [_NORMAL] * 5),
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.mask_token_id": 4,
    }
    content = tokenizer_json(metadata)
    assert json.loads(content)["model"]["vocab"]["##ld"] == 7
    reference = tokenizers.Tokenizer.from_str(content)
    assert reference.encode("Hello WORLD! what").tokens == [
        "[CLS]", "hello", "wor", "##ld", "!", "[UNK]", "[SEP]",
    ]  # fmt: skip
    assert reference.encode("hello", "hello").type_ids == [0, 0, 0, 1, 1]
    metadata["tokenizer.ggml.tokens"] = [*tokens[:5], "▁Hello", *tokens[6:]]
    cased = tokenizers.Tokenizer.from_str(tokenizer_json(metadata))
    assert cased.encode("Hello hello", add_special_tokens=False).tokens == ["Hello", "[UNK]"]


@pytest.fixture
def unigram():
    tokens = ["<pad>", "</s>", "<unk>", "▁the", "▁", "t", "h", "e", "re"]
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0, 0, 0, -2, -3, -4, -4, -4, -5], "float32"),
        "tokenizer.ggml.token_type": np.array([_CONTROL, _CONTROL, _UNKNOWN, *[_NORMAL] * 6]),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def test_unigram(unigram):
    reference = tokenizers.Tokenizer.from_str(tokenizer_json(unigram))
    assert reference.encode("the there").tokens == ["▁the", "▁the", "re", "</s>"]


@pytest.mark.parametrize("removes", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_spaces_of_unigram(unigram, prefix, removes):
    unigram |= {
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": removes,
    }
    model = sentencepiece_model_pb2.ModelProto()
    tokens, scores = unigram["tokenizer.ggml.tokens"], unigram["tokenizer.ggml.scores"]
    kinds = unigram["tokenizer.ggml.token_type"]
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        model.pieces.add(piece=token, score=score, type=int(kind))
    model.trainer_spec.model_type = 1
    model.trainer_spec.unk_id, model.trainer_spec.bos_id = 2, -1
    model.trainer_spec.eos_id, model.trainer_spec.pad_id = 1, 0
    model.normalizer_spec.add_dummy_prefix = prefix
    model.normalizer_spec.remove_extra_whitespaces = removes
    theirs = SentencePieceProcessor(model_proto=model.SerializeToString())
    reference = tokenizers.Tokenizer.from_str(tokenizer_json(unigram))
    tokenizer, _ = read_tokenizer(unigram)
    # Without removal, a space in front of a text comes on top of the prefix in SentencePiece only.
    texts = ["the  the ", "the", "the   there  the"] + ["  the", " the ", " "] * (removes or not prefix)
    for text in texts:
        expected = theirs.encode(text)
        assert reference.encode(text, add_special_tokens=False).ids == expected, text
        assert tokenizer.encode(text) == expected, text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "rwkv"}, "model must be one of .*'rwkv'"),
        ({"model": 3}, "model must be one of"),
        ({"pre": "chameleon"}, "pre must be one of .*'chameleon'"),
        ({"pre": np.array([1, 2])}, "pre must be of type str"),
        ({"tokens": None}, "tokens must be of type list"),
        ({"tokens": ["a", "a"]}, "must be texts, no two equal"),
        ({"tokens": ["a", ["b"]]}, "must be texts, no two equal"),
        ({"token_type": np.array([1, 2])}, "token_type must be a number per token"),
        ({"token_type": "x"}, "token_type must be a number per token"),
        ({"merges": ["a b c"]}, r"A merge must be two tokens .*\['a', 'b', 'c'\]"),
        ({"merges": ["a"]}, "A merge must be two tokens"),
        ({"merges": 3}, "merges must be of type list"),
        ({"eos_token_id": 10**6}, "eos_token_id must be one of"),
        ({"eos_token_id": -1}, "eos_token_id must be one of"),
        ({"eos_token_id": True}, "eos_token_id must be of type int"),
        ({"add_bos_token": True}, "does not name"),
        ({"add_bos_token": 1}, "add_bos_token must be of type bool"),
    ],
    ids=str,
)
def test_damaged_vocabularies(byte_level, changes, message):
    for name, value in changes.items():
        byte_level[f"tokenizer.ggml.{name}"] = value
    with pytest.raises(ValueError, match=message):
        read_tokenizer(byte_level)


def test_a_chat_template_that_is_no_text(byte_level):
    with pytest.raises(ValueError, match="tokenizer.chat_template must be a text. Received: 3"):
        read_tokenizer(byte_level | {"tokenizer.chat_template": 3})
