"""What there is to know of each update, for the callbacks that show it or write it down."""

import math

import keras
from keras import ops

from kerasllm.training.checkpoint import Checkpoints
from kerasllm.training.throughput import Throughput


class StepMeter(keras.callbacks.Callback):
    """Measures each update of a training; callbacks that show or keep that derive from it.

    Args:
        throughput: What measures the speed; None: no speed is told.
        checkpoints: Of a training that may be resumed; they must come before this among the callbacks.

    Attributes:
        step: Updates so far, those before a training was resumed included.
    """

    def __init__(self, throughput: Throughput | None = None, checkpoints: Checkpoints | None = None):
        super().__init__()
        self.throughput = throughput
        self.checkpoints = checkpoints
        self.step = 0
        self._skipped = 0

    def on_step(self, values: dict[str, float | None]) -> None:
        """Takes what was measured in an update.

        Args:
            values: `step`; `loss`, its own and not the epoch's mean, exact where all batches have the same
                number of tokens; `learning_rate`; `gradient_norm`, before clipping; `tokens_per_second`,
                `mfu`; and `skipped_updates`, the number of those that were left out so far. What is not
                known is None or not there.
        """
        raise NotImplementedError

    def set_model(self, model):
        super().set_model(model)
        if self.throughput:
            self.throughput.set_model(model)

    def on_train_begin(self, logs=None):
        self.step = self.checkpoints.position.step if self.checkpoints else 0
        optimizer = self.model.optimizer
        self._optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self._uses_norm = hasattr(self._optimizer, "gradient_norm")
        # An optimizer counts its updates, and those that a guard or a loss scale leaves out are none.
        self._tells_skipped = not getattr(self._optimizer, "gradient_accumulation_steps", None)
        iterations = self._iterations()
        self._skipped_before = max(0, self.step - iterations) if self.step else 0
        self._first = (self.step, iterations)
        self._skipped = self._skipped_before
        if self.throughput:
            self.throughput.on_train_begin()

    def on_epoch_begin(self, epoch, logs=None):
        if self.throughput:
            self.throughput.on_epoch_begin(epoch)
        # Sum and number of the losses of the running epoch, whose mean Keras reports.
        self._epoch_steps = self.checkpoints.position.batch if self.checkpoints else 0
        mean = float(ops.convert_to_numpy(self.model.metrics[0].result())) if self._epoch_steps else 0.0
        self._loss_sum = mean * self._epoch_steps
        self._begin = self.step  # of the batches that Keras counts from 0 now

    def on_train_batch_begin(self, batch, logs=None):
        self._rate = float(ops.convert_to_numpy(self._optimizer.learning_rate))
        if self.throughput:
            self.throughput.on_train_batch_begin(batch)

    def on_train_batch_end(self, batch, logs=None):
        if self.throughput:
            self.throughput.on_train_batch_end(batch)
        steps = self._begin + batch + 1 - self.step  # several per execution may be one call
        self.step += steps
        self._epoch_steps += steps
        sum_so_far = float(logs["loss"]) * self._epoch_steps
        loss, self._loss_sum = (sum_so_far - self._loss_sum) / steps, sum_so_far
        values = {"step": self.step, "loss": loss, "learning_rate": self._rate}
        if self._uses_norm:
            values["gradient_norm"] = float(ops.convert_to_numpy(self._optimizer.gradient_norm))
        if self.throughput:
            values["tokens_per_second"] = self.throughput.tokens_per_second
            if self.throughput.peak_flops is not None:
                values["mfu"] = self.throughput.mfu
        if self._tells_skipped:
            first_step, first_iterations = self._first
            done = self._iterations() - first_iterations
            self._skipped = self._skipped_before + self.step - first_step - done
            values["skipped_updates"] = self._skipped
        self.on_step(values)

    def _iterations(self) -> int:
        return int(ops.convert_to_numpy(self._optimizer.iterations))


def is_number(value: float | None) -> bool:
    """Returns whether a value is known and finite."""
    return value is not None and math.isfinite(value)
