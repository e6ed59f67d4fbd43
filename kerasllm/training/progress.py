"""What a training shows while it runs and leaves behind: a bar, a log, a plot and a report."""

import contextlib
import json
import math
import os
import pathlib
import time
from typing import Any

import rich.console
import rich.progress

from kerasllm.files import new_file, write_text
from kerasllm.training.checkpoint import Checkpoints, is_chief
from kerasllm.training.meter import StepMeter, is_number
from kerasllm.training.report import draw_losses, write_report
from kerasllm.training.throughput import Throughput

_LOGGED = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "mfu", "skipped_updates")


class TrainingProgress(StepMeter):
    """Shows loss, tokens per second and the time left, logs each update as a JSON line, writes a report.

    On a terminal it is a bar; elsewhere a line every tenth of the way. The losses of the steps are exact
    where all steps have the same number of tokens, as with a dataset that repeats. An update that is left
    out is told, and of several in a row the first one. On several workers the first one writes files.

    Where a training may be interrupted, `with contextlib.closing(progress):` around `fit` ends the bar and
    writes the report of what there is then.

    Args:
        total_steps: Updates of the whole training.
        tokens_per_step: Tokens of one update.
        log_path: File for one JSON object per update, validation and look at samples; None: no file. What
            is there of later updates than a resumed training begins with is taken out.
        checkpoints: Of a training that may be resumed; they must come before this among the callbacks.
        flops_per_step, peak_flops: As in `Throughput`.
        report_path: File for the report, see `kerasllm.training.write_report`; None: none.
        title: What the report is called.
        settings: What the report says of the training, by name; dictionaries in it are sections.
        baselines: Names to losses in nats per token, drawn beside the losses.

    Attributes:
        train_losses, validation_losses: Step and loss in nats per token.
        curves: For each name in the log that is a number of an update, step and value.
        samples: What the model wrote: step, prompt, text.
    """

    def __init__(
        self,
        total_steps: int,
        tokens_per_step: float,
        log_path: str | os.PathLike | None = None,
        checkpoints: Checkpoints | None = None,
        *,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        report_path: str | os.PathLike | None = None,
        title: str = "Training",
        settings: dict[str, Any] | None = None,
        baselines: dict[str, float] | None = None,
    ):
        super().__init__(Throughput(tokens_per_step, flops_per_step, peak_flops), checkpoints)
        self.total_steps = total_steps
        self.log_path = log_path
        self.report_path = report_path
        self.title = title
        self.settings = settings or {}
        self.baselines = baselines or {}
        self.console = rich.console.Console(stderr=True)
        self._bar = self._log = None
        self._is_running = False
        self._forget()

    def _forget(self):
        self.curves: dict[str, list[tuple[int, float]]] = {name: [] for name in _LOGGED}
        self.validation_losses: list[tuple[int, float]] = []
        self.samples: list[tuple[int, str, str]] = []

    @property
    def train_losses(self) -> list[tuple[int, float]]:
        return self.curves["loss"]

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._writes = is_chief(self.model.distribute_strategy)
        self.read_log(self.step)
        if self.log_path and self._writes:
            lines = "".join(line + "\n" for line in self._kept)
            write_text(self.log_path, lines)
            self._log = open(self.log_path, "a", encoding="utf-8")
        self._bar = rich.progress.Progress(
            "[progress.description]{task.description}",
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            "{task.fields[numbers]}",
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(
            "training", total=self.total_steps, completed=self.step, numbers="compiling …"
        )
        self._bar.start()
        self._is_running, self._started = True, time.monotonic()
        self._first_step, self._said, self._was_skipped = self.step, self.step, False

    def on_step(self, values):
        self._keep(values)
        self._write(**values)
        throughput = self.throughput
        numbers = f"loss {values['loss']:.3f}"
        if throughput.tokens_per_second is not None:
            numbers += f" · {throughput.tokens_per_second:,.0f} tokens/s"
        if throughput.mfu is not None:
            numbers += f" · {throughput.mfu:.1%} of peak"
        self._bar.update(self._task, completed=self.step, numbers=numbers)
        self._tell_skipped(values)
        tenth = max(1, self.total_steps // 10)
        is_due = self.step // tenth > self._said // tenth
        if is_due and not self.console.is_terminal and throughput.seconds_per_step is not None:
            self._said = self.step
            left = (self.total_steps - self.step) * throughput.seconds_per_step
            self.console.print(f"step {self.step}/{self.total_steps} · {numbers} · {left:.0f} s left")

    def _tell_skipped(self, values):
        skipped = self.curves["skipped_updates"][-2:]
        before = skipped[0][1] if len(skipped) > 1 else 0
        is_skipped = bool(skipped) and skipped[-1][1] > before
        if is_skipped and not self._was_skipped:
            norm = values.get("gradient_norm")
            # A loss scale leaves out before the norm is taken.
            why = "" if norm is None else f", last norm of the gradients {norm:.3g}"
            self.console.print(f"step {self.step}: the update is left out{why}")
        self._was_skipped = is_skipped

    def on_epoch_end(self, epoch, logs=None):
        if "val_loss" in (logs or {}):
            loss = float(logs["val_loss"])
            self.validation_losses.append((self.step, loss))
            perplexity = math.exp(min(loss, 700.0))  # beyond, it is no float
            self._write(step=self.step, validation_loss=loss, validation_perplexity=perplexity)
            self.console.print(f"step {self.step}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")

    def add_samples(self, samples: list[tuple[int, str, str]]) -> None:
        """Notes what the model wrote.

        Args:
            samples: Step, prompt, text of each, all of one step.
        """
        self.samples += samples
        texts = [{"prompt": prompt, "text": text} for _, prompt, text in samples]
        self._write(step=samples[0][0], samples=texts)

    def on_train_end(self, logs=None):
        self.close()

    def close(self) -> None:
        """Ends the bar and the log and writes the report; also for a training that was interrupted."""
        if self._bar is not None:
            self._bar.stop()  # gives the terminal its cursor back
        if self._log:
            self._log.close()
            self._log = None
        if self._is_running:
            self._is_running = False
            if self.report_path and self._writes:
                self._report()

    def _report(self):
        is_done = self.step >= self.total_steps
        facts = {"state": "done" if is_done else "interrupted"}
        facts["steps"] = f"{self.step:,} of {self.total_steps:,}"
        if self.validation_losses:
            step, loss = self.validation_losses[-1]
            perplexity = math.exp(min(loss, 700.0))
            facts["validation"] = f"loss {loss:.4f}, perplexity {perplexity:.2f}, after step {step:,}"
        for name, loss in self.baselines.items():
            facts[f"{name} baseline"] = f"loss {loss:.4f}, perplexity {math.exp(loss):.2f}"
        if self.curves["skipped_updates"]:
            facts["updates left out"] = f"{self.curves['skipped_updates'][-1][1]:,.0f}"
        steps = self.step - self._first_step
        facts["this run"] = f"{steps:,} steps in {time.monotonic() - self._started:,.0f} s"
        write_report(
            self.report_path,
            title=self.title,
            facts=facts,
            curves=self.curves,
            validation_losses=self.validation_losses,
            baselines=self.baselines,
            settings=self.settings,
            samples=self.samples,
        )

    def _keep(self, values: dict[str, Any]) -> None:
        for name in _LOGGED:
            if name in values:
                value = math.nan if values[name] is None else values[name]
                self.curves[name].append((values["step"], value))

    def read_log(self, last_step: int) -> None:
        """Takes up what the log says of the updates before a training goes on.

        Args:
            last_step: The last of those.
        """
        self._forget()
        self._kept: list[str] = []
        if not (last_step and self.log_path and os.path.exists(self.log_path)):
            return
        for line in pathlib.Path(self.log_path).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a kill may have cut the last line off
                values = json.loads(line)
                if values["step"] > last_step:
                    continue
                self._kept.append(line)
                self._keep(values)
                if "validation_loss" in values:
                    loss = values["validation_loss"]
                    self.validation_losses.append((values["step"], math.nan if loss is None else loss))
                for sample in values.get("samples", ()):
                    self.samples.append((values["step"], sample["prompt"], sample["text"]))

    def _write(self, **values):
        if self._log:
            # JSON has no NaN.
            values = {
                name: None if isinstance(value, float) and not is_number(value) else value
                for name, value in values.items()
            }
            self._log.write(json.dumps(values, ensure_ascii=False) + "\n")
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
        draw_losses(figure.add_subplot(), self.train_losses, self.validation_losses, baselines or {})
        with new_file(path) as temporary:
            FigureCanvasAgg(figure).print_png(temporary)
        return pathlib.Path(path)
