"""tools/benchmark_loading runs, and loading takes little more memory than the weights."""

import pathlib
import re
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "benchmark_loading"


def run(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False, timeout=280
    )


def test_help():
    received = run("--help")
    assert received.returncode == 0 and "peak ratio" in received.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory():
    received = run("--libraries", "kerasllm", "--repeat", "1")
    assert received.returncode == 0, received.stdout + received.stderr
    ratios = re.findall(r"kerasllm.*│ +(\d\.\d\d) │", received.stdout)
    assert len(ratios) == 4
    assert all(0.9 < float(ratio) < 1.2 for ratio in ratios), received.stdout
