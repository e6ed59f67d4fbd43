"""The spans that a collector gets from the running server."""

import http.server
import json
import sys
import threading
import urllib.error
import urllib.request

import grpc
import pytest
import tensorflow as tf
from kerasllm_serving.errors import StartupError
from kerasllm_serving.telemetry import Telemetry
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def collector():
    """Its address, and the requests that it gets."""
    received = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


def post(url, body, **headers):
    headers = {"content-type": "application/json", **headers}
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), headers)
    ) as response:
        return response.read()


def attributes(span):
    return {pair.key: pair.value for pair in span.attributes}


def test_spans(start_server, tools_folder, collector, monkeypatch):
    address, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    server = start_server(
        f"--model_base_path={tools_folder}", "--model_name=tools", "--enable_opentelemetry=true"
    )
    url = f"http://127.0.0.1:{server.rest_port}"
    body = {"model": "tools", "prompt": "a secret", "max_tokens": 3}
    usage = json.loads(post(f"{url}/v1/completions", body, traceparent=f"00-{TRACE}-b7ad6b7169203331-01"))[
        "usage"
    ]
    post(f"{url}/v1/completions", {**body, "stream": True})
    urllib.request.urlopen(f"{url}/health").read()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        post(f"{url}/v1/completions", {**body, "model": "other"})
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "tools"
        request.inputs["prompt"].CopyFrom(tf.make_tensor_proto(["a secret"]))
        stub.Predict(request, timeout=60)
    server.process.terminate()
    assert server.process.wait(60) == 0  # which sends what has not been sent

    assert {path for path, _ in received} == {"/v1/traces"}
    assert not any(b"secret" in message.SerializeToString() for _, message in received)
    resources = [resource for _, message in received for resource in message.resource_spans]
    names = {attributes(resource.resource)["service.name"].string_value for resource in resources}
    assert names == {"kerasllm_serving"}
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    spans.sort(key=lambda span: span.start_time_unix_nano)
    assert [span.name for span in spans] == [
        *3 * ["POST /v1/completions"],
        "/tensorflow.serving.PredictionService/Predict",
    ]
    assert all(span.kind == Span.SPAN_KIND_SERVER for span in spans)
    whole, streamed, refused, _ = map(attributes, spans)
    for span in (whole, streamed):
        assert span["gen_ai.request.model"].string_value == "tools"
        assert span["gen_ai.usage.input_tokens"].int_value == usage["prompt_tokens"]
        assert span["gen_ai.usage.output_tokens"].int_value == usage["completion_tokens"]
    assert "gen_ai.request.model" not in refused
    assert spans[0].trace_id.hex() == TRACE and spans[1].trace_id.hex() != TRACE


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.instrumentation", None)
    with pytest.raises(StartupError, match=r"needs pip install 'kerasllm\[telemetry\]'"):
        Telemetry()
