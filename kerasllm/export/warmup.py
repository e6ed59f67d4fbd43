"""The requests that TensorFlow Serving answers to itself before a model is there for clients.

The file holds `tensorflow.serving.PredictionLog` messages. Their few fields are described here, for the
package that has them is a server's and not needed for anything else. A message inside of a message is on
the wire what bytes are, so those of TensorFlow itself are written as such.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np
import tensorflow as tf
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorflow.core.framework import tensor_pb2

from kerasllm.export.signatures import CLASSIFY

FILE_NAME = "tf_serving_warmup_requests"
# TensorFlow Serving refuses to load a model with more.
MAX_RECORDS = 1000

_PACKAGE = "kerasllm.warmup"
# Fields of messages: name, number, type; of tensorflow_serving/apis/ prediction_log, predict,
# classification, input and model.proto.
_MESSAGES = {
    "ModelSpec": [("name", 1, "string"), ("signature_name", 3, "string")],
    "NamedTensor": [("key", 1, "string"), ("value", 2, "bytes")],  # an entry of the map of inputs
    "PredictRequest": [("model_spec", 1, "ModelSpec"), ("inputs", 2, "NamedTensor[]")],
    "PredictLog": [("request", 1, "PredictRequest")],
    "ExampleList": [("examples", 1, "bytes[]")],
    "Input": [("example_list", 1, "ExampleList")],
    "ClassificationRequest": [("model_spec", 1, "ModelSpec"), ("input", 2, "Input")],
    "ClassifyLog": [("request", 1, "ClassificationRequest")],
    "PredictionLog": [("classify_log", 2, "ClassifyLog"), ("predict_log", 6, "PredictLog")],
}


def _make_class():
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, kind in fields:
            field = described.field.add(name=name, number=number)
            field.label = types.LABEL_REPEATED if kind.endswith("[]") else types.LABEL_OPTIONAL
            kind = kind.removesuffix("[]")
            if kind in _MESSAGES:
                field.type, field.type_name = types.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                field.type = {"string": types.TYPE_STRING, "bytes": types.TYPE_BYTES}[kind]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.PredictionLog"))


_PredictionLog = _make_class()


def make_record(signature_name: str, method: str, inputs: Mapping[str, np.ndarray]) -> bytes:
    """Makes one record.

    Args:
        signature_name: The signature.
        method: Its method; for that of the Classify call the only input is serialized tf.Examples.
        inputs: Arrays by the inputs' names, strings as bytes.

    Returns:
        A serialized `PredictionLog`.
    """
    log = _PredictionLog()
    if method == CLASSIFY:
        request = log.classify_log.request
        (examples,) = inputs.values()
        request.input.example_list.examples.extend(examples.tolist())
    else:
        request = log.predict_log.request
        for name, value in sorted(inputs.items()):
            request.inputs.add(key=name, value=tf.make_tensor_proto(value).SerializeToString())
    request.model_spec.signature_name = signature_name
    return log.SerializeToString(deterministic=True)


def write_warmup(file: str | os.PathLike, records: Iterable[bytes]) -> int:
    """Writes the file.

    Args:
        file: The file, `FILE_NAME` in `assets.extra/`.
        records: As `make_record` makes them.

    Returns:
        Number of records.

    Raises:
        ValueError: If there are more than TensorFlow Serving takes.
    """
    records = list(records)
    if len(records) > MAX_RECORDS:
        raise ValueError(f"There must be at most {MAX_RECORDS} records. Received: {len(records)}")
    with tf.io.TFRecordWriter(str(file)) as writer:
        for record in records:
            writer.write(record)
    return len(records)


def read_warmup(file: str | os.PathLike) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Reads the file.

    Args:
        file: The file.

    Returns:
        Of each record the signature's name and the arrays by the inputs' names.

    Raises:
        ValueError: If something else stands there.
    """
    requests = []
    for number, record in enumerate(_records(pathlib.Path(file))):
        log = _PredictionLog.FromString(record)
        if log.HasField("classify_log"):
            request = log.classify_log.request
            examples = np.empty(len(request.input.example_list.examples), object)
            examples[:] = list(request.input.example_list.examples)
            inputs = {"inputs": examples}
        elif log.HasField("predict_log"):
            request = log.predict_log.request
            tensors = {entry.key: entry.value for entry in request.inputs}
            inputs = {name: _to_array(value) for name, value in tensors.items()}
        else:
            raise ValueError(f"A record must be of a Predict or Classify call. Received: record {number}")
        requests.append((request.model_spec.signature_name, inputs))
    return requests


def _records(file: pathlib.Path) -> list[bytes]:
    return [record.numpy() for record in tf.data.TFRecordDataset([str(file)])]


def _to_array(serialized: bytes) -> np.ndarray:
    return tf.make_ndarray(tensor_pb2.TensorProto.FromString(serialized))
