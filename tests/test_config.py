import pathlib

import pytest

from kerasllm.config import load_run_config
from kerasllm.models import MODELS

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def test_there_are_configs():
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_its_model_and_names_its_command(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# kerasllm train --config configs/{path.name}")
    run = load_run_config(path)
    model = MODELS[run.family](run.model)
    assert run.training.sequence_length <= run.model.context_length
    size = path.stem.split("_")[1]  # gpt_5m_pretrain
    # What is named is the size without the embeddings of a vocabulary that the config may change.
    million = (model.count_params() - run.model.dim * run.model.vocabulary_size) / 1e6
    vocabulary = (run.tokenizer.vocabulary_size or 100) * run.model.dim / 1e6
    assert round(million + vocabulary) == int(size.removesuffix("m"))


def test_overrides_go_before_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("output: here\nmodel: {num_layers: 3, dim: 64}\ntraining: {steps: 10}\nseed: 4\n")
    run = load_run_config(path, ["training.steps=20", "model.dim=32", "data.paths=[a, b]", "output=there"])
    assert (run.training.steps, run.model.dim, run.model.num_layers) == (20, 32, 3)
    assert (run.data.paths, run.output, run.seed) == (["a", "b"], "there", 4)
    assert run.tokenizer.kind == "byte_bpe"
    assert load_run_config(path, ["data.paths=moby.txt"]).data.paths == "moby.txt"


def test_without_a_file():
    assert load_run_config(None, ["output=x"]).output == "x"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("output: x\ntrainin: {steps: 3}\n", [], "trainin"),
        ("output: x\ntraining: {step: 3}\n", [], "step"),
        ("output: x\nmodel: {num_layer: 3}\n", [], "num_layer"),
        ("output: x\n", ["model.layers=3"], "layers"),
        ("seed: 1\n", ["out=x"], "Received: out"),
        ("output: x\n", ["training.step=3"], "Received: training.step"),
        ("output: x\n", ["model.vocabulary_size=3"], "Received: model.vocabulary_size"),
        ("output: x\ntraining: {steps: 0}\n", [], "`steps` must be at least 1"),
        ("output: x\ntraining: {steps: 10, validate_every: 3}\n", [], "must divide"),
        ("output: x\ndata: {validation_fraction: 1.5}\n", [], "between 0 and 1"),
        ("output: x\ntraining: {steps: many}\n", [], "many"),
        ("output: x\n", ["training.steps"], "key=value"),
        ("output: x\nfamily: gpt9\n", [], "gpt9"),
        ("output: x\ntokenizer: {kind: letters}\n", [], "letters"),
        ("output: [x\n", [], "YAML"),
        ("- x\n", [], "mapping"),
        ("seed: 1\n", [], "output"),
    ],
)
def test_bad_settings_are_refused(tmp_path, text, overrides, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_run_config(path, overrides)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        load_run_config("none.yaml")


def test_yaml_runs_nothing(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"output: !!python/object/apply:pathlib.Path.touch ['{tmp_path}/touched']\n")
    with pytest.raises(ValueError, match="YAML"):
        load_run_config(path)
    assert not (tmp_path / "touched").exists()
