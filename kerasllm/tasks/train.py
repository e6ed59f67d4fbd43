"""A run from its configuration: texts, tokenizer, model, training."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from typing import NamedTuple

import keras

from kerasllm.config import RunConfig
from kerasllm.data import (
    generate_stories,
    read_documents,
    split_documents,
    tokenize_documents,
    windows_dataset,
)
from kerasllm.evaluation import ngram_perplexity
from kerasllm.files import write_json
from kerasllm.models import MODELS
from kerasllm.tasks.causal_lm import CausalLM
from kerasllm.tokenizers import train_tokenizer
from kerasllm.training import (
    Checkpoints,
    TrainingProgress,
    make_optimizer,
    make_schedule,
    make_strategy,
)
from kerasllm.training.checkpoint import is_chief
from kerasllm.version import __version__


class TrainingResult(NamedTuple):
    """What `train` returns.

    Attributes:
        model: The trained model.
        progress: The losses, and a method that plots them.
        perplexity: Of the validation texts.
        baselines: Perplexities of a unigram and a bigram model on the same tokens.
        validation: The validation texts.
    """

    model: CausalLM
    progress: TrainingProgress
    perplexity: float
    baselines: dict[str, float]
    validation: list[str]


def train(
    run: RunConfig,
    log_path: str | os.PathLike | None = None,
    checkpoints: str | os.PathLike | None = None,
) -> TrainingResult:
    """Trains a model.

    Args:
        run: The configuration; its `output` is the caller's affair.
        log_path: File for the log, JSON lines; None: no file.
        checkpoints: Folder for checkpoints, from the last of which the training goes on; None: none.

    Returns:
        The model and how it did.

    Raises:
        FileNotFoundError, ValueError: If the texts or settings do not serve.
    """
    settings = run.training
    strategy = make_strategy(settings.strategy)  # several workers want to be known first
    keras.utils.set_random_seed(run.seed)
    if settings.sequence_length > run.model.context_length:
        raise ValueError(
            "`training.sequence_length` must be at most `model.context_length`. Received: "
            f"{settings.sequence_length} and {run.model.context_length}"
        )
    if run.data.paths is None:
        documents = generate_stories(run.data.stories, run.seed)
    else:
        documents = read_documents(run.data.paths)
    training, validation = split_documents(documents, run.data.validation_fraction, run.seed)
    tokenizer = train_tokenizer(run.tokenizer.kind, training, run.tokenizer.vocabulary_size)
    model_config = dataclasses.replace(run.model, vocabulary_size=tokenizer.vocabulary_size)
    train_ids, train_lengths = tokenize_documents(training, tokenizer)
    validation_ids, _ = tokenize_documents(validation, tokenizer)
    batches = windows_dataset(
        train_ids,
        settings.sequence_length,
        settings.batch_size,
        document_lengths=train_lengths,
        shuffle=True,
        seed=run.seed,
        repeat=True,
    )
    validation_batches = windows_dataset(validation_ids, settings.sequence_length, settings.batch_size)

    with strategy.scope():
        model = CausalLM(MODELS[run.family](model_config, dtype=settings.precision), tokenizer)
        model.compile(
            make_optimizer(
                settings.optimizer,
                make_schedule(
                    settings.schedule, settings.learning_rate, settings.steps, settings.warmup_steps
                ),
                settings.weight_decay,
                skip_above=settings.skip_above,
                **({} if settings.beta_2 is None else {"beta_2": settings.beta_2}),
            ),
            jit_compile=settings.jit_compile,
            microbatches=settings.microbatches,
            seed=run.seed,
        )
    callbacks = []
    if checkpoints is not None:
        callbacks.append(Checkpoints(checkpoints, settings.save_every, settings.keep))
    progress = TrainingProgress(
        settings.steps,
        settings.batch_size * settings.sequence_length,
        log_path if is_chief(strategy) else None,
        *callbacks,
    )
    # Keras's epochs are the stretches between two validations.
    validate_every = min(settings.validate_every or settings.steps, settings.steps)
    with contextlib.closing(progress):
        model.fit(
            batches,
            epochs=settings.steps // validate_every,
            steps_per_epoch=validate_every,
            validation_data=validation_batches,
            callbacks=[*callbacks, progress],
            verbose=0,
        )
    if progress.validation_losses:
        perplexity = math.exp(progress.validation_losses[-1][1])
    else:  # all was done before
        perplexity = model.evaluate(validation_batches, verbose=0)["perplexity"]
    baselines = {
        name: ngram_perplexity(train_ids, validation_ids, tokenizer.vocabulary_size, order)
        for name, order in (("unigram", 1), ("bigram", 2))
    }
    return TrainingResult(model, progress, perplexity, baselines, validation)


def train_to_folder(run: RunConfig) -> TrainingResult:
    """Trains a model and writes it into the run's `output`, with the log and a plot.

    A run that was interrupted goes on from its last checkpoint when it is started again.

    Args:
        run: The configuration.

    Returns:
        The model and how it did. In the folder: what `CausalLM.save_pretrained` writes, `run.json`,
        `training.jsonl`, `loss.png` and `checkpoints`.

    Raises:
        FileExistsError: If the folder holds a model.
        FileNotFoundError, ValueError: If the texts or settings do not serve, or the folder holds a run with
            other settings.
    """
    output = pathlib.Path(run.output)
    if (output / "config.json").exists():
        raise FileExistsError(f"A run never overwrites a model; choose another folder. Received: {output}")
    _check_same_run(run, output / "run.json")
    result = train(run, output / "training.jsonl", output / "checkpoints")
    if is_chief(result.model.distribute_strategy):
        baselines = {name: math.log(perplexity) for name, perplexity in result.baselines.items()}
        result.progress.plot(output / "loss.png", baselines)
        result.model.save_pretrained(output)
    return result


def _check_same_run(run: RunConfig, path: pathlib.Path) -> None:
    """Writes the settings of a run, or compares them with those that it was begun with."""
    settings = json.loads(json.dumps({**dataclasses.asdict(run), "kerasllm": __version__}))
    del settings["output"], settings["training"]["strategy"]  # a run may move, and be spread otherwise
    if not path.exists():
        write_json(path, settings)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    if before != settings:
        different = [key for key in settings if settings[key] != before.get(key)]
        raise ValueError(
            "A run goes on with the settings that it was begun with; choose another `output`, or take "
            f"these back. Received other settings than in {path}: {different}"
        )
