"""A model that reads one text and writes another: translation, summaries, answers."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from kerasllm.checkpoints import Checkpoint
from kerasllm.data.batching import finish_dataset, for_each_pass, pass_seeds, shuffle_values
from kerasllm.export import export_litert_seq2seq, export_saved_model
from kerasllm.generation import GenerationConfig
from kerasllm.models import LanguageModel
from kerasllm.tasks.base import Task
from kerasllm.tasks.generation import GeneratingTask
from kerasllm.training import TokenTraining

# Sources are padded to a multiple of this, so that few lengths have to be compiled for.
_SOURCE_BUCKET = 32


@keras.saving.register_keras_serializable(package="kerasllm")
class Seq2SeqLM(TokenTraining, GeneratingTask):
    """An encoder-decoder with its tokenizer.

    Args:
        model: The network, such as `kerasllm.models.T5`.
        tokenizer: The tokenizer; without one, only token ids go in and out.
        generation_config: How to generate when the caller does not say.

    Example:

    ```python
    model = kerasllm.Seq2SeqLM.from_pretrained("google/flan-t5-small")
    model.generate("translate English to German: How old are you?")
    model.fit([("summarize: …", "…"), ("summarize: …", "…")], epochs=3)
    ```
    """

    head = "seq2seq"
    continues_prompts = False

    def call(self, inputs: Mapping[str, Any], training: bool = False):
        """Predicts the token after each token of the target.

        Args:
            inputs: `source_ids`, `memory_mask` and `token_ids`, as in `T5.call`.
            training: Whether dropout is on.

        Returns:
            Float logits `[batch, length, vocabulary_size]`.
        """
        return self.model(**inputs, training=training)

    # Training

    def _hidden(self, x, training):
        return self.model(**x, with_head=False, training=training)

    def fit(self, x=None, y=None, batch_size: int | None = None, **kwargs):
        """Trains on pairs of texts or on prepared batches; otherwise `keras.Model.fit`.

        Args:
            x: A list of (source, target) texts, or a `tf.data.Dataset` of `(inputs, labels, weights)`
                batches, where `inputs` is what `call` takes.
            y: Must be None: the targets are in the pairs.
            batch_size: Pairs per step (default 32).
            **kwargs: As in Keras; `validation_data` takes the same as `x`.

        Returns:
            Keras's `History`.
        """
        if not self.compiled:
            self.compile()
        if (validation := kwargs.get("validation_data")) is not None:
            kwargs["validation_data"] = self._batches(validation, None, batch_size, shuffle=False)
        shuffle = kwargs.pop("shuffle", True)

        def make_batches(**order):
            return self._batches(x, y, batch_size, shuffle, **order)

        if isinstance(x, tf.data.Dataset):
            return super().fit(make_batches(), shuffle=False, **kwargs)
        return self._fit_texts(make_batches, **kwargs)

    def evaluate(self, x=None, y=None, batch_size: int | None = None, **kwargs):
        """Measures the loss per token of the targets and the perplexity.

        Args:
            x: As in `fit`.
            y: Must be None.
            batch_size: Pairs per step (default 32).
            **kwargs: As in Keras.

        Returns:
            `{"loss": nats per token, "perplexity": its exponential}`, with `return_dict=False` a list.
        """
        if not self.compiled:
            self.compile()
        kwargs.setdefault("return_dict", True)
        return super().evaluate(self._batches(x, y, batch_size, shuffle=False), **kwargs)

    def _batches(self, x, y, batch_size, shuffle, seed=0, passes=None, repeat=False) -> tf.data.Dataset:
        """Turns pairs of texts into batches; leaves batches as they are."""
        if y is not None:
            raise ValueError("The targets are the second texts of the pairs; leave `y` out.")
        if isinstance(x, tf.data.Dataset):
            return x
        pairs = list(x or ())
        is_pair = [
            isinstance(pair, (list, tuple)) and [type(text) for text in pair] == [str, str]
            for pair in pairs
        ]
        if not pairs or not all(is_pair):
            raise TypeError(
                "`x` must be a list of (source, target) texts, or a tf.data.Dataset of (inputs, labels, "
                f"weights) batches. Received: {type(x).__name__}"
            )
        encoded = self._encode_texts([text for pair in pairs for text in pair])
        self._check_lengths(encoded)
        sources, targets = (
            tf.RaggedTensor.from_row_lengths(
                tf.concat([tf.constant(row, tf.int32) for row in rows], axis=0), [len(row) for row in rows]
            )
            for rows in (encoded[::2], encoded[1::2])
        )
        size = batch_size or 32

        @tf.autograph.experimental.do_not_convert
        def batches_of_pass(number: tf.Tensor) -> tf.data.Dataset:
            order = tf.range(len(pairs), dtype=tf.int64)
            if shuffle:
                order = shuffle_values(order, pass_seeds(seed, number)[0])
            rows = tf.data.Dataset.from_tensor_slices(order).batch(size)
            return rows.map(make_batch, num_parallel_calls=tf.data.AUTOTUNE)

        @tf.autograph.experimental.do_not_convert
        def make_batch(rows: tf.Tensor):
            return self._make_batch(tf.gather(sources, rows), tf.gather(targets, rows))

        dataset = for_each_pass(batches_of_pass, seed, repeat, passes)
        return finish_dataset(dataset, -(-len(pairs) // size), (0, 1), repeat, passes)

    def _make_batch(self, sources: tf.RaggedTensor, targets: tf.RaggedTensor):
        labels = targets.to_tensor()
        # As `T5.shift_right`, which on the JAX backend takes no tensors of TensorFlow.
        start = tf.fill([tf.shape(labels)[0], 1], tf.cast(self.model.config.decoder_start_id, labels.dtype))
        inputs = {
            "source_ids": sources.to_tensor(),
            "memory_mask": tf.ones_like(sources).to_tensor(),
            "token_ids": tf.concat([start, labels[:, :-1]], axis=1),
        }
        return inputs, labels, tf.cast(tf.ones_like(targets).to_tensor(), tf.float32)

    def _check_lengths(self, rows: Sequence[Sequence[int]]) -> None:
        context = self.model.config.context_length
        longest = max(map(len, rows))
        if longest > context or not all(map(len, rows)):
            raise ValueError(
                f"A text must have from 1 to {context} tokens, the context of the model. "
                f"Received: {longest if longest > context else 0} tokens"
            )

    # Generation

    @classmethod
    def _from_checkpoint(cls, checkpoint: Checkpoint) -> "Seq2SeqLM":
        settings = dict(checkpoint.generation)
        if length := settings.pop("min_length", None):  # it counts the token that starts the target
            settings.setdefault("min_new_tokens", max(length - 1, 0))
        return super()._from_checkpoint(checkpoint._replace(generation=settings))

    def _configs(self, count: int, max_new_tokens, settings) -> list[GenerationConfig]:
        configs = super()._configs(count, max_new_tokens, settings)
        if any(config.penalty_alpha > 0 for config in configs):
            raise ValueError(
                "Contrastive search is for models that continue a text. Received: penalty_alpha="
                f"{configs[0].penalty_alpha} for a {type(self).__name__}"
            )
        return configs

    def _draft(self, assistant_model: Task | None) -> LanguageModel | None:
        if assistant_model is not None:
            raise ValueError(
                "`assistant_model` is for models that continue a text; an encoder-decoder can look guesses "
                "up with `prompt_lookup_num_tokens`. Received both a draft and a source."
            )
        return None

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        # With the end token that the encoder is used to.
        return self._require_tokenizer().encode(texts, add_special_tokens=True)

    def _starts(self, prompts: list[list[int]]) -> list[list[int]]:
        self._check_lengths(prompts)
        return [[self.model.config.decoder_start_id]] * len(prompts)

    def _extra(self, prompts: list[list[int]]) -> dict[str, Any]:
        longest = max(map(len, prompts))
        width = min(-(-longest // _SOURCE_BUCKET) * _SOURCE_BUCKET, self.model.config.context_length)
        sources = tf.ragged.constant(prompts, tf.int32)
        mask = tf.ones_like(sources).to_tensor(shape=[None, width])
        memory_cache = self._encode(sources.to_tensor(shape=[None, width]), mask)
        return {"memory_cache": memory_cache, "memory_mask": mask}

    @tf.function(reduce_retracing=True, autograph=False)
    def _encode(self, source_ids: tf.Tensor, mask: tf.Tensor):
        return self.model.make_memory_cache(self.model.encode(source_ids, mask))

    # Export

    def _export(self, path, **kwargs):
        is_litert = pathlib.Path(path).suffix == ".tflite"
        write = export_litert_seq2seq if is_litert else export_saved_model
        return write(self.model, self.tokenizer, path, self.generation_config, **kwargs)
