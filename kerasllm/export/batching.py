"""Requests put together inside of the graph, where the server does not do it."""

import dataclasses
import uuid
from collections.abc import Callable, Sequence

import tensorflow as tf

from kerasllm.generation.checks import check_batch
from kerasllm.generation.stops import MOST_STOP_STRINGS, check_stop_strings

Outputs = dict[str, tf.Tensor]


@dataclasses.dataclass(frozen=True)
class Batching:
    """How a graph puts requests together that come at the same time.

    The names are those of TensorFlow Serving's batching parameters, which do the same from outside for all
    signatures; have one of the two. A request that breaks a rule fails those it is put together with.

    Args:
        batch_timeout_micros: How long a request waits for others, in microseconds.
        num_batch_threads: Batches that are computed at a time.
        max_enqueued_batches: Batches that wait; what comes when there are more fails with UNAVAILABLE.
        allowed_batch_sizes: Numbers of rows that batches are filled up to, ascending, the last of them the
            export's `max_batch_size`; none: batches are as they come.

    Raises:
        ValueError: If a number does not fit.
    """

    batch_timeout_micros: int = 2000
    num_batch_threads: int = 1
    max_enqueued_batches: int = 100
    allowed_batch_sizes: Sequence[int] = ()

    def __post_init__(self):
        if self.batch_timeout_micros < 0 or self.num_batch_threads < 1 or self.max_enqueued_batches < 1:
            raise ValueError(f"Times and numbers of a batching must be positive. Received: {self}")
        if any(size < 1 for size in self.allowed_batch_sizes) or list(self.allowed_batch_sizes) != sorted(
            set(self.allowed_batch_sizes)
        ):
            raise ValueError(f"`allowed_batch_sizes` must ascend. Received: {self.allowed_batch_sizes}")

    def put_together(
        self, function: Callable[..., Outputs], specs: Sequence[tf.TensorSpec], max_batch_size: int
    ) -> Callable[..., Outputs]:
        """Makes a function of which calls at the same time are one.

        Args:
            function: Gets tensors `[batch]` by the names of `specs`, and perhaps `stop` strings
                `[batch, count]`; returns tensors with the rows first.
            specs: Its inputs.
            max_batch_size: Most rows, of a call and of a batch.

        Returns:
            The function.

        Raises:
            ValueError: If `allowed_batch_sizes` does not end with `max_batch_size`.
        """
        if self.allowed_batch_sizes and self.allowed_batch_sizes[-1] != max_batch_size:
            raise ValueError(
                f"`allowed_batch_sizes` must end with `max_batch_size`, {max_batch_size}. "
                f"Received: {self.allowed_batch_sizes}"
            )
        ranks = {spec.name: spec.shape.rank for spec in specs}
        # Two functions of one name would share a queue.
        name = f"batching_{uuid.uuid4().hex}"

        def compute(*values):
            return function(**dict(zip(ranks, values, strict=True)))

        def run(**inputs):
            inputs = check_batch({key: inputs[key] for key in ranks}, max_batch_size, ranks)
            if "stop" in inputs:
                inputs["stop"] = _widen(inputs["stop"])
            # Traced here: inside of the signature's own graph.
            computed = tf.function(compute, autograph=False).get_concrete_function(*specs)
            outputs = tf.raw_ops.BatchFunction(
                in_tensors=list(inputs.values()),
                captured_tensors=computed.captured_inputs,
                f=computed,
                num_batch_threads=self.num_batch_threads,
                max_batch_size=max_batch_size,
                batch_timeout_micros=self.batch_timeout_micros,
                max_enqueued_batches=self.max_enqueued_batches,
                allowed_batch_sizes=list(self.allowed_batch_sizes),
                Tout=[output.dtype for output in computed.outputs],
                shared_name=name,
                batching_queue=name,
                enable_large_batch_splitting=False,
            )
            outputs = tf.nest.pack_sequence_as(computed.structured_outputs, outputs)
            for key, output in outputs.items():
                output.set_shape(computed.structured_outputs[key].shape)
            return outputs

        return run


def _widen(stop: tf.Tensor) -> tf.Tensor:
    """Fills the rows of stop strings up to the most there may be, so that all requests are as wide."""
    stop = check_stop_strings(stop)
    return tf.pad(stop, [[0, 0], [0, MOST_STOP_STRINGS - tf.shape(stop)[1]]], constant_values="")
