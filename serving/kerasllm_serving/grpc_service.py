"""The gRPC services PredictionService and ModelService, as tensorflow_serving.apis has them, and more."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import TypeVar

import grpc
from google.protobuf.message import Message
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from kerasllm_serving.api_keys import KeyCheck, TooManyRequests
from kerasllm_serving.core import ServerCore
from kerasllm_serving.errors import ServingError, StartupError
from kerasllm_serving.generation_service import generation_handler, seconds_left
from kerasllm_serving.health import SERVICE, health_handler

_MAX_STATUS_BYTES = 1024
_UNLIMITED = -1
_logger = logging.getLogger(__name__)

_Response = TypeVar("_Response", bound=Message)


@dataclasses.dataclass(frozen=True)
class GrpcOptions:
    """How gRPC requests are let in.

    Args:
        max_threads: How many requests are worked on at once; the others wait.
        keys: Who may ask, by the metadata `authorization: Bearer KEY`, and how much.
        socket_path: A Unix socket to listen at as well.
        credentials: What connections are encrypted with; None: they are not.
        channel_arguments: Settings of gRPC's core.
        has_health_check: Whether gRPC's own service for health checks answers.
        sends_tensor_content: Whether answers hold the bytes of tensors instead of typed values.
        interceptors: What sees each request before all else.
    """

    max_threads: int
    keys: KeyCheck = dataclasses.field(default_factory=KeyCheck)
    socket_path: str | None = None
    credentials: grpc.ServerCredentials | None = None
    channel_arguments: Mapping[str, int | str] = dataclasses.field(default_factory=dict)
    has_health_check: bool = False
    sends_tensor_content: bool = False
    interceptors: tuple[grpc.ServerInterceptor, ...] = ()


class GrpcServer:
    """A gRPC server that listens at an address.

    Args:
        core: What answers the requests.
        address: `host:port`; port 0 takes a free one.
        options: How requests are let in.

    Raises:
        StartupError: If the address cannot be bound.
    """

    def __init__(self, core: ServerCore, address: str, options: GrpcOptions) -> None:
        settings = {
            # Without this, two servers on one port would share its requests between them.
            "grpc.so_reuseport": 0,
            "grpc.max_receive_message_length": _UNLIMITED,
            "grpc.max_send_message_length": _UNLIMITED,
        } | options.channel_arguments
        admission = [_Admission(options.keys)] if options.keys.has_rules else []
        self._server = grpc.server(
            futures.ThreadPoolExecutor(options.max_threads, thread_name_prefix="grpc"),
            interceptors=[*options.interceptors, *admission],
            options=list(settings.items()),
        )
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            PredictionService(core, options.sends_tensor_content), self._server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(core), self._server)
        self._server.add_generic_rpc_handlers([generation_handler(core, _truncate), _no_profiler()])
        if options.has_health_check:
            self._server.add_generic_rpc_handlers([health_handler()])
        self.port = self._listen("--port", address, options.credentials)
        if options.socket_path:
            self._listen("--grpc_socket_path", f"unix:{options.socket_path}", options.credentials)

    def _listen(self, flag: str, address: str, credentials: grpc.ServerCredentials | None) -> int:
        try:
            if credentials:
                return self._server.add_secure_port(address, credentials)
            return self._server.add_insecure_port(address)
        except RuntimeError as error:
            rule = "free" if flag == "--port" else "a path where a socket can be made"
            raise StartupError(f"`{flag}` must be {rule}. Received: {address}: {error}") from error

    def start(self) -> None:
        """Begins to answer."""
        self._server.start()

    def stop(self, seconds: float | None) -> None:
        """Refuses new requests; returns once those that run have finished, or their time is over.

        Args:
            seconds: How long they may take; None: they are cancelled at once.
        """
        self._server.stop(seconds).wait()


def _no_profiler() -> grpc.GenericRpcHandler:
    """Says what the clients of TensorFlow's profiler would not understand otherwise."""

    def refuse(request: bytes, context: grpc.ServicerContext) -> None:
        context.abort(
            grpc.StatusCode.UNIMPLEMENTED,
            "kerasllm_serving has no profiler; profile the SavedModel with tf.profiler",
        )

    handler = grpc.unary_unary_rpc_method_handler(refuse)
    return grpc.method_handlers_generic_handler(
        "tensorflow.ProfilerService", dict.fromkeys(("Profile", "Monitor", "Terminate"), handler)
    )


