"""Reads the files of TensorFlow Serving in protobuf's text format.

The package of its protos leaves these messages out; they are described here, with its names and numbers, so
that protobuf's own parser reads them.
"""

from collections.abc import Mapping
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format, wrappers_pb2
from google.protobuf.message import Message

from kerasllm_serving.errors import StartupError

_PACKAGE = "kerasllm_serving.config"
_INT64, _BOOL, _STRING = "Int64Value", "BoolValue", "StringValue"  # a message each, which may be missing
_MESSAGES: Mapping[str, list[tuple[str, int, str]]] = {
    # servables/tensorflow/session_bundle_config.proto
    "BatchingParameters": [
        ("max_batch_size", 1, _INT64),
        ("batch_timeout_micros", 2, _INT64),
        ("max_enqueued_batches", 3, _INT64),
        ("num_batch_threads", 4, _INT64),
        ("thread_pool_name", 5, _STRING),
        ("allowed_batch_sizes", 6, "int64[]"),
        ("pad_variable_length_inputs", 7, "bool"),
        ("enable_large_batch_splitting", 8, _BOOL),
        ("max_execution_batch_size", 9, _INT64),
    ],
    # config/ssl_config.proto
    "SSLConfig": [
        ("server_key", 1, "string"),
        ("server_cert", 2, "string"),
        ("custom_ca", 3, "string"),
        ("client_verify", 4, "bool"),
    ],
    # config/monitoring_config.proto
    "PrometheusConfig": [("enable", 1, "bool"), ("path", 2, "string")],
    "MonitoringConfig": [("prometheus_config", 1, "PrometheusConfig")],
}


def _make_classes() -> dict[str, type[Message]]:
    field_types = descriptor_pb2.FieldDescriptorProto
    scalars = {
        "int64": field_types.TYPE_INT64,
        "bool": field_types.TYPE_BOOL,
        "string": field_types.TYPE_STRING,
    }
    file = descriptor_pb2.FileDescriptorProto(
        name="kerasllm_serving/config.proto",
        package=_PACKAGE,
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            added = message.field.add(name=field, number=number, label=field_types.LABEL_OPTIONAL)
            if kind.endswith("[]"):
                added.label = field_types.LABEL_REPEATED
            kind = kind.removesuffix("[]")
            if kind in scalars:
                added.type = scalars[kind]
            else:
                package = _PACKAGE if kind in _MESSAGES else "google.protobuf"
                added.type, added.type_name = field_types.TYPE_MESSAGE, f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _MESSAGES
    }


_classes = _make_classes()


def read_config(path: Path, name: str, flag: str) -> Message:
    """Reads a file.

    Args:
        path: The file.
        name: `BatchingParameters`, `SSLConfig` or `MonitoringConfig`.
        flag: The flag that named the file, for the message.

    Returns:
        The message; its fields are those of TensorFlow Serving's.

    Raises:
        StartupError: If it is no such file.
    """
    return parse_text(path, _classes[name](), flag)


def parse_text(path: Path, message: Message, flag: str) -> Message:
    """Reads a file into a message; otherwise as `read_config`."""
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), message)
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise StartupError(
            f"`{flag}` must be a {message.DESCRIPTOR.name} in text format. Received: {path}: {error}"
        ) from error
