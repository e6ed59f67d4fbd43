"""Generation in Python: batches in, tokens out chunk by chunk, from graph functions made once."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kerasllm.generation.beam import BeamSearch
from kerasllm.generation.config import GenerationConfig
from kerasllm.generation.contrastive import decode_contrastive, prefill_contrastive
from kerasllm.generation.decoding import append_token, decode, prefill
from kerasllm.generation.padding import SHORTEST_LENGTH, bucket, fill_up_rows, fill_up_state
from kerasllm.generation.processors import RowSettings, settings_arrays
from kerasllm.generation.sampling import uniform_numbers
from kerasllm.generation.speculative import decode_with_guesses, draft_tokens
from kerasllm.layers.xla import traced_for_xla
from kerasllm.models import LanguageModel

# XLA takes seconds to compile; a model smaller than this is quicker without.
_MIN_WEIGHTS_FOR_XLA = 10_000_000


def gains_from_xla(model: LanguageModel) -> bool:
    """Whether a model is large enough for the compiling to be worth its time."""
    return model.count_params() >= _MIN_WEIGHTS_FOR_XLA


@dataclasses.dataclass(frozen=True)
class Row:
    """What one row of a batch is to continue.

    Args:
        prompt: Token ids, at least one.
        config: How.
        end_ids: The ids that end the row.
        copy: Rows of one seed that differ in it draw unlike tokens.
        continues_text: Whether the new tokens go on in the prompt's text, or begin one of their own.
    """

    prompt: Sequence[int]
    config: GenerationConfig
    end_ids: tuple[int, ...] = ()
    copy: int = 0
    continues_text: bool = True

    def text_before(self) -> Sequence[int]:
        """The ids that the text of the new tokens goes on from."""
        return self.prompt if self.continues_text else ()


def _specs(structure: Any) -> Any:
    """The specs of tensors or arrays with any number of rows."""
    return tf.nest.map_structure(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), structure)


class Engine:
    """Continues token ids with a model.

    The prompts are read by a plain graph; decoding is a loop inside of one XLA program, which is
    compiled once for each bucket of batch sizes and of lengths and used again after that.

    Args:
        model: The model; with `extra`, further tensors go into each of its calls.
        jit_compile: Whether XLA compiles the decoding. None: if the model is large enough to gain.
    """

    def __init__(self, model: LanguageModel, jit_compile: bool | None = None):
        self.model = model
        self.jit_compile = gains_from_xla(model) if jit_compile is None else jit_compile
        self._functions: dict = {}

    def function(self, key, make):
        """Returns what `make()` returned the first time it was asked for under this key."""
        if key not in self._functions:
            self._functions[key] = make()
        return self._functions[key]

    def check(self, rows: Sequence[Row]) -> None:
        """Raises a ValueError if there is no row, or one that the model cannot continue."""
        context = self.model.config.context_length
        if not rows:
            raise ValueError("There must be at least one prompt. Received: none.")
        for row in rows:
            length, new = len(row.prompt), row.config.max_new_tokens
            if not length:
                raise ValueError("A prompt must hold at least one token. Received: an empty prompt.")
            if length >= context:
                raise ValueError(
                    f"A prompt must be shorter than the context of {context} tokens. "
                    f"Received: a prompt of {length} tokens."
                )
            if length + new > context:
                raise ValueError(
                    f"Prompt and `max_new_tokens` together must fit into the context of {context} tokens. "
                    f"Received: a prompt of {length} tokens, max_new_tokens={new}."
                )
            vocabulary = self.model.config.vocabulary_size
            if min(row.prompt) < 0 or max(row.prompt) >= vocabulary:
                raise ValueError(
                    f"The ids of a prompt must be from 0 to {vocabulary - 1}. "
                    f"Received: {min(row.prompt)} to {max(row.prompt)}"
                )

    def start(
        self,
        rows: Sequence[Row],
        num_log_probabilities: int | None = None,
        extra: Mapping[str, Any] | None = None,
        allowed: np.ndarray | None = None,
        draft: LanguageModel | None = None,
    ) -> "Batch":
        """Reads the prompts and generates the first token of each row.

        Args:
            rows: The rows.
            num_log_probabilities: How many alternatives to keep the log-probabilities of; None: keep
                none, not even those of the tokens themselves.
            extra: Further tensors `[rows, ...]` for each call of the model.
            allowed: As in `RowSettings`, for the first token. None: each token may come.
            draft: A smaller model that guesses tokens. None: see `prompt_lookup_num_tokens`.

        Returns:
            The batch on its way.

        Raises:
            ValueError: If a row does not fit.
        """
        self.check(rows)
        return Batch(self, rows, num_log_probabilities, extra, allowed, draft)


@dataclasses.dataclass(frozen=True)
class Beam:
    """One result of a beam search.

    Args:
        token_ids: The new tokens, without the end token.
        score: The sum of their log-probabilities, with the length penalty.
    """

    token_ids: list[int]
    score: float


class Rows:
    """Rows as arrays, filled up to a bucket by rows that do not count.

    Args:
        rows: The rows.
        vocabulary_size: Number of tokens of the model.
        allowed: As in `RowSettings`, for the first token, or None.
    """

    def __init__(self, rows: Sequence[Row], vocabulary_size: int, allowed: np.ndarray | None = None):
        self.rows = rows
        self.size = 1 << (len(rows) - 1).bit_length()
        settings = settings_arrays(
            [row.config for row in rows], [row.end_ids for row in rows], vocabulary_size
        )._replace(allowed=allowed)
        self.settings = RowSettings(*(None if a is None else self.fill_up(a) for a in settings))
        self.lengths = np.array([len(row.prompt) for row in rows], np.int32)
        self.prompts = np.zeros((len(rows), self.lengths.max()), np.int32)
        for number, row in enumerate(rows):
            self.prompts[number, : self.lengths[number]] = row.prompt
        self.seeds = self.fill_up(np.array([row.config.seed for row in rows], np.int32))
        self.copies = self.fill_up(np.array([row.copy for row in rows], np.int32))
        # How many tokens the longest row may come to have.
        self.longest = max(len(row.prompt) + row.config.max_new_tokens for row in rows)

    def fill_up(self, array: np.ndarray) -> np.ndarray:
        """Repeats the first row until there are as many as the bucket has."""
        return np.concatenate([array, np.repeat(array[:1], self.size - len(array), axis=0)])

    def common(self, name: str) -> Any:
        """Returns a setting that all rows must share.

        Raises:
            ValueError: If they do not.
        """
        values = {getattr(row.config, name) for row in self.rows}
        if len(values) > 1:
            raise ValueError(f"`{name}` must be the same for all rows of a batch. Received: {values}")
        return values.pop()


def as_tensors(settings: RowSettings) -> RowSettings:
    """Arrays to tensors."""
    return RowSettings(*(None if a is None else tf.constant(a) for a in settings))


def make_functions(start, go_on, settings: RowSettings, extra: Any, jit_compile: bool):
    """Traces the two functions of a way to generate, once for any number of rows and any length.

    Args:
        start: `(prompts, prompt_lengths, length, settings, seeds, copies, extra)` to a tuple; a plain
            graph.
        go_on: That tuple, and then `settings, steps`, to the next such state; compiled by XLA.
        settings, extra: Arrays or tensors as the functions will get them.
        jit_compile: Whether XLA compiles `go_on`.

    Returns:
        The functions.
    """
    specs = RowSettings(*(None if a is None else tf.TensorSpec([None] * a.ndim, a.dtype) for a in settings))
    numbers, scalar = tf.TensorSpec([None], tf.int32), tf.TensorSpec([], tf.int32)
    prompts = tf.TensorSpec([None, None], tf.int32)
    start = tf.function(start, autograph=False).get_concrete_function(
        prompts, numbers, scalar, specs, numbers, numbers, _specs(extra)
    )
    outputs = tf.nest.map_structure(
        lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), start.structured_outputs
    )
    go_on = tf.function(go_on, autograph=False, jit_compile=jit_compile)
    with traced_for_xla() if jit_compile else contextlib.nullcontext():
        return start, go_on.get_concrete_function(*outputs, specs, scalar)


def search_beams(
    engine: Engine, rows: Sequence[Row], extra: Mapping[str, Any] | None = None
) -> list[list[Beam]]:
    """Continues prompts by beam search.

    Args:
        engine: The engine.
        rows: The rows; the settings of the search must be the same for all.
        extra: As in `Engine.start`.

    Returns:
        For each row its `num_beams` results, the best first.

    Raises:
        ValueError: If a row does not fit.
    """
    engine.check(rows)
    model, extra = engine.model, dict(extra or {})
    arrays = Rows(rows, model.config.vocabulary_size)
    names = ("num_beams", "length_penalty", "early_stopping")
    shared = tuple(arrays.common(name) for name in names)
    num_end_ids = max(len(row.end_ids) for row in rows)
    search = BeamSearch(model, shared[0], num_end_ids, *shared[1:])
    if search.num_candidates > search.num_beams * model.config.vocabulary_size:
        raise ValueError(
            "The vocabulary is too small for so many beams. Received: "
            f"num_beams={shared[0]}, {num_end_ids} end tokens, {model.config.vocabulary_size} tokens"
        )

    def start(prompts, lengths, length, settings, seeds, copies, extra):
        size = tf.shape(seeds)[0]
        logits, state = prefill(model, prompts, lengths, length, None, extra)
        logits, state = fill_up_rows(logits, size), fill_up_state(state, size, engine.jit_compile)
        return search.start(logits, state, settings), fill_up_rows(extra, size)

    def go_on(state, extra, settings, steps):
        return search.go_on(state, settings, steps, extra)

    key = ("beams", shared, num_end_ids, tuple(a is None for a in arrays.settings), repr(_specs(extra)))
    start_graph, go_on_graph = engine.function(
        key, lambda: make_functions(start, go_on, arrays.settings, extra, engine.jit_compile)
    )
    settings = as_tensors(arrays.settings)
    state, extra = start_graph(
        tf.constant(arrays.prompts),
        tf.constant(arrays.lengths),
        tf.constant(bucket(arrays.longest, SHORTEST_LENGTH, model.config.context_length)),
        settings,
        tf.constant(arrays.seeds),
        tf.constant(arrays.copies),
        extra,
    )
    state = go_on_graph(state, extra, settings, tf.constant(arrays.longest))
    finished, counts = state.finished.numpy(), state.finished_counts.numpy()
    scores = state.finished_scores.numpy()
    return [
        [
            Beam(finished[number, beam, length : length + counts[number, beam]].tolist(), float(score))
            for beam, score in enumerate(scores[number])
        ]
        for number, length in enumerate(arrays.lengths)
    ]


class Batch:
    """Rows on their way, advanced chunk by chunk.

    Attributes:
        rows: The rows.
        active: Booleans `[rows]`: which rows go on.
        counts: Integers `[rows]`: how many new tokens each row has.
    """

    def __init__(self, engine: Engine, rows, num_log_probabilities, extra, allowed, draft):
        model = engine.model
        arrays = Rows(rows, model.config.vocabulary_size, allowed)
        alpha, candidates = arrays.common("penalty_alpha"), 0
        if alpha > 0:
            candidates = min(arrays.common("top_k"), model.config.vocabulary_size)
            if draft is not None:
                raise ValueError("Contrastive search has no use for a draft model. Received both.")
        contexts = [m.config.context_length for m in (model, draft) if m is not None]
        guesses = max(
            row.config.prompt_lookup_num_tokens if draft is None else row.config.num_assistant_tokens
            for row in rows
        )
        if arrays.longest + guesses > min(contexts):
            guesses = 0  # the context has no room for them, and they change no result
        if not guesses:
            draft, contexts = None, contexts[:1]
        room = arrays.longest + guesses
        extra = dict(extra or {})

        def start(prompts, lengths, length, settings, seeds, copies, extra):
            size = tf.shape(seeds)[0]
            uniform = uniform_numbers(seeds, length, copies)
            if alpha > 0:
                state = prefill_contrastive(model, prompts, lengths, length, num_log_probabilities, extra)
                return fill_up_state(state, size, engine.jit_compile), uniform, fill_up_rows(extra, size)
            logits, state = prefill(model, prompts, lengths, length, num_log_probabilities, extra)
            if draft is not None:
                known = draft_tokens(draft, prompts)
                state = state._replace(draft_cache=prefill(draft, known, lengths, length)[1].cache)
            state = fill_up_state(state, size, engine.jit_compile)
            state = append_token(state, fill_up_rows(logits, size), settings, uniform)
            return state, uniform, fill_up_rows(extra, size)

        def go_on(state, uniform, extra, settings, steps):
            if alpha > 0:
                return decode_contrastive(model, candidates, alpha, state, settings, steps, extra)
            if guesses:
                return decode_with_guesses(model, draft, guesses, state, settings, uniform, steps, extra)
            return decode(model, state, settings, uniform, steps, extra)

        key = (
            tuple(array is None for array in arrays.settings),
            num_log_probabilities,
            (alpha, candidates, guesses, id(draft)),
            repr(_specs(extra)),
        )
        start_graph, self._go_on = engine.function(
            key, lambda: make_functions(start, go_on, arrays.settings, extra, engine.jit_compile)
        )
        self.rows = rows
        self._arrays = arrays
        self._state, *self._constants = start_graph(
            tf.constant(arrays.prompts),
            tf.constant(arrays.lengths),
            tf.constant(bucket(room, SHORTEST_LENGTH, min(contexts))),
            as_tensors(arrays.settings),
            tf.constant(arrays.seeds),
            tf.constant(arrays.copies),
            extra,
        )
        self._read()

    def advance(self, steps: int, allowed: np.ndarray | None = None) -> None:
        """Generates for each active row.

        Args:
            steps: Most calls of the model; each makes a token for each row, or several with guesses.
            allowed: As in `RowSettings`, `[rows, ...]`, for the next token, if the batch was started
                with such.
        """
        settings = self._arrays.settings
        if allowed is not None:
            settings = settings._replace(allowed=self._arrays.fill_up(allowed))
        self._state = self._go_on(self._state, *self._constants, as_tensors(settings), tf.constant(steps))
        self._read()

    def _read(self) -> None:
        count, state = len(self.rows), self._state
        self._sequences = state.sequences.numpy()[:count]
        self.active = state.active.numpy()[:count].copy()
        self.counts = (state.lengths - state.prompt_lengths).numpy()[:count]

    def stop(self, row: int) -> None:
        """Ends a row before its time."""
        self.active[row] = False
        active = np.zeros(self._arrays.size, bool)
        active[: len(self.rows)] = self.active
        self._state = self._state._replace(active=tf.constant(active))

    def new_ids(self, row: int) -> list[int]:
        """Returns the new tokens of a row so far, without the end token."""
        start = len(self.rows[row].prompt)
        return self._sequences[row, start : start + self.counts[row]].tolist()

    def is_full(self, row: int) -> bool:
        """Whether a row has all the tokens that it may have; one that an end token ended has not."""
        return self.counts[row] == self.rows[row].config.max_new_tokens

    def log_probabilities(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns those of a row's new tokens: chosen, ids of alternatives, theirs."""
        start = len(self.rows[row].prompt)
        end = start + self.counts[row]
        return tuple(part[row, start:end].numpy() for part in self._state.log_probabilities)
