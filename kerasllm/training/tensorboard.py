"""A training's numbers for TensorBoard, written by TensorFlow itself."""

import os
import pathlib

import tensorflow as tf

from kerasllm.files import new_file
from kerasllm.training.checkpoint import Checkpoints, is_chief
from kerasllm.training.meter import StepMeter, is_number
from kerasllm.training.throughput import Throughput

# `tf.summary.scalar` and `text` are TensorBoard's and want it installed; all they write is this.
_SCALAR, _TEXT = (
    tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": plugin}, data_class=data_class)
    for plugin, data_class in (("scalars", "DATA_CLASS_SCALAR"), ("text", "DATA_CLASS_TENSOR"))
)


class TensorBoardLog(StepMeter):
    """Writes loss, learning rate, norm of the gradients and speed as scalars for TensorBoard.

    Unlike Keras's `TensorBoard` it writes each update's own loss, goes on where a resumed training goes
    on, and needs no package but TensorFlow. `tensorboard --logdir FOLDER`, where it is installed, shows
    them. On several workers the first one writes.

    Args:
        folder: Where the event files are.
        checkpoints: Of a training that may be resumed; they must come before this among the callbacks.
            What the folder says of later updates than the training goes on from is then taken out;
            without them what is there stays.
        every_steps: Updates from one point of the curves to the next.
        throughput: What measures the speed, such as `Throughput(tokens_per_step=...)`; not among the
            callbacks itself. None: no speed is written.

    Raises:
        ValueError: If `every_steps` is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        checkpoints: Checkpoints | None = None,
        every_steps: int = 1,
        throughput: Throughput | None = None,
    ):
        super().__init__(throughput, checkpoints)
        if every_steps < 1:
            raise ValueError(f"`every_steps` must be at least 1. Received: every_steps={every_steps}")
        self.folder = pathlib.Path(folder)
        self.every_steps = every_steps
        self._writer = None

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        if is_chief(self.model.distribute_strategy):
            if self.checkpoints:
                drop_events(self.folder, self.step)
            self._writer = tf.summary.create_file_writer(str(self.folder))

    def on_step(self, values):
        if values["step"] % self.every_steps == 0:
            step = values.pop("step")
            self._write(step, {f"training/{name}": value for name, value in values.items()})

    def on_epoch_end(self, epoch, logs=None):
        names = [name for name in logs or {} if name.startswith("val_")]
        self._write(self.step, {f"validation/{name.removeprefix('val_')}": logs[name] for name in names})
        if self._writer is not None:
            self._writer.flush()

    def _write(self, step: int, values: dict[str, float | None]) -> None:
        if self._writer is None:
            return
        with self._writer.as_default(step):
            for name, value in values.items():
                if is_number(value):
                    tf.summary.write(name, tf.constant(value, tf.float32), metadata=_SCALAR)

    def write_text(self, name: str, text: str) -> None:
        """Writes a text as of the last update, such as a sample.

        Args:
            name: What it is called.
            text: In Markdown.
        """
        if self._writer is not None:
            with self._writer.as_default(self.step):
                tf.summary.write(name, tf.constant(text), metadata=_TEXT)

    def on_train_end(self, logs=None):
        self.close()

    def close(self) -> None:
        """Ends the file; also for a training that was interrupted, where Keras calls nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def drop_events(folder: pathlib.Path, step: int) -> None:
    """Takes out of TensorBoard's files what they say of the updates after one.

    Args:
        folder: Where the event files are, or none.
        step: The last update to keep.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        kept = []
        try:
            for record in tf.data.TFRecordDataset(str(path)):
                event = tf.compat.v1.Event.FromString(record.numpy())
                if event.step <= step:
                    kept.append(record.numpy())
        except tf.errors.DataLossError:  # a kill may have cut the last record off
            pass
        with new_file(path) as temporary, tf.io.TFRecordWriter(str(temporary)) as writer:
            for record in kept:
                writer.write(record)
