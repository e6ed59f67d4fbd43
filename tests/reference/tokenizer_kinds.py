"""Reference tokenizers of every byte-level kind in use, made with the `tokenizers` library."""

import json
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)


def _split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert)


def _byte_level(use_regex: bool = False, add_prefix_space: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def _in_turn(*steps: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(list(steps))


# Name -> pre-tokenizer, normalizer.
BYTE_LEVEL_KINDS: dict[str, tuple[pre_tokenizers.PreTokenizer, normalizers.Normalizer | None]] = {
    "gpt2": (_byte_level(use_regex=True), None),
    "roberta": (_byte_level(use_regex=True, add_prefix_space=True), None),
    "gpt-neox": (_byte_level(use_regex=True), normalizers.NFC()),
    "llama3": (_in_turn(_split(_LLAMA3), _byte_level()), None),
    "qwen2": (_in_turn(_split(_QWEN2), _byte_level()), normalizers.NFC()),
    "qwen3.5": (_in_turn(_split(_QWEN35), _byte_level()), normalizers.NFC()),
    "smollm": (_in_turn(pre_tokenizers.Digits(True), _byte_level(use_regex=True)), None),
    "digit runs": (_in_turn(pre_tokenizers.Digits(False), _byte_level(use_regex=True)), None),
    "tekken": (_in_turn(_split(_TEKKEN), _byte_level()), None),
    "gpt-4o": (_in_turn(_split(_GPT4O, "removed", invert=True), _byte_level()), None),
    "deepseek-coder": (
        _in_turn(
            _split("[\r\n]"),
            _split("\\s?\\p{L}+"),
            _split("\\s?\\p{P}+"),
            _split("[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"),
            pre_tokenizers.Digits(True),
            _byte_level(),
        ),
        None,
    ),
    "deepseek3": (
        _in_turn(
            _split("\\p{N}{1,3}"),
            _split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            _split(_DEEPSEEK3),
            _byte_level(),
        ),
        None,
    ),
}


def train_byte_level(
    kind: str,
    texts: Sequence[str],
    vocabulary_size: int = 1500,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
) -> tokenizers.Tokenizer:
    """A byte-level BPE with the pre-tokenizer of that name, and special tokens at the end."""
    pre_tokenizer, normalizer = BYTE_LEVEL_KINDS[kind]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    return tokenizer


def changed(tokenizer: tokenizers.Tokenizer, **entries: Any) -> str:
    """The tokenizer.json of a tokenizer with some entries changed."""
    return json.dumps(json.loads(tokenizer.to_str()) | entries)
