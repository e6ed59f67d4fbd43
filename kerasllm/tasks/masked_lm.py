"""A model that says what stands at the masks of a text."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from kerasllm.data import masked_lm_dataset
from kerasllm.export import export_masked_lm
from kerasllm.generation import Limits
from kerasllm.generation.checks import after, check_batch, rule
from kerasllm.tasks.texts import TextTask, holds_texts
from kerasllm.training import TokenTraining


@keras.saving.register_keras_serializable(package="kerasllm")
class MaskedLM(TokenTraining, TextTask):
    """A masked language model with its tokenizer.

    Args:
        model: The network with the head `"masked_lm"`, such as `kerasllm.models.Bert`.
        tokenizer: The tokenizer; without one, only token ids go in and logits come out.

    Example:

    ```python
    model = kerasllm.MaskedLM.from_pretrained("google-bert/bert-base-uncased")
    model.fill_mask("Paris is the [MASK] of France.")[0][0]["token"]
    model.fit(["Paris is the capital of France.", "…"], epochs=3)
    ```
    """

    head = "masked_lm"

    # Training

    def _hidden(self, x, training):
        return self.model(**self._arguments(x), with_head=False, training=training)

    def fit(self, x=None, y=None, batch_size: int | None = None, **kwargs):
        """Trains on texts or on prepared batches; otherwise `keras.Model.fit`.

        Args:
            x: A list of texts (documents), a `tf.data.Dataset` of strings, or a `tf.data.Dataset` of
                `(inputs, labels, weights)` batches as `kerasllm.data.masked_lm_dataset` makes them.
            y: Must be None: the labels are what stood at the masks.
            batch_size: Rows per step, for texts (default 32).
            **kwargs: For texts, `sequence_length` (default: the model's context), `shuffle` (default: True)
                and, of `masked_lm_dataset`, `mask_rate` and `whole_words`; `validation_data` takes the
                same as `x`, with masks that stay the same; the rest as in Keras.

        Returns:
            Keras's `History`.
        """
        options = _pop_options(kwargs, batch_size)
        if not self.compiled:
            self.compile()
        if (validation := kwargs.get("validation_data")) is not None:
            given = options if holds_texts(validation) else {}
            kwargs["validation_data"] = self._batches(validation, None, {**given, "shuffle": False})

        def make_batches(**order):
            return self._batches(x, y, {**options, **order}, in_training=True)

        if holds_texts(x):
            return self._fit_texts(make_batches, **kwargs)
        return super().fit(make_batches(), shuffle=False, **kwargs)

    def evaluate(self, x=None, y=None, batch_size: int | None = None, **kwargs):
        """Measures the loss per masked token, the perplexity and the accuracy.

        Args:
            x: As in `fit`; texts are masked in the same way each time.
            y: Must be None.
            batch_size: As in `fit`.
            **kwargs: As in `fit` and in Keras.

        Returns:
            `loss` in nats, `perplexity` and `token_accuracy` by name; with `return_dict=False` a list.
        """
        options = _pop_options(kwargs, batch_size)
        if not self.compiled:
            self.compile()
        kwargs.setdefault("return_dict", True)
        return super().evaluate(self._batches(x, y, options), **kwargs)

    def _batches(self, x, y, options: dict[str, Any], in_training: bool = False) -> tf.data.Dataset:
        """Turns texts into batches; leaves batches as they are."""
        if y is not None:
            raise ValueError("The labels are what stood at the masks; leave `y` out.")
        if holds_texts(x):
            return masked_lm_dataset(
                x,
                self._require_tokenizer(),
                **{
                    "sequence_length": self.model.config.context_length,
                    "batch_size": 32,
                    "shuffle": in_training,
                    "new_masks": in_training,
                    **options,
                },
            )
        if not isinstance(x, tf.data.Dataset):
            raise TypeError(
                "`x` must be a list of texts, a tf.data.Dataset of texts, or one of (inputs, labels, "
                f"weights) batches. Received: {type(x).__name__}"
            )
        if given := sorted(name for name in options if name != "shuffle"):
            raise ValueError(f"These are for texts; a dataset of batches has its own. Received: {given}")
        return x

    # Prediction

    def fill_mask(
        self,
        texts: str | Sequence[str],
        top_k: int = 5,
        targets: Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> list[list[dict[str, Any]]] | list[list[list[dict[str, Any]]]]:
        """Finds the likeliest tokens for each mask of a text or of several.

        The spelling of any special token in a text becomes that token, not that of the mask only.

        Args:
            texts: A text with the tokenizer's mask token in one place or several, or a list of such.
            top_k: Number of candidates for each mask.
            targets: Tokens, as tokenizer.json spells them, that the candidates are chosen from. Their
                scores stay those among all tokens. None: all tokens.
            batch_size: Most texts that are computed at once.

        Returns:
            For each mask, in the order of the text, its candidates, the likeliest first: dictionaries of
            `token` (text), `token_id`, `score` (probability) and `sequence` (the text with this token;
            other masks stay). For a list of texts, a list of that.

        Raises:
            ValueError: If a text has no mask, is too long, or the tokenizer has no mask token.
        """
        tokenizer = self._require_tokenizer()
        if tokenizer.mask_id is None:
            raise ValueError("Filling masks needs a tokenizer with a mask token, and this one has none.")
        if top_k < 1:
            raise ValueError(f"`top_k` must be at least 1. Received: top_k={top_k}")
        target_ids = None
        if targets is not None:
            target_ids = np.array([tokenizer.token_to_id(target) for target in targets], "int32")
        single = isinstance(texts, str)
        rows = self._encode([texts] if single else texts, parse_special=True)
        places = [np.flatnonzero(ids == tokenizer.mask_id) for ids, _ in rows]
        for number, found in enumerate(places):
            if not len(found):
                raise ValueError(
                    f"A text must have the mask token {tokenizer.mask_token!r}. "
                    f"Received: {(texts if single else texts[number])!r}"
                )

        results: list = [None] * len(rows)
        for number, probabilities in self._run(self._probabilities, rows, batch_size):
            results[number] = [
                self._candidates(rows[number][0], place, probabilities[place], top_k, target_ids)
                for place in places[number]
            ]
        return results[0] if single else results

    def _export(self, path, batching=None, **limits):
        limits = Limits(**limits)
        tokenizer = self.tokenizer
        if tokenizer.mask_id is None:
            raise ValueError("Filling masks needs a tokenizer with a mask token, and this one has none.")
        return export_masked_lm(
            self.model,
            tokenizer,
            path,
            lambda text, top_k: self._fill_in_graph(text, top_k, limits),
            limits.within(self.model.config.context_length),
            batching,
        )

    def _compute_on_device(self, arguments):
        return {"logits": self.model(**arguments)}

    def _device_settings(self):
        return {**super()._device_settings(), "parse_special": True}

    def _fill_in_graph(self, text: tf.Tensor, top_k: tf.Tensor, limits: Limits) -> dict[str, tf.Tensor]:
        """What `fill_mask` finds, of texts and numbers `[batch]`.

        Returns:
            `num_masks`: int32 `[batch]`; `token_ids`: int32 `[batch, most masks, most candidates]`, the
            likeliest first, filled up with -1; `tokens`: strings, their texts; `probabilities`: float32.
        """
        tokenizer, size = self.tokenizer, self.tokenizer.vocabulary_size
        inputs = check_batch({"text": text, "top_k": top_k}, limits.max_batch_size, {})
        text, top_k = inputs.values()
        message = f"`top_k` must be from 1 to {size}. Received: {{}}."
        top_k = after([rule((top_k >= 1) & (top_k <= size), message, top_k)], top_k)
        arguments = self._encode_in_graph(text, parse_special=True, limits=limits)
        is_mask = (arguments["token_ids"] == tokenizer.mask_id) & (arguments["attention_mask"] == 1)
        counts = tf.reduce_sum(tf.cast(is_mask, tf.int32), axis=1)
        message = f"A text must have the mask token {tokenizer.mask_token}. Received: one without."
        counts = after([rule(counts > 0, message)], counts)
        hidden = tf.boolean_mask(self.model(**arguments, with_head=False), is_mask)
        scores = tf.nn.softmax(tf.cast(self.model.score_tokens(hidden), tf.float32))
        # A model may have more rows than the tokenizer has tokens; those mean nothing.
        best, ids = tf.math.top_k(scores[:, :size], tf.reduce_max(top_k))
        wanted = tf.sequence_mask(tf.repeat(top_k, counts), tf.shape(ids)[1])
        ids, best = tf.where(wanted, ids, -1), tf.where(wanted, best, 0.0)
        texts = tokenizer.detokenize(tf.reshape(ids, [-1, 1]), skip_special_tokens=False)

        def in_rows(values, default):
            return tf.RaggedTensor.from_row_lengths(values, counts).to_tensor(default)

        return {
            "tokens": in_rows(tf.reshape(texts, tf.shape(ids)), ""),
            "token_ids": in_rows(ids, -1),
            "probabilities": in_rows(best, 0.0),
            "num_masks": counts,
        }

    def _probabilities(self, inputs: dict[str, np.ndarray]) -> tf.Tensor:
        if "probabilities" not in self._functions:
            self._functions["probabilities"] = self._graph(
                lambda tensors: ops.softmax(ops.cast(self(tensors), "float32"))
            )
        return self._functions["probabilities"](inputs)

    def _candidates(self, ids, place, probabilities, top_k, target_ids) -> list[dict[str, Any]]:
        tokenizer = self.tokenizer
        choice = np.arange(len(probabilities)) if target_ids is None else target_ids
        # A model may have more rows than the tokenizer has tokens; those mean nothing.
        choice = choice[choice < tokenizer.vocabulary_size]
        best = choice[np.argsort(-probabilities[choice], kind="stable")[:top_k]]
        is_only_mask = np.count_nonzero(ids == tokenizer.mask_id) == 1
        filled = np.repeat(ids[None], len(best), axis=0)
        filled[:, place] = best
        # Other masks are special tokens too, and a text without them would look odd.
        sequences = tokenizer.decode(filled, skip_special_tokens=is_only_mask)
        tokens = tokenizer.decode(best[:, None], skip_special_tokens=False)
        return [
            {
                "token": token,
                "token_id": int(token_id),
                "score": float(probabilities[token_id]),
                "sequence": sequence,
            }
            for token, token_id, sequence in zip(tokens, best, sequences, strict=True)
        ]


def _pop_options(kwargs: dict[str, Any], batch_size: int | None) -> dict[str, Any]:
    """Takes out what says how texts become batches."""
    names = ("sequence_length", "shuffle", "mask_rate", "whole_words")
    options = {name: kwargs.pop(name, None) for name in names} | {"batch_size": batch_size}
    return {name: value for name, value in options.items() if value is not None}
