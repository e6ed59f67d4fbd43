"""A generation on its way from the engine to a client, as one object or as a stream of them."""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from kerasllm_serving.engine import Engine, Job, Piece, RowRequest
from kerasllm_serving.errors import ServingError
from kerasllm_serving.fields import ApiError, from_serving_error
from kerasllm_serving.telemetry import annotate


class Usage(NamedTuple):
    """How many tokens were read and made.

    Attributes:
        read: Of the prompts.
        cached: Of these, how many had been read before.
        made: New ones.
    """

    read: int
    cached: int
    made: int


class Form(Protocol):
    """What an answer looks like.

    Attributes:
        has_named_events: Whether each object of a stream comes under its `type`, without `[DONE]` at last.
    """

    has_named_events: bool

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The whole answer, from a piece for each row."""

    def start(self) -> Iterable[dict[str, Any]]:
        """The objects of a stream before there is a token."""

    def events(self, piece: Piece) -> Iterable[dict[str, Any]]:
        """The objects of a piece."""

    def end(self, usage: Usage) -> Iterable[dict[str, Any]]:
        """The objects after the last piece."""

    def error(self, error: ApiError) -> dict[str, Any]:
        """The object of a stream that failed."""


class Stream:
    """A generation on its way.

    Args:
        engine: The engine, which gets the rows at once.
        rows: The rows.
        form: What the objects look like.
        prompt_tokens: For the usage.
        deadline: When the generation is ended, on `time.monotonic`'s clock.

    Raises:
        ApiError: If the engine refuses the rows.
    """

    def __init__(
        self,
        engine: Engine,
        rows: Sequence[RowRequest],
        form: Form,
        prompt_tokens: int,
        deadline: float | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece | ServingError] = asyncio.Queue()
        self.form = form
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        # By prompts, whose rows share a list of tokens: how much of it had been read before.
        self._cached_tokens: dict[int, int] = {}
        self._rows = rows
        self._rows_left = len(rows)

        def deliver(piece: Piece | ServingError) -> None:
            try:
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
            except RuntimeError:  # The loop has ended, and with it whoever waited.
                pass

        try:
            self._job: Job = engine.submit(rows, deliver, deadline)
        except ServingError as error:
            raise from_serving_error(error) from error

    def close(self) -> None:
        """Ends the generation."""
        self._job.cancel()

    async def _next(self) -> AsyncIterator[Piece]:
        while self._rows_left:
            piece = await self._pieces.get()
            if isinstance(piece, ServingError):
                raise from_serving_error(piece)
            self._tokens += len(piece.token_ids)
            self._cached_tokens.setdefault(id(self._rows[piece.row].token_ids), piece.cached_tokens)
            self._rows_left -= piece.finish_reason is not None
            yield piece

    async def collect(self) -> dict[str, Any]:
        """Waits for the end and returns the whole answer."""
        try:
            pieces: dict[int, list[Piece]] = {number: [] for number in range(self._rows_left)}
            async for piece in self._next():
                pieces[piece.row].append(piece)
        finally:
            self.close()
        joined = [_join(parts) for parts in pieces.values()]
        return self.form.whole(joined, self._usage())

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yields the objects of the stream."""
        try:
            for event in self.form.start():
                yield event
            async for piece in self._next():
                for event in self.form.events(piece):
                    yield event
            for event in self.form.end(self._usage()):
                yield event
        finally:
            self.close()

    def _usage(self) -> Usage:
        usage = Usage(self._prompt_tokens, sum(self._cached_tokens.values()), self._tokens)
        annotate({"gen_ai.usage.input_tokens": usage.read, "gen_ai.usage.output_tokens": usage.made})
        return usage


def _join(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        pieces[0].row,
        "".join(piece.text for piece in pieces),
        [number for piece in pieces for number in piece.token_ids],
        [number for piece in pieces for number in piece.logprobs],
        [pairs for piece in pieces for pairs in piece.alternatives],
        pieces[-1].finish_reason,
    )
