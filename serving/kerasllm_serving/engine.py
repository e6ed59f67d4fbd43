"""Continuous batching: one thread owns the model, and rows join and leave its batch between steps.

Prompts are read in parts, and between two steps one part of each prompt that has a slot: the rows that run
wait for no more than that, and prompts that come together are read together and make their tokens
together. What a slot has read stays there until the slot is needed for something else: a prompt that begins
alike goes on from there, in that slot or, once it is copied, in another.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import grpc
import numpy as np

from kerasllm_serving.constraints import Constraint, cannot_be_kept
from kerasllm_serving.errors import ServingError, invalid_argument
from kerasllm_serving.metrics import (
    SECONDS_OF_A_REQUEST,
    SECONDS_PER_TOKEN,
    SECONDS_TO_FIRST_TOKEN,
    Metrics,
)

Report = Mapping[str, np.ndarray]
# To copy a slot takes about as long as to read so many tokens.
_WORTH_A_COPY = 32
# Parts of prompts are read in one call if they are about as long: to fill one up with more than so many
# tokens takes longer than a call of its own. More rows save next to nothing, want more memory, and it takes
# longer until those that are late or cancelled are looked at.
_WORTH_A_CALL = 32
_MOST_READ_TOGETHER = 8
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowRequest:
    """One row of a batch: a prompt and how to continue it.

    Args:
        token_ids: The prompt.
        max_new_tokens: Most tokens to make.
        min_new_tokens: No end of the text comes before so many.
        temperature: 0 takes the most likely token each time.
        top_k: Draws among so many tokens; 0: among all.
        top_p: Draws among the tokens that make up this probability.
        min_p: Draws among the tokens at least this likely, beside the likeliest.
        repetition_penalty: Above 1 repeats less.
        presence_penalty: Taken off the score of each token that is in the new text.
        frequency_penalty: Taken off for each time it is there.
        seed: The row's own random numbers begin with it.
        stop: Strings before which the text ends.
        logit_bias: What is added to the scores of tokens, by their ids.
        alternatives: How many of the likeliest tokens are told for each place.
        constraint: What the text keeps to, this row's own, which takes each of its tokens. None: nothing.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: Sequence[str] = ()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    alternatives: int = 0
    constraint: Constraint | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a row has made since its last piece.

    Args:
        row: Number of the row in its job.
        text: Whole characters; of a stop string not even its beginning. Of the tokens, some may have
            no text yet.
        token_ids: The new tokens.
        logprobs: Their log-probabilities under the model itself.
        alternatives: For each of them the likeliest tokens and their log-probabilities, if asked for.
        finish_reason: "stop", "length", or None: the row goes on.
        cached_tokens: How many tokens of the row's prompt had been read before it came.
    """

    row: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]
    finish_reason: str | None
    cached_tokens: int = 0


class SlotModel(Protocol):
    """What the engine needs of a model; see `kerasllm_serving.language_model`."""

    slots: int
    length: int
    vocabulary: int

    def reset(self) -> None:
        """Makes the memory, and frees all slots."""

    def read(self, parts: Mapping[int, Sequence[int]], start: int) -> None:
        """Reads tokens of prompts into free slots, in each from place `start` on."""

    def copy(self, source: int, slot: int, count: int) -> None:
        """Takes over the first tokens of another slot into a free one."""

    def insert(self, slot: int, row: RowRequest) -> None:
        """Begins a row in a free slot that holds its prompt, but perhaps the last token."""

    def step(self, steps: int, masks: Mapping[int, np.ndarray]) -> Report:
        """Makes so many tokens for each active slot; returns the report of all slots.

        Args:
            steps: How many; 1, where there are masks.
            masks: Which tokens may come in some of the slots, as `Constraint.mask` returns it.
        """

    def free(self, slot: int) -> None:
        """Ends a slot before its time."""

    def alternatives(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest tokens of each place of a slot's new text, and their log-probabilities."""


