"""Training on several replicas and workers against one device, by tools/check_replicas."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from kerasllm.launch import tf_config

SCRIPT = pathlib.Path(__file__).parent / "on_replicas.py"
TOOL = pathlib.Path(__file__).parents[2] / "tools" / "check_replicas"


def run(*arguments):
    result = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to one device" in result.stdout


@pytest.mark.timeout(900)
def test_two_replicas_and_two_workers():
    """A short last batch, dropout, microbatches, averages, a shared state; the rest is in the slow tier."""
    cases = ("--cases", "dropout, microbatches, averaged")
    run("--replicas", "2", "--workers", "2", "--layers", "1", *cases)


def run_in_process(*names):
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, SCRIPT, *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return run_in_process("parts", "resumed", "rounded")


@pytest.mark.timeout(600)
def test_each_replica_keeps_a_part_of_the_state(found):
    facts = found["parts"]
    # Each of the arrays is filled up to a multiple of the replicas.
    assert len(set(facts["held"])) == 1
    assert facts["whole"] / 4 <= facts["held"][0] < facts["whole"] / 4 + 8 * facts["values"]
    assert facts["loaded"] == 0  # a .keras file has the whole of it


@pytest.mark.timeout(600)
def test_a_training_goes_on_with_other_replicas(found):
    """Also from a state that is shared to one that is not."""
    errors = found["resumed"]
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.timeout(600)
def test_replicas_round_alike(found):
    facts = found["rounded"]
    assert facts["weights"] < 1e-5 and facts["losses"] < 1e-5, facts
    assert facts["copies"] == 0
    assert facts["exact"] > 1e-3, facts


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_more_trainings_go_on_with_other_replicas():
    errors = run_in_process("resumed_otherwise")["resumed_otherwise"]
    assert errors.pop("to the bit") == 0
    assert max(errors.values()) < 1e-10, errors


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_shared_state_gives_the_same_weights():
    errors = run_in_process("sharded")["sharded"]
    assert errors.pop("skipped") > 0
    half = errors.pop("half, 2")
    assert half < 1e-2 and max(errors.values()) < 1e-10, errors


def run_workers(port, *runs):
    """Runs `kerasllm train` with the settings of each worker; returns their statuses and errors."""
    settings = ["data.stories=50", "training.steps=2", "training.jit_compile=false", "model.num_layers=1"]
    addresses = [f"127.0.0.1:{port + index}" for index in range(len(runs))]
    code = "import sys; from kerasllm.cli import main; sys.exit(main(sys.argv[1:]))"
    workers = []
    for index, own in enumerate(runs):
        environment = dict(os.environ)
        if len(runs) > 1:
            environment["TF_CONFIG"] = tf_config(addresses, index)
        command = [sys.executable, "-c", code, "train", *settings, *own]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [worker.communicate()[1] for worker in workers]
    return [worker.returncode for worker in workers], errors


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_first_worker_writes_what_all_have_seen(tmp_path):
    settings = ["training.steps=4", "training.validate_every=2", "training.save_every=1"]
    settings += ["training.batch_size=6", "training.sequence_length=32", "logging.sample_tokens=4"]
    settings += ["logging.peak_flops=1e12", "training.shard_optimizer=true", "training.remat=cheap"]
    for name, count in (("alone", 1), ("spread", 2)):
        runs = [[*settings, f"output={tmp_path / name / str(index)}"] for index in range(count)]
        statuses, errors = run_workers(24541, *runs)
        assert set(statuses) == {0}, errors
    alone, spread, other = (tmp_path / name for name in ("alone/0", "spread/0", "spread/1"))
    assert [path.name for path in other.iterdir()] == ["run.json"]  # what it was begun with
    assert {path.name for path in spread.iterdir()} == {path.name for path in alone.iterdir()}
    assert len(list((spread / "tensorboard").iterdir())) == 1
    assert "interrupted" not in (spread / "report.html").read_text(encoding="utf-8")
    logs = []
    for folder in (alone, spread):
        lines = (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()
        logs.append([json.loads(line) for line in lines])
    assert len(logs[0]) == len(logs[1]) > 4
    for ours, wanted in zip(logs[1], logs[0], strict=True):
        for name in ("step", "loss", "learning_rate", "gradient_norm", "validation_loss"):
            assert ours.get(name, 0) == pytest.approx(wanted.get(name, 0), rel=1e-3), name
        assert ours.keys() == wanted.keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_that_differ_are_refused(tmp_path):
    rates = ("0.001", "0.002")
    runs = [[f"training.learning_rate={rate}", f"output={tmp_path / rate}"] for rate in rates]
    statuses, errors = run_workers(24531, *runs)
    assert statuses == [1, 1]
    assert all("All workers must have the same version" in error for error in errors), errors


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_everything():
    """Also a state that is not shared, on workers."""
    run()
