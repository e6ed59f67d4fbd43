"""The running server, asked over HTTP."""

import base64
import http.client
import json
import math
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

MODEL = "/v1/models/test_model"
TIMEOUT = 30


@pytest.fixture
def ask(server):
    """Sends a request; returns the HTTP status and the body."""

    def send(path, body=None, method=None):
        if isinstance(body, dict):
            body = json.dumps(body)
        if isinstance(body, str):
            body = body.encode()
        request = urllib.request.Request(server.url + path, data=body, method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                assert response.headers["Content-Type"] == "application/json"
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    return send


@pytest.fixture
def predict(ask):
    """Sends a predict request and returns the parsed response."""

    def send(body, path=MODEL):
        status, text = ask(f"{path}:predict", body)
        assert status == 200, text
        return json.loads(text)

    return send


def test_text_in_text_out(predict):
    assert predict({"instances": ["Hello", "wörld"]}) == {"predictions": ["<Hello>", "<wörld>"]}
    assert predict({"inputs": ["Hello"]}) == {"outputs": ["<Hello>"]}
    assert predict({"inputs": {"prompt": ["Hello"]}}) == {"outputs": ["<Hello>"]}


def test_several_inputs_and_outputs(predict):
    rows = [{"x": [1, 2.5], "n": 3}, {"x": [0, -1], "n": 4}]
    assert predict({"signature_name": "numeric", "instances": rows}) == {
        "predictions": [{"next": 4, "scaled": [2.0, 5.0]}, {"next": 5, "scaled": [0.0, -2.0]}]
    }
    columns = {"x": [[1, 2.5], [0, -1]], "n": [3, 4]}
    assert predict({"signature_name": "numeric", "inputs": columns}) == {
        "outputs": {"next": [4, 5], "scaled": [[2.0, 5.0], [0.0, -2.0]]}
    }


def test_dtypes(predict):
    assert predict({"signature_name": "dtypes", "instances": [1, 2]}) == {
        "predictions": [
            {
                "double": x / 3,
                "int8": x,
                "uint64": 2**63 + x,
                "bool": x > 1,
                "string": f"{x}.000000",
            }
            for x in (1, 2)
        ]
    }


def test_numbers_that_are_none(ask):
    body = '{"signature_name": "float32", "instances": [NaN, Infinity, -Infinity, 1e39, 3]}'
    status, text = ask(f"{MODEL}:predict", body)
    assert (status, text) == (200, b'{"predictions": [NaN, Infinity, -Infinity, Infinity, 3.0]}')
    assert math.isnan(json.loads(text)["predictions"][0])


def test_scalars(predict, ask):
    body = {"signature_name": "scalar", "inputs": 21}
    assert predict(body) == {"outputs": 42}
    status, text = ask(f"{MODEL}:predict", {"signature_name": "scalar", "instances": [{"k": 1}]})
    assert status == 200 and json.loads(text) == {"predictions": [2]}


def test_bytes(predict):
    data = [{"b64": base64.b64encode(value).decode()} for value in (b"\xff\x00", b"")]
    body = {"signature_name": "echo_bytes", "instances": data}
    assert predict(body) == {"predictions": data}
    assert predict({"instances": [{"b64": "aGk="}]}) == {"predictions": ["<hi>"]}


def test_default_of_an_input(predict):
    body = {"signature_name": "with_default", "inputs": {"prompt": ["a"]}}
    assert predict(body) == {"outputs": ["a3"]}
    body["inputs"]["count"] = 5
    assert predict(body) == {"outputs": ["a5"]}


def test_paths(predict, ask):
    for path in (f"{MODEL}/versions/7", "/V1/Models/test_model", "/v1/models/test%5Fmodel"):
        assert predict({"instances": ["a"]}, path) == {"predictions": ["<a>"]}
    status, _ = ask(f"{MODEL}:predict?key=value", {"instances": ["a"]})
    assert status == 200


def test_other_models_and_other_paths(ask):
    status, text = ask("/v1/models/m:predict", {"instances": ["a"]})
    assert status == 404
    assert json.loads(text) == {"error": "Servable not found for request: Latest(m)"}
    status, text = ask("/v1/models/m")
    assert status == 404
    assert json.loads(text) == {"error": "Could not find any versions of model m"}
    # TensorFlow Serving has an error there, and OpenAI's API a list of the language models.
    status, text = ask("/v1/models")
    assert status == 200 and json.loads(text) == {"object": "list", "data": []}
    for path in ("/v1", "/v2/models/test_model", "/models"):
        assert ask(path) == (404, b"")
    for method in ("PUT", "DELETE", "OPTIONS"):
        status, text = ask(f"{MODEL}:predict", method=method)
        assert status == 400
        assert json.loads(text) == {"error": f"Malformed request: {method} {MODEL}:predict"}


def test_status(ask):
    expected = {
        "model_version_status": [
            {
                "version": "7",
                "state": "AVAILABLE",
                "status": {"error_code": "OK", "error_message": ""},
            }
        ]
    }
    for path in (MODEL, f"{MODEL}/versions/7", f"{MODEL}/labels/ignored"):
        status, text = ask(path)
        assert (status, json.loads(text)) == (200, expected)


def test_metadata(ask):
    status, text = ask(f"{MODEL}/metadata")
    assert status == 200
    metadata = json.loads(text)
    assert metadata["model_spec"] == {
        "name": "test_model",
        "signature_name": "",
        "version": "7",
    }
    signatures = metadata["metadata"]["signature_def"]["signature_def"]
    shape = {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}
    serving_default = signatures["serving_default"]
    (output,) = serving_default.pop("outputs").values()
    assert (output["dtype"], output["tensor_shape"]) == ("DT_STRING", shape)
    assert serving_default == {
        "inputs": {
            "prompt": {
                "dtype": "DT_STRING",
                "tensor_shape": shape,
                "name": "serving_default_prompt:0",
            }
        },
        "method_name": "tensorflow/serving/predict",
        "defaults": {},
    }
    assert signatures["scalar"]["inputs"]["k"]["tensor_shape"] == {
        "dim": [],
        "unknown_rank": False,
    }
    assert signatures["with_default"]["defaults"] == {}


def test_sixteen_threads_get_their_own_answers(predict):
    def ask_often(thread):
        for i in range(10):
            prompts = [f"{thread}/{i}/{row}" for row in range(thread % 4 + 1)]
            answer = predict({"instances": prompts})
            assert answer == {"predictions": [f"<{prompt}>" for prompt in prompts]}
        return True

    with ThreadPoolExecutor(16) as executor:
        assert all(executor.map(ask_often, range(16)))


def test_a_connection_is_kept_open(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=TIMEOUT)
    for _ in range(3):
        connection.request("POST", f"{MODEL}:predict", b'{"instances": ["a"]}')
        first_socket = connection.sock
        with connection.getresponse() as response:
            assert json.loads(response.read()) == {"predictions": ["<a>"]}
        assert connection.sock is first_socket is not None
    connection.close()


def test_deeply_nested_json_does_no_harm(ask):
    status, text = ask(f"{MODEL}:predict", '{"instances": ' + "[" * 500_000)
    assert status == 400 and "nested too deeply" in json.loads(text)["error"]
    nested = "[" * 500 + "1" + "]" * 500
    status, text = ask(f"{MODEL}:predict", f'{{"signature_name": "float32", "instances": {nested}}}')
    assert status == 400


def test_large_bodies_pass(predict):
    prompt = "x" * 5_000_000
    assert predict({"instances": [prompt]}) == {"predictions": [f"<{prompt}>"]}
