"""Keys and what they may ask for, alone and through the running server."""

import json
import threading
import urllib.error
import urllib.request

import grpc
import pytest
import tensorflow as tf
from kerasllm_serving.api_keys import KeyCheck, TooManyRequests
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

PER_MINUTE = 6


def test_requests_come_back_evenly():
    now = [0.0]
    keys = KeyCheck(["a", "b"], requests_per_minute=PER_MINUTE, clock=lambda: now[0])
    first, second = (keys.find(f"Bearer {key}".encode()) for key in "ab")
    assert first != second and keys.find(b"Bearer c") is None

    def count(key):
        answered = 0
        while True:
            try:
                with keys.answering(key):
                    answered += 1
            except TooManyRequests as error:
                return answered, error.seconds

    assert count(first) == (PER_MINUTE, pytest.approx(10.0))
    now[0] = 25.0  # two and a half requests later
    assert count(first) == (2, pytest.approx(5.0))
    assert count(second)[0] == PER_MINUTE  # a key has a minute of its own
    now[0] = 10_000.0
    assert count(first)[0] == PER_MINUTE  # what was not used is lost


def test_requests_at_once():
    keys = KeyCheck(concurrent_requests=2)
    key = keys.find(b"")
    with keys.answering(key):
        with pytest.raises(ZeroDivisionError), keys.answering(key):
            with pytest.raises(TooManyRequests, match="2 requests at once"), keys.answering(key):
                pass
            raise ZeroDivisionError
        with keys.answering(key):  # one that failed has ended
            pass


def test_no_limits():
    keys = KeyCheck()
    for _ in range(1000):
        with keys.answering(keys.find(b"")):
            pass


@pytest.fixture(scope="module")
def limited(start_server, tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("one\ntwo\nthree\n")
    return start_server(
        "--model_name=test_model",
        f"--api_keys_file={file}",
        f"--max_requests_per_minute_per_key={PER_MINUTE}",
        "--max_concurrent_requests_per_key=2",
    )


def ask(server, path, key, body=None):
    request = urllib.request.Request(server.url + path, body and json.dumps(body).encode())
    request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.headers


def test_limits_over_rest_and_grpc(limited):
    body, path = {"instances": ["a"]}, "/v1/models/test_model:predict"
    answers = [ask(limited, path, "one", body) for _ in range(PER_MINUTE + 1)]
    assert [status for status, _ in answers] == [200] * PER_MINUTE + [429]
    assert 1 <= int(answers[-1][1]["Retry-After"]) <= 60 / PER_MINUTE
    # What tells of the server only is not counted; nor do other keys wait.
    assert ask(limited, "/metrics", "one")[0] == ask(limited, "/health", "one")[0] == 200
    assert ask(limited, path, "two", body)[0] == 200
    assert ask(limited, path, "none", body)[0] == 401

    request = predict_pb2.PredictRequest()
    request.model_spec.name = "test_model"
    request.inputs["prompt"].CopyFrom(tf.make_tensor_proto(["a"]))
    with grpc.insecure_channel(f"127.0.0.1:{limited.grpc_port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def predict(key):
            try:
                stub.Predict(request, 60, metadata=[("authorization", f"Bearer {key}")])
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        assert predict("one") == grpc.StatusCode.RESOURCE_EXHAUSTED  # one count for both protocols
        assert predict("none") == grpc.StatusCode.UNAUTHENTICATED
        found = []
        threads = [threading.Thread(target=lambda: found.append(predict("three"))) for _ in range(9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    refused = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert set(found) == {grpc.StatusCode.OK, refused} and found.count(refused) >= 9 - PER_MINUTE
