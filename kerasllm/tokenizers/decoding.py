"""From ids back to text, whole or token by token, as the decoders of `tokenizers` do."""

import codecs
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from kerasllm.tokenizers.json_fields import field, steps
from kerasllm.tokenizers.ragged import cumulative, row_ids
from kerasllm.tokenizers.utf8 import VALID_UTF8, replace_invalid_utf8

REPLACEMENT_CHARACTER = "\ufffd"

# A step that turns one token into text: (token, whether it is the first of its text) -> text.
TokenStep = Callable[[str, bool], str]


class StreamState(NamedTuple):
    """What has to be remembered of texts that are decoded token by token in a graph.

    Args:
        pending: Strings `[batch]`: bytes that are no text yet.
        begins_text: Booleans `[batch]`: no token with a text has come.
        to_strip: Int32 `[batch]`: how many characters are still to be taken off the beginning.
    """

    pending: tf.Tensor
    begins_text: tf.Tensor
    to_strip: tf.Tensor


class Decoder(tf.Module):
    """Turns ids into texts as a tokenizer.json's `decoder` says.

    Every supported decoder comes down to: a text for each token (another one where the token is the
    first), put together; byte tokens put together to characters; some characters off the beginning.

    Args:
        config: The entry `decoder`.
        tokens: The tokens, in the order of their ids.
        special_ids: The ids that may be skipped.

    Raises:
        ValueError: If the decoder is not supported.
    """

    def __init__(self, config: dict | None, tokens: Sequence[str], special_ids: set[int]):
        super().__init__()
        plan = _Plan(config)
        self._unknown = len(tokens)  # What an id outside of the vocabulary is taken for.
        # Plain objects in a tuple stay out of TensorFlow's object tracking, which is slow on lists.
        self._plan = plan
        self._streaming = _TokenTexts(
            tuple(plan.bytes_of(token, is_first=True) for token in tokens),
            tuple(plan.bytes_of(token, is_first=False) for token in tokens),
            frozenset(i for i, token in enumerate(tokens) if plan.is_byte(token)),
            frozenset(special_ids),
        )
        texts = self._streaming
        self._texts = tf.constant([*texts.later, b""])
        self._has_first_texts = texts.first != texts.later
        if self._has_first_texts:
            self._first_texts = tf.constant([*texts.first, b""])
        self._is_special = tf.constant([i in special_ids for i in range(len(tokens) + 1)])
        if plan.has_byte_tokens:
            self._is_byte = tf.constant([i in texts.byte_ids for i in range(len(tokens) + 1)])

    def decode(
        self, ids: tf.RaggedTensor, skip_special_tokens: bool, after: tf.RaggedTensor | None = None
    ) -> tf.Tensor:
        """`[batch, None]` integer ids -> `[batch]` strings, valid UTF-8.

        `after` has the ids that come before those of each row; None: each row begins a text.
        """
        ids = self._with_text(ids, skip_special_tokens)
        begins_text = tf.ones([ids.nrows()], tf.bool)
        if after is not None:
            begins_text = self._with_text(after, skip_special_tokens).row_lengths() == 0
        texts = tf.gather(self._texts, ids.values)
        if self._has_first_texts:
            row = row_ids(ids)
            is_first = tf.range(tf.size(texts, tf.int64)) == tf.gather(ids.row_splits, row)
            is_first &= tf.gather(begins_text, row)
            texts = tf.where(is_first, tf.gather(self._first_texts, ids.values), texts)
        if self._plan.has_byte_tokens:
            texts = self._replace_invalid_runs(texts, ids)
        texts = tf.strings.reduce_join(ids.with_values(texts), axis=1)
        if self._plan.is_byte_level:
            texts = replace_invalid_utf8(texts)
        if self._plan.strip_count:
            character = f"\\x{{{ord(self._plan.strip_character):x}}}"
            pattern = f"^{character}{{1,{self._plan.strip_count}}}"
            stripped = tf.strings.regex_replace(texts, pattern, "", replace_global=False)
            texts = tf.where(begins_text, stripped, texts)
        return texts

    # Token by token, as `StreamingDecoder` does it in Python

    def start_stream(self, after: tf.RaggedTensor) -> StreamState:
        """Begins to decode texts token by token, without special tokens.

        Args:
            after: Integers `[batch, None]`: the ids that come before those of each row.

        Returns:
            The state before the first token.
        """
        begins_text = self._with_text(after, skip_special_tokens=True).row_lengths() == 0
        return StreamState(
            pending=tf.fill(tf.shape(begins_text), ""),
            begins_text=begins_text,
            to_strip=tf.where(begins_text, self._plan.strip_count, 0),
        )

    def push(self, state: StreamState, ids: tf.Tensor, is_new: tf.Tensor) -> tuple[StreamState, tf.Tensor]:
        """Takes the next token of each row.

        Args:
            state: The state.
            ids: Integers `[batch]`.
            is_new: Booleans `[batch]`: which rows have a next token.

        Returns:
            The state, and the texts that are final now and were not before: strings `[batch]`, UTF-8.
        """
        ids = tf.cast(ids, tf.int64)
        has_text = is_new & (ids >= 0) & (ids < self._unknown)
        ids = tf.where(has_text, ids, self._unknown)
        has_text &= ~tf.gather(self._is_special, ids)
        ids = tf.where(has_text, ids, self._unknown)
        texts, pending = tf.gather(self._texts, ids), state.pending
        if self._has_first_texts:
            texts = tf.where(state.begins_text, tf.gather(self._first_texts, ids), texts)
        if self._plan.is_byte_level:
            joined = pending + texts
            end = tf.strings.length(joined) - _count_incomplete(joined)
            pending = tf.strings.substr(joined, end, 3 * tf.ones_like(end))
            texts = replace_invalid_utf8(tf.strings.substr(joined, tf.zeros_like(end), end))
        elif self._plan.has_byte_tokens:
            is_byte = tf.gather(self._is_byte, ids)
            run = tf.where(is_byte, pending + texts, pending)
            ends_run = has_text & ~is_byte
            texts = tf.where(ends_run, _text_of_run(run) + texts, "")
            pending = tf.where(ends_run, "", run)
        texts, to_strip = self._strip_start(texts, state.to_strip)
        return StreamState(pending, state.begins_text & ~has_text, to_strip), texts

    def end_stream(self, state: StreamState) -> tf.Tensor:
        """Ends the texts; returns what was held back, strings `[batch]`."""
        is_byte_level = self._plan.is_byte_level
        texts = replace_invalid_utf8(state.pending) if is_byte_level else _text_of_run(state.pending)
        return self._strip_start(texts, state.to_strip)[0]

    def _strip_start(self, texts: tf.Tensor, to_strip: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Takes characters off the beginnings; returns how many are still to be taken, too."""
        if not self._plan.strip_count:
            return texts, to_strip
        character = self._plan.strip_character
        size = len(character.encode())
        rest = tf.strings.regex_replace(texts, f"^\\x{{{ord(character):x}}}+", "", replace_global=False)
        found = (tf.strings.length(texts) - tf.strings.length(rest)) // size
        stripped = tf.minimum(found, to_strip)
        length = tf.strings.length(texts)
        texts = tf.strings.substr(texts, stripped * size, length)
        return texts, tf.where(tf.strings.length(rest) > 0, 0, to_strip - stripped)

    def _with_text(self, ids: tf.RaggedTensor, skip_special_tokens: bool) -> tf.RaggedTensor:
        """The ids, int64, without those that have no text."""
        values = tf.cast(ids.values, tf.int64)
        is_known = (values >= 0) & (values < self._unknown)
        keep = is_known
        if skip_special_tokens:
            values = tf.where(is_known, values, self._unknown)
            keep &= ~tf.gather(self._is_special, values)
        return tf.RaggedTensor.from_row_splits(
            tf.gather(values, tf.where(keep)[:, 0]),
            tf.gather(cumulative(keep), ids.row_splits),
            validate=False,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for where it is not the first of its text."""
        return self._streaming.later[token_id]

    def _replace_invalid_runs(self, texts: tf.Tensor, ids: tf.RaggedTensor) -> tf.Tensor:
        """Puts U+FFFD for each byte of a run of byte tokens that is not valid UTF-8 as a whole."""
        is_byte = tf.gather(self._is_byte, ids.values)
        row = row_ids(ids)
        goes_on = is_byte[1:] & is_byte[:-1] & (row[1:] == row[:-1])
        run = tf.cumsum(tf.concat([tf.zeros_like(ids.values[:1]), tf.cast(~goes_on, tf.int64)], 0))
        joined = tf.strings.unsorted_segment_join(texts, run, tf.size(texts))
        is_valid = tf.strings.regex_full_match(joined, VALID_UTF8)
        return tf.where(is_byte & ~tf.gather(is_valid, run), REPLACEMENT_CHARACTER, texts)


def _count_incomplete(texts: tf.Tensor) -> tf.Tensor:
    """How many bytes at the end of each text begin a character that may yet be completed, int32."""
    end = tf.strings.length(texts)
    last = tf.strings.substr("\0\0\0" + texts, end, 3 * tf.ones_like(end))
    first, second, third = tf.unstack(tf.cast(tf.io.decode_raw(last, tf.uint8), tf.int32)[:, :3], 3, axis=1)

    def begins(lead, next_byte, least_lead):
        """Whether two bytes may begin a longer character (Unicode, table 3-7).

        Python's decoder knows half of a surrogate pair for an error only when it is whole.
        """
        low = tf.where(lead == 0xE0, 0xA0, tf.where(lead == 0xF0, 0x90, 0x80))
        high = tf.where(lead == 0xF4, 0x8F, 0xBF)
        return (lead >= least_lead) & (lead <= 0xF4) & (next_byte >= low) & (next_byte <= high)

    is_continuation = (third >= 0x80) & (third <= 0xBF)
    count = tf.where(begins(first, second, 0xF0) & is_continuation, 3, 0)
    count = tf.where(begins(second, third, 0xE0), 2, count)
    return tf.where((third >= 0xC2) & (third <= 0xF4), 1, count)


def _text_of_run(runs: tf.Tensor) -> tf.Tensor:
    """Runs of byte tokens as text: one that is no valid UTF-8 is U+FFFD for each byte."""
    is_valid = tf.strings.regex_full_match(runs, VALID_UTF8)
    return tf.where(is_valid, runs, tf.strings.regex_replace(runs, r"\C", REPLACEMENT_CHARACTER))


class _TokenTexts:
    """What `Decoder` and `StreamingDecoder` know of each token."""

    def __init__(self, first: tuple, later: tuple, byte_ids: frozenset, special_ids: frozenset):
        self.first = first
        self.later = later
        self.byte_ids = byte_ids
        self.special_ids = special_ids


class StreamingDecoder:
    """Decodes ids that come one at a time; what it gives out is final, never half a character.

    All that it has given out, and what `finish` would give, is at every moment what the tokenizer's
    `decode` makes of all ids so far. With byte-level tokens at most 3 bytes are held back; with
    SentencePiece's byte tokens, a run of them until it ends, for one wrong byte spoils the run.

    ```python
    decoder = StreamingDecoder(tokenizer)
    for token_id in ids:
        print(decoder.add(token_id), end="")
    print(decoder.finish())
    ```

    Args:
        tokenizer: The tokenizer.
        skip_special_tokens: Whether special tokens are left out.
        after: The ids that come before, see `Tokenizer.detokenize`.
    """

    def __init__(self, tokenizer, skip_special_tokens: bool = True, after: Sequence[int] = ()):
        self._decoder: Decoder = tokenizer.decoder
        self._skip_special_tokens = skip_special_tokens
        self._restart(begins_text=not any(self._has_text(token_id) for token_id in after))

    def _restart(self, begins_text: bool = True) -> None:
        self._is_first = begins_text
        self._to_strip = self._decoder._plan.strip_count if begins_text else 0
        self._byte_run = b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token_id: int) -> str:
        """Takes the next id; returns the text that is final with it and was not before."""
        texts = self._decoder._streaming
        token_id = int(token_id)
        if not self._has_text(token_id):
            return ""
        text = (texts.first if self._is_first else texts.later)[token_id]
        self._is_first = False
        if self._decoder._plan.is_byte_level:
            return self._without_start(self._utf8.decode(text))
        if token_id in texts.byte_ids:
            self._byte_run += text
            return ""
        return self._without_start(self._end_of_byte_run() + text.decode("utf-8"))

    def finish(self) -> str:
        """Ends the text; returns what was held back. The next id begins another text."""
        text = self._without_start(self._end_of_byte_run() + self._utf8.decode(b"", final=True))
        self._restart()
        return text

    def _has_text(self, token_id: int) -> bool:
        texts = self._decoder._streaming
        if not 0 <= token_id < len(texts.later):
            return False
        return not (self._skip_special_tokens and token_id in texts.special_ids)

    def _end_of_byte_run(self) -> str:
        run, self._byte_run = self._byte_run, b""
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return REPLACEMENT_CHARACTER * len(run)

    def _without_start(self, text: str) -> str:
        if not self._to_strip or not text:
            return text
        rest = text.lstrip(self._decoder._plan.strip_character)
        stripped = min(len(text) - len(rest), self._to_strip)
        self._to_strip = 0 if rest else self._to_strip - stripped
        return text[stripped:]


