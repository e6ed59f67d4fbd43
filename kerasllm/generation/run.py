"""From rows to completions: the loop around the engine that looks at the texts."""

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from kerasllm.generation.constraints import Constraint, allowed_tokens
from kerasllm.generation.engine import Batch, Engine, Row, search_beams
from kerasllm.generation.text import TextStream
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer

# New tokens per call of the compiled loop: where nothing has to be looked at in between (but the
# keyboard), where stop strings have to be, and where each token has to be.
_UNWATCHED_STEPS = 64
_STOP_STRING_STEPS = 8
# So many alternatives are always computed, for each number is a graph of its own.
_ALTERNATIVES = 20


@dataclasses.dataclass(frozen=True)
class Completion:
    """How a prompt goes on.

    Args:
        text: The continuation without the prompt, special tokens and the stop string; None if there is
            no tokenizer.
        token_ids: The new tokens without the end token, up to the one that completed a stop string.
        finish_reason: `"stop"`: an end token or stop string came, or the constraint was complete;
            `"length"`: there was no room for more.
        logprobs: The natural logarithm of the probability of each token under the model itself: before
            temperature, penalties, filters and constraints. None if they were not asked for.
        top_logprobs: The same for the likeliest tokens of each place, by id, the likeliest first.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None


def run(
    engine: Engine,
    tokenizer: Tokenizer | None,
    rows: Sequence[Row],
    constraints: Sequence[Constraint | None] | None = None,
    logprobs: int | None = None,
    stream: bool = False,
    extra: Mapping[str, Any] | None = None,
    draft: LanguageModel | None = None,
) -> Generator[tuple[int, str], None, list[Completion]]:
    """Generates; what comes while it goes on are pieces of text.

    Args:
        engine: The engine.
        tokenizer: The tokenizer; None: the completions have no text.
        rows: The rows.
        constraints: A constraint, or None, for each row; used up by this. None: there are none.
        logprobs: How many alternatives to give the log-probabilities of; None: none at all.
        stream: Whether to look at each token as it comes.
        extra: Further tensors `[rows, ...]` for each call of the model.
        draft: A smaller model of the same vocabulary that guesses tokens for the model to check.

    Yields:
        The number of a row, and a piece of its text that is final.

    Returns:
        A completion for each row.
    """
    alternatives = None
    if logprobs is not None:
        alternatives = min(max(logprobs, _ALTERNATIVES), engine.model.config.vocabulary_size)
    watched = stream or any(row.config.stop_strings for row in rows)
    if tokenizer is None and (watched or constraints):
        raise ValueError("Stop strings, streaming and constraints need a tokenizer. Received: none.")
    if constraints and (draft is not None or any(row.config.prompt_lookup_num_tokens for row in rows)):
        raise ValueError("Constraints look at each token as it comes, so tokens cannot be guessed.")
    streams = None
    if watched:
        streams = [TextStream(tokenizer, row.config.stop_strings, row.text_before()) for row in rows]
    steps = 1 if stream or constraints else _STOP_STRING_STEPS if watched else _UNWATCHED_STEPS
    vocabulary = engine.model.config.vocabulary_size

    def allowed(active):
        return allowed_tokens(constraints, active, vocabulary) if constraints else None

    batch = engine.start(rows, alternatives, extra, allowed(np.ones(len(rows), bool)), draft)
    seen = np.zeros(len(rows), int)
    stopped = np.zeros(len(rows), bool)
    while True:
        for number in range(len(rows)):
            for token in batch.new_ids(number)[seen[number] :]:
                if stopped[number]:
                    break
                seen[number] += 1
                if constraints and constraints[number] is not None:
                    stopped[number] |= constraints[number].accept(token)
                if watched:
                    yield number, streams[number].push(token)
                    stopped[number] |= streams[number].stopped
            if stopped[number] and batch.active[number]:
                batch.stop(number)
        if not batch.active.any():
            break
        batch.advance(steps, allowed(batch.active))
    if watched:
        for number, text_stream in enumerate(streams):
            yield number, text_stream.finish()
            stopped[number] |= text_stream.stopped
    for number, constraint in enumerate(constraints or ()):
        if constraint is not None and not stopped[number] and not batch.is_full(number):
            constraint.check_end()
    texts = [text_stream.text for text_stream in streams] if watched else None
    ids = [batch.new_ids(number)[:count] for number, count in enumerate(seen)]
    if texts is None:
        texts = _texts(tokenizer, ids, rows)
    return [
        _completion(batch, number, texts[number], ids[number], stopped[number], logprobs)
        for number in range(len(rows))
    ]


def run_beams(
    engine: Engine,
    tokenizer: Tokenizer | None,
    rows: Sequence[Row],
    count: int = 1,
    extra: Mapping[str, Any] | None = None,
) -> list[Completion]:
    """Generates by beam search.

    Args:
        engine, tokenizer, rows, extra: As in `run`.
        count: How many results for each row.

    Returns:
        The best results of the first row, then those of the next.
    """
    beams = [row_beams[:count] for row_beams in search_beams(engine, rows, extra)]
    ids = [beam.token_ids for row_beams in beams for beam in row_beams]
    rows = [row for row in rows for _ in range(count)]
    return [
        Completion(text, row_ids, "length" if len(row_ids) == row.config.max_new_tokens else "stop")
        for text, row_ids, row in zip(_texts(tokenizer, ids, rows), ids, rows, strict=True)
    ]


def _texts(tokenizer: Tokenizer | None, ids: list[list[int]], rows: Sequence[Row]) -> list[str | None]:
    if tokenizer is None:
        return [None] * len(rows)
    return tokenizer.decode(ids, after=[row.text_before() for row in rows])


def _completion(batch: Batch, number: int, text, ids, stopped, logprobs: int | None) -> Completion:
    completion = Completion(text, ids, "length" if batch.is_full(number) and not stopped else "stop")
    if logprobs is None:
        return completion
    chosen, top_ids, top = (part[: len(ids)] for part in batch.log_probabilities(number))
    return dataclasses.replace(
        completion,
        logprobs=chosen.tolist(),
        top_logprobs=[
            dict(zip(place_ids[:logprobs].tolist(), values[:logprobs].tolist(), strict=True))
            for place_ids, values in zip(top_ids, top, strict=True)
        ],
    )
