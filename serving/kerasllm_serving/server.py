"""Runs the server: load, listen, say that it is ready, drain on a signal."""

import contextlib
import dataclasses
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import uvicorn
from tensorflow.core.protobuf import config_pb2
from tensorflow_serving.apis import model_pb2

from kerasllm_serving.api_keys import KeyCheck
from kerasllm_serving.batching import Batching, read_batching_parameters
from kerasllm_serving.config_files import parse_text, read_config
from kerasllm_serving.core import ServerCore
from kerasllm_serving.engine import Engine
from kerasllm_serving.errors import ServingError, StartupError
from kerasllm_serving.grpc_service import GrpcOptions, GrpcServer
from kerasllm_serving.http_app import HttpApp, HttpOptions
from kerasllm_serving.language_model import LanguageModel
from kerasllm_serving.litert_model import LiteRtLanguageModel, find_litert_file
from kerasllm_serving.manager import ModelConfig, ModelManager, read_config_file
from kerasllm_serving.metrics import MICROSECONDS, Metrics
from kerasllm_serving.model import ModelOptions, Servable, find_versions
from kerasllm_serving.openai_api import Served
from kerasllm_serving.rest import RestHandler
from kerasllm_serving.telemetry import Telemetry
from kerasllm_serving.tls import RestTls, read_grpc_credentials
from kerasllm_serving.warmup import warm_up

