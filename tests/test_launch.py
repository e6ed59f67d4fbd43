import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import yaml

from kerasllm import cli, launch


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Makes `launch` run a Python program instead of the command `kerasllm`."""

    def make(text):
        path = tmp_path / "program.py"
        path.write_text(
            "import json, os, pathlib, signal, sys, time\nhere = pathlib.Path(__file__).parent\n" + text
        )
        monkeypatch.setattr(launch, "_COMMAND", [sys.executable, str(path)])
        return tmp_path

    return make


def test_workers_know_each_other(program):
    folder = program(
        "config = os.environ['TF_CONFIG']\n"
        "(here / str(json.loads(config)['task']['index'])).write_text(config + ' '.join(sys.argv[1:]))"
    )
    assert launch.launch(["a", "b c"], 3) == 0
    texts = [(folder / str(index)).read_text() for index in range(3)]
    assert all(text.endswith("}a b c") for text in texts)
    configs = [json.loads(text[: text.rindex("}") + 1]) for text in texts]
    assert configs[0]["cluster"] == configs[1]["cluster"] == configs[2]["cluster"]
    assert len(set(configs[0]["cluster"]["worker"])) == 3


def test_all_are_started_again_when_one_fails(program, capfd):
    folder = program(
        "index = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
        "starts = here / f'starts{index}'\n"
        "starts.write_text(starts.read_text() + 'x' if starts.exists() else 'x')\n"
        "if index == 1 and len(starts.read_text()) < 3: sys.exit('it broke')\n"
        "if len(starts.read_text()) < 3: time.sleep(60)\n"
    )
    launch_grace = launch._GRACE_SECONDS
    launch._GRACE_SECONDS = 0.5
    try:
        assert launch.launch(["train"], 2, restarts=2) == 0
    finally:
        launch._GRACE_SECONDS = launch_grace
    assert (folder / "starts0").read_text() == (folder / "starts1").read_text() == "xxx"
    error = capfd.readouterr().err
    assert error.count("worker 1 ended with 1") == 2 and "it broke" in error and "(2 of 2)" in error


def test_a_command_that_always_fails_ends_with_its_code(program):
    program("sys.exit(7)")
    assert launch.launch(["train"], 2, restarts=1) == 7


def test_sigterm_is_passed_on(tmp_path):
    """In a process of its own, which gets the signal."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))\n"
        f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
        "time.sleep(60); sys.exit(3)"
    )
    code = (
        f"import sys; import launch; launch._COMMAND = [sys.executable, {str(program)!r}]\n"
        "sys.exit(launch.launch(['train'], 2))"
    )
    # The module alone: the whole of kerasllm takes seconds to import.
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(launch.__file__)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while len(os.listdir(tmp_path)) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_the_configuration_of_a_cluster_is_printed(capsys):
    assert cli.main(["launch", "--print-config", "a:1", "b:2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"cluster": {"worker": ["a:1", "b:2"]}, "task": {"type": "worker", "index": 0}}
    assert second["task"]["index"] == 1
    assert cli.main(["launch", "--index", "1", "--print-config", "a:1", "b:2"]) == 0
    assert json.loads(capsys.readouterr().out) == second


def test_the_manifest_is_kubernetes(capsys):
    command = [
        "launch",
        "--workers",
        "3",
        "--print-kubernetes",
        "--",
        "train",
        "--config",
        "/runs/a b.yaml",
    ]
    assert cli.main(command) == 0
    service, job = yaml.safe_load_all(capsys.readouterr().out)
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 3
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (text,) = pod["containers"][0]["args"]
    assert "training-2.training:2222" in text and "exec kerasllm train --config '/runs/a b.yaml'" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["launch"], "A command must follow"),
        (["launch", "--workers", "0", "--", "train"], "`workers` must be at least 1"),
        (["launch", "--print-config", "host"], "must be host:port"),
        (["launch", "--index", "2", "--print-config", "a:1"], "`index` must be from 0 to 0"),
    ],
)
def test_wrong_calls_are_refused(arguments, message, capsys):
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_change_nothing():
    tool = pathlib.Path(__file__).parents[1] / "tools" / "check_recovery"
    result = subprocess.run(
        [sys.executable, tool, "--kills", "4", "--steps", "60"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to the bit" in result.stdout
