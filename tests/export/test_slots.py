"""Rows that come and go beside each other have the tokens that each has alone."""

import pathlib
import random

import numpy as np
import pytest
import tensorflow as tf
from reference.saved_models import NUMBERS, SETTINGS, random_requests, read_graph

from kerasllm.generation.slots import FURTHER

FURTHER_TYPES = {spec.name: spec for spec in FURTHER}


NO_MASKS = {"masked": tf.zeros([0], tf.int32), "allowed": tf.zeros([0, 0], tf.int32)}


def arguments(request, **further):
    stop = tf.constant(request["stop"], tf.string)
    return {
        **{name: tf.constant(request[name], NUMBERS[name]) for name in SETTINGS},
        "stop": stop,
        **{
            name: tf.constant(further.get(name, 0 if len(spec.shape) == 1 else []), spec.dtype)
            for name, spec in FURTHER_TYPES.items()
        },
    }


def begin(slots, slot, ids, **knobs):
    """Reads a prompt and begins its row, as a server does."""
    read(slots, {slot: ids[:-1] or ids}, 0)
    return slots.insert(slot=tf.constant(slot), token_ids=tf.constant(ids), **knobs)


def read(slots, parts, start):
    counts = [len(part) for part in parts.values()]
    filled = [[*part, *[399] * (max(counts) - len(part))] for part in parts.values()]
    ids = {"slots": list(parts), "token_ids": filled, "counts": counts, "start": start}
    report = slots.read(**{name: tf.constant(value, tf.int32) for name, value in ids.items()})
    assert report["num_read"].numpy().tolist() == [start + count for count in counts]


def live_row(task, request):
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    settings = {name: request[name] for name in names}
    if not request["temperature"]:  # the task refuses what has no effect then
        settings = {name: settings[name] for name in ("repetition_penalty", "seed")}
    most = request["max_new_tokens"]
    return task.generate_tokens(request["prompt"], most, stop_strings=request["stop"], **settings)[0]


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(("fixture", "size"), [("random_loaded", 3), ("compiled_loaded", 9)])
@pytest.mark.parametrize("count", [12, pytest.param(200, marks=SLOW)])
def test_random_joins_and_leaves(request, fixture, size, random_lm, count):
    slots = request.getfixturevalue(fixture).slots
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be made by `reset`"):
        slots.step(steps=tf.constant(1), **NO_MASKS)
    report = slots.reset()
    rng = random.Random(7)
    waiting, running, done = list(random_requests(count, seed=3)), {}, 0
    while waiting or running:
        free = [slot for slot in range(size) if slot not in running]
        before, steps = report["num_tokens"], 0
        if waiting and free and rng.random() < 0.7:
            slot, request = rng.choice(free), waiting.pop()
            ids = random_lm.tokenizer.encode(request["prompt"])
            report = begin(slots, slot, ids, **arguments(request))
            running[slot] = request
        else:
            steps = rng.randint(1, 6)
            report = slots.step(steps=tf.constant(steps), **NO_MASKS)
        report = {name: value.numpy() for name, value in report.items()}
        for slot, request in list(running.items()):
            if steps and report["active"][slot]:
                assert report["num_tokens"][slot] == before[slot] + steps
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


