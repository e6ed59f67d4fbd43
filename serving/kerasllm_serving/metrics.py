"""Numbers for Prometheus, in its text format, with names that need not end in `_total`."""

import bisect
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kerasllm_serving.errors import ServingError

# As vLLM's, so that dashboards fit.
SECONDS_TO_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0)
SECONDS_PER_TOKEN = (0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
SECONDS_OF_A_REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0)
# TensorFlow Serving's: microseconds, 10 * 1.8^k.
MICROSECONDS = tuple(10 * 1.8**power for power in range(33))

Labels = tuple[str, ...]


class Metrics:
    """All numbers of a server; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._families: dict[str, _Family] = {}

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> "Counter":
        """Adds a number that only grows.

        Args:
            name: Its name, as Prometheus shows it.
            text: What it is.
            labels: Names of its labels.
        """
        return self._add(Counter(self._lock, name, text, tuple(labels)))

    def gauge(self, name: str, text: str, read: Callable[[], float], labels: Sequence[tuple] = ()) -> None:
        """Adds a number that is read when it is asked for.

        Args:
            name: Its name.
            text: What it is.
            read: Returns the number.
            labels: Pairs of a label's name and its value.
        """
        family = self._add(_Gauge(self._lock, name, text, tuple(key for key, _ in labels)))
        family.readers[tuple(value for _, value in labels)] = read

    def histogram(
        self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> "Histogram":
        """Adds a distribution.

        Args:
            name: Its name.
            text: What it is.
            buckets: Upper bounds, rising.
            labels: Names of its labels.
        """
        return self._add(Histogram(self._lock, name, text, tuple(labels), tuple(buckets)))

    def render(self) -> str:
        """Returns all numbers in Prometheus' text format, version 0.0.4."""
        lines = []
        for family in list(self._families.values()):
            lines += [f"# HELP {family.name} {family.text}", f"# TYPE {family.name} {family.kind}"]
            lines += family.samples()
        return "\n".join(lines) + "\n"

    def _add(self, family):
        # A model that is loaded again goes on with its numbers.
        return self._families.setdefault(family.name, family)


class _Family:
    kind: str

    def __init__(self, lock: threading.Lock, name: str, text: str, labels: Labels) -> None:
        self.name = name
        self.text = text
        self._labels = labels
        self._lock = lock

    def _line(self, suffix: str, values: Labels, number: float, more: str = "") -> str:
        pairs = [f'{key}="{_escape(value)}"' for key, value in zip(self._labels, values, strict=True)]
        inside = ",".join([*pairs, *([more] if more else [])])
        return f"{self.name}{suffix}{{{inside}}} {number}" if inside else f"{self.name}{suffix} {number}"


class Counter(_Family):
    """A number that only grows; see `Metrics.counter`."""

    kind = "counter"

    def __init__(self, lock: threading.Lock, name: str, text: str, labels: Labels) -> None:
        super().__init__(lock, name, text, labels)
        self._numbers: dict[Labels, float] = {} if labels else {(): 0}

    def add(self, number: float = 1, *labels: str) -> None:
        """Adds to the number of these values of the labels."""
        with self._lock:
            self._numbers[labels] = self._numbers.get(labels, 0) + number

    def samples(self) -> list[str]:
        """Returns the lines of the text format."""
        with self._lock:
            return [self._line("", labels, number) for labels, number in self._numbers.items()]


class _Gauge(_Family):
    kind = "gauge"

    def __init__(self, lock: threading.Lock, name: str, text: str, labels: Labels) -> None:
        super().__init__(lock, name, text, labels)
        self.readers: dict[Labels, Callable[[], float]] = {}

    def samples(self) -> list[str]:
        return [self._line("", labels, read()) for labels, read in list(self.readers.items())]


