"""Runs the server: load, listen, say that it is ready, drain on a signal."""

import dataclasses
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import uvicorn

from kerasllm_serving.core import ServerCore
from kerasllm_serving.engine import Engine
from kerasllm_serving.errors import StartupError
from kerasllm_serving.grpc_service import create_grpc_server
from kerasllm_serving.http_app import HttpApp, HttpOptions
from kerasllm_serving.language_model import LanguageModel
from kerasllm_serving.metrics import Metrics
from kerasllm_serving.model import Servable, find_latest_version
from kerasllm_serving.openai_api import Served
from kerasllm_serving.rest import RestHandler


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What the command line sets; the names are the flags'.

    Args:
        model_base_path: Folder that holds the numeric version folders.
        model_name: The name by which requests ask for the model.
        host: Address to listen at.
        port: Port of gRPC; 0 takes a free one.
        rest_api_port: Port of REST; 0 for no REST.
        grpc_max_threads: How many gRPC requests are worked on at once.
        rest_api_num_threads: How many REST requests are worked on at once.
        rest_api_timeout_in_ms: Milliseconds after which the model run of a REST request is
            cancelled; 0 for no limit.
        rest_api_enable_cors_support: Whether pages of other servers may ask.
        api_keys: One of them has to come with each request; none: anybody may ask.
        max_body_bytes: Most bytes of the body of a REST request.
        access_log: Whether each REST request is logged, without what it says.
        max_queue: Most rows that wait for a slot of a language model.
        steps_per_turn: Most tokens that a row makes before others may join or leave.
        generation_timeout_in_ms: Milliseconds after which a generation is ended; 0 for no limit.
        drain_seconds: How long running requests may take to finish once the server is told to stop.
    """

    model_base_path: Path
    model_name: str
    host: str
    port: int
    rest_api_port: int
    grpc_max_threads: int
    rest_api_num_threads: int
    rest_api_timeout_in_ms: int
    rest_api_enable_cors_support: bool = False
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 64 * 2**20
    access_log: bool = False
    max_queue: int = 256
    steps_per_turn: int = 1
    generation_timeout_in_ms: int = 600_000
    drain_seconds: int = 30


def serve(options: ServerOptions) -> None:
    """Serves the latest version until SIGTERM or SIGINT, then finishes the running requests.

    Prints one line on stdout when it is ready to answer. A second signal ends it at once.

    Args:
        options: What to serve and where.

    Raises:
        StartupError: If the model cannot be loaded or a port is taken.
    """
    version_path = find_latest_version(options.model_base_path)
    # Before the load, which may take minutes.
    check_port_is_free("--port", options.host, options.port)
    check_port_is_free("--rest_api_port", options.host, options.rest_api_port)
    stop = threading.Event()

    def ask_to_stop(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    metrics = Metrics()
    state = ServerState(options)
    # It says that the model is being loaded, until it is.
    rest_server = _start_rest_server(state, options, metrics) if options.rest_api_port else None
    try:
        servable = Servable(version_path)
        core = ServerCore(options.model_name, servable)
        grpc_server, grpc_port = create_grpc_server(
            core, _address(options.host, options.port), options.grpc_max_threads, options.api_keys
        )
        state.serve(core, version_path, metrics)
    except BaseException:
        if rest_server:
            rest_server.ask_to_stop()
            rest_server.wait()
        raise
    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    grpc_server.start()
    rest_address = _address(options.host, options.rest_api_port) if rest_server else "off"
    print(
        f"kerasllm_serving: gRPC on {_address(options.host, grpc_port)}, REST on {rest_address}, "
        f"model {options.model_name} version {servable.version} ready",
        flush=True,
    )
    stop.wait()
    state.is_stopping = True
    _drain(grpc_server, rest_server, options.drain_seconds)
    state.close()
    servable.close()


class ServerState:
    """What is served now; see `http_app.State`.

    Args:
        options: The server's.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.is_stopping = False
        self._options = options
        self._handler: RestHandler | None = None
        self._served: dict[str, Served] = {}

    def serve(self, core: ServerCore, path: Path, metrics: Metrics) -> None:
        """Begins to answer.

        Args:
            core: Answers TensorFlow Serving's requests.
            path: The version folder.
            metrics: Where the numbers of an engine go.
        """
        model = LanguageModel(core.model_name, path, core.servable)
        if model.is_language_model:
            engine = None
            if model.slots is not None:
                options = self._options
                labels = [("model_name", model.name)]
                engine = Engine(model.slots, options.max_queue, options.steps_per_turn, metrics, labels)
            self._served[model.name] = Served(model, engine)
        self._handler = RestHandler(core, self._options.rest_api_timeout_in_ms)

    def rest_handler(self) -> RestHandler | None:
        """Answers TensorFlow Serving's requests; None: nothing is loaded yet."""
        return self._handler

    def find(self, name: str | None) -> Served:
        """Returns the language model of a name, of None the only one; a KeyError if there is none."""
        if name is None and len(self._served) == 1:
            return next(iter(self._served.values()))
        return self._served[name]

    def language_models(self) -> list[Served]:
        """Returns all language models."""
        return list(self._served.values())

    def problem(self) -> str | None:
        """Why no request should come now; None: they may."""
        if self.is_stopping:
            return "The server is shutting down."
        return None if self._handler else "The model is being loaded."

    def close(self) -> None:
        """Ends the engines."""
        for served in self._served.values():
            if served.engine:
                served.engine.close(0)


