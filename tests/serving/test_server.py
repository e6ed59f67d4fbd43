"""Starting, failing to start and stopping."""

import json
import shutil
import signal
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from kerasllm_serving.__main__ import main
from kerasllm_serving.core import ServerCore
from kerasllm_serving.errors import StartupError
from kerasllm_serving.grpc_service import GrpcOptions, GrpcServer
from kerasllm_serving.manager import ModelManager
from kerasllm_serving.server import check_port_is_free
from tensorflow_serving.apis import get_model_status_pb2, predict_pb2


@pytest.fixture
def occupied_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def slow_grpc_request(server, seconds, timeout=60):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "default"
    request.model_spec.signature_name = "slow"
    tensor = request.inputs["seconds"]
    tensor.dtype = 2  # DT_DOUBLE
    tensor.tensor_shape.dim.add(size=1)
    tensor.double_val.append(seconds)
    response = server.prediction.Predict(request, timeout=timeout)
    return list(response.outputs["seconds"].double_val)


def slow_rest_request(server, seconds):
    body = json.dumps({"signature_name": "slow", "instances": [seconds]}).encode()
    url = f"{server.url}/v1/models/default:predict"
    with urllib.request.urlopen(url, data=body, timeout=60) as response:
        return json.loads(response.read())


def test_sigterm_lets_running_requests_finish(start_server):
    server = start_server()
    assert server.ready_line.endswith("model default version 7 ready\n")
    with ThreadPoolExecutor(2) as executor:
        over_grpc = executor.submit(slow_grpc_request, server, 4.0)
        over_rest = executor.submit(slow_rest_request, server, 4.0)
        time.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert server.process.poll() is None
        # New requests are refused while the old ones run.
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = "default"
        with pytest.raises(grpc.RpcError) as refused:
            server.models.GetModelStatus(request, timeout=5)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(urllib.error.URLError, match="Connection refused"):
            urllib.request.urlopen(f"{server.url}/v1/models/default", timeout=5)
        assert over_grpc.result() == [4.0]
        assert over_rest.result() == {"predictions": [4.0]}
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def test_runs_that_nobody_waits_for_are_cancelled(start_server):
    """With one thread, a request is answered only once the run before it has ended."""
    server = start_server(
        "--grpc_max_threads=1", "--rest_api_num_threads=1", "--rest_api_timeout_in_ms=300"
    )
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            slow_grpc_request(server, 600.0, timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(urllib.error.HTTPError) as caught:
            slow_rest_request(server, 600.0)
        with caught.value:
            assert caught.value.code == 504
            assert "Timed out" in json.loads(caught.value.read())["error"]
    assert slow_grpc_request(server, 0.01, timeout=10) == [0.01]
    assert slow_rest_request(server, 0.01) == {"predictions": [0.01]}

    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log.read_text()


def refuse_to_start(capsys, *flags):
    """Runs the command in this process; returns what it says on stderr."""
    assert main(list(flags)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kerasllm_serving: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_missing_or_empty_base_path(capsys, tmp_path):
    missing = refuse_to_start(capsys, f"--model_base_path={tmp_path / 'nowhere'}")
    assert "must be an existing folder" in missing
    empty = refuse_to_start(capsys, f"--model_base_path={tmp_path}")
    assert "must hold a numeric version folder such as 1" in empty


def test_truncated_artifact(capsys, saved_model, tmp_path):
    shutil.copytree(saved_model, tmp_path / "1")
    file = tmp_path / "1" / "saved_model.pb"
    file.write_bytes(file.read_bytes()[:1000])
    message = refuse_to_start(capsys, f"--model_base_path={tmp_path}", "--host=127.0.0.1", "--port=0")
    assert "1000 bytes that cannot be parsed" in message


@pytest.mark.parametrize("flag", ["port", "rest_api_port"])
def test_occupied_port(capsys, model_base_path, occupied_port, flag):
    flags = {"port": 0, "rest_api_port": 0, flag: occupied_port}
    message = refuse_to_start(
        capsys,
        f"--model_base_path={model_base_path}",
        "--host=127.0.0.1",
        *(f"--{name}={value}" for name, value in flags.items()),
    )
    assert f"`--{flag}` must be a free port of this machine. Received: 127.0.0.1:" in message
    assert "Address already in use" in message


def test_every_address_of_a_host_is_checked(occupied_port):
    for host in ("localhost", "0.0.0.0", "127.0.0.1"):
        with pytest.raises(StartupError, match=f"Received: {host}:{occupied_port}: Address already"):
            check_port_is_free("--port", host, occupied_port)
    with pytest.raises(StartupError, match="Received: no.such.host.invalid:1: "):
        check_port_is_free("--port", "no.such.host.invalid", 1)


def test_two_grpc_servers_do_not_share_a_port():
    core = ServerCore(ModelManager(None, []))
    first = GrpcServer(core, "127.0.0.1:0", GrpcOptions(max_threads=1))
    with pytest.raises(StartupError, match="`--port` must be free"):
        GrpcServer(core, f"127.0.0.1:{first.port}", GrpcOptions(max_threads=1))
    first.stop(None)


def test_one_port_for_both(capsys):
    message = refuse_to_start(capsys, "--model_base_path=any", "--port=8500", "--rest_api_port=8500")
    assert "`--rest_api_port` must differ from `--port`. Received: 8500 for both" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model_base_path"),
        (["--model_base_path=any", "--model=any"], "--model=any"),
        (["--model_base_path=any", "--port=65536"], "from 0 to 65535. Received: 65536"),
        (["--model_base_path=any", "--port=a"], "from 0 to 65535. Received: a"),
        (["--model_base_path=any", "--rest_api_num_threads=0"], "positive whole number"),
        (["--model_base_path=any", "--model_name="], "must not be empty"),
    ],
)
def test_wrong_flags_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_the_flags_and_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("--model_base_path", "--rest_api_port", ":predict -d", "0 takes a free one"):
        assert part in text