class Job:
    """Rows that were submitted together.

    Args:
        engine: The engine that has it.
        rows: The rows.
        deliver: Called by the engine's thread with each `Piece`, or with the `ServingError` that ended
            the job; it must return at once and not fail.
        deadline: When it is ended, on `time.monotonic`'s clock. None: never.
    """

    def __init__(
        self,
        engine: "Engine",
        rows: Sequence[RowRequest],
        deliver: Callable[[Piece | ServingError], None],
        deadline: float | None,
    ) -> None:
        self.rows = rows
        self.deliver = deliver
        self.deadline = deadline
        self.submitted = time.monotonic()
        self.is_over = False  # Nothing is delivered any more.
        self.rows_left = len(rows)
        self._engine = engine

    def cancel(self) -> None:
        """Ends the job: its slots are free before the next step."""
        self.is_over = True
        self._engine.wake()


@dataclasses.dataclass
class _Running:
    """A row in a slot."""

    job: Job
    number: int
    started: float
    cached_tokens: int = 0
    read_tokens: int = 0
    has_begun: bool = False  # The prompt has been read.
    sent_tokens: int = 0
    sent_bytes: int = 0
    last_token_at: float = 0.0

    @property
    def request(self) -> RowRequest:
        return self.job.rows[self.number]


class Engine:
    """Runs rows of many requests as one batch.

    Rows take free slots in the order in which they came, and wait in a bounded queue until there is one, or
    until what they go on from has been read for another.
    What a row makes does not depend on the rows beside it. While a row with a constraint is among them, all
    make one token at a time.

    Args:
        model: The model; no other thread may use its slots.
        max_queue: Most rows that wait.
        steps: Most tokens that a row makes before others may join or leave.
        prefill_chunk: Tokens of a part of a prompt. Before the rows that run make their next token, a part
            is read of each prompt that has a slot or can have one.
        has_prefix_cache: Whether a prompt goes on from what a slot has read of it.
        metrics: Where the numbers go.
        labels: Pairs of a label's name and its value for all of them.
    """

    def __init__(
        self,
        model: SlotModel,
        max_queue: int,
        steps: int = 1,
        prefill_chunk: int = 128,
        has_prefix_cache: bool = True,
        metrics: Metrics | None = None,
        labels: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.model = model
        self._max_queue = max_queue
        self._steps = steps
        self._prefill_chunk = prefill_chunk
        self._has_prefix_cache = has_prefix_cache
        self._condition = threading.Condition()
        self._waiting: collections.deque[tuple[Job, int]] = collections.deque()
        self._running: dict[int, _Running] = {}
        # By slots, what is in their caches; the slot that was used last comes last.
        self._held: dict[int, list[int]] = {slot: [] for slot in range(model.slots)}
        self._is_closing = False
        self._must_end = False
        self._measure = _Measure(self, metrics or Metrics(), labels)
        model.reset()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """How many slots are in use."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """How many rows wait for a slot."""
        return len(self._waiting)

    @property
    def cache_use(self) -> float:
        """The part of the slots' room for tokens that is in use."""
        used = sum(len(row.request.token_ids) + row.sent_tokens for row in list(self._running.values()))
        return used / (self.model.slots * self.model.length)

    def submit(
        self,
        rows: Sequence[RowRequest],
        deliver: Callable[[Piece | ServingError], None],
        deadline: float | None = None,
    ) -> Job:
        """Queues rows, all or none.

        Args:
            rows: The rows.
            deliver: As in `Job`.
            deadline: As in `Job`.

        Returns:
            The job.

        Raises:
            ServingError: INVALID_ARGUMENT if a row does not fit into a slot, RESOURCE_EXHAUSTED if the
                queue is full, UNAVAILABLE if the engine is closing.
        """
        for row in rows:
            self._check(row)
        job = Job(self, rows, deliver, deadline)
        with self._condition:
            if self._is_closing:
                raise ServingError(grpc.StatusCode.UNAVAILABLE, "The server is shutting down.")
            # Rows that go straight into a free slot do not wait.
            free = self.model.slots - len(self._running)
            if len(self._waiting) + len(rows) > self._max_queue + free:
                self._measure.refused.add(1, *self._measure.values)
                raise ServingError(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"The queue is full: {len(self._waiting)} rows wait, at most {self._max_queue} may.",
                )
            self._waiting.extend((job, number) for number in range(len(rows)))
            self._condition.notify()
        return job

    def wake(self) -> None:
        """Makes the engine look at its jobs, though it has nothing to do."""
        with self._condition:
            self._condition.notify()

    def close(self, seconds: float) -> None:
        """Takes no more jobs, finishes those it has, and returns.

        Args:
            seconds: After which jobs that go on are ended with UNAVAILABLE.
        """
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join(seconds)
        self._must_end = True
        self.wake()
        self._thread.join()

    def _check(self, row: RowRequest) -> None:
        count, room = len(row.token_ids), self.model.length
        if not count:
            raise invalid_argument("A prompt must hold at least one token. Received: an empty prompt.")
        if row.max_new_tokens < 1 or count + row.max_new_tokens > room:
            raise invalid_argument(
                f"This model's maximum context length is {room} tokens. Received: a prompt of {count} "
                f"tokens and {row.max_new_tokens} tokens to make."
            )
        if not all(0 <= number < self.model.vocabulary for number in (*row.token_ids, *row.logit_bias)):
            raise invalid_argument(f"Token ids must be from 0 to {self.model.vocabulary - 1}.")

    # The thread

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._waiting or self._running or self._is_closing):
                    self._condition.wait()
                if self._must_end or (self._is_closing and not (self._waiting or self._running)):
                    break
            try:
                self._turn()
            except Exception as error:
                _logger.exception("A step failed")
                self._fail_all(_as_serving_error(error))
                self.model.reset()
                self._held = {slot: [] for slot in range(self.model.slots)}
        self._fail_all(ServingError(grpc.StatusCode.UNAVAILABLE, "The server is shutting down."))

    def _turn(self) -> None:
        """Frees, reads, steps."""
        self._end_late_jobs()
        for slot, row in list(self._running.items()):
            if row.job.is_over:
                if row.has_begun:
                    self.model.free(slot)
                del self._running[slot]
                self._use(slot)
        has_new = self._read_prompts()
        if any(row.has_begun for row in self._running.values()):
            masks = self._masks()
            # A first token is not kept back for those behind it.
            self._look(self.model.step(1 if masks or has_new else self._steps, masks))

    def _masks(self) -> dict[int, np.ndarray]:
        """Which tokens may come in the slots whose rows have constraints."""
        masks = {}
        for slot, row in self._running.items():
            if row.has_begun and row.request.constraint is not None and not row.job.is_over:
                try:
                    masks[slot] = row.request.constraint.mask()
                except ServingError as error:
                    self._fail(row.job, error)
        return masks

    def _end_late_jobs(self) -> None:
        now = time.monotonic()
        jobs = {row.job for row in self._running.values()} | {job for job, _ in list(self._waiting)}
        for job in jobs:
            if job.deadline is not None and now >= job.deadline:
                self._fail(job, ServingError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))
        with self._condition:
            if any(job.is_over for job, _ in self._waiting):
                self._waiting = collections.deque(
                    (job, number) for job, number in self._waiting if not job.is_over
                )

    def _read_prompts(self) -> bool:
        """Reads a part of each prompt that can be read; returns whether rows have begun."""
        seen: set[int] = set()
        has_begun = False
        while not self._must_end and (parts := self._next_to_read(seen)):
            seen.update(parts)
            start = self._running[next(iter(parts))].read_tokens
            try:
                if new := {slot: part for slot, part in parts.items() if part}:
                    self.model.read(new, start)
            except Exception as error:
                for slot in parts:
                    self._give_up(slot, error)
                continue
            self._end_late_jobs()  # To read takes long.
            for slot, part in parts.items():
                has_begun |= self._begin(slot, start + len(part))
        return has_begun

    def _next_to_read(self, seen: Collection[int]) -> dict[int, Sequence[int]]:
        """Finds parts of prompts that can be read in one call.

        Args:
            seen: Slots that have had their turn.

        Returns:
            The parts, from the same place of each prompt on, by slots; empty where all of it is known. No
            slots: all have had their turn.
        """
        found: dict[int, Sequence[int]] = {}
        start = 0
        half_read = [slot for slot, row in self._running.items() if not row.has_begun and slot not in seen]
        while len(found) < _MOST_READ_TOGETHER:
            slot = half_read.pop(0) if half_read else self._next_row()
            if slot is None:
                break
            row = self._running[slot]
            if row.job.is_over:  # The next turn frees the slot.
                continue
            part = self._next_part(row)
            sizes = [len(each) for each in (*found.values(), part)]
            if not found or (row.read_tokens == start and max(sizes) - min(sizes) <= _WORTH_A_CALL):
                found[slot], start = part, row.read_tokens
            elif not half_read:
                break  # for the next call
        return found

    def _next_part(self, row: _Running) -> Sequence[int]:
        """The tokens of a prompt that are read next, without its last, which a step reads."""
        prompt, begin = row.request.token_ids, row.read_tokens
        # A prompt of one token is read too: this clears what an earlier row has left.
        return prompt[begin : min(begin + self._prefill_chunk, max(len(prompt) - 1, 1))]

    def _begin(self, slot: int, end: int) -> bool:
        """Notes that a prompt has been read up to some place; returns whether its row has begun."""
        row = self._running[slot]
        prompt, row.read_tokens = row.request.token_ids, end
        self._held[slot] = list(prompt[:end])
        if end < len(prompt) - 1 or row.job.is_over:
            return False
        try:
            self.model.insert(slot, row.request)
        except Exception as error:
            # The prompt's own fault: the other rows go on.
            self._give_up(slot, error)
            return False
        row.has_begun = True
        return True

    def _give_up(self, slot: int, error: Exception) -> None:
        """Ends the job of a row that has not begun."""
        if not isinstance(error, ServingError):
            _logger.error("A prompt could not be read", exc_info=error)
        row = self._running.pop(slot)
        self._held[slot] = []
        self._fail(row.job, _as_serving_error(error))

    def _next_row(self) -> int | None:
        """Gives a slot to the row that waits longest.

        Returns:
            The slot. None: there is no row or no slot, or a prompt that begins alike is being read.
        """
        free = [slot for slot in self._held if slot not in self._running]
        if not (free and self._waiting):
            return None
        # The first, for a step is made for as many first slots as are in use.
        slot, (job, number) = min(free), self._waiting[0]
        row = _Running(job, number, time.monotonic())
        if self._has_prefix_cache and self._will_be_read(row.request.token_ids):
            return None
        with self._condition:
            self._waiting.popleft()
            self._running[slot] = row
        if self._has_prefix_cache:
            row.cached_tokens = row.read_tokens = self._take_over(slot, row.request.token_ids)
        self._use(slot)
        self._measure.starts(row)
        return slot

    def _will_be_read(self, prompt: Sequence[int]) -> bool:
        """Whether more of a prompt's beginning will be in a slot soon than is in any now."""
        half_read = [row.request.token_ids for row in self._running.values() if not row.has_begun]
        soon = max((_count_common(tokens[:-1], prompt[:-1]) for tokens in half_read), default=0)
        if soon <= _WORTH_A_COPY:
            return False
        return soon > _WORTH_A_COPY + max(_count_common(held, prompt) for held in self._held.values())

    def _take_over(self, slot: int, prompt: Sequence[int]) -> int:
        """Looks for the beginning of a prompt in all slots; returns how many tokens of it the slot has."""
        held, prompt = self._held, prompt[:-1]  # The last is read in any case, for what comes behind it.
        common = {other: _count_common(tokens, prompt) for other, tokens in held.items()}
        source = max(common, key=common.get)
        if len(held[slot]) > common[slot] + _WORTH_A_COPY:
            # What the slot is about to lose goes where something shorter of it is, or the oldest.
            spare = [other for other in held if other not in self._running and other != source]
            spare.sort(key=lambda other: _count_common(held[slot], held[other]) < len(held[other]))
            if spare:
                self._copy(slot, spare[0], len(held[slot]))
        if common[source] > common[slot] + _WORTH_A_COPY:
            self._copy(source, slot, common[source])
            return common[source]
        return common[slot]

    def _copy(self, source: int, slot: int, count: int) -> None:
        self.model.copy(source, slot, count)
        self._held[slot] = self._held[source][:count]
        self._use(slot)

    def _use(self, slot: int) -> None:
        """Makes a slot the last of `_held`."""
        self._held[slot] = self._held.pop(slot)

    def _look(self, report: Report) -> None:
        """Delivers what is new."""
        now = time.monotonic()
        for slot, row in list(self._running.items()):
            if row.job.is_over or not row.has_begun:
                continue
            count = int(report["num_tokens"][slot])
            reason = report["finish_reason"][slot].decode() or None
            text = report["text"][slot]
            end = len(text) if reason else len(text) - held_back(text, row.request.stop)
            if count == row.sent_tokens and end <= row.sent_bytes and not reason:
                continue
            new = slice(row.sent_tokens, count)
            if row.request.constraint is not None:
                try:
                    reason = _follow(row.request, report["token_ids"][slot, new].tolist(), reason)
                except ServingError as error:
                    self._fail(row.job, error)
                    continue
            piece = Piece(
                row.number,
                text[row.sent_bytes : end].decode(),
                report["token_ids"][slot, new].tolist(),
                report["logprobs"][slot, new].tolist(),
                self._alternatives(slot, row, new),
                reason,
                row.cached_tokens,
            )
            # The last token is read with the next step. Nothing can go on from what is no number.
            is_sound = np.isfinite(report["logprobs"][slot, :count]).all()
            made = report["token_ids"][slot, : max(count - 1, 0)].tolist()
            self._held[slot] = [*row.request.token_ids, *made] if is_sound else []
            self._measure.makes(row, count - row.sent_tokens, now)
            row.sent_tokens, row.sent_bytes = count, max(end, row.sent_bytes)
            if reason:
                del self._running[slot]
                self._use(slot)
                row.job.rows_left -= 1
                self._measure.ends(row, reason, now)
            row.job.deliver(piece)

    def _alternatives(self, slot: int, row: _Running, new: slice) -> list[list[tuple[int, float]]]:
        wanted = row.request.alternatives
        if not wanted or new.start == new.stop:
            return [[] for _ in range(new.stop - new.start)]
        ids, logprobs = self.model.alternatives(slot)
        pairs = zip(ids[new, :wanted].tolist(), logprobs[new, :wanted].tolist(), strict=True)
        return [list(zip(*pair, strict=True)) for pair in pairs]

    def _fail(self, job: Job, error: ServingError) -> None:
        if not job.is_over:
            job.is_over = True
            job.deliver(error)

    def _fail_all(self, error: ServingError) -> None:
        with self._condition:
            jobs = {job for job, _ in self._waiting} | {row.job for row in self._running.values()}
            self._waiting.clear()
            self._running.clear()
        for job in jobs:
            self._fail(job, error)


