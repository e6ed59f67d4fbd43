"""Generation as a stream over gRPC: one `PredictRequest` in, a `PredictResponse` for each piece of text.

`kerasllm.serving.GenerationService` has one method, `PredictStreamed`. Its messages are those of TensorFlow
Serving's Predict, so a client needs no file but theirs:

    stream = channel.unary_stream(
        "/kerasllm.serving.GenerationService/PredictStreamed",
        request_serializer=predict_pb2.PredictRequest.SerializeToString,
        response_deserializer=predict_pb2.PredictResponse.FromString,
    )

Inputs: `prompt`, strings `[rows]` or one, and what `INPUTS` names, `[rows]` or one for all; `stop`, strings
`[count]` or `[rows, count]`, of which empty ones do not count. What is left out is as the model's
configuration says. Outputs: `row`, int32 `[]`; `text`, a string `[]`; `token_ids`, int32 `[tokens]`;
`logprobs`, float32 `[tokens]`; `finish_reason`, a string `[]`, "stop" or "length" with the last piece of a
row. A client that leaves ends its rows, and so does the deadline of its call.
"""

import dataclasses
import logging
import math
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import predict_pb2

from kerasllm_serving import tensor_proto
from kerasllm_serving.core import ServerCore
from kerasllm_serving.engine import Engine, Piece, RowRequest
from kerasllm_serving.errors import ServingError, invalid_argument, unimplemented
from kerasllm_serving.language_model import LanguageModel

SERVICE, METHOD = "kerasllm.serving.GenerationService", "PredictStreamed"
_MOST_ROWS = 128
_MOST_STOP_STRINGS, _LONGEST_STOP_STRING = 16, 256  # of the exported graph
_INT32 = 2**31 - 1
_NO_DEADLINE_SECONDS = 1e9
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Input:
    """What a request may set: its type, what holds of it, and that in words."""

    kind: type
    holds: Callable[[Any], bool]
    rule: str