class _Plan:
    """A decoder, its steps sorted into what is done to tokens and what to the whole text."""

    def __init__(self, config: dict | None):
        self.is_byte_level = False
        self.has_byte_tokens = False
        self.strip_character, self.strip_count = " ", 0
        self._token_steps: list[TokenStep] = []
        all_steps = steps(config, "decoders")
        kinds = [step["type"] for step in all_steps]
        if not kinds:
            self._token_steps.append(lambda token, is_first: token if is_first else f" {token}")
        for step, kind, before in zip(
            all_steps, kinds, [kinds[:i] for i in range(len(kinds))], strict=True
        ):
            is_whole_text = "Fuse" in before or "ByteLevel" in before
            if kind == "Fuse":
                continue
            if kind == "Strip" and is_whole_text and not self.strip_count:
                self.strip_character, self.strip_count = _read_strip(step)
                supported = True
            elif kind == "ByteLevel" and not before:
                self.is_byte_level = supported = True
            elif kind == "ByteFallback" and not is_whole_text and not self.has_byte_tokens:
                self.has_byte_tokens = supported = True
            elif kind in _TOKEN_STEPS and not is_whole_text and not self.has_byte_tokens:
                self._token_steps.append(_TOKEN_STEPS[kind](step))
                supported = True
            else:
                supported = False
            if not supported:
                raise ValueError(
                    "`decoder` of a tokenizer.json must be ByteLevel, or steps for tokens "
                    f"({', '.join(sorted(_TOKEN_STEPS))}), ByteFallback, Fuse, and Strip, in "
                    f"this order. Received: {kinds}"
                )

    def text_of(self, token: str, is_first: bool) -> str:
        for step in self._token_steps:
            token = step(token, is_first)
        return token

    def is_byte(self, token: str) -> bool:
        """Whether a token stands for a byte, as `<0x0A>`."""
        return self.has_byte_tokens and self._byte_of(self.text_of(token, is_first=False)) is not None

    def bytes_of(self, token: str, is_first: bool) -> bytes:
        """What a token stands for in a text."""
        text = self.text_of(token, is_first)
        if self.is_byte_level:
            return bytes_of_byte_level(text)
        byte = self._byte_of(text) if self.has_byte_tokens else None
        return text.encode("utf-8") if byte is None else byte

    @staticmethod
    def _byte_of(text: str) -> bytes | None:
        match = re.fullmatch("<0x([+0-9A-Fa-f][0-9A-Fa-f])>", text)
        return bytes([int(match[1], 16)]) if match else None


