"""The ASGI application: TensorFlow Serving's REST API, OpenAI's API, and what operators need."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import time
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from concurrent.futures import Executor
from importlib import resources
from typing import Any, Protocol

from kerasllm_serving.api_keys import KeyCheck, TooManyRequests
from kerasllm_serving.fields import ApiError
from kerasllm_serving.metrics import MICROSECONDS, Metrics
from kerasllm_serving.openai_api import OpenAiApi, Served
from kerasllm_serving.rest import RestHandler
from kerasllm_serving.stream import Stream

# ASGI's.
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_TF_SERVING_PATH = re.compile(r"/v1/.*", re.IGNORECASE | re.DOTALL)
_MODEL_PATH = re.compile(r"/v1/models/([^/:]+)")
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)
# Whoever may see that there is a server may see these.
_PUBLIC = {"/", "/health", "/ready"}
_CARDS = "/cards/"
_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"
_access_log = logging.getLogger("kerasllm_serving.access")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class HttpOptions:
    """How requests are let in.

    Args:
        keys: Who may ask, and how much.
        max_body_bytes: Most bytes of a body.
        allows_cors: Whether pages of other servers may ask.
        has_access_log: Whether each request is logged, without what it says.
        metrics_paths: Where the numbers are.
    """

    keys: KeyCheck = dataclasses.field(default_factory=KeyCheck)
    max_body_bytes: int = 64 * 2**20
    allows_cors: bool = False
    has_access_log: bool = False
    metrics_paths: tuple[str, ...] = ("/metrics",)


class State(Protocol):
    """What is served now."""

    def rest_handler(self) -> RestHandler | None:
        """Answers TensorFlow Serving's requests; None: nothing is loaded yet."""

    def find(self, name: str | None) -> contextlib.AbstractContextManager[Served]:
        """Gives the language model of a name, of None the only one; a KeyError if there is none."""

    def language_models(self) -> dict[str, Served]:
        """Returns all language models by their names."""

    def problem(self) -> str | None:
        """Why no request should come now; None: they may."""


