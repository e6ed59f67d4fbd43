import dataclasses
import json

import numpy as np
import pytest

from kerasllm.config import load_run_config
from kerasllm.export.gptq import is_of_4_bits
from kerasllm.tasks import CausalLM, MaskedLM, Seq2SeqLM, SequenceClassifier
from kerasllm.tasks.train import train, train_to_folder
from kerasllm.training import TrainingProgress, training_flops

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
    "logging.prompts=[]",
]
# What a small model of each family needs besides.
FAMILIES = {
    "gpt2": [],
    "llama": ["model.intermediate_dim=64", "objective.packing=segments"],
    "bert": ["model.intermediate_dim=64", "objective.whole_words=true"],
    "t5": ["model.intermediate_dim=64", "model.head_dim=16", "objective.mean_span_length=2"],
}


def settings_of(family):
    known = "model.dropout=0.0" if family != "llama" else "model.attention_dropout=0.0"
    return [known if each == "model.dropout=0.0" else each for each in SMALL] + [
        f"family={family}",
        *FAMILIES[family],
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
    files = ("config.json", "model.safetensors", "tokenizer.json")
    for name in (*files, "training.jsonl", "loss.png", "report.html"):
        assert (tmp_path / "run" / name).is_file()
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    loaded = CausalLM.load(tmp_path / "run")
    assert loaded.generate("The", max_new_tokens=4) == result.model.generate("The", max_new_tokens=4)
    with pytest.raises(FileExistsError, match="never overwrites a model"):
        train_to_folder(run)


@pytest.mark.parametrize(
    ("family", "task", "prompts"),
    [
        ("llama", CausalLM, "null"),
        ("bert", MaskedLM, '["The little [MASK] ran."]'),
        ("t5", Seq2SeqLM, "null"),
    ],
)
def test_each_family_learns_what_it_is_for(tmp_path, family, task, prompts):
    settings = [*settings_of(family), "training.steps=30", f"output={tmp_path / 'run'}"]
    settings += [f"logging.prompts={prompts}", "logging.sample_tokens=4", "logging.peak_flops=1e12"]
    result = train_to_folder(load_run_config(None, settings))
    losses = [loss for _, loss in result.progress.train_losses]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert bool(result.baselines) == (family == "llama")
    loaded = task.load(tmp_path / "run")
    network = loaded.model
    for one, two in zip(network.weights, result.model.model.weights, strict=True):
        assert (one.numpy() == two.numpy()).all()
    samples = result.progress.samples
    assert {step for step, _, _ in samples} == {30}
    throughput = result.progress.throughput
    if family == "bert":
        assert len(samples) == 1 and len(samples[0][2].split(", ")) >= 5
        assert loaded.fill_mask(samples[0][1], top_k=1)[0][0]["token"] == samples[0][2].split(", ")[0]
        # Documents fill rows, and what fills a row up is no token.
        assert 8 * 16 < throughput.tokens_per_step < 8 * 32
        assert throughput.flops_per_step == 8 * training_flops(network, 32)
    else:
        assert len(samples) == 3
    if family == "t5":
        assert all("<extra_id_0>" in prompt for _, prompt, _ in samples)
        # Of 32 tokens 5 in 2 spans: 27 + 2 + 1 in the source, 5 + 2 + 1 in the target.
        assert throughput.tokens_per_step == 8 * (30 + 8)
        assert throughput.flops_per_step == 8 * training_flops(network, 8, 30)


COLOURS = {"red": "fire", "green": "grass", "blue": "water", "grey": "ash"}


def write_records(path, *names):
    """Lines of which the second text follows from the first one."""
    lines = []
    for number in range(200):
        colour = list(COLOURS)[number % 4]
        text = f"The {('cat', 'dog', 'fox')[number % 3]} number {number} is {colour}"
        second = {"completion": f" {COLOURS[colour]}, they say.", "label": colour}[names[1]]
        lines.append(json.dumps({names[0]: text, names[1]: second}))
    path.write_text("\n".join(lines), encoding="utf-8")


def test_completions_of_prompts_are_learnt(tmp_path):
    write_records(tmp_path / "pairs.jsonl", "prompt", "completion")
    settings = [*SMALL, f"data.paths=[{tmp_path}]", f"output={tmp_path / 'run'}", "logging.prompts=null"]
    settings += ["objective.kind=prefix_lm", "training.sequence_length=31", "tokenizer.kind=word"]
    result = train_to_folder(load_run_config(None, settings))
    assert result.perplexity < 1.1  # all of it follows from the prompt, whose numbers nobody could guess
    model = CausalLM.load(tmp_path / "run")
    for prompt, completion in result.validation[:3]:
        assert model.generate(prompt, 10, temperature=0.0).strip() == completion.strip()
    samples = [prompt for _, prompt, _ in result.progress.samples[-3:]]
    assert samples == [prompt for prompt, _ in result.validation[:3]]
    # Six tokens of a prompt and five of a completion are read; what fills rows up is none.
    assert result.progress.throughput.tokens_per_step == 8 * (6 + 5)


def test_labels_of_texts_are_learnt(tmp_path):
    write_records(tmp_path / "texts.jsonl", "text", "label")
    settings = [*settings_of("bert"), f"data.paths=[{tmp_path}]", f"output={tmp_path / 'run'}"]
    settings = [each for each in settings if "whole_words" not in each and "prompts" not in each]
    settings += ["objective.kind=classification", "tokenizer.vocabulary_size=200"]
    settings += ["training.steps=150", "training.validate_every=150", "training.learning_rate=0.003"]
    result = train_to_folder(load_run_config(None, settings))
    model = SequenceClassifier.load(tmp_path / "run")
    assert model.model.config.labels == tuple(sorted(COLOURS))
    texts, labels = zip(*result.validation, strict=True)
    found = [best["label"] for (best,) in model.classify(list(texts), top_k=1)]
    assert np.mean(np.array(found) == labels) > 0.9
    assert {text for _, text, _ in result.progress.samples} <= set(texts)
    assert all(", " in scores for _, _, scores in result.progress.samples)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    "family",
    ["gpt2", pytest.param("bert", marks=pytest.mark.slow), pytest.param("t5", marks=pytest.mark.slow)],
)
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, family):
    settings = [*settings_of(family), "training.steps=8", "training.validate_every=4"]
    settings.append("training.save_every=1")

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
    assert ">interrupted<" in (tmp_path / "stopped" / "report.html").read_text()
    with pytest.raises(ValueError, match=r"goes on with the settings .* Received other.*\['seed'\]"):
        train_to_folder(run_in("stopped", "seed=3"))
    resumed = train_to_folder(run_in("stopped", "logging.peak_flops=1e12"))  # that may be another
    assert ">interrupted<" not in (tmp_path / "stopped" / "report.html").read_text()
    ours, theirs = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "straight")
    )
    assert ours == theirs
    for ours, wanted in zip(resumed.progress.train_losses, straight.progress.train_losses, strict=True):
        assert ours == pytest.approx(wanted, rel=1e-4)
    for name in ("learning_rate", "gradient_norm", "skipped_updates"):
        curves = resumed.progress.curves[name], straight.progress.curves[name]
        assert len(curves[0]) == 8
        assert np.array(curves[0]) == pytest.approx(np.array(curves[1]), rel=1e-4)
    assert resumed.progress.validation_losses == straight.progress.validation_losses
    lines = [
        json.loads(line) for line in (tmp_path / "stopped" / "training.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_another_seed_another_run(result):
    """That the same seed gives the same run is seen where one is interrupted."""
    short = [*SMALL, "training.steps=1", "training.validate_every=1", "seed=2"]
    ((_, other),) = train(load_run_config(None, short)).progress.train_losses
    assert other != result.progress.train_losses[0][1]


def test_trains_on_files(tmp_path, stories):
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(stories), encoding="utf-8")
    settings = [*SMALL, f"data.paths=[{tmp_path}]", "training.steps=3", "tokenizer.kind=character"]
    settings.append("tokenizer.vocabulary_size=null")
    result = train(load_run_config(None, settings))
    assert result.model.tokenizer.vocabulary_size == len(set("".join(stories))) + 2


@pytest.mark.parametrize(
    ("family", "prompt", "message"),
    [
        ("gpt2", "a " * 40, "fewer than the context"),
        ("bert", "no mask", r"must have the mask token '\[MASK\]'"),
    ],
)
def test_prompts_that_do_not_serve(family, prompt, message):
    run = load_run_config(None, settings_of(family))
    logging = dataclasses.replace(run.logging, prompts=[prompt])
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(run, logging=logging))


