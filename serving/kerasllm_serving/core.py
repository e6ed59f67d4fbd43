"""What the server answers, on the messages of tensorflow_serving.apis; both transports call it."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message
from tensorflow.core.framework import tensor_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

from kerasllm_serving import tensor_proto
from kerasllm_serving.errors import ServingError, invalid_argument, unimplemented
from kerasllm_serving.inference import (
    Run,
    count_examples,
    run_classify,
    run_multi_inference,
    run_regress,
)
from kerasllm_serving.manager import Loaded, ModelManager, models_of
from kerasllm_serving.metrics import Metrics, ServingMetrics
from kerasllm_serving.model import DEFAULT_SIGNATURE, Servable

SIGNATURE_DEF_FIELD = "signature_def"


_Response = TypeVar("_Response", bound=Message)


class ServerCore:
    """Answers the calls of PredictionService and ModelService for the loaded models.

    Args:
        manager: What is loaded.
        metrics: Where the numbers of requests go.
    """

    def __init__(self, manager: ModelManager, metrics: Metrics | None = None) -> None:
        self._manager = manager
        self._metrics = ServingMetrics(metrics or Metrics())

    @contextlib.contextmanager
    def observe(self, model_name: str, api: str, entrypoint: str) -> Iterator[None]:
        """Counts a request and how long it takes.

        Args:
            model_name: The model it asks for.
            api: `Predict`, `Classify`, `Regress` or `MultiInference`.
            entrypoint: `GRPC` or `REST`.
        """
        # Names that clients make up are without number.
        name = model_name if self._manager.has(model_name) else ""
        with self._metrics.observe(name, api, entrypoint):
            yield

    def use(self, model_spec: model_pb2.ModelSpec) -> contextlib.AbstractContextManager[Loaded]:
        """Gives the version that a request asks for; see `ModelManager.use`."""
        return self._manager.use(model_spec)

    def predict(
        self,
        request: predict_pb2.PredictRequest,
        timeout_in_ms: int = 0,
        as_tensor_content: bool = False,
    ) -> predict_pb2.PredictResponse:
        """Runs one signature.

        Args:
            request: The model, the signature, the inputs and, optionally, which outputs.
            timeout_in_ms: Milliseconds after which the run is cancelled; 0 for no limit.
            as_tensor_content: Whether the answer holds the bytes of tensors instead of typed values.

        Returns:
            The outputs, and the name, version and signature that made them.

        Raises:
            ServingError: With TensorFlow Serving's code and message.
        """
        _require_model_spec(request)
        answer = functools.partial(run_predict, as_tensor_content=as_tensor_content)
        return self._run(answer, "Predict", request.model_spec, request, timeout_in_ms)

    def classify(
        self, request: classification_pb2.ClassificationRequest, timeout_in_ms: int = 0
    ) -> classification_pb2.ClassificationResponse:
        """Classifies tf.Examples; as `predict`."""
        _require_model_spec(request)
        return self._run(run_classify, "Classify", request.model_spec, request, timeout_in_ms)

    def regress(
        self, request: regression_pb2.RegressionRequest, timeout_in_ms: int = 0
    ) -> regression_pb2.RegressionResponse:
        """Gives numbers to tf.Examples; as `predict`."""
        _require_model_spec(request)
        return self._run(run_regress, "Regress", request.model_spec, request, timeout_in_ms)

    def multi_inference(
        self, request: inference_pb2.MultiInferenceRequest, timeout_in_ms: int = 0
    ) -> inference_pb2.MultiInferenceResponse:
        """Classifies tf.Examples and gives numbers to them in one run; as `predict`."""
        # The first task says which version is asked.
        spec = request.tasks[0].model_spec if request.tasks else model_pb2.ModelSpec()
        return self._run(run_multi_inference, "MultiInference", spec, request, timeout_in_ms)

    def _run(
        self,
        answer: Callable[..., _Response],
        api: str,
        spec: model_pb2.ModelSpec,
        request: Message,
        timeout_in_ms: int,
    ) -> _Response:
        with self._manager.use(spec) as loaded:
            run = functools.partial(loaded.run, timeout_in_ms=timeout_in_ms)
            response = answer(loaded.servable, request, self._metrics.timed(run, spec.name, api))
        if api != "Predict":
            self._metrics.count_examples(spec.name, count_examples(request.input))
        return response

    def signature_inputs(
        self, model_spec: model_pb2.ModelSpec
    ) -> tuple[Mapping[str, meta_graph_pb2.TensorInfo], Collection[str]]:
        """Tells the REST API which inputs a signature takes.

        Args:
            model_spec: The model, the version and the signature.

        Returns:
            The inputs by name, and the names of those that have a default value.

        Raises:
            ServingError: With TensorFlow Serving's code and message.
        """
        with self._manager.use(model_spec) as loaded:
            servable = loaded.servable
        signature_name = model_spec.signature_name or DEFAULT_SIGNATURE
        if signature_name not in servable.signatures:
            raise invalid_argument(f'Serving signature name: "{signature_name}" not found in signature def')
        signature = servable.signatures[signature_name]
        if not signature.inputs:
            raise invalid_argument(
                f"Failed to get input map for signature: {model_spec.signature_name or 'DEFAULT'}"
            )
        return signature.inputs, signature.defaults.keys()

    def get_model_metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        """Describes the signatures.

        Args:
            request: The model and the metadata fields, of which there is one: `signature_def`.

        Returns:
            The signatures, packed as TensorFlow Serving packs them, without default values.

        Raises:
            ServingError: With TensorFlow Serving's code and message.
        """
        _require_model_spec(request)
        if not request.metadata_field:
            raise invalid_argument("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != SIGNATURE_DEF_FIELD:
                raise invalid_argument(f"Metadata field {field} is not supported")
        with self._manager.use(request.model_spec) as loaded:
            servable = loaded.servable

        signature_defs = get_model_metadata_pb2.SignatureDefMap()
        for name, signature in servable.signatures.items():
            signature_defs.signature_def[name].CopyFrom(signature)
            signature_defs.signature_def[name].ClearField("defaults")
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = request.model_spec.name
        response.model_spec.version.value = servable.version
        response.metadata[SIGNATURE_DEF_FIELD].Pack(signature_defs)
        return response

    def get_model_status(
        self, request: get_model_status_pb2.GetModelStatusRequest
    ) -> get_model_status_pb2.GetModelStatusResponse:
        """Tells the states of versions.

        Args:
            request: The model and, optionally, the version; a label is ignored.

        Returns:
            The statuses, the newest version first.

        Raises:
            ServingError: With TensorFlow Serving's code and message.
        """
        _require_model_spec(request)
        statuses = self._manager.statuses(request.model_spec)
        return get_model_status_pb2.GetModelStatusResponse(model_version_status=statuses)

    def reload_config(
        self, request: model_management_pb2.ReloadConfigRequest
    ) -> model_management_pb2.ReloadConfigResponse:
        """Serves exactly the models of a configuration.

        Args:
            request: The configuration.

        Returns:
            OK.

        Raises:
            ServingError: With TensorFlow Serving's code and message.
        """
        self._manager.reload(models_of(request.config))
        # An explicit OK, as upstream.
        return model_management_pb2.ReloadConfigResponse(status={"error_code": 0})


def run_predict(
    servable: Servable, request: predict_pb2.PredictRequest, run: Run, as_tensor_content: bool = False
) -> predict_pb2.PredictResponse:
    """Runs one signature.

    Args:
        servable: The loaded version.
        request: The model, the signature, the inputs and, optionally, which outputs.
        run: Runs its graph.
        as_tensor_content: See `ServerCore.predict`.

    Returns:
        The outputs, and the name, version and signature that made them.

    Raises:
        ServingError: With TensorFlow Serving's code and message.
    """
    signature_name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    if signature_name not in servable.signatures:
        raise ServingError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f'Serving signature key "{signature_name}" not found.',
        )
    signature = servable.signatures[signature_name]
    feeds = _feeds(signature, request.inputs)
    aliases = _output_aliases(signature, request.output_filter)
    fetches = [_tensor_name(alias, signature.outputs[alias]) for alias in aliases]
    arrays = run(feeds, fetches)

    response = predict_pb2.PredictResponse()
    response.model_spec.name = request.model_spec.name
    response.model_spec.version.value = servable.version
    response.model_spec.signature_name = signature_name
    for alias, array in zip(aliases, arrays, strict=True):
        try:
            proto = tensor_proto.from_array(array, signature.outputs[alias].dtype, as_tensor_content)
        except ValueError as error:
            raise unimplemented(f"Output {alias} cannot be sent: {error}") from error
        response.outputs[alias].CopyFrom(proto)
    return response


def _require_model_spec(
    request: predict_pb2.PredictRequest
    | classification_pb2.ClassificationRequest
    | regression_pb2.RegressionRequest
    | get_model_metadata_pb2.GetModelMetadataRequest
    | get_model_status_pb2.GetModelStatusRequest,
) -> None:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")


def _tensor_name(alias: str, info: meta_graph_pb2.TensorInfo) -> str:
    """Returns the name of a dense tensor; an initialisation op or a sparse tensor has none."""
    if not info.name or not info.dtype:
        raise invalid_argument(f"Signature inputs and outputs must be dense tensors. Received: {alias}")
    return info.name


def _feeds(
    signature: meta_graph_pb2.SignatureDef, inputs: Mapping[str, tensor_pb2.TensorProto]
) -> dict[str, np.ndarray]:
    """Checks the inputs of a request against the signature and decodes them, by tensor name."""
    sent, known = set(inputs), set(signature.inputs)
    if len(sent) > len(known) or (len(sent) < len(known) and not signature.defaults):
        raise invalid_argument(
            f"input size does not match signature: {len(sent)}!={len(known)} "
            f"len({_names(sent)}) != len({_names(known)}). Sent extra: {_names(sent - known)}. "
            f"Missing but required: {_names(known - sent)}."
        )
    missing = known - sent - set(signature.defaults)
    if missing:
        alias = min(missing)
        raise invalid_argument(
            f"Signature input alias: {alias}(feed name: {signature.inputs[alias].name}) not found "
            "in request and no default value provided. Inputs expected to be in the request "
            f"{_names(sent)}, or default input alias set: {','.join(sorted(signature.defaults))}"
        )
    if sent - known:
        raise invalid_argument(
            "Inputs contains invalid name. Used request inputs: "
            f"{','.join(sorted(sent & known))}, request input: {','.join(sorted(sent))}"
        )

    protos = {alias: inputs[alias] if alias in sent else signature.defaults[alias] for alias in known}
    # The runtime numbers the arguments of a run by the sorted names of the fed tensors.
    ordered = sorted(known, key=lambda alias: signature.inputs[alias].name)
    feeds = {}
    for index, alias in enumerate(ordered):
        name = _tensor_name(alias, signature.inputs[alias])
        try:
            feeds[name] = tensor_proto.to_array(protos[alias])
        except ValueError as error:
            raise invalid_argument(f"tensor parsing error: {alias}") from error
        expected, received = signature.inputs[alias].dtype, protos[alias].dtype
        if received != expected:
            raise invalid_argument(
                f"Expects arg[{index}] to be {tensor_proto.dtype_name(expected)} but "
                f"{tensor_proto.dtype_name(received)} is provided"
            )
    return feeds


def _output_aliases(signature: meta_graph_pb2.SignatureDef, output_filter: Collection[str]) -> list[str]:
    """Returns the outputs that a request asks for, all of them by default."""
    seen = set()
    for alias in output_filter:
        if alias not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {alias} Outputs expected to be in "
                f"the set {_names(signature.outputs)}."
            )
        if alias in seen:
            raise invalid_argument(f"duplicate output tensor alias: {alias}")
        seen.add(alias)
    return list(output_filter) or sorted(signature.outputs)


def _names(names: Collection[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"