class _Admission(grpc.ServerInterceptor):
    """Answers UNAUTHENTICATED where no API key comes, RESOURCE_EXHAUSTED where it asks for too much."""

    def __init__(self, keys: KeyCheck) -> None:
        self._keys = keys

        def refuse(request: bytes, context: grpc.ServicerContext) -> None:
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                "A valid API key must come as metadata `authorization: Bearer KEY`.",
            )

        self._refusal = grpc.unary_unary_rpc_method_handler(refuse)

    def intercept_service(self, continuation, details):
        handler = continuation(details)
        if details.method.startswith(f"/{SERVICE}/"):
            return handler  # as /health over HTTP
        key = self._keys.find(dict(details.invocation_metadata).get("authorization", "").encode())
        if key is None:
            return self._refusal
        if handler is None:
            return None
        name = "unary_stream" if handler.response_streaming else "unary_unary"
        guard = self._guard_stream if handler.response_streaming else self._guard
        return handler._replace(**{name: functools.partial(guard, key, getattr(handler, name))})

    def _guard(self, key: bytes, answer: Callable, request: Message, context: grpc.ServicerContext):
        with self._answering(key, context):
            return answer(request, context)

    def _guard_stream(self, key: bytes, answer: Callable, request: Message, context: grpc.ServicerContext):
        with self._answering(key, context):
            yield from answer(request, context)

    @contextlib.contextmanager
    def _answering(self, key: bytes, context: grpc.ServicerContext) -> Iterator[None]:
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self._keys.answering(key))
            except TooManyRequests as error:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
            yield


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """All its calls; each is ended with the deadline of its request.

    Args:
        core: What answers the requests.
        sends_tensor_content: See `GrpcOptions`.
    """

    def __init__(self, core: ServerCore, sends_tensor_content: bool = False) -> None:
        self._core = core
        self._predict = functools.partial(core.predict, as_tensor_content=sends_tensor_content)

    def Predict(
        self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext
    ) -> predict_pb2.PredictResponse:
        """Runs a signature."""
        return self._run(self._predict, "Predict", request.model_spec.name, request, context)

    def Classify(
        self, request: classification_pb2.ClassificationRequest, context: grpc.ServicerContext
    ) -> classification_pb2.ClassificationResponse:
        """Classifies tf.Examples."""
        return self._run(self._core.classify, "Classify", request.model_spec.name, request, context)

    def Regress(
        self, request: regression_pb2.RegressionRequest, context: grpc.ServicerContext
    ) -> regression_pb2.RegressionResponse:
        """Gives numbers to tf.Examples."""
        return self._run(self._core.regress, "Regress", request.model_spec.name, request, context)

    def MultiInference(
        self, request: inference_pb2.MultiInferenceRequest, context: grpc.ServicerContext
    ) -> inference_pb2.MultiInferenceResponse:
        """Classifies tf.Examples and gives numbers to them in one run."""
        name = request.tasks[0].model_spec.name if request.tasks else ""
        return self._run(self._core.multi_inference, "MultiInference", name, request, context)

    def GetModelMetadata(
        self,
        request: get_model_metadata_pb2.GetModelMetadataRequest,
        context: grpc.ServicerContext,
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Describes the signatures of the model."""
        return _answer(context, lambda: self._core.get_model_metadata(request))

    def _run(
        self,
        answer: Callable[[Message, int], _Response],
        api: str,
        model_name: str,
        request: Message,
        context: grpc.ServicerContext,
    ) -> _Response:
        def handle() -> _Response:
            with self._core.observe(model_name, api, "GRPC"):
                return answer(request, _timeout_in_ms(context))

        return _answer(context, handle)


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus and HandleReloadConfigRequest.

    Args:
        core: What answers the requests.
    """

    def __init__(self, core: ServerCore) -> None:
        self._core = core

    def GetModelStatus(
        self, request: get_model_status_pb2.GetModelStatusRequest, context: grpc.ServicerContext
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """Tells the states of versions."""
        return _answer(context, lambda: self._core.get_model_status(request))

    def HandleReloadConfigRequest(
        self, request: model_management_pb2.ReloadConfigRequest, context: grpc.ServicerContext
    ) -> model_management_pb2.ReloadConfigResponse:
        """Serves exactly the models of a configuration."""
        return _answer(context, lambda: self._core.reload_config(request))


def _answer(context: grpc.ServicerContext, handle: Callable[[], _Response]) -> _Response:
    try:
        return handle()
    except ServingError as error:
        context.abort(error.code, _truncate(error.message))
    except Exception:
        _logger.exception("A request failed")
        context.abort(grpc.StatusCode.INTERNAL, "Internal error; the log of the server tells more")


def _timeout_in_ms(context: grpc.ServicerContext) -> int:
    """Returns what is left of the request's deadline, 0 if it has none."""
    remaining = seconds_left(context)
    if remaining is None:
        return 0
    if remaining <= 0:  # it waited in the queue for too long
        raise ServingError(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")
    # 0 would mean no limit.
    return max(1, int(remaining * 1000))


def _truncate(message: str) -> str:
    """Cuts a status message to what fits into the headers of a response."""
    encoded = message.encode()
    if len(encoded) <= _MAX_STATUS_BYTES:
        return message
    return encoded[:_MAX_STATUS_BYTES].decode("utf-8", "ignore") + "...TRUNCATED"