def _read_character(step: dict, name: str) -> str:
    character = field(step, name, str)
    if len(character) != 1:
        raise ValueError(f"`{name}` of a decoder must be one character. Received: {character!r}")
    return character


def _read_strip(step: dict) -> tuple[str, int]:
    """The character of the decoder Strip, and how many to take off the start."""
    start, stop = field(step, "start", int), field(step, "stop", int)
    if not 0 <= start <= 1000 or stop != 0:
        raise ValueError(
            "The decoder Strip must take 0 to 1000 characters off the start and none off the end. "
            f"Received: start={start}, stop={stop}"
        )
    return _read_character(step, "content"), start


def _strip(step: dict) -> TokenStep:
    character, count = _read_strip(step)
    return lambda token, is_first: token[min(len(token) - len(token.lstrip(character)), count) :]


def _replace(step: dict) -> TokenStep:
    pattern, content = field(step, "pattern", dict), field(step, "content", str)
    if set(pattern) != {"String"}:
        raise ValueError(f"`pattern` of the decoder Replace must be a String. Received: {pattern!r}")
    old = field(pattern, "String", str)
    return lambda token, is_first: token.replace(old, content) if old else token


def _metaspace(step: dict) -> TokenStep:
    """The mark of a word's beginning is a space, but for the first token."""
    mark = _read_character(step, "replacement")
    scheme = field(
        step, "prepend_scheme", str, "always" if field(step, "add_prefix_space", bool, True) else "never"
    )
    first = " " if scheme == "never" else ""
    return lambda token, is_first: token.replace(mark, first if is_first else " ")


def _word_piece(step: dict) -> TokenStep:
    prefix, cleanup = field(step, "prefix", str, "##"), field(step, "cleanup", bool, True)

    def apply(token: str, is_first: bool) -> str:
        if not is_first:
            token = token.removeprefix(prefix) if token.startswith(prefix) else f" {token}"
        for old, new in _CLEANUP if cleanup else ():
            token = token.replace(old, new)
        return token

    return apply


_CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)

_TOKEN_STEPS: dict[str, Callable[[dict], TokenStep]] = {
    "Metaspace": _metaspace,
    "Replace": _replace,
    "Strip": _strip,
    "WordPiece": _word_piece,
}


# The bytes as byte-level tokens spell them: printable ones of Latin-1 by themselves, the others by
# the characters from U+0100 on, in turn.
def _byte_to_character() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_TO_CHARACTER = _byte_to_character()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


def bytes_of_byte_level(token: str) -> bytes:
    """The bytes a byte-level token stands for; one not spelled in bytes stands for itself."""
    if CHARACTER_TO_BYTE.keys() >= set(token):
        return bytes(CHARACTER_TO_BYTE[character] for character in token)
    return token.encode("utf-8")
