"""Between the JSON of TensorFlow Serving's REST API and `TensorProto`.

Row format: `{"instances": [...]}` is answered by `{"predictions": [...]}`, one entry per row of the
batch. Columnar format: `{"inputs": ...}` is answered by `{"outputs": ...}`, whole tensors. A
signature with one input or output takes or gives the bare value, one with several takes or gives
objects keyed by name.

NaN, Infinity and -Infinity are read and written as bare tokens. Bytes travel as
`{"b64": "<base64>"}`: in for any string input, out for string outputs whose name ends in `_bytes`.
"""

import base64
import binascii
import enum
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from kerasllm_serving import tensor_proto
from kerasllm_serving.errors import ServingError, invalid_argument, unimplemented

_BYTES_SUFFIX = "_bytes"
_MAX_QUOTED_CHARACTERS = 1024

_INTEGER_DTYPES = {
    types_pb2.DT_INT8: np.int8,
    types_pb2.DT_INT16: np.int16,
    types_pb2.DT_INT32: np.int32,
    types_pb2.DT_INT64: np.int64,
    types_pb2.DT_UINT8: np.uint8,
    types_pb2.DT_UINT16: np.uint16,
    types_pb2.DT_UINT32: np.uint32,
    types_pb2.DT_UINT64: np.uint64,
}
_FLOAT_DTYPES = {types_pb2.DT_FLOAT: np.float32, types_pb2.DT_DOUBLE: np.float64}


class RequestFormat(enum.Enum):
    """How a request lays out its tensors; the response answers in kind."""

    ROW = "row"
    COLUMNAR = "columnar"


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses the body of a request; what follows the object is ignored.

    Args:
        body: UTF-8 text that starts with a JSON object.

    Returns:
        The object.

    Raises:
        ServingError: If the body is empty, no UTF-8, no JSON, nested too deeply or no object.
    """
    try:
        text = body.decode("utf-8-sig").lstrip()
        if not text:
            raise invalid_argument("JSON Parse error: The document is empty")
        document, _ = json.JSONDecoder().raw_decode(text)
    except UnicodeDecodeError as error:
        raise invalid_argument(
            "JSON Parse error: Invalid encoding in string. The body must be UTF-8; send other "
            f'bytes as {{"b64": "..."}}. Received: byte {error.start} is no UTF-8'
        ) from error
    except json.JSONDecodeError as error:
        raise invalid_argument(
            f"JSON Parse error: Invalid value. {error.msg} at offset: {error.pos}"
        ) from error
    except RecursionError as error:
        raise invalid_argument("JSON Parse error: The document is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise invalid_argument(f"JSON Parse error: {error}") from error
    if not isinstance(document, dict):
        raise invalid_argument(f"JSON Value: {quote(document)} Is not object")
    return document


def signature_name(document: Mapping[str, Any]) -> str:
    """Returns the `signature_name` of a request, empty if it has none.

    Args:
        document: The parsed request.

    Returns:
        The name.

    Raises:
        ServingError: If it is no string.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid_argument(
            f"JSON Value: {quote(document)} not formatted correctly. 'signature_name' key must "
            "be a string value."
        )
    encode_text(name)  # refuses what is no text
    return name


def tensors_from_json(
    document: Mapping[str, Any],
    inputs: Mapping[str, meta_graph_pb2.TensorInfo],
    optional: Collection[str] = (),
) -> tuple[dict[str, tensor_pb2.TensorProto], RequestFormat]:
    """Reads the tensors of a predict request.

    Args:
        document: The parsed request.
        inputs: The signature's inputs by name, at least one.
        optional: Names of the inputs that may be left out.

    Returns:
        The tensors by input name, and the format of the request.

    Raises:
        ServingError: If the request does not fit the signature.
    """
    if "instances" in document and "inputs" in document:
        raise invalid_argument(
            f"JSON Value: {quote(document)} Not formatted correctly expecting only one of "
            "'inputs' or 'instances' keys to exist "
        )
    if "instances" in document:
        instances = document["instances"]
        if not isinstance(instances, list):
            raise invalid_argument(
                f"JSON Value: {quote(document)} Excepting 'instances' to be an list/array"
            )
        if not instances:
            raise invalid_argument(f"JSON Value: {quote(document)} No values in 'instances' array")
        return _tensors_from_rows(instances, inputs, optional), RequestFormat.ROW
    if "inputs" in document:
        tensors = _tensors_from_columns(document["inputs"], inputs, optional)
        return tensors, RequestFormat.COLUMNAR
    raise invalid_argument("Missing 'inputs' or 'instances' key")


