"""A tokenizer's files in a folder, whatever the layout, as the text of a tokenizer.json and settings."""

import json
import reprlib
from pathlib import Path
from typing import Any

from kerasllm.tokenizers.json_fields import field, parse_object
from kerasllm.tokenizers.pre_tokenization import GPT2_PRE_TOKENIZER, QWEN2_PRE_TOKENIZER

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
OLDER_CHAT_TEMPLATE = "chat_template.json"
VOCABULARY_AND_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
WORD_PIECE_VOCABULARY = "vocab.txt"
SENTENCE_PIECE_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")

# Of transformers' classes, those that say nothing of how a text is tokenized.
PLAIN_CLASSES = ("", "PreTrained", "TokenizersBackend")
_ROBERTA = ("Roberta", "Longformer")

_GPT2_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_ROBERTA_NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
_QWEN2_NAMES = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}


def read_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """Reads the files of a tokenizer.

    Args:
        folder: The folder, see `Tokenizer.from_folder`.

    Returns:
        The text of a tokenizer.json, as it is there or made from the other files; and the settings,
        those of tokenizer_config.json and what other files say.

    Raises:
        FileNotFoundError: If there is no tokenizer.
        ValueError: If a file does not hold what it should.
    """
    settings = _read_settings(folder)
    if (folder / TOKENIZER).is_file():
        return _read_text(folder / TOKENIZER), settings
    for vocabulary, merges in VOCABULARY_AND_MERGES:
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _byte_bpe_json(folder, vocabulary, merges, settings), settings
    # These modules need base.py, which needs this one.
    if (folder / WORD_PIECE_VOCABULARY).is_file():
        from kerasllm.tokenizers.wordpiece import json_from_vocab

        tokens = _read_text(folder / WORD_PIECE_VOCABULARY).split("\n")
        tokens = [token.removesuffix("\r") for token in tokens]
        text = json_from_vocab(tokens[:-1] if tokens[-1] == "" else tokens, settings)
        return _with_added_tokens(folder, text, settings), settings
    for name in SENTENCE_PIECE_MODELS:
        if (folder / name).is_file():
            from kerasllm.tokenizers.sentencepiece_model import json_from_model

            text = json_from_model((folder / name).read_bytes(), settings)
            return _with_added_tokens(folder, text, settings), settings
    expected = [TOKENIZER, *("+".join(pair) for pair in VOCABULARY_AND_MERGES), WORD_PIECE_VOCABULARY]
    raise FileNotFoundError(
        f"A tokenizer's folder must hold one of {[*expected, *SENTENCE_PIECE_MODELS]}. Received: {folder}"
    )


def chat_templates_of(settings: dict[str, Any]) -> dict[str, str]:
    """The chat templates of the settings by name; the one without a name is "default"."""
    templates = settings.get("chat_template")
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {"default": templates}
    if not isinstance(templates, list) or not all(isinstance(template, dict) for template in templates):
        raise ValueError(
            "`chat_template` of the settings must be a string or a list of objects. "
            f"Received: {str(templates)[:200]}"
        )
    return {field(entry, "name", str): field(entry, "template", str) for entry in templates}


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} must be UTF-8. Received: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    return parse_object(_read_text(path), path.name) if path.is_file() else {}


def _read_ids(path: Path) -> dict[str, int]:
    ids = _read_object(path)
    for token, token_id in ids.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ValueError(
                f"A token's id in {path.name} must be an integer. "
                f"Received: {reprlib.repr(token)}: {reprlib.repr(token_id)}"
            )
    return ids


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = _read_object(folder / SETTINGS)
    settings = _read_object(folder / SPECIAL_TOKENS) | settings
    if (folder / CHAT_TEMPLATE).is_file():
        settings["chat_template"] = _read_text(folder / CHAT_TEMPLATE)
    elif (folder / OLDER_CHAT_TEMPLATE).is_file() and "chat_template" not in settings:
        settings["chat_template"] = field(_read_object(folder / OLDER_CHAT_TEMPLATE), "chat_template", str)
    return settings


