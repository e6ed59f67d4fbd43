"""What every model family has in common."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

# Hugging Face's names of activations -> ours; where it has several, the last is the one written.
HUGGINGFACE_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}

# Names in any family's config.json that say nothing about the computation.
_HUGGINGFACE_IGNORED = frozenset(
    "_name_or_path architectures bos_token_id dtype eos_token_id model_type pad_token_id "
    "task_specific_params torch_dtype transformers_version use_cache".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The fields of one family, and the only place where their names are written.

    A family derives from it and adds its fields. Every family has a `vocabulary_size` and a
    `context_length`.
    """

    # How a Hugging Face config.json maps onto the fields: its names for them, the values that this
    # implementation stands for, and the names that say nothing about the computation.
    huggingface_names: ClassVar[dict[str, str]] = {}
    huggingface_fixed: ClassVar[dict[str, Any]] = {}
    huggingface_ignored: ClassVar[frozenset[str]] = frozenset()

    vocabulary_size: int
    context_length: int

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
            ValueError: If the file asks for what this family does not compute, or holds a name whose
                meaning is not known here.
        """
        fields = {}
        for name, value in values.items():
            if name in cls.huggingface_names:
                field = cls.huggingface_names[name]
                if field == "activation":
                    value = HUGGINGFACE_ACTIVATIONS.get(value, value)
                if fields.setdefault(field, value) != value:
                    same = [
                        other for other in cls.huggingface_names if cls.huggingface_names[other] == field
                    ]
                    raise ValueError(
                        f"{same} must be equal, for {cls.__name__} has one `{field}`. "
                        f"Received: {fields[field]!r} and {value!r}"
                    )
            elif name in cls.huggingface_fixed:
                if value != (fixed := cls.huggingface_fixed[name]):
                    raise ValueError(
                        f"{cls.__name__} stands for {name}={fixed!r}. Received: {name}={value!r}"
                    )
            elif name not in cls.huggingface_ignored | _HUGGINGFACE_IGNORED:
                raise ValueError(
                    f"Every name in a config.json must be known. Received for {cls.__name__}: "
                    f"{name}={value!r}"
                )
        return cls.from_dict(fields)

    def to_huggingface(self) -> dict[str, Any]:
        """Returns what a Hugging Face `config.json` says of the model's computation."""
        activations = {ours: theirs for theirs, ours in HUGGINGFACE_ACTIVATIONS.items()}
        values = dict(self.huggingface_fixed)
        for name, field in self.huggingface_names.items():
            value = getattr(self, field)
            values[name] = activations[value] if field == "activation" else value
        return values

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as a dictionary that `from_dict` takes."""
        return dataclasses.asdict(self)


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
# One matrix that makes queries, keys and values at once, side by side in its last axis.
SPLIT_IN_THREE = Transform(
    lambda tensor: np.split(tensor, 3, axis=-1), lambda arrays: np.concatenate(arrays, axis=-1)
)


class LanguageModel(keras.Model):
    """A transformer that maps token ids to logits; families derive from it.

    Args:
        config: The family's configuration.
    """

    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    # The class of transformers that holds the same model.
    huggingface_architecture: ClassVar[str] = ""
    # Checkpoint tensor name -> (variable path or paths, Transform); `{}` stands for the layer's number.
    weights_table: ClassVar[dict[str, tuple[str | tuple[str, ...], Transform]]] = {}

    def __init__(self, config: ModelConfig, **kwargs):
        super().__init__(**kwargs)
        self.config = config

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "config": self.config.to_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LanguageModel":
        config = dict(config)
        return cls(cls.config_class.from_dict(config.pop("config")), **config)

    def weight_map(self) -> dict[str, tuple[tuple[str, ...], Transform]]:
        """Spells the weight table out for this model.

        Returns:
            Checkpoint tensor name to the paths of the variables below the model and the transform.
        """
        paths = set(self.variables_by_path())
        spelled = {}
        for name, (targets, transform) in self.weights_table.items():
            targets = (targets,) if isinstance(targets, str) else targets
            numbers = range(self.config.num_layers) if "{}" in name else (0,)
            for number in numbers:
                # A variable that this configuration does not have (a bias, say) has no tensor either.
                if (filled := tuple(t.format(number) for t in targets))[0] in paths:
                    spelled[name.format(number)] = (filled, transform)
        return spelled

    def variables_by_path(self) -> dict[str, keras.Variable]:
        """Returns the model's weights by their path below the model, such as `block_0/attention/…`."""
        return {variable.path.partition("/")[2]: variable for variable in self.weights}

    def make_cache(self, batch_size: int, length: int) -> list[tuple[Any, Any]]:
        """Makes an empty key-value cache, one pair per layer.

        Args:
            batch_size: Number of rows.
            length: Number of tokens it can hold.

        Returns:
            A list of (keys, values), laid out as `MultiHeadAttention.make_cache` says.
        """
        return [block.attention.make_cache(batch_size, length) for block in self.blocks]

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