@pytest.mark.parametrize("fixture", ["random_loaded", "compiled_loaded"])
def test_a_prompt_in_parts_and_one_taken_over(request, fixture, random_lm):
    """The cache of a beginning may have come in any way, beside whatever else the slots do."""
    slots = request.getfixturevalue(fixture).slots
    slots.reset()
    drawn = {"temperature": 0.9, "seed": 8, "max_new_tokens": 16, "stop": []}
    knobs = arguments(next(random_requests(1, seed=5)) | drawn)
    prompt = random_lm.tokenizer.encode("Once upon a time there was a small box in the garden.")

    def step(steps):
        return slots.step(steps=tf.constant(steps), **NO_MASKS)

    def insert(slot, ids, start):
        if ids[start:-1]:
            read(slots, {slot: ids[start:-1]}, start)
        slots.insert(slot=tf.constant(slot), token_ids=tf.constant(ids), **knobs)

    def row(slot):
        report = {name: value[slot].numpy() for name, value in step(20).items()}
        count = report["num_tokens"]
        return report["token_ids"][:count].tolist(), report["logprobs"][:count], report["text"]

    def check(found, wanted):
        assert found[0] == wanted[0] and found[2] == wanted[2]
        np.testing.assert_allclose(found[1], wanted[1], atol=1e-4)

    longest = prompt[2:] + prompt[:5]
    insert(1, longest, 0)
    before = row(1)
    insert(1, prompt, 0)
    alone = row(1)
    insert(0, prompt[::-1], 0)  # which leaves something behind, on either side of the parts
    row(0)
    insert(2, prompt[3:], 0)
    # Two at once, of which the shorter is filled up; neither disturbs the other, or one that runs.
    read(slots, {0: prompt[:3], 1: longest[:4]}, 0)
    step(1)
    read(slots, {1: longest[3:9], 0: prompt[3:8]}, 3)
    report = step(2)
    assert not report["active"][0] and report["num_tokens"][0] == 0 and not report["finish_reason"][0]
    insert(1, longest, 9)
    check(row(1), before)
    insert(0, prompt, 8)
    step(3)
    # From one that runs, with its new tokens; and from that one again, after steps.
    longer = prompt + alone[0][:2]
    slots.free(slot=tf.constant(1))
    slots.copy(source=tf.constant(0), slot=tf.constant(1), count=tf.constant(len(longer)))
    step(1)
    slots.free(slot=tf.constant(2))
    slots.copy(source=tf.constant(1), slot=tf.constant(2), count=tf.constant(len(prompt) - 2))
    step(1)
    longer += [7, 5]
    insert(1, longer, len(longer) - 2)
    taken = row(1)
    insert(2, prompt, len(prompt) - 2)
    check(row(2), alone)
    check(row(0), alone)
    # What a row that has ended leaves is the beginning of another; and one that was freed in the middle.
    insert(0, longer, len(longer) - 2)
    step(3)
    slots.free(slot=tf.constant(0))
    step(1)
    insert(0, longer, len(longer) - 1)
    check(row(0), taken)
    insert(2, longer, 0)
    check(row(2), taken)


@pytest.mark.parametrize("fixture", ["random_loaded", "compiled_loaded"])
def test_what_is_no_number_is_not_taken_over(request, fixture, random_lm):
    """Behind the place up to which a slot is copied there may be anything."""
    slots = request.getfixturevalue(fixture).slots
    slots.reset()
    prompt = random_lm.tokenizer.encode("Once upon a time there was a small box.")
    knobs = arguments(next(random_requests(1, seed=5)) | {"max_new_tokens": 8, "stop": []})
    begin(slots, 2, prompt, **knobs)
    read(slots, {0: prompt[:8]}, 0)
    for variable in slots.memory:
        if variable.shape.rank == 4:  # the cache
            rows = variable.numpy()
            np.moveaxis(rows, rows.shape.index(64), -1)[0, ..., 6:] = np.nan
            variable.assign(rows)
    slots.copy(source=tf.constant(0), slot=tf.constant(1), count=tf.constant(6))
    read(slots, {1: prompt[6:-1]}, 6)
    slots.insert(slot=tf.constant(1), token_ids=tf.constant(prompt), **knobs)
    report = slots.step(steps=tf.constant(8), **NO_MASKS)
    assert report["token_ids"][1].numpy().tolist() == report["token_ids"][2].numpy().tolist()
    assert np.isfinite(report["logprobs"][1]).all()