class HttpApp:
    """The application.

    Args:
        state: What is served.
        options: How requests are let in.
        executor: Threads that models run in, so that they do not hold up the event loop.
        metrics: The numbers.
        generation_timeout: Seconds after which a generation is ended; None: never.
    """

    def __init__(
        self,
        state: State,
        options: HttpOptions,
        executor: Executor,
        metrics: Metrics,
        generation_timeout: float | None = None,
    ) -> None:
        self._state = state
        self._options = options
        self._executor = executor
        self._metrics = metrics
        self._page = resources.files("kerasllm_serving").joinpath("page.html").read_bytes()
        api = OpenAiApi(state.find, executor, generation_timeout)
        self._posts: Mapping[str, Callable] = {
            "/v1/completions": api.completions,
            "/v1/chat/completions": api.chat_completions,
            "/v1/responses": api.responses,
            "/v1/embeddings": api.embeddings,
            "/tokenize": api.tokenize,
            "/detokenize": api.detokenize,
            "/generate": api.generate,
        }
        self._gets: Mapping[str, Callable[[], tuple[int, str, bytes]]] = {
            "/": lambda: (200, "text/html; charset=utf-8", self._page),
            "/health": self._health,
            "/ready": self._health,
            "/v1/models": self._list_models,
            **dict.fromkeys(options.metrics_paths, self._show_metrics),
        }
        self._requests = metrics.counter(
            "kerasllm:http_requests_total", "HTTP requests.", ("path", "status")
        )
        self._latency = metrics.histogram(
            "kerasllm:http_request_microseconds", "From the request to the end.", MICROSECONDS, ("path",)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, receive, send, self._options)
        try:
            if exchange.path in _PUBLIC or exchange.method == "OPTIONS":
                await self._answer(exchange)
            else:
                with self._admitted(exchange):
                    await self._answer(exchange)
        except ApiError as error:
            await self._refuse(exchange, error)
        except (_Disconnected, OSError):
            exchange.status = 499
        except Exception:
            _logger.exception("%s failed", exchange.path)
            await self._refuse(exchange, ApiError(500, "Internal error; the log of the server tells more"))
        finally:
            self._note(exchange)

    async def _answer(self, exchange: "_Exchange") -> None:
        path, method = exchange.path, exchange.method
        if method == "OPTIONS" and self._options.allows_cors:
            await exchange.respond(204, _JSON, b"")
            return
        self._check_method(path, method)
        if path in self._gets:
            await exchange.respond(*self._gets[path]())
        elif path.startswith(_CARDS):
            await exchange.respond(*self._show_card(path.removeprefix(_CARDS)))
        elif path in self._posts:
            self._check_ready()
            await self._answer_openai(exchange, self._posts[path])
        elif _TF_SERVING_PATH.fullmatch(path):
            handler = self._state.rest_handler()
            if handler is None:
                raise ApiError(503, "The model is being loaded.")
            body = await exchange.body()
            loop = asyncio.get_running_loop()
            status, text = await loop.run_in_executor(self._executor, handler.handle, method, path, body)
            await exchange.respond(status, _JSON, self._with_openai(path, status, text).encode())
        else:
            await exchange.respond(404, None, b"")

    async def _answer_openai(self, exchange: "_Exchange", endpoint: Callable) -> None:
        """Answers a request for as long as somebody waits for the answer."""
        body = await exchange.body()
        work = asyncio.ensure_future(self._work(exchange, endpoint, body))
        gone = asyncio.ensure_future(exchange.disconnected())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _Disconnected
            await work
        finally:
            for task in (work, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _work(self, exchange: "_Exchange", endpoint: Callable, body: bytes) -> None:
        with contextlib.ExitStack() as held:
            await self._respond_openai(exchange, await endpoint(body, held))

    async def _respond_openai(self, exchange: "_Exchange", result: Stream | dict[str, Any]) -> None:
        if not isinstance(result, Stream):
            await exchange.respond(200, _JSON, _to_json(result))
            return
        is_named = result.form.has_named_events
        try:
            await exchange.start(200, "text/event-stream; charset=utf-8", [(b"cache-control", b"no-cache")])
            chunks = result.chunks()
            try:
                async for chunk in chunks:
                    await exchange.write(_to_event(chunk, is_named))
            except ApiError as error:
                await exchange.write(_to_event(result.form.error(error), is_named))
            finally:
                await chunks.aclose()
            if not is_named:
                await exchange.write(b"data: [DONE]\n\n")
            await exchange.end()
        finally:
            result.close()

    # Before the answer

    @contextlib.contextmanager
    def _admitted(self, exchange: "_Exchange") -> Iterator[None]:
        """Asks for a key, and counts what it asks for; not what tells of the server only."""
        keys = self._options.keys
        key = keys.find(exchange.header(b"authorization"))
        if key is None:
            raise ApiError(
                401, "A valid API key must come as `Authorization: Bearer KEY`.", code="invalid_api_key"
            )
        with contextlib.ExitStack() as held:
            if exchange.path not in self._gets:
                try:
                    held.enter_context(keys.answering(key))
                except TooManyRequests as error:
                    code = "rate_limit_exceeded"
                    raise ApiError(429, str(error), code=code, seconds=error.seconds) from error
            yield

    def _check_method(self, path: str, method: str) -> None:
        """Refuses what a fixed path does not take; TensorFlow Serving's have an error of their own."""
        if path in self._gets or path.startswith(_CARDS):
            allowed = ("GET", "HEAD")
        elif path in self._posts:
            allowed = ("POST",)
        else:
            return
        if method not in allowed:
            raise ApiError(
                405, f"{path} takes {' and '.join(allowed)} requests. Received: {method}", allowed=allowed
            )

    def _check_ready(self) -> None:
        problem = self._state.problem()
        if problem:
            raise ApiError(503, problem)

    # Answers

    def _health(self) -> tuple[int, str, bytes]:
        problem = self._state.problem()
        return (503, _JSON, _to_json({"status": problem})) if problem else (200, _JSON, b'{"status": "ok"}')

    def _show_metrics(self) -> tuple[int, str, bytes]:
        return 200, "text/plain; version=0.0.4; charset=utf-8", self._metrics.render().encode()

    def _list_models(self) -> tuple[int, str, bytes]:
        self._check_ready()
        models = [_describe(served) for served in self._state.language_models().values()]
        return 200, _JSON, _to_json({"object": "list", "data": models})

    def _show_card(self, name: str) -> tuple[int, str, bytes]:
        self._check_ready()
        served = self._state.language_models().get(urllib.parse.unquote(name))
        card = served.model.card if served else None
        return (404, _TEXT, b"") if card is None else (200, _TEXT, card.encode())

    def _with_openai(self, path: str, status: int, text: str) -> str:
        """Adds what OpenAI's clients read to the status of a language model."""
        match = _MODEL_PATH.fullmatch(path)
        if not (match and status == 200):
            return text
        served = self._state.language_models().get(urllib.parse.unquote(match[1]))
        return json.dumps(json.loads(text) | _describe(served), indent=1) + "\n" if served else text

    async def _refuse(self, exchange: "_Exchange", error: ApiError) -> None:
        if exchange.has_started:
            return
        # TensorFlow Serving's clients read another object.
        is_openai = exchange.path in self._posts or exchange.path in self._gets
        body = error.body if is_openai else {"error": error.message}
        headers = [(key.encode(), value.encode()) for key, value in error.headers.items()]
        with contextlib.suppress(OSError):
            await exchange.respond(error.status, _JSON, _to_json(body), headers)

    def _note(self, exchange: "_Exchange") -> None:
        seconds = time.monotonic() - exchange.begin
        known = exchange.path in self._posts or exchange.path in self._gets
        # A path names a model, of which there may be many, and guesses of it are without number.
        path = exchange.path if known else "/v1/models" if exchange.path.startswith("/v1/") else "other"
        self._requests.add(1, path, str(exchange.status))
        self._latency.observe(seconds * 1e6, path)
        if self._options.has_access_log:
            _access_log.info("%s", json.dumps(exchange.describe(seconds)))


class _Disconnected(Exception):
    """Nobody waits for the answer any more."""


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, options: HttpOptions) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._options = options
        self._headers = dict(scope["headers"])
        self._received = self._sent = 0
        self.begin = time.monotonic()
        self.path: str = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        self.method: str = scope["method"]
        given = self.header(b"x-request-id")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        self.status = 0
        self.has_started = False

    def header(self, name: bytes) -> bytes:
        """Returns a header of the request, empty if there is none."""
        return self._headers.get(name, b"")

    async def body(self) -> bytes:
        """Reads the body; a limit too small for it is an error before it is read."""
        most = self._options.max_body_bytes
        announced = self.header(b"content-length")
        if announced.isdigit() and int(announced) > most:
            raise ApiError(413, f"A body must have up to {most} bytes. Received: {announced.decode()}")
        parts = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            parts.append(message.get("body", b""))
            self._received += len(parts[-1])
            if self._received > most:
                raise ApiError(413, f"A body must have up to {most} bytes. Received: more")
            if not message.get("more_body"):
                return b"".join(parts)

    async def disconnected(self) -> None:
        """Returns when nobody waits for the answer any more; the body must have been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def respond(self, status: int, kind: str | None, body: bytes, headers: list = ()) -> None:
        """Sends a whole answer."""
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, kind, [length, *headers])
        await self.write(body, is_last=True)

    async def start(self, status: int, kind: str | None, headers: list) -> None:
        """Begins an answer."""
        self.status = status
        self.has_started = True
        more = [(b"x-request-id", self.id), *headers]
        if kind:
            more.append((b"content-type", kind.encode()))
        if self._options.allows_cors:
            more += [
                (b"access-control-allow-origin", b"*"),
                (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
                (b"access-control-allow-headers", b"*, authorization, content-type"),
            ]
        await self._send({"type": "http.response.start", "status": status, "headers": more})

    async def write(self, body: bytes, is_last: bool = False) -> None:
        """Sends a part of an answer."""
        self._sent += len(body)
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def end(self) -> None:
        """Ends an answer."""
        await self.write(b"", is_last=True)

    def describe(self, seconds: float) -> dict[str, Any]:
        """Returns what the access log says."""
        client = self._scope.get("client")
        return {
            "time": time.time(),
            "id": self.id.decode(),
            "client": client[0] if client else None,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "seconds": round(seconds, 6),
            "bytes_in": self._received,
            "bytes_out": self._sent,
        }


def _describe(served: Served) -> dict[str, Any]:
    length = served.engine.model.length if served.engine else None
    return {
        "id": served.model.name,
        "object": "model",
        "created": served.model.created,
        "owned_by": "kerasllm",
        "max_model_len": length,
    }


def _to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _to_event(value: dict[str, Any], is_named: bool) -> bytes:
    """A server-sent event."""
    name = b"event: " + value["type"].encode() + b"\n" if is_named else b""
    return name + b"data: " + _to_json(value) + b"\n\n"
