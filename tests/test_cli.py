import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from kerasllm.cli import main


@pytest.fixture(scope="module")
def folder(causal_lm, tmp_path_factory):
    return str(causal_lm.save_pretrained(tmp_path_factory.mktemp("model")))


def test_help_teaches(capsys):
    for arguments in (["--help"], ["train", "--help"], ["serve", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and "key=value" in printed


def test_generate(folder, causal_lm, capsys):
    assert main(["generate", folder, "Once", "The", "--max-new-tokens", "5"]) == 0
    texts = causal_lm.generate(["Once", "The"], max_new_tokens=5)
    assert capsys.readouterr().out == f"Once{texts[0]}\nThe{texts[1]}\n"
    settings = ["--temperature", "1.5", "--top-k", "9", "--top-p", "0.8", "--seed", "4"]
    assert main(["generate", folder, "Once", *settings]) == 0
    sampled = causal_lm.generate("Once", temperature=1.5, top_k=9, top_p=0.8, seed=4)
    assert capsys.readouterr().out == f"Once{sampled}\n"


def test_evaluate(folder, causal_lm, stories, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(stories[0], encoding="utf-8")
    assert main(["evaluate", folder, "--data", str(tmp_path)]) == 0
    perplexity = causal_lm.evaluate([stories[0]], verbose=0)["perplexity"]
    assert f"perplexity {perplexity:.2f}" in capsys.readouterr().out


def test_train_then_use(tmp_path, capsys):
    output = tmp_path / "run"
    settings = ["model.num_layers=1", "model.num_heads=2", "model.dim=16", "model.context_length=32"]
    settings += ["data.stories=40", "tokenizer.vocabulary_size=300", "training.steps=3"]
    settings += ["training.sequence_length=32", "training.jit_compile=false", f"output={output}"]
    assert main(["train", *settings]) == 0
    assert "bigram baseline" in capsys.readouterr().out
    assert main(["train", *settings]) == 1
    assert "never overwrites a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "a"], "There is no model at: nowhere"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "output=x", "training.stepz=3"], "stepz"),
        (["train", "output=x", "training.steps=0"], "`steps` must be at least 1. Received: steps=0"),
        (["quickstart", "--steps", "0", "--out", "/nonexistent/out"], "`steps` must be at least 1"),
        (["export", "nowhere", "x/1"], "nowhere"),
    ],
)
def test_bad_calls_say_why(arguments, message, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_prompt_longer_than_the_context(folder, capsys):
    assert main(["generate", folder, "word " * 200]) == 1
    error = capsys.readouterr().err
    assert "context of 64 tokens" in error and "a prompt of" in error


def test_doctor(capsys, monkeypatch):
    code = main(["doctor"])
    printed = capsys.readouterr().out
    for words in ("Python", "tensorflow", "Keras backend", "devices", "extra [serving]", "extra [litert]"):
        assert words in printed
    assert (code == 0) == ("no problems found" in printed)
    monkeypatch.setattr("keras.backend.backend", lambda: "jax")
    assert main(["doctor"]) == 1
    assert "KERAS_BACKEND=tensorflow" in capsys.readouterr().out


def test_serve_answers_and_drains(served):
    """The command becomes the server: it answers over REST and ends with 0 on SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kerasllm.cli", "serve", str(served), "--host=127.0.0.1", "--port=0"]
    command.append(f"--rest_api_port={port}")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        assert f"model {served.name} version 1 ready" in line
        import urllib.request

        url = f"http://127.0.0.1:{port}/v1/models/{served.name}"
        assert b"AVAILABLE" in urllib.request.urlopen(url, timeout=30).read()
        server.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert server.returncode == 0
    finally:
        if server.poll() is None:
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
