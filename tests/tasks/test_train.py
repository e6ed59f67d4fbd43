import dataclasses
import json

import pytest

from kerasllm.config import load_run_config
from kerasllm.tasks import CausalLM
from kerasllm.tasks.train import train, train_to_folder
from kerasllm.training import TrainingProgress

SMALL = [
    "output=unused",
    "model.context_length=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.dim=32",
    "model.dropout=0.0",
    "tokenizer.vocabulary_size=400",
    "data.stories=300",
    "training.steps=60",
    "training.batch_size=8",
    "training.sequence_length=32",
    "training.learning_rate=0.01",
    "training.validate_every=30",
    "training.jit_compile=false",
]


@pytest.fixture(scope="module")
def result():
    return train(load_run_config(None, SMALL))


def test_beats_the_unigram_baseline(result):
    assert result.perplexity < result.baselines["unigram"]
    assert result.baselines["bigram"] < result.baselines["unigram"]
    assert [step for step, _ in result.progress.validation_losses] == [30, 60]


def test_perplexity_is_that_of_evaluate(result):
    again = result.model.evaluate(result.validation, sequence_length=32, batch_size=8, verbose=0)
    assert again["perplexity"] == pytest.approx(result.perplexity, rel=1e-4)


def test_to_folder(tmp_path):
    settings = [*SMALL, "training.steps=2", f"output={tmp_path / 'run'}"]
    run = load_run_config(None, settings)
    result = train_to_folder(run)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "training.jsonl", "loss.png"):
        assert (tmp_path / "run" / name).is_file()
    loaded = CausalLM.load(tmp_path / "run")
    assert loaded.generate("The", max_new_tokens=4) == result.model.generate("The", max_new_tokens=4)
    with pytest.raises(FileExistsError, match="never overwrites a model"):
        train_to_folder(run)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    settings = [*SMALL, "training.steps=8", "training.validate_every=4", "training.save_every=1"]

    def run_in(name, *more):
        return load_run_config(None, [*settings, f"output={tmp_path / name}", *more])

    straight = train_to_folder(run_in("straight"))
    write = TrainingProgress._write

    def fail_after_6(self, **values):
        write(self, **values)
        if values["step"] == 6:
            raise Interrupted

    with monkeypatch.context() as context, pytest.raises(Interrupted):
        context.setattr(TrainingProgress, "_write", fail_after_6)
        train_to_folder(run_in("stopped"))
    with pytest.raises(ValueError, match=r"goes on with the settings .* Received other.*\['seed'\]"):
        train_to_folder(run_in("stopped", "seed=3"))
    resumed = train_to_folder(run_in("stopped"))
    ours, theirs = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "straight")
    )
    assert ours == theirs
    for ours, wanted in zip(resumed.progress.train_losses, straight.progress.train_losses, strict=True):
        assert ours == pytest.approx(wanted, rel=1e-5)
    assert resumed.progress.validation_losses == straight.progress.validation_losses
    lines = [
        json.loads(line) for line in (tmp_path / "stopped" / "training.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_same_seed_same_run():
    short = [*SMALL, "training.steps=3", "training.validate_every=3"]
    first, second, other = (
        train(load_run_config(None, [*short, f"seed={seed}"])).progress.train_losses for seed in (1, 1, 2)
    )
    assert first == second != other


def test_trains_on_files(tmp_path, stories):
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    settings = [*SMALL, f"data.paths=[{tmp_path}]", "training.steps=3", "tokenizer.kind=character"]
    settings.append("tokenizer.vocabulary_size=null")
    result = train(load_run_config(None, settings))
    assert result.model.tokenizer.vocabulary_size == len(set("".join(stories))) + 2


def test_settings_that_contradict_each_other():
    run = load_run_config(None, SMALL)
    long = dataclasses.replace(run.training, sequence_length=64)
    with pytest.raises(ValueError, match="64 and 32"):
        train(dataclasses.replace(run, training=long))
    with pytest.raises(ValueError, match="validate_every=25, steps=60"):
        dataclasses.replace(run.training, validate_every=25)