def test_alternatives_and_penalties(random_loaded, random_lm):
    """Log-probabilities, and what `insert` takes beside the knobs, are the task's."""
    slots = random_loaded.slots
    slots.reset()
    request = next(random_requests(1, seed=5)) | {"temperature": 0.0, "max_new_tokens": 8, "stop": []}
    ids = random_lm.tokenizer.encode(request["prompt"])
    bias = {7: 3.0, 9: -50.0}
    changes = {"presence_penalty": 0.7, "frequency_penalty": 1.5, "min_new_tokens": 8}
    knobs = arguments(request, **changes, bias_ids=list(bias), bias_values=list(bias.values()))
    begin(slots, 1, ids, **knobs)
    report = slots.step(steps=tf.constant(20), **NO_MASKS)
    live = random_lm.generate_tokens(
        request["prompt"],
        8,
        repetition_penalty=request["repetition_penalty"],
        logit_bias=bias,
        logprobs=3,
        **changes,
    )[0]
    plain = random_lm.generate_tokens(request["prompt"], 8, logprobs=0)[0]
    assert live.token_ids != plain.token_ids
    assert report["token_ids"][1].numpy().tolist() == live.token_ids
    np.testing.assert_allclose(report["logprobs"][1], live.logprobs, atol=1e-4)
    found = slots.alternatives(slot=tf.constant(1))
    assert found["token_ids"].shape == (8, 20)
    for place, top in enumerate(live.top_logprobs):
        assert found["token_ids"][place, :3].numpy().tolist() == list(top)
        np.testing.assert_allclose(found["logprobs"][place, :3], list(top.values()), atol=1e-4)
    with pytest.raises(tf.errors.InvalidArgumentError, match="`bias_ids` must be from 0 to 399"):
        begin(slots, 0, ids, **arguments(request, bias_ids=[400], bias_values=[1.0]))


