"""One line from a checkpoint to a function that does the task."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from kerasllm.checkpoints import load_checkpoint
from kerasllm.tasks.base import Task
from kerasllm.tasks.causal_lm import CausalLM
from kerasllm.tasks.masked_lm import MaskedLM
from kerasllm.tasks.seq2seq_lm import Seq2SeqLM
from kerasllm.tasks.sequence_classifier import SequenceClassifier
from kerasllm.tasks.text_embedder import TextEmbedder

# The names of Hugging Face's pipelines, and "chat" -> the task and its method.
PIPELINES: dict[str, tuple[type[Task], str]] = {
    "text-generation": (CausalLM, "generate"),
    "chat": (CausalLM, "chat"),
    "text2text-generation": (Seq2SeqLM, "generate"),
    "fill-mask": (MaskedLM, "fill_mask"),
    "text-classification": (SequenceClassifier, "classify"),
    "feature-extraction": (TextEmbedder, "encode"),
}


def pipeline(task: str, model: str | os.PathLike | Task, dtype: str | None = None) -> Callable[..., Any]:
    """Loads a model and returns the function that does a task with it.

    ```python
    fill = kerasllm.pipeline("fill-mask", "bert-base-uncased")
    fill("Paris is the [MASK] of France.")
    ```

    Args:
        task: One of `"text-generation"`, `"chat"`, `"text2text-generation"`, `"fill-mask"`,
            `"text-classification"`, `"feature-extraction"`.
        model: Whatever `from_pretrained` takes, a `.keras` file, or a task that is loaded already.
        dtype: Keras dtype policy. None: Keras's default.

    Returns:
        `CausalLM.generate`, `CausalLM.chat`, `Seq2SeqLM.generate`, `MaskedLM.fill_mask`,
        `SequenceClassifier.classify` or `TextEmbedder.encode` of the model.

    Raises:
        ValueError: If there is no such task, or the model is for another.
    """
    if task not in PIPELINES:
        raise ValueError(f"`task` must be one of {sorted(PIPELINES)}. Received: {task!r}")
    if isinstance(model, Task) and dtype is not None:
        raise ValueError(f"`dtype` is for a model to load; this one is loaded. Received: dtype={dtype!r}")
    kind, method = PIPELINES[task]
    loaded = model if isinstance(model, Task) else load_task(model, [task], dtype)
    if not isinstance(loaded, kind):
        raise ValueError(f"{task!r} needs a {kind.__name__}. Received: a {type(loaded).__name__}")
    return getattr(loaded, method)


def load_task(source: str | os.PathLike, tasks: Sequence[str], dtype: str | None = None) -> Task:
    """Loads a model as one of several tasks: as the one that its checkpoint is for.

    Args:
        source: Whatever `from_pretrained` takes, or a `.keras` file.
        tasks: Names as in `pipeline`.
        dtype: Keras dtype policy. None: Keras's default.

    Returns:
        The task.

    Raises:
        FileNotFoundError, ValueError: As `Task.load`.
    """
    kinds = [PIPELINES[task][0] for task in tasks]
    if len(kinds) == 1:
        return kinds[0].load(source, dtype)
    if str(source).endswith(".keras"):
        loaded = Task.load(source, dtype)
        if not isinstance(loaded, tuple(kinds)):
            raise ValueError(
                f"{source} must hold a task for {' or '.join(tasks)}. Received: {type(loaded).__name__}"
            )
        return loaded
    checkpoint = load_checkpoint(source, dtype=dtype)
    for kind in kinds:
        if checkpoint.model.head == kind.head:
            return kind._from_checkpoint(checkpoint)
    raise ValueError(
        f"The checkpoint must be for {' or '.join(tasks)}. Received: {source}, a "
        f"{type(checkpoint.model).__name__} with the head {checkpoint.model.head!r}"
    )
