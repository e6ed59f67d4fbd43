import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf
from keras import ops

from kerasllm import GPT2, CausalLM, GPT2Config, MaskedLM, Seq2SeqLM, SequenceClassifier, train_tokenizer
from kerasllm.models import T5, Bert, BertConfig, T5Config
from kerasllm.training import AdamW, Checkpoints, cosine_schedule


def make_model(dtype=None, optimizer=None, quantization_aware=None, **changes):
    keras.utils.set_random_seed(0)
    sizes = {"vocabulary_size": 20, "context_length": 6, "num_layers": 1, "num_heads": 2, "dim": 8}
    model = CausalLM(GPT2(GPT2Config(**{**sizes, "dropout": 0.2, **changes}), dtype=dtype))
    # Eager, for tracing costs more than these few steps.
    options = {"quantization_aware": quantization_aware, "run_eagerly": True}
    model.compile(optimizer or AdamW(cosine_schedule(1e-2, 20, 2)), **options)
    return model


def make_batches(count=4):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, (2 * count, 7)).astype("int32")
    weights = (rng.random((2 * count, 6)) < 0.8).astype("float32")
    return tf.data.Dataset.from_tensor_slices((ids[:, :-1], ids[:, 1:], weights)).batch(2)


class StopAfter(keras.callbacks.Callback):
    """Ends a training as a kill would: nothing is called after it."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_train_batch_end(self, batch, logs=None):
        self.batches -= 1
        if not self.batches:
            raise KeyboardInterrupt


def state(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [ops.convert_to_numpy(variable) for variable in variables]


# In the middle of an epoch and at its end; epochs that are passes over the data, and parts of one pass.
@pytest.mark.parametrize(
    ("stop", "is_stream", "options"),
    [
        (3, False, {}),
        (6, True, {"quantization_aware": "int8"}),
        (4, False, {"dtype": "mixed_float16"}),
    ],
)
def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(tmp_path, stop, is_stream, options):
    batches = make_batches(12 if is_stream else 4)
    epochs = {"epochs": 3, "steps_per_epoch": 4 if is_stream else None}
    kwargs = {**epochs, "validation_data": make_batches(2), "verbose": 0}
    straight = make_model(**options)
    history = straight.fit(batches, **kwargs).history

    with pytest.raises(KeyboardInterrupt):
        make_model(**options).fit(batches, callbacks=[Checkpoints(tmp_path, 1), StopAfter(stop)], **kwargs)
    resumed = make_model(**options)
    checkpoints = Checkpoints(tmp_path, every_steps=1, keep=100)
    got = resumed.fit(batches, callbacks=[checkpoints], **kwargs).history
    for ours, theirs in zip(state(resumed), state(straight), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for name, values in got.items():  # of the epochs that were run here, the interrupted one as a whole
        np.testing.assert_array_equal(values, history[name][-len(values) :])
    assert not resumed.fit(batches, callbacks=[Checkpoints(tmp_path, 1)], **kwargs).history  # all is done
    # The save at the end of an epoch is that after the validation, and the next epoch's beginning.
    positions = [checkpoints.restore(resumed, step) for step in checkpoints.steps()]
    assert all(position.step == 4 * position.epoch + position.batch for position in positions)
    assert all(position.batch < 4 for position in positions)


def test_averages_of_the_weights_are_taken_once(tmp_path):
    """`fit` ends by putting them in the weights' place, and a resumed training is two calls of it."""

    def make():
        return make_model(optimizer=AdamW(1e-2, use_ema=True, ema_momentum=0.5))

    straight = make()
    straight.fit(make_batches(), epochs=2, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        make().fit(make_batches(), epochs=2, callbacks=[Checkpoints(tmp_path, 1), StopAfter(2)], verbose=0)
    resumed = make()
    resumed.fit(make_batches(), epochs=2, callbacks=[Checkpoints(tmp_path, 1)], verbose=0)
    for ours, theirs in zip(state(resumed), state(straight), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_last_ones_and_the_best_stay(tmp_path):
    model = make_model(optimizer=AdamW(0.3))  # too fast: the validation gets worse
    checkpoints = Checkpoints(tmp_path, every_steps=2, keep=2)
    history = model.fit(
        make_batches(), epochs=5, validation_data=make_batches(1), callbacks=[checkpoints], verbose=0
    ).history
    best = 4 * (1 + int(np.argmin(history["val_loss"])))
    assert checkpoints.best_step() == best
    assert checkpoints.steps() == sorted({best, 18, 20})
    model.fit(make_batches(), epochs=1, verbose=0)
    assert checkpoints.restore(model, best).epoch == best // 4
    assert model.evaluate(make_batches(1), verbose=0)["loss"] == min(history["val_loss"])


def test_sigterm_saves_and_exits_with_0(tmp_path):
    code = f"""
import signal, sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_checkpoint import *
class Terminate(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
make_model().fit(make_batches(), callbacks=[Terminate(), Checkpoints({str(tmp_path)!r})], verbose=0)
sys.exit("went on")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    position = Checkpoints(tmp_path).restore(make_model())
    assert position == (3, 0, 3)


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, monkeypatch):
    model, checkpoints = make_model(), Checkpoints(tmp_path, every_steps=2)
    real, calls = safetensors.numpy.save_file, []

    def fail_at_second(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.numpy, "save_file", fail_at_second)
    with pytest.raises(OSError, match=r"could not be written .* are whole: \[2\].*No space left"):
        model.fit(make_batches(), epochs=3, callbacks=[checkpoints], verbose=0)
    assert os.listdir(tmp_path) == ["step-00000002.safetensors"]
    assert checkpoints.restore(make_model()) == (2, 0, 2)


def test_a_loss_that_is_no_number_replaces_no_save(tmp_path):
    good, checkpoints = make_batches(), Checkpoints(tmp_path, every_steps=1, keep=1)
    bad = good.map(lambda ids, labels, weights: (ids, labels, weights * np.nan))
    with pytest.raises(ValueError, match=r"The loss must be a number. Received: nan by step 5; .* \[4\]"):
        make_model().fit(good.concatenate(bad), epochs=2, callbacks=[checkpoints], verbose=0)
    assert checkpoints.steps() == [4]
    guarded = make_model(optimizer=AdamW(1e-2, skip_above=np.inf))
    guarded.fit(good.concatenate(bad), callbacks=[Checkpoints(tmp_path / "other")], verbose=0)
    assert all(np.isfinite(ops.convert_to_numpy(weight)).all() for weight in guarded.weights)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    model = make_model()
    model.fit(make_batches(), callbacks=[checkpoints := Checkpoints(tmp_path)], verbose=0)
    path = checkpoints.path(4)
    content = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"the model must have the same variables.*\[20, 8\] there, .*\[21, 8\] here"
    ):
        checkpoints.restore(make_model(vocabulary_size=21))
    with pytest.raises(ValueError, match="the optimizer must have the same variables"):
        checkpoints.restore(make_model(optimizer=keras.optimizers.SGD(0.1)))
    for damaged in (content[:100], content[:-10], b"", b"\xff" * 200):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="delete it to go on from the one before"):
            checkpoints.restore(model)
    safetensors.numpy.save_file({"a": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="must have the format"):
        checkpoints.restore(model)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint after step 7. There are: \[4\]"):
        checkpoints.restore(model, 7)


@pytest.mark.parametrize("change", [{"every_steps": 0}, {"keep": 0}])
def test_arguments_out_of_range_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match="must be"):
        Checkpoints(tmp_path, **change)


def test_best_is_readable(tmp_path):
    model = make_model()
    model.fit(make_batches(), validation_data=make_batches(1), callbacks=[Checkpoints(tmp_path)], verbose=0)
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["step"] == 4 and best["monitor"] == "val_loss" and best["value"] > 0


def make_task(name, tokenizer):
    """A task, its texts in 3 batches of 3, and what else `fit` takes."""
    keras.utils.set_random_seed(0)
    sizes = {"vocabulary_size": 20, "context_length": 8, "num_layers": 1, "num_heads": 1, "dim": 8}
    sizes["dropout"] = 0.0  # only the order follows from the seed
    words = [str(number % 10) for number in range(100)]
    texts = [" ".join(words[number : number + 6]) for number in range(7)]
    if name == "causal_lm":
        return CausalLM(GPT2(GPT2Config(**sizes)), tokenizer), (texts,), {"sequence_length": 6}
    if name == "seq2seq_lm":
        network = T5(T5Config(**sizes, intermediate_dim=8, head_dim=8))
        return Seq2SeqLM(network, tokenizer), (list(zip(texts, texts[::-1], strict=True)),), {}
    config = BertConfig(**sizes, intermediate_dim=8, attention_dropout=0.0)
    if name == "masked_lm":
        return MaskedLM(Bert(config), tokenizer), (texts,), {"mask_rate": 0.5}
    labels = [number % 2 for number in range(7)]
    return SequenceClassifier(Bert(config, "classifier"), tokenizer), (texts, labels), {}


def train_task(name, folder, *callbacks, seed=3, **more):
    words = [str(number) for number in range(10)]
    tokenizer = train_tokenizer("wordpiece" if name == "masked_lm" else "word", [" ".join(words)], None)
    model, data, options = make_task(name, tokenizer)
    model.compile(AdamW(1e-2), seed=seed, run_eagerly=True, jit_compile=False)
    callbacks = [Checkpoints(folder, every_steps=1), *callbacks]
    options = {"batch_size": 3, "epochs": 2, "verbose": 0, **options, **more}
    history = model.fit(*data, callbacks=callbacks, **options).history["loss"]
    return model, history, callbacks[0].position


# Orders, and what is hidden, follow from the seed and the epoch.
@pytest.mark.parametrize("name", ["causal_lm", "masked_lm", "seq2seq_lm", "sequence_classifier"])
def test_texts_come_in_the_order_of_the_uninterrupted_run(tmp_path, name):
    straight, losses, position = train_task(name, tmp_path / "straight")
    assert position.epoch == 2 and position.step == 6
    assert losses[0] != losses[1]
    with pytest.raises(KeyboardInterrupt):
        train_task(name, tmp_path / "stopped", StopAfter(5))
    resumed, got, _ = train_task(name, tmp_path / "stopped")
    assert got == losses[1:]
    for ours, theirs in zip(state(resumed), state(straight), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert train_task(name, tmp_path / "other", seed=4, epochs=1)[1] != losses[:1]


# How epochs are counted is the same for all.
@pytest.mark.parametrize(
    "name",
    [
        "masked_lm",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("causal_lm", "seq2seq_lm", "sequence_classifier")
        ),
    ],
)
def test_epochs_that_are_no_passes(tmp_path, name):
    stretches = {"steps_per_epoch": 2, "epochs": 4}
    with pytest.raises(KeyboardInterrupt):
        train_task(name, tmp_path / "stopped", StopAfter(5), **stretches)
    resumed, *_, position = train_task(name, tmp_path / "stopped", **stretches)
    straight, *_ = train_task(name, tmp_path / "straight", **stretches)
    assert position == (8, 4, 0)
    for ours, theirs in zip(state(resumed), state(straight), strict=True):
        np.testing.assert_array_equal(ours, theirs)
