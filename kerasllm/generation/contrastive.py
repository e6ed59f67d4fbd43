"""Contrastive search: likely tokens that are unlike what was said before.

Su et al., "A Contrastive Framework for Neural Text Generation" (2022).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from kerasllm.generation.decoding import DecodeState, append, first_state, pad_to
from kerasllm.generation.processors import RowSettings, process_scores
from kerasllm.models import LanguageModel


class ContrastiveState(NamedTuple):
    """What the search remembers of the texts; the last token of each row is in the cache.

    Args:
        logits: Floats `[batch, vocabulary]`, of the next token.
        hidden: Floats `[batch, length, dim]`: the last hidden state of each token.
    """

    logits: tf.Tensor
    hidden: tf.Tensor


def prefill_contrastive(
    model: LanguageModel,
    prompts: tf.Tensor,
    prompt_lengths: tf.Tensor,
    length: tf.Tensor,
    num_log_probabilities: int | None = None,
    extra: Mapping[str, Any] | None = None,
) -> DecodeState:
    """Reads the prompts; see `prefill`.

    Returns:
        The state, with a `ContrastiveState`.
    """
    (logits, hidden), cache = model(
        prompts,
        cache=model.make_cache(tf.shape(prompts)[0], length),
        cache_index=0,
        last_index=prompt_lengths - 1,
        return_hidden=True,
        **(extra or {}),
    )
    state = first_state(prompts, prompt_lengths, length, cache, num_log_probabilities)
    return state._replace(search=ContrastiveState(logits[:, 0], pad_to(hidden, length, axis=1)))


def decode_contrastive(
    model: LanguageModel,
    num_candidates: int,
    penalty_alpha: float,
    state: DecodeState,
    settings: RowSettings,
    steps: tf.Tensor,
    extra: Mapping[str, Any] | None = None,
) -> DecodeState:
    """As `decode`: of the likeliest tokens takes the one with the best sum of probability and novelty.

    A candidate's score is `(1 - alpha) * probability - alpha * similarity`, the similarity being the
    largest cosine between its hidden state and that of a token before.

    Args:
        model: The model.
        num_candidates: How many of the likeliest tokens are tried.
        penalty_alpha: Alpha.
        state, settings, steps, extra: As in `decode`.

    Returns:
        The state.
    """
    count = num_candidates
    # Each row's extras for each of its candidates.
    extra = tf.nest.map_structure(lambda tensor: tf.repeat(tensor, count, axis=0), dict(extra or {}))

    def step(number, state):
        batch, length = tf.shape(state.sequences)[0], tf.shape(state.sequences)[1]
        logits, hidden = state.search
        scores = process_scores(logits, state.sequences, state.lengths, state.prompt_lengths, settings)
        probabilities, candidates = tf.math.top_k(tf.nn.softmax(scores), count)
        # A row that has filled the cache has ended; it is computed along at a place that exists.
        index = tf.minimum(state.lengths, length - 1)
        (next_logits, next_hidden), cache = model(
            tf.reshape(candidates, [-1, 1]),
            cache=tf.nest.map_structure(lambda tensor: tf.repeat(tensor, count, axis=0), state.cache),
            cache_index=tf.repeat(index, count),
            return_hidden=True,
            **extra,
        )
        next_hidden = tf.reshape(next_hidden, [batch, count, hidden.shape[-1]])
        cosines = tf.matmul(_unit(next_hidden), _unit(hidden), transpose_b=True)
        in_text = tf.range(length)[None] < state.lengths[:, None]
        similarity = tf.reduce_max(tf.where(in_text[:, None], cosines, -1.0), axis=-1)
        values = (1.0 - penalty_alpha) * probabilities - penalty_alpha * similarity
        values = tf.where(probabilities > 0, values, -np.inf)  # what may not come, be it ever so new
        best = tf.argmax(values, axis=-1, output_type=tf.int32)
        flat = tf.range(batch) * count + best
        here = (tf.range(length)[None] == index[:, None])[:, :, None]
        search = ContrastiveState(
            tf.gather(next_logits[:, 0], flat),
            tf.where(here, tf.gather(next_hidden, best, batch_dims=1)[:, None], hidden),
        )
        token = tf.gather(candidates, best, batch_dims=1)
        state = append(state, token, logits, settings)
        cache = tf.nest.map_structure(lambda tensor: tf.gather(tensor, flat), cache)
        return number + 1, state._replace(cache=cache, search=search)

    def goes_on(number, state):
        return (number < steps) & tf.reduce_any(state.active)

    return tf.while_loop(goes_on, step, [tf.constant(0), state])[1]


def _unit(vectors: tf.Tensor) -> tf.Tensor:
    return tf.math.l2_normalize(tf.cast(vectors, tf.float32), axis=-1, epsilon=1e-12)
