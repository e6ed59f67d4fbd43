"""Puts the requests that come together into one run of the graph, by TensorFlow Serving's rules.

Requests that feed and fetch the tensors of one signature wait in a queue of batches until the open one is
full or its time is up. All queues share the threads that run batches, whatever model they belong to.
"""

import collections
import dataclasses
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import grpc
import numpy as np
from tensorflow.core.protobuf import meta_graph_pb2

from kerasllm_serving.config_files import read_config
from kerasllm_serving.errors import ServingError, StartupError, invalid_argument
from kerasllm_serving.metrics import BatchingMetrics, Metrics
from kerasllm_serving.model import Servable

PER_MODEL_FILE = "batching_params.pbtxt"
_FLAG = "--batching_parameters_file"
_MOST_PADDED_DIMENSIONS = 6

# Arrays by tensor name.
Feeds = Mapping[str, np.ndarray]
Key = tuple[frozenset[str], frozenset[str]]


@dataclasses.dataclass(frozen=True)
class BatchingParameters:
    """TensorFlow Serving's message of that name.

    Args:
        max_batch_size: Most rows of a request, and of a batch unless `max_execution_batch_size` says less.
        batch_timeout_micros: Microseconds that a batch waits to become full, where a thread is free.
        max_enqueued_batches: Most batches that wait in a queue, the open one included.
        num_batch_threads: How many batches run at once, of all models.
        thread_pool_name: What the numbers of queues are labelled with.
        allowed_batch_sizes: Sizes that a batch may have, rising; it is filled up with copies of a row.
            Empty: any.
        pad_variable_length_inputs: Whether tensors of unlike shapes are made alike, with copies of their
            first element.
        enable_large_batch_splitting: Whether a request may be run in several batches.
        max_execution_batch_size: Most rows of a batch, where requests are split; 0: `max_batch_size`.
    """

    max_batch_size: int = 1000
    batch_timeout_micros: int = 0
    max_enqueued_batches: int = 10
    num_batch_threads: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))
    thread_pool_name: str = "model_server_batch_threads"
    allowed_batch_sizes: tuple[int, ...] = ()
    pad_variable_length_inputs: bool = False
    enable_large_batch_splitting: bool = False
    max_execution_batch_size: int = 0

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_enqueued_batches", "num_batch_threads"):
            if getattr(self, name) < 1:
                raise StartupError(f"`{name}` must be at least 1. Received: {getattr(self, name)}")
        if self.batch_timeout_micros < 0 or self.max_execution_batch_size < 0:
            raise StartupError(
                "`batch_timeout_micros` and `max_execution_batch_size` must not be negative. Received: "
                f"{self.batch_timeout_micros} and {self.max_execution_batch_size}"
            )
        if self.max_execution_batch_size and not self.enable_large_batch_splitting:
            raise StartupError(
                "`max_execution_batch_size` needs `enable_large_batch_splitting`. Received: "
                f"{self.max_execution_batch_size} without it"
            )
        if self.max_execution_batch_size > self.max_batch_size:
            raise StartupError(
                "`max_execution_batch_size` must be at most `max_batch_size`. Received: "
                f"{self.max_execution_batch_size} and {self.max_batch_size}"
            )
        sizes = self.allowed_batch_sizes
        if sizes and (list(sizes) != sorted(set(sizes)) or sizes[0] < 1):
            raise StartupError(
                f"allowed_batch_sizes entries must be monotonically increasing. Received: {list(sizes)}"
            )
        if sizes and sizes[-1] != self.rows_of_a_batch:
            name = "max_execution_batch_size" if self.enable_large_batch_splitting else "max_batch_size"
            raise StartupError(
                f"Last entry in allowed_batch_sizes must match {name}; last entry was {sizes[-1]}; "
                f"expected {self.rows_of_a_batch}"
            )

    @property
    def rows_of_a_batch(self) -> int:
        """Most rows of a batch."""
        return self.max_execution_batch_size or self.max_batch_size

    def round_up(self, rows: int) -> int:
        """Returns the smallest allowed size that holds so many rows."""
        return next((size for size in self.allowed_batch_sizes if size >= rows), rows)


def read_batching_parameters(path: Path | None) -> BatchingParameters:
    """Reads a file.

    Args:
        path: The file; None: the defaults.

    Returns:
        The parameters.

    Raises:
        StartupError: If it is no such file, or its numbers contradict each other.
    """
    if path is None:
        return BatchingParameters()
    read = read_config(path, "BatchingParameters", _FLAG)
    given = {}
    for field, value in read.ListFields():
        if field.message_type is not None:
            value = value.value
        given[field.name] = value if isinstance(value, int | str) else tuple(value)
    try:
        return BatchingParameters(**given)
    except StartupError as error:
        raise StartupError(f"{error} in {path}") from error


