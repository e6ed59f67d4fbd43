"""What a model writes while it is trained."""

import json

import pytest

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.training import Samples, TensorBoardLog, TrainingProgress


def make_model(tokenizer):
    config = GPT2Config(vocabulary_size=400, context_length=16, num_layers=1, num_heads=2, dim=8)
    model = CausalLM(GPT2(config), tokenizer)
    model.compile(jit_compile=False)
    return model


def test_they_are_shown_and_kept_everywhere(tmp_path, tokenizer, stories, capfd):
    progress = TrainingProgress(5, 16, tmp_path / "log.jsonl", report_path=tmp_path / "report.html")
    board = TensorBoardLog(tmp_path / "board")

    def write(model, prompts):
        return [f"<b>{prompt}[/i]" for prompt in prompts]

    samples = Samples(["One", "Two & two"], 2, write, progress=progress, tensorboard=board)
    make_model(tokenizer).fit(
        stories[:9], batch_size=2, steps_per_epoch=5, callbacks=[progress, board, samples], verbose=0
    )
    assert [step for step, _, _ in samples.samples] == [2, 2, 4, 4]
    assert samples.samples[1] == (2, "Two & two", "<b>Two & two[/i]")
    assert progress.samples == samples.samples
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (first, _) = (line for line in lines if "samples" in line)
    assert first["samples"][0] == {"prompt": "One", "text": "<b>One[/i]"}
    report = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;Two &amp; two[/i]" in report and "<b>" not in report
    assert "step 4: Two & two → <b>Two & two[/i]" in capfd.readouterr().err
    (events,) = (tmp_path / "board").iterdir()
    assert events.read_bytes().count(b"sample/1") == 2


def test_in_plain_fit_the_model_generates_at_the_end_of_an_epoch(tokenizer, stories):
    model = make_model(tokenizer)
    samples = Samples(["The", "A dog"], max_new_tokens=3, temperature=0.0)
    model.fit(stories[:9], batch_size=2, steps_per_epoch=2, epochs=2, callbacks=[samples], verbose=0)
    assert [step for step, _, _ in samples.samples] == [2, 2, 4, 4]
    texts = model.generate(["The", "A dog"], 3, temperature=0.0)
    assert [text for _, _, text in samples.samples[2:]] == texts


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="must be a list of texts"):
        Samples("one")
    with pytest.raises(ValueError, match="must be a list of texts"):
        Samples([])
    with pytest.raises(ValueError, match="Received: 0"):
        Samples(["a"], 0)
    with pytest.raises(ValueError, match=r"not for `write`. Received: \['seed'\]"):
        Samples(["a"], write=print, seed=1)
