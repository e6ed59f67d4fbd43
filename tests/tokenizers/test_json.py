"""What a tokenizer.json may ask for, what is refused, and what is written."""

import json

import pytest
import tokenizers
from reference.tokenizer_texts import SPECIAL_TOKENS

from kerasllm.tokenizers import (
    ByteBPETokenizer,
    CharacterTokenizer,
    Tokenizer,
    WordTokenizer,
    train_tokenizer,
)

CLASSES = {"word": WordTokenizer, "character": CharacterTokenizer, "byte_bpe": ByteBPETokenizer}


@pytest.fixture(scope="module")
def small() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(kind, ["hello low lower"], None) for kind in CLASSES}


@pytest.mark.parametrize("kind", CLASSES)
def test_from_json_finds_the_class(small, kind):
    tokenizer = small[kind]
    assert type(tokenizer) is CLASSES[kind]
    assert type(Tokenizer.from_json(tokenizer.to_json())) is CLASSES[kind]
    assert type(CLASSES[kind].from_json(tokenizer.to_json())) is CLASSES[kind]
    other = CLASSES["word" if kind != "word" else "byte_bpe"]
    with pytest.raises(ValueError, match="must be supported"):
        other.from_json(tokenizer.to_json())


def test_vocabulary(tokenizer):
    reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert tokenizer.vocabulary_size == reference.get_vocab_size()
    for token, token_id in reference.get_vocab().items():
        assert tokenizer.token_to_id(token) == token_id
        assert tokenizer.id_to_token(token_id) == token
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_id == 0
    assert list(tokenizer.special_tokens.items())[:4] == list(zip(SPECIAL_TOKENS, range(4), strict=True))
    has_unk = not isinstance(tokenizer, ByteBPETokenizer)
    assert tokenizer.unk_id == (tokenizer.special_tokens["<unk>"] if has_unk else None)
    with pytest.raises(ValueError, match="not a token"):
        tokenizer.token_to_id("not a token")
    for token_id in (-1, tokenizer.vocabulary_size):
        with pytest.raises(ValueError, match="Received: id="):
            tokenizer.id_to_token(token_id)


