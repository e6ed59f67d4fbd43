import json
import subprocess
import sys

import pytest

from kerasllm.cli import main
from kerasllm.quickstart import PROMPT_TOKENS, Stop, choose_prompts, compare, next_version, run_quickstart


@pytest.fixture(scope="module")
def text(tmp_path_factory, stories):
    path = tmp_path_factory.mktemp("texts") / "stories.txt"
    path.write_text("\n\n".join(stories), encoding="utf-8")
    return path


@pytest.mark.slow  # continuous integration runs tools/quickstart itself
@pytest.mark.timeout(600)
def test_every_stop_gives_the_same_tokens(tmp_path, text, capsys):
    """The whole main job, with a training of a few steps, on a text of the user's."""
    assert run_quickstart(tmp_path, [str(text)], steps=6)
    printed = capsys.readouterr().out
    for words in (
        "unigram",
        "bigram",
        "this GPT",
        "gRPC",
        "REST",
        "LiteRT",
        "All stops agree",
        "kerasllm serve",
    ):
        assert words in printed
    files = [f"model/1/{name}" for name in ("loss.png", "training.jsonl", "config.json")]
    files += ["served/quickstart/1/saved_model.pb"]
    files += ["litert/1/model.tflite", "litert/1/tokenizer.json", "server.log"]
    for file in files:
        assert (tmp_path / file).is_file(), file
    assert len((tmp_path / "model/1/training.jsonl").read_text().splitlines()) == 6 + 1


def answers(*ids):
    return [(str(row), row) for row in ids]


def test_stops_that_say_nothing_do_not_agree():
    silent = Stop("Python", answers([], []), None)
    assert not compare([silent, silent])[1]


def test_a_stop_that_differs_is_seen():
    live = Stop("Python", answers([1, 2], [3]), answers([4], [5]))
    table, equal = compare(
        [live, Stop("same", live.greedy, None), Stop("bare", [("[1, 2]", None), ("[3]", None)], None)]
    )
    assert equal and table.row_count == 6
    different = [
        Stop("greedy ids", answers([1, 9], [3]), None),
        Stop("sampled", live.greedy, answers([4], [6])),
        Stop("text", [("[1, 2]", None), ("[4]", None)], None),
        Stop("too few", answers([1, 2]), None),
        Stop("text but not ids", [("[1, 2]", [1, 2]), ("[3]", [3, 0])], None),
    ]
    for stop in different:
        assert not compare([live, stop])[1], stop.name


def test_prompts(tokenizer):
    documents = [f"Story {n} is about a long walk through the town and the hills." for n in range(9)]
    many = choose_prompts(documents, tokenizer)
    assert len(many) == 4 and len(set(map(len, many))) == 4
    assert all(not prompt.endswith(" ") for prompt in many)
    one = choose_prompts(["word " * 500], tokenizer)
    assert len(one) == 4 and all(one)
    rare = choose_prompts(["\u6f22\u5b57\u304b\u306a" * 100] * 4, tokenizer)
    assert max(len(tokenizer.encode(prompt)) for prompt in rare) <= PROMPT_TOKENS


def test_versions_count_up(tmp_path):
    assert next_version(tmp_path) == 1
    for name in ("2", "10", "x"):
        (tmp_path / name).mkdir()
    assert next_version(tmp_path) == 11


def test_command_fails_clearly_on_bad_text(tmp_path, capsys):
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01\xff" * 100)
    (tmp_path / "empty.txt").write_text("")
    for name in ("binary.txt", "empty.txt", "none.txt"):
        arguments = ["quickstart", "--data", str(tmp_path / name), "--steps", "1"]
        arguments += ["--out", str(tmp_path / "out")]
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "kerasllm quickstart: error:" in error and name in error
        assert "Traceback" not in error
    # As a process of its own, and so with the code that a shell sees.
    command = [sys.executable, "-m", "kerasllm.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, error.splitlines()[-1])


def test_request_values_are_json(text):
    from kerasllm.quickstart import SAMPLING, request

    json.dumps({name: value.tolist() for name, value in request(["a", "b"], SAMPLING).items()})
