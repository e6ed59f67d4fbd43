import dataclasses
import pathlib

import keras
import pytest
from keras.src.backend.common import global_state

from kerasllm.config import load_run_config
from kerasllm.models import MODELS

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").rglob("*.yaml"))


def test_there_are_configs():
    assert len(CONFIGS) >= 3


def count_params(run) -> int:
    """The weights of a run's model, from their shapes: nothing is allocated."""
    config = dataclasses.replace(run.model, vocabulary_size=run.tokenizer.vocabulary_size or 100)
    try:
        with keras.StatelessScope(initialize_variables=False):
            return MODELS[run.family](config).count_params()
    finally:  # or Keras would make these weights later
        global_state.set_global_attribute("uninitialized_variables", [])


def test_counting_from_shapes_is_counting_weights():
    run = load_run_config(None, ["output=x", "model.num_layers=1", "model.dim=24", "model.num_heads=2"])
    config = dataclasses.replace(run.model, vocabulary_size=run.tokenizer.vocabulary_size)
    assert count_params(run) == sum(weight.numpy().size for weight in MODELS[run.family](config).weights)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_its_model_and_names_its_command(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# kerasllm train --config configs/{path.name}")
    run = load_run_config(path)
    usual = path.stem.removesuffix("_pretrain")
    assert run.output == f"runs/{usual}" or "characters" in path.stem
    assert run.training.sequence_length <= run.model.context_length
    rows, parts = run.training.batch_size, run.training.microbatches
    assert rows % parts == 0
    name, size, *_ = path.stem.split("_")  # gpt_5m_pretrain
    assert run.family.startswith(name)
    assert abs(count_params(run) / 1e6 - int(size.removesuffix("m"))) < 1


def test_every_family_has_configs_of_several_sizes():
    for name, larger in (("gpt", 355), ("llama", 1100), ("bert", 110), ("t5", 223)):
        sizes = {int(path.stem.split("_")[1].removesuffix("m")) for path in CONFIGS if name in path.stem}
        assert {5, 30, larger} <= sizes, name


@pytest.mark.parametrize(
    ("family", "objective", "kind"),
    [
        ("gpt2", "causal_lm", "byte_bpe"),
        ("llama", "causal_lm", "byte_bpe"),
        ("bert", "masked_lm", "wordpiece"),
        ("t5", "span_corruption", "sentencepiece"),
    ],
)
def test_the_family_says_what_is_learnt(family, objective, kind):
    run = load_run_config(None, ["output=x", f"family={family}"])
    assert (run.objective_name, run.tokenizer.kind) == (objective, kind)
    settings = {
        "causal_lm": "packing=segments",
        "masked_lm": "whole_words=true",
        "span_corruption": "noise_rate=0.3",
    }
    for owner, setting in settings.items():
        overrides = ["output=x", f"family={family}", f"objective.{setting}"]
        if owner == objective:
            load_run_config(None, overrides)
            continue
        name = setting.partition("=")[0]
        with pytest.raises(ValueError, match=rf"is '{objective}', .* Received: \['{name}'\]"):
            load_run_config(None, overrides)
    with pytest.raises(ValueError, match=rf"objective '{objective}' must be one of \['{kind}'"):
        other = "byte_bpe" if kind != "byte_bpe" else "wordpiece"
        load_run_config(None, ["output=x", f"family={family}", f"tokenizer.kind={other}"])


def test_what_is_learnt_may_be_chosen():
    paths = ["output=x", "data.paths=records.jsonl"]
    run = load_run_config(None, [*paths, "objective.kind=prefix_lm", "objective.too_long=drop"])
    assert (run.head, run.fields, run.tokenizer.kind) == ("causal_lm", ("prompt", "completion"), "byte_bpe")
    run = load_run_config(None, [*paths, "objective.kind=classification", "family=bert"])
    assert (run.head, run.fields, run.tokenizer.kind) == ("classifier", ("text", "label"), "wordpiece")
    with pytest.raises(ValueError, match=r"'t5' must be one of \['span_corruption'\].*'classification'"):
        load_run_config(None, [*paths, "objective.kind=classification", "family=t5"])
    with pytest.raises(ValueError, match=r"needs `data.paths`: JSON lines with \['prompt', 'completion'\]"):
        load_run_config(None, ["output=x", "objective.kind=prefix_lm"])
    with pytest.raises(ValueError, match=r"is 'prefix_lm', .* Received: \['packing'\]"):
        load_run_config(None, [*paths, "objective.kind=prefix_lm", "objective.packing=segments"])
    shared = [*paths, "training.shard_optimizer=true"]
    assert load_run_config(None, shared).training.shard_optimizer
    with pytest.raises(ValueError, match="`shard_optimizer` is for adamw and lion"):
        load_run_config(None, [*shared, "training.optimizer=muon"])


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
        ("output: x\nobjective: {packing: boxes}\n", [], "boxes"),
        ("output: x\nlogging: {prompt: [a]}\n", [], "prompt"),
        ("output: x\n", ["logging.sample_every=0"], "`sample_every` must be at least 1"),
        ("output: x\n", ["logging.peak_flops=0"], "`peak_flops` must be above 0"),
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
