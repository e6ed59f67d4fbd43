import json

import pytest

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.training import TrainingProgress


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer, stories):
    folder = tmp_path_factory.mktemp("run")
    config = GPT2Config(vocabulary_size=400, context_length=16, num_layers=1, num_heads=2, dim=8)
    progress = TrainingProgress(8, 16, folder / "log.jsonl")
    model = CausalLM(GPT2(config), tokenizer)
    history = model.fit(
        stories[:8],
        batch_size=2,
        epochs=2,
        steps_per_epoch=4,
        validation_data=stories[8:12],
        callbacks=[progress],
        verbose=0,
    )
    return folder, progress, history


def test_losses_are_those_of_the_steps(run):
    _, progress, history = run
    assert [step for step, _ in progress.train_losses] == list(range(1, 9))
    losses = [loss for _, loss in progress.train_losses]
    # Keras reports the mean over an epoch; every batch here has the same number of tokens.
    assert sum(losses[4:]) / 4 == pytest.approx(history.history["loss"][1], rel=1e-4)
    assert [step for step, _ in progress.validation_losses] == [4, 8]
    assert progress.validation_losses[1][1] == pytest.approx(history.history["val_loss"][1])


def test_log_is_json_lines(run):
    folder, progress, _ = run
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [x for _, x in progress.train_losses]
    assert sum("validation_perplexity" in line for line in lines) == 2


def test_plot_is_a_picture_with_the_curves(run):
    folder, progress, _ = run
    path = progress.plot(folder / "loss.png", {"bigram": 3.0})
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_says_how_far_it_is_without_a_terminal(run, capfd, tokenizer, stories):
    config = GPT2Config(vocabulary_size=400, context_length=16, num_layers=1, num_heads=2, dim=8)
    model = CausalLM(GPT2(config), tokenizer)
    progress = TrainingProgress(6, 32)
    model.fit(stories[:8], batch_size=2, steps_per_epoch=6, callbacks=[progress], verbose=0)
    error = capfd.readouterr().err
    assert "step 6/6" in error and "tokens/s" in error and "s left" in error