_PROMETHEUS_PATH = "/monitoring/prometheus/metrics"  # TensorFlow Serving's
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What the command line sets; the names are the flags'.

    Args:
        model_base_path: Folder that holds the numeric version folders; None: see `model_config_file`.
        model_name: The name by which requests ask for the model.
        model_config_file: Text file with a ModelServerConfig, instead of the two above.
        model_config_file_poll_wait_seconds: How often the file is read again; 0: never.
        file_system_poll_wait_seconds: How often is looked for new versions; 0: never.
        max_num_load_retries: How often a version that did not load is tried again.
        allow_version_labels_for_unavailable_models: Whether a new label may name a version that is not
            loaded.
        enable_model_warmup: Whether the requests in `assets.extra/` are run before a version is served.
        host: Address to listen at.
        port: Port of gRPC; 0 takes a free one.
        rest_api_port: Port of REST; 0 for no REST.
        grpc_max_threads: How many gRPC requests are worked on at once.
        rest_api_num_threads: How many REST requests are worked on at once.
        rest_api_timeout_in_ms: Milliseconds after which the model run of a REST request is
            cancelled; 0 for no limit.
        rest_api_enable_cors_support: Whether pages of other servers may ask.
        grpc_socket_path: A Unix socket for gRPC, besides the port.
        grpc_channel_arguments: Settings of gRPC's core.
        ssl_config_file: Text file with an SSLConfig, which encrypts gRPC.
        enable_grpc_healthcheck_service: Whether gRPC's own service for health checks answers.
        rest_api_ssl_certfile: The certificate that encrypts REST, as PEM.
        rest_api_ssl_keyfile: Its key; None: it is in the same file.
        rest_api_ssl_ca_certs: Whose certificates REST's clients must bring; None: they need none.
        monitoring_config_file: Text file with a MonitoringConfig: where Prometheus finds the numbers.
        enable_batching: Whether requests that come together are run together.
        batching_parameters_file: Text file with BatchingParameters: how.
        enable_per_model_batching_parameters: Whether version folders say themselves how.
        saved_model_tags: The tags of the graphs to load.
        tensorflow_session_config_file: Text file with a ConfigProto for the runtime.
        tensorflow_session_parallelism: Threads of the runtime, of both kinds below; 0: it chooses.
        tensorflow_intra_op_parallelism: Threads for one op; 0: as above.
        tensorflow_inter_op_parallelism: Ops that run at once; 0: as above.
        per_process_gpu_memory_fraction: Share of the GPU's memory; 0: the runtime chooses.
        enable_signature_method_name_check: Whether signatures must be declared for Classify and Regress.
        enable_serialization_as_tensor_content: Whether gRPC answers hold the bytes of tensors.
        load_retry_interval_micros: Microseconds before a version that did not load is tried again.
        num_request_iterations_for_warmup: How often each warm-up request is run.
        api_keys: One of them has to come with each request; none: anybody may ask.
        max_requests_per_minute_per_key: How many requests of a key are answered in a minute; None: any
            number.
        max_concurrent_requests_per_key: How many of them at once; None: any number.
        max_body_bytes: Most bytes of the body of a REST request.
        access_log: Whether each REST request is logged, without what it says.
        enable_opentelemetry: Whether each request makes a span, see `Telemetry`.
        max_queue: Most rows that wait for a slot of a language model.
        steps_per_turn: Most tokens that a row makes before others may join or leave.
        prefill_chunk_tokens: Most tokens of each prompt that are read between two of these turns.
        enable_prefix_cache: Whether a prompt goes on from what a slot has read of it before.
        generation_timeout_in_ms: Milliseconds after which a generation is ended; 0 for no limit.
        drain_seconds: How long running requests may take to finish once the server is told to stop.
    """

    model_base_path: Path | None
    model_name: str
    host: str
    port: int
    rest_api_port: int
    grpc_max_threads: int
    rest_api_num_threads: int
    rest_api_timeout_in_ms: int
    model_config_file: Path | None = None
    model_config_file_poll_wait_seconds: int = 0
    file_system_poll_wait_seconds: int = 1
    max_num_load_retries: int = 5
    allow_version_labels_for_unavailable_models: bool = False
    enable_model_warmup: bool = True
    rest_api_enable_cors_support: bool = False
    grpc_socket_path: str | None = None
    grpc_channel_arguments: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    ssl_config_file: Path | None = None
    enable_grpc_healthcheck_service: bool = False
    rest_api_ssl_certfile: Path | None = None
    rest_api_ssl_keyfile: Path | None = None
    rest_api_ssl_ca_certs: Path | None = None
    monitoring_config_file: Path | None = None
    enable_batching: bool = False
    batching_parameters_file: Path | None = None
    enable_per_model_batching_parameters: bool = False
    saved_model_tags: tuple[str, ...] = ("serve",)
    tensorflow_session_config_file: Path | None = None
    tensorflow_session_parallelism: int = 0
    tensorflow_intra_op_parallelism: int = 0
    tensorflow_inter_op_parallelism: int = 0
    per_process_gpu_memory_fraction: float = 0.0
    enable_signature_method_name_check: bool = False
    enable_serialization_as_tensor_content: bool = False
    load_retry_interval_micros: int = 60_000_000
    num_request_iterations_for_warmup: int = 1
    api_keys: tuple[str, ...] = ()
    max_requests_per_minute_per_key: int | None = None
    max_concurrent_requests_per_key: int | None = None
    max_body_bytes: int = 64 * 2**20
    access_log: bool = False
    enable_opentelemetry: bool = False
    max_queue: int = 256
    steps_per_turn: int = 4
    prefill_chunk_tokens: int = 128
    enable_prefix_cache: bool = True
    generation_timeout_in_ms: int = 600_000
    drain_seconds: int = 30


def serve(options: ServerOptions) -> None:
    """Serves models until SIGTERM or SIGINT, then finishes the running requests.

    Prints one line on stdout when it is ready to answer. A second signal ends it at once.

    Args:
        options: What to serve and where.

    Raises:
        StartupError: If the model cannot be loaded or a port is taken.
    """
    if options.model_config_file:
        configs = read_config_file(options.model_config_file)
    else:
        configs = [ModelConfig(options.model_name, options.model_base_path)]
    for config in configs:
        find_versions(config.base_path)
    _check_rest_port(options)
    metrics = Metrics()
    load = _make_loader(options, metrics)
    keys = KeyCheck(
        options.api_keys, options.max_requests_per_minute_per_key, options.max_concurrent_requests_per_key
    )
    telemetry = Telemetry() if options.enable_opentelemetry else None
    grpc_options = _grpc_options(options, keys, telemetry)
    # Before the load, which may take minutes.
    check_port_is_free("--port", options.host, options.port)
    check_port_is_free("--rest_api_port", options.host, options.rest_api_port)
    stop = threading.Event()

    def ask_to_stop(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)

    state = ServerState(options)
    # It says that the model is being loaded, until it is.
    rest_server = None
    if options.rest_api_port:
        rest_server = _start_rest_server(state, options, keys, metrics, telemetry)
    try:
        manager = ModelManager(
            load,
            configs,
            options.allow_version_labels_for_unavailable_models,
            options.max_num_load_retries,
            options.load_retry_interval_micros / 1e6,
        )
        manager.start()
        core = ServerCore(manager, metrics)
        grpc_server = GrpcServer(core, _address(options.host, options.port), grpc_options)
        state.serve(core, manager)
    except ServingError as error:
        _end(rest_server)
        raise StartupError(error.message) from error
    except BaseException:
        _end(rest_server)
        raise
    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    grpc_server.start()
    rest_address = _address(options.host, options.rest_api_port) if rest_server else "off"
    grpc_address = _address(options.host, grpc_server.port)
    if options.grpc_socket_path:
        grpc_address += f" and unix:{options.grpc_socket_path}"
    print(
        f"kerasllm_serving: gRPC on {grpc_address}, REST on {rest_address}, "
        + ", ".join(f"model {name} version {number}" for name, number in manager.numbers())
        + " ready",
        flush=True,
    )
    _watch_files(manager, configs, options, stop)
    state.is_stopping = True
    _drain(grpc_server, rest_server, options.drain_seconds)
    manager.close()
    if telemetry:
        telemetry.close()


def _watch_files(
    manager: ModelManager, configs: Sequence[ModelConfig], options: ServerOptions, stop: threading.Event
) -> None:
    """Looks for new versions and another configuration, until the server is told to stop."""
    begin = time.monotonic()
    next_poll = begin + (options.file_system_poll_wait_seconds or math.inf)
    next_read = begin + (options.model_config_file_poll_wait_seconds or math.inf)
    while not stop.wait(min(max(min(next_poll, next_read) - time.monotonic(), 0), threading.TIMEOUT_MAX)):
        now = time.monotonic()
        if now >= next_read:
            next_read = now + options.model_config_file_poll_wait_seconds
            try:
                read = read_config_file(options.model_config_file)
                if read != configs:
                    manager.reload(read)
                    configs = read
            except (StartupError, ServingError) as error:
                _logger.error("%s", error)
        if now >= next_poll:
            manager.poll()
            next_poll = time.monotonic() + options.file_system_poll_wait_seconds


def _make_loader(options: ServerOptions, metrics: Metrics) -> Callable[[str, int, Path], "LoadedVersion"]:
    """Returns what loads a version, from a model's name, the version's number and its path."""
    batching = None
    if options.enable_batching:
        batching = Batching(
            read_batching_parameters(options.batching_parameters_file),
            options.enable_per_model_batching_parameters,
            metrics,
        )
    elif options.batching_parameters_file or options.enable_per_model_batching_parameters:
        raise StartupError(
            "`--batching_parameters_file` and `--enable_per_model_batching_parameters` need "
            "`--enable_batching=true`. Received: neither of it"
        )
    model_options = ModelOptions(
        options.saved_model_tags,
        _session_config(options),
        options.enable_signature_method_name_check,
    )
    return lambda name, number, path: LoadedVersion(
        name, number, path, options, model_options, batching, metrics
    )


def _session_config(options: ServerOptions) -> config_pb2.ConfigProto:
    config = config_pb2.ConfigProto()
    if options.tensorflow_session_config_file:
        parse_text(options.tensorflow_session_config_file, config, "--tensorflow_session_config_file")
    both = options.tensorflow_session_parallelism
    config.intra_op_parallelism_threads = (
        options.tensorflow_intra_op_parallelism or both or config.intra_op_parallelism_threads
    )
    config.inter_op_parallelism_threads = (
        options.tensorflow_inter_op_parallelism or both or config.inter_op_parallelism_threads
    )
    if options.per_process_gpu_memory_fraction:
        config.gpu_options.per_process_gpu_memory_fraction = options.per_process_gpu_memory_fraction
    return config


def _grpc_options(options: ServerOptions, keys: KeyCheck, telemetry: Telemetry | None) -> GrpcOptions:
    return GrpcOptions(
        max_threads=options.grpc_max_threads,
        interceptors=(telemetry.interceptor(),) if telemetry else (),
        keys=keys,
        socket_path=options.grpc_socket_path,
        credentials=read_grpc_credentials(options.ssl_config_file) if options.ssl_config_file else None,
        channel_arguments=options.grpc_channel_arguments,
        has_health_check=options.enable_grpc_healthcheck_service,
        sends_tensor_content=options.enable_serialization_as_tensor_content,
    )


def _rest_tls(options: ServerOptions) -> RestTls | None:
    if options.rest_api_ssl_certfile:
        return RestTls(
            options.rest_api_ssl_certfile, options.rest_api_ssl_keyfile, options.rest_api_ssl_ca_certs
        )
    if options.rest_api_ssl_keyfile or options.rest_api_ssl_ca_certs:
        raise StartupError(
            "`--rest_api_ssl_keyfile` and `--rest_api_ssl_ca_certs` need `--rest_api_ssl_certfile`. "
            "Received: none"
        )
    return None


def _check_rest_port(options: ServerOptions) -> None:
    for name in ("monitoring_config_file", "rest_api_ssl_certfile"):
        if getattr(options, name) and not options.rest_api_port:
            raise StartupError(f"`--{name}` needs `--rest_api_port`. Received: no port of REST")


def _metrics_paths(options: ServerOptions) -> tuple[str, ...]:
    """Returns where the numbers are; TensorFlow Serving's path is added where it is asked for."""
    paths = ("/metrics",)
    if not options.monitoring_config_file:
        return paths
    config = read_config(options.monitoring_config_file, "MonitoringConfig", "--monitoring_config_file")
    if not config.prometheus_config.enable:
        return paths
    path = config.prometheus_config.path or _PROMETHEUS_PATH
    if not path.startswith("/") or path.lower().startswith("/v1/"):
        raise StartupError(
            f"`path` in `--monitoring_config_file` must begin with / and not with /v1/. Received: {path}"
        )
    return (*paths, path)