def test_save_and_load(tokenizer, tmp_path):
    folder = tmp_path / "new" / "folder"
    tokenizer.save(folder)
    tokenizer.save(folder)  # Over the first one.
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = Tokenizer.from_folder(folder)
    text = "it's <|user|> 日本 🙂\n"
    for parse_special in (False, True):
        ids = loaded.tokenize([text], parse_special).to_list()
        assert ids == tokenizer.tokenize([text], parse_special).to_list()
    assert loaded.to_json() == tokenizer.to_json()
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [reference.encode(text).ids] == ids
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|endoftext|>"
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_eos_token(small, tmp_path):
    text = train_tokenizer("word", ["a"], special_tokens=["</s>", "<s>"]).to_json()
    assert Tokenizer.from_json(text).eos_token is None
    assert Tokenizer.from_json(text).eos_id is None
    assert Tokenizer.from_json(text, eos_token="</s>").eos_id == 0
    with pytest.raises(ValueError, match="`eos_token` must be a special token"):
        Tokenizer.from_json(text, eos_token="a")

    (tmp_path / "tokenizer.json").write_text(text)
    assert Tokenizer.from_folder(tmp_path).eos_token is None
    for eos_token in ("<s>", {"content": "<s>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
        tokenizer = Tokenizer.from_folder(tmp_path)
        assert tokenizer.eos_token == "<s>"
    tokenizer.save(tmp_path)
    assert Tokenizer.from_folder(tmp_path).eos_token == "<s>"
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_folder(tmp_path / "missing")


def test_older_spellings_of_byte_bpe(small):
    tokenizer = small["byte_bpe"]
    config = json.loads(tokenizer.to_json())
    config["model"]["merges"] = [" ".join(pair) for pair in config["model"]["merges"]]
    del config["model"]["type"]
    del config["pre_tokenizer"]["use_regex"]
    config["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    older = Tokenizer.from_json(json.dumps(config))
    texts = ["hello lower"]
    assert older.tokenize(texts).to_list() == tokenizer.tokenize(texts).to_list()


def merges(*pairs):
    def change(config):
        config["model"]["merges"] = [list(pair) for pair in pairs]
        vocabulary = config["model"]["vocab"]
        for pair in pairs:
            vocabulary.setdefault("".join(pair), len(vocabulary))

    return change


def entry(*path, value):
    """A change of one entry of a tokenizer.json."""

    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


ADDED = {"id": 0, "content": "<|endoftext|>", "special": True}
REFUSED = {
    "normalizer": ("byte_bpe", entry("normalizer", value={"type": "Magic"}), "`normalizer`"),
    "post-processor": ("byte_bpe", entry("post_processor", value={"type": "Magic"}), "`post_processor`"),
    "decoder": ("byte_bpe", entry("decoder", value={"type": "Magic"}), "`decoder`"),
    "model": ("byte_bpe", entry("model", "type", value="Magic"), "Magic"),
    "no model": ("byte_bpe", entry("model", value=None), "entry `model`"),
    "no pre-tokenizer": ("word", entry("pre_tokenizer", value=None), "pre_tokenizer=None"),
    "other pattern": (
        "word",
        entry("pre_tokenizer", "pattern", value={"Regex": r"\w+"}),
        "must be supported",
    ),
    "dropout": ("byte_bpe", entry("model", "dropout", value=0.1), "`dropout`"),
    "byte fallback": ("byte_bpe", entry("model", "byte_fallback", value=True), "`byte_fallback`"),
    "ignore merges": ("byte_bpe", entry("model", "ignore_merges", value=1), "`ignore_merges`"),
    "suffix": ("byte_bpe", entry("model", "end_of_word_suffix", value="</w>"), "end_of_word_suffix"),
    "no merges": ("byte_bpe", entry("model", "merges", value=5), "merges"),
    "merge of numbers": ("byte_bpe", entry("model", "merges", value=[[1, 2]]), "pair"),
    "number for a merge": ("byte_bpe", entry("model", "merges", value=[7]), "pair"),
    "unknown merge": ("byte_bpe", entry("model", "merges", value=[["h", "qq"]]), "'qq'"),
    "half a merge": ("byte_bpe", entry("model", "merges", value=["h"]), "pair"),
    "merge twice": ("byte_bpe", merges("he", "he"), "must differ"),
    "merge order": ("byte_bpe", merges(("he", "l"), ("h", "e")), "must come after"),
    # The second way to make "aab" comes after a merge that uses it.
    "merge between": (
        "byte_bpe",
        merges("aa", "ab", ("aa", "b"), ("aab", "c"), ("a", "ab")),
        "must come after",
    ),
    "vocabulary": ("byte_bpe", entry("model", "vocab", value=["a"]), "`vocab` must be of the type dict"),
    "gap": ("word", entry("model", "vocab", "hello", value=99), "0 to n - 1"),
    "huge id": ("word", entry("model", "vocab", "hello", value=10**40), "0 to n - 1"),
    "negative id": ("word", entry("model", "vocab", "hello", value=-1), "0 to n - 1"),
    "id twice": ("word", entry("model", "vocab", "hello", value=0), "0 to n - 1"),
    "id as text": ("word", entry("model", "vocab", "hello", value="1"), "must be an integer"),
    "id as fraction": ("word", entry("model", "vocab", "hello", value=1.0), "must be an integer"),
    "id as truth": ("word", entry("model", "vocab", "hello", value=True), "must be an integer"),
    "no unk": ("word", entry("model", "unk_token", value="<none>"), "`unk_token`"),
    "unk of another type": ("word", entry("model", "unk_token", value=[1]), "`unk_token`"),
    "added": ("word", entry("added_tokens", value={}), "`added_tokens` must be of the type list"),
    "other id": ("word", entry("added_tokens", value=[ADDED | {"id": 1}]), "expected id 0"),
    "twice": ("word", entry("added_tokens", value=[ADDED, ADDED]), "must differ"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unsupported_is_refused(small, name):
    kind, change, message = REFUSED[name]
    config = json.loads(small[kind].to_json())
    change(config)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_json(json.dumps(config))


NO_TOKENIZER = {
    "empty": "",
    "half": "{",
    "list": "[]",
    "nothing": "{}",
    "number": '{"model": 1}',
    "byte": "\x00",
    "deep": '{"a":' * 100_000,
    "deep list": "[" * 100_000 + "]" * 100_000,
    "long number": f'{{"model": {{"vocab": {{"a": {"9" * 10_000}}}}}}}',
    "half a surrogate pair": '{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}}',
}


@pytest.mark.parametrize("name", NO_TOKENIZER)
def test_what_is_no_tokenizer_json_is_refused(name):
    text = NO_TOKENIZER[name]
    with pytest.raises(ValueError, match="A tokenizer.json must be"):
        Tokenizer.from_json(text)


def test_batch_settings_are_kept_and_not_applied(small):
    config = json.loads(small["byte_bpe"].to_json())
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    text = json.dumps(
        config | {"truncation": truncation, "padding": padding | {"pad_to_multiple_of": None}}
    )
    tokenizer = Tokenizer.from_json(text)
    assert tokenizer.encode("hello low lower") == small["byte_bpe"].encode("hello low lower")
    assert tokenizer.to_json() == text


def test_named_tokens(small):
    text = train_tokenizer("word", ["a b"], special_tokens=["<s>", "</s>", "[PAD]"]).to_json()
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "pad_token": "[PAD]",
        "mask_token": None,
        "sep_token": "a",
    }
    tokenizer = Tokenizer.from_json(text, settings=settings)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert (tokenizer.mask_id, tokenizer.mask_token, tokenizer.cls_id) == (None, None, None)
    # What the settings name is special, as in transformers.
    assert tokenizer.sep_token == "a" and tokenizer.special_tokens["a"] == tokenizer.sep_id
    assert tokenizer.decode([tokenizer.sep_id, 0]) == ""
    for wrong, message in (("x", "must be in the vocabulary"), (5, "must be a string"), ({}, "`content`")):
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_json(text, settings={"cls_token": wrong})


def test_inputs_of_the_wrong_type_are_refused(tokenizer):
    with pytest.raises(ValueError, match="shape"):
        tokenizer.tokenize([["a"]])
    with pytest.raises(ValueError, match="shape"):
        tokenizer.tokenize("a")
    with pytest.raises(TypeError, match="strings"):
        tokenizer.tokenize([1])
    with pytest.raises(TypeError, match="bytes"):
        tokenizer.encode([b"a"])
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match="shape"):
        tokenizer.detokenize([1, 2])
    with pytest.raises(TypeError, match="integers"):
        tokenizer.detokenize([[1.0]])
    with pytest.raises(TypeError, match="integers"):
        tokenizer.decode([1.0])
    with pytest.raises(ValueError, match="levels"):
        tokenizer.decode([[[1]]])
