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
WITH_A_REAL_MODEL = re.findall(r"```python no-run\n(.*?)```", README, re.DOTALL)
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


@pytest.mark.slow
def test_example_with_a_real_model_runs(tmp_path, monkeypatch, capsys):
    file = asset("smollm2")
    (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    (example,) = WITH_A_REAL_MODEL
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
