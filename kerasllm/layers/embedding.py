"""Token ids to vectors, and vectors back to logits over the vocabulary."""

import keras
from keras import ops

from kerasllm.layers.dense import multiply_with_rows
from kerasllm.layers.gradient import is_traced_for_gradient
from kerasllm.layers.precision import waiting_for
from kerasllm.layers.rounding import exact_value, weight_rounding
from kerasllm.layers.shapes import flatten, unflatten
from kerasllm.layers.table import table_functions
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
        self.embeddings_scale = None
        if self.quantization_mode:
            self.quantized_build((self.vocabulary_size, self.dim), self.quantization_mode)
            return
        # Keras would cast the whole table for the few rows that are looked up.
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.vocabulary_size, self.dim),
            initializer=keras.initializers.RandomNormal(stddev=self.initializer_range),
            autocast=False,
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
        functions, rounding = table_functions(), weight_rounding()
        if not reverse:
            if functions is not None:
                return functions.look_up(ops.convert_to_tensor(self.embeddings), inputs)
            vectors = ops.take(self.embeddings, inputs, axis=0)
            if rounding is not None:
                vectors = rounding.rows(vectors)
            vectors = ops.cast(vectors, self.compute_dtype)
            if self.embeddings_scale is not None:
                vectors *= ops.take(self.embeddings_scale, inputs, axis=0)[..., None]
            return vectors
        flat = flatten(inputs)
        with waiting_for(flat):
            table = self.embeddings if rounding is None else rounding.rows(exact_value(self.embeddings))
            table = ops.cast(ops.convert_to_tensor(table), self.compute_dtype)
        if functions is not None:
            logits = functions.score(flat, table)
        elif is_traced_for_gradient():
            # Reshaped, it is a value and no variable, which would want a gradient of its own kind.
            logits = _score(flat, ops.reshape(table, (self.vocabulary_size, self.dim)))
        elif is_traced_for_xla():
            logits = multiply_with_rows(table, flat)
        else:
            logits = ops.matmul(flat, ops.transpose(table))
        if self.embeddings_scale is not None:
            logits *= self.embeddings_scale
        return unflatten(logits, inputs)

    # Keras's hooks for `keras.Model.quantize`

    def quantize(self, mode: str | None = None, type_check: bool = True, config=None) -> None:
        """Keeps the table in integers of 8 bits, with a scale for each row.

        Args:
            mode: `"int8"`; others leave the table as it is, with a warning of Keras.
            type_check: Not used.
            config: Not used: vectors and logits are computed in the compute dtype.
        """
        if mode != "int8":
            raise self._not_implemented_error(self.quantize, f"Received: mode={mode}")
        table, scale = keras.quantizers.AbsMaxQuantizer(axis=-1)(self.embeddings, to_numpy=True)
        del self.embeddings
        self.quantized_build(table.shape, mode)
        self.embeddings.assign(table)
        self.embeddings_scale.assign(1 / ops.squeeze(scale, axis=-1))  # Keras's scale is to be divided by
        self.dtype_policy = keras.dtype_policies.get(f"{mode}_from_{self.dtype_policy.name}")

    def quantized_build(self, input_shape, mode: str) -> None:
        if mode != "int8":
            raise self._quantization_mode_error(mode)
        self.embeddings = self.add_weight(
            name="embeddings", shape=input_shape, initializer="zeros", dtype="int8", trainable=False
        )
        self.embeddings_scale = self.add_weight(
            name="embeddings_scale", shape=input_shape[:1], initializer="ones", trainable=False
        )
        self._is_quantized = True

    def _int8_call(self, *args, **kwargs):
        return self.call(*args, **kwargs)