def json_from_tensors(outputs: Mapping[str, tensor_pb2.TensorProto], request_format: RequestFormat) -> str:
    """Writes the response to a predict request.

    Text that is not UTF-8 is written with U+FFFD in place of the broken bytes, so that the response
    stays valid JSON; an output whose name ends in `_bytes` carries them exactly.

    Args:
        outputs: Tensors by output name, with typed values.
        request_format: The format of the request.

    Returns:
        The JSON text.

    Raises:
        ServingError: If JSON cannot carry the outputs in this format.
    """
    if not outputs:
        raise invalid_argument("Cannot convert empty tensor map to JSON")
    names = sorted(outputs)
    shapes = {name: [dim.size for dim in outputs[name].tensor_shape.dim] for name in names}
    if request_format is RequestFormat.COLUMNAR:
        columns = {name: _nest(_tokens(name, outputs[name]), shapes[name]) for name in names}
        return _json_object({"outputs": _bare_or_object(columns)})

    batch_size = None
    for name in names:
        if not shapes[name]:
            raise invalid_argument(f"Tensor name: {name} has no shape information ")
        if batch_size not in (None, shapes[name][0]):
            raise invalid_argument(
                f"Tensor name: {name} has inconsistent batch size: {shapes[name][0]} "
                f"expecting: {batch_size}"
            )
        batch_size = shapes[name][0]
    tokens = {name: _tokens(name, outputs[name]) for name in names}
    rows = []
    for index in range(batch_size):
        row = {}
        for name in names:
            row_shape = shapes[name][1:]
            size = math.prod(row_shape)
            row[name] = _nest(tokens[name][index * size : (index + 1) * size], row_shape)
        rows.append(_bare_or_object(row))
    return _json_object({"predictions": "[" + ", ".join(rows) + "]"})


def _tensors_from_rows(
    instances: Sequence[Any],
    inputs: Mapping[str, meta_graph_pb2.TensorInfo],
    optional: Collection[str],
) -> dict[str, tensor_pb2.TensorProto]:
    """Stacks the instances: every one gives a value of the same shape for the same inputs."""
    if not isinstance(instances[0], dict) and len(inputs) > 1:
        raise invalid_argument(
            "instances is a plain list, but expecting list of objects as multiple input tensors "
            "required as per tensorinfo_map"
        )
    are_objects = _is_named(instances[0])
    only_name = min(inputs)
    expected_keys = sorted(set(inputs) - (set(optional) - _keys(instances[0])))
    shapes: dict[str, list[int]] = {}
    values: dict[str, list[Any]] = {}
    for index, instance in enumerate(instances):
        if _is_named(instance) != are_objects:
            wanted, got = ("object", "list") if are_objects else ("value/list", "object")
            raise invalid_argument(f"Expecting {wanted} but got {got} at item {index} of input list")
        items = instance if are_objects else {only_name: instance}
        for name, item in items.items():
            try:
                _add_row(name, item, inputs, shapes, values)
            except ServingError as error:
                key = f" key: {name}" if are_objects else ""
                raise invalid_argument(
                    f"Failed to process element: {index}{key} of 'instances' list. "
                    f"Error: {error.code.name}: {error.message}"
                ) from error
        if are_objects and sorted(instance) != expected_keys:
            raise invalid_argument(
                f"Failed to process element: {index} of 'instances' list. JSON object: "
                f"{quote(instance)} keys must be equal to: {','.join(expected_keys)}"
            )
    return {
        name: _make_tensor(inputs[name].dtype, [len(instances), *shapes[name]], values[name])
        for name in shapes
    }


def _add_row(
    name: str,
    item: Any,
    inputs: Mapping[str, meta_graph_pb2.TensorInfo],
    shapes: dict[str, list[int]],
    values: dict[str, list[Any]],
) -> None:
    """Appends one instance's value of one input to `values`; the first one sets the shape."""
    if name not in inputs:
        raise invalid_argument(f"JSON object: does not have named input: {name}")
    shape, row = _flatten(item, inputs[name].dtype)
    expected = shapes.setdefault(name, shape)
    if math.prod(shape) != math.prod(expected):
        raise invalid_argument(f"Expecting tensor size: {math.prod(expected)} but got: {math.prod(shape)}")
    if shape != expected:
        raise invalid_argument(f"Expecting shape {_shape_text(expected)} but got: {_shape_text(shape)}")
    values.setdefault(name, []).extend(row)


