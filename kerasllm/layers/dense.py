"""Products with matrices of weights, in the forms that are quick where XLA compiles them for a CPU."""

import keras
from keras import ops

from kerasllm.layers.rounding import exact_value, weight_rounding
from kerasllm.layers.xla import is_traced_for_xla

# XLA gives each of these to a core of its own; a product with a small matrix it would give to one.
_PARTS = 2


@keras.saving.register_keras_serializable(package="kerasllm")
class Dense(keras.layers.Dense):
    """Keras's dense layer; where XLA compiles it, two cores read the matrix for a single row.

    Decoding one row takes as long as the weights take to be read.
    """

    def call(self, inputs, training=None):
        rounding = weight_rounding()
        if rounding is not None:
            kernel = rounding.kernel(exact_value(self.kernel))
            outputs = ops.matmul(inputs, ops.cast(kernel, self.compute_dtype))
        elif is_traced_for_xla() and len(inputs.shape) == 2 and not self.kernel.shape[0] % _PARTS:
            outputs = _multiply_in_parts(inputs, self.kernel)
        else:
            return super().call(inputs, training=training)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs if self.activation is None else self.activation(outputs)

    def quantize(self, mode=None, type_check: bool = True, config=None) -> None:
        super().quantize(mode, type_check=False, config=config)  # Keras would refuse a class of ours


def _multiply_in_parts(rows, matrix):
    """`rows @ matrix`; for a single row the sum of the products of both halves."""
    count, parts = ops.shape(rows)[0], _PARTS
    if not isinstance(count, int):  # XLA knows it when it compiles
        parts = ops.where(ops.equal(count, 1), _PARTS, 1)
    elif count != 1:
        return ops.matmul(rows, matrix)
    rows = ops.transpose(ops.reshape(rows, (count, parts, -1)), (1, 0, 2))
    return ops.sum(ops.matmul(rows, ops.reshape(matrix, (parts, -1, matrix.shape[1]))), axis=0)


def multiply_with_rows(matrix, rows):
    """`rows @ transpose(matrix)` for a wide matrix, as XLA is quick at it.

    Args:
        matrix: Floats `[wide, width]`.
        rows: Floats `[rows, width]`.

    Returns:
        Floats `[rows, wide]`.
    """
    wide, width = matrix.shape
    columns = ops.transpose(rows)  # several times faster than with the matrix on the right
    if wide % _PARTS:
        return ops.transpose(ops.matmul(matrix, columns))
    # Written out for each part: XLA sees through `columns[None]`, makes one product of the parts again, and
    # then copies the whole matrix if there are several rows.
    columns = ops.broadcast_to(columns, (_PARTS, *ops.shape(columns)))
    products = ops.matmul(ops.reshape(matrix, (_PARTS, wide // _PARTS, width)), columns)
    return ops.transpose(ops.reshape(products, (wide, -1)))
