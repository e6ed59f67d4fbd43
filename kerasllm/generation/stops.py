"""Stop strings inside of a graph: a row ends when one is complete in its text."""

from typing import NamedTuple

import tensorflow as tf

from kerasllm.generation.checks import after, check_texts, rule
from kerasllm.generation.decoding import DecodeState, last_tokens
from kerasllm.tokenizers.decoding import Decoder, StreamState

# What a request may have at most: the work of a step grows with both.
MOST_STOP_STRINGS = 16
LONGEST_STOP_STRING = 256


class StopStrings(NamedTuple):
    """Stop strings as bytes.

    Args:
        bytes: Uint8 `[batch, count, longest]`, zeros behind.
        lengths: Int32 `[batch, count]`; 0: there is none.
    """

    bytes: tf.Tensor
    lengths: tf.Tensor


class RowTexts(NamedTuple):
    """The texts of rows on their way.

    Args:
        stream: What the decoder remembers.
        text: Strings `[batch]`: what is final.
        end: Int32 `[batch]`: the byte at which the text ends before a stop string; -1: there is none.
    """

    stream: StreamState
    text: tf.Tensor
    end: tf.Tensor


def check_stop_strings(stop: tf.Tensor) -> tf.Tensor:
    """Returns stop strings `[batch, count]` if there are not too many of them."""
    stop = tf.ensure_shape(stop, [None, None])
    count = tf.shape(stop)[1]
    message = f"There may be at most {MOST_STOP_STRINGS} `stop` strings per row. Received: {{}}."
    return after([rule(count <= MOST_STOP_STRINGS, message, count)], stop)


def read_stop_strings(stop: tf.Tensor) -> StopStrings:
    """Checks stop strings and lays them out.

    Args:
        stop: Strings `[batch, count]`. A row's list ends at its first empty string, so that a server may
            fill rows up with whatever it likes behind that.

    Returns:
        The stop strings.
    """
    stop = check_stop_strings(stop)
    stop = check_texts("stop", stop, LONGEST_STOP_STRING)
    counts = tf.math.cumprod(tf.cast(stop != "", tf.int32), axis=1)
    lengths = tf.strings.length(stop) * counts
    longest = tf.reduce_max(tf.pad(lengths, [[0, 0], [0, 1]]))
    padded = tf.io.decode_raw(stop, tf.uint8, fixed_length=tf.maximum(longest, 1))
    return StopStrings(padded, lengths)


def find_stops(texts: tf.Tensor, stops: StopStrings) -> tf.Tensor:
    """Finds where texts end that are read until a stop string is complete, as `find_stop` does.

    Args:
        texts: Strings `[batch]`.
        stops: The stop strings.

    Returns:
        Int32 `[batch]`, the byte at which the stop string begins; -1: there is none.
    """
    sizes = tf.strings.length(texts)
    size = tf.maximum(tf.reduce_max(sizes), 1)
    width = tf.shape(stops.bytes)[2]
    text_bytes = tf.io.decode_raw(texts, tf.uint8, fixed_length=size)
    text_bytes = tf.pad(text_bytes, [[0, 0], [0, width]])
    starts = tf.range(size)
    offsets = tf.range(width)
    windows = tf.gather(text_bytes, starts[:, None] + offsets[None], axis=1)  # [batch, starts, width]
    equal = windows[:, None] == stops.bytes[:, :, None]
    lengths = stops.lengths[:, :, None]
    found = tf.reduce_all(equal | (offsets >= lengths[..., None]), axis=-1)  # [batch, count, starts]
    ends = starts + lengths
    found &= (lengths > 0) & (ends <= sizes[:, None, None])
    # The first that is complete, and of those the longest.
    never = tf.int32.max
    first_end = tf.reduce_min(tf.where(found, ends, never), axis=[1, 2], keepdims=True)
    start = tf.reduce_min(tf.where(found & (ends == first_end), starts, never), axis=[1, 2])
    return tf.where(start == never, -1, start)


class StopWatch:
    """Looks at the text of each row while it is generated.

    Args:
        decoder: The tokenizer's.
        stops: The stop strings.
        always: Whether the texts are read where no row has a stop string, too.

    Attributes:
        is_needed: Boolean `[]`: whether the texts are read.
    """

    def __init__(self, decoder: Decoder, stops: StopStrings, always: bool = False):
        self._decoder = decoder
        self._stops = stops
        longest = tf.reduce_max(tf.pad(stops.lengths, [[0, 0], [0, 1]]))
        self.is_needed = tf.constant(True) if always else longest > 0
        self._longest = tf.maximum(longest, 1)

    def start(self, before: tf.RaggedTensor) -> RowTexts:
        """Begins.

        Args:
            before: Int32 `[batch, None]`: the ids that the new text goes on from.

        Returns:
            The texts before the first token.
        """
        count = before.nrows(tf.int32)
        stream = self._decoder.start_stream(before)
        return RowTexts(stream, tf.fill([count], ""), tf.fill([count], -1))

    def look(self, state: DecodeState, lengths_before: tf.Tensor) -> DecodeState:
        """Reads the tokens of a step, and ends the rows whose stop string is complete.

        Args:
            state: The state after the step.
            lengths_before: Int32 `[batch]`: the lengths of the rows before the step.

        Returns:
            The state.
        """

        def read():
            is_new = state.lengths > lengths_before
            stream, texts = self._decoder.push(state.texts.stream, last_tokens(state)[:, 0], is_new)
            rows = self._extend(state.texts._replace(stream=stream), texts)
            return rows, state.active & (rows.end < 0)

        texts, active = tf.cond(self.is_needed, read, lambda: (state.texts, state.active))
        return state._replace(texts=texts, active=active)

    def finish(self, state: DecodeState) -> RowTexts:
        """Takes note that no token comes any more.

        Args:
            state: The state.

        Returns:
            The texts to the end.
        """

        def read():
            last = tf.where(state.texts.end < 0, self._decoder.end_stream(state.texts.stream), "")
            return self._extend(state.texts, last)

        return tf.cond(self.is_needed, read, lambda: state.texts)

    def _extend(self, rows: RowTexts, new: tf.Tensor) -> RowTexts:
        """Adds to the texts and looks for stop strings where one may have become complete."""
        text = rows.text + new
        end = tf.strings.length(text)
        start = tf.maximum(end - tf.strings.length(new) - (self._longest - 1), 0)
        found = find_stops(tf.strings.substr(text, start, end - start), self._stops)
        is_new = (found >= 0) & (rows.end < 0)
        return rows._replace(text=text, end=tf.where(is_new, start + found, rows.end))
