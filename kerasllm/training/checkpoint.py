"""Checkpoints of a training: written whole or not at all, and resumed as if nothing had happened."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import signal
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import safetensors
import safetensors.numpy
import tensorflow as tf

from kerasllm.files import new_file, write_json
from kerasllm.training.shards import is_sharded

_FORMAT = "kerasllm training 1"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


class Position(NamedTuple):
    """Where a training stands.

    Attributes:
        step: Batches trained on.
        epoch: The running epoch, from 0.
        batch: Batches of it that are done.
    """

    step: int
    epoch: int
    batch: int


class Checkpoints(keras.callbacks.Callback):
    """Saves a training while it runs, and lets `fit` go on from the last save.

    A save holds the weights, the optimizer with its schedule and loss scale, the seeds, the metrics of the
    running epoch and the place in the data. `fit` of a kerasllm task that is given this callback and finds
    a save in the folder goes on from there: the weights at the end are those of a run that was never
    interrupted, to the bit, also where the interruption was a kill, if the dataset gives the same batches
    in each run (as texts do, whose order follows from the seed of `compile` and the epoch, and the datasets
    of `kerasllm.data` with `repeat` or `passes`; a `shuffle` must have a seed and
    `reshuffle_each_iteration=False`). The number of replicas may be another one.
    On the JAX backend this is for one process, whose layouts may be others too.

    On `SIGTERM` the training saves after the running step and the process exits with status 0. Several
    workers that share the state of the optimizer (`shard_state`) exit without a save.

    Args:
        folder: Where the files are: `step-00001000.safetensors` and so on; on several workers one that all
            of them see, for the first writes and all read.
        every_steps: Batches between two saves; None: only at the end of each epoch.
        keep: Number of saves that stay; the best one stays besides.
        monitor: What is best: a name in the logs of an epoch. A lower value is better, unless it ends in
            `accuracy`.
        asynchronous: Whether files are written while the training goes on.

    `position` is where the training stands.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        every_steps: int | None = None,
        keep: int = 3,
        monitor: str = "val_loss",
        asynchronous: bool = True,
    ):
        super().__init__()
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"`every_steps` must be None or at least 1. Received: {every_steps}")
        if keep < 1:
            raise ValueError(f"`keep` must be at least 1. Received: keep={keep}")
        self.folder = pathlib.Path(folder)
        self.every_steps = every_steps
        self.keep = keep
        self.monitor = monitor
        self.asynchronous = asynchronous
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._metrics: list[np.ndarray] | None = None
        self.position = Position(0, 0, 0)
        self._is_terminated = False

    # Files

    def steps(self) -> list[int]:
        """Returns the numbers of the updates after which there is a save, in order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> pathlib.Path:
        """Returns the file of the save after an update."""
        return self.folder / f"step-{step:08d}.safetensors"

    def best_step(self) -> int | None:
        """Returns the update after which the monitored value was best, if there was one."""
        return self._best().get("step")

    def _best(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError):
            return json.loads((self.folder / "best.json").read_text(encoding="utf-8"))
        return {}

    def restore(self, model, step: int | None = None) -> Position | None:
        """Puts a save into a compiled model.

        Args:
            model: The model, compiled as the one that was saved.
            step: Which save; None: the last one.

        Returns:
            Where the training stood; None if there is no save and `step` is None.

        Raises:
            FileNotFoundError: If there is no such save.
            ValueError: If the file is damaged, or of another model or optimizer.
        """
        steps = self.steps()
        if step is None and not steps:
            return None
        path = self.path(steps[-1] if step is None else step)
        if not path.is_file():
            raise FileNotFoundError(f"There is no checkpoint after step {step}. There are: {steps}")
        tensors, facts = _read(path)
        groups = _variables(model)
        _check_same(path, facts, groups)
        for group in ("model", "optimizer"):
            for number, variable in enumerate(groups[group]):
                variable.assign(tensors[f"{group}.{number}"])
        metrics = [name for name in tensors if name.startswith("metrics.")]
        self._metrics = [tensors[f"metrics.{number}"] for number in range(len(metrics))] or None
        self.position = Position(facts["step"], facts["epoch"], facts["batch"])
        return self.position

    def save(self, with_metrics: bool = True, wait: bool = False, value: float | None = None) -> None:
        """Saves the training as it stands.

        Args:
            with_metrics: Whether to save the metrics of the running epoch, which takes all workers.
            wait: Whether to return when the file is there, although `asynchronous`.
            value: The monitored value, if it is known.

        Raises:
            OSError: If this file or the one before could not be written.
        """
        if keras.backend.backend() == "jax":  # where a step keeps what it changes to itself
            self.model.jax_state_sync()
        groups = _variables(self.model)
        if not (self.position.batch and with_metrics):  # the next epoch begins with none
            groups["metrics"] = []
        tensors = {
            f"{group}.{number}": np.array(variable.numpy())
            for group, variables in groups.items()
            for number, variable in enumerate(variables)
        }
        if not is_chief(self.model.distribute_strategy):
            return
        facts = {"format": _FORMAT, **self.position._asdict()}
        facts |= {group: _names(variables) for group, variables in groups.items()}
        self._finish_writing()
        self._writer = threading.Thread(target=self._write, args=(tensors, facts, value))
        self._writer.start()
        if wait or not self.asynchronous:
            self._finish_writing()

    def _write(self, tensors: dict[str, np.ndarray], facts: dict[str, Any], value: float | None) -> None:
        try:
            with new_file(self.path(facts["step"])) as temporary:
                safetensors.numpy.save_file(tensors, temporary, {"training": json.dumps(facts)})
                with open(temporary, "rb") as file:  # on the disk before it has its name
                    os.fsync(file.fileno())
            best = self._best()
            if value is not None and self._is_better(value, best.get("value")):
                best = {"step": facts["step"], "value": value, "monitor": self.monitor}
                write_json(self.folder / "best.json", best)
            steps = self.steps()
            for step in set(steps) - {*steps[-self.keep :], best.get("step")}:
                self.path(step).unlink(missing_ok=True)
        except BaseException as error:
            self._error = error

    def _is_better(self, value: float, best: float | None) -> bool:
        if best is None:
            return value == value
        return value > best if self.monitor.endswith("accuracy") else value < best

    def _finish_writing(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._error is not None:
            error, self._error = self._error, None
            free = shutil.disk_usage(self.folder).free / 2**30
            raise OSError(
                f"A checkpoint could not be written into {self.folder} ({free:.1f} GiB free); those before "
                f"are whole: {self.steps()}. Received: {error}"
            ) from error

    # What Keras calls

    def on_train_begin(self, logs=None):
        self._is_terminated = False
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number, frame):
        self._is_terminated = True

    def on_epoch_begin(self, epoch, logs=None):
        if epoch != self.position.epoch:
            self.position = self.position._replace(epoch=epoch, batch=0)
        self._before = self.position  # of the batches that Keras counts from 0 now
        if self._metrics is not None:  # the epoch goes on with what it has counted
            for variable, value in zip(_variables(self.model)["metrics"], self._metrics, strict=True):
                variable.assign(value)
            self._metrics = None

    def on_train_batch_end(self, batch, logs=None):
        last, before = self.position.step, self._before
        self.position = Position(before.step + batch + 1, before.epoch, before.batch + batch + 1)
        if self._is_terminated:
            self._check_loss(logs)
            # Other workers may be a step further or back, so nothing that takes all of them.
            is_alone = not is_multi_worker(self.model.distribute_strategy)
            if is_alone or not is_sharded(self.model.optimizer):
                self.save(with_metrics=is_alone, wait=True)
            self.close()
            raise SystemExit(0)
        is_last = self.position.batch == self.params.get("steps")  # that save comes after the validation
        if self.every_steps and not is_last:
            if self.position.step // self.every_steps > last // self.every_steps:
                self._check_loss(logs)
                self.save()

    def _check_loss(self, logs):
        """Ends a training that has lost its way, before the good saves are replaced."""
        loss = float((logs or {}).get("loss", 0.0))  # a mean of the epoch, which keeps a NaN
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not math.isfinite(loss) and getattr(optimizer, "skip_above", None) is None:
            raise ValueError(
                f"The loss must be a number. Received: {loss} by step {self.position.step}; the last saves "
                f"are of the steps {self.steps()}. Lower the learning rate, or give the optimizer "
                "`skip_above`, which leaves such updates out"
            )

    def on_epoch_end(self, epoch, logs=None):
        self._check_loss(logs)
        self.position = Position(self.position.step, epoch + 1, 0)
        value = (logs or {}).get(self.monitor)
        self.save(value=None if value is None else float(value))

    def on_train_end(self, logs=None):
        self.close()

    def close(self) -> None:
        """Waits for the last file and gives the signal back; also for a training that was interrupted.

        Raises:
            OSError: If the file could not be written.
        """
        if (handler := self.__dict__.pop("_old_handler", None)) is not None:
            signal.signal(signal.SIGTERM, handler)
        self._finish_writing()


class _OneTraining(keras.callbacks.CallbackList):
    """Callbacks for which two calls of `fit` are one training."""

    is_first = is_last = True

    def on_train_begin(self, logs=None):
        if self.is_first:
            super().on_train_begin(logs)

    def on_train_end(self, logs=None):
        if self.is_last:
            super().on_train_end(logs)


@contextlib.contextmanager
def _not_finished(optimizer):
    """While this is open, the end of a `fit` does not replace the weights by their moving averages."""
    optimizer.finalize_variable_values = lambda variables: None
    try:
        yield
    finally:
        del optimizer.finalize_variable_values


def fit_from_checkpoint(fit: Callable, model, x, checkpoints: Checkpoints, **kwargs):
    """Trains, from the last save on if there is one.

    Args:
        fit: Keras's `fit`.
        model: The compiled model.
        x: A `tf.data.Dataset` of batches.
        checkpoints: Where the saves are; also among the callbacks.
        **kwargs: Of `fit`.

    Returns:
        Keras's `History`, of the epochs that were run here.
    """
    with contextlib.closing(checkpoints):
        metrics = model._compile_metrics
        if checkpoints.steps() and metrics is not None and not metrics.built:
            # Keras would make their variables in the first step, after they are restored.
            batch = keras.utils.unpack_x_y_sample_weight(next(iter(x)))
            with model.distribute_strategy.scope():
                model._symbolic_build(data_batch=batch)
        position = checkpoints.restore(model)
        if position is None:
            return fit(x, **kwargs)
        if not isinstance(x, tf.data.Dataset):
            raise ValueError(
                f"A training is resumed on a tf.data.Dataset of batches. Received: {type(x).__name__}"
            )
        epochs, steps = kwargs.pop("epochs", 1), kwargs.pop("steps_per_epoch", None)
        kwargs.pop("initial_epoch", None)
        cardinality = int(x.cardinality())  # negative where it is not known
        callbacks = _OneTraining(
            kwargs.pop("callbacks"),
            add_history=True,
            add_progbar=kwargs.get("verbose", "auto") != 0,
            model=model,
            verbose=kwargs.get("verbose", "auto"),
            epochs=epochs,
            steps=steps or (cardinality if cardinality > 0 else None),
        )
        epoch, batch = position.epoch, position.batch
        if epoch >= epochs:
            return model.history
        # With `steps_per_epoch` the epochs are stretches of one pass, otherwise each is a pass.
        before = 0 if steps is None else epoch * steps
        if not batch:
            return fit(
                x.skip(before),
                epochs=epochs,
                initial_epoch=epoch,
                steps_per_epoch=steps,
                callbacks=callbacks,
                **kwargs,
            )
        callbacks.is_last = epoch + 1 == epochs
        with contextlib.nullcontext() if callbacks.is_last else _not_finished(model.optimizer):
            history = fit(
                x.skip(before + batch),
                epochs=epoch + 1,
                initial_epoch=epoch,
                steps_per_epoch=None if steps is None else steps - batch,
                callbacks=callbacks,
                **kwargs,
            )
        if callbacks.is_last:
            return history
        callbacks.is_first, callbacks.is_last = False, True
        if model.stop_training:
            model.optimizer.finalize_variable_values(model.trainable_weights)
            callbacks.on_train_end()
            return history
        return fit(
            x.skip(before + steps) if steps is not None else x,
            epochs=epochs,
            initial_epoch=epoch + 1,
            steps_per_epoch=steps,
            callbacks=callbacks,
            **kwargs,
        )


def find_checkpoints(callbacks) -> list[Checkpoints]:
    """Returns the `Checkpoints` among the callbacks of `fit`, which are None, one or a list."""
    return [each for each in keras.tree.flatten(callbacks or []) if isinstance(each, Checkpoints)]


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether a strategy spans several processes."""
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return False
    return strategy.extended._in_multi_worker_mode()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Returns whether this process writes the files of a training."""
    if not is_multi_worker(strategy):
        return True
    resolver = strategy.cluster_resolver
    has_chief = "chief" in resolver.cluster_spec().as_dict()
    return resolver.task_type == "chief" or (not has_chief and resolver.task_id == 0)


def _variables(model) -> dict[str, list]:
    """All that a step changes."""
    metrics = [variable for metric in model.metrics for variable in metric.variables]
    return {"model": model.variables, "optimizer": model.optimizer.variables, "metrics": metrics}


def _names(variables) -> list[str]:
    """What the variables are, without the numbers that Keras gives to a second model of a process."""
    names = []
    for variable in variables:
        path = re.sub(r"_\d+(?=/|$)", "", variable.path).rpartition("/")[2]
        path = path.rpartition("_")[2]
        names.append(f"{path} {variable.dtype} {list(variable.shape)}")
    return names


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, "numpy") as file:
            facts = json.loads((file.metadata() or {}).get("training", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(
            "A checkpoint must be whole; delete it to go on from the one before. "
            f"Received: {path} ({error})"
        ) from error
    if facts.get("format") != _FORMAT:
        raise ValueError(
            f"A checkpoint of a training must have the format {_FORMAT!r}. "
            f"Received: {path} with {facts.get('format')!r}"
        )
    return tensors, facts


def _check_same(path: pathlib.Path, facts: dict[str, Any], groups: dict[str, list]) -> None:
    for group, variables in groups.items():
        mine, theirs = _names(variables), facts[group]
        if mine == theirs or (group == "metrics" and not theirs):
            continue
        different = [pair for pair in zip(theirs, mine, strict=False) if pair[0] != pair[1]]
        what = f"{different[0][0]} there, {different[0][1]} here" if different else ""
        raise ValueError(
            f"A checkpoint must be of this training: the {group} must have the same variables. Received: "
            f"{path} with {len(theirs)} for {len(mine)} {what}".rstrip()
        )
