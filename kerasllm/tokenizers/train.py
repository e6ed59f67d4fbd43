"""Trains a tokenizer on texts with the `tokenizers` library."""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kerasllm.tokenizers.base import DEFAULT_EOS_TOKEN, Tokenizer
from kerasllm.tokenizers.character import CHARACTER_PATTERN
from kerasllm.tokenizers.word import WORD_PATTERN

UNK_TOKEN = "<unk>"
DEFAULT_BPE_VOCABULARY_SIZE = 2048
BYTE_COUNT = 256

# The library wants a number; no text has as many different words.
_NO_LIMIT = 1 << 40


def train_tokenizer(
    kind: str,
    texts: Iterable[str],
    vocabulary_size: int | None = None,
    special_tokens: Sequence[str] = (DEFAULT_EOS_TOKEN,),
) -> Tokenizer:
    """Trains a tokenizer; the same texts give the same tokenizer.

    Args:
        kind: "word": the most frequent words, numbers, runs of punctuation and whitespace
            characters. "character": the most frequent code points. "byte_bpe": GPT-2's
            byte-level byte pair encoding. The first two have `<unk>` for what they lack.
        texts: The texts; any iterable, read once. The spelling of a special token in a text is
            plain text.
        vocabulary_size: The most tokens to have, special tokens included; texts with too
            little variety give fewer. None means 2,048 for "byte_bpe" and no limit otherwise.
        special_tokens: Tokens that no text is turned into unless asked for; they get the first
            ids. For "word" and "character", `<unk>` is added after them if it is not among them.

    Returns:
        A `WordTokenizer`, `CharacterTokenizer` or `ByteBPETokenizer`. Special tokens have the
        first ids; characters follow by code point, other tokens as the trainer orders them.

    Raises:
        ValueError: If `kind` is unknown, `texts` hold no text, `vocabulary_size` is too small, or
            special tokens are empty or not different.
        TypeError: If something else than strings comes in.
    """
    if kind not in _TRAIN:
        raise ValueError(f"`kind` must be one of {sorted(_TRAIN)}. Received: kind={kind!r}")
    special_tokens = _checked_special_tokens(special_tokens)
    if kind != "byte_bpe" and UNK_TOKEN not in special_tokens:
        special_tokens.append(UNK_TOKEN)
    _check_vocabulary_size(kind, vocabulary_size, special_tokens)
    trained = _TRAIN[kind](_checked_texts(texts), vocabulary_size, special_tokens)
    return Tokenizer.from_json(trained.to_str())


def _train_byte_bpe(
    texts: Iterator[str], vocabulary_size: int | None, special_tokens: list[str]
) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=DEFAULT_BPE_VOCABULARY_SIZE if vocabulary_size is None else vocabulary_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_word(
    texts: Iterator[str], vocabulary_size: int | None, special_tokens: list[str]
) -> tokenizers.Tokenizer:
    return _train_word_level(WORD_PATTERN, texts, vocabulary_size, special_tokens)


def _train_character(
    texts: Iterator[str], vocabulary_size: int | None, special_tokens: list[str]
) -> tokenizers.Tokenizer:
    tokenizer = _train_word_level(CHARACTER_PATTERN, texts, vocabulary_size, special_tokens)
    # The trainer numbers characters by how often they occur. By code point, the same set of
    # characters has the same ids whatever the text.
    characters = sorted(tokenizer.get_vocab(with_added_tokens=False).keys() - set(special_tokens))
    config = json.loads(tokenizer.to_str())
    config["model"]["vocab"] = {
        token: token_id for token_id, token in enumerate([*special_tokens, *characters])
    }
    return tokenizers.Tokenizer.from_str(json.dumps(config))


def _train_word_level(
    pattern: str, texts: Iterator[str], vocabulary_size: int | None, special_tokens: list[str]
) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token=UNK_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(
        vocab_size=_NO_LIMIT if vocabulary_size is None else vocabulary_size,
        special_tokens=special_tokens,
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


_TRAIN = {"word": _train_word, "character": _train_character, "byte_bpe": _train_byte_bpe}


def _checked_special_tokens(special_tokens: Sequence[str]) -> list[str]:
    if isinstance(special_tokens, str):
        raise TypeError(
            f"`special_tokens` must be a sequence of strings. Received: str, {special_tokens!r}"
        )
    special_tokens = list(special_tokens)
    for token in special_tokens:
        if not isinstance(token, str):
            raise TypeError(f"`special_tokens` must hold strings. Received: {type(token).__name__}")
    if "" in special_tokens or len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"`special_tokens` must not be empty, and must differ. Received: {special_tokens}")
    return special_tokens


def _check_vocabulary_size(kind: str, vocabulary_size: int | None, special_tokens: list[str]) -> None:
    if vocabulary_size is None:
        return
    if isinstance(vocabulary_size, bool) or not isinstance(vocabulary_size, int):
        raise TypeError(f"`vocabulary_size` must be an integer or None. Received: {vocabulary_size!r}")
    least = len(special_tokens) + (BYTE_COUNT if kind == "byte_bpe" else 1)
    if vocabulary_size < least:
        raise ValueError(
            f"`vocabulary_size` must be at least {least} for kind={kind!r} with "
            f"{len(special_tokens)} special tokens. Received: vocabulary_size={vocabulary_size}"
        )


def _checked_texts(texts: Iterable[str]) -> Iterator[str]:
    """The texts, one by one; an error if one is no string or all are empty."""
    if isinstance(texts, str | bytes):
        raise TypeError(
            "`texts` must be an iterable of strings. Received: one "
            f"{type(texts).__name__} of length {len(texts)}"
        )
    found_text = False
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"`texts` must hold strings. Received: {type(text).__name__}")
        found_text = found_text or text != ""
        yield text
    if not found_text:
        raise ValueError("`texts` must hold at least one character. Received: no text")
