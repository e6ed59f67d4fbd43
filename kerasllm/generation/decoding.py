"""The steps of a generation as graph functions: prefill, choose, append, decode.

They hold for any batch: prompts of one batch may differ in length. They are padded on the right; columns
of the cache are positions of the text, each row decodes at its own position, and what stands behind a
row's last token is hidden from it until it is overwritten. So a row's result does not depend on its
neighbours. The same functions make the exported graph and, compiled by XLA, the live one.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from kerasllm.generation.processors import RowSettings, process_scores
from kerasllm.generation.sampling import choose_tokens
from kerasllm.models import LanguageModel


class LogProbabilities(NamedTuple):
    """Log-probabilities of new tokens under the model itself, before any setting changes the scores.

    Args:
        chosen: Float32 `[batch, length]`, of the token at that place of the text.
        top_ids: Int32 `[batch, length, count]`: the likeliest tokens of that place.
        top: Float32 `[batch, length, count]`, theirs.
    """

    chosen: tf.Tensor
    top_ids: tf.Tensor
    top: tf.Tensor


class DecodeState(NamedTuple):
    """A batch on its way.

    The last token of each row is not in the cache yet, but in contrastive search, which has `search`.

    Args:
        sequences: Int32 `[batch, length]`: each row's prompt and new tokens, zeros behind.
        lengths: Int32 `[batch]`, how many tokens each row has.
        prompt_lengths: Int32 `[batch]`.
        active: Booleans `[batch]`: rows that go on.
        cache: The model's key-value cache, of the same length as `sequences`.
        log_probabilities: `LogProbabilities`, or () where nobody asked.
        draft_cache: The cache of a draft model, or () if there is none.
        search: What contrastive search has to remember, or ().
        texts: What a graph that looks for stop strings has to remember, or ().
    """

    sequences: tf.Tensor
    lengths: tf.Tensor
    prompt_lengths: tf.Tensor
    active: tf.Tensor
    cache: Any
    log_probabilities: LogProbabilities | tuple = ()
    draft_cache: Any = ()
    search: Any = ()
    texts: Any = ()


def pad_to(tensor: tf.Tensor, length: tf.Tensor, axis: int, value=0) -> tf.Tensor:
    """Fills a tensor up at the end of an axis."""
    padding = [[0, 0]] * len(tensor.shape)
    padding[axis] = [0, length - tf.shape(tensor)[axis]]
    return tf.pad(tensor, padding, constant_values=value)


def prefill(
    model: LanguageModel,
    prompts: tf.Tensor,
    prompt_lengths: tf.Tensor,
    length: tf.Tensor,
    num_log_probabilities: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[tf.Tensor, DecodeState]:
    """Reads the prompts.

    Args:
        model: The model.
        prompts: Int32 `[batch, longest]`, zeros behind each prompt.
        prompt_lengths: Int32 `[batch]`, at least 1.
        length: Int32 `[]`, room for prompt and new tokens.
        num_log_probabilities: How many alternatives to keep the log-probabilities of; None: nothing.
        extra: Further tensors for each call of the model, such as an encoder's output.

    Returns:
        Logits of the first new token, `[batch, vocabulary]`, and the state.
    """
    batch = tf.shape(prompts)[0]
    logits, cache = model(
        prompts,
        cache=model.make_cache(batch, length),
        cache_index=0,
        last_index=prompt_lengths - 1,
        **(extra or {}),
    )
    return logits[:, 0], first_state(prompts, prompt_lengths, length, cache, num_log_probabilities)


def first_state(
    prompts: tf.Tensor,
    prompt_lengths: tf.Tensor,
    length: tf.Tensor,
    cache: Any,
    num_log_probabilities: int | None = None,
) -> DecodeState:
    """The state when the prompts have been read; arguments as in `prefill`."""
    batch = tf.shape(prompts)[0]
    log_probabilities = ()
    if num_log_probabilities is not None:
        shape = [batch, length, num_log_probabilities]
        log_probabilities = LogProbabilities(
            tf.zeros(shape[:2]), tf.zeros(shape, tf.int32), tf.zeros(shape)
        )
    return DecodeState(
        sequences=pad_to(prompts, length, axis=1),
        lengths=prompt_lengths,
        prompt_lengths=prompt_lengths,
        active=tf.ones([batch], tf.bool),
        cache=cache,
        log_probabilities=log_probabilities,
    )


def append_token(
    state: DecodeState,
    logits: tf.Tensor,
    settings: RowSettings,
    uniform: tf.Tensor,
    rows: tf.Tensor | None = None,
) -> DecodeState:
    """Chooses the next token of each row and appends it.

    Args:
        state: The state.
        logits: Floats `[batch, vocabulary]`.
        settings: The settings.
        uniform: Float32 `[batch, steps]`, a random number for each new token of each row.
        rows: As in `append`.

    Returns:
        The state.
    """
    token = _next_token(logits, state.sequences, state.lengths, state.prompt_lengths, settings, uniform)
    return append(state, token, logits, settings, rows)


@tf.function(autograph=False, reduce_retracing=True)  # to be traced only once for a kind of settings
def _next_token(logits, sequences, lengths, prompt_lengths, settings, uniform) -> tf.Tensor:
    """Processes the scores and chooses a token for each row, int32 `[batch]`."""
    scores = process_scores(logits, sequences, lengths, prompt_lengths, settings)
    count = tf.minimum(lengths - prompt_lengths, tf.shape(uniform)[1] - 1)
    return choose_tokens(
        scores,
        tf.gather(uniform, count, batch_dims=1),
        settings.temperature,
        settings.top_k,
        settings.top_p,
        settings.min_p,
        settings.typical_p,
    )


def append(
    state: DecodeState,
    token: tf.Tensor,
    logits: tf.Tensor,
    settings: RowSettings,
    rows: tf.Tensor | None = None,
) -> DecodeState:
    """Appends a token to each row, and ends rows.

    Args:
        state: The state.
        token: Int32 `[batch]`.
        logits: Floats `[batch, vocabulary]`, from which it was chosen.
        settings: The settings.
        rows: Booleans `[batch]`: which rows get their token. None: those that are active.

    Returns:
        The state; end tokens are not appended.
    """
    rows = state.active if rows is None else rows
    is_end = tf.reduce_any(token[:, None] == settings.end_ids, axis=-1)
    appended = rows & ~is_end
    here = tf.range(tf.shape(state.sequences)[1])[None] == state.lengths[:, None]
    here &= appended[:, None]
    log_probabilities = state.log_probabilities
    if log_probabilities:
        log_probabilities = _note(log_probabilities, here, logits, token)
    lengths = state.lengths + tf.cast(appended, tf.int32)
    goes_on = appended & (lengths - state.prompt_lengths < settings.max_new_tokens)
    return state._replace(
        sequences=tf.where(here, token[:, None], state.sequences),
        lengths=lengths,
        active=tf.where(rows, goes_on, state.active),
        log_probabilities=log_probabilities,
    )


def _note(kept: LogProbabilities, here, logits, token) -> LogProbabilities:
    """Writes the log-probabilities of a token at its place."""
    values = tf.nn.log_softmax(tf.cast(logits, tf.float32))
    chosen = tf.where(here, tf.gather(values, token, batch_dims=1)[:, None], kept.chosen)
    if not kept.top.shape[-1]:
        return kept._replace(chosen=chosen)
    top, top_ids = tf.math.top_k(values, kept.top.shape[-1])
    return LogProbabilities(
        chosen,
        tf.where(here[:, :, None], top_ids[:, None], kept.top_ids),
        tf.where(here[:, :, None], top[:, None], kept.top),
    )


def last_tokens(state: DecodeState) -> tf.Tensor:
    """The last token of each row, int32 `[batch, 1]`."""
    return tf.gather(state.sequences, state.lengths[:, None] - 1, batch_dims=1)


def decode(
    model: LanguageModel,
    state: DecodeState,
    settings: RowSettings,
    uniform: tf.Tensor,
    steps: tf.Tensor,
    extra: Mapping[str, Any] | None = None,
    look: Callable[[DecodeState, tf.Tensor], DecodeState] | None = None,
) -> DecodeState:
    """Generates token by token until all rows have ended, or for a number of steps.

    Args:
        model: The model.
        state: The state, with at least one token in each row.
        settings: The settings.
        uniform: As in `append_token`.
        steps: Int32 `[]`.
        extra: As in `prefill`.
        look: What is done after each step, with the state and the lengths before. None: nothing.

    Returns:
        The state.
    """

    def step(number, state):
        # A row that has ended is computed along: its last token once more, at its own place.
        logits, cache = model(
            last_tokens(state), cache=state.cache, cache_index=state.lengths - 1, **(extra or {})
        )
        lengths = state.lengths
        state = append_token(state._replace(cache=cache), logits[:, 0], settings, uniform)
        return number + 1, state if look is None else look(state, lengths)

    def goes_on(number, state):
        return (number < steps) & tf.reduce_any(state.active)

    return tf.while_loop(goes_on, step, [tf.constant(0), state])[1]