@pytest.mark.parametrize("fixture", ["random_loaded", "compiled_loaded"])
def test_masks_hold_for_their_rows(request, fixture, random_lm):
    """A row with a constraint says what the task says; its neighbour what it says alone."""
    from kerasllm.generation.constraints import ConstraintFactory

    slots, tokenizer = request.getfixturevalue(fixture).slots, random_lm.tokenizer
    report = slots.reset()
    wild = {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    free = next(random_requests(1, seed=6)) | wild | {"max_new_tokens": 20, "stop": []}
    bound = free | {"prompt": "Mia", "seed": 11}
    expression = "(ab|c){4,9}[0-9]"
    constraint = ConstraintFactory(tokenizer, slots.sizes()["end_ids"].numpy().tolist(), 400).make(
        "regex", expression
    )
    bits = np.zeros([1, 13], np.int32)
    for slot, request in ((0, free), (2, bound)):
        report = begin(slots, slot, tokenizer.encode(request["prompt"]), **arguments(request))
    seen = 0
    while report["active"].numpy().any():
        for token in report["token_ids"][2, seen:].numpy()[: report["num_tokens"][2] - seen]:
            constraint.accept(int(token))
            seen += 1
        masks = NO_MASKS
        if report["active"][2]:
            constraint.fill(bits[0])
            masks = {"masked": tf.constant([2]), "allowed": tf.constant(bits)}
        report = slots.step(steps=tf.constant(1), **masks)
    live = random_lm.generate_tokens("Mia", 20, regex=expression, temperature=3.0, seed=11)[0]
    number = report["num_tokens"][2]
    assert report["token_ids"][2, :number].numpy().tolist() == live.token_ids
    assert report["text"][2].numpy().decode() == live.text
    assert report["finish_reason"][2] == b"stop"
    number = report["num_tokens"][0]
    assert report["token_ids"][0, :number].numpy().tolist() == live_row(random_lm, free).token_ids


def test_what_a_server_needs(random_loaded, compiled_loaded, random_lm):
    slots, tokenizer = random_loaded.slots, random_lm.tokenizer
    sizes = {name: number.numpy().tolist() for name, number in slots.sizes().items()}
    numbers = {"slots": 3, "length": 64, "vocabulary": 400, "alternatives": 20}
    ends = [tokenizer.special_tokens[tokenizer.eos_token]]
    assert sizes == {**numbers, "step_rows": [3], "end_ids": ends}
    assert compiled_loaded.slots.sizes()["step_rows"].numpy().tolist() == [1, 4, 8, 9]
    end = tokenizer.eos_token
    texts = slots.token_texts(token_ids=tf.constant([tokenizer.special_tokens[end], 5, 399, 400, -1]))[
        "text"
    ]
    wanted = [end.encode(), tokenizer.token_bytes(5), tokenizer.token_bytes(399), b"", b""]
    assert texts.numpy().tolist() == wanted
    text = f"a{end}{end[0]}\udcfd{end[1:]}".encode("utf-8", "surrogateescape")
    ids = slots.encode_chat(text=tf.constant(text))["token_ids"].numpy().tolist()
    plain = [*tokenizer.encode("a"), tokenizer.special_tokens[end], *tokenizer.encode(end)]
    assert ids == plain and ids.count(tokenizer.special_tokens[end]) == 1


def test_bad_input(random_loaded):
    slots = random_loaded.slots
    slots.reset()
    request = next(random_requests(1, seed=1))
    good = {"slot": tf.constant(0), "token_ids": tf.constant([5, 6]), **arguments(request)}
    with pytest.raises(tf.errors.InvalidArgumentError, match="must hold the prompt, but .*: slot 0"):
        slots.insert(**good)
    read(slots, {0: [5], 1: [5]}, 0)
    slots.insert(**{**good, "max_new_tokens": tf.constant(30), "stop": tf.zeros([0], tf.string)})
    part = {"slots": [1, 2], "token_ids": [[5, 6], [7, 0]], "counts": [2, 1], "start": 1}
    for change, message in (
        ({"slots": [1, 0]}, r"A slot must be free or have ended. Received: slot \[1 0\]"),
        ({"slots": [-1, 1]}, r"`slot` must be from 0 to 2. Received: \[-1 1\]"),
        ({"slots": [1, 1]}, r"`slots` must differ. Received: \[1 1\]"),
        ({"slots": [1]}, "must be as many as there are rows. Received: 1 and 2"),
        ({"counts": [2, 1, 1]}, "must be as many as there are rows. Received: 2 and 3"),
        ({"counts": [2, 0]}, r"`counts` must be from 1 to 2, the length of the rows. Received: \[2 0\]"),
        ({"counts": [3, 1]}, r"`counts` must be from 1 to 2, the length of the rows. Received: \[3 1\]"),
        ({"token_ids": [[5, 6], [400, 0]]}, "must be from 0 to 399"),
        ({"start": -1}, "2 tokens from -1 on"),
        ({"start": 63}, "must lie in a slot of 64. Received: 2 tokens from 63 on"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            slots.read(**{name: tf.constant(value) for name, value in {**part, **change}.items()})
    for source, slot, count, message in (
        (0, 0, 1, "cannot be copied to itself"),
        (1, 0, 1, "A slot must be free or have ended. Received: slot 0"),
        (0, 3, 1, "`slot` must be from 0 to 2. Received: 3"),
        (0, 1, 0, "`count` must be from 1 to 64. Received: 0"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            slots.copy(source=tf.constant(source), slot=tf.constant(slot), count=tf.constant(count))
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
        slots.step(steps=tf.constant(0), **NO_MASKS)
    for masked, allowed, message in (
        ([3], [[0] * 13], "`slot` must be from 0 to 2. Received: \\[3\\]"),
        ([0], [[0] * 12], "`allowed` must be 13 numbers for each of `masked`. Received: 1 of 12"),
        ([0, 1], [[0] * 13], "`allowed` must be 13 numbers"),
    ):
        masks = {"masked": tf.constant(masked), "allowed": tf.constant(allowed)}
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            slots.step(steps=tf.constant(1), **masks)
    with pytest.raises(tf.errors.InvalidArgumentError, match="must be 1 where tokens are masked"):
        slots.step(steps=tf.constant(2), masked=tf.constant([0]), allowed=tf.zeros([1, 13], tf.int32))


def test_only_the_embedded_server_finds_them_as_signatures(random_served, random_loaded):
    meta_graph = read_graph(random_served / "1")
    offered = {*meta_graph.signature_def, *random_loaded.signatures}
    assert offered and not any(name.startswith("slots_") for name in offered)
    (content,) = meta_graph.collection_def["kerasllm_signatures"].bytes_list.value
    hidden = type(meta_graph).FromString(content).signature_def
    functions = {f"slots_{name}" for name in dir(random_loaded.slots) if not name.startswith("_")}
    assert {"slots_insert", "slots_step", "slots_encode_chat"} <= set(hidden) <= functions


def test_the_memory_is_in_no_file(random_served, random_lm, tmp_path):
    """Many slots make the folder no larger than few."""
    stored = [
        sum(path.stat().st_size for path in pathlib.Path(folder, "variables").iterdir())
        for folder in (random_served / "1", random_lm.export(tmp_path / "1", slots=50))
    ]
    assert abs(stored[0] - stored[1]) < 1000
    with pytest.raises(ValueError, match="at least one slot, of 2 to 64 tokens"):
        random_lm.export(tmp_path / "2", slots=1, slot_length=65)