def _byte_bpe_json(folder: Path, vocabulary: str, merges: str, settings: dict[str, Any]) -> str:
    """A tokenizer.json from a vocabulary and a list of merges; adds the names its class implies.

    transformers goes by the class in the settings as well; without one it is GPT-2's.
    """
    kind = field(settings, "tokenizer_class", str, "").removesuffix("Fast").removesuffix("Tokenizer")
    if kind not in (*PLAIN_CLASSES, "GPT2", "Qwen2", *_ROBERTA):
        raise ValueError(
            f"`tokenizer_class` of {vocabulary} and {merges} without a tokenizer.json must be one of "
            f"{['GPT2', 'Qwen2', *_ROBERTA]} and Tokenizer, or none. Received: {kind}Tokenizer"
        )
    tokens = _read_ids(folder / vocabulary)
    lines = _read_text(folder / merges).split("\n")
    pairs = [
        line.removesuffix("\r").split(" ") for line in lines if line and not line.startswith("#version")
    ]
    config = {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": GPT2_PRE_TOKENIZER,
        "post_processor": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
            "use_regex": True,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": tokens, "merges": pairs},
    }
    names = {name: token for name, token in _GPT2_NAMES.items() if token in tokens}
    if kind in _ROBERTA:
        names = _ROBERTA_NAMES
    if kind == "Qwen2":
        names = _QWEN2_NAMES
        config |= {"normalizer": {"type": "NFC"}, "pre_tokenizer": QWEN2_PRE_TOKENIZER}
    elif field(settings, "add_prefix_space", bool, False):
        config["pre_tokenizer"] = GPT2_PRE_TOKENIZER | {"add_prefix_space": True}
    for name, token in names.items():
        settings.setdefault(name, token)
    config["added_tokens"] = _added_tokens(folder, tokens, settings)
    if kind in _ROBERTA:
        ids = tokens | {token["content"]: token["id"] for token in config["added_tokens"]}
        config["post_processor"] = {
            "type": "RobertaProcessing",
            "sep": [_content(settings["sep_token"]), ids.get(_content(settings["sep_token"]))],
            "cls": [_content(settings["cls_token"]), ids.get(_content(settings["cls_token"]))],
            "trim_offsets": True,
            "add_prefix_space": field(settings, "add_prefix_space", bool, False),
        }
    return json.dumps(config, ensure_ascii=False)


_NO_OPTIONS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def _with_added_tokens(folder: Path, text: str, settings: dict[str, Any]) -> str:
    """A tokenizer.json with those added tokens besides that it does not have yet."""
    added = _added_tokens(folder, {}, settings)
    if not added:
        return text
    config = json.loads(text)
    known = {token["content"] for token in config["added_tokens"]}
    config["added_tokens"] += [token for token in added if token["content"] not in known]
    return json.dumps(config, ensure_ascii=False)


def _added_tokens(folder: Path, tokens: dict[str, int], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens that the settings and added_tokens.json name, by id."""
    added = {}
    for token_id, token in field(settings, "added_tokens_decoder", dict, {}).items():
        if not isinstance(token, dict) or not token_id.isdecimal():
            raise ValueError(
                f"`added_tokens_decoder` must map ids to tokens. Received: {token_id!r}: {token!r}"
            )
        added[field(token, "content", str)] = _NO_OPTIONS | token | {"id": int(token_id)}
    named = {  # Not add_bos_token and the like, which are flags.
        _content(value): value
        for name, value in settings.items()
        if name.endswith("_token") and value and isinstance(value, str | dict)
    }
    others = _read_ids(folder / ADDED_TOKENS) | {name: tokens[name] for name in named if name in tokens}
    for content, token_id in others.items():
        if content in added:
            continue
        options = named.get(content)
        if not isinstance(options, dict):
            # RoBERTa's mask takes the space before it with it.
            options = {"lstrip": content == "<mask>"}
        added[content] = {
            **_NO_OPTIONS,
            "normalized": content not in named,
            **options,
            "special": content in named,
            "content": content,
            "id": token_id,
        }
    return sorted(added.values(), key=lambda token: token["id"])


def _content(token: str | dict[str, Any]) -> str:
    return field(token, "content", str) if isinstance(token, dict) else str(token)
