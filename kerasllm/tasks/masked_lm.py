"""A model that says what stands at the masks of a text."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from kerasllm.tasks.texts import TextTask


@keras.saving.register_keras_serializable(package="kerasllm")
class MaskedLM(TextTask):
    """A masked language model with its tokenizer.

    Args:
        model: The network with the head `"masked_lm"`, such as `kerasllm.models.Bert`.
        tokenizer: The tokenizer; without one, only token ids go in and logits come out.

    Example:

    ```python
    model = kerasllm.MaskedLM.from_pretrained("google-bert/bert-base-uncased")
    model.fill_mask("Paris is the [MASK] of France.")[0][0]["token"]
    ```
    """

    head = "masked_lm"

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