def _end(rest_server: "RestServer | None") -> None:
    if rest_server:
        rest_server.ask_to_stop()
        rest_server.wait()


class LoadedVersion:
    """A loaded version of a model, with an engine if it was exported with slots.

    Args:
        name: The model's name.
        number: The version's.
        path: The version folder, or the file.
        options: The server's.
        model_options: How it is loaded and run.
        batching: Runs requests together; None: each is run by itself.
        metrics: Where the numbers of the engine go.

    Raises:
        StartupError: If it does not load.
        ServingError: If a warm-up request fails.
    """

    def __init__(
        self,
        name: str,
        number: int,
        path: Path,
        options: ServerOptions,
        model_options: ModelOptions,
        batching: Batching | None,
        metrics: Metrics,
    ) -> None:
        self._drain_seconds = options.drain_seconds
        self.served: Served | None = None
        self._batcher = None
        if file := find_litert_file(path):
            threads = options.tensorflow_intra_op_parallelism or options.tensorflow_session_parallelism
            model = LiteRtLanguageModel(name, file, number, threads or None)
            self.servable, self.run = model.servable, model.servable.run
            self.served = self._serve(model, options, metrics)
            return
        self.servable = Servable(path, model_options)
        self._batcher = batching.make_batcher(self.servable, path) if batching else None
        self.run = self._batcher.run if self._batcher else self.servable.run
        try:
            self._prepare(name, path, options, metrics)
        except BaseException:
            self.close()
            raise

    def _prepare(self, name: str, path: Path, options: ServerOptions, metrics: Metrics) -> None:
        if options.enable_model_warmup:
            self._warm_up(path, options.num_request_iterations_for_warmup, metrics)
        model = LanguageModel(name, path, self.servable)
        if model.is_language_model:
            self.served = self._serve(model, options, metrics)

    def _serve(
        self, model: LanguageModel | LiteRtLanguageModel, options: ServerOptions, metrics: Metrics
    ) -> Served:
        if model.slots is None:
            return Served(model, None)
        if options.enable_model_warmup:
            model.slots.warm_up()
        engine = Engine(
            model.slots,
            options.max_queue,
            options.steps_per_turn,
            options.prefill_chunk_tokens,
            options.enable_prefix_cache,
            metrics,
            [("model_name", model.name)],
        )
        return Served(model, engine)

    def _warm_up(self, path: Path, iterations: int, metrics: Metrics) -> None:
        latency = metrics.histogram(
            ":tensorflow:serving:model_warmup_latency",
            "Microseconds that warm-up requests take.",
            MICROSECONDS,
            ("model_path", "status"),
        )
        begin = time.perf_counter()
        if warm_up(self.servable, path, self.run, iterations):
            latency.observe((time.perf_counter() - begin) * 1e6, str(path), "OK")

    def close(self) -> None:
        """Finishes what the engine has and frees the rest."""
        if self.served and self.served.engine:
            self.served.engine.close(self._drain_seconds)
        if self._batcher:
            self._batcher.close()
        self.servable.close()