class RestServer:
    """Uvicorn in a thread of its own.

    Args:
        app: What answers the requests.
        listener: A listening socket.
        executor: The threads that the application uses.
        drain_seconds: How long running requests may take to finish.
    """

    def __init__(
        self, app: HttpApp, listener: socket.socket, executor: ThreadPoolExecutor, drain_seconds: int
    ) -> None:
        self._executor = executor
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=drain_seconds,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listener]}, name="rest-server"
        )

    def start(self) -> None:
        """Returns once requests are answered."""
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise StartupError("The REST server must start. Received: it ended")
            time.sleep(0.01)

    def ask_to_stop(self) -> None:
        """Stops accepting requests; returns at once."""
        self._server.should_exit = True

    def wait(self) -> None:
        """Returns once the running requests have finished, or their time is over."""
        self._thread.join()
        self._executor.shutdown(wait=False)


def _start_rest_server(state: ServerState, options: ServerOptions, metrics: Metrics) -> RestServer:
    family, address = next(_resolve("--rest_api_port", options.host, options.rest_api_port))
    try:
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise _port_error("--rest_api_port", options.host, options.rest_api_port, error) from error
    executor = ThreadPoolExecutor(options.rest_api_num_threads, thread_name_prefix="rest")
    http_options = HttpOptions(
        api_keys=options.api_keys,
        max_body_bytes=options.max_body_bytes,
        allows_cors=options.rest_api_enable_cors_support,
        has_access_log=options.access_log,
    )
    if options.access_log:
        log = logging.getLogger("kerasllm_serving.access")
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler())
    seconds = options.generation_timeout_in_ms / 1000 or None
    app = HttpApp(state, http_options, executor, metrics, seconds)
    server = RestServer(app, listener, executor, options.drain_seconds)
    server.start()
    return server


def _drain(grpc_server: grpc.Server, rest_server: RestServer | None, seconds: int) -> None:
    """Stops accepting requests on both ports and waits for those that run."""
    if rest_server:
        rest_server.ask_to_stop()
    grpc_stopped = grpc_server.stop(seconds)
    grpc_stopped.wait()
    if rest_server:
        rest_server.wait()


def check_port_is_free(flag: str, host: str, port: int) -> None:
    """Checks that nothing listens at a port, on any address that the host stands for.

    Args:
        flag: The flag that named the port, for the message.
        host: Address or host name.
        port: The port; 0 always passes.

    Raises:
        StartupError: If the port is taken or may not be bound, or the host is unknown.
    """
    if not port:
        return
    for family, address in _resolve(flag, host, port):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # Connections of a server that has just ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
                probe.listen()
            except OSError as error:
                raise _port_error(flag, host, port, error) from error


def _resolve(flag: str, host: str, port: int) -> Iterator[tuple[socket.AddressFamily, tuple[str, int]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _port_error(flag, host, port, error) from error
    for family, _, _, _, address in found:
        yield family, address


def _port_error(flag: str, host: str, port: int, error: OSError) -> StartupError:
    return StartupError(
        f"`{flag}` must be a free port of this machine. Received: {_address(host, port)}: {error.strerror}"
    )


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
