"""TensorProto to NumPy and back."""

import numpy as np
import pytest
import tensorflow as tf
from kerasllm_serving.tensor_proto import dtype_name, from_array, to_array
from tensorflow.core.framework.tensor_pb2 import TensorProto

NUMBERS = [
    tf.float32,
    tf.float64,
    tf.int8,
    tf.int16,
    tf.int32,
    tf.int64,
    tf.uint8,
    tf.uint16,
    tf.uint32,
    tf.uint64,
    tf.bool,
    tf.float16,
    tf.bfloat16,
    tf.complex64,
    tf.complex128,
]


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
def test_round_trip_in_typed_fields(dtype):
    array = np.array([[0, 1, 2], [3, 4, 5]]).astype(dtype.as_numpy_dtype)
    proto = from_array(array, dtype.as_datatype_enum)
    assert not proto.tensor_content
    np.testing.assert_array_equal(tf.make_ndarray(proto), array)
    np.testing.assert_array_equal(to_array(proto), array)
    assert to_array(proto).dtype == array.dtype


def test_strings_keep_their_bytes():
    array = np.array([b"a\x00", b"\xff", b""], object)
    proto = from_array(array, tf.string.as_datatype_enum)
    assert list(proto.string_val) == [b"a\x00", b"\xff", b""]
    assert to_array(proto).tolist() == array.tolist()
    scalar = to_array(from_array(np.array(b"a\x00", object), tf.string.as_datatype_enum))
    assert scalar.shape == () and scalar.item() == b"a\x00"


def test_inputs_in_either_encoding():
    values = np.float32([1, 2, 3])
    content = TensorProto(dtype=tf.float32.as_datatype_enum, tensor_content=values.tobytes())
    content.tensor_shape.dim.add(size=3)
    np.testing.assert_array_equal(to_array(content), values)

    # Two strings: their lengths, then their bytes.
    content = TensorProto(dtype=tf.string.as_datatype_enum, tensor_content=b"\x02\x01abc")
    content.tensor_shape.dim.add(size=2)
    assert to_array(content).tolist() == [b"ab", b"c"]


def test_a_short_list_repeats_its_last_value():
    proto = TensorProto(dtype=tf.int32.as_datatype_enum, int_val=[1, 7])
    proto.tensor_shape.dim.add(size=4)
    assert to_array(proto).tolist() == [1, 7, 7, 7]


def test_invalid_tensors_are_refused():
    too_much = TensorProto(dtype=tf.float32.as_datatype_enum, tensor_content=b"12345")
    too_much.tensor_shape.dim.add(size=1)
    for proto in (TensorProto(), TensorProto(dtype=999), too_much):
        with pytest.raises(ValueError, match="`proto` must be a valid TensorProto"):
            to_array(proto)


def test_dtype_without_a_field_is_refused():
    with pytest.raises(ValueError, match="Received: dtype=variant"):
        from_array(np.zeros(1), tf.variant.as_datatype_enum)


def test_names_are_those_of_the_runtime():
    names = [dtype_name(d.as_datatype_enum) for d in (tf.float32, tf.float64, tf.float16, tf.int8)]
    assert names == ["float", "double", "half", "int8"]
