"""Beam search, with the results of transformers' (version 5)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from kerasllm.generation.decoding import DecodeState
from kerasllm.generation.processors import RowSettings, process_scores
from kerasllm.models import LanguageModel

# A score below that of any text.
_NEVER = -1.0e9


class BeamState(NamedTuple):
    """The beams of a batch on their way.

    Args:
        step: Int32 `[]`, how many new tokens each running beam has.
        running: Int32 `[batch, beams, length]`: prompts and new tokens.
        running_scores: Float32 `[batch, beams]`: sums of log-probabilities, falling.
        finished: Int32 `[batch, beams, length]`.
        finished_scores: Float32 `[batch, beams]`: with the length penalty, falling.
        finished_counts: Int32 `[batch, beams]`: how many new tokens they have, without the end token.
        is_finished: Booleans `[batch, beams]`: whether there is a finished beam yet.
        is_open: Booleans `[batch]`: whether the running beams may yet give a better one.
        prompt_lengths: Int32 `[batch]`.
        cache: The model's key-value cache, a row for each beam; the last token is not in it yet.
    """

    step: tf.Tensor
    running: tf.Tensor
    running_scores: tf.Tensor
    finished: tf.Tensor
    finished_scores: tf.Tensor
    finished_counts: tf.Tensor
    is_finished: tf.Tensor
    is_open: tf.Tensor
    prompt_lengths: tf.Tensor
    cache: Any


class BeamSearch:
    """The steps of a beam search.

    Args:
        model: The model.
        num_beams: How many texts to follow for each prompt.
        num_end_ids: How many tokens may end a text.
        length_penalty, early_stopping: As in `GenerationConfig`.
    """

    def __init__(
        self,
        model: LanguageModel,
        num_beams: int,
        num_end_ids: int,
        length_penalty: float,
        early_stopping: bool | str,
    ):
        self.model = model
        self.num_beams = num_beams
        # So many that enough are left to go on with if the best ones end.
        self.num_candidates = max(2, 1 + num_end_ids) * num_beams
        self.length_penalty = length_penalty
        self.early_stopping = early_stopping

    def start(self, logits: tf.Tensor, state: DecodeState, settings: RowSettings) -> BeamState:
        """Makes the first beams.

        Args:
            logits: Floats `[batch, vocabulary]`, of the first new token.
            state: The state after the prompts have been read.
            settings: The settings.

        Returns:
            The beams, with a new token each.
        """
        batch, length = tf.shape(state.sequences)[0], tf.shape(state.sequences)[1]
        beams = self.num_beams
        running = tf.repeat(state.sequences[:, None], beams, axis=1)
        first = BeamState(
            step=tf.constant(0),
            running=running,
            # All beams are alike: only the first one's continuations count.
            running_scores=tf.tile([[0.0, *[_NEVER] * (beams - 1)]], [batch, 1]),
            finished=tf.zeros([batch, beams, length], tf.int32),
            finished_scores=tf.fill([batch, beams], _NEVER),
            finished_counts=tf.zeros([batch, beams], tf.int32),
            is_finished=tf.zeros([batch, beams], tf.bool),
            is_open=state.active,
            prompt_lengths=state.prompt_lengths,
            cache=tf.nest.map_structure(lambda tensor: tf.repeat(tensor, beams, axis=0), state.cache),
        )
        return self._extend(first, tf.repeat(logits, beams, axis=0), settings)

    def go_on(
        self,
        state: BeamState,
        settings: RowSettings,
        steps: tf.Tensor,
        extra: Mapping[str, Any] | None = None,
    ) -> BeamState:
        """Extends the beams until no better text can be expected, or for a number of steps."""
        extra = tf.nest.map_structure(
            lambda tensor: tf.repeat(tensor, self.num_beams, axis=0), dict(extra or {})
        )
        end = state.step + steps

        def step(state):
            length = tf.shape(state.running)[2]
            # Rows that have ended are computed along at a place that exists.
            place = tf.minimum(state.prompt_lengths + state.step, length) - 1
            place = tf.repeat(place, self.num_beams)
            tokens = tf.gather(tf.reshape(state.running, [-1, length]), place[:, None], batch_dims=1)
            logits, cache = self.model(tokens, cache=state.cache, cache_index=place, **extra)
            return [self._extend(state._replace(cache=cache), logits[:, 0], settings)]

        return tf.while_loop(
            lambda state: (state.step < end) & tf.reduce_any(state.is_open), step, [state]
        )[0]

    def _extend(self, state: BeamState, logits: tf.Tensor, settings: RowSettings) -> BeamState:
        """Gives the beams a token each; those that end compete with the finished ones."""
        beams, kept = self.num_beams, self.num_candidates
        batch, length = tf.shape(state.running)[0], tf.shape(state.running)[2]
        vocabulary = tf.shape(logits)[-1]
        per_beam = RowSettings(*(None if s is None else tf.repeat(s, beams, axis=0) for s in settings))
        prompt_lengths = tf.repeat(state.prompt_lengths, beams)
        scores = process_scores(
            tf.nn.log_softmax(tf.cast(logits, tf.float32)),
            tf.reshape(state.running, [-1, length]),
            prompt_lengths + state.step,
            prompt_lengths,
            per_beam,
        )
        scores = tf.reshape(scores, [batch, beams, -1]) + state.running_scores[:, :, None]
        scores, places = tf.math.top_k(tf.reshape(scores, [batch, -1]), kept)
        origins, tokens = places // vocabulary, places % vocabulary
        here = tf.range(length) == (state.prompt_lengths + state.step)[:, None]
        candidates = tf.where(
            here[:, None], tokens[:, :, None], tf.gather(state.running, origins, batch_dims=1)
        )
        count = state.step + 1
        is_end = tf.reduce_any(tokens[:, :, None] == settings.end_ids[:, None], axis=-1)
        ends = is_end | (count >= settings.max_new_tokens)[:, None]

        # The best that do not end go on.
        open_scores, chosen = tf.math.top_k(scores + tf.where(ends, _NEVER, 0.0), beams)
        beam_of = tf.gather(origins, chosen, batch_dims=1) + tf.range(batch)[:, None] * beams
        cache = tf.nest.map_structure(lambda t: tf.gather(t, tf.reshape(beam_of, [-1])), state.cache)

        # Those among the best that end compete with the finished ones.
        may_finish = ends & (tf.range(kept) < beams) & state.is_open[:, None]
        if self.early_stopping is True:
            may_finish &= ~tf.reduce_all(state.is_finished, axis=-1, keepdims=True)
        penalty = tf.cast(count, tf.float32) ** self.length_penalty
        new_scores = tf.where(may_finish, scores / penalty, _NEVER)
        new_counts = tf.where(is_end, count - 1, count)
        merge = _best_of(state.finished_scores, new_scores, beams)
        finished_scores = merge(state.finished_scores, new_scores)
        is_finished = merge(state.is_finished, may_finish)

        is_open = state.is_open & self._may_improve(
            open_scores[:, 0], finished_scores, is_finished, count, settings
        )
        is_open &= ~tf.reduce_all(ends, axis=-1)
        if self.early_stopping is True:
            is_open &= ~tf.reduce_all(is_finished, axis=-1)
        return BeamState(
            step=count,
            running=tf.gather(candidates, chosen, batch_dims=1),
            running_scores=open_scores,
            finished=merge(state.finished, candidates),
            finished_scores=finished_scores,
            finished_counts=merge(state.finished_counts, new_counts),
            is_finished=is_finished,
            is_open=is_open,
            prompt_lengths=state.prompt_lengths,
            cache=cache,
        )

    def _may_improve(self, best_score, finished_scores, is_finished, count, settings) -> tf.Tensor:
        """Whether a running beam may become better than the worst finished one: a heuristic."""
        if self.early_stopping == "never" and self.length_penalty > 0:
            count = settings.max_new_tokens
        possible = best_score / tf.cast(count, tf.float32) ** self.length_penalty
        worst = tf.where(is_finished, tf.reduce_min(finished_scores, axis=-1, keepdims=True), _NEVER)
        return tf.reduce_any(possible[:, None] > worst, axis=-1)


def _best_of(first: tf.Tensor, second: tf.Tensor, count: int) -> Callable:
    """Returns a function that merges two lists of beams as the best of these scores."""
    best = tf.math.top_k(tf.concat([first, second], axis=1), count)[1]
    return lambda a, b: tf.gather(tf.concat([a, b], axis=1), best, batch_dims=1)
