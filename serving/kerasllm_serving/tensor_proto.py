"""Between `TensorProto` and NumPy arrays, with TensorFlow Serving's choice of fields."""

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2

# Responses carry typed values, not `tensor_content`, so that clients can read them in any language.
VALUE_FIELDS = {
    types_pb2.DT_FLOAT: "float_val",
    types_pb2.DT_DOUBLE: "double_val",
    types_pb2.DT_INT8: "int_val",
    types_pb2.DT_INT16: "int_val",
    types_pb2.DT_INT32: "int_val",
    types_pb2.DT_UINT8: "int_val",
    types_pb2.DT_UINT16: "int_val",
    types_pb2.DT_INT64: "int64_val",
    types_pb2.DT_UINT32: "uint32_val",
    types_pb2.DT_UINT64: "uint64_val",
    types_pb2.DT_BOOL: "bool_val",
    types_pb2.DT_STRING: "string_val",
    types_pb2.DT_HALF: "half_val",
    types_pb2.DT_BFLOAT16: "half_val",
    types_pb2.DT_COMPLEX64: "scomplex_val",
    types_pb2.DT_COMPLEX128: "dcomplex_val",
}
# A list of values may be short: the last one stands for those that are missing. A request of a few bytes
# must not take all memory.
_MOST_REPEATED = 2**25


def dtype_name(dtype: int) -> str:
    """Names a dtype the way TensorFlow's C++ messages do: `float`, `half`, `int32`, `string`.

    Args:
        dtype: A `types_pb2.DataType` value.

    Returns:
        The name.
    """
    return types_pb2.DataType.Name(dtype).removeprefix("DT_").lower()


def as_array(value: np.ndarray | np.generic | bytes) -> np.ndarray:
    """Returns a value that TensorFlow gives out as an array.

    Args:
        value: An array, or a scalar, which for strings is `bytes`.

    Returns:
        The array; strings are an object array of `bytes`, because NumPy's own string type drops
        the zeros at the end of a string.
    """
    return np.asarray(value, dtype=object if isinstance(value, bytes) else None)


def to_array(proto: tensor_pb2.TensorProto) -> np.ndarray:
    """Decodes a tensor sent by a client, from typed values or from `tensor_content`.

    Args:
        proto: The tensor.

    Returns:
        The array; strings are an object array of `bytes`.

    Raises:
        ValueError: If the message is not a valid tensor, or a few values that stand for a huge one.
    """
    size = math.prod(dim.size for dim in proto.tensor_shape.dim)
    if not proto.tensor_content and size > _MOST_REPEATED and size > proto.ByteSize():
        raise ValueError(
            f"`proto` must have a value per element if it has over {_MOST_REPEATED} elements. "
            f"Received: {size} elements in {proto.ByteSize()} bytes"
        )
    try:
        # The runtime's own decoder, so that short value lists, `tensor_content` of strings and
        # the like mean what they mean to TensorFlow Serving.
        dtype = tf.as_dtype(proto.dtype)
        value = tf.io.parse_tensor(proto.SerializeToString(), dtype).numpy()
    except (tf.errors.OpError, TypeError) as error:
        raise ValueError(f"`proto` must be a valid TensorProto. Received: {error}") from error
    return as_array(value)


def from_array(array: np.ndarray, dtype: int, as_tensor_content: bool = False) -> tensor_pb2.TensorProto:
    """Encodes an output of the model with one value per element in the field of its dtype.

    Args:
        array: The values, any shape; strings are an object array of `bytes`.
        dtype: A `types_pb2.DataType` value.
        as_tensor_content: Whether to send the bytes of the array instead; strings have none.

    Returns:
        The tensor.

    Raises:
        ValueError: If the dtype has no field of values.
    """
    if dtype not in VALUE_FIELDS:
        raise ValueError(
            f"`dtype` must be one of {sorted(map(dtype_name, VALUE_FIELDS))}. "
            f"Received: dtype={dtype_name(dtype)}"
        )
    proto = tensor_pb2.TensorProto(dtype=dtype)
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    if as_tensor_content and dtype != types_pb2.DT_STRING:
        proto.tensor_content = array.tobytes()
        return proto
    values = array.reshape(-1)
    if dtype in (types_pb2.DT_HALF, types_pb2.DT_BFLOAT16):
        values = values.view(np.uint16)
    elif dtype == types_pb2.DT_COMPLEX64:
        values = values.view(np.float32)
    elif dtype == types_pb2.DT_COMPLEX128:
        values = values.view(np.float64)
    getattr(proto, VALUE_FIELDS[dtype]).extend(values.tolist())
    return proto
