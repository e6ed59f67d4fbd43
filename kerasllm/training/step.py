"""The training step: Keras's compile, fit and callbacks around a loss that counts tokens."""

import keras
import tensorflow as tf
from keras import ops

from kerasllm.training.loss import next_token_loss
from kerasllm.training.optimizer import AdamW


class TokenWeightedTraining:
    """Gives a Keras model that maps token ids to logits the training of a language model.

    A mixin: `class CausalLM(TokenWeightedTraining, keras.Model)`. Batches are
    `(token_ids, labels, weights)`, each `[batch, length]`. The loss is the mean over the tokens whose
    weight is not zero; over an epoch and in `evaluate`, too, every token counts the same, whatever the
    padding of its batch. `perplexity` is the exponential of that loss.
    """

    def compile(self, optimizer=None, loss=None, **kwargs):
        """Prepares the model for training; see `keras.Model.compile`.

        Args:
            optimizer: A Keras optimizer or its name. None: `AdamW()`.
            loss: Must be None: the loss is that of the next token.
            **kwargs: As in Keras.

        Raises:
            ValueError: If a loss is given or the model is on several replicas.
        """
        if loss is not None:
            raise ValueError(f"A language model brings its own loss; leave `loss` out. Received: {loss!r}")
        replicas = self.distribute_strategy.num_replicas_in_sync
        if replicas > 1:
            # Keras's own step would clip and average per replica: wrong weights without an error.
            raise ValueError(
                "Training runs on one replica so far; make the model outside of a "
                f"`tf.distribute` strategy of several. Received: {replicas} replicas"
            )
        super().compile(optimizer=AdamW() if optimizer is None else optimizer, **kwargs)
        # Now, for variables that are made while a step is traced make TensorFlow trace it twice.
        self.optimizer.build(self.trainable_variables)

    def compile_from_config(self, config):
        """Compiles as before the model was saved; Keras calls it."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def train_step(self, data):
        """Updates the weights on one batch; Keras calls it."""
        token_ids, labels, weights = data
        variables = [variable.value for variable in self.trainable_weights]
        with tf.GradientTape() as tape:
            logits = self(token_ids, training=True)
            loss, count = self._mean_loss(logits, labels, weights)
            scaled = self.optimizer.scale_loss(loss)
        # Dense: TensorFlow hands out the gradient of a lookup as rows that may repeat, and an
        # optimizer or a norm over those rows counts a repeated row wrongly.
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(scaled, variables)]
        self.optimizer.apply(gradients, self.trainable_weights)
        return self._results(token_ids, labels, weights, logits, loss, count)

    def test_step(self, data):
        """Measures the loss on one batch; Keras calls it."""
        token_ids, labels, weights = data
        logits = self(token_ids, training=False)
        loss, count = self._mean_loss(logits, labels, weights)
        return self._results(token_ids, labels, weights, logits, loss, count)

    @staticmethod
    def _mean_loss(logits, labels, weights):
        """The loss per token, 0 for a batch without any, and the number of tokens."""
        total, count = next_token_loss(logits, labels, weights)
        return ops.divide_no_nan(total, count), count

    def _results(self, token_ids, labels, weights, logits, loss, count):
        self._loss_tracker.update_state(loss, sample_weight=count)
        results = self.compute_metrics(token_ids, labels, logits, sample_weight=weights)
        return {**results, "perplexity": ops.exp(results["loss"])}
