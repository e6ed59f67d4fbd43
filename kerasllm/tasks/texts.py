"""What the tasks share that read whole texts at once: ids, padding, batches of similar lengths."""

import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kerasllm.export import export_litert_encoder
from kerasllm.generation import Limits
from kerasllm.generation.checks import after, check_batch, check_texts, rule
from kerasllm.models import LanguageModel
from kerasllm.tasks.base import Task, require_tensorflow
from kerasllm.tokenizers import Tokenizer

_TEXTS_RULE = "`texts` must be strings, or pairs of strings. Received: {}"

# A text, or two that the model reads as a pair.
Text = str | tuple[str, str]


class TextTask(Task):
    """A task whose model reads texts, or pairs of texts, as a whole; see `Task` for the arguments."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None = None, **kwargs):
        super().__init__(model, tokenizer, **kwargs)
        # Graphs are made when they are first needed.
        self._functions: dict = {}

    def call(self, inputs: Mapping[str, Any] | Any, training: bool = False):
        """Runs the model.

        Args:
            inputs: Integers `[batch, length]`; or a mapping of the model's arguments: `token_ids`, and
                if need be `attention_mask` and `token_type_ids`.
            training: Whether dropout is on.

        Returns:
            What the model returns.
        """
        return self.model(**self._arguments(inputs), training=training)

    # Export

    def export(self, path: str | os.PathLike, **kwargs) -> pathlib.Path:
        """Writes the model as a file that runs without kerasllm.

        Args:
            path: `….tflite` for LiteRT, which reads token ids; otherwise the folder of a SavedModel, which
                reads text, as in `Task.export`.
            **kwargs: Of a `.tflite`, `lengths`, `quantize`, `force` and `verbose` as in
                `kerasllm.export.export_litert_encoder`; otherwise as in `Task.export`.

        Returns:
            The path.

        Raises:
            FileExistsError: If `path` exists.
            ValueError: If the model has no tokenizer or an argument does not fit.
        """
        if pathlib.Path(path).suffix != ".tflite":
            return super().export(path, **kwargs)
        require_tensorflow("An export")
        settings = {"padding_id": self._padding_id, **self._device_settings()}
        tokenizer, types = self._require_tokenizer(), self._has_token_types
        return export_litert_encoder(
            self.model, tokenizer, path, self._compute_on_device, settings, types, **kwargs
        )

    def _compute_on_device(self, arguments: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """What a device computes, of the arguments of the model for one text."""
        raise NotImplementedError

    def _device_settings(self) -> dict[str, Any]:
        """What a device must know of the task besides: how texts are read, and the outputs."""
        return {"max_length": None, "parse_special": False}

    def _encode(
        self, texts: Sequence[Text], max_length: int | None = None, parse_special: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The ids and the type ids of each text, special tokens included."""
        context_length = self.model.config.context_length
        if max_length is not None and not 1 <= max_length <= context_length:
            raise ValueError(
                f"`max_length` must be from 1 to the context of the model, {context_length}. "
                f"Received: max_length={max_length}"
            )
        rows = encode_texts(self._require_tokenizer(), texts, max_length, parse_special)
        for number, (ids, _) in enumerate(rows):
            if len(ids) > context_length:
                raise ValueError(
                    f"A text must fit into the context of the model, {context_length} tokens, or be cut, "
                    f"which is for you to say. Received: text {number} of {len(ids)} tokens"
                )
            if not len(ids):
                raise ValueError(f"A text must have a token at least. Received: text {number}, empty")
        return rows

    def _pad(self, rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
        """Rows of ids and type ids as the arguments of the model, padded on the right."""
        shape = len(rows), max(len(ids) for ids, _ in rows)
        inputs = {
            "token_ids": np.full(shape, self._padding_id, "int32"),
            "attention_mask": np.zeros(shape, "int32"),
        }
        if self._has_token_types:
            inputs["token_type_ids"] = np.zeros(shape, "int32")
        for number, (ids, type_ids) in enumerate(rows):
            inputs["token_ids"][number, : len(ids)] = ids
            inputs["attention_mask"][number, : len(ids)] = 1
            if self._has_token_types:
                inputs["token_type_ids"][number, : len(ids)] = type_ids
        return inputs

    def _encode_in_graph(
        self,
        texts: tf.Tensor,
        second_texts: tf.Tensor | None = None,
        max_length: int | None = None,
        parse_special: bool = False,
        limits: Limits | None = None,
    ) -> dict[str, tf.Tensor]:
        """The arguments of the model for texts or pairs `[batch]`, as `_encode` and `_pad` make them.

        What does not fit is an INVALID_ARGUMENT when the graph runs; with a `max_length` texts are cut.
        """
        tokenizer, context = self._require_tokenizer(), self.model.config.context_length
        limits = (limits or Limits()).within(context)
        most = limits.max_prompt_tokens
        sizes = (len(tokenizer.token_bytes(number)) for number in range(tokenizer.vocabulary_size))
        longest = most * max(16, max(sizes))
        inputs = {"text": texts} | ({} if second_texts is None else {"second_text": second_texts})
        inputs = check_batch(inputs, limits.max_batch_size, {})
        # Of what is cut off, any length may be sent.
        longest = longest if max_length is None else 2**31 - 1
        parts = [
            tokenizer.tokenize(check_texts(name, text, longest), parse_special)
            for name, text in inputs.items()
        ]
        if max_length is not None:
            if len(parts) > 1:
                raise ValueError("Pairs of texts are not cut in a graph: leave `max_length` out.")
            room = max_length - _count_special(tokenizer, 1)
            if room < 1:
                raise ValueError(
                    "`max_length` must leave room for text beside the special tokens. "
                    f"Received: max_length={max_length}, {max_length - room} special tokens"
                )
            parts = [parts[0][:, :room]]
        ids, type_ids = tokenizer.with_special_tokens(*parts)
        lengths = tf.cast(ids.row_lengths(), tf.int32)
        rules = [
            rule(lengths > 0, "A text must have a token at least. Received: an empty text."),
            rule(
                lengths <= most,
                f"A text must be of at most {most} tokens. Received: {{}} tokens.",
                tf.reduce_max(lengths),
            ),
        ]
        ids, type_ids = after(rules, (ids, type_ids))
        inputs = {
            "token_ids": ids.to_tensor(self._padding_id),
            "attention_mask": tf.sequence_mask(lengths, dtype=tf.int32),
        }
        return inputs | ({"token_type_ids": type_ids.to_tensor(0)} if self._has_token_types else {})

    @property
    def _padding_id(self) -> int:
        """Any id would do, for the mask hides it, but RoBERTa counts positions over the others."""
        padding_id = getattr(self.model.config, "padding_id", None)
        if padding_id is None and self.tokenizer is not None:
            padding_id = self.tokenizer.pad_id
        return 0 if padding_id is None else padding_id

    @property
    def _has_token_types(self) -> bool:
        return getattr(self.model.config, "token_types", 0) > 1

    def _run(
        self,
        function: Callable[[dict[str, tf.Tensor]], tf.Tensor],
        rows: Sequence[tuple[np.ndarray, np.ndarray]],
        batch_size: int,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Applies a function to batches of rows of similar lengths.

        Args:
            function: From the arguments of the model to a tensor `[batch, ...]`.
            rows: Ids and type ids of each text.
            batch_size: Most rows of a batch.

        Yields:
            The number of a row and its part of the result, in no particular order.
        """
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}")
        order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            outputs = function(self._pad([rows[number] for number in numbers]))
            yield from zip(numbers, outputs.numpy(), strict=True)

    def _graph(self, function: Callable[[dict[str, tf.Tensor]], tf.Tensor]):
        """The function as one graph for batches of every shape."""
        require_tensorflow("Reading texts")
        names = ["token_ids", "attention_mask"] + ["token_type_ids"] * self._has_token_types
        signature = {name: tf.TensorSpec([None, None], tf.int32) for name in names}
        return tf.function(function, input_signature=[signature], autograph=False)


def holds_texts(x) -> bool:
    """Returns whether `x` is a list or a dataset of texts, rather than of batches."""
    if isinstance(x, tf.data.Dataset):
        return getattr(x.element_spec, "dtype", None) == tf.string
    return isinstance(x, list | tuple) and all(isinstance(text, str) for text in x)


def encode_texts(
    tokenizer: Tokenizer,
    texts: Sequence[Text],
    max_length: int | None = None,
    parse_special: bool = False,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Turns texts or pairs of texts into ids with the tokenizer's special tokens around them.

    Args:
        tokenizer: The tokenizer.
        texts: Texts, or pairs of texts.
        max_length: Most ids of a row. Ends of texts are cut off, of a pair those of the longer text
            first, as `tokenizers` does by "longest_first". None: nothing is cut.
        parse_special: Whether the spelling of a special token in a text becomes that token.

    Returns:
        For each text int32 ids `[length]`, and type ids `[length]`: which text of a pair an id is of.

    Raises:
        TypeError: If the texts are neither all strings nor all pairs of strings.
        ValueError: If `max_length` has no room for the special tokens.
    """
    texts = list_texts(texts)
    if not texts:
        return []
    are_pairs = not isinstance(texts[0], str)
    columns = tuple(zip(*texts, strict=True)) if are_pairs and _all_pairs(texts) else (texts,)
    if not all(isinstance(text, str) for column in columns for text in column):
        raise TypeError(_TEXTS_RULE.format(f"{texts[:3]!r}, …"))
    columns = [tf.constant([text.encode("utf-8") for text in column]) for column in columns]
    parts = [
        tokenizer.tokenize(column, parse_special).with_row_splits_dtype(tf.int64) for column in columns
    ]
    if max_length is not None:
        parts = _cut(parts, max_length - _count_special(tokenizer, len(columns)), max_length)
    ids, type_ids = tokenizer.with_special_tokens(*parts)
    splits = ids.row_splits.numpy()[1:-1]
    return list(
        zip(np.split(ids.values.numpy(), splits), np.split(type_ids.values.numpy(), splits), strict=True)
    )


def list_texts(texts: Iterable) -> list:
    """Several texts as a list; TypeError if there cannot be several in it."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(_TEXTS_RULE.format(repr(texts)))
    return list(texts)


def _all_pairs(texts: Sequence) -> bool:
    return all(isinstance(text, list | tuple) and len(text) == 2 for text in texts)


def _count_special(tokenizer: Tokenizer, parts: int) -> int:
    """How many special tokens stand around a text or a pair."""
    with tf.init_scope():  # known when a graph is made
        nothing = [tf.RaggedTensor.from_row_lengths(tf.zeros([0], tf.int32), [0])] * parts
        return tokenizer.with_special_tokens(*nothing)[0].values.shape[0]


def _cut(parts: list[tf.RaggedTensor], room: int, max_length: int) -> list[tf.RaggedTensor]:
    """Shortens the texts of each row until they have room together."""
    if room < 1:
        raise ValueError(
            "`max_length` must leave room for text beside the special tokens. "
            f"Received: max_length={max_length}, {max_length - room} special tokens"
        )
    lengths = [part.row_lengths().numpy() for part in parts]
    if len(parts) == 1:
        limits = [np.minimum(lengths[0], room)]
    else:
        shorter, longer = np.minimum(*lengths), np.maximum(*lengths)
        # The longer text gives way until both are equal; the odd token is then its own.
        shorter = np.minimum(shorter, room // 2)
        longer = np.minimum(longer, room - shorter)
        first_is_longer = lengths[0] > lengths[1]
        limits = [np.where(first_is_longer, longer, shorter), np.where(first_is_longer, shorter, longer)]
    return [
        tf.ragged.boolean_mask(part, tf.ragged.range(part.row_lengths()) < limit[:, None])
        for part, limit in zip(parts, limits, strict=True)
    ]
