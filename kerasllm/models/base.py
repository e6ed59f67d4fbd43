"""What every model family has in common."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from kerasllm.layers import TokenEmbedding

# Hugging Face's names of activations -> ours; where it has several, the last is the one written.
HUGGINGFACE_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}

# Settings of generation, which files of old keep in config.json.
GENERATION_NAMES = frozenset(
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty forced_bos_token_id "
    "forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups "
    "num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty "
    "return_dict_in_generate suppress_tokens temperature top_k top_p typical_p".split()
)
# Names in any family's config.json that say nothing about the computation.
_IGNORED_NAMES = GENERATION_NAMES | frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path architectures attn_implementation "
    "auto_map bos_token_id chunk_size_feed_forward cls_token_id dtype finetuning_task "
    "gradient_checkpointing id2label is_encoder_decoder is_llama_config label2id mask_token_id model_type "
    "output_attentions output_hidden_states output_past pad_token_id problem_type return_dict sep_token_id "
    "task_specific_params tokenizer_class torch_dtype torchscript transformers.js_config "
    "transformers_version use_cache xla_device".split()
)


@dataclasses.dataclass(frozen=True)
class Transform:
    """How one tensor of a checkpoint maps onto variables, in both directions.

    Args:
        to_variables: From the checkpoint's array to one array per variable.
        to_tensor: From the variables' arrays back to the checkpoint's array.
    """

    to_variables: Callable[[np.ndarray], Sequence[np.ndarray]]
    to_tensor: Callable[[Sequence[np.ndarray]], np.ndarray]


SAME = Transform(lambda tensor: [tensor], lambda arrays: arrays[0])
# PyTorch's linear layers hold their matrices as [out, in], Keras's as [in, out].
TRANSPOSE = Transform(lambda tensor: [tensor.T], lambda arrays: arrays[0].T)
# One matrix that makes queries, keys and values at once, side by side in its last axis.
SPLIT_IN_THREE = Transform(
    lambda tensor: np.split(tensor, 3, axis=-1), lambda arrays: np.concatenate(arrays, axis=-1)
)

# Checkpoint tensor name -> (variable path or paths, Transform); `{}` stands for the layer's number.
WeightsTable = dict[str, tuple[str | tuple[str, ...], Transform]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one `model_type` of Hugging Face spells a family: in config.json and in its tensors' names.

    Args:
        names: Names in config.json to the fields of the family's config.
        weights: Table of the body's tensors, named as in a checkpoint without a head.
        head_weights: By head, the table of the head's tensors.
        architectures: By head, the class of transformers that holds the same model.
        prefix: What the body's tensors are called by in a checkpoint with a head, such as `"model."`.
        fixed: Names in config.json with the one value that this implementation stands for.
        ignored: Names in config.json that say nothing about the computation.
        defaults: Fields that this `model_type` implies, or that its config.json may leave out.
        ignored_tensors: Regular expressions of tensors that are no weights.
        renamed: Regular expressions in the tensor names of older files, and what stands for them today.
        read: From the parsed config.json to one with only the names above.
        write: The way back; gets what the names say and the config.
    """

    names: dict[str, str]
    weights: WeightsTable
    head_weights: dict[str, WeightsTable]
    architectures: dict[str | None, str]
    prefix: str
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    ignored_tensors: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values
    write: Callable[[dict[str, Any], "ModelConfig"], dict[str, Any]] = lambda values, config: values


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields of one family, and the only place where their names are written.

    A family derives from it and adds its fields.

    Args:
        vocabulary_size: Number of tokens.
        context_length: Longest sequence, in tokens.
        labels: Names of the classes of a classifier.
        problem_type: What a classifier's scores are: `"single_label_classification"`,
            `"multi_label_classification"` or `"regression"`; None: single-label, or a regression if
            there is one label.
        huggingface_type: The `model_type` of Hugging Face in whose spelling the model is saved; nothing
            is computed by it.
    """

    # The `model_type`s of Hugging Face that this family holds; the first is the default.
    dialects: ClassVar[dict[str, Dialect]] = {}

    vocabulary_size: int
    context_length: int
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str | None = None
    huggingface_type: str = ""

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "huggingface_type", self.huggingface_type or next(iter(self.dialects), ""))
        if self.dialects and self.huggingface_type not in self.dialects:
            raise ValueError(
                f"`huggingface_type` of {type(self).__name__} must be one of {sorted(self.dialects)}. "
                f"Received: {self.huggingface_type!r}"
            )
        for name in ("vocabulary_size", "context_length", "num_layers"):
            if (value := getattr(self, name, 1)) < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")

    @property
    def dialect(self) -> Dialect:
        """The names of Hugging Face for this configuration."""
        return self.dialects[self.huggingface_type]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Makes a config from a dictionary.

        Args:
            values: Field names to values.

        Returns:
            The config.

        Raises:
            ValueError: If a key is not a field or a field without a default is missing.
        """
        fields = dataclasses.fields(cls)
        known = {field.name for field in fields}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{cls.__name__} has the fields {sorted(known)}. Received: {unknown}")
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ValueError(f"{cls.__name__} needs {sorted(required)}. Missing: {missing}")
        return cls(**values)

    @classmethod
    def from_huggingface(cls, values: dict[str, Any]) -> "ModelConfig":
        """Reads the content of a Hugging Face `config.json`.

        Args:
            values: The parsed file.

        Returns:
            The config.

        Raises:
            ValueError: If the file asks for what this family does not compute, or sets a name whose
                meaning is not known here.
        """
        if (model_type := values.get("model_type")) not in cls.dialects:
            raise ValueError(
                f"`model_type` of a {cls.__name__} must be one of {sorted(cls.dialects)}. "
                f"Received: {model_type!r}"
            )
        dialect = cls.dialects[model_type]
        given = {}
        for name, value in dialect.read(dict(values)).items():
            if name in dialect.names:
                field = dialect.names[name]
                if field == "activation":
                    value = HUGGINGFACE_ACTIVATIONS.get(value, value)
                if given.setdefault(field, value) != value:
                    same = [other for other in dialect.names if dialect.names[other] == field]
                    raise ValueError(
                        f"{same} must be equal, for {cls.__name__} has one `{field}`. "
                        f"Received: {given[field]!r} and {value!r}"
                    )
            elif name in dialect.fixed:
                if value != (fixed := dialect.fixed[name]):
                    raise ValueError(
                        f"{cls.__name__} stands for {name}={fixed!r}. Received: {name}={value!r}"
                    )
            # What is None, False or empty is a feature that is switched off, whatever it may be.
            elif name not in dialect.ignored | _IGNORED_NAMES and value:
                raise ValueError(
                    "Every name in a config.json must be known; what does not change the model's scores "
                    f"may be taken out of the file. Received for {cls.__name__}: {name}={value!r}"
                )
        if "id2label" in values:
            given["labels"] = _labels(values["id2label"])
        given["problem_type"] = values.get("problem_type")
        return cls.from_dict({**dialect.defaults, **given, "huggingface_type": model_type})

    def to_huggingface(self) -> dict[str, Any]:
        """Returns what a Hugging Face `config.json` says of the model's computation.

        Raises:
            ValueError: If that `model_type` has no name for a field that differs from what it implies.
        """
        dialect = self.dialect
        activations = {ours: theirs for theirs, ours in HUGGINGFACE_ACTIVATIONS.items()}
        values = dict(dialect.fixed)
        for name, field in dialect.names.items():
            value = getattr(self, field)
            values[name] = activations[value] if field == "activation" else value
        values = {
            "model_type": self.huggingface_type,
            **dialect.write(values, self),
            "id2label": {str(number): label for number, label in enumerate(self.labels)},
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": self.problem_type,
        }
        read = type(self).from_huggingface(values)
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(read, field.name)
            if mine != theirs:
                raise ValueError(
                    f"A {self.huggingface_type!r} of Hugging Face stands for {field.name}={theirs!r}. "
                    f"Received: {field.name}={mine!r}"
                )
        return values

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary that `from_dict` takes, in types that JSON has."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }


