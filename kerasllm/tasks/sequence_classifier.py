"""A model that classifies texts: labels, several labels at once, or numbers."""

import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from kerasllm.checkpoints import load_checkpoint
from kerasllm.data import padded_batches
from kerasllm.export import export_classifier
from kerasllm.generation import Limits
from kerasllm.models import LanguageModel
from kerasllm.tasks.texts import Text, TextTask
from kerasllm.tokenizers import Tokenizer
from kerasllm.training import AdamW, Training
from kerasllm.training.step import BatchPart, dense

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@keras.saving.register_keras_serializable(package="kerasllm")
class SequenceClassifier(Training, TextTask):
    """A classifier of texts or pairs of texts with its tokenizer.

    The model's `config.labels` are the names of the classes and its `config.problem_type` says what the
    scores are.

    Args:
        model: The network with the head `"classifier"`: an encoder such as `kerasllm.models.Bert` or a
            decoder such as `kerasllm.models.GPT2`.
        tokenizer: The tokenizer; without one, only token ids go in and scores come out.

    Example:

    ```python
    model = kerasllm.SequenceClassifier.from_pretrained(
        "distilbert/distilbert-base-uncased", labels=["bad", "good"]
    )
    model.compile()
    model.fit(["What a film!", "I left early."], [1, 0], epochs=3)
    model.classify("Best of the year.")
    ```
    """

    head = "classifier"

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None = None, **kwargs):
        super().__init__(model, tokenizer, **kwargs)
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(
                f"`problem_type` must be None or one of {PROBLEM_TYPES}. Received: {self.problem_type!r}"
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        dtype: str | None = None,
        revision: str | None = None,
        labels: int | Sequence[str] | None = None,
    ) -> "SequenceClassifier":
        """Loads a checkpoint.

        Args:
            source, dtype, revision: As in `Task.from_pretrained`.
            labels: The names of the classes, or how many there are. None: those that the checkpoint names,
                or two. A head that the checkpoint has must have as many.

        Returns:
            The classifier. Where the checkpoint has another head, that of the task is new and untrained,
            and a warning says so.

        Raises:
            FileNotFoundError, ValueError: As `kerasllm.checkpoints.load_checkpoint`.
        """
        if isinstance(labels, int):
            labels = [f"LABEL_{number}" for number in range(labels)]
        if labels is not None and (isinstance(labels, str) or not labels or len(set(labels)) < len(labels)):
            raise ValueError(
                f"`labels` must be a positive number or a list of different names. Received: {labels!r}"
            )
        return cls._from_checkpoint(load_checkpoint(source, cls.head, dtype, revision, labels))

    @property
    def problem_type(self) -> str:
        """What the scores are; where the config says nothing, one label means a regression."""
        config = self.model.config
        default = "regression" if len(config.labels) == 1 else "single_label_classification"
        return config.problem_type or default

    # Prediction

    def classify(
        self,
        texts: Text | Sequence[Text],
        top_k: int | None = None,
        max_length: int | None = None,
        batch_size: int = 32,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Classifies texts or pairs of texts.

        Args:
            texts: A text or a pair `(text, text)` as a tuple, or a list of such.
            top_k: Number of labels to return for each; None: all.
            max_length: Tokens that a longer text is cut to, special tokens included. None: nothing is
                cut, and a text that does not fit into the context is an error.
            batch_size: Most texts that are computed at once.

        Returns:
            Dictionaries of `label` and `score`, the best first; for a list of texts, a list of that. The
            score is the label's probability, in a regression the number itself. With several labels at
            once each has a probability of its own.

        Raises:
            TypeError: If the texts are neither strings nor pairs of strings.
            ValueError: If a text is empty or too long.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be None or at least 1. Received: top_k={top_k}")
        single = isinstance(texts, str | tuple)
        scores = self._scores([texts] if single else texts, max_length, batch_size)
        squash = {
            "single_label_classification": lambda x: np.exp(x - _log_sum_exp(x)),
            "multi_label_classification": lambda x: np.exp(-np.logaddexp(0.0, -x)),
            "regression": lambda x: x,
        }[self.problem_type]
        labels = self.model.config.labels
        results = []
        for row in squash(scores.astype("float64")):
            best = np.argsort(-row, kind="stable")[:top_k]
            results.append([{"label": labels[number], "score": float(row[number])} for number in best])
        return results[0] if single else results

    def predict(self, x, batch_size: int = 32, max_length: int | None = None, **kwargs):
        """Scores texts; otherwise `keras.Model.predict`.

        Args:
            x: A list of texts or of pairs of texts, or what `keras.Model.predict` takes.
            batch_size: Most texts that are computed at once.
            max_length: As in `classify`.
            **kwargs: As in Keras, where `x` are no texts.

        Returns:
            Float32 `[texts, labels]`: the scores before any softmax or sigmoid.
        """
        if _holds_texts(x):
            return self._scores(x, max_length, batch_size)
        return super().predict(x, batch_size=batch_size, **kwargs)

    def _scores(self, texts: Sequence[Text], max_length: int | None, batch_size: int) -> np.ndarray:
        rows = self._encode(texts, max_length)
        scores = np.zeros((len(rows), len(self.model.config.labels)), "float32")
        if "scores" not in self._functions:
            self._functions["scores"] = self._graph(lambda tensors: ops.cast(self(tensors), "float32"))
        for number, row in self._run(self._functions["scores"], rows, batch_size):
            scores[number] = row
        return scores

    def _export(self, path, batching=None, **limits):
        limits = Limits(**limits)
        return export_classifier(
            self.model,
            self.tokenizer,
            path,
            lambda text, second_text=None: self._classify_in_graph(text, second_text, limits),
            limits.within(self.model.config.context_length),
            batching,
        )

    def _classify_in_graph(
        self, text: tf.Tensor, second_text: tf.Tensor | None, limits: Limits
    ) -> dict[str, tf.Tensor]:
        """What `classify` finds, of texts or pairs `[batch]`.

        Returns:
            `label`: strings `[batch]`, the best; `probabilities`: float32 `[batch, labels]`. In a
            regression only `scores`: float32 `[batch, labels]`, the numbers.
        """
        outputs = self._compute_on_device(self._encode_in_graph(text, second_text, limits=limits))
        if "scores" in outputs:
            return outputs
        labels = tf.constant([label.encode() for label in self.model.config.labels])
        # The squashed scores lie as the scores, but where they are rounded to the same number.
        return {"label": tf.gather(labels, tf.argmax(outputs["probabilities"], axis=-1)), **outputs}

    def _compute_on_device(self, arguments):
        scores = tf.cast(self(arguments), tf.float32)
        if self.problem_type == "regression":
            return {"scores": scores}
        squash = tf.sigmoid if self.problem_type == "multi_label_classification" else tf.nn.softmax
        return {"probabilities": squash(scores)}

    def _device_settings(self):
        return {**super()._device_settings(), "labels": list(self.model.config.labels)}

    # Training

    def compile(self, optimizer=None, loss=None, metrics=None, jit_compile=None, **kwargs):
        """Prepares the model for training; see `keras.Model.compile`.

        Args:
            optimizer: A Keras optimizer or its name. None: `AdamW` as usual for fine-tuning, with the
                learning rate 5e-5; a model that starts from nothing learns with ten times that.
            loss: A Keras loss that is a mean over the batch. None: `classification_loss` of the model's
                problem type.
            metrics: None: the accuracy, for a classification with a single label.
            jit_compile: As in Keras. None: only on the JAX backend, which needs it. Batches differ in
                length, and XLA compiles for each.
            **kwargs: As in `kerasllm.training.Training.compile` and in Keras.

        Raises:
            ValueError: If the loss is no mean, or as in `kerasllm.training.Training.compile`.
        """
        if getattr(loss, "reduction", "mean") not in ("mean", "sum_over_batch_size"):
            raise ValueError(
                'The `reduction` of a loss must be "sum_over_batch_size". '
                f"Received: {loss.name} with reduction={loss.reduction!r}"
            )
        if optimizer is None:
            optimizer = AdamW(5e-5, weight_decay=0.01, beta_2=0.999)
        if metrics is None and self.problem_type == "single_label_classification":
            metrics = [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
        super().compile(
            optimizer,
            loss=classification_loss(self.problem_type) if loss is None else loss,
            metrics=metrics,
            jit_compile=keras.backend.backend() == "jax" if jit_compile is None else jit_compile,
            **kwargs,
        )

    def _weigh(self, x, y, sample_weight):
        return ops.shape(y)[0]

    def _differentiate(self, x, y, sample_weight, variables, scale):
        with tf.GradientTape() as tape:
            part = self._sum(x, y, sample_weight, training=True)
            target = part.objective * tf.cast(scale, part.objective.dtype)
        return part, dense(tape.gradient(target, variables), variables)

    def _measure(self, x, y, sample_weight):
        return self._sum(x, y, sample_weight, training=False)

    def _sum(self, x, y, sample_weight, training) -> BatchPart:
        scores = self(x, training=training)
        mean = self.compute_loss(x, y, scores, sample_weight, training=training)
        # Keras divides by the rows here and by the number of replicas.
        weight = ops.cast(ops.shape(scores)[0], mean.dtype)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        return BatchPart(mean * weight * replicas, {}, weight, scores)

    def fit(self, x=None, y=None, batch_size: int | None = None, max_length: int | None = None, **kwargs):
        """Trains on texts and their labels or on prepared batches; otherwise `keras.Model.fit`.

        Args:
            x: A list of texts or of pairs of texts; or what Keras takes, such as a `tf.data.Dataset` of
                `(inputs, labels)`, with inputs as in `call`.
            y: The labels. Single-label: names or numbers of classes `[texts]`. Multi-label: a list of
                names for each text, or 0 and 1 `[texts, labels]`. Regression: `[texts]` or
                `[texts, labels]`.
            batch_size: Texts per step (default 32).
            max_length: As in `classify`.
            **kwargs: As in Keras; `validation_data` is `(texts, labels)`, or as in Keras.

        Returns:
            Keras's `History`.
        """
        if not self.compiled:
            self.compile()
        validation = kwargs.get("validation_data")
        if isinstance(validation, tuple) and len(validation) == 2 and _holds_texts(validation[0]):
            kwargs["validation_data"] = self._batches(*validation, batch_size, max_length, shuffle=False)
        if not _holds_texts(x):
            return super().fit(x, y, batch_size=batch_size, **kwargs)
        shuffle = kwargs.pop("shuffle", True)

        def make_batches(**order):
            return self._batches(x, y, batch_size, max_length, shuffle, **order)

        return self._fit_texts(make_batches, **kwargs)

    def evaluate(
        self, x=None, y=None, batch_size: int | None = None, max_length: int | None = None, **kwargs
    ):
        """Measures loss and metrics on texts and their labels; otherwise `keras.Model.evaluate`.

        Args:
            x: As in `fit`.
            y: As in `fit`.
            batch_size: Texts per step (default 32).
            max_length: As in `classify`.
            **kwargs: As in Keras.

        Returns:
            The loss and the metrics by their names; with `return_dict=False` a list.
        """
        if not self.compiled:
            self.compile()
        kwargs.setdefault("return_dict", True)
        if not _holds_texts(x):
            return super().evaluate(x, y, batch_size=batch_size, **kwargs)
        return super().evaluate(self._batches(x, y, batch_size, max_length, shuffle=False), **kwargs)

    def _batches(self, texts, labels, batch_size, max_length, shuffle, **order) -> tf.data.Dataset:
        if labels is None:
            raise ValueError("Texts need their labels: `y` must be given.")
        rows, labels = self._encode(texts, max_length), self._read_labels(labels)
        if len(rows) != len(labels):
            raise ValueError(
                f"Each text must have a label. Received: {len(rows)} texts, {len(labels)} labels"
            )
        names = ("token_ids", "token_type_ids") if self._has_token_types else ("token_ids",)
        rows = [
            {**dict(zip(names, row, strict=False)), "attention_mask": np.ones(len(row[0]), "int32")}
            for row in rows
        ]
        padding = {"token_ids": self._padding_id}
        return padded_batches(rows, labels, batch_size or 32, pad_values=padding, shuffle=shuffle, **order)

    def _read_labels(self, labels) -> np.ndarray:
        """Labels as arrays that the loss takes: int32 `[texts]` or float32 `[texts, labels]`."""
        names = self.model.config.labels
        if self.problem_type == "single_label_classification":
            numbers = [_number_of(label, names) for label in labels]
            return np.array(numbers, "int32")
        if self.problem_type == "multi_label_classification" and _holds_names(labels):
            rows = np.zeros((len(labels), len(names)), "float32")
            for row, chosen in zip(rows, labels, strict=True):
                row[[_number_of(label, names) for label in chosen]] = 1
            return rows
        values = np.asarray(labels, "float32")
        if values.ndim == 1 and len(names) == 1:
            values = values[:, None]
        if values.ndim != 2 or values.shape[1] != len(names):
            raise ValueError(
                f"Labels of a {self.problem_type} must be [texts, {len(names)}]. "
                f"Received: shape={np.shape(labels)}"
            )
        if self.problem_type == "multi_label_classification" and not np.isin(values, (0, 1)).all():
            raise ValueError("Labels of a multi-label classification must be 0 or 1, or lists of names.")
        return values


def classification_loss(problem_type: str) -> keras.losses.Loss:
    """Makes the usual loss of a classifier; each is a mean over the batch.

    Args:
        problem_type: `"single_label_classification"`: cross-entropy of a softmax.
            `"multi_label_classification"`: binary cross-entropy of each label's sigmoid.
            `"regression"`: mean squared error.

    Returns:
        The loss, of labels and scores.

    Raises:
        ValueError: If there is no such type.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"`problem_type` must be one of {PROBLEM_TYPES}. Received: {problem_type!r}")
    return {
        "single_label_classification": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "multi_label_classification": keras.losses.BinaryCrossentropy(from_logits=True),
        "regression": keras.losses.MeanSquaredError(),
    }[problem_type]


def _holds_texts(x) -> bool:
    if not isinstance(x, list | tuple) or not x:
        return False
    return all(
        isinstance(text, str)
        or (isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(t, str) for t in text))
        for text in x
    )


def _holds_names(labels) -> bool:
    return all(
        isinstance(chosen, list | tuple | set) and all(isinstance(label, str) for label in chosen)
        for chosen in labels
    )


def _number_of(label, names: tuple[str, ...]) -> int:
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int | np.integer) and 0 <= label < len(names):
        return int(label)
    raise ValueError(
        f"A label must be one of {names} or its number, from 0 to {len(names) - 1}. Received: {label!r}"
    )


def _log_sum_exp(x: np.ndarray) -> np.ndarray:
    largest = x.max(-1, keepdims=True)
    return largest + np.log(np.exp(x - largest).sum(-1, keepdims=True))
