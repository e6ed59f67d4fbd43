"""Training on several replicas and workers against one device, by tools/check_replicas."""

import os
import pathlib
import subprocess
import sys

import pytest

from kerasllm.launch import tf_config

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "check_replicas"


def run(*arguments):
    result = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to one device" in result.stdout


@pytest.mark.timeout(900)
def test_two_replicas_and_two_workers():
    run("--replicas", "2", "--workers", "2", "--cases", "dropout, microbatches, short")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_that_differ_are_refused(tmp_path):
    settings = ["data.stories=50", "training.steps=2", "training.jit_compile=false", "model.num_layers=1"]
    addresses = [f"127.0.0.1:{port}" for port in (24531, 24532)]
    workers = []
    for index, rate in enumerate(("0.001", "0.002")):
        command = ["train", *settings, f"training.learning_rate={rate}", f"output={tmp_path / rate}"]
        code = "import sys; from kerasllm.cli import main; sys.exit(main(sys.argv[1:]))"
        environment = {**os.environ, "TF_CONFIG": tf_config(addresses, index)}
        workers.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *command], env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [1, 1]
    assert all("All workers must have the same version" in error for error in errors), errors


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_everything():
    run()