def test_settings_that_contradict_each_other():
    run = load_run_config(None, SMALL)
    long = dataclasses.replace(run.training, sequence_length=64)
    with pytest.raises(ValueError, match="64 and 32"):
        train(dataclasses.replace(run, training=long))
    with pytest.raises(ValueError, match="validate_every=25, steps=60"):
        dataclasses.replace(run.training, validate_every=25)


def test_a_run_for_4_bits_writes_what_was_validated(tmp_path):
    settings = ["training.steps=4", "training.validate_every=4", "training.quantization_aware=int4"]
    run = load_run_config(None, [*settings_of("llama"), *settings, f"output={tmp_path}"])
    result = train_to_folder(run)
    model = CausalLM.from_pretrained(tmp_path)
    assert is_of_4_bits(model.model)
    # The table's rows have 8 bits.
    table = model.model.token_embedding.embeddings.numpy()
    steps = table / (np.abs(table).max(-1, keepdims=True) / 127)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    logged = json.loads((tmp_path / "run.json").read_text())
    assert logged["training"]["quantization_aware"] == "int4"
    again = model.evaluate(result.validation, sequence_length=32, batch_size=8, verbose=0)
    assert again["perplexity"] == pytest.approx(result.perplexity, rel=1e-2)  # of windows, not segments


def test_only_objectives_that_continue_texts_are_trained_for_rounded_weights():
    with pytest.raises(ValueError, match="Received: 'int8' with the objective 'masked_lm'"):
        load_run_config(None, [*settings_of("bert"), "training.quantization_aware=int8"])
