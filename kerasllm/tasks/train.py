"""A run from its configuration: texts, tokenizer, model, training."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from kerasllm.config import RunConfig
from kerasllm.data import (
    generate_stories,
    masked_lm_dataset,
    packed_dataset,
    padded_batches,
    prefix_lm_dataset,
    read_documents,
    read_records,
    span_corruption_dataset,
    split_documents,
    tokenize_documents,
    windows_dataset,
)
from kerasllm.evaluation import ngram_perplexity
from kerasllm.files import write_json
from kerasllm.models import MODELS, LanguageModel, ModelConfig
from kerasllm.tasks.base import Task
from kerasllm.tasks.causal_lm import CausalLM
from kerasllm.tasks.masked_lm import MaskedLM
from kerasllm.tasks.seq2seq_lm import Seq2SeqLM
from kerasllm.tasks.sequence_classifier import SequenceClassifier
from kerasllm.tasks.texts import encode_texts
from kerasllm.tokenizers import Tokenizer, train_tokenizer
from kerasllm.training import (
    Checkpoints,
    Samples,
    TensorBoardLog,
    Throughput,
    TrainingProgress,
    make_optimizer,
    make_schedule,
    make_strategy,
    training_flops,
)
from kerasllm.training.checkpoint import is_chief
from kerasllm.version import __version__

_TASKS: dict[str, type[Task]] = {
    "causal_lm": CausalLM,
    "prefix_lm": CausalLM,
    "masked_lm": MaskedLM,
    "span_corruption": Seq2SeqLM,
    "classification": SequenceClassifier,
}
# Batches whose tokens are counted where rows are filled up.
_COUNTED_BATCHES = 10
_SAMPLES = 3
_SAMPLE_WORDS = 12


class TrainingResult(NamedTuple):
    """What `train` returns.

    Attributes:
        model: The trained model; with `quantization_aware`, of rounded weights.
        progress: The losses, and a method that plots them.
        perplexity: Of the validation texts; of the masked tokens, the targets, the completions or the
            labels, where the objective has such.
        baselines: Perplexities of a unigram and a bigram model on the same tokens; empty where not all
            tokens are predicted.
        validation: The validation texts; with their completions or labels, where there are such.
    """

    model: Task
    progress: TrainingProgress
    perplexity: float
    baselines: dict[str, float]
    validation: list[str] | list[tuple[str, str]]


class _Data(NamedTuple):
    """What a model is trained on.

    Attributes:
        training: Batches without end.
        validation: Batches.
        baselines: As in `TrainingResult`.
    """

    training: tf.data.Dataset
    validation: tf.data.Dataset
    baselines: dict[str, float]


def train(
    run: RunConfig,
    log_path: str | os.PathLike | None = None,
    checkpoints: str | os.PathLike | None = None,
    report_path: str | os.PathLike | None = None,
    tensorboard: str | os.PathLike | None = None,
) -> TrainingResult:
    """Trains a model on what its family is for.

    Args:
        run: The configuration; its `output` is the caller's affair.
        log_path: File for the log, JSON lines; None: no file.
        checkpoints: Folder for checkpoints, from the last of which the training goes on; None: none.
        report_path: File for a report, HTML, also of a training that is interrupted; None: none.
        tensorboard: Folder for TensorBoard's files, if the configuration wants them; None: none.

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
    elif run.fields:
        documents = read_records(run.data.paths, run.fields)
    else:
        documents = read_documents(run.data.paths)
    training, validation = split_documents(documents, run.data.validation_fraction, run.seed)
    model_config, texts = run.model, training
    if run.objective_name == "prefix_lm":
        texts = [text for pair in training for text in pair]
    elif run.objective_name == "classification":
        texts = [text for text, _ in training]
        labels = tuple(sorted({label for _, label in documents}))
        model_config = dataclasses.replace(model_config, labels=labels)
    tokenizer = train_tokenizer(run.tokenizer.kind, texts, run.tokenizer.vocabulary_size)
    model_config = dataclasses.replace(model_config, vocabulary_size=tokenizer.vocabulary_size)
    prompts = _choose_prompts(run, tokenizer, validation)
    data = _DATA[run.objective_name](run, model_config, tokenizer, training, validation)

    with strategy.scope():
        network = MODELS[run.family](model_config, run.head, dtype=settings.precision)
        model = _TASKS[run.objective_name](network, tokenizer)
        model.compile(
            make_optimizer(
                settings.optimizer,
                make_schedule(
                    settings.schedule, settings.learning_rate, settings.steps, settings.warmup_steps
                ),
                settings.weight_decay,
                skip_above=settings.skip_above,
                **_given(beta_2=settings.beta_2, shard_state=settings.shard_optimizer or None),
            ),
            jit_compile=settings.jit_compile,
            microbatches=settings.microbatches,
            remat=settings.remat,
            quantization_aware=settings.quantization_aware,
            seed=run.seed,
        )
    saves = None
    if checkpoints is not None:
        saves = Checkpoints(checkpoints, settings.save_every, settings.keep)
    tokens, flops = _size_of_step(data.training, network)
    progress = TrainingProgress(
        settings.steps,
        tokens,
        log_path,
        saves,
        flops_per_step=flops,
        peak_flops=run.logging.peak_flops,
        report_path=report_path,
        title=f"Training of {run.output}",
        settings={**dataclasses.asdict(run), "parameters": network.count_params()},
        baselines={name: math.log(perplexity) for name, perplexity in data.baselines.items()},
    )
    callbacks = [progress] if saves is None else [saves, progress]
    board = None
    if tensorboard is not None and run.logging.tensorboard:
        board = TensorBoardLog(
            tensorboard, saves, throughput=Throughput(tokens, flops, run.logging.peak_flops)
        )
        callbacks.append(board)
    if prompts:
        write = _writer(run)
        callbacks.append(
            Samples(prompts, run.logging.sample_every, write, saves, progress, tensorboard=board)
        )
    # Keras's epochs are the stretches between two validations.
    validate_every = min(settings.validate_every or settings.steps, settings.steps)
    with contextlib.ExitStack() as stack:
        for each in (progress, board):
            if each is not None:
                stack.enter_context(contextlib.closing(each))
        model.fit(
            data.training,
            epochs=settings.steps // validate_every,
            steps_per_epoch=validate_every,
            validation_data=data.validation,
            callbacks=callbacks,
            verbose=0,
        )
    if not progress.train_losses:  # all was done before
        progress.read_log(settings.steps)
    if progress.validation_losses:
        perplexity = math.exp(progress.validation_losses[-1][1])
    else:
        perplexity = math.exp(model.evaluate(data.validation, verbose=0)["loss"])
    if settings.quantization_aware is not None:
        model.round_weights()
    return TrainingResult(model, progress, perplexity, data.baselines, validation)


