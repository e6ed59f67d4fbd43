"""Rows of many requests beside each other: the same tokens, fair, bounded, and nothing lost."""

import dataclasses
import itertools
import queue
import random
import threading
import time

import grpc
import numpy as np
import pytest
from kerasllm_serving.constraints import ConstraintFactory, cannot_be_kept
from kerasllm_serving.engine import Engine, RowRequest, held_back
from kerasllm_serving.errors import ServingError
from kerasllm_serving.language_model import LoadedSlots
from kerasllm_serving.metrics import Metrics
from kerasllm_serving.model import Servable
from reference.saved_models import random_requests

SECONDS = 60


@pytest.fixture(scope="module")
def slots(random_served):
    return LoadedSlots(Servable(random_served / "1"))


@pytest.fixture
def make_engine(slots):
    engines = []

    def make(model=slots, max_queue=100, **options):
        engines.append(Engine(model, max_queue, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(0)


class Collected:
    """A job and what came of it."""

    def __init__(self, engine, *rows, **options):
        self.pieces = queue.Queue()
        self.job = engine.submit(rows, self.pieces.put, **options)

    def rest(self):
        """The pieces of each row, up to the end of all."""
        found = {number: [] for number in range(len(self.job.rows))}
        while not all(pieces and pieces[-1].finish_reason for pieces in found.values()):
            piece = self.pieces.get(timeout=SECONDS)
            if isinstance(piece, ServingError):
                raise piece
            found[piece.row].append(piece)
        return list(found.values())


def ids_of(pieces):
    return [number for piece in pieces for number in piece.token_ids]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


class Tally:
    """Slots without a model: each row's tokens are 1, 2, 3 …, and each is a letter."""

    slots, length, vocabulary = 2, 50, 60

    def __init__(self):
        self.log, self.steps = [], []
        self.may_step = threading.Event()
        self.may_step.set()
        self.fails = False
        self.reset()

    def reset(self):
        self.rows = [None] * self.slots
        self.counts = [0] * self.slots

    def read(self, parts, start):
        self.log.append(("read", start, {slot: list(part) for slot, part in parts.items()}))

    def copy(self, source, slot, count):
        self.log.append(("copy", source, slot, count))

    def insert(self, slot, row):
        self.log.append(("insert", slot, row.token_ids[0]))
        self.rows[slot], self.counts[slot] = row, 0

    def step(self, steps, masks):
        assert self.may_step.wait(SECONDS)
        self.log.append(("step",))
        self.steps.append(steps)
        if self.fails:
            self.fails = False
            raise RuntimeError("the model is broken")
        for slot, row in enumerate(self.rows):
            if row is not None:
                self.counts[slot] = min(self.counts[slot] + steps, row.max_new_tokens)
        time.sleep(0.001)
        return self.report()

    def free(self, slot):
        self.log.append(("free", slot))
        self.rows[slot], self.counts[slot] = None, 0

    def all(self, name):
        """What was done under a name."""
        return [entry for entry in self.log if entry[0] == name]

    def report(self):
        ends = [
            row is not None and n >= row.max_new_tokens
            for row, n in zip(self.rows, self.counts, strict=True)
        ]
        ids = np.tile(np.arange(1, 51, dtype=np.int32), (self.slots, 1))
        return {
            "num_tokens": np.array(self.counts),
            "token_ids": ids,
            "logprobs": np.zeros(ids.shape, np.float32),
            "text": np.array([b"abcdefghij"[:n] for n in self.counts], object),
            "finish_reason": np.array([b"length" if end else b"" for end in ends], object),
        }


class Wide(Tally):
    slots = 5


def test_each_row_is_as_if_alone(make_engine, random_lm):
    """Random requests from several threads, read in parts; some are cancelled in the middle."""
    engine = make_engine(steps=2, prefill_chunk=3)
    rng = random.Random(4)
    done = []

    def ask(requests):
        for request, is_cancelled in requests:
            fields = {**request, "token_ids": random_lm.tokenizer.encode(request["prompt"])}
            del fields["prompt"]
            collected = Collected(engine, RowRequest(**fields))
            if is_cancelled:
                collected.pieces.get(timeout=SECONDS)
                collected.job.cancel()
            else:
                done.append((request, collected.rest()[0]))

    requests = [(request, rng.random() < 0.25) for request in random_requests(24, seed=9)]
    threads = [threading.Thread(target=ask, args=(requests[number::6],)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == sum(not is_cancelled for _, is_cancelled in requests)
    for request, pieces in done:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        settings = {name: request[name] for name in names}
        if not request["temperature"]:
            settings = {name: settings[name] for name in ("repetition_penalty", "seed")}
        live = random_lm.generate_tokens(
            request["prompt"], request["max_new_tokens"], stop_strings=request["stop"], **settings
        )[0]
        assert ids_of(pieces) == live.token_ids, request
        assert text_of(pieces) == live.text, request
        assert pieces[-1].finish_reason == live.finish_reason
    deadline = time.monotonic() + SECONDS
    while engine.num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.num_running == engine.num_waiting == 0


def test_no_part_of_a_stop_string_comes(make_engine, random_lm):
    """Whatever is a stop string: what was streamed is never taken back."""
    engine = make_engine()
    ids = random_lm.tokenizer.encode("Once upon a time")
    whole = random_lm.generate_tokens("Once upon a time", 24)[0].text
    for begin in range(2, len(whole) - 4, 3):
        stop = whole[begin : begin + 4]
        pieces = Collected(engine, RowRequest(token_ids=ids, max_new_tokens=24, stop=[stop])).rest()[0]
        assert text_of(pieces) == whole[: whole.index(stop)]
        assert pieces[-1].finish_reason == "stop"
        assert all("\ufffd" not in piece.text or "\ufffd" in whole for piece in pieces)


def test_held_back():
    assert held_back(b"one two", ["two three"]) == 3
    assert held_back(b"aab", ["abab", "bc"]) == 2
    assert held_back("né".encode(), ["éa"]) == 2
    assert held_back(b"abc", ["abc"]) == 0  # a whole one would have ended the row
    assert held_back(b"", ["x"]) == held_back(b"x", []) == 0


def test_alternatives(make_engine, random_lm):
    engine = make_engine(steps=3)
    ids = random_lm.tokenizer.encode("The")
    live = random_lm.generate_tokens("The", 7, logprobs=2)[0]
    row = RowRequest(token_ids=ids, max_new_tokens=7, alternatives=2)
    for pieces in Collected(engine, row, row).rest():
        found = [dict(pairs) for piece in pieces for pairs in piece.alternatives]
        assert [list(pairs) for pairs in found] == [list(pairs) for pairs in live.top_logprobs]
        logprobs = [number for piece in pieces for number in piece.logprobs]
        np.testing.assert_allclose(logprobs, live.logprobs, atol=1e-4)


def test_a_constraint_fails_alone(make_engine, slots, random_served, random_lm):
    """Where llguidance gives up, the row ends with an error, and the others go on."""
    file = random_served / "1" / "assets.extra" / "tokenizer.json"
    factory = ConstraintFactory(file, slots.vocabulary, slots.end_ids, slots.token_texts)
    engine = make_engine(steps=3)
    ids = random_lm.tokenizer.encode("The")
    free = RowRequest(token_ids=ids, max_new_tokens=20)
    other = Collected(engine, free)
    for wrong in ("mask", "accept"):
        constraint, calls = factory.make("regex", "a{9}"), []
        method = getattr(constraint, wrong)

        def give_up(*arguments, call=method, calls=calls):
            calls.append(arguments)
            if len(calls) == 3:
                raise cannot_be_kept("too hard\nas the state shows")
            return call(*arguments)

        setattr(constraint, wrong, give_up)
        with pytest.raises(ServingError, match="cannot be kept, .*: too hard$") as error:
            Collected(engine, dataclasses.replace(free, constraint=constraint)).rest()
        assert error.value.code == grpc.StatusCode.INVALID_ARGUMENT
    row = dataclasses.replace(free, constraint=factory.make("regex", "(ab|c){2}"))
    assert text_of(Collected(engine, row).rest()[0]) in ("abab", "abc", "cab", "cc")
    assert ids_of(other.rest()[0]) == random_lm.generate_tokens("The", 20)[0].token_ids


def test_first_come_first_served(make_engine):
    model = Tally()
    model.may_step.clear()
    engine = make_engine(model)
    jobs = [
        Collected(engine, RowRequest(token_ids=[number], max_new_tokens=2 + number % 3))
        for number in range(9)
    ]
    model.may_step.set()
    for job in jobs:
        assert text_of(job.rest()[0]) == "abcdefghij"[: job.job.rows[0].max_new_tokens]
    assert [entry[2] for entry in model.all("insert")] == list(range(9))


def test_a_long_prompt_is_read_between_steps(make_engine):
    model = Tally()
    engine = make_engine(model, prefill_chunk=8)
    running = Collected(engine, RowRequest(token_ids=[1], max_new_tokens=40))
    running.pieces.get(timeout=SECONDS)
    prompts = [list(range(2, 32)), [40, 41, 42], [50, 51, 52, 53]]
    jobs = [Collected(engine, RowRequest(token_ids=prompt, max_new_tokens=3)) for prompt in prompts]
    for job in jobs:
        job.rest()
    # One slot is free, so between two steps never more than a part of a prompt.
    first = model.log.index(("read", 0, {1: prompts[0][:8]}))
    parts = [("read", start, {1: prompts[0][start : min(start + 8, 29)]}) for start in (0, 8, 16, 24)]
    between = [("step",)] * 3
    assert model.log[first : first + 7] == [*itertools.chain(*zip(parts, between, strict=False)), parts[3]]
    read_tokens = 0
    for name, *entry in model.log[first:]:
        read_tokens += sum(map(len, entry[1].values())) if name == "read" else 0
        assert read_tokens <= 8
        if name == "step":
            read_tokens = 0
    order = [entry[2] for entry in model.all("insert")]
    assert order == [1, 2, 40, 50]
    # A row that is cancelled while its prompt is read frees its slot.
    model.may_step.clear()
    held = [Collected(engine, RowRequest(token_ids=[n] * 40, max_new_tokens=2)) for n in (7, 8)]
    held[0].job.cancel()
    model.may_step.set()
    held[1].rest()
    assert [entry[2] for entry in model.all("insert")] == [*order, 8]


def test_prompts_that_come_together_are_read_together(make_engine):
    """In one call, and not one after each step."""
    model = Wide()
    engine = make_engine(model, prefill_chunk=4)
    running = Collected(engine, RowRequest(token_ids=[1], max_new_tokens=40))
    running.pieces.get(timeout=SECONDS)
    model.may_step.clear()
    time.sleep(0.05)
    model.log.clear()
    prompts = [[10 * number] * (3 + number) for number in range(1, 6)]
    rows = [RowRequest(token_ids=prompt, max_new_tokens=3) for prompt in prompts]
    job = Collected(engine, *rows)
    model.may_step.set()
    job.rest()
    first = model.log.index(("read", 0, {slot: prompts[slot - 1][:-1][:4] for slot in range(1, 5)}))
    # Those that are read begin at once; the fifth has no slot yet.
    assert model.log[first + 1 : first + 4] == [("insert", 1, 10), ("insert", 2, 20), ("step",)]
    assert model.log[first + 4] == ("read", 4, {3: [30], 4: [40, 40]})


def test_a_first_token_does_not_wait_for_more(make_engine):
    model = Tally()
    engine = make_engine(model, steps=4)
    for _ in range(2):
        Collected(engine, RowRequest(token_ids=[1, 2], max_new_tokens=7)).rest()
    assert model.steps == [1, 4, 4] * 2


def test_what_is_read_in_one_call(make_engine):
    """Parts that are about as long, from one place on; and what another prompt begins with is read once."""
    model = Wide()
    model.slots, model.length = 6, 200
    model.reset()
    common = list(range(2, 42))
    prompts = [[50] * 20, [51] * 52, [52] * 80, [*common, 55], [*common, 56], [57] * 9]
    rows = [RowRequest(token_ids=prompt, max_new_tokens=1) for prompt in prompts]
    Collected(make_engine(model), *rows).rest()
    sizes = [
        (start, {slot: len(part) for slot, part in parts.items()}) for _, start, parts in model.all("read")
    ]
    assert sizes == [(0, {0: 19, 1: 51}), (0, {2: 79}), (0, {3: 40}), (0, {5: 8})]
    assert model.all("copy") == [("copy", 3, 4, 40)]
    assert [slot for _, slot, _ in model.all("insert")] == list(range(6))
    assert model.log.index(("step",)) > model.log.index(("insert", 5, 57))


@pytest.mark.parametrize("together", [1, 8])
def test_what_is_cancelled_or_late_while_others_are_read_is_not_read(make_engine, monkeypatch, together):
    """Nor does it begin, where it was read with them."""
    monkeypatch.setattr("kerasllm_serving.engine._MOST_READ_TOGETHER", together)
    model = Wide()
    engine = make_engine(model, prefill_chunk=4)
    reads, may_go_on = threading.Event(), threading.Event()
    read = model.read

    def wait(*arguments):
        reads.set()
        assert may_go_on.wait(SECONDS)
        return read(*arguments)

    running = Collected(engine, RowRequest(token_ids=[1], max_new_tokens=40))
    running.pieces.get(timeout=SECONDS)
    model.read = wait
    model.may_step.clear()  # so that all are there when the next are read
    rows = [RowRequest(token_ids=[n] * 4, max_new_tokens=3) for n in (51, 52, 53, 54)]
    deadline = time.monotonic() + 0.2
    jobs = [Collected(engine, row, deadline=deadline if row is rows[1] else None) for row in rows]
    model.may_step.set()
    assert reads.wait(SECONDS)
    jobs[2].job.cancel()
    time.sleep(0.2)
    may_go_on.set()
    jobs[3].rest()
    assert [entry[2] for entry in model.all("insert") if entry[2] > 50] == [51, 54]
    read_slots = [slot for _, _, parts in model.all("read")[1:] for slot in parts]
    assert read_slots == ([1, 2] if together == 1 else [1, 2, 3, 4])
    assert jobs[1].pieces.get(timeout=SECONDS).code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_prompt_goes_on_from_what_was_read(make_engine, slots, random_lm, monkeypatch):
    """Results as without, and the tokens of the common beginning are read once."""
    monkeypatch.setattr("kerasllm_serving.engine._WORTH_A_COPY", 2)
    metrics = Metrics()
    ids = random_lm.tokenizer.encode("Once upon a time there was a small box.")
    other = ids[5:] + ids[:5]
    without = make_engine(has_prefix_cache=False)

    def alone(prompt):
        pieces = Collected(without, RowRequest(token_ids=prompt, max_new_tokens=8, seed=3)).rest()[0]
        assert pieces[0].cached_tokens == 0
        return ids_of(pieces), text_of(pieces)

    reply = alone(ids)[0]
    turn = [*ids, *reply, 5, 6, 7]
    # What is asked one after the other, and how many tokens of it are known by then.
    asked = [
        (ids[:1], 0),
        (ids, 1),
        (ids, len(ids) - 1),
        (turn, len(ids) + len(reply) - 1),
        (other, 0),
        (turn[:-1] + [9], len(turn) - 1),
        (other[:6] + ids[:3], 6),
    ]
    wanted = [alone(prompt) for prompt, _ in asked]
    without.close(SECONDS)
    engine = make_engine(metrics=metrics)
    for (prompt, known), result in zip(asked, wanted, strict=True):
        pieces = Collected(engine, RowRequest(token_ids=prompt, max_new_tokens=8, seed=3)).rest()[0]
        assert (ids_of(pieces), text_of(pieces)) == result
        assert pieces[0].cached_tokens == known
    turn = asked[-2][0]
    rows = [RowRequest(token_ids=turn + [8], max_new_tokens=8, temperature=1.0, seed=n) for n in range(3)]
    found = Collected(engine, *rows).rest()
    assert [pieces[0].cached_tokens for pieces in found] == [len(turn)] * 3
    hits = sum(known for _, known in asked) + 3 * len(turn)
    text = metrics.render()
    assert f"vllm:prefix_cache_hits_total {hits}" in text
    queries = sum(len(prompt) for prompt, _ in asked) + 3 * len(turn) + 3
    assert f"vllm:prefix_cache_queries_total {queries}" in text


def test_nothing_goes_on_from_what_is_no_number(make_engine):
    class Broken(Tally):
        def report(self):
            return super().report() | {"logprobs": np.full((self.slots, 50), np.nan, np.float32)}

    engine = make_engine(Broken())
    row = RowRequest(token_ids=list(range(40)), max_new_tokens=3)
    for _ in range(2):
        assert Collected(engine, row).rest()[0][0].cached_tokens == 0


def test_a_full_queue_refuses(make_engine):
    model = Tally()
    model.may_step.clear()
    engine = make_engine(model, max_queue=3)
    row = RowRequest(token_ids=[1], max_new_tokens=5)
    taken = [Collected(engine, row) for _ in range(5)]  # 2 in slots, 3 wait
    for rows in ([row], [row, row]):
        with pytest.raises(ServingError, match="The queue is full: ") as error:
            Collected(engine, *rows)
        assert error.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    taken[4].job.cancel()
    model.may_step.set()
    assert [text_of(job.rest()[0]) for job in taken[:4]] == ["abcde"] * 4
    assert len(model.all("insert")) == 4


def test_a_cancelled_row_leaves_before_the_next_step(make_engine):
    model = Tally()
    engine = make_engine(model)
    running = Collected(engine, RowRequest(token_ids=[1], max_new_tokens=49))
    running.pieces.get(timeout=SECONDS)
    model.may_step.clear()
    time.sleep(0.05)
    running.job.cancel()
    model.log.clear()
    model.may_step.set()
    waited = Collected(engine, RowRequest(token_ids=[2], max_new_tokens=2))
    waited.rest()
    # The step that was under way, and none of the 40 others.
    before = model.log[: model.log.index(("free", 0))]
    assert before.count(("step",)) <= 1


def test_a_deadline_ends_rows_in_slots_and_in_the_queue(make_engine):
    model = Tally()
    model.may_step.clear()
    engine = make_engine(model)
    row = RowRequest(token_ids=[1], max_new_tokens=40)
    jobs = [Collected(engine, row, deadline=time.monotonic() + 0.2) for _ in range(4)]
    time.sleep(0.3)
    model.may_step.set()
    for job in jobs:
        with pytest.raises(ServingError) as error:
            job.rest()
        assert error.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(Collected(engine, RowRequest(token_ids=[3], max_new_tokens=3)).rest()[0][-1].text) <= 3


def test_a_failed_step_ends_its_rows_and_nothing_else(make_engine):
    model = Tally()
    model.may_step.clear()
    engine = make_engine(model)
    failed = Collected(engine, RowRequest(token_ids=[1], max_new_tokens=5))
    model.fails = True
    model.may_step.set()
    with pytest.raises(ServingError, match="The model failed") as error:
        failed.rest()
    assert error.value.code == grpc.StatusCode.INTERNAL
    assert text_of(Collected(engine, RowRequest(token_ids=[1], max_new_tokens=3)).rest()[0]) == "abc"


def test_a_prompt_that_fails_ends_alone(make_engine, monkeypatch, caplog):
    """What is read in one call with it ends too; what runs goes on."""
    model = Wide()
    engine = make_engine(model)
    running = Collected(engine, RowRequest(token_ids=[1], max_new_tokens=40))
    first = running.pieces.get(timeout=SECONDS)
    for name in ("read", "insert"):
        with monkeypatch.context() as patch:

            def fail(*arguments):
                raise RuntimeError("the model is broken")

            patch.setattr(model, name, fail)
            with pytest.raises(ServingError, match="The model failed") as error:
                Collected(engine, *[RowRequest(token_ids=[2, 3], max_new_tokens=5)] * 2).rest()
        assert error.value.code == grpc.StatusCode.INTERNAL
        assert "A prompt could not be read" in caplog.text
        caplog.clear()
    assert len(ids_of([first, *running.rest()[0]])) == 40
    assert text_of(Collected(engine, RowRequest(token_ids=[1], max_new_tokens=3)).rest()[0]) == "abc"


def test_close_finishes_what_was_taken(make_engine):
    model = Tally()
    model.may_step.clear()
    engine = make_engine(model)
    row = RowRequest(token_ids=[1], max_new_tokens=8)
    jobs = [Collected(engine, row) for _ in range(7)]
    closer = threading.Thread(target=engine.close, args=(SECONDS,))
    closer.start()
    while not engine._is_closing:
        time.sleep(0.001)
    with pytest.raises(ServingError, match="shutting down") as error:
        Collected(engine, row)
    assert error.value.code == grpc.StatusCode.UNAVAILABLE
    model.may_step.set()
    assert [text_of(job.rest()[0]) for job in jobs] == ["abcdefgh"] * 7
    closer.join(SECONDS)
    assert not closer.is_alive()


def test_rows_that_do_not_fit(make_engine):
    engine = make_engine(Tally())
    for row, message in (
        (RowRequest(token_ids=[], max_new_tokens=1), "at least one token"),
        (RowRequest(token_ids=[1] * 30, max_new_tokens=21), "maximum context length is 50 tokens"),
        (RowRequest(token_ids=[60], max_new_tokens=1), "from 0 to 59"),
        (RowRequest(token_ids=[1], max_new_tokens=1, logit_bias={60: 1.0}), "from 0 to 59"),
    ):
        with pytest.raises(ServingError, match=message) as error:
            Collected(engine, row)
        assert error.value.code == grpc.StatusCode.INVALID_ARGUMENT