class ServerState:
    """What is served now; see `http_app.State`.

    Args:
        options: The server's.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.is_stopping = False
        self._options = options
        self._handler: RestHandler | None = None
        self._manager: ModelManager | None = None

    def serve(self, core: ServerCore, manager: ModelManager) -> None:
        """Begins to answer.

        Args:
            core: Answers TensorFlow Serving's requests.
            manager: What is loaded.
        """
        self._manager = manager
        self._handler = RestHandler(core, self._options.rest_api_timeout_in_ms)

    def rest_handler(self) -> RestHandler | None:
        """Answers TensorFlow Serving's requests; None: nothing is loaded yet."""
        return self._handler

    @contextlib.contextmanager
    def find(self, name: str | None) -> Iterator[Served]:
        """Gives the language model of a name, of None the only one; a KeyError if there is none."""
        models = self.language_models()
        if name is None and len(models) == 1:
            (name,) = models
        if name not in models:
            raise KeyError(name)
        with self._manager.use(model_pb2.ModelSpec(name=name)) as loaded:
            yield loaded.served

    def language_models(self) -> dict[str, Served]:
        """Returns all language models by their names."""
        loaded = self._manager.latest() if self._manager else {}
        return {name: each.served for name, each in loaded.items() if each.served}

    def problem(self) -> str | None:
        """Why no request should come now; None: they may."""
        if self.is_stopping:
            return "The server is shutting down."
        return None if self._handler else "The model is being loaded."


