import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from kerasllm.training.schedules import cosine_schedule, make_schedule

PEAK, TOTAL, WARMUP, FINAL, DECAY = 3e-3, 200, 20, 0.1, 50


def after_warmup(name, step, decay="linear", warmup=WARMUP):
    """The fraction of the peak, of the step that learned last."""
    step = min(step, TOTAL)
    progress = (step - warmup) / (TOTAL - warmup)
    if name == "cosine":
        return FINAL + (1 - FINAL) * (1 + math.cos(math.pi * progress)) / 2
    if name == "linear":
        return 1 + (FINAL - 1) * progress
    if name == "wsd":
        if step <= TOTAL - DECAY:
            return 1.0
        left = (step - TOTAL + DECAY) / DECAY
        return 1 + (FINAL - 1) * (left if decay == "linear" else math.sqrt(left))
    if name == "inverse_sqrt":
        return math.sqrt(warmup + 1) / math.sqrt(step + 1)
    return 1.0


@pytest.mark.parametrize("warmup", [WARMUP, 1, 0])
@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("cosine", "linear"),
        ("linear", "linear"),
        ("wsd", "linear"),
        ("wsd", "sqrt"),
        ("inverse_sqrt", "linear"),
        ("constant", "linear"),
    ],
)
def test_every_step_is_as_in_plain_python(name, decay, warmup):
    schedule = make_schedule(name, PEAK, TOTAL, warmup, FINAL, DECAY, decay)
    steps = range(TOTAL + 30)
    wanted = [
        PEAK * ((step + 1) / (warmup + 1) if step < warmup else after_warmup(name, step, decay, warmup))
        for step in steps
    ]
    got = np.array(schedule(tf.range(TOTAL + 30)))
    np.testing.assert_allclose(got, wanted, rtol=2e-6)
    assert got.dtype == "float32"
    assert got[0] > 0
    assert set(got[TOTAL:]) == {got[TOTAL]}

    copy = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    assert copy.get_config() == schedule.get_config()
    compiled = tf.function(copy, jit_compile=True)
    for step in (0, warmup, TOTAL - DECAY, TOTAL - 1, TOTAL + 5):
        rate = compiled(tf.constant(step, tf.int64))
        assert (rate.dtype, rate.shape) == (tf.float32, [])
        np.testing.assert_allclose(rate, wanted[step], rtol=2e-6)


def test_the_decay_may_go_down_to_zero():
    for decay in ("linear", "sqrt"):
        schedule = make_schedule("wsd", PEAK, TOTAL, WARMUP, 0.0, DECAY, decay)
        np.testing.assert_allclose(schedule(TOTAL), 0, atol=1e-9)
    np.testing.assert_allclose(make_schedule("cosine", PEAK, TOTAL, 0, 0.0)(TOTAL + 1), 0, atol=1e-9)


def test_defaults():
    schedule = make_schedule("wsd", 1.0, 50)
    assert (schedule.warmup_steps, schedule.decay_steps, schedule.final_fraction) == (5, 5, 0.1)
    assert make_schedule("wsd", 1.0, 50_000).warmup_steps == 1000
    assert cosine_schedule(1.0, 50).get_config() == make_schedule("cosine", 1.0, 50).get_config()
    np.testing.assert_allclose(cosine_schedule(1.0, 50)(4), 5 / 6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_optimizer_takes_it(dtype):
    schedule = make_schedule("linear", 1.0, 4, 1, 0.0)
    variable = keras.Variable([1.0], dtype=dtype)
    optimizer = keras.optimizers.SGD(schedule)
    for _ in range(5):
        optimizer.apply([keras.ops.ones([1], dtype)], [variable])
    np.testing.assert_allclose(variable, [1 - (1 / 2 + 1 + 2 / 3 + 1 / 3 + 0)], rtol=1e-5)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"must be one of .*Received: name='cosin'"):
        make_schedule("cosin", 1.0, 10)
    with pytest.raises(ValueError, match="Received: decay='cosine'"):
        make_schedule("wsd", 1.0, 10, decay="cosine")
    with pytest.raises(ValueError, match="warmup_steps=10, total_steps=10"):
        cosine_schedule(1.0, 10, warmup_steps=10)
    with pytest.raises(ValueError, match="Received: final_fraction=1.5"):
        make_schedule("linear", 1.0, 10, final_fraction=1.5)
    with pytest.raises(ValueError, match="decay_steps=9, warmup_steps=2, total_steps=10"):
        make_schedule("wsd", 1.0, 10, warmup_steps=2, decay_steps=9)