def _tensors_from_columns(
    columns: Any,
    inputs: Mapping[str, meta_graph_pb2.TensorInfo],
    optional: Collection[str],
) -> dict[str, tensor_pb2.TensorProto]:
    """Reads whole tensors: a bare value for the only input, or an object by name."""
    if not _is_named(columns):
        if len(inputs) > 1:
            raise invalid_argument(
                "inputs is a plain value/list, but expecting an object as multiple input tensors "
                "required as per tensorinfo_map"
            )
        columns = {min(inputs): columns}
    unknown = _keys(columns) - set(inputs)
    if unknown:
        raise invalid_argument(f"JSON object: does not have named input: {min(unknown)}")
    tensors = {}
    for name in sorted(inputs):
        if name in columns:
            dtype = inputs[name].dtype
            tensors[name] = _make_tensor(dtype, *_flatten(columns[name], dtype))
        elif name not in optional:
            raise invalid_argument(f"Missing named input: {name} in 'inputs' object.")
    return tensors


def _flatten(value: Any, dtype: int) -> tuple[list[int], list[Any]]:
    """Returns the shape of nested lists and their values in row-major order."""
    shape = []
    first = value
    while isinstance(first, list):
        shape.append(len(first))
        if not first:
            break
        first = first[0]
    values: list[Any] = []
    _collect(value, 0, shape, _converter(dtype), values)
    return shape, values


