"""A model that continues text: fit, evaluate, generate, save, export."""

import importlib.util
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from kerasllm.data import generate_stories, language_model_dataset
from kerasllm.export import export_litert, export_litertlm, export_saved_model
from kerasllm.tasks.base import Task
from kerasllm.tasks.generation import GeneratingTask
from kerasllm.tasks.texts import holds_texts
from kerasllm.training import TokenTraining
from kerasllm.training.quantization import round_weights, rounded_weights

# The stories on which an export is compared with its model: of a seed that no training has by default.
_HELD_OUT_STORIES, _HELD_OUT_SEED = 16, 987_654_321


@keras.saving.register_keras_serializable(package="kerasllm")
class CausalLM(TokenTraining, GeneratingTask):
    """A language model with its tokenizer.

    Args:
        model: The network, such as `kerasllm.models.GPT2`.
        tokenizer: The tokenizer; without one, only token ids go in and logits come out.
        generation_config: How to continue a prompt when the caller does not say.

    Example:

    ```python
    model = kerasllm.CausalLM(GPT2(GPT2Config(vocabulary_size=2048, num_layers=4)), tokenizer)
    model.compile()
    model.fit(["Once upon a time …", "The whale …"], epochs=3)
    model.generate("Once", max_new_tokens=20)
    model.export("served/my_model/1")
    ```
    """

    head = "causal_lm"

    def call(self, inputs: Mapping[str, Any] | Any, training: bool = False):
        """Predicts the token after each token.

        Args:
            inputs: Integers `[batch, length]`, the token ids; or a mapping of `token_ids` and, each of that
                shape, `positions`, the place of each token in its text, and `segment_ids`, the number of
                its text, where a row holds several: no token sees one of another text. Also
                `attention_mask` as in `DecoderModel.call`.
            training: Whether dropout is on.

        Returns:
            Float logits `[batch, length, vocabulary_size]`.
        """
        return self.model(**self._arguments(inputs), training=training)

    @staticmethod
    def _arguments(inputs) -> dict[str, Any]:
        inputs = dict(Task._arguments(inputs))
        segments = inputs.pop("segment_ids", None)
        if segments is not None:
            if "attention_mask" in inputs:
                raise ValueError("`segment_ids` and `attention_mask` exclude each other. Received both")
            inputs["attention_mask"] = ops.cast(segments[:, :, None] == segments[:, None, :], "int32")
        return inputs

    # Training

    def _hidden(self, x, training):
        return self.model(**self._arguments(x), with_head=False, training=training)

    def fit(self, x=None, y=None, batch_size: int | None = None, **kwargs):
        """Trains on texts or on prepared batches; otherwise `keras.Model.fit`.

        Args:
            x: A list of texts (documents), a `tf.data.Dataset` of strings, or a `tf.data.Dataset` of
                `(inputs, labels, weights)` batches as `kerasllm.data` makes them, with inputs as in
                `call`. Texts are packed end to end and shuffled.
            y: Must be None: the labels are the tokens that follow.
            batch_size: Sequences per step, for texts (default 32).
            **kwargs: For texts, `sequence_length` (default: the model's context) and `shuffle` (default:
                True); `validation_data` takes the same as `x`; the rest as in Keras.

        Returns:
            Keras's `History`.
        """
        sequence_length = kwargs.pop("sequence_length", None)
        if not self.compiled:
            self.compile()
        validation = kwargs.pop("validation_data", None)
        if validation is not None:
            sizes = (batch_size, sequence_length) if holds_texts(validation) else (None, None)
            kwargs["validation_data"] = self._batches(validation, None, *sizes)
        shuffle = kwargs.pop("shuffle", None)

        def make_batches(**order):
            return self._batches(x, y, batch_size, sequence_length, shuffle, in_training=True, **order)

        if holds_texts(x):
            return self._fit_texts(make_batches, **kwargs)
        return super().fit(make_batches(), shuffle=False, **kwargs)

    def evaluate(self, x=None, y=None, batch_size: int | None = None, **kwargs):
        """Measures the loss per token and the perplexity; otherwise `keras.Model.evaluate`.

        Args:
            x: As in `fit`.
            y: Must be None.
            batch_size: Sequences per step, for texts (default 32).
            **kwargs: `sequence_length` for texts; the rest as in Keras.

        Returns:
            `{"loss": nats per token, "perplexity": its exponential}`, with `return_dict=False` a list.
        """
        sequence_length = kwargs.pop("sequence_length", None)
        if not self.compiled:
            self.compile()
        kwargs.setdefault("return_dict", True)
        # Keras calls this from fit with batches and asks for what fit needs.
        return super().evaluate(self._batches(x, y, batch_size, sequence_length), **kwargs)

    def _batches(self, x, y, batch_size, sequence_length, shuffle=None, in_training=False, **order):
        """Turns texts into batches; leaves batches as they are."""
        if y is not None:
            raise ValueError("The labels are the tokens that follow; leave `y` out.")
        if holds_texts(x):
            return language_model_dataset(
                x,
                self._require_tokenizer(),
                sequence_length or self.model.config.context_length,
                batch_size or 32,
                shuffle=in_training if shuffle is None else shuffle,
                **order,
            )
        if not isinstance(x, tf.data.Dataset):
            raise TypeError(
                "`x` must be a list of texts, a tf.data.Dataset of texts, or one of (token_ids, labels, "
                f"weights) batches. Received: {type(x).__name__}"
            )
        if (batch_size, sequence_length, shuffle) != (None, None, None):
            raise ValueError(
                "`batch_size`, `sequence_length` and `shuffle` are for texts; a dataset of batches has "
                f"its own. Received: batch_size={batch_size}, sequence_length={sequence_length}, "
                f"shuffle={shuffle}"
            )
        return x.map(self._check_batch, num_parallel_calls=tf.data.AUTOTUNE)

    @tf.autograph.experimental.do_not_convert
    def _check_batch(self, *batch):
        """Checks a batch in the input pipeline, for XLA reads past the end of a table in silence."""
        if len(batch) != 3:
            raise ValueError(
                f"A batch must be (token_ids, labels, weights). Received: {len(batch)} elements"
            )
        config = self.model.config
        token_ids = self._arguments(batch[0])["token_ids"]
        rules = [
            (tf.shape(token_ids)[-1] <= config.context_length, ["A sequence must fit into the context"]),
            (tf.reduce_max(token_ids) < config.vocabulary_size, ["An id must be in the vocabulary"]),
            (tf.reduce_min(token_ids) >= 0, ["An id must be in the vocabulary"]),
            (tf.reduce_max(batch[1]) < config.vocabulary_size, ["A label must be in the vocabulary"]),
            (tf.reduce_min(batch[1]) >= 0, ["A label must be in the vocabulary"]),
        ]
        with tf.control_dependencies([tf.debugging.Assert(*rule) for rule in rules]):
            return tf.nest.map_structure(tf.identity, batch)

    def round_weights(self) -> None:
        """Replaces the weights by the rounded ones that a training with `quantization_aware` computed with.

        So `generate`, `save_pretrained` and a SavedModel have them too. A LiteRT export with the same
        `quantize` needs no call: it rounds them by itself. To train on, keep the exact ones, with `save`.

        Raises:
            ValueError: If the model is not compiled with `quantization_aware`.
        """
        if getattr(self, "_rounding", None) is None:
            raise ValueError(
                "`round_weights` needs a model that is compiled with `quantization_aware`. Received: none"
            )
        round_weights(self.model, self._rounding)

    # Generation

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int | None = None,
        *,
        stream: bool = False,
        template_options: Mapping[str, Any] | None = None,
        **settings,
    ) -> str | Iterator[str]:
        """Answers in a conversation.

        Args:
            messages: The messages so far, such as `{"role": "user", "content": "Hello"}`. What they say
                is never taken for a special token.
            max_new_tokens: As in `generate`.
            stream: Whether to return the answer in pieces as it comes.
            template_options: Further arguments of `Tokenizer.encode_chat`, such as `tools`.
            **settings: As in `generate`.

        Returns:
            The answer, or with `stream` an iterator of its pieces.

        Raises:
            ValueError: As in `generate`, or if the tokenizer has no chat template.
        """
        options = {"add_generation_prompt": True, **(template_options or {})}
        prompt = self._require_tokenizer().encode_chat(messages, **options)
        return self.generate(prompt, max_new_tokens, stream=stream, **settings)

    # Export

    def export(self, path: str | os.PathLike, **kwargs) -> pathlib.Path:
        """Writes the model as a file that runs without kerasllm.

        Args:
            path: `….tflite` for LiteRT, `….litertlm` for LiteRT-LM, otherwise the folder of a SavedModel;
                for TensorFlow Serving a version number below the model's folder, such as
                `served/my_model/1`.
            **kwargs: As in `kerasllm.export.export_saved_model`, such as the limits of a request, or in
                `kerasllm.export.export_litert` and `export_litertlm`, such as `quantize`; and `dtype`, the
                precision of the weights, as in `with_dtype`. Where `texts` is left out and the runtime is
                installed, an export for devices is compared with the model on stories made by the library.
                With `quantize="int4"` and `compile(quantization_aware="int4")`, an export for devices
                stores, and is compared with, the rounded weights that were trained.

        Returns:
            The path.

        Raises:
            FileExistsError: If `path` exists.
            ValueError: If the model has no tokenizer or an argument does not fit.
        """
        # What a training rounded to 4 bits is stored as that; weights of 8 bits are rounded once, after the
        # smoothing. Here, for a copy in another precision is not compiled and knows of no training.
        trained_for = self._compile_options["quantization_aware"] if self.compiled else None
        is_stored = trained_for == "int4" == kwargs.get("quantize")
        with rounded_weights(self.model, self._rounding if is_stored else None):
            return super().export(path, **kwargs)

    def _export(self, path, **kwargs):
        writers = {".tflite": export_litert, ".litertlm": export_litertlm}
        write = writers.get(pathlib.Path(path).suffix, export_saved_model)
        if write is not export_saved_model and importlib.util.find_spec("ai_edge_litert") is not None:
            kwargs.setdefault("texts", generate_stories(_HELD_OUT_STORIES, seed=_HELD_OUT_SEED))
        return write(self.model, self.tokenizer, path, self.generation_config, **kwargs)
