import io
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from reference.weights import randomize
from reference.word_piece import make_word_piece

from kerasllm import (
    GPT2,
    Bert,
    BertConfig,
    CausalLM,
    GPT2Config,
    MaskedLM,
    SequenceClassifier,
    TextEmbedder,
    pipeline,
)
from kerasllm.checkpoints import convert
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


def test_generate_in_pieces_and_with_more_settings(folder, causal_lm, capsys):
    assert main(["generate", folder, "Once", "--max-new-tokens", "6", "--stream"]) == 0
    assert capsys.readouterr().out == f"Once{causal_lm.generate('Once', max_new_tokens=6)}\n"
    assert main(["generate", folder, "Once", "-n", "2", "--temperature", "1", "--stop", "a"]) == 0
    texts = causal_lm.generate("Once", n=2, temperature=1.0, stop_strings=["a"])
    assert capsys.readouterr().out == "".join(f"Once{text}\n" for text in texts)
    assert main(["generate", folder, "Once", "The", "--stream"]) == 1
    assert "one result of one prompt. Received: 2 prompts" in capsys.readouterr().err


def test_chat(folder, causal_lm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n"))
    assert main(["chat", folder, "--max-new-tokens", "5"]) == 0
    assert "no chat template" in capsys.readouterr().out
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    chatting = pathlib.Path(shutil.copytree(folder, tmp_path / "chat"))
    (chatting / "chat_template.jinja").write_text(template, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n"))
    assert main(["chat", str(chatting), "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == causal_lm.generate("Once ", max_new_tokens=5) + "\n"


class TestEncoders:
    @pytest.fixture(scope="class")
    def path(self, tmp_path_factory):
        """A BERT for masks."""
        config = BertConfig(vocabulary_size=26, num_layers=1, num_heads=2, dim=8, intermediate_dim=12)
        model = MaskedLM(randomize(Bert(config)), make_word_piece())
        return str(model.save_pretrained(tmp_path_factory.mktemp("bert")))

    def test_fill_mask(self, path, capsys):
        text = "the [MASK] sat on the mat."
        assert main(["fill-mask", path, text, "--top-k", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        candidates = pipeline("fill-mask", path)(text, top_k=2)[0]
        assert lines[0] == text
        for line, candidate in zip(lines[1:], candidates, strict=True):
            assert line.split()[:2] == [f"{candidate['score']:.4f}", candidate["token"]]
            assert line.endswith(candidate["sequence"])

    def test_embed(self, path, capsys, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO("the cat\na film\n"))
        assert main(["embed", path]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        vectors = pipeline("feature-extraction", path)(["the cat", "a film"])
        assert [line["text"] for line in lines] == ["the cat", "a film"]
        np.testing.assert_allclose([line["embedding"] for line in lines], vectors, atol=1e-6)
        assert main(["embed", path, "the cat", "a film", "--similarity"]) == 0
        cosines = np.array([row.split() for row in capsys.readouterr().out.splitlines()], float)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        np.testing.assert_allclose(cosines, unit @ unit.T, atol=1e-4)

    def test_classify(self, tmp_path, capsys):
        config = BertConfig(
            vocabulary_size=26,
            num_layers=1,
            num_heads=2,
            dim=8,
            intermediate_dim=12,
            labels=("bad", "good"),
        )
        model = SequenceClassifier(randomize(Bert(config, head="classifier")), make_word_piece())
        path = str(model.save_pretrained(tmp_path))
        assert main(["classify", path, "a nice film", "awful"]) == 0
        best = [labels[0] for labels in model.classify(["a nice film", "awful"])]
        expected = [f"{b['label']} {b['score']:.4f}" for b in best]
        printed = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[0] for line in printed] == expected
        assert [line.split("  ")[1] for line in printed] == ["a nice film", "awful"]
        long = "a nice film " * config.context_length
        assert main(["classify", path, long, "--top-k", "2"]) == 1
        assert "context" in capsys.readouterr().err
        assert main(["classify", path, long, "--top-k", "2", "--max-length", "5"]) == 0
        labels = model.classify(long, max_length=5)
        expected = [f"{label['label']} {label['score']:.4f}" for label in labels]
        assert capsys.readouterr().out.split("  ")[:2] == expected
        classify = pipeline("text-classification", path)
        assert classify(long, max_length=5) == labels

    def test_a_model_for_another_task(self, path, capsys):
        assert main(["generate", path, "the"]) == 1
        message = "must be for text-generation or text2text-generation"
        assert message in capsys.readouterr().err


def test_convert(folder, causal_lm, tmp_path, capsys):
    assert main(["convert", folder, str(tmp_path / "new"), "--dtype", "bfloat16"]) == 0
    assert str(tmp_path / "new") in capsys.readouterr().out
    half = CausalLM.from_pretrained(tmp_path / "new")
    for mine, theirs in zip(half.model.weights, causal_lm.model.weights, strict=True):
        np.testing.assert_array_equal(mine, tf.cast(tf.cast(theirs, "bfloat16"), "float32"))


def test_convert_keeps_what_an_embedder_is(tokenizer, tmp_path, capsys):
    config = GPT2Config(vocabulary_size=400, context_length=16, num_layers=1, num_heads=2, dim=8)
    embedder = TextEmbedder(GPT2(config, head=None), tokenizer, "last", normalize=True, max_length=9)
    embedder.save_pretrained(tmp_path / "old")
    assert main(["convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    assert str(tmp_path / "new") in capsys.readouterr().out
    new = TextEmbedder.from_pretrained(tmp_path / "new")
    assert (new.pooling, new.normalize, new.max_length) == ("last", True, 9)
    with pytest.raises(ValueError, match="more than its checkpoint"):
        convert(tmp_path / "old", tmp_path / "other")


def test_a_file_of_another_task(tokenizer, tmp_path, capsys):
    config = GPT2Config(vocabulary_size=400, context_length=16, num_layers=1, num_heads=2, dim=8)
    path = tmp_path / "embedder.keras"
    TextEmbedder(GPT2(config, head=None), tokenizer).save(path)
    assert main(["generate", str(path), "hi"]) == 1
    assert "must hold a task for text-generation" in capsys.readouterr().err


def test_pipeline_says_what_it_needs(causal_lm):
    with pytest.raises(ValueError, match="`dtype` is for a model to load"):
        pipeline("text-generation", causal_lm, dtype="bfloat16")
    assert pipeline("text-generation", causal_lm) == causal_lm.generate
    assert pipeline("chat", causal_lm) == causal_lm.chat
    with pytest.raises(ValueError, match="'fill-mask' needs a MaskedLM. Received: a CausalLM"):
        pipeline("fill-mask", causal_lm)
    with pytest.raises(ValueError, match="`task` must be one of .*Received: 'translate'"):
        pipeline("translate", causal_lm)


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
        (["generate", "nowhere", "a"], "There is none at: 'nowhere'"),
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