INPUTS: Mapping[str, _Input] = {
    "max_new_tokens": _Input(int, lambda v: 1 <= v <= _INT32, "a whole number above 0"),
    "min_new_tokens": _Input(int, lambda v: 0 <= v <= _INT32, "a whole number from 0 on"),
    "temperature": _Input(float, lambda v: v >= 0, "a number from 0 on"),
    "top_k": _Input(int, lambda v: 0 <= v <= _INT32, "a whole number from 0 on"),
    "top_p": _Input(float, lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    "min_p": _Input(float, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "repetition_penalty": _Input(float, lambda v: v > 0, "a number above 0"),
    "presence_penalty": _Input(float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "frequency_penalty": _Input(float, lambda v: -2 <= v <= 2, "a number from -2 to 2"),
    "seed": _Input(int, lambda v: -_INT32 - 1 <= v <= _INT32, "a whole number of 32 bits"),
}


def generation_handler(core: ServerCore, truncate: Callable[[str], str]) -> grpc.GenericRpcHandler:
    """Returns what makes a gRPC server stream generations.

    Args:
        core: What knows the models.
        truncate: Cuts messages to what a status may hold.
    """

    def stream(
        request: predict_pb2.PredictRequest, context: grpc.ServicerContext
    ) -> Iterator[predict_pb2.PredictResponse]:
        try:
            with core.use(request.model_spec) as loaded:
                yield from _stream(loaded, request, context)
        except ServingError as error:
            context.abort(error.code, truncate(error.message))
        except Exception:
            if not context.is_active():
                raise  # The client has left, or this very status is on its way.
            _logger.exception("A stream failed")
            context.abort(grpc.StatusCode.INTERNAL, "Internal error; the log of the server tells more")

    handler = grpc.unary_stream_rpc_method_handler(
        stream,
        predict_pb2.PredictRequest.FromString,
        predict_pb2.PredictResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})


def seconds_left(context: grpc.ServicerContext) -> float | None:
    """Returns what is left until a request's deadline; None: it has none."""
    seconds = context.time_remaining()
    # Without one, gRPC tells of a deadline in billions of years.
    return None if seconds is None or seconds > _NO_DEADLINE_SECONDS else seconds


def _stream(
    loaded: Any, request: predict_pb2.PredictRequest, context: grpc.ServicerContext
) -> Iterator[predict_pb2.PredictResponse]:
    served = loaded.served
    if served is None or served.engine is None:
        raise unimplemented(
            f"Model {request.model_spec.name} must generate in slots: export it with `--slots 8`."
        )
    rows = _read_rows(request, served.model, served.engine)
    remaining = seconds_left(context)
    deadline = None if remaining is None else time.monotonic() + remaining
    pieces: queue.Queue[Piece | ServingError | None] = queue.Queue()
    # The call may end at any time from here on, and then nobody reads any more.
    if not context.add_callback(lambda: pieces.put(None)):
        return
    job = served.engine.submit(rows, pieces.put, deadline)
    try:
        left = len(rows)
        while left:
            piece = pieces.get()
            if piece is None:
                return
            if isinstance(piece, ServingError):
                raise piece
            left -= piece.finish_reason is not None
            yield _response(request.model_spec.name, served.model, piece)
    finally:
        job.cancel()


def _response(name: str, model: LanguageModel, piece: Piece) -> predict_pb2.PredictResponse:
    response = predict_pb2.PredictResponse()
    response.model_spec.name = name
    response.model_spec.version.value = model.servable.version
    for key, value, dtype in (
        ("row", np.int32(piece.row), types_pb2.DT_INT32),
        ("text", np.array(piece.text.encode(), object), types_pb2.DT_STRING),
        ("token_ids", np.array(piece.token_ids, np.int32), types_pb2.DT_INT32),
        ("logprobs", np.array(piece.logprobs, np.float32), types_pb2.DT_FLOAT),
        ("finish_reason", np.array((piece.finish_reason or "").encode(), object), types_pb2.DT_STRING),
    ):
        response.outputs[key].CopyFrom(tensor_proto.from_array(np.asarray(value), dtype))
    return response


def _read_rows(
    request: predict_pb2.PredictRequest, model: LanguageModel, engine: Engine
) -> list[RowRequest]:
    values = {}
    for name, proto in request.inputs.items():
        try:
            values[name] = tensor_proto.to_array(proto)
        except ValueError as error:
            raise invalid_argument(f"tensor parsing error: {name}") from error
    if unknown := sorted(set(values) - {"prompt", "stop", *INPUTS}):
        raise invalid_argument(f"Inputs are prompt, stop, {', '.join(INPUTS)}. Received: {unknown}")
    prompts = _strings("prompt", values.get("prompt", np.zeros(0)))
    if prompts.ndim > 1 or not 1 <= prompts.size <= _MOST_ROWS:
        raise invalid_argument(
            f"`prompt` must be 1 to {_MOST_ROWS} strings. Received: shape {list(prompts.shape)}"
        )
    prompts = prompts.reshape(-1).tolist()
    columns = {name: _column(name, values[name], len(prompts)) for name in INPUTS if name in values}
    stops = _read_stops(values.get("stop"), len(prompts))
    default = model.generation_config
    fixed = {name: default[name] for name in INPUTS if default.get(name) is not None}
    if not default.get("do_sample", True):
        fixed["temperature"] = 0.0
    rows = []
    for number, prompt in enumerate(prompts):
        ids = model.tokenize(prompt)
        settings = fixed | {name: column[number] for name, column in columns.items()}
        room = max(engine.model.length - len(ids), 1)
        if "max_new_tokens" not in columns:
            settings["max_new_tokens"] = min(settings.get("max_new_tokens", room), room)
        rows.append(RowRequest(token_ids=ids, stop=stops[number], **settings))
    return rows


def _column(name: str, array: np.ndarray, rows: int) -> list:
    """A setting's values, one for each row."""
    wanted = INPUTS[name]
    kinds = "iu" if wanted.kind is int else "iuf"
    if array.dtype.kind not in kinds or array.ndim > 1 or array.size not in (1, rows):
        raise invalid_argument(
            f"`{name}` must be {wanted.rule}, or {rows} of them. "
            f"Received: {array.dtype} {list(array.shape)}"
        )
    values = [wanted.kind(value) for value in np.broadcast_to(array.reshape(-1), [rows]).tolist()]
    for value in values:
        if not (math.isfinite(value) and wanted.holds(value)):
            raise invalid_argument(f"`{name}` must be {wanted.rule}. Received: {value}")
    return values


def _read_stops(array: np.ndarray | None, rows: int) -> list[list[str]]:
    if array is None:
        return [[]] * rows
    array = _strings("stop", array)
    if array.ndim > 2 or (array.ndim == 2 and len(array) != rows):
        raise invalid_argument(f"`stop` must be [count] or [{rows}, count]. Received: {list(array.shape)}")
    array = array.reshape(-1, array.shape[-1]) if array.ndim == 2 else np.array([array.reshape(-1)] * rows)
    found = [[text for text in row if text] for row in array.tolist()]
    for row in found:
        if len(row) > _MOST_STOP_STRINGS or any(len(t.encode()) > _LONGEST_STOP_STRING for t in row):
            raise invalid_argument(
                f"`stop` must be up to {_MOST_STOP_STRINGS} strings of up to {_LONGEST_STOP_STRING} bytes."
            )
    return found


def _strings(name: str, array: np.ndarray) -> np.ndarray:
    """An array of bytes as one of texts."""
    try:
        texts = [value.decode() for value in array.reshape(-1).tolist()]
    except (AttributeError, UnicodeDecodeError) as error:
        raise invalid_argument(f"`{name}` must be strings in UTF-8.") from error
    return np.array(texts, object).reshape(array.shape)