@dataclasses.dataclass(eq=False)
class _Task:
    """Rows that wait to be run, and what became of them."""

    feeds: Feeds
    rows: int
    deadline: float
    begin: float = dataclasses.field(default_factory=time.monotonic)
    is_started: bool = False
    outputs: dict[str, np.ndarray] | None = None
    error: Exception | None = None
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    def finish(self, outputs: dict[str, np.ndarray] | None = None, error: Exception | None = None) -> None:
        self.outputs, self.error = outputs, error
        self.done.set()


@dataclasses.dataclass(eq=False)
class _Batch:
    tasks: list[_Task] = dataclasses.field(default_factory=list)
    rows: int = 0

    def add(self, task: _Task) -> None:
        self.tasks.append(task)
        self.rows += task.rows


class _Queue:
    """The batches of one signature that wait; the last one is open. The scheduler's lock guards it."""

    def __init__(self, parameters: BatchingParameters, process: Callable[[list[_Task]], None]) -> None:
        self.parameters = parameters
        self.process = process
        self.batches = collections.deque([_Batch()])

    def check_capacity(self, rows: int) -> None:
        parameters = self.parameters
        if rows > parameters.max_batch_size:
            raise invalid_argument(
                f"Task size {rows} is larger than maximum input batch size {parameters.max_batch_size}"
            )
        count = len(self.batches)
        full = "The batch scheduling queue to which this task was submitted is full; "
        most = parameters.rows_of_a_batch
        if parameters.enable_large_batch_splitting:
            open_rows = self.batches[-1].rows
            capacity = (parameters.max_enqueued_batches - count) * most + most - open_rows
            if rows > capacity:
                raise _unavailable(
                    f"{full}task size is {rows} but scheduling capacity is only {capacity} "
                    f"(num_enqueued_batches={count}, max_enqueued_batches="
                    f"{parameters.max_enqueued_batches}, open_batch_size={open_rows}, "
                    f"max_execution_batch_size={most})"
                )
        elif self.batches[-1].rows + rows > most and count >= parameters.max_enqueued_batches:
            raise _unavailable(
                f"{full}currently {count} batches enqueued and max_enqueued_batches is "
                f"{parameters.max_enqueued_batches}"
            )

    def add(self, task: _Task) -> None:
        if self.batches[-1].rows + task.rows > self.parameters.rows_of_a_batch:
            self.batches.append(_Batch())
        self.batches[-1].add(task)

    def room(self) -> int:
        """Returns how many rows the open batch still takes."""
        return self.parameters.rows_of_a_batch - self.batches[-1].rows

    def due(self) -> float:
        """Returns when a batch can be run, on the clock of `time.monotonic`."""
        first = self.batches[0]
        if not first.tasks:
            return math.inf
        if len(self.batches) > 1 or first.rows >= self.parameters.rows_of_a_batch:
            return -math.inf
        return first.tasks[0].begin + self.parameters.batch_timeout_micros / 1e6

    def take(self) -> list[_Task]:
        batch = self.batches.popleft()
        if not self.batches:
            self.batches.append(_Batch())
        for task in batch.tasks:
            task.is_started = True
        return batch.tasks


