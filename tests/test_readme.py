"""The README's examples run, and its commands exist."""

import pathlib
import re
import shlex

import pytest
from reference.assets import asset

import kerasllm
from kerasllm.cli import _parser

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHOWN = re.findall(r"```python no-run\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^kerasllm (.*)$", README, re.MULTILINE)


def test_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    assert len(EXAMPLES) == 2
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)  # noqa: S102
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "dtype=string" in printed
    for path in (
        "model.keras",
        "model/config.json",
        "served/stories/1/saved_model.pb",
        "phone/model.tflite",
    ):
        assert (tmp_path / path).is_file()


def test_example_of_training_runs(tmp_path, monkeypatch, tokenizer, stories):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TF_CONFIG", raising=False)
    (example,) = (example for example in SHOWN if "make_strategy" in example)
    for size, small in (("1024, 64", "16, 4"), ("steps_per_epoch=1000, epochs=10", "steps_per_epoch=2")):
        assert size in example
        example = example.replace(size, small)
    config = kerasllm.LlamaConfig(
        vocabulary_size=400, context_length=16, num_layers=1, num_heads=2, dim=16, intermediate_dim=16
    )
    names = {"kerasllm": kerasllm, "config": config, "tokenizer": tokenizer, "texts": stories[:20]}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102
    assert names["saves"].steps() == [2]


def test_example_of_what_is_seen_runs(tmp_path, monkeypatch, causal_lm, stories):
    monkeypatch.chdir(tmp_path)
    (example,) = (example for example in SHOWN if "TensorBoardLog" in example)
    changes = (("rows, length = 32, 1024", "rows, length = 4, 16"), ("    1000,", "    2,"))
    for size, small in (
        *changes,
        ('time"], 500', 'time"], 1'),
        ("steps_per_epoch=1000", "steps_per_epoch=2"),
    ):
        assert size in example
        example = example.replace(size, small)
    model = kerasllm.CausalLM(kerasllm.GPT2(causal_lm.model.config), causal_lm.tokenizer)
    names = {"kerasllm": kerasllm, "model": model, "tokenizer": model.tokenizer, "texts": stories[:20]}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 of 2" in report and report.count("Once upon a time") == 2
    assert len((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.slow
def test_example_with_a_real_model_runs(tmp_path, monkeypatch, capsys):
    file = asset("smollm2")
    (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    (example,) = (example for example in SHOWN if "SmolLM2" in example)
    exec(compile(example, "README.md", "exec"), {"kerasllm": kerasllm})  # noqa: S102
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    parsed = _parser().parse_args(shlex.split(command))
    assert parsed.command == command.split()[0]


def test_first_commands_are_executable():
    root = pathlib.Path(__file__).parents[1]
    for command in ("tools/quickstart", "tools/test"):
        assert f"\n{command} " in README
        assert (root / command).stat().st_mode & 0o111
    assert "tools/test" in (root / ".ci" / "run").read_text()
