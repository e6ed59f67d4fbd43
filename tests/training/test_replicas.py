"""Training on several replicas and workers against one device, by tools/check_replicas."""

import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "check_replicas"


def run(*arguments):
    result = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal to one device" in result.stdout


@pytest.mark.timeout(900)
def test_two_replicas_and_two_workers():
    run("--replicas", "2", "--workers", "2", "--cases", "dropout, microbatches, short")


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_everything():
    run()
