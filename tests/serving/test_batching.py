"""Requests that come together are one run of the graph, and each gets what it would have got alone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from kerasllm_serving.batching import Batching, BatchingParameters, read_batching_parameters
from kerasllm_serving.errors import ServingError, StartupError
from kerasllm_serving.metrics import Metrics
from kerasllm_serving.model import Servable

SECONDS = 30
LONG = 60_000_000  # microseconds: only a full batch is run


class Ragged(tf.Module):
    """Sums of rows of any length; a negative one is refused."""

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32, name="x")])
    def sums(self, x):
        tf.debugging.assert_non_negative(x, message="a row must not be negative")
        return {"sum": tf.reduce_sum(x, 1), "first": x[:, 0]}

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32, name="x")])
    def total(self, x):
        return {"total": tf.reduce_sum(x)}

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.float32, name="x")])
    def doubled(self, x):
        return {"rows": tf.concat([x, x], 0)}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="a"),
            tf.TensorSpec([None], tf.int32, name="b"),
        ]
    )
    def two(self, a, b):
        return {"joined": tf.strings.join([a, tf.strings.as_string(b)])}

    @tf.function(input_signature=[tf.TensorSpec([], tf.float32, name="x")])
    def scalar(self, x):
        return {"y": x}


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    module = Ragged()
    path = tmp_path_factory.mktemp("ragged") / "1"
    names = ("sums", "total", "doubled", "two", "scalar")
    tf.saved_model.save(module, str(path), signatures={name: getattr(module, name) for name in names})
    return path


@pytest.fixture(scope="module")
def servable(ragged):
    servable = Servable(ragged)
    yield servable
    servable.close()


class Asked:
    """A version behind a batcher, whose runs are counted and may be held up."""

    def __init__(self, servable, **parameters):
        self.signatures = servable.signatures
        self.batches = []  # shapes of what was fed
        self.may_run = threading.Event()
        self.may_run.set()
        self.metrics = Metrics()
        self._run = servable.run
        self.batching = Batching(BatchingParameters(**parameters), False, self.metrics)
        self.batcher = self.batching.make_batcher(self, None)
        self.threads = ThreadPoolExecutor(32)

    def run(self, feeds, fetches, timeout_in_ms=0):
        self.batches.append([array.shape for array in feeds.values()])
        self.fed = feeds
        assert self.may_run.wait(SECONDS)
        return self._run(feeds, fetches, timeout_in_ms)

    def ask(self, signature, timeout_in_ms=0, only=None, **inputs):
        """Sends a request; the result of what is returned is the outputs by name."""
        info = self.signatures[signature]
        names = [only] if only else list(info.outputs)
        feeds = {info.inputs[name].name: np.asarray(value) for name, value in inputs.items()}
        fetches = [info.outputs[name].name for name in names]

        def work():
            arrays = self.batcher.run(feeds, fetches, timeout_in_ms)
            return dict(zip(names, arrays, strict=True))

        return self.threads.submit(work)

    def wait_for_runs(self, count):
        deadline = time.monotonic() + SECONDS
        while len(self.batches) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(self.batches) == count

    def wait_for_queue(self, count):
        """Waits until so many requests wait for a batch."""

        def waiting():
            queues = self.batcher._queues.values()
            return sum(len(batch.tasks) for queue in queues for batch in queue.batches)

        deadline = time.monotonic() + SECONDS
        while waiting() < count and time.monotonic() < deadline:
            time.sleep(0.001)
        assert waiting() == count


@pytest.fixture
def make(servable):
    made = []

    def make_asked(**parameters):
        made.append(Asked(servable, **parameters))
        return made[-1]

    yield make_asked
    for asked in made:
        asked.may_run.set()
        asked.threads.shutdown()
        asked.batcher.close()
        asked.batching.close()


def rows(*sizes, width=2):
    """Arrays of so many rows, all different."""
    made, begin = [], 0
    for size in sizes:
        made.append(np.arange(begin, begin + size * width, dtype=np.float32).reshape(size, width))
        begin += size * width
    return made


def refused(future):
    with pytest.raises(ServingError) as caught:
        future.result(SECONDS)
    return caught.value.code.name, caught.value.message


def test_requests_become_one_run(make):
    asked = make(max_batch_size=6, batch_timeout_micros=LONG)
    sent = rows(1, 3, 2)
    futures = [asked.ask("sums", x=x) for x in sent]
    for x, future in zip(sent, futures, strict=True):
        outputs = future.result(SECONDS)
        np.testing.assert_array_equal(outputs["sum"], x.sum(1))
        np.testing.assert_array_equal(outputs["first"], x[:, 0])
    assert asked.batches == [[(6, 2)]]


def test_time_closes_a_batch(make):
    asked = make(max_batch_size=100, batch_timeout_micros=50_000, num_batch_threads=1)
    begin = time.monotonic()
    futures = [asked.ask("sums", x=x) for x in rows(1, 1)]
    assert [future.result(SECONDS)["sum"].tolist() for future in futures] == [[1.0], [5.0]]
    assert time.monotonic() - begin >= 0.05 and len(asked.batches) <= 2


def test_what_comes_while_the_threads_are_busy_is_put_together(make):
    asked = make(max_batch_size=100, num_batch_threads=1)
    asked.may_run.clear()
    first = asked.ask("sums", x=rows(1)[0])
    asked.wait_for_runs(1)
    futures = [asked.ask("sums", x=x) for x in rows(*8 * [1])]
    asked.wait_for_queue(8)
    asked.may_run.set()
    assert first.result(SECONDS)["sum"].tolist() == [1.0]
    assert [future.result(SECONDS)["sum"][0] for future in futures] == [4 * i + 1 for i in range(8)]
    assert len(asked.batches) < 9 and sum(batch[0][0] for batch in asked.batches) == 9


def test_signatures_do_not_mix_and_other_outputs_are_not_batched(make):
    asked = make(max_batch_size=2, batch_timeout_micros=LONG)
    (x, y) = rows(1, 1)
    waiting = asked.ask("sums", x=x)
    assert asked.ask("sums", only="first", x=y).result(SECONDS)["first"].tolist() == [2.0]
    strings = [asked.ask("two", a=np.array([b"a"], object), b=np.int32([n])) for n in (1, 2)]
    assert sorted(future.result(SECONDS)["joined"][0] for future in strings) == [b"a1", b"a2"]
    assert not waiting.done()
    asked.ask("sums", x=y).result(SECONDS)
    assert waiting.result(SECONDS)["sum"].tolist() == [1.0]
    assert sorted(batch[0][0] for batch in asked.batches) == [1, 2, 2]


def test_shapes_that_differ(make):
    asked = make(max_batch_size=2, batch_timeout_micros=LONG)
    futures = [asked.ask("sums", x=np.ones([1, width], np.float32)) for width in (2, 3)]
    for future in futures:
        code, message = refused(future)
        assert code == "FAILED_PRECONDITION"
        assert message.startswith("Tensors with name 'sums_x:0' from different tasks have different shapes")
        assert "padding is turned off. Set pad_variable_length_inputs to true, or" in message
    assert not asked.batches


def test_padding_repeats_the_first_element(make):
    asked = make(max_batch_size=3, batch_timeout_micros=LONG, pad_variable_length_inputs=True)
    short = asked.ask("sums", x=np.float32([[5, 1], [7, 1]]))
    assert asked.ask("sums", x=np.float32([[1, 1, 1, 1]])).result(SECONDS)["sum"].tolist() == [4.0]
    # The first element of the tensor, not of the row.
    assert short.result(SECONDS)["sum"].tolist() == [6.0 + 2 * 5, 8.0 + 2 * 5]
    assert asked.batches == [[(3, 4)]]


def test_an_empty_tensor_cannot_be_padded(make):
    asked = make(max_batch_size=2, batch_timeout_micros=LONG, pad_variable_length_inputs=True)
    empty = asked.ask("total", x=np.zeros([1, 0], np.float32))
    refused(asked.ask("total", x=np.ones([1, 3], np.float32)))
    assert refused(empty)[0] in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")


def test_allowed_sizes_are_filled_up(make):
    asked = make(max_batch_size=8, allowed_batch_sizes=(2, 4, 8))
    x = rows(3)[0]
    np.testing.assert_array_equal(asked.ask("sums", x=x).result(SECONDS)["sum"], x.sum(1))
    assert asked.batches == [[(4, 2)]]
    # The first row once more, which is good if the others are.
    np.testing.assert_array_equal(asked.fed["sums_x:0"], [*x, x[0]])
    name = ":tensorflow:serving:batching_session:"
    text = asked.metrics.render()
    for line in (
        'padding_size_bucket{execution_batch_size="4",le="1.0"} 1',
        'padding_size_sum{execution_batch_size="4"} 1.0',
        "input_batch_size_sum 3.0",
        "processed_batch_size_sum 4.0",
        "wrapped_run_count 1",
        'queuing_latency_count{thread_pool_name="model_server_batch_threads"} 1',
    ):
        assert name + line in text.splitlines(), line


def test_sizes_of_requests(make):
    asked = make(max_batch_size=4)
    assert refused(asked.ask("sums", x=rows(5)[0])) == (
        "INVALID_ARGUMENT",
        "Task size 5 is larger than maximum input batch size 4",
    )
    two = asked.ask("two", a=np.array([b"a"], object), b=np.int32([1, 2]))
    message = "Batching Run() input tensors must have equal 0th-dimension size"
    assert refused(two) == ("INVALID_ARGUMENT", message)
    message = "Batching Run() input tensors must have at least one dimension"
    assert refused(asked.ask("scalar", x=np.float32(1))) == ("INVALID_ARGUMENT", message)
    nothing = asked.ask("sums", x=np.zeros([0, 2], np.float32)).result(SECONDS)
    assert nothing["sum"].shape == (0,)


def test_outputs_must_have_a_row_per_row(make):
    asked = make()
    message = "Batched output tensor has 0 dimensions"
    assert refused(asked.ask("total", x=rows(2)[0])) == ("FAILED_PRECONDITION", message)
    code, message = refused(asked.ask("doubled", x=rows(2)[0]))
    assert code == "FAILED_PRECONDITION"
    assert message.startswith("Batched output tensor's 0th dimension does not equal the sum of")


def test_a_full_queue(make):
    asked = make(max_batch_size=2, max_enqueued_batches=2, batch_timeout_micros=LONG, num_batch_threads=1)
    asked.may_run.clear()
    running = asked.ask("sums", x=rows(2)[0])
    asked.wait_for_runs(1)
    waiting = [asked.ask("sums", x=x) for x in rows(2, 2)]
    asked.wait_for_queue(2)
    probe = asked.ask("sums", x=rows(1)[0])
    assert refused(probe) == (
        "UNAVAILABLE",
        "The batch scheduling queue to which this task was submitted is full; currently 2 batches "
        "enqueued and max_enqueued_batches is 2",
    )
    asked.may_run.set()
    for future in (running, *waiting):
        assert future.result(SECONDS)["sum"].shape == (2,)


def test_large_requests_are_split(make):
    asked = make(
        max_batch_size=10,
        max_execution_batch_size=4,
        enable_large_batch_splitting=True,
        allowed_batch_sizes=(2, 4),
        max_enqueued_batches=3,
    )
    x = rows(9)[0]
    outputs = asked.ask("sums", x=x).result(SECONDS)
    np.testing.assert_array_equal(outputs["sum"], x.sum(1))
    assert sorted(batch[0][0] for batch in asked.batches) == [2, 4, 4]
    assert refused(asked.ask("sums", x=rows(11)[0]))[0] == "INVALID_ARGUMENT"
    # The batch that waits is filled up first.
    asked = make(
        max_batch_size=10,
        max_execution_batch_size=4,
        enable_large_batch_splitting=True,
        num_batch_threads=1,
    )
    asked.may_run.clear()
    futures = [asked.ask("sums", x=rows(4)[0])]
    asked.wait_for_runs(1)
    for count, size in ((1, 1), (3, 7)):
        futures.append(asked.ask("sums", x=x[:size]))
        asked.wait_for_queue(count)
    asked.may_run.set()
    assert [len(future.result(SECONDS)["sum"]) for future in futures] == [4, 1, 7]
    np.testing.assert_array_equal(futures[2].result()["sum"], x[:7].sum(1))
    assert [batch[0][0] for batch in asked.batches] == [4, 4, 4]
    few = make(
        max_batch_size=100,
        max_execution_batch_size=2,
        enable_large_batch_splitting=True,
        max_enqueued_batches=2,
    )
    code, message = refused(few.ask("sums", x=rows(5)[0]))
    assert code == "UNAVAILABLE"
    assert "task size is 5 but scheduling capacity is only 4 (num_enqueued_batches=1, max_enq" in message


def test_a_bad_row_does_not_hurt_the_others(make):
    asked = make(max_batch_size=3, batch_timeout_micros=LONG)
    good = asked.ask("sums", x=np.float32([[1, 2]]))
    bad = asked.ask("sums", x=np.float32([[-1, 2]]))
    assert asked.ask("sums", x=np.float32([[3, 4]])).result(SECONDS)["sum"].tolist() == [7.0]
    assert good.result(SECONDS)["sum"].tolist() == [3.0]
    code, message = refused(bad)
    assert code == "INVALID_ARGUMENT" and "a row must not be negative" in message
    line = 'queuing_latency_count{thread_pool_name="model_server_batch_threads"} 3'
    assert f":tensorflow:serving:batching_session:{line}" in asked.metrics.render().splitlines()


def test_deadlines(make):
    asked = make(max_batch_size=1, num_batch_threads=1)
    asked.may_run.clear()
    running = asked.ask("sums", timeout_in_ms=200, x=rows(1)[0])
    asked.wait_for_runs(1)
    waiting = asked.ask("sums", timeout_in_ms=200, x=rows(1)[0])
    message = "Run() timeout exceeded while waiting in batching queue"
    assert refused(waiting) == ("RESOURCE_EXHAUSTED", message)
    assert refused(running)[0] == "DEADLINE_EXCEEDED"
    asked.may_run.set()
    assert asked.ask("sums", x=rows(1)[0]).result(SECONDS)["sum"].tolist() == [1.0]
    assert len(asked.batches) == 2  # nobody waited for the other


def test_parameters_file(tmp_path):
    file = tmp_path / "batching.txt"
    assert read_batching_parameters(None).max_batch_size == 1000
    file.write_text(
        """max_batch_size { value: 8 } batch_timeout_micros { value: 5 } max_enqueued_batches { value: 3 }
        num_batch_threads { value: 2 } thread_pool_name { value: "pool" } allowed_batch_sizes: [2, 8]
        pad_variable_length_inputs: true"""
    )
    assert read_batching_parameters(file) == BatchingParameters(8, 5, 3, 2, "pool", (2, 8), True)
    file.write_text("enable_large_batch_splitting { value: true } max_execution_batch_size { value: 7 }")
    assert read_batching_parameters(file).rows_of_a_batch == 7
    for text, message in (
        ("max_batch_size: 8", "`--batching_parameters_file` must be a BatchingParameters in text format"),
        ("colour: 1", 'has no field named "colour"'),
        ("max_batch_size { value: 0 }", "`max_batch_size` must be at least 1. Received: 0"),
        ("allowed_batch_sizes: [8, 2]", "entries must be monotonically increasing. Received: "),
        ("allowed_batch_sizes: [2, 8]", "must match max_batch_size; last entry was 8; expected 1000"),
        ("batch_timeout_micros { value: -1 }", "must not be negative"),
        ("max_execution_batch_size { value: 8 }", "needs `enable_large_batch_splitting`"),
    ):
        file.write_text(text)
        with pytest.raises(StartupError, match=message.replace("[", r"\[")):
            read_batching_parameters(file)
    with pytest.raises(StartupError, match="No such file"):
        read_batching_parameters(tmp_path / "nowhere")


def test_per_model_file(servable, tmp_path):
    common = BatchingParameters(num_batch_threads=1, thread_pool_name="common", max_batch_size=3)
    batching = Batching(common, True, Metrics())
    assert batching.make_batcher(servable, tmp_path) is None
    (tmp_path / "batching_params.pbtxt").write_text(
        'max_batch_size { value: 5 } num_batch_threads { value: 7 } thread_pool_name { value: "own" }'
    )
    batcher = batching.make_batcher(servable, tmp_path)
    parameters = batcher._parameters
    assert (parameters.max_batch_size, parameters.num_batch_threads) == (5, 1)
    assert parameters.thread_pool_name == "common"
    batching.close()
