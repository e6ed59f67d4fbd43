"""Decoding by XLA inside of a graph that reads texts, which XLA cannot."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kerasllm.generation.decoding import DecodeState, decode
from kerasllm.generation.padding import fill_up_rows, fill_up_state, power_of_two
from kerasllm.generation.processors import RowSettings
from kerasllm.generation.stops import RowTexts, StopWatch
from kerasllm.layers.xla import traced_for_xla
from kerasllm.models import LanguageModel

# Between looks at the texts, where a row has a stop string: what is made behind one is lost.
_STEPS_BETWEEN_LOOKS = 8


def decode_compiled(
    model: LanguageModel,
    state: DecodeState,
    settings: RowSettings,
    uniform: tf.Tensor,
    steps: tf.Tensor,
    extra: Mapping[str, Any],
    watch: StopWatch,
) -> DecodeState:
    """Generates as `decode` does and looks at each token, with the same result up to rounding.

    XLA compiles for each number of rows, which is rounded up here, and for each length of the sequences,
    which is the caller's to round up.

    Args:
        model, state, settings, uniform, steps, extra: As in `decode`.
        watch: What looks at the texts in the state.

    Returns:
        The state; its cache is left out.
    """
    rows = tf.size(state.lengths)
    size = power_of_two(rows)
    texts, state = state.texts, fill_up_state(state._replace(texts=()), size, for_xla=True)
    # The first row's, for zeros are no settings.
    repeated = tf.where(tf.range(size) < rows, tf.range(size), 0)
    settings = RowSettings(*(None if part is None else tf.gather(part, repeated) for part in settings))
    uniform, extra = tf.gather(uniform, repeated), fill_up_rows(dict(extra), size)

    def run(state, settings, uniform, extra, steps):
        with traced_for_xla():
            return decode(model, state, settings, uniform, steps, extra)

    run = tf.function(run, jit_compile=True, autograph=False)
    most = tf.where(watch.is_needed, tf.minimum(_STEPS_BETWEEN_LOOKS, steps), steps)

    def turn(number, texts, state):
        before, now = state.lengths, tf.minimum(most, steps - number)
        state = run(state, settings, uniform, extra, now)
        texts, state = look_back(watch, texts, state, before)
        return number + now, texts, state

    _, texts, state = tf.while_loop(
        lambda number, _, state: (number < steps) & tf.reduce_any(state.active),
        turn,
        [tf.constant(0), texts, state],
    )
    kept = state._replace(cache=(), draft_cache=())
    return tf.nest.map_structure(lambda part: part[:rows], kept)._replace(texts=texts)


def look_back(
    watch: StopWatch, texts: RowTexts, state: DecodeState, lengths_before: tf.Tensor
) -> tuple[RowTexts, DecodeState]:
    """Looks at the tokens of several steps one by one, and takes back what came after a stop string.

    Args:
        watch: What looks at the texts.
        texts: The texts before the steps, of the first rows of the state.
        state: The state after the steps.
        lengths_before: Int32 `[batch]`: the lengths of the rows before them.

    Returns:
        The texts and the state.
    """
    rows, size = tf.size(texts.end), tf.size(state.lengths)
    sequences, made, before = state.sequences[:rows], state.lengths[:rows], lengths_before[:rows]

    def look(lengths, active, texts):
        longer = tf.where(active, tf.minimum(lengths + 1, made), lengths)
        seen = DecodeState(sequences, longer, longer, active, cache=(), texts=texts)
        seen = watch.look(seen, lengths)
        return longer, seen.active & (longer < made), seen.texts

    lengths, _, texts = tf.while_loop(
        lambda lengths, active, texts: tf.reduce_any(active),
        look,
        [before, (before < made) & watch.is_needed, texts],
    )
    lengths = tf.where(texts.end < 0, made, lengths)
    is_first = tf.range(size) < rows
    lengths, ends = fill_up_rows((lengths, tf.where(texts.end < 0, 0, 1)), size)
    return texts, state._replace(
        lengths=tf.where(is_first, lengths, state.lengths), active=state.active & (ends == 0)
    )
