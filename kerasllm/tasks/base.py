"""What every task has: a model, its tokenizer, and the ways in and out of files."""

import gc
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar

import keras

from kerasllm.checkpoints import Checkpoint, load_checkpoint, save_folder
from kerasllm.files import new_file
from kerasllm.layers import TokenEmbedding
from kerasllm.layers.precision import StoredHalfPolicy
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer

# The precisions that `Task.with_dtype` knows.
DTYPES = ("float32", "bfloat16", "float16", "int8")


def require_tensorflow(what: str) -> None:
    """Refuses what is a TensorFlow graph on another backend.

    Args:
        what: What is asked for, the beginning of a sentence.

    Raises:
        RuntimeError: If the backend is not TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            f"{what} needs the TensorFlow backend: save the model and load it there. "
            f"Received: KERAS_BACKEND={keras.backend.backend()}"
        )


class Task(keras.Model):
    """A model with its tokenizer; tasks derive from it.

    Args:
        model: The network, with the head that the task needs.
        tokenizer: Its tokenizer; without one, only token ids go in.

    Raises:
        ValueError: If the model has another head, or fewer tokens than the tokenizer.
    """

    # The head that the task's models have.
    head: ClassVar[str | None] = None

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None = None, **kwargs):
        # The network's precision is the task's, for Keras asks the task whether to scale the loss.
        super().__init__(**{"dtype": model.dtype_policy, **kwargs})
        if model.head != self.head:
            raise ValueError(
                f"The model of a {type(self).__name__} must have the head {self.head!r}. "
                f"Received: head={model.head!r}"
            )
        if tokenizer is not None and tokenizer.vocabulary_size > model.config.vocabulary_size:
            raise ValueError(
                "The model's vocabulary must hold every id of the tokenizer. Received: a tokenizer of "
                f"{tokenizer.vocabulary_size} tokens, a model of {model.config.vocabulary_size}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.built = True

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            name = type(self).__name__
            raise ValueError(f"This needs a tokenizer, and the model has none: {name}(model, tokenizer).")
        return self.tokenizer

    @staticmethod
    def _arguments(inputs: Mapping[str, Any] | Any) -> Mapping[str, Any]:
        """What the model takes, of token ids or of its arguments by name."""
        return inputs if isinstance(inputs, Mapping) else {"token_ids": inputs}

    # Files

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Task":
        config = dict(config)
        config["model"] = keras.saving.deserialize_keras_object(config["model"])
        return cls(**config)

    def save_assets(self, folder: str) -> None:
        """Puts the tokenizer into a `.keras` file; Keras calls it."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def load_assets(self, folder: str) -> None:
        """Takes the tokenizer from a `.keras` file; Keras calls it."""
        if pathlib.Path(folder, "tokenizer.json").is_file():
            self.tokenizer = Tokenizer.from_folder(folder)

    def save(self, filepath: str | os.PathLike, overwrite: bool = True, **kwargs) -> None:
        """Writes a `.keras` file with the tokenizer and the optimizer, whole or not at all.

        Args:
            filepath: The file, ending in `.keras`.
            overwrite: Whether a file that is there may be replaced.
            **kwargs: As in Keras.

        Raises:
            FileExistsError: If the file exists and must not be replaced.
        """
        if not overwrite and os.path.exists(filepath):
            raise FileExistsError(f"`overwrite` is False and the file exists. Received: {filepath}")
        with new_file(filepath) as temporary:
            super().save(temporary, **kwargs)

    @classmethod
    def load(cls, path: str | os.PathLike, dtype: str | None = None) -> "Task":
        """Loads what `save` or `save_pretrained` wrote.

        Args:
            path: A `.keras` file, or whatever `from_pretrained` takes.
            dtype: Keras dtype policy; a `.keras` file has its own. None: Keras's default.

        Returns:
            The model; from a `.keras` file with the optimizer's state.

        Raises:
            FileNotFoundError: If there is nothing.
            ValueError: If the file is damaged or holds something else.
        """
        if not str(path).endswith(".keras"):
            return cls.from_pretrained(path, dtype)
        if dtype is not None:
            raise ValueError(f"A .keras file has a dtype of its own: leave `dtype` out. Received: {dtype}")
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"There is no model at: {path}")
        try:
            model = keras.models.load_model(path)
        except (OSError, LookupError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"Not a .keras file, or a damaged one: {path} ({error})") from error
        if not isinstance(model, cls):
            raise ValueError(f"The file must hold a {cls.__name__}. Received: {type(model).__name__}")
        return model

    def save_pretrained(self, folder: str | os.PathLike, max_shard_size: int | str = "5GB") -> pathlib.Path:
        """Writes the model in Hugging Face's layout, which transformers loads.

        Args:
            folder: Where to write config.json, the safetensors, the tokenizer and, for a model that
                generates, generation_config.json.
            max_shard_size: Most bytes of a file of weights, as a number or such as `"500MB"`; a single
                tensor may be larger.

        Returns:
            The folder.
        """
        settings = self._generation_settings()
        return save_folder(folder, self.model, self.tokenizer, settings, max_shard_size)

    def with_dtype(self, dtype: str) -> "Task":
        """Copies the model with its weights in another precision; this one stays as it is.

        Args:
            dtype: `"float32"`; `"bfloat16"`: weights and computation, as `from_pretrained` loads them;
                `"float16"`: the weights, with which float32 is computed; `"int8"`: matrices and tables in
                integers of 8 bits, with a float32 scale for each output of a matrix and each row of a
                table, with which float32 is computed. On a CPU the last two are slower than float32, for
                the weights are converted at each use: they save memory.

        Returns:
            The copy.

        Raises:
            ValueError: If there is no such precision or the weights are integers already.
        """
        if dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {DTYPES}. Received: {dtype!r}")
        if any(variable.dtype == "int8" for variable in self.model.variables):
            raise ValueError(f"Weights of 8 bits have no other precision. Received: dtype={dtype!r}")
        policy = keras.DTypePolicy("float32" if dtype == "int8" else dtype)
        if dtype == "float16":
            policy = StoredHalfPolicy("float16")
        config = self.get_config()
        config["dtype"] = policy
        config["model"]["config"]["dtype"] = keras.saving.serialize_keras_object(policy)
        copy = type(self).from_config(config)
        copy.tokenizer = self.tokenizer
        for target, source in zip(copy.model.variables, self.model.variables, strict=True):
            target.assign(source)
        if dtype == "int8":
            # Keras collects garbage after each matrix, and each time looks at all objects that there are,
            # which takes much longer than the rest. Here it looks at those only that are made meanwhile.
            gc.freeze()
            try:
                copy.model.quantize(
                    config=keras.quantizers.Int8QuantizationConfig(activation_quantizer=None),
                    filters=lambda layer: isinstance(layer, (keras.layers.Dense, TokenEmbedding)),
                )
            finally:
                gc.unfreeze()
        return copy

    def export(self, path: str | os.PathLike, *, dtype: str | None = None, **kwargs: Any) -> pathlib.Path:
        """Writes the model as a SavedModel that reads text and runs without kerasllm.

        Args:
            path: The folder; for TensorFlow Serving a version number below the model's folder, such as
                `served/my_model/1`.
            dtype: Precision of the weights, as in `with_dtype`. None: that of the model.
            **kwargs: `batching`: a `kerasllm.export.Batching`, where the graph is to put calls together
                that come at the same time, for servers that do not; and the fields of
                `kerasllm.generation.Limits`: the most that a request may ask for.

        Returns:
            The folder.

        Raises:
            FileExistsError: If `path` exists.
            ValueError: If the model has no tokenizer or an argument does not fit.
        """
        require_tensorflow("An export")
        if dtype is not None:
            return self.with_dtype(dtype).export(path, **kwargs)
        self._require_tokenizer()
        return self._export(path, **kwargs)

    def _export(self, path: str | os.PathLike, **kwargs: Any) -> pathlib.Path:
        """Writes the SavedModel of a kind of task."""
        raise NotImplementedError

    def _generation_settings(self) -> dict[str, Any] | None:
        """What generation_config.json says, or None for a task that does not generate."""
        return None

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, dtype: str | None = None, revision: str | None = None
    ) -> "Task":
        """Loads a checkpoint.

        Args:
            source: A folder in Hugging Face's layout, a hub id such as `"owner/name"`, a `.gguf` file or
                a KerasHub preset.
            dtype: Keras dtype policy. None: Keras's default.
            revision: Branch, tag or commit of a hub id.

        Returns:
            The model. Where the checkpoint has another head, that of the task is new and untrained, and
            a warning says so.

        Raises:
            FileNotFoundError, ValueError: As `kerasllm.checkpoints.load_checkpoint`.
        """
        return cls._from_checkpoint(load_checkpoint(source, cls.head, dtype, revision))

    @classmethod
    def _from_checkpoint(cls, checkpoint: Checkpoint) -> "Task":
        """Makes the task of what a checkpoint holds."""
        return cls(checkpoint.model, checkpoint.tokenizer)
