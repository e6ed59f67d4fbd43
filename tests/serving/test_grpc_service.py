"""The running server, asked with the public stubs of tensorflow-serving-api."""

import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tensorflow as tf
from kerasllm_serving.grpc_service import _truncate
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    predict_pb2,
)

TIMEOUT = 30


def predict_request(signature="", output_filter=(), version=None, name="test_model", **inputs):
    request = predict_pb2.PredictRequest(output_filter=output_filter)
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return request


@pytest.fixture
def predict(server):
    """Sends a Predict request and returns the response."""

    def send(*args, **kwargs):
        return server.prediction.Predict(predict_request(*args, **kwargs), timeout=TIMEOUT)

    return send


def arrays(response):
    return {name: tf.make_ndarray(proto) for name, proto in response.outputs.items()}


def test_text_in_text_out(predict):
    response = predict(prompt=["Hello", "wörld", ""])
    assert [text.decode() for text in response.outputs["text"].string_val] == [
        "<Hello>",
        "<wörld>",
        "<>",
    ]
    assert response.model_spec.name == "test_model"
    assert response.model_spec.version.value == 7
    assert response.model_spec.signature_name == "serving_default"


def test_several_inputs_and_outputs(predict):
    x = np.float32([[1, 2], [3, 4.5]])
    response = predict("numeric", x=x, n=np.int32([5, 6]))
    np.testing.assert_array_equal(arrays(response)["scaled"], 2 * x)
    np.testing.assert_array_equal(arrays(response)["next"], [6, 7])
    # Typed values, whatever the client sent.
    assert list(response.outputs["scaled"].float_val) == [2, 4, 6, 9]
    assert not response.outputs["scaled"].tensor_content
    assert response.model_spec.signature_name == "numeric"


def test_scalars(predict):
    response = predict("scalar", k=np.int64(2**40))
    assert arrays(response)["double"].shape == ()
    assert response.outputs["double"].int64_val[0] == 2**41


def test_dtypes(predict):
    outputs = arrays(predict("dtypes", x=np.float32([1, 2])))
    np.testing.assert_array_equal(outputs["double"], np.float64([1, 2]) / 3)
    assert outputs["int8"].dtype == np.int8 and outputs["int8"].tolist() == [1, 2]
    assert outputs["uint64"].tolist() == [2**63 + 1, 2**63 + 2]
    assert outputs["bool"].tolist() == [False, True]
    assert outputs["string"].tolist() == [b"1.000000", b"2.000000"]
    np.testing.assert_array_equal(arrays(predict("half", x=np.float16([0.5])))["y"], np.float16([1.5]))


def test_bytes_survive(predict):
    data = [b"\xff\x00\xfe", b"", b"\x00"]
    assert arrays(predict("echo_bytes", data=data))["data_bytes"].tolist() == data
    scalar = arrays(predict("scalar_bytes", data=b"a\x00"))["data_bytes"]
    assert scalar.shape == () and scalar.item() == b"a\x00"


def test_the_shape_of_the_signature_is_not_checked(predict):
    assert arrays(predict("one_row", x=np.float32([1, 2, 3])))["y"].tolist() == [2, 3, 4]


def test_default_of_an_input(predict):
    assert arrays(predict("with_default", prompt=["a"]))["text"].tolist() == [b"a3"]
    response = predict("with_default", prompt=["a"], count=np.int32(9))
    assert arrays(response)["text"].tolist() == [b"a9"]


def test_output_filter_and_version(predict):
    x, n = np.float32([[1, 2]]), np.int32([5])
    assert list(predict("numeric", ["next"], x=x, n=n).outputs) == ["next"]
    assert predict(version=7, prompt=["a"]).model_spec.version.value == 7


def test_an_assertion_in_the_graph_reaches_the_client(predict):
    assert arrays(predict("checked", prompt=["12345"]))["text"].tolist() == [b"12345"]
    with pytest.raises(grpc.RpcError) as caught:
        predict("checked", prompt=["123456"])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("assertion failed: [a prompt must not exceed 5 bytes]")
    for noise in ("Graph execution", "{{node", "File ", "Traceback", "\n"):
        assert noise not in caught.value.details()


def test_deadline(server, predict):
    start = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        server.prediction.Predict(predict_request("slow", seconds=np.float64([60])), timeout=0.5)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - start < 10
    assert arrays(predict("slow", seconds=np.float64([0.01])))["seconds"].tolist() == [0.01]


def test_no_deadline(server):
    response = server.prediction.Predict(predict_request(prompt=["a"]))
    assert arrays(response)["text"].tolist() == [b"<a>"]


def test_model_status(server):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "test_model"
    for version in (None, 7):
        if version:
            request.model_spec.version.value = version
        (status,) = server.models.GetModelStatus(request, timeout=TIMEOUT).model_version_status
        assert status.version == 7
        assert status.state == get_model_status_pb2.ModelVersionStatus.AVAILABLE
        assert status.status.error_code == 0


def test_model_metadata(server, saved_model):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "test_model"
    response = server.prediction.GetModelMetadata(request, timeout=TIMEOUT)
    assert response.model_spec.name == "test_model"
    assert response.model_spec.version.value == 7
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    echo = signatures.signature_def["serving_default"]
    assert echo.inputs["prompt"].dtype == tf.string.as_datatype_enum
    assert echo.method_name == "tensorflow/serving/predict"
    with_default = signatures.signature_def["with_default"]
    assert sorted(with_default.inputs) == ["count", "prompt"] and not with_default.defaults


def test_sixteen_threads_get_their_own_answers(predict):
    def ask(thread):
        for i in range(20):
            prompts = [f"{thread}/{i}/{row}" for row in range(thread % 4 + 1)]
            texts = arrays(predict(prompt=prompts))["text"].tolist()
            assert [text.decode() for text in texts] == [f"<{prompt}>" for prompt in prompts]
        return True

    with ThreadPoolExecutor(16) as executor:
        assert all(executor.map(ask, range(16)))


def test_large_requests_pass(predict):
    prompt = b"x" * 6_000_000  # more than gRPC's own limit of 4 MiB
    with pytest.raises(grpc.RpcError) as caught:
        predict("checked", prompt=[prompt])
    assert "a prompt must not exceed 5 bytes" in caught.value.details()


def test_long_messages_are_cut():
    assert _truncate("a" * 1024) == "a" * 1024
    assert _truncate("é" * 600) == "é" * 512 + "...TRUNCATED"
