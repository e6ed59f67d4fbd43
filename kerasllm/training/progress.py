"""What a training shows while it runs and leaves behind: a bar, a log and a plot."""

import contextlib
import json
import math
import os
import pathlib
import time

import keras
import rich.console
import rich.progress
from keras import ops

from kerasllm.files import new_file, write_text
from kerasllm.training.checkpoint import Checkpoints


class TrainingProgress(keras.callbacks.Callback):
    """Shows loss, perplexity, tokens per second and the time left, and logs them as JSON lines.

    On a terminal it is a bar; elsewhere a line every tenth of the way. The losses of the steps are exact
    where all steps have the same number of tokens, as with a dataset that repeats.

    Args:
        total_steps: Updates of the whole training.
        tokens_per_step: Tokens of one update.
        log_path: File for one JSON object per update and per validation; None: no file. What is there of
            later updates than a resumed training begins with is taken out.
        checkpoints: Of a training that may be resumed; they must come before this among the callbacks.
    """

    def __init__(
        self,
        total_steps: int,
        tokens_per_step: int,
        log_path: str | os.PathLike | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        super().__init__()
        self.checkpoints = checkpoints
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.log_path = log_path
        self.step = 0
        self.train_losses: list[tuple[int, float]] = []
        self.validation_losses: list[tuple[int, float]] = []
        self._console = rich.console.Console(stderr=True)
        self._bar = self._log = None

    def on_train_begin(self, logs=None):
        self.step = self.checkpoints.position.step if self.checkpoints else 0
        self._read_log()
        self._log = open(self.log_path, "a", encoding="utf-8") if self.log_path else None
        self._begin = None
        self._bar = rich.progress.Progress(
            "[progress.description]{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            "{task.fields[numbers]}",
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=self.total_steps, numbers="compiling …")
        self._bar.start()

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = None  # the time of a validation is none of the training's
        # Sum and number of the losses of the running epoch, whose mean Keras reports.
        self._epoch_steps = self.checkpoints.position.batch if self.checkpoints else 0
        mean = float(ops.convert_to_numpy(self.model.metrics[0].result())) if self._epoch_steps else 0.0
        self._loss_sum = mean * self._epoch_steps

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        self._epoch_steps += 1
        # Keras reports the mean of the epoch so far; the step's own loss is what it added.
        loss = float(logs["loss"]) * self._epoch_steps - self._loss_sum
        self._loss_sum += loss
        self.train_losses.append((self.step, loss))
        now = time.monotonic()
        if self._begin is None:  # the first step's time is the compiler's
            self._begin = (now, self.step)
        seconds, steps = now - self._begin[0], self.step - self._begin[1]
        speed = self.tokens_per_step * steps / seconds if steps else math.nan
        self._write(step=self.step, loss=loss, tokens_per_second=speed if steps else None)
        numbers = f"loss {loss:.3f} · {speed:,.0f} tokens/s"
        self._bar.update(self._task, completed=self.step, numbers=numbers)
        tenth = max(1, self.total_steps // 10)
        if not self._console.is_terminal and steps and self.step % tenth == 0:
            left = (self.total_steps - self.step) * seconds / steps
            self._console.print(f"step {self.step}/{self.total_steps} · {numbers} · {left:.0f} s left")

    def on_epoch_end(self, epoch, logs=None):
        if "val_loss" in logs:
            loss = float(logs["val_loss"])
            self.validation_losses.append((self.step, loss))
            self._write(step=self.step, validation_loss=loss, validation_perplexity=math.exp(loss))
            self._console.print(
                f"step {self.step}: validation loss {loss:.4f}, perplexity {math.exp(loss):.2f}"
            )

    def on_train_end(self, logs=None):
        self.close()

    def close(self) -> None:
        """Ends the bar and the log; also for a training that was interrupted, where Keras calls nothing."""
        if self._bar is not None:
            self._bar.stop()  # gives the terminal its cursor back
        if self._log:
            self._log.close()

    def _read_log(self):
        """Takes up what a log says of the updates before this training goes on, and drops the rest."""
        kept = []
        if self.step and self.log_path and os.path.exists(self.log_path):
            for line in pathlib.Path(self.log_path).read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a kill may have cut the last line off
                    values = json.loads(line)
                    if values["step"] <= self.step:
                        kept.append(line)
                        if "loss" in values:
                            self.train_losses.append((values["step"], values["loss"]))
                        if "validation_loss" in values:
                            self.validation_losses.append((values["step"], values["validation_loss"]))
        if self.log_path:
            write_text(self.log_path, "".join(line + "\n" for line in kept))

    def _write(self, **values):
        if self._log:
            self._log.write(json.dumps(values) + "\n")
            self._log.flush()

    def plot(self, path: str | os.PathLike, baselines: dict[str, float] | None = None) -> pathlib.Path:
        """Draws the losses.

        Args:
            path: The PNG file to write.
            baselines: Names to losses in nats per token, drawn as level lines.

        Returns:
            The file.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(*zip(*self.train_losses, strict=True), color="tab:blue", alpha=0.35, label="training")
        if self.validation_losses:
            steps, losses = zip(*self.validation_losses, strict=True)
            axes.plot(steps, losses, color="tab:blue", marker="o", label="validation")
        for (name, loss), style in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
            axes.axhline(loss, color="tab:gray", linestyle=style, label=f"{name} baseline")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title="Training")
        axes.grid(alpha=0.3)
        axes.legend()
        with new_file(path) as temporary:
            FigureCanvasAgg(figure).print_png(temporary)
        return pathlib.Path(path)