def _labels(id2label: Any) -> tuple[str, ...]:
    """The labels of a config.json, in the order of their numbers."""
    try:
        numbered = {int(number): str(label) for number, label in id2label.items()}
        return tuple(numbered[number] for number in range(len(numbered)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"`id2label` must map the numbers from 0 on to labels. Received: {id2label!r}"
        ) from error


class LanguageModel(keras.Model):
    """A transformer that maps token ids to what its head says; families derive from it.

    Args:
        config: The family's configuration.
        head: What stands on the last hidden states: one of the class's `heads`; None: nothing, they are
            the result. By default the first of `heads`.

    Raises:
        ValueError: If the family has no such head.
    """

    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    heads: ClassVar[tuple[str | None, ...]] = (None,)

    def __init__(self, config: ModelConfig, head: str | None = "default", **kwargs):
        super().__init__(**kwargs)
        if head == "default":
            head = self.heads[0]
        if head not in self.heads:
            raise ValueError(
                f"`head` of a {type(self).__name__} must be one of {self.heads}. Received: {head!r}"
            )
        self.config = config
        self.head = head

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "config": self.config.to_dict(), "head": self.head}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LanguageModel":
        config = dict(config)
        return cls(cls.config_class.from_dict(config.pop("config")), **config)

    # Hugging Face's names

    def huggingface_config(self) -> dict[str, Any]:
        """Returns the content of a `config.json` that transformers loads this model by."""
        architecture = self.config.dialect.architectures[self.head]
        return {"architectures": [architecture], **self.config.to_huggingface()}

    def weight_map(self) -> dict[str, tuple[tuple[str, ...], Transform]]:
        """Spells the weight tables out for this model.

        Returns:
            Checkpoint tensor name to the paths of the variables below the model and the transform.
        """
        dialect = self.config.dialect
        prefix = "" if self.head is None else dialect.prefix
        table = {prefix + name: target for name, target in dialect.weights.items()}
        table |= dialect.head_weights.get(self.head, {})
        paths = set(self.variables_by_path())
        # A variable that this configuration does not have (a bias, say) has no tensor either.
        return {name: target for name, target in self._spell(table).items() if target[0][0] in paths}

    def _spell(self, table: WeightsTable) -> dict[str, tuple[tuple[str, ...], Transform]]:
        """Writes the number of each layer into a weight table."""
        spelled = {}
        for name, (targets, transform) in table.items():
            targets = (targets,) if isinstance(targets, str) else targets
            for number in range(self._count_layers()) if "{}" in name else (0,):
                filled = tuple(target.format(number) for target in targets)
                spelled[name.format(number)] = (filled, transform)
        return spelled

    def checkpoint_names(self, names: Iterable[str]) -> dict[str, str]:
        """Finds the tensors of this model in a checkpoint, which may have another head or none.

        Args:
            names: The checkpoint's tensor names.

        Returns:
            Name in the checkpoint to name in `weight_map`, without the buffers that are no weights and
            without what belongs to another head. A name that is not known stays as it is.
        """
        dialect, table = self.config.dialect, self.weight_map()
        others = set().union(*(self._spell(head) for head in dialect.head_weights.values())) - set(table)
        found = {}
        for name in names:
            if any(re.search(pattern, name) for pattern in dialect.ignored_tensors):
                continue
            today = name
            for pattern, replacement in dialect.renamed:
                today = re.sub(pattern, replacement, today)
            bare = today.removeprefix(dialect.prefix)
            spellings = (today, dialect.prefix + bare, bare)
            own = [spelling for spelling in spellings if spelling in table]
            if own:
                found[name] = own[0]
            elif others.isdisjoint(spellings):
                found[name] = name
        return found

    def head_tensors(self) -> set[str]:
        """Returns the names in `weight_map` that belong to the head."""
        head = self.config.dialect.head_weights.get(self.head, {})
        return set(self._spell(head)) & set(self.weight_map())

    def variables_by_path(self) -> dict[str, keras.Variable]:
        """Returns the model's weights by their path below the model, such as `block_0/attention/…`."""
        return {variable.path.partition("/")[2]: variable for variable in self.weights}

    def _count_layers(self) -> int:
        """How many numbers `{}` of a weight table stands for."""
        return self.config.num_layers

    # Computation

    def make_cache(self, batch_size: int, length: int) -> list[tuple[Any, Any]]:
        """Makes an empty key-value cache, one pair per layer.

        Args:
            batch_size: Number of rows.
            length: Number of tokens it can hold.

        Returns:
            A list of (keys, values), laid out as `MultiHeadAttention.make_cache` says.
        """
        return [block.attention.make_cache(batch_size, length) for block in self.blocks]

    def score_tokens(self, hidden):
        """Applies the head of a model that predicts tokens.

        Args:
            hidden: Floats `[..., dim]`: what `call` returns with `with_head=False`.

        Returns:
            Logits `[..., vocabulary_size]`.
        """
        raise NotImplementedError(f"The head {self.head!r} predicts no tokens.")

    def _check_call(self, token_ids, cache, cache_index) -> None:
        if (cache is None) != (cache_index is None):
            raise ValueError(
                "`cache` and `cache_index` must be given together. "
                f"Received: cache given: {cache is not None}, cache_index={cache_index}"
            )
        length = token_ids.shape[-1]
        start = cache_index if isinstance(cache_index, int) else 0
        if length is not None and start + length > self.config.context_length:
            raise ValueError(
                "A sequence must fit into the context of the model. "
                f"Received: {start + length} tokens, context_length={self.config.context_length}"
            )

    @staticmethod
    def _positions(token_ids, cache_index):
        """The places of the tokens: `[length]`, or `[batch, length]` with an index per row."""
        offsets = ops.arange(ops.shape(token_ids)[-1], dtype="int32")
        if cache_index is None:
            return offsets
        return ops.expand_dims(ops.cast(cache_index, "int32"), -1) + offsets


