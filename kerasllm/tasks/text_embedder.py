"""A model that turns texts into vectors whose angles tell how much the texts have in common."""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from kerasllm.checkpoints import Checkpoint, load_checkpoint, save_folder
from kerasllm.checkpoints.folder import read_json
from kerasllm.checkpoints.load import find_checkpoint
from kerasllm.export import export_embedder
from kerasllm.generation import Limits
from kerasllm.models import LanguageModel
from kerasllm.tasks.texts import TextTask, list_texts
from kerasllm.tokenizers import Tokenizer

# Our names of the ways to pool -> those of sentence-transformers.
POOLINGS = {"mean": "mean", "cls": "cls", "last": "lasttoken", "max": "max"}
_OLDER_POOLINGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens",
}
_MODULES, _TRANSFORMER = "modules.json", "sentence_bert_config.json"
_SETTINGS, _POOLING = "config_sentence_transformers.json", "1_Pooling"


@keras.saving.register_keras_serializable(package="kerasllm")
class TextEmbedder(TextTask):
    """A text encoder with its tokenizer: hidden states, pooled to one vector.

    Reimers, Gurevych: "Sentence-BERT" (2019).

    Args:
        model: The network without a head, such as `kerasllm.models.Bert(config, head=None)`.
        tokenizer: The tokenizer; without one, only token ids go in.
        pooling: `"mean"` of the tokens, `"max"` of them in each place, the first (`"cls"`) or the
            `"last"`. Padding never counts, special tokens do.
        normalize: Whether each vector is scaled to length 1.
        max_length: Tokens that a longer text is cut to, special tokens included. None: nothing is cut,
            and a text that does not fit into the context is an error.
        prompts: Texts by name, one of which may be put before each text.
        default_prompt: Name of the prompt that is put there unless the caller says otherwise.

    Raises:
        ValueError: If the pooling or the default prompt is not known.

    Example:

    ```python
    model = kerasllm.TextEmbedder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
    vectors = model.encode(["A cat sat on the mat.", "There is a kitten on the rug."])
    model.similarity(vectors, vectors)
    ```
    """

    head = None

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        pooling: str = "mean",
        normalize: bool = False,
        max_length: int | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt: str | None = None,
        **kwargs,
    ):
        super().__init__(model, tokenizer, **kwargs)
        if pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {sorted(POOLINGS)}. Received: {pooling!r}")
        prompts = dict(prompts or {})
        if default_prompt is not None and default_prompt not in prompts:
            raise ValueError(
                f"`default_prompt` must be None or one of {sorted(prompts)}. Received: {default_prompt!r}"
            )
        self.pooling = pooling
        self.normalize = normalize
        self.max_length = max_length
        self.prompts = prompts
        self.default_prompt = default_prompt

    def call(self, inputs: Mapping[str, Any] | Any, training: bool = False):
        """Embeds token ids.

        Args:
            inputs: Integers `[batch, length]`; or a mapping of the model's arguments: `token_ids`, and
                if need be `attention_mask` `[batch, length]` and `token_type_ids`.
            training: Whether dropout is on.

        Returns:
            Float32 vectors `[batch, dim]`.
        """
        states = ops.cast(super().call(inputs, training=training), "float32")
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        mask = ops.ones_like(states[:, :, 0]) if mask is None else mask
        vectors = _pool(states, ops.not_equal(mask, 0), self.pooling)
        if self.normalize:
            vectors = vectors / ops.maximum(ops.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors

    def encode(
        self,
        texts: str | Sequence[str],
        prompt: str | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> np.ndarray:
        """Turns texts into vectors.

        Args:
            texts: A text or a list of texts. Texts of similar lengths are computed together, which
                changes nothing in the result.
            prompt: Name of one of the `prompts` to put before each text. None: the `default_prompt`.
            max_length: Tokens that a longer text is cut to. None: as the embedder says.
            batch_size: Most texts that are computed at once.

        Returns:
            Float32 `[texts, dim]`, or `[dim]` for a single text.

        Raises:
            TypeError: If the texts are no strings.
            ValueError: If there is no such prompt, a text is too long and must not be cut, or empty.
        """
        single = isinstance(texts, str)
        texts = [texts] if single else list_texts(texts)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"`texts` must be strings. Received: {texts[:3]!r}, …")
        name = self.default_prompt if prompt is None else prompt
        if name is not None:
            if name not in self.prompts:
                raise ValueError(f"`prompt` must be one of {sorted(self.prompts)}. Received: {name!r}")
            texts = [self.prompts[name] + text for text in texts]
        rows = self._encode(texts, self.max_length if max_length is None else max_length)
        vectors = np.zeros((len(rows), self.model.config.dim), "float32")
        key = ("vectors", self.pooling, self.normalize)
        if key not in self._functions:
            self._functions[key] = self._graph(self)
        for number, vector in self._run(self._functions[key], rows, batch_size):
            vectors[number] = vector
        return vectors[0] if single else vectors

    @staticmethod
    def similarity(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Cosines of the angles between vectors.

        Args:
            vectors: Floats `[n, dim]` or `[dim]`.
            others: Floats `[m, dim]` or `[dim]`.

        Returns:
            Float32 `[n, m]`, from -1 to 1.
        """
        unit, other_unit = (
            rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
            for rows in (np.atleast_2d(np.asarray(v, "float32")) for v in (vectors, others))
        )
        return unit @ other_unit.T

    def _export(self, path, batching=None, **limits):
        limits = Limits(**limits)
        more = {"pooling": self.pooling, "normalize": self.normalize, "max_length": self.max_length}
        prompts = {"prompts": dict(self.prompts), "default_prompt": self.default_prompt}
        return export_embedder(
            self.model,
            self.tokenizer,
            path,
            lambda text: self._embed_in_graph(text, limits),
            limits.within(self.model.config.context_length),
            {**more, **prompts},
            batching,
        )

    def _compute_on_device(self, arguments):
        return {"embedding": self(arguments)}

    def _device_settings(self):
        prompt = "" if self.default_prompt is None else self.prompts[self.default_prompt]
        return {**super()._device_settings(), "max_length": self.max_length, "prompt": prompt}

    def _embed_in_graph(self, text: tf.Tensor, limits: Limits) -> dict[str, tf.Tensor]:
        """What `encode` makes of texts `[batch]`, with the default prompt before them.

        Returns:
            `embedding`: float32 `[batch, dim]`; `normalized_embedding`: the same, scaled to length 1.
        """
        if self.default_prompt is not None:
            text = self.prompts[self.default_prompt] + text
        arguments = self._encode_in_graph(text, max_length=self.max_length, limits=limits)
        vectors = self(arguments)
        lengths = tf.maximum(tf.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return {"embedding": vectors, "normalized_embedding": vectors / lengths}

    # Files

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "pooling": self.pooling,
            "normalize": self.normalize,
            "max_length": self.max_length,
            "prompts": dict(self.prompts),
            "default_prompt": self.default_prompt,
        }

    def save_pretrained(self, folder: str | os.PathLike) -> pathlib.Path:
        """Writes a folder that sentence-transformers and, without the pooling, transformers load.

        Args:
            folder: Where to write config.json, the safetensors, the tokenizer and the files of
                sentence-transformers.

        Returns:
            The folder.
        """
        names = ["Transformer", "Pooling"] + ["Normalize"] * self.normalize
        modules = [
            {
                "idx": number,
                "name": str(number),
                "path": f"{number}_{name}" if number else "",
                "type": f"sentence_transformers.models.{name}",
            }
            for number, name in enumerate(names)
        ]
        # Both spellings: older releases of sentence-transformers read the second.
        pooling = {
            "pooling_mode": POOLINGS[self.pooling],
            "include_prompt": True,
            "word_embedding_dimension": self.model.config.dim,
            **{name: mode == self.pooling for mode, name in _OLDER_POOLINGS.items()},
        }
        more_files = {
            _MODULES: modules,
            _TRANSFORMER: {"max_seq_length": self.max_length, "do_lower_case": False},
            f"{_POOLING}/config.json": pooling,
            _SETTINGS: {"prompts": dict(self.prompts), "default_prompt_name": self.default_prompt},
        }
        return save_folder(folder, self.model, self.tokenizer, more_files=more_files)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, dtype: str | None = None, revision: str | None = None
    ) -> "TextEmbedder":
        """Loads a checkpoint; of sentence-transformers, with the pooling that its files say.

        Args:
            source: As in `Task.from_pretrained`. Where there is no modules.json, the pooling is the mean,
                not normalised, and nothing is cut.
            dtype: Keras dtype policy. None: Keras's default.
            revision: Branch, tag or commit of a hub id.

        Returns:
            The embedder.

        Raises:
            FileNotFoundError: If there is no such checkpoint.
            ValueError: If a file is damaged or asks for what is not done here.
        """
        path, settings = find_checkpoint(source, revision), {}
        if (path / _MODULES).is_file():
            path, settings = _read_modules(path)
        return cls._from_checkpoint(load_checkpoint(path, cls.head, dtype), **settings)

    @classmethod
    def _from_checkpoint(cls, checkpoint: Checkpoint, **settings) -> "TextEmbedder":
        if (length := settings.get("max_length")) is not None:
            settings["max_length"] = min(length, checkpoint.model.config.context_length)
        if checkpoint.pooling is not None:
            settings.setdefault("pooling", checkpoint.pooling)
        return cls(checkpoint.model, checkpoint.tokenizer, **settings)


def _pool(states, counts, pooling):
    """Pools `[batch, length, dim]` to `[batch, dim]` over the tokens that count."""
    if pooling in ("cls", "last"):
        places = ops.arange(ops.shape(states)[1], dtype="int32")
        if pooling == "cls":
            place = ops.min(ops.where(counts, places, ops.shape(states)[1] - 1), axis=1)
        else:
            place = ops.max(ops.where(counts, places, 0), axis=1)
        return ops.squeeze(ops.take_along_axis(states, place[:, None, None], axis=1), 1)
    counts = counts[:, :, None]
    if pooling == "max":
        return ops.max(ops.where(counts, states, float("-inf")), axis=1)
    total = ops.sum(ops.where(counts, states, 0.0), axis=1)
    return total / ops.maximum(ops.sum(ops.cast(counts, "float32"), axis=1), 1.0)


def _read_modules(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """Reads the files of sentence-transformers: where the transformer is, and the embedder's arguments."""
    try:
        modules = json.loads((folder / _MODULES).read_text(encoding="utf-8"))
        kinds = [module["type"].rpartition(".")[2] for module in modules]
        paths = [module["path"] for module in modules]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{_MODULES} must be a list of modules with `type` and `path`. Received: {folder / _MODULES}"
        ) from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(
            "A model of sentence-transformers must be a Transformer and a Pooling, and Normalize if need "
            f"be. Received: {folder / _MODULES}: {kinds}"
        )
    for path in paths:
        if not isinstance(path, str) or not re.fullmatch(r"([\w-][\w.-]*)?", path):
            raise ValueError(f"A module must be in a folder of its own or none. Received: path={path!r}")
    transformer = folder / paths[0]
    settings: dict[str, Any] = {
        "pooling": _read_pooling(folder / paths[1] / "config.json"),
        "normalize": "Normalize" in kinds,
    }
    # Older files are called by their model: sentence_roberta_config.json and the like; newer ones leave
    # the length to the tokenizer.
    places = [(path, "max_seq_length") for path in sorted(transformer.glob("sentence_*_config.json"))]
    for path, name in [(transformer / "tokenizer_config.json", "model_max_length"), *places]:
        if path.is_file() and (length := _read_max_length(path, name)) is not None:
            settings["max_length"] = length
    if (folder / _SETTINGS).is_file():
        values = read_json(folder / _SETTINGS)
        prompts, default = values.get("prompts") or {}, values.get("default_prompt_name")
        if not isinstance(prompts, dict):
            raise ValueError(
                f"`prompts` must map names to texts. Received: {folder / _SETTINGS}: {prompts!r}"
            )
        # Files list the prompts that a model does not have as null or empty.
        settings["prompts"] = {name: text for name, text in prompts.items() if text}
        settings["default_prompt"] = default if settings["prompts"].get(default) else None
    return transformer, settings


def _read_max_length(path: pathlib.Path, name: str) -> int | None:
    values = read_json(path)
    if name == "max_seq_length" and values.get("do_lower_case"):
        raise ValueError(
            "`do_lower_case` must be false, for a tokenizer has a normalizer of its own. "
            f"Received: do_lower_case={values['do_lower_case']!r} in {path}"
        )
    length = values.get(name)
    # A tokenizer without a limit has 1e30 there.
    if length is not None and (not isinstance(length, int | float) or length < 1):
        raise ValueError(f"`{name}` must be at least 1 or null. Received: {length!r} in {path}")
    return None if length is None or length > 1e9 else int(length)


def _read_pooling(path: pathlib.Path) -> str:
    values = read_json(path)
    if values.get("include_prompt") is False:
        raise ValueError(f"The pooling must include the prompt. Received: include_prompt=False in {path}")
    modes = values.get("pooling_mode")
    if modes is None:
        older = {theirs: POOLINGS[ours] for ours, theirs in _OLDER_POOLINGS.items()}
        chosen = [name for name, on in values.items() if name.startswith("pooling_mode_") and on]
        modes = [older.get(name, name) for name in chosen]
    modes = [modes] if isinstance(modes, str) else modes
    names = [ours for ours, theirs in POOLINGS.items() if [theirs] == modes]
    if not names:
        raise ValueError(
            f"The pooling must be one of {sorted(POOLINGS.values())}. Received: {modes!r} in {path}"
        )
    return names[0]
