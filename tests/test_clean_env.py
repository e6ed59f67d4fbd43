"""The exported folder answers where kerasllm is not installed and TensorFlow is that of TF Serving."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import urllib.request

import pytest

from kerasllm.export.verify import format_checks, verify_export

# One group: with --dist=loadgroup one process builds the environment and runs them all.
pytestmark = [
    pytest.mark.clean_env,
    pytest.mark.timeout(1800),
    pytest.mark.xdist_group("clean_env"),
]

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = ["Once upon a time", "The"]
# The newest TensorFlow Serving is built on 2.20.
TENSORFLOW = ["tensorflow==2.20.*", "tensorflow-text==2.20.*"]
SERVER = ["grpcio", "tensorflow-serving-api==2.20.*", "uvicorn", "jinja2", "tokenizers"]


def install(python, packages):
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode and "No matching distribution" in result.stderr:
        pytest.skip(f"needs the package index to install {packages}")
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with TensorFlow 2.20 and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    install(python, TENSORFLOW)
    return python


def environment(**values):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "TF_CPP_MIN_LOG_LEVEL": "2", **values}


def test_graph_mode(python, served, causal_lm, tmp_path):
    code = """
import importlib.util, json, sys
import tensorflow as tf
import tensorflow_text
assert tf.__version__.startswith("2.20"), tf.__version__
assert importlib.util.find_spec("kerasllm") is None
with tf.compat.v1.Session(graph=tf.Graph()) as session:
    meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], sys.argv[1])
    signature = meta.signature_def["serving_default"]
    feeds = {signature.inputs["prompt"].name: json.loads(sys.argv[2])}
    texts = session.run(signature.outputs["text"].name, feeds)
print(json.dumps([text.decode() for text in texts]))
"""
    command = [python, "-c", code, str(served / "1"), json.dumps(PROMPTS)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment(), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == causal_lm.generate(PROMPTS)


def test_server(python, served, causal_lm, tmp_path):
    install(python, SERVER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "kerasllm_serving", f"--model_base_path={served}", "--model_name=gpt"]
    command += ["--host=127.0.0.1", "--port=0", f"--rest_api_port={port}"]
    settings = environment(PYTHONPATH=str(ROOT / "serving"))
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=settings, cwd=tmp_path)
    try:
        assert "ready" in server.stdout.readline()
        body = json.dumps({"instances": PROMPTS}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models/gpt:predict", body) as response:
            assert json.load(response) == {"predictions": causal_lm.generate(PROMPTS)}
    finally:
        server.terminate()
        assert server.wait(60) == 0


def test_every_signature(python, served, causal_lm, monkeypatch):
    """What `export --verify` compares, and the warm-up requests, with the TensorFlow of TF Serving."""
    monkeypatch.setattr(sys, "executable", python)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    checks = verify_export(served / "1", causal_lm)
    assert not [check for check in checks if check.problem], format_checks(checks)