class DecoderModel(LanguageModel):
    """A stack of decoder blocks between a token embedding and a head; families derive from it.

    A family makes, in `__init__`, `token_embedding`, `blocks` and `final_norm`, says in `_embed` how
    token ids enter the stack, and calls `_build_all`. The config has `dim`, `tie_embeddings` and
    `initializer_range`.
    """

    heads = ("causal_lm", "classifier", None)

    def _build_all(self, *embeddings) -> None:
        """Makes the head and all weights, whose shapes follow from the configuration.

        Args:
            *embeddings: Further layers that `_embed` looks ids up in.
        """
        config = self.config
        self.output_embedding = self.classifier = None
        if self.head == "causal_lm":
            self.output_embedding = self.token_embedding
            if not config.tie_embeddings:
                self.output_embedding = TokenEmbedding(
                    config.vocabulary_size,
                    config.dim,
                    config.initializer_range,
                    name="head",
                    dtype=self.dtype_policy,
                )
        elif self.head == "classifier":
            self.classifier = keras.layers.Dense(
                len(config.labels),
                use_bias=False,
                kernel_initializer=keras.initializers.RandomNormal(stddev=config.initializer_range),
                name="classifier",
                dtype=self.dtype_policy,
            )
        self._embeddings = embeddings
        self.build((None, None))

    def build(self, input_shape):
        stream = (None, None, self.config.dim)
        for layer in (self.token_embedding, *self._embeddings):
            layer.build()
        for layer in (*self.blocks, self.final_norm):
            layer.build(stream)
        if self.output_embedding not in (None, self.token_embedding):
            self.output_embedding.build()
        if self.classifier is not None:
            self.classifier.build(stream)
        self.built = True

    def _embed(self, token_ids, positions, training):
        """Token ids and their places -> floats `[batch, length, dim]`."""
        raise NotImplementedError

    def score_tokens(self, hidden):
        return self.output_embedding(hidden, reverse=True)

    def call(
        self,
        token_ids,
        attention_mask=None,
        cache=None,
        cache_index=None,
        last_index=None,
        positions=None,
        training: bool = False,
        return_hidden: bool = False,
        with_head: bool = True,
    ):
        """Predicts the token after each token; with another head, classifies or gives hidden states.

        Args:
            token_ids: Integers `[batch, length]`.
            attention_mask: Which keys count besides the causal rule, see `layers.attention.mask_bias`.
            cache: Key-value cache from `make_cache`.
            cache_index: Column of the first token in the cache, see `MultiHeadAttention`; needed if
                and only if there is a cache.
            last_index: Integers `[batch]`: return the result at this place of each row only.
            positions: Integers `[batch, length]`: the place of each token in its text, where a row holds
                several. None: its place in the row.
            training: Whether dropout is on.
            return_hidden: Whether to return a pair: the result, and the last hidden states of all
                places `[batch, length, dim]`.
            with_head: Whether the head is applied; otherwise the result is as with the head None, which
                is what `score_tokens` takes.

        Returns:
            Floats. `"causal_lm"`: logits `[batch, length, vocabulary_size]`, or `[batch, 1, …]` with
            `last_index`. None: hidden states `[batch, length, dim]`, likewise. `"classifier"`: scores
            `[batch, labels]` at `last_index`, or else at the last token that `attention_mask`
            `[batch, length]` counts. With a cache also the updated cache.
        """
        self._check_call(token_ids, cache, cache_index)
        places = self._positions(token_ids, cache_index) if positions is None else positions
        x = self._embed(token_ids, places, training)
        updated = []
        for number, block in enumerate(self.blocks):
            if cache is None:
                x = block(
                    x,
                    attention_mask=attention_mask,
                    positions=positions,
                    training=training,
                )
            else:
                x, layer_cache = block(
                    x,
                    attention_mask=attention_mask,
                    positions=positions,
                    cache=cache[number],
                    cache_index=cache_index,
                    training=training,
                )
                updated.append(layer_cache)
        head = self.head if with_head else None
        if head == "classifier" and last_index is None:
            last_index = self._last_tokens(token_ids, attention_mask)
        hidden = x = self.final_norm(x)
        if last_index is not None:
            x = ops.take_along_axis(x, ops.reshape(last_index, (-1, 1, 1)), axis=1)
        if head == "causal_lm":
            x = self.score_tokens(x)
        elif head == "classifier":
            x = ops.squeeze(self.classifier(x), 1)
        outputs = (x, hidden) if return_hidden else x
        return outputs if cache is None else (outputs, updated)

    @staticmethod
    def _last_tokens(token_ids, attention_mask):
        """The place of the last token of each row."""
        if attention_mask is None:
            return ops.full_like(token_ids[:, 0], ops.shape(token_ids)[1] - 1)
        if len(attention_mask.shape) != 2:
            raise ValueError(
                "A classifier needs an `attention_mask` [batch, length] to find the last token. "
                f"Received: shape={tuple(attention_mask.shape)}"
            )
        columns = ops.arange(ops.shape(attention_mask)[1], dtype="int32")
        counted = ops.not_equal(ops.cast(attention_mask, "int32"), 0)
        return ops.max(ops.where(counted, columns, 0), axis=1)
