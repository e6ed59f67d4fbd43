"""Run configurations: one YAML file and `key=value` overrides, typed; an unknown key is an error."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jsonargparse
import yaml

from kerasllm.models import MODELS, ModelConfig


def _at_least(settings, least: int, *names: str) -> None:
    for name in names:
        if (value := getattr(settings, name)) < least:
            raise ValueError(f"`{name}` must be at least {least}. Received: {name}={value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The tokenizer to train.

    Args:
        kind: See `kerasllm.train_tokenizer`; null: what the objective is used to. A causal model takes
            `byte_bpe`, `word` or `character`, a masked one `wordpiece`, spans want `sentencepiece`.
        vocabulary_size: Number of tokens; null: what the kind needs.
    """

    kind: Literal["byte_bpe", "word", "character", "wordpiece", "sentencepiece"] | None = None
    vocabulary_size: int | None = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The texts to train on.

    Args:
        paths: Text files and folders; null: stories made by the library itself. `prefix_lm` and
            `classification` need JSON lines, with the texts `prompt` and `completion`, or `text` and
            `label`.
        stories: Number of those stories.
        validation_fraction: Part of the documents that is kept for validation.
    """

    paths: list[str] | str | None = None
    stories: int = 10000
    validation_fraction: float = 0.1

    def __post_init__(self):
        _at_least(self, 2, "stories")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"`validation_fraction` must be between 0 and 1. Received: {self.validation_fraction}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What the model learns.

    A setting of another objective is an error; null is the usual value.

    Args:
        kind: null follows from the family: GPT-2 and Llama learn the next token (`causal_lm`), BERT the
            tokens that were hidden (`masked_lm`), T5 the spans that were cut out (`span_corruption`).
            `prefix_lm`: GPT-2 and Llama learn the completions of prompts; `classification`: all but T5
            learn the labels of texts.
        packing: For `causal_lm`: documents end to end, cut into `windows` (null), or `segments`: whole
            documents side by side, none of which sees another.
        mask_rate: For `masked_lm`: part of the tokens that are to be found again; null: 0.15.
        whole_words: For `masked_lm`: whether all tokens of a word are hidden together; null: false.
        noise_rate: For `span_corruption`: part of the tokens that is cut out; null: 0.15.
        mean_span_length: For `span_corruption`: tokens of a span, on average; null: 3.
        too_long: For `prefix_lm`: what becomes of pairs that are longer than a sequence, `drop` or `error`
            (null).
    """

    kind: Literal["causal_lm", "prefix_lm", "masked_lm", "span_corruption", "classification"] | None = None
    packing: Literal["windows", "segments"] | None = None
    mask_rate: float | None = None
    whole_words: bool | None = None
    noise_rate: float | None = None
    mean_span_length: float | None = None
    too_long: Literal["error", "drop"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The training.

    Args:
        steps: Number of updates.
        batch_size: Sequences per update.
        sequence_length: Tokens per sequence; for spans, before they are cut out.
        optimizer: See `kerasllm.training.make_optimizer`; each wants a learning rate of its own.
        schedule: What follows on the warm-up, see `kerasllm.training.make_schedule`.
        learning_rate: The highest; a warm-up leads to it.
        warmup_steps: Updates until then; null: 10 % of the steps, at most 1,000.
        weight_decay: Of matrices and embeddings.
        beta_2: Decay of the second moment of AdamW, or what Lion calls so; null: the optimizer's own.
        skip_above: Updates are left out whose gradient is so many times as large as the median of those
            before; null: none is.
        validate_every: Updates between two looks at the validation texts, a divisor of `steps`; null:
            only at the end.
        precision: Keras dtype policy.
        jit_compile: Whether XLA compiles the step.
        microbatches: Parts in which each replica computes its share of a batch, to save memory.
        shard_optimizer: Whether the replicas share the state of adamw or lion.
        remat: What is computed again to save memory: `cheap` (norms, activations, attention weights) or
            `blocks` (all inside of the blocks); null: nothing.
        quantization_aware: For GPT-2 and Llama that learn to continue texts: the LiteRT export, `int8` or
            `int4`, that the model is trained for. Updates and validations are computed with rounded
            weights, samples with the exact ones; the rounded ones are written; null: none.
        strategy: Where it is computed: `one` device, all GPUs of this machine (`mirrored`), the workers
            that TF_CONFIG names (`multi_worker`), a Cloud TPU (`tpu`), or what there is (`auto`).
        save_every: Updates between two checkpoints; null: only with each validation.
        keep: Number of checkpoints that stay, besides the best.
    """

    steps: int = 1000
    batch_size: int = 32
    sequence_length: int = 128
    optimizer: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    learning_rate: float = 1e-3
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    beta_2: float | None = None
    skip_above: float | None = None
    validate_every: int | None = None
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = "float32"
    jit_compile: bool = True
    microbatches: int = 1
    shard_optimizer: bool = False
    remat: Literal["cheap", "blocks"] | None = None
    quantization_aware: Literal["int8", "int4"] | None = None
    strategy: Literal["auto", "one", "mirrored", "multi_worker", "tpu"] = "auto"
    save_every: int | None = None
    keep: int = 2

    def __post_init__(self):
        _at_least(self, 1, "steps", "batch_size", "sequence_length", "microbatches", "keep")
        if self.beta_2 is not None and self.optimizer not in ("adamw", "lion"):
            raise ValueError(
                "`beta_2` is for adamw and lion. "
                f"Received: beta_2={self.beta_2}, optimizer={self.optimizer}"
            )
        if self.shard_optimizer and self.optimizer not in ("adamw", "lion"):
            raise ValueError(
                f"`shard_optimizer` is for adamw and lion. Received: optimizer={self.optimizer}"
            )
        if self.save_every is not None:
            _at_least(self, 1, "save_every")
        if self.validate_every is not None:
            _at_least(self, 1, "validate_every")
            if self.steps > self.validate_every and self.steps % self.validate_every:
                raise ValueError(
                    "`validate_every` must divide `steps`. "
                    f"Received: validate_every={self.validate_every}, steps={self.steps}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoggingSettings:
    """What is seen of a training; a run that goes on may change it.

    Args:
        prompts: Texts that the model goes on from now and then: for `masked_lm` with the tokenizer's mask
            token, for `span_corruption` with `<extra_id_0>` and so on; null: made of validation texts;
            []: none.
        sample_every: Updates between two looks at what it writes; null: with each validation.
        sample_tokens: Most tokens that it writes.
        tensorboard: Whether scalars for TensorBoard are written.
        peak_flops: Most floating-point operations per second of all devices together, of which the share
            that is used is then told (MFU); null: it is not.
    """

    prompts: list[str] | None = None
    sample_every: int | None = None
    sample_tokens: int = 30
    tensorboard: bool = True
    peak_flops: float | None = None

    def __post_init__(self):
        _at_least(self, 1, "sample_tokens")
        if self.sample_every is not None:
            _at_least(self, 1, "sample_every")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"`peak_flops` must be above 0. Received: peak_flops={self.peak_flops}")


class _Objective(NamedTuple):
    """What an objective needs.

    Attributes:
        head: Of the model.
        settings: Those that are its own.
        fields: Of a document, where it has several parts.
    """

    head: str
    settings: tuple[str, ...]
    fields: tuple[str, ...] = ()


# The first one with the first head of a family is that family's own.
_OBJECTIVES = {
    "causal_lm": _Objective("causal_lm", ("packing",)),
    "prefix_lm": _Objective("causal_lm", ("too_long",), ("prompt", "completion")),
    "masked_lm": _Objective("masked_lm", ("mask_rate", "whole_words")),
    "span_corruption": _Objective("seq2seq", ("noise_rate", "mean_span_length")),
    "classification": _Objective("classifier", (), ("text", "label")),
}
# By the first head of a family: the tokenizers that serve it, the usual one first.
_TOKENIZERS = {
    "causal_lm": ("byte_bpe", "word", "character"),
    "masked_lm": ("wordpiece",),
    "seq2seq": ("sentencepiece",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run.

    Args:
        output: Folder for the model, the log, the plot and the report.
        family: A key of `kerasllm.models.MODELS`.
        model: The family's configuration; its vocabulary is the tokenizer's.
        tokenizer: The tokenizer.
        data: The texts.
        training: The training.
        objective: What is learnt.
        logging: What is seen of it.
        seed: Start of all random numbers.

    Raises:
        ValueError: If a setting does not belong to the family's objective.
    """

    output: str
    family: str
    model: ModelConfig
    tokenizer: TokenizerSettings
    data: DataSettings
    training: TrainingSettings
    objective: ObjectiveSettings = ObjectiveSettings()
    logging: LoggingSettings = LoggingSettings()
    seed: int = 0

    def __post_init__(self):
        name, heads = self.objective_name, MODELS[self.family].heads
        if self.head not in heads:
            allowed = [name for name, objective in _OBJECTIVES.items() if objective.head in heads]
            raise ValueError(
                f"The objective of {self.family!r} must be one of {allowed}. Received: kind={name!r}"
            )
        own, kinds = _OBJECTIVES[name].settings, _TOKENIZERS[heads[0]]
        given = {key for key, value in dataclasses.asdict(self.objective).items() if value is not None}
        if other := sorted(given - {"kind", *own}):
            raise ValueError(
                f"The objective of {self.family!r} is {name!r}, with the settings {list(own)}. "
                f"Received: {other}"
            )
        if self.fields and self.data.paths is None:
            raise ValueError(
                f"The objective {name!r} needs `data.paths`: JSON lines with {list(self.fields)}. "
                "Received: none"
            )
        kind = self.training.quantization_aware
        if kind is not None and self.head != "causal_lm":
            raise ValueError(
                "`training.quantization_aware` is for objectives that continue texts. "
                f"Received: {kind!r} with the objective {name!r}"
            )
        if self.tokenizer.kind is None:
            tokenizer = dataclasses.replace(self.tokenizer, kind=kinds[0])
            object.__setattr__(self, "tokenizer", tokenizer)
        if self.tokenizer.kind not in kinds:
            raise ValueError(
                f"The tokenizer of the objective {name!r} must be one of {list(kinds)}. "
                f"Received: kind={self.tokenizer.kind!r}"
            )

    @property
    def objective_name(self) -> str:
        """What is learnt: `objective.kind`, or what the family is for."""
        own = MODELS[self.family].heads[0]
        usual = next(name for name, objective in _OBJECTIVES.items() if objective.head == own)
        return self.objective.kind or usual

    @property
    def head(self) -> str:
        """The head of the model that learns it."""
        return _OBJECTIVES[self.objective_name].head

    @property
    def fields(self) -> tuple[str, ...]:
        """The parts of a document; none where it is one text."""
        return _OBJECTIVES[self.objective_name].fields


_SECTIONS = {
    "tokenizer": TokenizerSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "objective": ObjectiveSettings,
    "logging": LoggingSettings,
}
_SETTINGS = {"output", "family", "seed"} | {
    f"{name}.{field.name}" for name, section in _SECTIONS.items() for field in dataclasses.fields(section)
}


def load_run_config(path: str | os.PathLike | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run configuration.

    Args:
        path: A YAML file; None takes the defaults, and `output` from the overrides.
        overrides: Settings that go before the file's, such as `training.steps=100`.

    Returns:
        The configuration, with a model whose vocabulary is still to be set.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If a key is unknown, a value of the wrong type or `output` missing.
    """
    family = _family(path, overrides)
    config_class = MODELS[family].config_class
    known = _SETTINGS | {f"model.{field.name}" for field in dataclasses.fields(config_class)}
    known.remove("model.vocabulary_size")  # the tokenizer sets it, and the model's size follows
    arguments = [] if path is None else [f"--config={path}"]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ValueError(f"A setting is written key=value. Received: {override!r}")
        if key not in known:  # argparse would take a beginning of a name
            raise ValueError(f"A setting must be one of {sorted(known)}. Received: {key}")
        arguments.append(f"--{override}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--output", type=str, required=True)
    parser.add_argument("--family", type=str)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_class_arguments(config_class, "model", skip={"vocabulary_size"})
    for name, section in _SECTIONS.items():
        parser.add_class_arguments(section, name)
    try:
        settings = parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        source = "the settings" if path is None else str(path)
        raise ValueError(f"A run configuration must be valid. Received in {source}: {error}") from error
    return RunConfig(
        output=settings.output,
        family=family,
        model=config_class(**settings.model.as_dict()),
        seed=settings.seed,
        **{name: section(**settings[name].as_dict()) for name, section in _SECTIONS.items()},
    )


def _family(path: str | os.PathLike | None, overrides: Sequence[str]) -> str:
    """Finds the model family first, for it decides which settings a model has."""
    values = {}
    if path is not None:
        try:
            values = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"A run configuration must be YAML. Received: {path}: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"A run configuration must be a mapping. Received: {path}")
    family = values.get("family", "gpt2")
    for override in overrides:
        key, _, value = override.partition("=")
        family = value if key == "family" else family
    if family not in MODELS:
        raise ValueError(f"`family` must be one of {sorted(MODELS)}. Received: {family!r}")
    return family