def _count_common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Counts the tokens with which both begin."""
    count = min(len(tokens), len(others))
    differ = np.flatnonzero(np.array(tokens[:count]) != np.array(others[:count]))
    return int(differ[0]) if len(differ) else count


def held_back(text: bytes, stop: Sequence[str]) -> int:
    """Counts the bytes at the end of a text that may be the beginning of a stop string.

    Args:
        text: The text so far, without a whole stop string.
        stop: The stop strings.

    Returns:
        The length of the longest beginning of a stop string that the text ends with.
    """
    longest = 0
    for string in stop:
        data = string.encode()
        for size in range(min(len(data) - 1, len(text)), longest, -1):
            if text.endswith(data[:size]):
                longest = size
                break
    return longest


def _follow(row: RowRequest, token_ids: Sequence[int], reason: str | None) -> str | None:
    """Tells a row's constraint which tokens came.

    Args:
        row: The row.
        token_ids: The new tokens.
        reason: Why the row ends; None: it goes on.

    Returns:
        The reason: a text that is whole when there is room for no other token was not cut.

    Raises:
        ServingError: INVALID_ARGUMENT if the text is not what the constraint says.
    """
    for number in token_ids:
        row.constraint.accept(number)
    if reason == "stop" and not row.stop and not row.constraint.may_end:
        raise cannot_be_kept("no token is left that may come next")
    return "stop" if reason and row.constraint.must_end else reason


def _as_serving_error(error: Exception) -> ServingError:
    if isinstance(error, ServingError):
        return error
    return ServingError(grpc.StatusCode.INTERNAL, "The model failed; the log of the server tells more.")


class _Measure:
    """The engine's numbers, under vLLM's names."""

    def __init__(self, engine: Engine, metrics: Metrics, labels: Sequence[tuple[str, str]]) -> None:
        names = [name for name, _ in labels]
        self.values = tuple(value for _, value in labels)
        for name, text, read in (
            ("vllm:num_requests_running", "Rows in slots.", lambda: engine.num_running),
            ("vllm:num_requests_waiting", "Rows that wait for a slot.", lambda: engine.num_waiting),
            (
                "vllm:kv_cache_usage_perc",
                "Part of the slots' room in use, 0 to 1.",
                lambda: engine.cache_use,
            ),
        ):
            metrics.gauge(name, text, read, labels)
        self.refused = metrics.counter("kerasllm:refused_total", "Jobs refused by a full queue.", names)
        self._prompt = metrics.counter("vllm:prompt_tokens_total", "Tokens of prompts.", names)
        self._hits = metrics.counter(
            "vllm:prefix_cache_hits_total", "Tokens of prompts that had been read before.", names
        )
        self._queries = metrics.counter(
            "vllm:prefix_cache_queries_total", "Tokens of prompts that were looked for.", names
        )
        self._made = metrics.counter("vllm:generation_tokens_total", "Tokens made.", names)
        self._ended = metrics.counter(
            "vllm:request_success_total", "Rows that ended.", [*names, "finished_reason"]
        )
        self._queue = metrics.histogram(
            "vllm:request_queue_time_seconds", "Wait for a slot.", SECONDS_OF_A_REQUEST, names
        )
        self._first = metrics.histogram(
            "vllm:time_to_first_token_seconds", "Until the first token.", SECONDS_TO_FIRST_TOKEN, names
        )
        self._token = metrics.histogram(
            "vllm:time_per_output_token_seconds", "Between tokens.", SECONDS_PER_TOKEN, names
        )
        self._whole = metrics.histogram(
            "vllm:e2e_request_latency_seconds", "From submission to end.", SECONDS_OF_A_REQUEST, names
        )

    def starts(self, row: _Running) -> None:
        self._prompt.add(len(row.request.token_ids), *self.values)
        self._queries.add(len(row.request.token_ids), *self.values)
        self._hits.add(row.cached_tokens, *self.values)
        self._queue.observe(row.started - row.job.submitted, *self.values)

    def makes(self, row: _Running, count: int, now: float) -> None:
        self._made.add(count, *self.values)
        if not row.last_token_at:
            self._first.observe(now - row.job.submitted, *self.values)
        elif count:
            for _ in range(count):
                self._token.observe((now - row.last_token_at) / count, *self.values)
        if count or not row.last_token_at:
            row.last_token_at = now

    def ends(self, row: _Running, reason: str, now: float) -> None:
        self._ended.add(1, *self.values, reason)
        self._whole.observe(now - row.job.submitted, *self.values)
