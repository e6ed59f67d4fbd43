"""From the tensors of a checkpoint to a model, one tensor at a time."""

import dataclasses
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kerasllm.checkpoints.lazy import WeightMemory, build_without_values, initialize_rest, set_value
from kerasllm.checkpoints.tensors import TensorSource, row_ranges
from kerasllm.models import LanguageModel, find_head, find_model_class
from kerasllm.models.base import SAME, Transform

# A tensor with more numbers goes into its variable in pieces: half a gigabyte of token embeddings would
# otherwise be in memory as it is in the file, in the variable's dtype and in the variable.
_MAX_WHOLE = 1 << 22
# Names of widths in the config.json of any family.
_WIDTHS = frozenset("d_ff d_kv d_model dim head_dim hidden_size intermediate_size n_embd n_inner".split())
# Names of the number of layers there; others, such as Qwen's max_window_layers, may exceed it.
_LAYER_COUNTS = frozenset("n_layer n_layers num_decoder_layers num_hidden_layers num_layers".split())
# Seconds of loading before a progress bar appears.
_PATIENCE = 2.0


def load_model(
    values: dict[str, Any],
    source: TensorSource,
    head: str | None = "default",
    dtype: str | None = None,
    labels: Sequence[str] | None = None,
) -> LanguageModel:
    """Makes the model of a `config.json` and fills it from a checkpoint's tensors.

    Every check of names and shapes comes before the first weight takes memory. If the checkpoint was made
    for another task and lacks the head, the head starts with random weights, and a warning says so.

    Args:
        values: The parsed config.json.
        source: The tensors, under the names of Hugging Face.
        head: One of the family's `heads`. `"default"`: the one that config.json names.
        dtype: Keras dtype policy of the model. None: Keras's default.
        labels: Names of the classes instead of those in config.json. None: those.

    Returns:
        The model.

    Raises:
        ValueError: If the family or a setting is unknown, or weights are missing, left over or of another
            shape.
    """
    values = _text_part(values, source)
    try:
        family = find_model_class(values)
        head = find_head(values) if head == "default" else head
        _check_sizes(values, source)
        config = family.config_class.from_huggingface(values)
        if labels is not None:
            config = dataclasses.replace(config, labels=tuple(labels))
        model = build_without_values(lambda: family(config, head=head, dtype=dtype))
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            "Each setting of a config.json must be of the right kind. "
            f"Received: {source.description}, where one is not: {error}"
        ) from error
    plan = _match(model, source, values.get("architectures") or [])
    _check_repeated(source, plan)
    _fill(model, source, plan)
    initialize_rest(model)
    return model


def _text_part(values: dict[str, Any], source: TensorSource) -> dict[str, Any]:
    """Of a model that reads images too, the config.json of its language model."""
    text = values.get("text_config")
    if not isinstance(text, dict) or "vision_config" not in values:
        return values
    warnings.warn(
        f"Only the language model is loaded, {text.get('model_type')!r}; what reads images is left out. "
        f"Received: {source.description}, {values.get('model_type')!r}",
        stacklevel=3,
    )
    return text


def _check_sizes(values: dict[str, Any], source: TensorSource) -> None:
    """A false number in a config.json must not build layers for hours or fill the memory with tables."""
    longest = max((max(shape, default=0) for shape in source.shapes.values()), default=0)
    for name, value in values.items():
        # Each layer has tensors of its own, and a width is the length of some tensor.
        most = len(source.shapes) if name in _LAYER_COUNTS else longest if name in _WIDTHS else None
        if most is not None and isinstance(value, int) and value > most:
            raise ValueError(
                f"{name} must fit {source.description}, whose {len(source.shapes)} tensors must fill every "
                f"layer and are at most {longest} wide. Received: {name}={value}"
            )


# Which tensors of the checkpoint (equal ones, if several) fill which variables, and how.
Plan = list[tuple[list[str], tuple[str, ...], Transform]]


def _match(model: LanguageModel, source: TensorSource, architectures: Sequence[str]) -> Plan:
    """Finds the tensor of every weight; an error lists what does not fit."""
    table = model.weight_map()
    found = defaultdict(list)
    for name, own_name in model.checkpoint_names(source.shapes).items():
        found[own_name].append(name)
    missing = set(table) - set(found)
    # Not always the whole head: BERT's pooler, which its classifier begins with, is in other files too.
    lacking = model.head_tensors() & missing
    is_of_another_task = model.config.dialect.architectures[model.head] not in architectures
    if lacking and is_of_another_task:
        missing -= lacking
        warnings.warn(
            f"{source.description} is of {list(architectures)} and has no head {model.head!r}: that head "
            "is new and must be trained.",
            stacklevel=2,
        )
    left_over = [name for own_name, names in found.items() if own_name not in table for name in names]
    if missing or left_over:
        raise ValueError(
            f"The tensors of {source.description} must be those of a {type(model).__name__} with the head "
            f"{model.head!r}. Missing: {_some(sorted(missing))}. Left over: {_some(sorted(left_over))}"
        )
    _check_tied(model, source, table)
    plan = [(names, *table[own_name]) for own_name, names in found.items()]
    _check_shapes(model, source, plan)
    return plan


