"""The exported folder answers where kerasllm is not installed and TensorFlow is that of TF Serving."""

import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import urllib.request

import pytest
from reference.environments import install, make_environment
from reference.weights import randomize

from kerasllm import (
    T5,
    Bert,
    BertConfig,
    CausalLM,
    GenerationConfig,
    Llama,
    LlamaConfig,
    MaskedLM,
    Seq2SeqLM,
    SequenceClassifier,
    T5Config,
    TextEmbedder,
    train_tokenizer,
)
from kerasllm.export.verify import format_checks, verify_export

pytestmark = [pytest.mark.clean_env, pytest.mark.timeout(1800)]

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = ["Once upon a time", "The"]
# The newest TensorFlow Serving is built on the first. The other is that of the tests themselves, which load
# exports in processes without kerasllm in the default tier, too.
VERSIONS = ["2.20", pytest.param("2.21", marks=pytest.mark.slow)]
SERVER = ["grpcio", "tensorflow-serving-api==2.20.*", "uvicorn", "jinja2", "tokenizers"]


@pytest.fixture(scope="module")
def make_python(tmp_path_factory):
    """Pythons with a version of TensorFlow and nothing else, each made once."""

    @functools.cache
    def make(version):
        python = make_environment(tmp_path_factory.mktemp("environment"), [f"tensorflow=={version}.*"])
        code = "from importlib import metadata, util; print(metadata.version('tensorflow'))"
        code += "; assert not any(map(util.find_spec, ('kerasllm', 'tensorflow_text')))"
        result = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{version}."), result.stdout
        return python

    return make


def make_task(kind, tokenizer, stories):
    """A small model with large random weights."""
    if kind in ("CausalLM", "Seq2SeqLM"):
        sizes = {"vocabulary_size": 400, "context_length": 64, "num_layers": 2, "num_heads": 4, "dim": 32}
        if kind == "CausalLM":
            model = Llama(LlamaConfig(**sizes, num_kv_heads=2, intermediate_dim=48))
            return CausalLM(randomize(model), tokenizer, GenerationConfig(max_new_tokens=8))
        model = T5(T5Config(**sizes, num_decoder_layers=1, decoder_start_id=3))
        return Seq2SeqLM(randomize(model), tokenizer, GenerationConfig(max_new_tokens=8))
    word_pieces = train_tokenizer("wordpiece", stories[:50], 300)
    tasks = {
        "MaskedLM": (MaskedLM, "masked_lm", {}),
        "SequenceClassifier": (SequenceClassifier, "classifier", {"labels": ("bad", "good")}),
        "TextEmbedder": (TextEmbedder, None, {}),
    }
    task, head, fields = tasks[kind]
    sizes = {"vocabulary_size": word_pieces.vocabulary_size, "context_length": 32}
    config = BertConfig(**sizes, num_layers=2, num_heads=4, dim=32, **fields)
    return task(randomize(Bert(config, head=head)), word_pieces)


def environment(**values):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "TF_CPP_MIN_LOG_LEVEL": "2", **values}


@pytest.fixture(scope="module")
def export(served, causal_lm, tokenizer, stories, tmp_path_factory):
    """Exports a model of each kind once: the folder and the task."""

    @functools.cache
    def make(kind):
        if kind == "trained GPT-2":
            return served / "1", causal_lm
        task = make_task(kind.removesuffix(", compiled"), tokenizer, stories)
        options = {"jit_compile": True} if kind.endswith("compiled") else {}
        return task.export(tmp_path_factory.mktemp("export") / "1", **options), task

    return make


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "kind",
    [
        "trained GPT-2",
        "CausalLM",
        "CausalLM, compiled",
        "Seq2SeqLM",
        "MaskedLM",
        "SequenceClassifier",
        "TextEmbedder",
    ],
)
def test_every_signature(make_python, export, kind, version, monkeypatch):
    """What `export --verify` compares, and the warm-up requests."""
    monkeypatch.setattr(sys, "executable", make_python(version))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    checks = verify_export(*export(kind))
    assert not [check for check in checks if check.problem], format_checks(checks)
    assert {"warm-up requests", "reference tokenizer"} < {check.name for check in checks}


def test_server(make_python, served, causal_lm, tmp_path):
    """The last one: its environment has more in it afterwards."""
    python = make_python(VERSIONS[0])
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
