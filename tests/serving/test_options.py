"""The real server with most of its options at once: TLS, keys, health checks, batching, metrics."""

import http.client
import json
import re
import shutil
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tensorflow as tf
from kerasllm_serving.__main__ import main
from kerasllm_serving.warmup import FILE
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

TIMEOUT = 30
KEY = "for the tests"
METADATA = (("authorization", f"Bearer {KEY}"),)
PROMETHEUS = "/monitoring/mine"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and certificates of a server and a client that it signed: the folder of their files."""
    folder = tmp_path_factory.mktemp("tls")
    new = "openssl req -x509 -days 2 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1".split()
    signed = "-CA ca.pem -CAkey ca.key -addext basicConstraints=critical,CA:false".split()
    for name, more in (
        ("ca", []),
        ("server", [*signed, "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]),
        ("client", signed),
    ):
        command = [*new, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", *more]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


def write_ssl_config(path, **fields):
    lines = []
    for name, value in fields.items():
        text = str(value).lower() if isinstance(value, bool) else json.dumps(value.read_text())
        lines.append(f"{name}: {text}")
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def secure(start_server, certificates, tmp_path_factory):
    folder = tmp_path_factory.mktemp("options")
    file = certificates.joinpath
    ssl_config = write_ssl_config(
        folder / "ssl",
        server_key=file("server.key"),
        server_cert=file("server.pem"),
        custom_ca=file("ca.pem"),
        client_verify=True,
    )
    (folder / "batching").write_text(
        "max_batch_size { value: 16 } batch_timeout_micros { value: 100000 } allowed_batch_sizes: [4, 16]"
        " num_batch_threads { value: 1 } pad_variable_length_inputs: true"
    )
    (folder / "monitoring").write_text(f'prometheus_config {{ enable: true path: "{PROMETHEUS}" }}')
    (folder / "keys").write_text(KEY)
    (folder / "session").write_text("allow_soft_placement: true")
    server = start_server(
        "--model_name=test_model",
        f"--ssl_config_file={ssl_config}",
        f"--grpc_socket_path={folder / 'socket'}",
        "--grpc_channel_arguments=grpc.max_receive_message_length=100000,grpc.max_connection_age_ms=600000",
        "--enable_grpc_healthcheck_service",
        "--enable_serialization_as_tensor_content",
        f"--api_keys_file={folder / 'keys'}",
        f"--rest_api_ssl_certfile={file('server.pem')}",
        f"--rest_api_ssl_keyfile={file('server.key')}",
        f"--rest_api_ssl_ca_certs={file('ca.pem')}",
        "--enable_batching=true",
        f"--batching_parameters_file={folder / 'batching'}",
        f"--monitoring_config_file={folder / 'monitoring'}",
        f"--tensorflow_session_config_file={folder / 'session'}",
        "--tensorflow_inter_op_parallelism=2",
        "--num_load_threads=0",
    )
    server.socket = folder / "socket"
    return server


@pytest.fixture(scope="module")
def make_channel(secure, certificates):
    channels = []

    def make(address=None, brings_certificate=True):
        read = {name: (certificates / name).read_bytes() for name in ("ca.pem", "client.key", "client.pem")}
        own = (read["client.key"], read["client.pem"]) if brings_certificate else (None, None)
        credentials = grpc.ssl_channel_credentials(read["ca.pem"], *own)
        options = [("grpc.ssl_target_name_override", "localhost")]
        channels.append(
            grpc.secure_channel(address or f"127.0.0.1:{secure.grpc_port}", credentials, options)
        )
        return channels[-1]

    yield make
    for channel in channels:
        channel.close()


@pytest.fixture(scope="module")
def channel(make_channel):
    return make_channel()


def float_request(*values):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "test_model", "float32"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.float32(values)))
    return request


def predict(channel, request, metadata=METADATA):
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    return stub.Predict(request, timeout=TIMEOUT, metadata=metadata).outputs["x"]


def test_grpc_over_tls(channel, make_channel, secure):
    output = predict(channel, float_request(1.5, 2))
    assert tf.make_ndarray(output).tolist() == [1.5, 2]
    assert output.tensor_content and not output.float_val
    for bad in (make_channel(brings_certificate=False), secure.channel):  # the last is not encrypted
        with pytest.raises(grpc.RpcError) as caught:
            predict(bad, float_request(1))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_unix_socket(make_channel, secure):
    assert f" and unix:{secure.socket}, REST" in secure.ready_line
    output = predict(make_channel(f"unix:{secure.socket}"), float_request(7))
    assert tf.make_ndarray(output).tolist() == [7]


def test_grpc_wants_a_key(channel):
    status = model_service_pb2_grpc.ModelServiceStub(channel)
    generate = channel.unary_stream("/kerasllm.serving.GenerationService/PredictStreamed")
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "test_model"
    for metadata in ((), (("authorization", "Bearer other"),), (("authorization", KEY),)):
        for call in (
            lambda metadata=metadata: predict(channel, float_request(1), metadata),
            lambda metadata=metadata: status.GetModelStatus(request, timeout=TIMEOUT, metadata=metadata),
            lambda metadata=metadata: list(generate(b"", timeout=TIMEOUT, metadata=metadata)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "authorization: Bearer KEY" in caught.value.details()
    assert status.GetModelStatus(request, timeout=TIMEOUT, metadata=METADATA).model_version_status


def test_health_checks(channel):
    """The bytes of grpc.health.v1, without a key, as probes send them: field 1 a name, field 1 SERVING."""
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    for service in (b"", b"ModelService", b"PredictionService"):
        request = bytes([0x0A, len(service)]) + service if service else b""
        assert check(request, timeout=TIMEOUT) == b"\x08\x01"
    for method, request, code in (
        ("Check", b"\x0a\x05other", grpc.StatusCode.NOT_FOUND),
        ("Watch", b"", grpc.StatusCode.UNIMPLEMENTED),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/grpc.health.v1.Health/{method}")(request, timeout=TIMEOUT)
        assert caught.value.code() is code


def test_channel_arguments(channel):
    with pytest.raises(grpc.RpcError) as caught:
        predict(channel, float_request(*range(30_000)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_there_is_no_profiler(channel):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/tensorflow.ProfilerService/Profile")(b"", timeout=TIMEOUT, metadata=METADATA)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "no profiler" in caught.value.details()


@pytest.fixture(scope="module")
def ask(secure, certificates):
    """Sends a request over HTTPS with certificate and key; returns status and text."""
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    context.load_cert_chain(certificates / "client.pem", certificates / "client.key")

    def send(path, body=None, context=context):
        url = f"https://127.0.0.1:{secure.rest_port}{path}"
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(url, data, {"Authorization": f"Bearer {KEY}"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return send


def test_rest_over_tls(ask, secure, certificates):
    body = {"signature_name": "float32", "instances": [1.5]}
    assert ask("/v1/models/test_model:predict", body) == (200, '{"predictions": [1.5]}')
    without = ssl.create_default_context(cafile=certificates / "ca.pem")
    for context in (without, ssl.create_default_context()):
        with pytest.raises(OSError):  # which ssl's errors are
            ask("/health", context=context)
    with pytest.raises((OSError, http.client.HTTPException)):
        urllib.request.urlopen(f"{secure.url}/health", timeout=TIMEOUT)


def numbers(ask, path=PROMETHEUS):
    """The numbers, by what stands before them on their line."""
    status, text = ask(path)
    assert status == 200
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {key: float(value) for key, value in (line.rsplit(" ", 1) for line in lines)}


def test_requests_are_run_together(channel, ask):
    runs = ":tensorflow:serving:batching_session:wrapped_run_count"
    before = numbers(ask)[runs]
    sent = [[float(10 * i + j) for j in range(i % 3 + 1)] for i in range(24)]
    with ThreadPoolExecutor(24) as executor:
        outputs = list(executor.map(lambda values: predict(channel, float_request(*values)), sent))
    assert [tf.make_ndarray(output).tolist() for output in outputs] == sent
    assert 3 <= numbers(ask)[runs] - before < 24
    with pytest.raises(grpc.RpcError) as caught:
        predict(channel, float_request(*range(17)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "Task size 17 is larger than maximum input batch size 16"


def test_numbers_for_prometheus(channel, ask):
    name = ":tensorflow:serving:"

    def count(key):
        return numbers(ask).get(name + key, 0)

    ok = 'request_count{model_name="test_model",status="OK"}'
    before = count(ok)
    predict(channel, float_request(1))
    assert ask("/v1/models/test_model:predict", {"signature_name": "float32", "inputs": [1.0]})[0] == 200
    examples = {"signature_name": "regress", "examples": [{"x": 1.0}, {"x": 2.0}]}
    assert ask("/v1/models/test_model:regress", examples)[0] == 200
    assert ask("/v1/models/test_model:predict", {})[0] == 400
    assert ask("/v1/models/guessed:predict", {"inputs": 1})[0] == 404
    assert count(ok) - before == 3
    found = numbers(ask)
    assert found[name + 'request_count{model_name="test_model",status="INVALID_ARGUMENT"}'] >= 1
    # What clients make up is no label.
    assert found[name + 'request_count{model_name="",status="NOT_FOUND"}'] >= 1
    for labels in ('API="Predict",entrypoint="GRPC"', 'API="Predict",entrypoint="REST"'):
        assert found[f'{name}request_latency_count{{model_name="test_model",{labels}}}'] >= 1
    labels = 'model_name="test_model",API="Regress"'
    assert found[f'{name}request_latency_count{{{labels},entrypoint="REST"}}'] == 1
    assert found[f'{name}runtime_latency_count{{{labels},runtime="TF1"}}'] == 1
    assert found[name + 'request_example_count_total{model="test_model"}'] == 2
    assert found[name + 'request_example_counts_bucket{model="test_model",le="2.0"}'] == 1
    buckets = [
        float(match[1])
        for key in found
        if (match := re.search(rf'request_latency_bucket.*{labels}.*le="([\d.]+)"', key))
    ]
    np.testing.assert_allclose(buckets, [10 * 1.8**power for power in range(33)])
    assert numbers(ask, "/metrics").keys() >= found.keys()
    assert ask("/monitoring/prometheus/metrics")[0] == 404  # another was given


# Before it serves


def test_while_it_loads(start_server, free_port, saved_model, tmp_path):
    """Its port answers from the beginning: 503 until the warm-up requests have been run."""
    shutil.copytree(saved_model, tmp_path / "m" / "1")
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.model_spec.signature_name = "slow"
    request.inputs["seconds"].CopyFrom(tf.make_tensor_proto(np.float64([4])))
    file = tmp_path / "m" / "1" / FILE
    file.parent.mkdir()
    with tf.io.TFRecordWriter(str(file)) as writer:
        writer.write(log.SerializeToString())
    port = free_port()
    answers = set()
    with ThreadPoolExecutor(1) as executor:
        flags = (f"--model_base_path={tmp_path / 'm'}", f"--rest_api_port={port}")
        started = executor.submit(start_server, *flags, warms_up=True)
        deadline = time.monotonic() + 240
        while not started.done() and time.monotonic() < deadline:
            for path in ("/health", "/v1/models/default", "/v1/models/default:predict"):
                try:
                    data = b"{}" if path.endswith("predict") else None
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=TIMEOUT).close()
                except urllib.error.HTTPError as error:
                    with error:
                        answers.add((path, error.code, "is being loaded" in error.read().decode()))
                except OSError:
                    pass
            time.sleep(0.05)
        server = started.result()
    assert {
        (path, 503, True) for path in ("/health", "/v1/models/default", "/v1/models/default:predict")
    } <= answers
    with urllib.request.urlopen(f"{server.url}/v1/models/default", timeout=TIMEOUT) as response:
        assert response.status == 200
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=TIMEOUT) as response:
        text = response.read().decode()
    line = f':tensorflow:serving:model_warmup_latency_count{{model_path="{tmp_path}/m/1",status="OK"}} 1'
    assert line in text.splitlines()


def test_options_that_do_not_fit(capsys, model_base_path, certificates, tmp_path):
    key, certificate = certificates / "server.key", certificates / "server.pem"
    broken = tmp_path / "broken"
    broken.write_text("colour: 1")
    empty = tmp_path / "empty"
    empty.write_text("")
    no_authority = write_ssl_config(
        tmp_path / "a", server_key=key, server_cert=certificate, client_verify=True
    )
    no_pem = write_ssl_config(tmp_path / "b", server_key=broken, server_cert=certificate)
    bad_path = tmp_path / "monitoring"
    bad_path.write_text('prometheus_config { enable: true path: "metrics" }')
    rest = "--rest_api_port=18501"
    for flags, message in (
        ([f"--ssl_config_file={broken}"], "`--ssl_config_file` must be a SSLConfig in text format"),
        ([f"--ssl_config_file={tmp_path}"], "Is a directory"),
        ([f"--ssl_config_file={empty}"], "must have `server_key` and `server_cert`"),
        ([f"--ssl_config_file={no_authority}"], "with `client_verify` must have `custom_ca`"),
        ([f"--ssl_config_file={no_pem}"], "`server_key` in `--ssl_config_file` must be PEM"),
        ([f"--batching_parameters_file={empty}"], "need `--enable_batching=true`"),
        (["--enable_batching", f"--batching_parameters_file={broken}"], 'no field named "colour"'),
        ([f"--monitoring_config_file={empty}"], "`--monitoring_config_file` needs `--rest_api_port`"),
        ([rest, f"--monitoring_config_file={broken}"], "must be a MonitoringConfig in text format"),
        ([rest, f"--monitoring_config_file={bad_path}"], "must begin with / and not with /v1/"),
        ([f"--rest_api_ssl_certfile={certificate}"], "`--rest_api_ssl_certfile` needs `--rest_api_port`"),
        ([rest, f"--rest_api_ssl_keyfile={key}"], "need `--rest_api_ssl_certfile`"),
        ([rest, f"--rest_api_ssl_certfile={certificate}"], "must be PEM files of a certificate, its key"),
        ([f"--tensorflow_session_config_file={broken}"], "must be a ConfigProto in text format"),
        (
            [f"--grpc_socket_path={tmp_path}/no/socket"],
            "`--grpc_socket_path` must be a path where a socket",
        ),
        (["--saved_model_tags=other"], "must hold a graph tagged 'other'"),
    ):
        flags = [f"--model_base_path={model_base_path}", "--host=127.0.0.1", "--port=0", *flags]
        assert main(flags) == 1
        error = capsys.readouterr().err
        assert error.startswith("kerasllm_serving: error: ") and message in error, error


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--enable_profiler", "must be false: there is no profiler"),
        ("--platform_config_file=a", "is not supported: the platform is TensorFlow"),
        ("--num_load_threads=4", "must be 0: versions are loaded one by one"),
        ("--prefer_tflite_model=true", "must be false: a .tflite is served where there is no SavedModel"),
        ("--grpc_channel_arguments=a", "must be KEY=VALUE,... Received: a"),
        ("--per_process_gpu_memory_fraction=1.5", "must be a number from 0 to 1. Received: 1.5"),
        ("--enable_batching=maybe", "must be true or false. Received: maybe"),
        ("--no_such_flag=1", "unrecognized arguments"),
    ],
)
def test_flags_that_are_refused(capsys, flag, message):
    with pytest.raises(SystemExit) as caught:
        main(["--model_base_path=any", flag])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and f"tensorflow {tf.__version__}" in capsys.readouterr().out
