"""Several tokens per step: guesses that the model checks all at once.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023). The check here is
stricter than theirs: at each place the model chooses as it always does, with the random number of that
place, and a guess holds if it is what the model chose. So not only the distribution of the texts is
unchanged: with the same seed the text itself is.
"""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from kerasllm.generation.decoding import DecodeState, append_token, last_tokens
from kerasllm.generation.processors import RowSettings
from kerasllm.generation.sampling import FORBIDDEN
from kerasllm.models import LanguageModel

# Prompt lookup compares so many last tokens with the text before; where they do not occur, fewer.
_LONGEST_NGRAM = 3


def look_up(state: DecodeState, count: int) -> tf.Tensor:
    """Guesses that what followed the last tokens earlier in the text follows again.

    Saxena: "Prompt Lookup Decoding" (2023).

    Args:
        state: The state.
        count: Tokens to guess.

    Returns:
        Int32 `[batch, count]`: what followed the latest place with the longest common n-gram; anything
        where there is none.
    """
    sequences, lengths = state.sequences, state.lengths[:, None]
    columns = tf.range(tf.shape(sequences)[1])[None]
    # How many tokens up to each column equal the last ones of the row.
    common = tf.zeros_like(sequences)
    equal = columns < lengths - 1
    for distance in range(_LONGEST_NGRAM):
        last = tf.gather(sequences, tf.maximum(lengths - 1 - distance, 0), batch_dims=1)
        before = tf.gather(sequences, tf.maximum(columns[0] - distance, 0), axis=1)
        equal &= (before == last) & (columns >= distance)
        common += tf.cast(equal, tf.int32)
    # The longest n-gram, and of equally long ones the latest.
    rank = common * tf.shape(sequences)[1] + tf.where(common > 0, columns, 0)
    place = tf.argmax(rank, axis=-1, output_type=tf.int32)[:, None]
    ahead = tf.minimum(place + 1 + tf.range(count)[None], tf.shape(sequences)[1] - 1)
    return tf.gather(sequences, ahead, batch_dims=1)


def draft_tokens(draft: LanguageModel, tokens: tf.Tensor) -> tf.Tensor:
    """Token ids as a draft model may see them: its table may be shorter than that of the large model."""
    return tf.minimum(tokens, draft.config.vocabulary_size - 1)


def _draft_logits(logits: tf.Tensor, vocabulary_size: int) -> tf.Tensor:
    """Logits of as many tokens as the large model has; tables of one tokenizer are padded unequally."""
    missing = max(vocabulary_size - logits.shape[-1], 0)
    logits = tf.cast(logits, tf.float32)[:, :vocabulary_size]
    return tf.pad(logits, [[0, 0], [0, missing]], constant_values=FORBIDDEN)


def ask_draft_model(
    draft: LanguageModel,
    cache: Any,
    state: DecodeState,
    settings: RowSettings,
    uniform: tf.Tensor,
    count: int,
    vocabulary_size: int,
) -> tuple[tf.Tensor, Any]:
    """Guesses what a smaller model would say, with the settings and random numbers of the large one.

    Args:
        draft: The smaller model, of the same tokenizer.
        cache: Its key-value cache.
        state: The state of the large model.
        settings: The settings.
        uniform: As in `append_token`.
        count: Tokens to guess.
        vocabulary_size: Number of tokens of the large model.

    Returns:
        Int32 `[batch, count]`, and the cache.
    """
    # Rows that have ended are computed along at a place that exists.
    ahead = state._replace(
        cache=cache,
        draft_cache=(),
        log_probabilities=(),
        lengths=tf.where(state.active, state.lengths, 1),
        prompt_lengths=tf.where(state.active, state.prompt_lengths, 1),
    )
    places = ahead.lengths[:, None] + tf.range(count)[None]
    # Neither end tokens nor lengths end a guess; the large model will see to that.
    settings = settings._replace(end_ids=settings.end_ids[:, :0])
    everyone = tf.ones_like(state.active)

    def step(number, ahead):
        tokens = draft_tokens(draft, last_tokens(ahead))
        logits, cache = draft(tokens, cache=ahead.cache, cache_index=ahead.lengths - 1)
        logits = _draft_logits(logits[:, 0], vocabulary_size)
        ahead = append_token(ahead._replace(cache=cache), logits, settings, uniform, everyone)
        return number + 1, ahead

    # Once more than there are guesses, for the last one must be in the cache as well.
    ahead = tf.while_loop(lambda number, _: number <= count, step, [tf.constant(0), ahead])[1]
    return tf.gather(ahead.sequences, places, batch_dims=1), ahead.cache


def check_guesses(
    model: LanguageModel,
    state: DecodeState,
    guesses: tf.Tensor,
    settings: RowSettings,
    uniform: tf.Tensor,
    extra: Mapping[str, Any] | None = None,
) -> DecodeState:
    """Appends to each active row the guesses that hold, and the token after them.

    Args:
        model: The model.
        state: The state; the cache must have room for the guesses.
        guesses: Int32 `[batch, count]`.
        settings: The settings.
        uniform: As in `append_token`.
        extra: Further tensors for the call of the model.

    Returns:
        The state, with 1 to `count + 1` new tokens in each row that was active.
    """
    count = guesses.shape[1]
    tokens = tf.concat([last_tokens(state), guesses], axis=1)
    # Rows that have ended are computed along at a place that exists.
    index = tf.where(state.active, state.lengths - 1, 0)
    logits, cache = model(tokens, cache=state.cache, cache_index=index, **(extra or {}))

    def step(place, right, state):
        state = append_token(state, tf.gather(logits, place, axis=1), settings, uniform, right)
        chosen = last_tokens(state)[:, 0]
        guess = tf.gather(guesses, tf.minimum(place, count - 1), axis=1)
        return place + 1, right & state.active & (chosen == guess), state

    def goes_on(place, right, _):
        return (place <= count) & tf.reduce_any(right)

    loop = [tf.constant(0), state.active, state._replace(cache=cache)]
    return tf.while_loop(goes_on, step, loop)[2]


def decode_with_guesses(
    model: LanguageModel,
    draft: LanguageModel | None,
    count: int,
    state: DecodeState,
    settings: RowSettings,
    uniform: tf.Tensor,
    steps: tf.Tensor,
    extra: Mapping[str, Any] | None = None,
) -> DecodeState:
    """As `decode`, but with 1 to `count + 1` new tokens per step and row.

    Args:
        model: The model.
        draft: A smaller model that guesses; None: guesses are looked up in the text.
        count: Tokens to guess in a step; state and caches must have room for them behind the last
            token of each row.
        state, settings, uniform, steps, extra: As in `decode`.

    Returns:
        The state.
    """

    def step(number, state):
        if draft is None:
            guesses = look_up(state, count)
        else:
            guesses, cache = ask_draft_model(
                draft, state.draft_cache, state, settings, uniform, count, model.config.vocabulary_size
            )
            state = state._replace(draft_cache=cache)
        return number + 1, check_guesses(model, state, guesses, settings, uniform, extra)

    def goes_on(number, state):
        return (number < steps) & tf.reduce_any(state.active)

    return tf.while_loop(goes_on, step, [tf.constant(0), state])[1]
