"""Files for TensorBoard, read back by TensorFlow."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.small_training import Stop, make_batches, make_model

from kerasllm.training import Checkpoints, TensorBoardLog, Throughput, TrainingProgress


def events_of(folder):
    """(step, name, value, plugin) of all points."""
    points = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                number = tf.make_ndarray(value.tensor).item()
                points.append((event.step, value.tag, number, value.metadata.plugin_data.plugin_name))
    return points


def test_scalars_are_those_of_the_log(tmp_path):
    board = TensorBoardLog(tmp_path, throughput=Throughput(16, 1e6, 1e12))
    progress = TrainingProgress(4, 16)
    make_model().fit(
        make_batches(),
        steps_per_epoch=4,
        validation_data=make_batches().take(2),
        callbacks=[progress, board],
        verbose=0,
    )
    points = events_of(tmp_path)
    assert {plugin for *_, plugin in points} == {"scalars"}
    for name in ("loss", "learning_rate", "gradient_norm", "skipped_updates"):
        curve = [(step, value) for step, tag, value, _ in points if tag == f"training/{name}"]
        assert np.array(curve) == pytest.approx(np.array(progress.curves[name]))
    for name in ("tokens_per_second", "mfu"):
        assert [step for step, tag, *_ in points if tag == f"training/{name}"] == [2, 3, 4]
    (loss,) = (value for _, tag, value, _ in points if tag == "validation/loss")
    assert loss == pytest.approx(progress.validation_losses[0][1])


def test_a_resumed_training_goes_on(tmp_path):
    def fit(*more):
        saves = Checkpoints(tmp_path / "saves", every_steps=2)
        board = TensorBoardLog(tmp_path / "board", saves)
        make_model().fit(make_batches(), steps_per_epoch=6, callbacks=[saves, board, *more], verbose=0)

    with pytest.raises(KeyboardInterrupt):
        fit(Stop(5))
    (path,) = (tmp_path / "board").iterdir()
    path.write_bytes(path.read_bytes()[:-3])  # as a kill may leave it
    fit()
    steps = [step for step, tag, *_ in events_of(tmp_path / "board") if tag == "training/loss"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_every_so_many_steps(tmp_path):
    board = TensorBoardLog(tmp_path, every_steps=3)
    make_model().fit(make_batches(), steps_per_epoch=7, callbacks=[board], verbose=0)
    assert [step for step, tag, *_ in events_of(tmp_path) if tag == "training/loss"] == [3, 6]
    with pytest.raises(ValueError, match="Received: every_steps=0"):
        TensorBoardLog(tmp_path, every_steps=0)


def test_any_keras_model(tmp_path):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(
        tf.ones((4, 1)), tf.ones((4, 1)), batch_size=2, callbacks=[TensorBoardLog(tmp_path)], verbose=0
    )
    assert {tag for _, tag, *_ in events_of(tmp_path)} == {
        "training/loss",
        "training/learning_rate",
        "training/skipped_updates",
    }