# Objectives: each makes the batches.


def _causal_data(run: RunConfig, _, tokenizer: Tokenizer, training: list, validation: list) -> _Data:
    length, rows = run.training.sequence_length, run.training.batch_size
    train_ids, train_lengths = tokenize_documents(training, tokenizer)
    validation_ids, validation_lengths = tokenize_documents(validation, tokenizer)
    shuffled = {"shuffle": True, "seed": run.seed, "repeat": True}
    if run.objective.packing == "segments":
        batches = packed_dataset((train_ids, train_lengths), tokenizer, length, rows, **shuffled)
        validation_batches = packed_dataset((validation_ids, validation_lengths), tokenizer, length, rows)
    else:
        batches = windows_dataset(train_ids, length, rows, document_lengths=train_lengths, **shuffled)
        validation_batches = windows_dataset(validation_ids, length, rows)
    baselines = {
        name: ngram_perplexity(train_ids, validation_ids, tokenizer.vocabulary_size, order)
        for name, order in (("unigram", 1), ("bigram", 2))
    }
    return _Data(batches, validation_batches, baselines)


def _masked_data(run: RunConfig, _, tokenizer: Tokenizer, training: list, validation: list) -> _Data:
    options = _given(mask_rate=run.objective.mask_rate, whole_words=run.objective.whole_words)
    return _drawn_data(masked_lm_dataset, "new_masks", run, tokenizer, training, validation, options)


