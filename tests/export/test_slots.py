"""Rows that come and go beside each other have the tokens that each has alone."""

import pathlib
import random

import pytest
import tensorflow as tf
from reference.saved_models import NUMBERS, SETTINGS, random_requests


def arguments(request):
    stop = tf.constant(request["stop"], tf.string)
    return {**{name: tf.constant(request[name], NUMBERS[name]) for name in SETTINGS}, "stop": stop}


def live_row(task, request):
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    settings = {name: request[name] for name in names}
    if not request["temperature"]:  # the task refuses what has no effect then
        settings = {name: settings[name] for name in ("repetition_penalty", "seed")}
    most = request["max_new_tokens"]
    return task.generate_tokens(request["prompt"], most, stop_strings=request["stop"], **settings)[0]


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=SLOW)])
def test_random_joins_and_leaves(random_loaded, random_lm, count):
    slots = random_loaded.slots
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be made by `reset`"):
        slots.step(steps=tf.constant(1))
    report = slots.reset()
    rng = random.Random(7)
    waiting, running, done = list(random_requests(count, seed=3)), {}, 0
    while waiting or running:
        free = [slot for slot in range(3) if slot not in running]
        if waiting and free and rng.random() < 0.7:
            slot, request = rng.choice(free), waiting.pop()
            ids = tf.constant(random_lm.tokenizer.encode(request["prompt"]))
            report = slots.insert(slot=tf.constant(slot), token_ids=ids, **arguments(request))
            running[slot] = request
        else:
            report = slots.step(steps=tf.constant(rng.randint(1, 6)))
        report = {name: value.numpy() for name, value in report.items()}
        for slot, request in list(running.items()):
            if not report["active"][slot] or rng.random() < 0.05:
                live = live_row(random_lm, request)
                number = report["num_tokens"][slot]
                ids = report["token_ids"][slot, :number].tolist()
                assert ids == live.token_ids[:number], request
                if not report["active"][slot]:
                    assert number == len(live.token_ids)
                    assert report["text"][slot].decode() == live.text
                    assert report["finish_reason"][slot].decode() == live.finish_reason
                    done += 1
                freed = slots.free(slot=tf.constant(slot))
                assert not freed["active"][slot] and freed["num_tokens"][slot] == 0
                assert freed["finish_reason"].numpy()[slot] == b""
                del running[slot]
    assert done > count // 2


def test_bad_input(random_loaded):
    slots = random_loaded.slots
    slots.reset()
    request = next(random_requests(1, seed=1))
    good = {"slot": tf.constant(0), "token_ids": tf.constant([5, 6]), **arguments(request)}
    slots.insert(**{**good, "max_new_tokens": tf.constant(30), "stop": tf.zeros([0], tf.string)})
    for change, message in (
        ({}, "A slot must be free or have ended. Received: slot 0"),
        ({"slot": tf.constant(3)}, "`slot` must be from 0 to 2. Received: 3"),
        ({"token_ids": tf.zeros([0], tf.int32)}, "at least one token"),
        ({"token_ids": tf.constant([400])}, "must be from 0 to 399"),
        ({"max_new_tokens": tf.constant(63)}, "must fit into a slot of 64 tokens"),
        ({"max_new_tokens": tf.constant(2**31 - 1)}, "must fit into a slot of 64 tokens"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            slots.insert(**{**good, **({"slot": tf.constant(1)} if change else {}), **change})
    with pytest.raises(tf.errors.InvalidArgumentError, match="`steps` must be at least 1"):
        slots.step(steps=tf.constant(0))


def test_the_memory_is_in_no_file(random_served, random_lm, tmp_path):
    """Many slots make the folder no larger than few."""
    stored = [
        sum(path.stat().st_size for path in pathlib.Path(folder, "variables").iterdir())
        for folder in (random_served / "1", random_lm.export(tmp_path / "1", slots=50))
    ]
    assert abs(stored[0] - stored[1]) < 1000
    with pytest.raises(ValueError, match="at least one slot, of 2 to 64 tokens"):
        random_lm.export(tmp_path / "2", slots=1, slot_length=65)
