"""Between the JSON of the REST calls classify and regress and tf.Examples.

`{"context": {...}, "examples": [{"feature": value or list}]}` is answered by `{"results": [...]}`. A
feature holds strings (or `{"b64": "..."}`), whole numbers and booleans, or numbers with a fraction.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorflow.core.example import example_pb2, feature_pb2
from tensorflow_serving.apis import classification_pb2, input_pb2, regression_pb2

from kerasllm_serving.errors import ServingError, invalid_argument
from kerasllm_serving.json_tensor import (
    decode_base64,
    encode_text,
    float_token,
    is_base64,
    json_type,
    quote,
    text_token,
)

_MOST_INT64, _MOST_UINT64 = 2**63 - 1, 2**64 - 1
_KINDS = {"bytes_list": "bytes", "float_list": "float", "int64_list": "int64"}


def input_from_json(document: Mapping[str, Any]) -> input_pb2.Input:
    """Reads the examples of a request.

    Args:
        document: The parsed request.

    Returns:
        The examples, with the context that they share if the request has one.

    Raises:
        ServingError: If they are none.
    """
    read = input_pb2.Input()
    examples = read.example_list
    if "context" in document:
        examples = read.example_list_with_context
        _fill_example(document["context"], examples.context)
    if "examples" not in document:
        raise invalid_argument(
            f"JSON Value: {quote(document)} When method is classify, key 'examples' is expected and was "
            "not found"
        )
    if not isinstance(document["examples"], list):
        raise invalid_argument(
            f"JSON Value: {quote(document)} Expecting 'examples' value to be an list/array"
        )
    if not document["examples"]:
        raise invalid_argument(f"JSON Value: {quote(document)} 'examples' value is an empty array")
    for value in document["examples"]:
        _fill_example(value, examples.examples.add())
    return read


def json_from_classifications(result: classification_pb2.ClassificationResult) -> str:
    """Writes for each example a list of pairs of label and score.

    Args:
        result: The classes of the examples.

    Returns:
        The JSON text.
    """
    rows = []
    for classifications in result.classifications:
        pairs = [
            f"[{text_token(each.label.encode())}, {float_token(each.score, np.float32)}]"
            for each in classifications.classes
        ]
        rows.append("[" + ", ".join(pairs) + "]")
    return _results(rows)


def json_from_regressions(result: regression_pb2.RegressionResult) -> str:
    """Writes a number for each example.

    Args:
        result: The numbers.

    Returns:
        The JSON text.
    """
    return _results([float_token(each.value, np.float32) for each in result.regressions])


def _results(tokens: list[str]) -> str:
    return '{"results": [' + ", ".join(tokens) + "]}"


def _fill_example(value: Any, example: example_pb2.Example) -> None:
    if not isinstance(value, dict):
        raise invalid_argument(f"Example must be JSON object but got JSON {json_type(value)}")
    example.SetInParent()
    for name, content in value.items():
        encode_text(name)
        feature = example.features.feature[name]
        for element in content if isinstance(content, list) else [content]:
            _add(element, name, feature)


def _add(value: Any, name: str, feature: feature_pb2.Feature) -> None:
    """Appends a value; the first one of a feature decides its kind."""
    if value is None or isinstance(value, list) or (isinstance(value, dict) and not is_base64(value)):
        raise invalid_argument(f"Feature: {name} has element with unexpected JSON type: {json_type(value)}")
    if isinstance(value, dict | str):
        kind = "bytes_list"
    elif isinstance(value, float) or not -_MOST_INT64 - 1 <= value <= _MOST_UINT64:
        kind = "float_list"
    else:
        kind = "int64_list"
    found = feature.WhichOneof("kind")
    if found not in (None, kind):
        raise _kind_error(name, found)
    if isinstance(value, dict):
        feature.bytes_list.value.append(decode_base64(value))
    elif isinstance(value, str):
        feature.bytes_list.value.append(encode_text(value))
    elif kind == "float_list":
        with np.errstate(over="ignore"):  # beyond the range is infinity
            feature.float_list.value.append(np.float32(value))
    elif value > _MOST_INT64:
        raise invalid_argument(f"Feature: {name} has uint64 element. Only int64 is supported.")
    else:
        feature.int64_list.value.append(int(value))


def _kind_error(name: str, kind: str) -> ServingError:
    return invalid_argument(f"Unexpected element type in feature: {name} expecting type: {_KINDS[kind]}")