def _check_shapes(model: LanguageModel, source: TensorSource, plan: Plan) -> None:
    variables = model.variables_by_path()
    for names, paths, transform in plan:
        for name in names:
            shape = source.shapes[name]
            # All elements of this array are the same byte of memory.
            dummy = np.broadcast_to(np.zeros((), "uint8"), shape)
            wanted = [tuple(variables[path].shape) for path in paths]
            try:
                received = [array.shape for array in transform.to_variables(dummy)]
            except (ValueError, IndexError, TypeError) as error:
                raise ValueError(
                    f"{name} must fill {', '.join(paths)} of shape {wanted}. Received: {shape} ({error})"
                ) from error
            if received != wanted:
                raise ValueError(
                    f"{name} must fill {', '.join(paths)} of shape {wanted}. Received: {received}"
                )


def _check_tied(model: LanguageModel, source: TensorSource, table: Iterable[str]) -> None:
    """A file may repeat a tensor that the model has once, such as a tied head: then it must be equal."""
    head_weights = model.config.dialect.head_weights.get(model.head, {})
    for name in (set(head_weights) - set(table)) & set(source.shapes):
        twins = [n for n, shape in source.shapes.items() if shape == source.shapes[name] and n != name]
        if not any(_are_equal(source, name, twin) for twin in twins):
            raise ValueError(
                f"config.json ties {name} to another tensor, which it must equal. "
                f"Received: {source.description}, where no tensor equals it"
            )


def _check_repeated(source: TensorSource, plan: Plan) -> None:
    for (first, *others), _, _ in plan:
        for other in others:
            if not _are_equal(source, first, other):
                raise ValueError(
                    f"{first} and {other} stand for the same weights and must be equal. "
                    f"Received: {source.description}, where they differ"
                )


def _are_equal(source: TensorSource, name: str, other: str) -> bool:
    shape = source.shapes[name]
    if shape != source.shapes[other]:
        return False
    return all(
        np.array_equal(source.read(name, start, stop), source.read(other, start, stop))
        for start, stop in row_ranges(shape)
    )


def _fill(model: LanguageModel, source: TensorSource, plan: Plan) -> None:
    variables = model.variables_by_path()
    memory = WeightMemory(
        (variables[path].shape, variables[path].dtype) for _, paths, _ in plan for path in paths
    )
    for names, paths, transform in _with_progress(plan, source):
        name, shape = names[0], source.shapes[names[0]]
        targets = [memory.empty() for _ in paths]
        if transform is SAME and np.prod(shape) > _MAX_WHOLE:
            for start, stop in row_ranges(shape):
                targets[0][start:stop] = _floats(source.read(name, start, stop), name)
        else:
            arrays = transform.to_variables(_floats(source.read(name), name))
            for target, array in zip(targets, arrays, strict=True):
                target[...] = array
        for path, target in zip(paths, targets, strict=True):
            set_value(variables[path], target)


def _floats(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "fV" or array.dtype.itemsize < 2:
        raise ValueError(f"Weights must be floats of 16, 32 or 64 bits. Received: {name} of {array.dtype}")
    return array


def _with_progress(plan: Plan, source: TensorSource) -> Iterator[tuple]:
    """The plan's entries; in a terminal, a bar shows how far loading has come if it takes long."""
    if not sys.stderr.isatty():
        yield from plan
        return
    sizes = [4 * int(np.prod(source.shapes[names[0]])) for names, *_ in plan]
    columns = TextColumn("loading"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    progress = Progress(*columns, transient=True, console=Console(stderr=True))
    task = progress.add_task("loading", total=sum(sizes))
    begin = time.monotonic()
    try:
        for entry, size in zip(plan, sizes, strict=True):
            yield entry
            progress.advance(task, size)
            if not progress.live.is_started and time.monotonic() - begin > _PATIENCE:
                progress.start()
    finally:
        progress.stop()


def _some(names: list[str], most: int = 10) -> str:
    """A list for an error message: of thousands of names, the first few."""
    if len(names) <= most:
        return str(names)
    return f"{names[:most]} and {len(names) - most} more"
