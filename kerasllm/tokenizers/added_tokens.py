"""Finding a tokenizer's added tokens in texts, special and plain ones, as `tokenizers` does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import tensorflow as tf

from kerasllm.tokenizers.json_fields import field
from kerasllm.tokenizers.marks import MARK, SEPARATOR, split_at_separators
from kerasllm.tokenizers.unicode import unicode_class

NO_TOKEN = -1


@dataclass(frozen=True)
class AddedToken:
    """An entry of `added_tokens` in a tokenizer.json.

    Attributes:
        content: The spelling.
        id: The id.
        special: Whether it is for the program only: no text of a user becomes it.
        single_word: Whether it counts only with no word character beside it.
        lstrip: Whether the whitespace before it goes with it.
        rstrip: Whether the whitespace after it goes with it.
        normalized: Whether it is searched in the normalized text, in its normalized spelling.
    """

    content: str
    id: int
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False

    @classmethod
    def from_json(cls, entry: dict) -> "AddedToken":
        """Reads an entry of `added_tokens`; ValueError if it is none."""
        if not isinstance(entry, dict):
            raise ValueError(f"An added token must be an object. Received: {entry!r}")
        special = field(entry, "special", bool, False)
        token = cls(
            field(entry, "content", str),
            field(entry, "id", int),
            special,
            *(field(entry, name, bool, False) for name in ("single_word", "lstrip", "rstrip")),
            field(entry, "normalized", bool, not special),
        )
        if not token.content:
            raise ValueError(f"An added token must not be empty. Received: {entry!r}")
        return token


class Stretches(NamedTuple):
    """Texts cut at added tokens.

    Attributes:
        strings: `[n]` strings, in the order of the texts; empty for a token.
        text: `[n]` int64, the index of each one's text.
        token_id: `[n]` int32, NO_TOKEN for plain text.
    """

    strings: tf.Tensor
    text: tf.Tensor
    token_id: tf.Tensor

    @classmethod
    def of_texts(cls, texts: tf.Tensor) -> "Stretches":
        return cls(texts, tf.range(tf.size(texts, tf.int64)), tf.fill(tf.shape(texts), NO_TOKEN))

    def is_plain(self) -> tf.Tensor:
        return self.token_id == NO_TOKEN

    def begins_text(self) -> tf.Tensor:
        """`[n]` bool, whether a stretch begins where its text begins."""
        return tf.concat([[True], self.text[1:] != self.text[:-1]], 0)[: tf.size(self.text)]


class AddedTokens(tf.Module):
    """Cuts texts at the spellings of some added tokens; of several at one place the longest counts.

    Args:
        tokens: The tokens, at least one.
        spellings: How each is spelled in the texts to be cut.
    """

    def __init__(self, tokens: Sequence[AddedToken], spellings: Sequence[str]):
        super().__init__()
        if len(set(spellings)) < len(tokens) or "" in spellings:
            raise ValueError(
                "Added tokens must differ, also when normalized, and not become empty. Received: "
                f"{[token.content for token in tokens]}, which normalized are {list(spellings)}"
            )
        self._pattern = _any_of(spellings)
        self._ids = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                tf.constant([MARK + spelling.encode() for spelling in spellings]),
                tf.constant([token.id for token in tokens], tf.int32),
            ),
            NO_TOKEN,
        )
        # The ids with an option, or None where no token has it and its ops can be left out.
        self._with_option = {
            option: tf.constant([token.id for token in tokens if getattr(token, option)])
            for option in ("special", "single_word", "lstrip", "rstrip")
            if any(getattr(token, option) for token in tokens)
        }
        self.are_all_special = all(token.special for token in tokens)

    def cut(self, stretches: Stretches, parse_special: bool) -> Stretches:
        """Cuts the plain stretches at the tokens.

        Args:
            stretches: What is cut already; the strings are valid UTF-8.
            parse_special: Whether special tokens count.

        Returns:
            The stretches with each token found as one more.
        """
        if self.are_all_special and not parse_special:
            return stretches
        marked = tf.strings.regex_replace(
            stretches.strings, self._pattern, SEPARATOR + MARK + rb"\0" + SEPARATOR
        )
        # A mark alone stands for a token that was found before.
        parts, source = split_at_separators(tf.where(stretches.is_plain(), marked, MARK))
        found = self._ids.lookup(parts)
        if not parse_special and "special" in self._with_option:
            found, parts, source = self._without(self._has("special", found), found, parts, source)
        if "single_word" in self._with_option:
            in_word = self._has("single_word", found) & self._is_beside_word(found, parts, source)
            found, parts, source = self._without(in_word, found, parts, source)
        for option, pattern in (("lstrip", "[{}]+$"), ("rstrip", "^[{}]+")):
            if option in self._with_option:
                beside = _next(self._has(option, found), source, 1 if option == "lstrip" else -1)
                stripped = tf.strings.regex_replace(
                    parts, pattern.format(unicode_class("added_token_space")), ""
                )
                parts = tf.where(beside & (found == NO_TOKEN), stripped, parts)
        before = tf.gather(stretches.token_id, source)
        token_id = tf.where(found == NO_TOKEN, before, found)
        strings = tf.where(token_id == NO_TOKEN, parts, "")
        return Stretches(strings, tf.gather(stretches.text, source), token_id)

    def _has(self, option: str, token_ids: tf.Tensor) -> tf.Tensor:
        return tf.reduce_any(token_ids[:, tf.newaxis] == self._with_option[option], axis=1)

    def _is_beside_word(self, found: tf.Tensor, parts: tf.Tensor, source: tf.Tensor) -> tf.Tensor:
        """Whether a word character comes right before or after a part."""
        word = unicode_class("added_token_word")
        spelled = _unmarked(parts, found)
        ends_in_word = tf.strings.regex_full_match(spelled, rf"\C*[{word}]")
        begins_with_word = tf.strings.regex_full_match(spelled, rf"[{word}]\C*")
        return _next(ends_in_word, source, -1) | _next(begins_with_word, source, 1)

    def _without(
        self, dropped: tf.Tensor, found: tf.Tensor, parts: tf.Tensor, source: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Makes tokens plain text again, joined with the plain text around them."""
        is_joined = dropped | ((found == NO_TOKEN) & (parts != MARK))
        begins = ~(is_joined & _next(is_joined, source, -1))
        parts = tf.where(dropped, _unmarked(parts, found), parts)
        run = tf.cumsum(tf.cast(begins, tf.int64)) - 1
        first = tf.where(begins)[:, 0]
        parts = tf.strings.unsorted_segment_join(parts, run, tf.size(first))
        found = tf.where(dropped, NO_TOKEN, found)
        return tf.gather(found, first), parts, tf.gather(source, first)


def _any_of(spellings: Sequence[str]) -> str:
    """A regular expression for any of the spellings; where several match, the longest wins."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return "|".join("".join(f"\\x{{{ord(c):x}}}" for c in spelling) for spelling in longest_first)


def _unmarked(parts: tf.Tensor, found: tf.Tensor) -> tf.Tensor:
    """The parts, those that are a token without the mark before them."""
    mark_length = tf.cast(found != NO_TOKEN, tf.int32)
    return tf.strings.substr(parts, mark_length, tf.strings.length(parts))


def _next(flags: tf.Tensor, source: tf.Tensor, offset: int) -> tf.Tensor:
    """The flags of the next parts (offset 1) or those before (-1); False beyond the source."""
    is_within = source[1:] == source[:-1]
    if offset == 1:
        return tf.concat([flags[1:] & is_within, flags[:0], [False]], 0)[: tf.size(flags)]
    return tf.concat([[False], flags[:-1] & is_within], 0)[: tf.size(flags)]
