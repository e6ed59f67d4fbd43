"""Generation as a stream over gRPC: the live model's tokens, and nothing goes on that nobody reads."""

import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

SECONDS = 60
PROMPT = "Once upon a time"
EXAMPLE = Path(__file__).parents[2] / "examples" / "stream_over_grpc.py"


@pytest.fixture(scope="module")
def ask(llm_server):
    stream = llm_server.channel.unary_stream(
        "/kerasllm.serving.GenerationService/PredictStreamed",
        request_serializer=predict_pb2.PredictRequest.SerializeToString,
        response_deserializer=predict_pb2.PredictResponse.FromString,
    )

    def send(timeout=SECONDS, model="tiny", **inputs):
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        return stream(request, timeout=timeout)

    return send


def collect(responses):
    """Rows of token ids, text, log-probabilities and why they ended."""
    rows = {}
    for response in responses:
        assert response.model_spec.name == "tiny" and response.model_spec.version.value == 1
        piece = {name: tf.make_ndarray(proto) for name, proto in response.outputs.items()}
        row = rows.setdefault(int(piece["row"]), {"ids": [], "text": b"", "logprobs": [], "pieces": 0})
        row["ids"] += piece["token_ids"].tolist()
        row["logprobs"] += piece["logprobs"].tolist()
        row["text"] += piece["text"].item()
        row["pieces"] += 1
        row["reason"] = piece["finish_reason"].item()
    return [rows[number] for number in sorted(rows)]


def running(server):
    with urllib.request.urlopen(server.url + "/metrics", timeout=SECONDS) as response:
        return float(re.search(r"\nvllm:num_requests_running\S* (\S+)", response.read().decode())[1])


def test_rows_are_the_live_models(ask, random_lm):
    (row,) = collect(ask(prompt=PROMPT, max_new_tokens=12))
    live = random_lm.generate_tokens(PROMPT, 12, logprobs=0)[0]
    assert row["ids"] == live.token_ids and row["text"].decode() == live.text
    assert row["logprobs"] == pytest.approx(live.logprobs, abs=1e-3)
    assert row["reason"].decode() == live.finish_reason and row["pieces"] > 2
    prompts, stop = [PROMPT, "The dog", "A"], live.text[3:6]
    rows = collect(
        ask(prompt=prompts, max_new_tokens=[5, 6, 7], temperature=[0.0, 1.0, 0.7], seed=4, stop=[stop, ""])
    )
    for row, prompt, count, temperature in zip(rows, prompts, (5, 6, 7), (0.0, 1.0, 0.7), strict=True):
        settings = {"temperature": temperature, "seed": 4} if temperature else {}
        live = random_lm.generate_tokens(prompt, count, stop_strings=[stop], **settings)[0]
        assert row["ids"] == live.token_ids and row["text"].decode() == live.text
    # Left out: as the model's configuration says.
    assert collect(ask(prompt=[PROMPT]))[0]["ids"] == random_lm.generate_tokens(PROMPT)[0].token_ids


def test_nothing_goes_on_that_nobody_reads(ask, llm_server):
    calls = [ask(prompt=PROMPT, max_new_tokens=50, min_new_tokens=50) for _ in range(3)]
    for call in calls:
        next(call)
        call.cancel()
    end = time.monotonic() + SECONDS
    while running(llm_server) and time.monotonic() < end:
        time.sleep(0.01)
    assert running(llm_server) == 0
    with pytest.raises(grpc.RpcError) as error:
        list(ask(prompt=[PROMPT] * 3, max_new_tokens=50, min_new_tokens=50, timeout=0.01))
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(collect(ask(prompt=PROMPT, max_new_tokens=3, min_new_tokens=3))[0]["ids"]) == 3


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "`prompt` must be 1 to 128 strings"),
        ({"prompt": [["a"]]}, "`prompt` must be 1 to 128 strings"),
        ({"prompt": b"\xff"}, "`prompt` must be strings in UTF-8"),
        ({"prompt": 3}, "`prompt` must be strings in UTF-8"),
        ({"prompt": "a", "beams": 2}, "Received: \\['beams'\\]"),
        ({"prompt": "a", "top_k": 1.5}, "`top_k` must be a whole number from 0 on"),
        ({"prompt": "a", "top_p": 0.0}, "`top_p` must be a number above 0 and at most 1. Received: 0.0"),
        ({"prompt": "a", "temperature": float("nan")}, "`temperature` must be"),
        ({"prompt": ["a", "b"], "seed": [1, 2, 3]}, "`seed` must be .* or 2 of them"),
        ({"prompt": "a", "stop": ["x"] * 17}, "`stop` must be up to 16 strings"),
        ({"prompt": "a", "max_new_tokens": 1000}, "maximum context length is 64 tokens"),
    ],
)
def test_bad_requests(ask, inputs, message):
    with pytest.raises(grpc.RpcError) as error:
        list(ask(**inputs))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(message, error.value.details()), error.value.details()


def test_a_model_that_is_not_there(ask):
    with pytest.raises(grpc.RpcError) as error:
        list(ask(model="other", prompt="a"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_the_example(llm_server, random_lm):
    command = [sys.executable, EXAMPLE, f"127.0.0.1:{llm_server.grpc_port}", "tiny", PROMPT]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS * 3, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == random_lm.generate(PROMPT, 8) + "\n"