class BatchScheduler:
    """The threads that run the batches of all models.

    Args:
        num_threads: How many batches run at once.
    """

    def __init__(self, num_threads: int) -> None:
        self._changed = threading.Condition()
        self._queues: list[_Queue] = []
        self._is_closed = False
        for number in range(num_threads):
            threading.Thread(target=self._work, name=f"batch-{number}", daemon=True).start()

    def add_queue(self, queue: _Queue) -> None:
        """Begins to run the batches of a queue."""
        with self._changed:
            self._queues.append(queue)

    def remove_queue(self, queue: _Queue) -> None:
        """Ends that; nobody waits for its batches any more."""
        with self._changed:
            self._queues.remove(queue)

    def schedule(self, queue: _Queue, rows: int, split: Callable[[int], list[_Task]]) -> list[_Task]:
        """Puts a request into a queue.

        Args:
            queue: The queue.
            rows: Rows of the request.
            split: From the rows that the open batch still takes to the tasks, one or more.

        Returns:
            The tasks.

        Raises:
            ServingError: If the request is too large or the queue is full.
        """
        with self._changed:
            queue.check_capacity(rows)
            tasks = split(queue.room())
            for task in tasks:
                queue.add(task)
            self._changed.notify(len(tasks))
        return tasks

    def close(self) -> None:
        """Ends the threads once they are idle."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while True:
                    if self._is_closed:
                        return
                    queue = min(self._queues, key=_Queue.due, default=None)
                    due = queue.due() if queue else math.inf
                    now = time.monotonic()
                    if due <= now:
                        break
                    self._changed.wait(None if due == math.inf else due - now)
                tasks = queue.take()
                # The next is not always the same where several are full.
                self._queues.remove(queue)
                self._queues.append(queue)
            queue.process(tasks)


class Batcher:
    """Runs the graph of one version in batches.

    Args:
        run: Runs the graph, see `Servable.run`.
        signatures: Which tensors are fed and fetched together; what asks for others is run by itself.
        parameters: When requests are put together.
        scheduler: The threads.
        metrics: Where the numbers go.
    """

    def __init__(
        self,
        run: Callable[..., list[np.ndarray]],
        signatures: Mapping[str, meta_graph_pb2.SignatureDef],
        parameters: BatchingParameters,
        scheduler: BatchScheduler,
        metrics: BatchingMetrics,
    ) -> None:
        self._run = run
        self._parameters = parameters
        self._scheduler = scheduler
        self._metrics = metrics
        self._queues: dict[Key, _Queue] = {}
        for signature in signatures.values():
            key = (_names(signature.inputs), _names(signature.outputs))
            if key not in self._queues:
                queue = _Queue(parameters, lambda tasks, key=key: self._process(tasks, key[1]))
                self._queues[key] = queue
                scheduler.add_queue(queue)

    def run(self, feeds: Feeds, fetches: Sequence[str], timeout_in_ms: int = 0) -> list[np.ndarray]:
        """Runs the graph, perhaps together with other requests; otherwise as `Servable.run`."""
        queue = self._queues.get((frozenset(feeds), frozenset(fetches)))
        if queue is None:
            return self._run(feeds, fetches, timeout_in_ms)
        rows = _count_rows(feeds)
        if not rows:  # no batch would ever be full of these
            return self._run(feeds, fetches, timeout_in_ms)
        self._metrics.input_batch_size.observe(rows)
        deadline = time.monotonic() + timeout_in_ms / 1000 if timeout_in_ms else math.inf

        def split(room: int) -> list[_Task]:
            if not self._parameters.enable_large_batch_splitting:
                return [_Task(feeds, rows, deadline)]
            bounds = [0, *range(room, rows, self._parameters.rows_of_a_batch), rows]
            return [
                _Task({name: array[begin:end] for name, array in feeds.items()}, end - begin, deadline)
                for begin, end in zip(bounds, bounds[1:], strict=False)
                if begin < end
            ]

        tasks = self._scheduler.schedule(queue, rows, split)
        for task in tasks:
            _wait(task)
        parts = [task.outputs for task in tasks]
        if len(parts) == 1:
            return [parts[0][name] for name in fetches]
        return [np.concatenate([part[name] for part in parts]) for name in fetches]

    def close(self) -> None:
        """Ends it; nobody waits for a run any more."""
        for queue in self._queues.values():
            self._scheduler.remove_queue(queue)

    def _process(self, tasks: list[_Task], fetches: frozenset[str]) -> None:
        now = time.monotonic()
        for task in tasks:
            self._metrics.queuing_latency.observe(
                (now - task.begin) * 1e6, self._parameters.thread_pool_name
            )
        self._run_tasks(tasks, fetches)

    def _run_tasks(self, tasks: list[_Task], fetches: frozenset[str]) -> None:
        now = time.monotonic()
        waiting = [task for task in tasks if task.deadline > now]
        for task in tasks:
            if task not in waiting:
                task.finish(error=_too_late())
        if not waiting:
            return
        try:
            self._run_batch(waiting, sorted(fetches))
        except Exception as error:
            # What is wrong with one request must not be said to the others.
            is_of_a_row = isinstance(error, ServingError) and error.code == grpc.StatusCode.INVALID_ARGUMENT
            if len(waiting) > 1 and is_of_a_row:
                for task in waiting:
                    self._run_tasks([task], fetches)
                return
            for task in waiting:
                task.finish(error=error)

    def _run_batch(self, tasks: list[_Task], fetches: list[str]) -> None:
        rows = sum(task.rows for task in tasks)
        size = self._parameters.round_up(rows)
        self._metrics.padding_size.observe(size - rows, str(size))
        self._metrics.processed_batch_size.observe(size)
        merged = {
            name: self._merge(name, [task.feeds[name] for task in tasks], size - rows)
            for name in tasks[0].feeds
        }
        last = max(task.deadline for task in tasks)
        timeout = 0 if last == math.inf else max(1, int((last - time.monotonic()) * 1000))
        self._metrics.wrapped_run_count.add()
        outputs = self._run(merged, fetches, timeout)
        for array in outputs:
            if not array.ndim:
                raise _unfit("Batched output tensor has 0 dimensions")
            if len(array) != size:
                raise _unfit(
                    "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension "
                    "sizes of the input tensors"
                )
        begin = 0
        for task in tasks:
            end = begin + task.rows
            task.finish({name: array[begin:end] for name, array in zip(fetches, outputs, strict=True)})
            begin = end

    def _merge(self, name: str, arrays: list[np.ndarray], padding: int) -> np.ndarray:
        """Puts the rows of tasks one after the other, and copies of a row to fill up the batch."""
        if len({array.shape[1:] for array in arrays}) > 1:
            can_be_padded = len({array.ndim for array in arrays}) == 1
            if not self._parameters.pad_variable_length_inputs or not can_be_padded:
                raise _unfit(
                    f"Tensors with name '{name}' from different tasks have different shapes and padding is "
                    "turned off. Set pad_variable_length_inputs to true, or ensure that all tensors with "
                    "the same name have equal dimensions starting with the first dim."
                )
            shape = np.max([array.shape for array in arrays], axis=0)
            arrays = [_pad(array, shape) for array in arrays]
        if padding:
            arrays = [*arrays, np.repeat(arrays[-1][:1], padding, axis=0)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class Batching:
    """How the models of a server are batched.

    Args:
        common: The parameters; the number of threads is that of all models.
        is_per_model: Whether a version folder says itself how it is batched, in `batching_params.pbtxt`;
            one without that file is not.
        metrics: Where the numbers go.
    """

    def __init__(self, common: BatchingParameters, is_per_model: bool, metrics: Metrics) -> None:
        self._common = common
        self._is_per_model = is_per_model
        self._metrics = BatchingMetrics(metrics)
        self._scheduler = BatchScheduler(common.num_batch_threads)

    def make_batcher(self, servable: Servable, path: Path) -> Batcher | None:
        """Makes what runs a version in batches.

        Args:
            servable: The loaded version.
            path: Its folder.

        Returns:
            The batcher; None: the version is not batched.

        Raises:
            StartupError: As `read_batching_parameters`.
        """
        parameters = self._common
        if self._is_per_model:
            if not (path / PER_MODEL_FILE).is_file():
                return None
            parameters = dataclasses.replace(
                read_batching_parameters(path / PER_MODEL_FILE),
                num_batch_threads=self._common.num_batch_threads,
                thread_pool_name=self._common.thread_pool_name,
            )
        return Batcher(servable.run, servable.signatures, parameters, self._scheduler, self._metrics)

    def close(self) -> None:
        """Ends the threads."""
        self._scheduler.close()


def _names(tensors: Mapping[str, meta_graph_pb2.TensorInfo]) -> frozenset[str]:
    return frozenset(info.name for info in tensors.values())


def _count_rows(feeds: Feeds) -> int:
    if not feeds:
        raise invalid_argument("Batching Run() must have at least one input tensor")
    if not all(array.ndim for array in feeds.values()):
        raise invalid_argument("Batching Run() input tensors must have at least one dimension")
    sizes = {len(array) for array in feeds.values()}
    if len(sizes) > 1:
        raise invalid_argument("Batching Run() input tensors must have equal 0th-dimension size")
    return sizes.pop()


def _pad(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Makes all dimensions but the first as large as asked, with copies of the first element."""
    if array.ndim > _MOST_PADDED_DIMENSIONS:
        raise invalid_argument("Only tensors with rank from 1 to 6 can be padded.")
    if array.shape[1:] == tuple(shape[1:]):
        return array
    if not array.size:
        raise invalid_argument("Got empty tensor in batch of non-empty tensors.")
    padded = np.full((len(array), *shape[1:]), array.flat[0], array.dtype)
    padded[tuple(map(slice, array.shape))] = array
    return padded


def _wait(task: _Task) -> None:
    """Waits until a task is done; raises its error, or one of its own when the time is up."""
    remaining = None if task.deadline == math.inf else max(0.0, task.deadline - time.monotonic())
    if not task.done.wait(remaining):
        raise (
            ServingError(grpc.StatusCode.DEADLINE_EXCEEDED, "Timed out waiting for the batch to run")
            if task.is_started
            else _too_late()
        )
    if isinstance(task.error, ServingError):
        # One of its own for each thread: where it was raised is written into it.
        raise ServingError(task.error.code, task.error.message) from task.error
    if task.error:
        raise task.error


def _too_late() -> ServingError:
    return ServingError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, "Run() timeout exceeded while waiting in batching queue"
    )


def _unavailable(message: str) -> ServingError:
    return ServingError(grpc.StatusCode.UNAVAILABLE, message)


def _unfit(message: str) -> ServingError:
    return ServingError(grpc.StatusCode.FAILED_PRECONDITION, message)