def _collect(
    value: Any, level: int, shape: list[int], convert: Callable[[Any], Any], values: list[Any]
) -> None:
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid_argument(
                f"JSON Value: {quote(value)} found at incorrect level: {level + 1} in the JSON "
                f"DOM. Expected at level: {len(shape)}"
            )
        values.append(convert(value))
        return
    if level >= len(shape):
        raise invalid_argument(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise invalid_argument(
            f"Encountered list at unexpected size: {len(value)} at level: {level} "
            f"expected size: {shape[level]}"
        )
    for item in value:
        _collect(item, level + 1, shape, convert, values)


def _converter(dtype: int) -> Callable[[Any], Any]:
    """Returns the function that turns a JSON value into a value of this dtype, or refuses it."""
    if dtype in _INTEGER_DTYPES:
        limits = np.iinfo(_INTEGER_DTYPES[dtype])
        smallest, largest = int(limits.min), int(limits.max)

        def convert(value: Any) -> int:
            if type(value) is not int or not smallest <= value <= largest:
                raise _type_error(value, dtype)
            return value

    elif dtype in _FLOAT_DTYPES:

        def convert(value: Any) -> float:
            if type(value) not in (int, float):
                raise _type_error(value, dtype)
            return _to_float(value)

    elif dtype == types_pb2.DT_BOOL:

        def convert(value: Any) -> bool:
            if not isinstance(value, bool):
                raise _type_error(value, dtype)
            return value

    elif dtype == types_pb2.DT_STRING:

        def convert(value: Any) -> bytes:
            if isinstance(value, dict):
                return decode_base64(value)
            if not isinstance(value, str):
                raise _type_error(value, dtype)
            return encode_text(value)

    else:

        def convert(value: Any) -> None:
            raise unimplemented(
                f"Conversion of JSON Value: {quote(value)} to type: {tensor_proto.dtype_name(dtype)}"
            )

    return convert


def _to_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of a double
        return math.inf if value > 0 else -math.inf


def encode_text(value: str) -> bytes:
    """Returns the UTF-8 of a JSON string, which may hold half a surrogate pair."""
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise invalid_argument("JSON Parse error: The surrogate pair in string is invalid.") from error


def decode_base64(value: Mapping[str, Any]) -> bytes:
    """Returns the bytes of `{"b64": "..."}`."""
    if not is_base64(value):
        raise invalid_argument(f"JSON Value: {quote(value)} not formatted correctly for base64 data")
    text = "".join(value["b64"].split())
    try:
        # Padding is optional.
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid_argument("Unable to base64 decode") from error


def is_base64(value: Any) -> bool:
    """Tells whether a JSON value is `{"b64": "..."}`."""
    return isinstance(value, dict) and list(value) == ["b64"] and isinstance(value["b64"], str)


def _is_named(value: Any) -> bool:
    """Tells an object keyed by input name from a value, which may be a base64 object."""
    return isinstance(value, dict) and not is_base64(value)


def _keys(value: Any) -> set[str]:
    return set(value) if _is_named(value) else set()


def _make_tensor(dtype: int, shape: Sequence[int], values: list[Any]) -> tensor_pb2.TensorProto:
    proto = tensor_pb2.TensorProto(dtype=dtype)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    if dtype in _FLOAT_DTYPES:
        with np.errstate(over="ignore"):  # beyond the range of the dtype is infinity
            values = np.array(values, _FLOAT_DTYPES[dtype]).tolist()
    if values:
        getattr(proto, tensor_proto.VALUE_FIELDS[dtype]).extend(values)
    return proto


def _tokens(name: str, proto: tensor_pb2.TensorProto) -> list[str]:
    """Writes every value of a tensor as a JSON token, in row-major order."""
    values = getattr(proto, tensor_proto.VALUE_FIELDS.get(proto.dtype, "int_val"))
    if proto.dtype in _FLOAT_DTYPES:
        return [float_token(value, _FLOAT_DTYPES[proto.dtype]) for value in values]
    if proto.dtype in _INTEGER_DTYPES:
        return [str(value) for value in values]
    if proto.dtype == types_pb2.DT_BOOL:
        return ["true" if value else "false" for value in values]
    if proto.dtype == types_pb2.DT_STRING:
        if name.endswith(_BYTES_SUFFIX):
            return [json.dumps({"b64": base64.b64encode(value).decode()}) for value in values]
        return [text_token(value) for value in values]
    raise invalid_argument(
        f"Failed to write JSON value for tensor type: {tensor_proto.dtype_name(proto.dtype)}"
    )


def float_token(value: float, dtype: type[np.floating]) -> str:
    """Writes a float with six significant digits if they identify it, else with all it needs."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    text = f"{value:g}"
    with np.errstate(over="ignore"):
        if dtype(text) != dtype(value):
            text = f"{value:.{9 if dtype is np.float32 else 17}g}"
    # A whole number keeps a sign that it is a float.
    return text if "." in text or "e" in text else text + ".0"


def text_token(value: bytes) -> str:
    """Writes text as a JSON token, with U+FFFD in place of what is no UTF-8."""
    return json.dumps(value.decode("utf-8", "replace"), ensure_ascii=False)


def _nest(tokens: Sequence[str], shape: Sequence[int]) -> str:
    """Puts row-major tokens into the nested lists of a shape."""
    if not shape:
        return tokens[0]
    if len(shape) == 1:
        return "[" + ", ".join(tokens) + "]"
    size = math.prod(shape[1:])
    rows = [_nest(tokens[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]
    return "[" + ", ".join(rows) + "]"


def _bare_or_object(tokens: Mapping[str, str]) -> str:
    """Writes the value of the only output bare, several as an object by name."""
    return next(iter(tokens.values())) if len(tokens) == 1 else _json_object(tokens)


def _json_object(tokens: Mapping[str, str]) -> str:
    return "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in tokens.items()) + "}"


def _type_error(value: Any, dtype: int) -> ServingError:
    return invalid_argument(
        f"JSON Value: {quote(value)} Type: {json_type(value)} is not of expected type: "
        f"{tensor_proto.dtype_name(dtype)}"
    )


def json_type(value: Any) -> str:
    """Names the type of a JSON value as TensorFlow Serving does."""
    if value is None:
        return "Null"
    if isinstance(value, bool):
        return str(value)
    names = {dict: "Object", list: "Array", str: "String", int: "Number", float: "Number"}
    return names[type(value)]


def quote(value: Any) -> str:
    """Writes a received value for an error message, cut where it gets long."""
    text = json.dumps(value, indent=4, ensure_ascii=False)
    if len(text) > _MAX_QUOTED_CHARACTERS:
        return text[:_MAX_QUOTED_CHARACTERS] + "...TRUNCATED"
    return text


def _shape_text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