def _span_data(run: RunConfig, _, tokenizer: Tokenizer, training: list, validation: list) -> _Data:
    objective = run.objective
    options = _given(noise_rate=objective.noise_rate, mean_span_length=objective.mean_span_length)
    options["decoder_start_id"] = run.model.decoder_start_id
    return _drawn_data(span_corruption_dataset, "new_spans", run, tokenizer, training, validation, options)


def _prefix_data(run: RunConfig, _, tokenizer: Tokenizer, training: list, validation: list) -> _Data:
    options = {"seed": run.seed, **_given(too_long=run.objective.too_long)}
    sizes = (run.training.sequence_length, run.training.batch_size)
    batches = prefix_lm_dataset(training, tokenizer, *sizes, shuffle=True, repeat=True, **options)
    return _Data(batches, prefix_lm_dataset(validation, tokenizer, *sizes, **options), {})


def _labelled_data(
    run: RunConfig, config: ModelConfig, tokenizer: Tokenizer, training: list, validation: list
) -> _Data:
    length, rows = run.training.sequence_length, run.training.batch_size

    def make(records, **options):
        inputs = [
            {"token_ids": ids, "attention_mask": np.ones(len(ids), "int32")}
            for ids, _ in encode_texts(tokenizer, [text for text, _ in records], length)
        ]
        numbers = [config.labels.index(label) for _, label in records]
        # One length, for which XLA compiles once.
        padding = {"token_ids": tokenizer.pad_id or 0}
        return padded_batches(inputs, numbers, rows, pad_values=padding, buckets=[length], **options)

    shuffled = {"shuffle": True, "seed": run.seed, "repeat": True, "drop_remainder": True}
    return _Data(make(training, **shuffled), make(validation), {})


def _drawn_data(make: Callable, new_draws: str, run, tokenizer, training, validation, options) -> _Data:
    """Batches of which a part is drawn anew in each pass, and for the validation once."""
    sizes = (run.training.sequence_length, run.training.batch_size)
    batches = make(training, tokenizer, *sizes, shuffle=True, seed=run.seed, repeat=True, **options)
    validation_batches = make(validation, tokenizer, *sizes, seed=run.seed, **{new_draws: False}, **options)
    return _Data(batches, validation_batches, {})


_DATA = {
    "causal_lm": _causal_data,
    "prefix_lm": _prefix_data,
    "masked_lm": _masked_data,
    "span_corruption": _span_data,
    "classification": _labelled_data,
}


def _given(**options):
    return {name: value for name, value in options.items() if value is not None}


def _size_of_step(batches: tf.data.Dataset, model: LanguageModel) -> tuple[float, int]:
    """The tokens of a batch, on average and without what fills rows up; and the FLOPs of an update."""
    inputs, labels, *_ = batches.element_spec
    rows, length = (inputs["token_ids"] if isinstance(inputs, dict) else inputs).shape
    counts = []
    for inputs, _, *weights in batches.take(_COUNTED_BATCHES).as_numpy_iterator():
        if not isinstance(inputs, dict):  # a row ends with a token that is learnt
            counts.append((weights[0][:, ::-1].cumsum(axis=1) > 0).sum())
        elif "memory_mask" in inputs:
            counts.append(inputs["memory_mask"].sum() + weights[0].sum())
        else:
            counts.append(np.count_nonzero(inputs.get("attention_mask", weights)))
    source = inputs["source_ids"].shape[1] if "source_ids" in inputs else None
    return float(np.mean(counts)), rows * training_flops(model, length, source)


# Samples


