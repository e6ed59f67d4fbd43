"""What no client should send: it is refused, nothing breaks, and the next request is answered."""

import http.client
import json
import socket
import threading

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow_serving.apis import predict_pb2

TIMEOUT = 60
MODEL = "/v1/models/test_model"


@pytest.fixture(autouse=True)
def still_answers(server):
    """After each test the server runs, and has logged no error of its own."""
    before = server.log.read_text().count("Traceback")
    yield
    assert post(server, f"{MODEL}:predict", '{"instances": ["a"]}') == (200, {"predictions": ["<a>"]})
    assert server.process.poll() is None
    assert server.log.read_text().count("Traceback") == before


def post(server, path, body, headers=None, method="POST"):
    """Sends a path as it is, which urllib would mend."""
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=TIMEOUT)
    try:
        connection.putrequest(method, path, skip_host=True)
        data = body.encode() if isinstance(body, str) else body
        connection.putheader("Host", "a")
        connection.putheader("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        connection.send(data)
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text else None
    finally:
        connection.close()


def predict(server, signature, **tensors):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "test_model", signature
    for name, tensor in tensors.items():
        request.inputs[name].CopyFrom(tensor)
    return server.prediction.Predict(request, timeout=TIMEOUT)


def test_bytes_that_are_no_message(server):
    for method in (
        "PredictionService/Predict",
        "PredictionService/Classify",
        "PredictionService/MultiInference",
        "ModelService/HandleReloadConfigRequest",
    ):
        call = server.channel.unary_unary(f"/tensorflow.serving.{method}")
        for body in (b"\xff" * 100, b"\x0a\x7f", b"\x00", np.random.default_rng(0).bytes(10_000)):
            with pytest.raises(grpc.RpcError) as caught:
                call(body, timeout=TIMEOUT)
            # As gRPC's own servers answer.
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert "deserializing" in caught.value.details()


def shaped(dtype, *sizes, **fields):
    tensor = tensor_pb2.TensorProto(dtype=dtype, **fields)
    for size in sizes:
        tensor.tensor_shape.dim.add(size=size)
    return tensor


@pytest.mark.parametrize(
    "tensor",
    [
        shaped(types_pb2.DT_FLOAT, 2**40, float_val=[1.0]),
        shaped(types_pb2.DT_FLOAT, 2**30, float_val=[1.0]),
        shaped(types_pb2.DT_FLOAT, 2**62, 2**62, float_val=[1.0]),
        shaped(types_pb2.DT_FLOAT, 2**62, 2**62, 0, float_val=[1.0]),
        shaped(types_pb2.DT_FLOAT, -5, float_val=[1.0]),
        shaped(types_pb2.DT_FLOAT, *([1] * 300), float_val=[1.0]),
        shaped(types_pb2.DT_FLOAT, 2, tensor_content=b"1234567"),
        shaped(types_pb2.DT_STRING, 2, tensor_content=b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
        *(shaped(dtype, 1) for dtype in (types_pb2.DT_INVALID, 20, 21, 101, 999)),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{len(tensor.tensor_shape.dim)}-{tensor.ByteSize()}",
)
def test_tensors_that_are_none(server, tensor):
    signature, name = ("echo_bytes", "data") if tensor.dtype == types_pb2.DT_STRING else ("float32", "x")
    with pytest.raises(grpc.RpcError) as caught:
        predict(server, signature, **{name: tensor})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_values_too_few_and_too_many(server):
    """As TensorFlow's runtime takes them."""
    for values, taken in (([], [0, 0]), ([1], [1, 1]), ([1, 2, 3], [1, 2])):
        tensor = shaped(types_pb2.DT_FLOAT, 2, float_val=values)
        assert list(predict(server, "float32", x=tensor).outputs["x"].float_val) == taken


def test_shapes_that_the_graph_does_not_take(server):
    for sizes in ((), (1, 1), (0,), (3, 0)):
        x = tf.make_tensor_proto(np.zeros(sizes, np.float32))
        n = tf.make_tensor_proto(np.zeros([1], np.int32))
        try:
            predict(server, "numeric", x=x, n=n)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_numbers_that_are_none_over_grpc(server):
    x = tf.make_tensor_proto(np.float32([np.nan, np.inf, -np.inf]))
    found = list(predict(server, "float32", x=x).outputs["x"].float_val)
    assert np.isnan(found[0]) and found[1:] == [np.inf, -np.inf]


BOMBS = {
    "arrays": '{"instances": ' + "[" * 500_000,
    "objects": '{"instances": ' + '{"a":' * 500_000,
    "closed": '{"instances": ' + "[" * 500_000 + "]" * 500_000 + "}",
    "examples": '{"examples": ' + "[" * 500_000 + "]" * 500_000 + "}",
    "feature": '{"examples": [{"x": ' + "[" * 500_000 + "]" * 500_000 + "}]}",
    "context": '{"context": ' + '{"a":' * 500_000 + "1" + "}" * 500_001,
    "digits": '{"instances": [' + "9" * 100_000 + "]}",
    "exponent": '{"signature_name": "scalar", "inputs": 1e999999999}',
    "signature": '{"signature_name": "' + "s" * 1_000_000 + '", "instances": ["a"]}',
    "half a pair": '{"signature_name": "\\ud800", "instances": ["a"]}',
    "no UTF-8": b'{"instances": ["\xff"]}',
    "zeros": b"\x00" * 1000,
    "UTF-16": '{"instances": ["a"]}'.encode("utf-16"),
    "b64": '{"signature_name": "echo_bytes", "instances": [{"b64": "' + "=" * 10_000 + '"}]}',
    "ragged": '{"signature_name": "float32", "inputs": [[1], 2]}',
    "null": '{"inputs": null}',
    "keys": json.dumps({"inputs": {f"k{i}": 1 for i in range(10_000)}}),
}


@pytest.mark.parametrize("verb", ["predict", "classify", "regress"])
@pytest.mark.parametrize("name", BOMBS)
def test_json_bombs(server, verb, name):
    status, answer = post(server, f"{MODEL}:{verb}", BOMBS[name])
    assert 400 <= status < 500 and list(answer) == ["error"]
    assert len(answer["error"]) < len(BOMBS[name]) + 10_000


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/..%2f..%2fetc%2fpasswd:predict",
        "/v1/models/../../etc/passwd:predict",
        "/v1/models/%00:predict",
        "/v1/models/%ff%fe:predict",
        "/v1/models/%ed%a0%80:predict",
        "/v1/models/%:predict",
        "/v1/models//test_model:predict",
        "/v1/models/test_model%3Apredict",
        "/v1/models/test_model%0d%0aX-A:predict",
        "/v1/models/test_model/versions/-1:predict",
        "/v1/models/test_model/versions/0x7:predict",
        "/v1/models/test_model/versions/" + "9" * 10_000 + ":predict",
        "/v1/models/test_model/labels/%00:predict",
        "/v1/models/" + "a" * 30_000 + ":predict",
        "/v1/models/test_model:predict/../../x",
        "/v1/models/test_model:PREDICT%20",
    ],
    ids=lambda path: path[:40],
)
def test_path_tricks(server, path):
    status, answer = post(server, path, '{"instances": ["a"]}')
    assert 400 <= status < 500 and list(answer) == ["error"]


def raw(server, data):
    """Sends bytes; returns what comes back until the server closes or says nothing more."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.rest_port), timeout=5) as connection:
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                received += part
        except (TimeoutError, ConnectionError):
            pass
    return received


@pytest.mark.parametrize(
    "data",
    [
        b"GET /v1/models/test_model HTTP/1.1\r\nHost: a\r\n"
        + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 100) for i in range(20_000))
        + b"\r\n",
        b"GET /v1/models/test_model HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 2_000_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 2_000_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00" + b"\x00" * 100,  # the beginning of TLS
        b"POST /v1/models/test_model:predict HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/models/test_model:predict HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n"
        b"Content-Length: 10\r\n\r\n",
        b"POST /v1/models/test_model:predict HTTP/1.1\r\nHost: a\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
    ids=["headers", "header", "path", "tls", "length", "lengths", "chunks"],
)
def test_floods_and_broken_requests(server, data):
    answer = raw(server, data)
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:100]


def test_whoever_goes_while_sending(server):
    """A body that never comes holds up nobody."""
    head = b"POST /v1/models/test_model:predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"
    connections = [socket.create_connection(("127.0.0.1", server.rest_port)) for _ in range(50)]
    for connection in connections:
        connection.sendall(head)
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(post(server, f"{MODEL}:predict", '{"instances": ["a"]}')[0])
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for connection in connections:
        connection.close()
    assert answers == [200] * 4


def mutate(data, random):
    """Changes, cuts, doubles or inserts some of the bytes of a valid request."""
    data = bytearray(data)
    for _ in range(random.integers(1, 4)):
        begin = random.integers(len(data) + 1)
        end = begin + random.integers(8)
        new = [random.bytes(end - begin), b"", data[begin:end] * 2, random.bytes(3)]
        data[begin:end] = new[random.integers(len(new))]
    return bytes(data)


def test_mutants_of_protobufs(server):
    """Whatever comes is answered, refused with a reason of its own, or no message at all."""
    random = np.random.default_rng(0)
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "test_model", "numeric"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.ones([2, 2], np.float32)))
    request.inputs["n"].CopyFrom(tf.make_tensor_proto(np.int32([5, 6])))
    valid, codes = request.SerializeToString(), {}
    for method in ("Predict", "Classify", "Regress", "MultiInference", "GetModelMetadata"):
        call = server.channel.unary_unary(f"/tensorflow.serving.PredictionService/{method}")
        for _ in range(1000):
            # Mostly one byte: where lengths of fields change, little of it is a message.
            mutant = bytearray(valid)
            mutant[random.integers(len(valid))] = random.integers(256)
            if random.random() < 0.2:
                mutant = mutate(valid, random)
            try:
                call(bytes(mutant), timeout=TIMEOUT)
            except grpc.RpcError as error:
                codes[error.code()] = codes.get(error.code(), 0) + 1
                is_message = "deserializing" not in error.details()
                assert not (
                    is_message and error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
                )
    # Many are messages, of which some name another model.
    assert min(codes[grpc.StatusCode.INVALID_ARGUMENT], codes[grpc.StatusCode.NOT_FOUND]) > 10


def test_mutants_of_json(server):
    random = np.random.default_rng(0)
    bodies = {
        "predict": b'{"signature_name": "numeric", "instances": [{"x": [1.5, 2], "n": 5}]}',
        "classify": b'{"signature_name": "classify", "examples": [{"x": 0.5, "name": {"b64": "YQ=="}}]}',
        "regress": b'{"signature_name": "regress", "context": {"x": 1}, "examples": [{"x": 0.5}]}',
    }
    found = set()
    for verb, body in bodies.items():
        for _ in range(200):
            status, answer = post(server, f"{MODEL}:{verb}", mutate(body, random))
            found.add(status)
            assert status < 500 and (status == 200 or list(answer) == ["error"])
    assert {200, 400} <= found