class RestServer:
    """Uvicorn in a thread of its own.

    Args:
        app: What answers the requests.
        listener: A listening socket.
        executor: The threads that the application uses.
        drain_seconds: How long running requests may take to finish.
        tls: What connections are encrypted with; None: they are not.
    """

    def __init__(
        self,
        app: Callable,
        listener: socket.socket,
        executor: ThreadPoolExecutor,
        drain_seconds: int,
        tls: RestTls | None = None,
    ) -> None:
        self._executor = executor
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=drain_seconds,
            **(tls.uvicorn_options() if tls else {}),
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


def _start_rest_server(
    state: ServerState,
    options: ServerOptions,
    keys: KeyCheck,
    metrics: Metrics,
    telemetry: Telemetry | None,
) -> RestServer:
    tls, metrics_paths = _rest_tls(options), _metrics_paths(options)
    family, address = next(_resolve("--rest_api_port", options.host, options.rest_api_port))
    try:
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise _port_error("--rest_api_port", options.host, options.rest_api_port, error) from error
    executor = ThreadPoolExecutor(options.rest_api_num_threads, thread_name_prefix="rest")
    http_options = HttpOptions(
        keys=keys,
        max_body_bytes=options.max_body_bytes,
        allows_cors=options.rest_api_enable_cors_support,
        has_access_log=options.access_log,
        metrics_paths=metrics_paths,
    )
    if options.access_log:
        log = logging.getLogger("kerasllm_serving.access")
        log.setLevel(logging.INFO)
        log.addHandler(logging.StreamHandler())
    seconds = options.generation_timeout_in_ms / 1000 or None
    app = HttpApp(state, http_options, executor, metrics, seconds)
    traced = telemetry.traced(app) if telemetry else app
    server = RestServer(traced, listener, executor, options.drain_seconds, tls)
    server.start()
    return server


def _drain(grpc_server: GrpcServer, rest_server: RestServer | None, seconds: int) -> None:
    """Stops accepting requests on both ports and waits for those that run."""
    if rest_server:
        rest_server.ask_to_stop()
    grpc_server.stop(seconds)
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
