"""Runs the server: load, listen, say that it is ready, drain on a signal."""

import dataclasses
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
from kerasllm_serving.errors import StartupError
from kerasllm_serving.grpc_service import create_grpc_server
from kerasllm_serving.model import Servable, find_latest_version
from kerasllm_serving.rest import RestHandler, create_rest_app

# How long running requests may take to finish once the server is told to stop.
DRAIN_SECONDS = 30


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
    """

    model_base_path: Path
    model_name: str
    host: str
    port: int
    rest_api_port: int
    grpc_max_threads: int
    rest_api_num_threads: int
    rest_api_timeout_in_ms: int


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
    servable = Servable(version_path)
    core = ServerCore(options.model_name, servable)

    stop = threading.Event()

    def ask_to_stop(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    grpc_server, grpc_port = create_grpc_server(
        core, _address(options.host, options.port), options.grpc_max_threads
    )
    rest_server = _start_rest_server(core, options) if options.rest_api_port else None
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
    _drain(grpc_server, rest_server)
    servable.close()


class RestServer:
    """Uvicorn in a thread of its own.

    Args:
        handler: What answers the requests.
        listener: A listening socket.
        num_threads: How many requests are worked on at once.
    """

    def __init__(self, handler: RestHandler, listener: socket.socket, num_threads: int) -> None:
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="rest")
        config = uvicorn.Config(
            create_rest_app(handler, self._executor),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=DRAIN_SECONDS,
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


def _start_rest_server(core: ServerCore, options: ServerOptions) -> RestServer:
    family, address = next(_resolve("--rest_api_port", options.host, options.rest_api_port))
    try:
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise _port_error("--rest_api_port", options.host, options.rest_api_port, error) from error
    handler = RestHandler(core, options.rest_api_timeout_in_ms)
    server = RestServer(handler, listener, options.rest_api_num_threads)
    server.start()
    return server


def _drain(grpc_server: grpc.Server, rest_server: RestServer | None) -> None:
    """Stops accepting requests on both ports and waits for those that run."""
    if rest_server:
        rest_server.ask_to_stop()
    grpc_stopped = grpc_server.stop(DRAIN_SECONDS)
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
