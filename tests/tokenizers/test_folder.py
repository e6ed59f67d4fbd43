"""Tokenizers in folders of every layout, and what is saved of them."""

import json

import pytest
import tokenizers
from reference.assets import asset
from reference.tokenizer_kinds import train_byte_level

from kerasllm.tokenizers import Tokenizer

TEXTS = ["hello lower x", "it's <s>5</s>", " a\n\n b", "e\u0301 é"]
CORPUS = ["hello low lower lowest it's"] * 3


def vocabulary_and_merges(
    reference: tokenizers.Tokenizer, folder, names=("vocab.json", "merges.txt")
) -> None:
    model = json.loads(reference.to_str())["model"]
    vocabulary = model["vocab"]
    for token in json.loads(reference.to_str())["added_tokens"]:
        vocabulary[token["content"]] = token["id"]
    (folder / names[0]).write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / names[1]).write_text(f"#version: 0.2\n{merges}", encoding="utf-8")


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2(tmp_path, names):
    reference = train_byte_level("gpt2", CORPUS, 300, ["<|endoftext|>"])
    vocabulary_and_merges(reference, tmp_path, names)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.unk_token == "<|endoftext|>"
    texts = [*TEXTS, "a<|endoftext|>b"]
    assert tokenizer.encode(texts, parse_special=True) == [e.ids for e in reference.encode_batch(texts)]


def test_roberta(tmp_path):
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    reference = train_byte_level("roberta", CORPUS, 300, names)
    vocabulary_and_merges(reference, tmp_path)
    settings = {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.mask_id == reference.token_to_id("<mask>")
    ids = tokenizer.encode("hello <mask>", parse_special=True, add_special_tokens=True)
    hello = reference.encode("hello").ids
    assert ids == [tokenizer.bos_id, *hello, tokenizer.mask_id, tokenizer.eos_id]


def test_chat_templates(tmp_path):
    reference = train_byte_level("gpt2", CORPUS, 300)
    (tmp_path / "tokenizer.json").write_text(reference.to_str())
    (tmp_path / "chat_template.json").write_text('{"chat_template": "older"}')
    assert Tokenizer.from_folder(tmp_path).chat_template == "older"
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "settings"}')
    assert Tokenizer.from_folder(tmp_path).chat_template == "settings"
    (tmp_path / "chat_template.jinja").write_text("file {{ 1 }}\n")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.chat_template == "file {{ 1 }}\n"

    saved = tmp_path / "saved"
    tokenizer.save(saved)
    assert (saved / "chat_template.jinja").read_text() == "file {{ 1 }}\n"
    assert Tokenizer.from_folder(saved).chat_template == tokenizer.chat_template
    # One without a template takes the file away.
    Tokenizer.from_json(reference.to_str()).save(saved)
    assert Tokenizer.from_folder(saved).chat_template is None
    several = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools {{ tools }}"},
    ]
    Tokenizer.from_json(reference.to_str(), settings={"chat_template": several}).save(saved)
    loaded = Tokenizer.from_folder(saved)
    assert loaded.chat_template == "plain" and loaded.render_chat([], tools=[{}]) == "tools [{}]"


def test_settings_come_from_both_files_and_are_kept(tmp_path):
    reference = train_byte_level("gpt2", CORPUS, 300, ["<s>", "</s>"])
    text = reference.to_str(pretty=True)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "<s>"}')
    settings = {
        "eos_token": {"content": "</s>"},
        "model_max_length": 77,
        "tokenizer_class": "GPT2Tokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", None)
    tokenizer.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8") == text
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["model_max_length"] == 77 and saved["tokenizer_class"] == "GPT2Tokenizer"
    assert (saved["bos_token"], saved["eos_token"]) == ("<s>", "</s>")


def test_folders_without_a_tokenizer_or_with_a_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json.*vocab.txt"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(FileNotFoundError):  # Merges are lacking.
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match="vocab.json must be an object"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2, "c": "x"}')
    with pytest.raises(ValueError, match="must be an integer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="tokenizer.json must be UTF-8"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("5")
    with pytest.raises(ValueError, match="tokenizer_config.json must be an object"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("kind", ["CLIPTokenizer", "BartTokenizerFast", "Tokenizer5", 5])
def test_classes_that_read_a_vocabulary_in_another_way(tmp_path, kind):
    reference = train_byte_level("gpt2", CORPUS, 300)
    vocabulary_and_merges(reference, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(ValueError, match="`tokenizer_class`"):
        Tokenizer.from_folder(tmp_path)
    # A tokenizer.json says all by itself.
    (tmp_path / "tokenizer.json").write_text(reference.to_str(), encoding="utf-8")
    assert Tokenizer.from_folder(tmp_path).encode("hello") == reference.encode("hello").ids


@pytest.mark.parametrize(
    "kind", [None, "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"]
)
def test_classes_of_a_plain_vocabulary(tmp_path, kind):
    reference = train_byte_level("gpt2", [*CORPUS, "True True True"], 300)
    vocabulary_and_merges(reference, tmp_path)
    settings = {"tokenizer_class": kind, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode(TEXTS) == [e.ids for e in reference.encode_batch(TEXTS)]
    # The flag names no token.
    assert "True" in tokenizer._config.ids and "True" not in tokenizer.special_tokens


@pytest.mark.parametrize("file", ["vocab.json", "added_tokens.json"])
@pytest.mark.parametrize("wrong", ["5", None, 5.0, True, []])
def test_ids_that_are_no_integers(tmp_path, file, wrong):
    vocabulary_and_merges(train_byte_level("gpt2", CORPUS, 300, ["<s>", "</s>"]), tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    path = tmp_path / file
    ids = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(ids | {"<s>": wrong}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"A token's id in {file} must be an integer. Received: '<s>'"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.slow
def test_the_real_gpt2():
    tokenizer = Tokenizer.from_folder(asset("gpt2-vocab"))
    assert tokenizer.vocabulary_size == 50257 and tokenizer.eos_id == 50256
    assert tokenizer.encode("Hello world, naïve café 🙂") == [
        *(15496, 995, 11, 41492, 28426, 40304),
        *(12520, 247, 224),
    ]


@pytest.mark.reference
@pytest.mark.parametrize("kind", ["GPT2", "Roberta", "Qwen2"])
def test_equal_to_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    source = {"GPT2": "gpt2", "Roberta": "gpt2", "Qwen2": "qwen2"}[kind]
    reference = train_byte_level(source, [*CORPUS, *TEXTS], 300, names)
    vocabulary_and_merges(reference, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": f"{kind}Tokenizer"}))
    expected = getattr(transformers, f"{kind}Tokenizer").from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text, True, True) == expected.encode(text), text
    for name in ("bos", "eos", "pad", "mask"):
        assert getattr(tokenizer, f"{name}_id") == getattr(expected, f"{name}_token_id")
    # The saved folder gives transformers the same ids.
    tokenizer.save(tmp_path / "saved")
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert saved.encode(text) == expected.encode(text), text
