"""What a model writes while it is trained."""

from collections.abc import Callable, Sequence

import keras
import rich.console
import rich.markup

from kerasllm.training.checkpoint import Checkpoints, is_chief
from kerasllm.training.progress import TrainingProgress
from kerasllm.training.tensorboard import TensorBoardLog


class Samples(keras.callbacks.Callback):
    """Lets a model write during the training, and shows and keeps what it wrote.

    It must come after the other callbacks: the time it takes is none of the training's. On several workers
    the first one writes.

    Args:
        prompts: What it goes on from, or answers.
        every_steps: Updates between two looks; None: only at the end of each epoch.
        write: From the model and the list of prompts to the list of texts. None: `model.generate` with
            `settings`.
        checkpoints: Of a training that may be resumed; they must come before this among the callbacks.
        progress: Where the samples are also noted, for its log and report.
        tensorboard: Likewise.
        **settings: Of `generate`, such as `max_new_tokens`, `temperature` and `seed`.

    Attributes:
        samples: What was written: step, prompt, text.

    Raises:
        ValueError: If there is no prompt, `every_steps` is out of range, or there are settings besides
            `write`.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        every_steps: int | None = None,
        write: Callable | None = None,
        checkpoints: Checkpoints | None = None,
        progress: TrainingProgress | None = None,
        tensorboard: TensorBoardLog | None = None,
        **settings,
    ):
        super().__init__()
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"`prompts` must be a list of texts, and not be empty. Received: {prompts!r}")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"`every_steps` must be None or at least 1. Received: {every_steps}")
        if write is not None and settings:
            raise ValueError(f"Settings are for `generate`, not for `write`. Received: {sorted(settings)}")
        self.prompts = list(prompts)
        self.every_steps = every_steps
        self.checkpoints = checkpoints
        self.progress = progress
        self.tensorboard = tensorboard
        self.samples: list[tuple[int, str, str]] = []
        self._write = write or (lambda model, prompts: model.generate(prompts, **settings))
        self._step = 0

    def on_train_begin(self, logs=None):
        self._step = self.checkpoints.position.step if self.checkpoints else 0

    def on_epoch_begin(self, epoch, logs=None):
        self._begin = self._step

    def on_train_batch_end(self, batch, logs=None):
        before, self._step = self._step, self._begin + batch + 1
        if self.every_steps and self._step // self.every_steps > before // self.every_steps:
            self._show()

    def on_epoch_end(self, epoch, logs=None):
        if not self.every_steps:
            self._show()

    def _show(self):
        if not is_chief(self.model.distribute_strategy):
            return
        texts = self._write(self.model, self.prompts)
        new = [(self._step, prompt, text) for prompt, text in zip(self.prompts, texts, strict=True)]
        self.samples += new
        console = self.progress.console if self.progress else rich.console.Console(stderr=True)
        for step, prompt, text in new:
            prompt, text = rich.markup.escape(prompt), rich.markup.escape(text)
            console.print(f"step {step}: [bold]{prompt}[/bold] → {text}", highlight=False)
        if self.progress:
            self.progress.add_samples(new)
        if self.tensorboard:
            for number, (_, prompt, text) in enumerate(new):
                self.tensorboard.write_text(f"sample/{number}", f"**{prompt}** → {text}")
