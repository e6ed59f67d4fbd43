"""tools/check_int4 runs, and calibrated weights of 4 bits are the best."""

import pathlib
import re
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "check_int4"


def run(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False, timeout=1200
    )


def test_help():
    received = run("--help")
    assert received.returncode == 0 and "--llama-cpp" in received.stdout


@pytest.mark.slow
def test_calibrated_weights_diverge_least(tmp_path):
    received = run("--folder", str(tmp_path), "--steps", "60", "--tokens", "300")
    assert received.returncode == 0, received.stdout + received.stderr
    rows = dict(re.findall(r"^(\S.*?) {2,}[\d.]+ +[\d.]+ +(-?[\d.]+) +[\d.]+$", received.stdout, re.M))
    divergences = {name: float(number) for name, number in rows.items() if "int4" in name}
    assert len(divergences) == 5 and float(rows["kerasllm float32"]) < 1e-4
    assert "kerasllm int4" in sorted(divergences, key=divergences.get)[:2], divergences
