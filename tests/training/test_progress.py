import contextlib
import io
import json
import math
import re

import keras
import pytest
from reference.small_training import CONFIG, Stop, make_batches, make_model

from kerasllm import GPT2, CausalLM
from kerasllm.training import AdamW, Checkpoints, TrainingProgress, cosine_schedule


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    progress = TrainingProgress(8, 16, folder / "log.jsonl", report_path=folder / "report.html")
    model = make_model()
    validation = make_batches().take(2)
    history = model.fit(
        make_batches(), epochs=2, steps_per_epoch=4, validation_data=validation, callbacks=[progress],
        verbose=0,
    )  # fmt: skip
    return folder, progress, history, model


def test_losses_are_those_of_the_steps(run):
    _, progress, history, _ = run
    assert [step for step, _ in progress.train_losses] == list(range(1, 9))
    losses = [loss for _, loss in progress.train_losses]
    # Keras reports the mean over an epoch; every batch here has the same number of tokens.
    assert sum(losses[4:]) / 4 == pytest.approx(history.history["loss"][1], rel=1e-4)
    again = make_model()
    for (inputs, labels, weights), loss in zip(make_batches(), losses[:2], strict=False):
        assert again.train_on_batch(inputs, labels, weights)[0] == pytest.approx(loss, rel=1e-5)
        again.reset_metrics()
    assert [step for step, _ in progress.validation_losses] == [4, 8]
    assert progress.validation_losses[1][1] == pytest.approx(history.history["val_loss"][1])


def test_the_log_has_what_the_optimizer_did(run):
    folder, progress, _, model = run
    lines = [line for line in lines_of(folder / "log.jsonl") if "loss" in line]
    schedule = cosine_schedule(1e-2, 20, 2)
    # The rate that an update was made with, not that of the next one.
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [float(schedule(i)) for i in range(8)]
    )
    assert lines[-1]["gradient_norm"] == pytest.approx(float(model.optimizer.gradient_norm))
    assert len({line["gradient_norm"] for line in lines}) == 8
    assert lines[0]["tokens_per_second"] is None  # the first step's time is the compiler's
    assert all(line["tokens_per_second"] > 0 for line in lines[1:])
    assert all(line["skipped_updates"] == 0 and "mfu" not in line for line in lines)
    assert progress.curves["gradient_norm"] == [(line["step"], line["gradient_norm"]) for line in lines]


def test_log_is_json_lines(run):
    folder, progress, *_ = run
    lines = lines_of(folder / "log.jsonl")
    assert [line["loss"] for line in lines if "loss" in line] == [x for _, x in progress.train_losses]
    assert sum("validation_perplexity" in line for line in lines) == 2


def test_plot_is_a_picture_with_the_curves(run):
    folder, progress, *_ = run
    path = progress.plot(folder / "loss.png", {"bigram": 3.0})
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


def test_says_how_far_it_is_without_a_terminal(capfd):
    progress = TrainingProgress(20, 16, flops_per_step=1e6, peak_flops=1e12)
    make_model().fit(make_batches(), steps_per_epoch=20, callbacks=[progress], verbose=0)
    error = capfd.readouterr().err
    told = re.findall(
        r"^step (\d+)/20 · loss [\d.]+ · [\d,]+ tokens/s · [\d.]+% of peak · \d+ s left", error, re.M
    )
    assert [int(step) for step in told] == list(range(2, 21, 2))


def test_updates_that_are_left_out_are_told_once_in_a_row(tmp_path, capfd):
    progress = TrainingProgress(10, 16, tmp_path / "log.jsonl", report_path=tmp_path / "report.html")
    model = make_model(skip_above=math.inf)
    model.fit(make_batches(spoilt=(2, 3, 6)), steps_per_epoch=10, callbacks=[progress], verbose=0)
    assert int(model.optimizer.skipped_updates) == 3
    told = re.findall(r"step (\d+): the update is left out", capfd.readouterr().err)
    assert told == ["3", "7"]
    lines = lines_of(tmp_path / "log.jsonl")
    assert [line["skipped_updates"] for line in lines] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
    assert lines[2]["gradient_norm"] is None and "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert 'updates left out</th><td class="text">3<' in (tmp_path / "report.html").read_text()


def test_a_loss_scale_that_leaves_out_is_told_too(capfd):
    keras.utils.set_random_seed(0)
    model = CausalLM(GPT2(CONFIG, dtype="mixed_float16"))
    model.compile(AdamW(1e-2), run_eagerly=True)
    progress = TrainingProgress(4, 16)
    model.fit(make_batches(spoilt=(1,)), steps_per_epoch=4, callbacks=[progress], verbose=0)
    assert [count for _, count in progress.curves["skipped_updates"]] == [0, 1, 1, 1]
    assert "step 2: the update is left out" in capfd.readouterr().err


def test_several_steps_per_execution_are_counted():
    model = make_model()
    model.compile(AdamW(cosine_schedule(1e-2, 20, 2)), steps_per_execution=4, jit_compile=False)
    progress = TrainingProgress(8, 16)
    history = model.fit(make_batches(), steps_per_epoch=8, callbacks=[progress], verbose=0)
    assert [step for step, _ in progress.train_losses] == [4, 8]
    mean = sum(loss for _, loss in progress.train_losses) / 2
    assert mean == pytest.approx(history.history["loss"][0], rel=1e-4)
    assert progress.throughput.tokens == 8 * 16


def test_an_interrupted_training_leaves_a_report_and_goes_on_in_its_log(tmp_path):
    def fit(*more):
        saves = Checkpoints(tmp_path / "saves", every_steps=2)
        progress = TrainingProgress(
            8, 16, tmp_path / "log.jsonl", saves, report_path=tmp_path / "report.html"
        )
        with contextlib.closing(progress):
            make_model(skip_above=math.inf).fit(
                make_batches(spoilt=(1,)), steps_per_epoch=8, callbacks=[saves, progress, *more], verbose=0
            )
        return progress

    with pytest.raises(KeyboardInterrupt):
        fit(Stop(5))
    report = (tmp_path / "report.html").read_text()
    assert "interrupted" in report and "5 of 8" in report
    progress = fit()
    report = (tmp_path / "report.html").read_text()
    assert "interrupted" not in report and "8 of 8" in report
    assert [line["step"] for line in lines_of(tmp_path / "log.jsonl")] == list(range(1, 9))
    assert [count for _, count in progress.curves["skipped_updates"]] == [0] + 7 * [1]
    assert len(progress.train_losses) == 8


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    progress = TrainingProgress(4, 16)
    progress.console = type(progress.console)(file=io.StringIO(), force_terminal=True, width=120)
    make_model().fit(make_batches(), steps_per_epoch=4, callbacks=[progress], verbose=0)
    shown = progress.console.file.getvalue()
    assert "4/4" in shown and "tokens/s" in shown and "0:00:00" in shown