def _choose_prompts(run: RunConfig, tokenizer: Tokenizer, validation: list) -> list[str]:
    """What the model is asked to go on from while it is trained."""
    room = run.model.context_length // 2
    if run.logging.prompts is not None:
        for prompt in run.logging.prompts:
            ids = tokenizer.encode(prompt, parse_special=True, add_special_tokens=True)
            if not 0 < len(ids) < run.model.context_length:
                raise ValueError(
                    "A prompt must have a token, and fewer than the context of the model. Received: "
                    f"{prompt!r} of {len(ids)} tokens, context_length={run.model.context_length}"
                )
            if run.objective_name == "masked_lm" and tokenizer.mask_id not in ids:
                raise ValueError(
                    f"A prompt must have the mask token {tokenizer.mask_token!r}. Received: {prompt!r}"
                )
        return list(run.logging.prompts)
    prompts = []
    texts = [document[0] for document in validation] if run.fields else validation
    for text in itertools.islice(texts, 10 * _SAMPLES):
        if run.fields:
            if 0 < len(tokenizer.encode(text, add_special_tokens=True)) <= room:
                prompts.append(text)
            continue
        words = text.split()[:_SAMPLE_WORDS]
        while words and len(tokenizer.encode(" ".join(words), add_special_tokens=True)) > room:
            words.pop()
        if len(words) < 3:
            continue
        middle = len(words) // 2
        if run.objective_name == "masked_lm":
            words[middle] = tokenizer.mask_token
        elif run.objective_name == "span_corruption":
            words[middle - 1 : middle + 1] = ["<extra_id_0>"]
        prompts.append(" ".join(words))
    return prompts[:_SAMPLES]


def _writer(run: RunConfig) -> Callable[[Task, Sequence[str]], list[str]]:
    """How a model is asked."""
    count = min(run.logging.sample_tokens, run.model.context_length - 1)

    def go_on(model, prompts):
        ids = model.tokenizer.encode(list(prompts), add_special_tokens=True)
        room = run.model.context_length - max(map(len, ids))
        return model.generate(prompts, min(count, room), temperature=0.8, top_k=50, seed=run.seed)

    def fill_masks(model, prompts):
        texts = []
        for masks in model.fill_mask(prompts, top_k=5):
            texts.append(" / ".join(", ".join(guess["token"] for guess in mask) for mask in masks))
        return texts

    def fill_spans(model, prompts):
        tokenizer = model.tokenizer
        ids = [tokenizer.encode(text, parse_special=True, add_special_tokens=True) for text in prompts]
        completions = model.generate_tokens(ids, count, temperature=0.0)
        # The sentinels tell which span is which.
        return [tokenizer.decode(each.token_ids, skip_special_tokens=False) for each in completions]

    def classify(model, prompts):
        found = model.classify(list(prompts), top_k=3)
        return [", ".join(f"{each['label']} {each['score']:.2f}" for each in row) for row in found]

    return {
        "causal_lm": go_on,
        "prefix_lm": go_on,
        "masked_lm": fill_masks,
        "span_corruption": fill_spans,
        "classification": classify,
    }[run.objective_name]


def train_to_folder(run: RunConfig) -> TrainingResult:
    """Trains a model and writes it into the run's `output`, with log, plot and report.

    A run that was interrupted goes on from its last checkpoint when it is started again.

    Args:
        run: The configuration.

    Returns:
        The model and how it did. In the folder: what the task's `save_pretrained` writes, `run.json`,
        `training.jsonl`, `loss.png`, `report.html`, `tensorboard` and `checkpoints`. The report is there
        also when the run is interrupted.

    Raises:
        FileExistsError: If the folder holds a model.
        FileNotFoundError, ValueError: If the texts or settings do not serve, or the folder holds a run with
            other settings.
    """
    output = pathlib.Path(run.output)
    if (output / "config.json").exists():
        raise FileExistsError(f"A run never overwrites a model; choose another folder. Received: {output}")
    _check_same_run(run, output / "run.json")
    result = train(
        run,
        output / "training.jsonl",
        output / "checkpoints",
        output / "report.html",
        output / "tensorboard",
    )
    if is_chief(result.model.distribute_strategy):
        result.progress.plot(output / "loss.png", result.progress.baselines)
        result.model.save_pretrained(output)
    return result


def _check_same_run(run: RunConfig, path: pathlib.Path) -> None:
    """Writes the settings of a run, or compares them with those that it was begun with."""
    settings = json.loads(json.dumps({**dataclasses.asdict(run), "kerasllm": __version__}))
    # A run may move, be spread otherwise, and show other things.
    del settings["output"], settings["training"]["strategy"], settings["logging"]
    del settings["training"]["shard_optimizer"]
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
