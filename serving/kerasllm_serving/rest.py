"""TensorFlow Serving's REST API: predict, classify, regress, model status and model metadata."""

import json
import logging
import re
from urllib.parse import unquote

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

from kerasllm_serving import json_examples, json_tensor
from kerasllm_serving.core import SIGNATURE_DEF_FIELD, ServerCore
from kerasllm_serving.errors import ServingError, invalid_argument

_VERSION_CHOICE = r"(?:/versions/(?P<version>[0-9]+)|/labels/(?P<label>[^/:]+))?"
_VERB_PATH = re.compile(
    rf"/v1/models/(?P<name>[^/:]+){_VERSION_CHOICE}:(?P<verb>classify|regress|predict)",
    re.IGNORECASE,
)
_MODEL_PATH = re.compile(
    rf"/v1/models(?:/(?P<name>[^/:]+))?{_VERSION_CHOICE}(?P<metadata>/metadata)?", re.IGNORECASE
)
_MAX_VERSION = 2**63 - 1

_logger = logging.getLogger(__name__)


class RestHandler:
    """Answers one HTTP request; knows nothing of sockets.

    Args:
        core: What answers the requests.
        timeout_in_ms: Milliseconds after which a model run is cancelled; 0 for no limit.
    """

    def __init__(self, core: ServerCore, timeout_in_ms: int) -> None:
        self._core = core
        self._timeout_in_ms = timeout_in_ms

    def handle(self, method: str, path: str, body: bytes) -> tuple[int, str]:
        """Answers a request below /v1/.

        Args:
            method: HTTP method, upper case.
            path: Path as sent, still percent-encoded, without the query.
            body: Body of the request.

        Returns:
            The HTTP status and the JSON text of the response.
        """
        try:
            return 200, self._dispatch(method, path, body)
        except ServingError as error:
            return error.http_status, _error_json(error.message)
        except Exception:
            _logger.exception("%s %s failed", method, path)
            return 500, _error_json("Internal error; the log of the server tells more")

    def _dispatch(self, method: str, path: str, body: bytes) -> str:
        if method == "POST" and (match := _VERB_PATH.fullmatch(path)):
            spec = _model_spec(match)
            answer = getattr(self, "_" + match["verb"].lower())
            with self._core.observe(spec.name, match["verb"].capitalize(), "REST"):
                return answer(spec, body)
        if method == "GET" and (match := _MODEL_PATH.fullmatch(path)):
            if not match["name"]:
                raise invalid_argument("Missing model name in request.")
            spec = _model_spec(match)
            return self._metadata(spec) if match["metadata"] else self._status(spec)
        raise invalid_argument(f"Malformed request: {method} {path}")

    def _predict(self, spec: model_pb2.ModelSpec, body: bytes) -> str:
        document = json_tensor.parse_object(body)
        spec.signature_name = json_tensor.signature_name(document)
        inputs, optional = self._core.signature_inputs(spec)
        tensors, request_format = json_tensor.tensors_from_json(document, inputs, optional)
        request = predict_pb2.PredictRequest(model_spec=spec, inputs=tensors)
        response = self._core.predict(request, self._timeout_in_ms)
        return json_tensor.json_from_tensors(response.outputs, request_format)

    def _classify(self, spec: model_pb2.ModelSpec, body: bytes) -> str:
        document = json_tensor.parse_object(body)
        spec.signature_name = json_tensor.signature_name(document)
        examples = json_examples.input_from_json(document)
        request = classification_pb2.ClassificationRequest(model_spec=spec, input=examples)
        response = self._core.classify(request, self._timeout_in_ms)
        return json_examples.json_from_classifications(response.result)

    def _regress(self, spec: model_pb2.ModelSpec, body: bytes) -> str:
        document = json_tensor.parse_object(body)
        spec.signature_name = json_tensor.signature_name(document)
        examples = json_examples.input_from_json(document)
        request = regression_pb2.RegressionRequest(model_spec=spec, input=examples)
        response = self._core.regress(request, self._timeout_in_ms)
        return json_examples.json_from_regressions(response.result)

    def _status(self, spec: model_pb2.ModelSpec) -> str:
        request = get_model_status_pb2.GetModelStatusRequest(model_spec=spec)
        return _to_json(_to_dict(self._core.get_model_status(request)))

    def _metadata(self, spec: model_pb2.ModelSpec) -> str:
        request = get_model_metadata_pb2.GetModelMetadataRequest(
            model_spec=spec, metadata_field=[SIGNATURE_DEF_FIELD]
        )
        response = self._core.get_model_metadata(request)
        signature_defs = get_model_metadata_pb2.SignatureDefMap()
        response.metadata[SIGNATURE_DEF_FIELD].Unpack(signature_defs)
        return _to_json(
            {
                "model_spec": _to_dict(response.model_spec),
                "metadata": {SIGNATURE_DEF_FIELD: _to_dict(signature_defs)},
            }
        )


def _model_spec(match: re.Match[str]) -> model_pb2.ModelSpec:
    spec = model_pb2.ModelSpec(name=unquote(match["name"]))
    if match["version"]:
        digits = match["version"].lstrip("0") or "0"
        if len(digits) > len(str(_MAX_VERSION)) or int(digits) > _MAX_VERSION:
            raise invalid_argument(f"Failed to convert version: {match['version']} to numeric.")
        spec.version.value = int(digits)
    elif match["label"]:
        spec.version_label = unquote(match["label"])
    return spec


def _to_dict(message: Message) -> dict:
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _to_json(value: dict) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def _error_json(message: str) -> str:
    return _to_json({"error": message})