class Histogram(_Family):
    """A distribution; see `Metrics.histogram`."""

    kind = "histogram"

    def __init__(
        self, lock: threading.Lock, name: str, text: str, labels: Labels, buckets: tuple[float, ...]
    ) -> None:
        super().__init__(lock, name, text, labels)
        self._buckets = buckets
        self._counts: dict[Labels, list[float]] = {}
        if not labels:
            self._counts[()] = self._empty()

    def _empty(self) -> list[float]:
        return [0] * (len(self._buckets) + 1) + [0.0]  # the last is the sum

    def observe(self, number: float, *labels: str) -> None:
        """Counts a number of these values of the labels."""
        with self._lock:
            counts = self._counts.setdefault(labels, self._empty())
            counts[bisect.bisect_left(self._buckets, number)] += 1
            counts[-1] += number

    def samples(self) -> list[str]:
        """Returns the lines of the text format."""
        lines = []
        with self._lock:
            for labels, counts in self._counts.items():
                total = 0
                for bound, count in zip((*self._buckets, "+Inf"), counts, strict=False):
                    total += count
                    lines.append(self._line("_bucket", labels, total, f'le="{bound}"'))
                lines += [self._line("_sum", labels, counts[-1]), self._line("_count", labels, total)]
        return lines


class ServingMetrics:
    """TensorFlow Serving's numbers of requests, with its names and labels.

    Args:
        metrics: Where they go.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._requests = metrics.counter(
            ":tensorflow:serving:request_count", "The total number of requests.", ("model_name", "status")
        )
        self._latency = metrics.histogram(
            ":tensorflow:serving:request_latency",
            "Microseconds of requests that succeeded.",
            MICROSECONDS,
            ("model_name", "API", "entrypoint"),
        )
        self._runtime = metrics.histogram(
            ":tensorflow:serving:runtime_latency",
            "Microseconds in TensorFlow's runtime.",
            MICROSECONDS,
            ("model_name", "API", "runtime"),
        )
        self._example_counts = metrics.histogram(
            ":tensorflow:serving:request_example_counts",
            "tf.Examples per request.",
            tuple(2.0**power for power in range(15)),
            ("model",),
        )
        self._examples = metrics.counter(
            ":tensorflow:serving:request_example_count_total",
            "The total number of tf.Examples.",
            ("model",),
        )

    @contextlib.contextmanager
    def observe(self, model_name: str, api: str, entrypoint: str) -> Iterator[None]:
        """Counts a request and how long it takes; see `ServerCore.observe`."""
        begin = time.perf_counter()
        status = "UNKNOWN"
        try:
            yield
            status = "OK"
        except ServingError as error:
            status = error.code.name
            raise
        finally:
            self._requests.add(1, model_name, status)
            if status == "OK":
                seconds = time.perf_counter() - begin
                self._latency.observe(seconds * 1e6, model_name, api, entrypoint)

    def timed(self, run: Callable, model_name: str, api: str) -> Callable:
        """Returns a function that runs a graph and tells how long that takes.

        Args:
            run: Runs the graph.
            model_name: The model.
            api: The call it is run for.
        """

        def timed_run(*arguments):
            begin = time.perf_counter()
            results = run(*arguments)
            self._runtime.observe((time.perf_counter() - begin) * 1e6, model_name, api, "TF1")
            return results

        return timed_run

    def count_examples(self, model_name: str, count: int) -> None:
        """Counts the tf.Examples of a request."""
        self._example_counts.observe(count, model_name)
        self._examples.add(count, model_name)


class BatchingMetrics:
    """TensorFlow Serving's numbers of batches, with its names and labels.

    Args:
        metrics: Where they go.
    """

    def __init__(self, metrics: Metrics) -> None:
        name = ":tensorflow:serving:batching_session:"
        sizes = tuple(2.0**power for power in range(14))
        self.queuing_latency = metrics.histogram(
            name + "queuing_latency",
            "Microseconds that requests wait for their batch.",
            tuple(100 * 1.2**power for power in range(52)),
            ("thread_pool_name",),
        )
        self.padding_size = metrics.histogram(
            name + "padding_size", "Rows that fill up batches.", sizes, ("execution_batch_size",)
        )
        self.input_batch_size = metrics.histogram(name + "input_batch_size", "Rows of requests.", sizes)
        self.processed_batch_size = metrics.histogram(
            name + "processed_batch_size", "Rows of batches.", sizes
        )
        self.wrapped_run_count = metrics.counter(name + "wrapped_run_count", "Batches that were run.")


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
