"""Trains a tokenizer on texts with the `tokenizers` library."""

import collections
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from kerasllm.tokenizers.base import DEFAULT_EOS_TOKEN, Tokenizer
from kerasllm.tokenizers.character import CHARACTER_PATTERN
from kerasllm.tokenizers.sentencepiece_model import json_from_model
from kerasllm.tokenizers.word import WORD_PATTERN
from kerasllm.tokenizers.wordpiece import json_from_vocab

UNK_TOKEN = "<unk>"
DEFAULT_PIECES = 2048  # of the kinds that merge or choose pieces
BYTE_COUNT = 256
SENTINELS = 100  # as many as T5 has

_BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_T5_TOKENS = ("<pad>", "</s>", UNK_TOKEN)
# Rarer characters than these are unknown to a WordPiece tokenizer, as in BERT's own training.
_WORDPIECE_CHARACTERS = 1000

# The library wants a number; no text has as many different words.
_NO_LIMIT = 1 << 40


def train_tokenizer(
    kind: str,
    texts: Iterable[str],
    vocabulary_size: int | None = None,
    special_tokens: Sequence[str] | None = None,
) -> Tokenizer:
    """Trains a tokenizer; the same texts give the same tokenizer.

    Args:
        kind: "word": the most frequent words, numbers, runs of punctuation and whitespace
            characters. "character": the most frequent code points. "byte_bpe": GPT-2's
            byte-level byte pair encoding. The first two have `<unk>` for what they lack. "wordpiece":
            BERT's, with lower case, `[MASK]`, and `[CLS]` and `[SEP]` around each text. "sentencepiece":
            T5's unigram model, with the sentinels `<extra_id_0>` to `<extra_id_99>`, and `</s>` after
            each text; it drops line breaks and repeated spaces.
        texts: The texts; any iterable, read once. The spelling of a special token in a text is
            plain text.
        vocabulary_size: The most tokens to have, special tokens included; texts with too
            little variety give fewer. None means no limit for "word" and "character", and 2,048
            otherwise.
        special_tokens: Tokens that no text is turned into unless asked for; they get the first
            ids. For "word" and "character", `<unk>` is added after them if it is not among them. None:
            `<|endoftext|>`; "wordpiece" and "sentencepiece" have their own and take no others.

    Returns:
        A `WordTokenizer`, `CharacterTokenizer`, `ByteBPETokenizer`, `WordPieceTokenizer` or
        `UnigramTokenizer`. Special tokens have the first ids (sentinels the last); characters follow by
        code point, other tokens as the trainer orders them.

    Raises:
        ValueError: If `kind` is unknown, `texts` hold no text, `vocabulary_size` is too small, or
            special tokens are empty, not different, or given to a kind that has its own.
        TypeError: If something else than strings comes in.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {sorted(KINDS)}. Received: kind={kind!r}")
    if kind in _TRAIN_WHOLE:
        if special_tokens is not None:
            raise ValueError(
                f"kind={kind!r} has special tokens of its own; leave `special_tokens` out. "
                f"Received: {special_tokens!r}"
            )
        train, own_tokens = _TRAIN_WHOLE[kind]
        _check_vocabulary_size(kind, vocabulary_size, own_tokens)
        size = DEFAULT_PIECES if vocabulary_size is None else vocabulary_size
        return train(_checked_texts(texts), size)
    special_tokens = _checked_special_tokens(
        (DEFAULT_EOS_TOKEN,) if special_tokens is None else special_tokens
    )
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
        vocab_size=DEFAULT_PIECES if vocabulary_size is None else vocabulary_size,
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


def _train_wordpiece(texts: Iterator[str], vocabulary_size: int) -> Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = list(texts)
    counts: collections.Counter[str] = collections.Counter()  # of characters
    continuing = set()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            counts.update(word)
            continuing.update(word[1:])
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    # Each character takes a token, and another one where it goes on a word.
    alphabet, left = [], vocabulary_size - len(_BERT_TOKENS)
    for character in frequent[:_WORDPIECE_CHARACTERS]:
        left -= 2 if character in continuing else 1
        if left < 0:
            break
        alphabet.append(character)
    # The trainer numbers the continuing characters as its hash table has them, another way in each
    # process, and what it merges first follows from that. As special tokens they have fixed numbers.
    pieces = [f"##{character}" for character in sorted(alphabet) if character in continuing]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[*_BERT_TOKENS, *pieces],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    settings: dict = {}
    text = json_from_vocab(sorted(ids, key=ids.get), settings)
    return Tokenizer.from_json(text, settings=settings)


def _train_sentencepiece(texts: Iterator[str], vocabulary_size: int) -> Tokenizer:
    content = io.BytesIO()
    pad, eos, unk = _T5_TOKENS
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
            model_writer=content,
            model_type="unigram",
            vocab_size=vocabulary_size - SENTINELS,
            hard_vocab_limit=False,
            max_sentence_length=1 << 30,  # longer lines would be left out without a word
            num_threads=4,  # a sum of another number of parts is another one in the last digit
            minloglevel=2,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece=pad,
            eos_piece=eos,
            unk_piece=unk,
        )
    except RuntimeError as error:
        raise ValueError(
            "The texts must have words enough for a SentencePiece model, and `vocabulary_size` be larger "
            f"than their characters and {SENTINELS} sentinels. "
            f"Received: vocabulary_size={vocabulary_size}: {error}"
        ) from error
    settings: dict = {"tokenizer_class": "T5Tokenizer", "extra_ids": SENTINELS}
    text = json_from_model(content.getvalue(), settings)
    # The tokenizer.json says it all, so that transformers needs no class of its own.
    del settings["tokenizer_class"], settings["extra_ids"]
    return Tokenizer.from_json(text, settings=settings)


_TRAIN = {"word": _train_word, "character": _train_character, "byte_bpe": _train_byte_bpe}
_SENTINEL_TOKENS = tuple(f"<extra_id_{number}>" for number in range(SENTINELS))
# Those with special tokens of their own.
_TRAIN_WHOLE = {
    "wordpiece": (_train_wordpiece, _BERT_TOKENS),
    "sentencepiece": (_train_sentencepiece, (*_T5_TOKENS, *_SENTINEL_TOKENS)),
}
KINDS = (*_TRAIN, *_TRAIN_WHOLE)


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


def _check_vocabulary_size(kind: str, vocabulary_size: int | None, special_tokens: Sequence[str]) -> None:
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
