"""Token ids to vectors, and vectors back to logits over the vocabulary."""

import keras
from keras import ops

from kerasllm.layers.gradient import is_traced_for_gradient
from kerasllm.layers.shapes import flatten, unflatten
from kerasllm.layers.xla import is_traced_for_xla


@ops.custom_gradient
def _score(flat, table):
    """The product with the transposed table, whose gradient comes out as the table lies."""

    def differentiate(upstream):
        return ops.matmul(upstream, table), ops.matmul(ops.transpose(upstream), flat)

    return ops.matmul(flat, ops.transpose(table)), differentiate


@keras.saving.register_keras_serializable(package="kerasllm")
class TokenEmbedding(keras.layers.Layer):
    """Looks up token vectors; in reverse it scores vectors against the same table (a tied head).

    Sharing the table between input and output is due to Press and Wolf,
    "Using the Output Embedding to Improve Language Models" (2017).

    Args:
        vocabulary_size: Number of tokens.
        dim: Width of a token's vector.
        initializer_range: Standard deviation of the normal initialisation.
    """

    def __init__(self, vocabulary_size: int, dim: int, initializer_range: float = 0.02, **kwargs):
        super().__init__(**kwargs)
        for name, value in (("vocabulary_size", vocabulary_size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1. Received: {name}={value}")
        self.vocabulary_size = vocabulary_size
        self.dim = dim
        self.initializer_range = initializer_range

    def build(self, input_shape=None):
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.vocabulary_size, self.dim),
            initializer=keras.initializers.RandomNormal(stddev=self.initializer_range),
        )

    def call(self, inputs, reverse: bool = False):
        """Embeds ids, or scores vectors.

        Args:
            inputs: Integer ids of any shape `[...]`; with `reverse=True` float vectors `[..., dim]`.
            reverse: Whether to return logits instead of vectors.

        Returns:
            Vectors `[..., dim]`, or with `reverse=True` logits `[..., vocabulary_size]`, in the
            compute dtype.
        """
        table = ops.convert_to_tensor(self.embeddings)
        if reverse:
            flat = flatten(inputs)
            if is_traced_for_gradient():
                # Reshaped, it is a value and no variable, which would want a gradient of its own kind.
                logits = _score(flat, ops.reshape(table, (self.vocabulary_size, self.dim)))
            elif is_traced_for_xla():  # where a wide table is multiplied several times faster from the left
                logits = ops.transpose(ops.matmul(table, ops.transpose(flat)))
            else:
                logits = ops.matmul(flat, ops.transpose(table))
            return unflatten(logits, inputs)
        return ops.take(table, inputs, axis=0)
