"""The JSON rules of the REST API, without a server."""

import base64
import json
import math

import numpy as np
import pytest
import tensorflow as tf
from kerasllm_serving import json_tensor
from kerasllm_serving.errors import ServingError
from kerasllm_serving.json_tensor import RequestFormat
from kerasllm_serving.tensor_proto import from_array
from tensorflow.core.protobuf.meta_graph_pb2 import TensorInfo


def infos(**dtypes):
    return {
        name: TensorInfo(name=f"{name}:0", dtype=dtype.as_datatype_enum) for name, dtype in dtypes.items()
    }


def read(text, inputs, optional=()):
    """Parses a body into arrays by name."""
    document = json_tensor.parse_object(text.encode())
    tensors, request_format = json_tensor.tensors_from_json(document, inputs, optional)
    return {name: tf.make_ndarray(proto) for name, proto in tensors.items()}, request_format


def refusal(text, inputs):
    with pytest.raises(ServingError) as caught:
        read(text, inputs)
    return caught.value


def write(request_format, **arrays):
    outputs = {
        name: from_array(np.asarray(array), tf.as_dtype(np.asarray(array).dtype).as_datatype_enum)
        for name, array in arrays.items()
    }
    return json_tensor.json_from_tensors(outputs, request_format)


def test_rows_of_the_only_input():
    arrays, request_format = read('{"instances": [[1, 2], [3, 4], [5, 6]]}', infos(x=tf.int32))
    assert request_format is RequestFormat.ROW
    np.testing.assert_array_equal(arrays["x"], [[1, 2], [3, 4], [5, 6]])
    assert arrays["x"].dtype == np.int32


def test_rows_of_several_inputs():
    inputs = infos(i=tf.int32, s=tf.string, f=tf.float32, d=tf.float64)
    text = """{"instances": [
        {"i": [[1, 2]], "s": ["foo", "bar"], "f": [1.0, NaN], "d": -Infinity},
        {"i": [[3, 4]], "s": ["baz", "bat"], "f": [2, Infinity], "d": 2.5}]}"""
    arrays, _ = read(text, inputs)
    np.testing.assert_array_equal(arrays["i"], [[[1, 2]], [[3, 4]]])
    assert arrays["s"].tolist() == [[b"foo", b"bar"], [b"baz", b"bat"]]
    np.testing.assert_array_equal(arrays["f"], np.float32([[1, math.nan], [2, math.inf]]))
    np.testing.assert_array_equal(arrays["d"], [-math.inf, 2.5])


def test_columns():
    arrays, request_format = read('{"inputs": [[1.5, 2]]}', infos(x=tf.float32))
    assert request_format is RequestFormat.COLUMNAR
    np.testing.assert_array_equal(arrays["x"], np.float32([[1.5, 2]]))

    arrays, _ = read('{"inputs": {"x": [true], "k": 4}}', infos(x=tf.bool, k=tf.uint8))
    assert arrays["x"].tolist() == [True]
    assert arrays["k"].shape == () and arrays["k"] == 4


def test_base64_is_a_string_in_either_format():
    inputs = infos(x=tf.string)
    arrays, _ = read('{"instances": [{"b64": "aGVsbG8="}, {"b64": "/wA"}]}', inputs)
    assert arrays["x"].tolist() == [b"hello", b"\xff\x00"]
    arrays, _ = read('{"instances": [{"x": [{"b64": "aGVsbG8="}]}]}', inputs)
    assert arrays["x"].tolist() == [[b"hello"]]
    arrays, _ = read('{"inputs": {"b64": "aGVsbG8="}}', inputs)
    assert arrays["x"].shape == () and arrays["x"].item() == b"hello"


def test_text_is_utf_8():
    arrays, _ = read('{"instances": ["caf\\u00e9", "\\ud83d\\ude00", "漢"]}', infos(x=tf.string))
    assert [value.decode() for value in arrays["x"]] == ["café", "😀", "漢"]


def test_what_follows_the_object_is_ignored():
    arrays, _ = read(' \n{"instances": [1]} trailing', infos(x=tf.int32))
    assert arrays["x"].tolist() == [1]


def test_optional_inputs_may_be_left_out_by_all_rows_alike():
    inputs = infos(x=tf.int32, k=tf.int32)
    for text in ('{"instances": [{"x": 1}, {"x": 2}]}', '{"inputs": {"x": [1, 2]}}'):
        arrays, _ = read(text, inputs, optional=["k"])
        assert list(arrays) == ["x"]
    with pytest.raises(ServingError, match="(?s)element: 1 .* keys must be equal to: k,x"):
        read('{"instances": [{"x": 1, "k": 1}, {"x": 2}]}', inputs, optional=["k"])
    with pytest.raises(ServingError, match="(?s)element: 1 .* keys must be equal to: x"):
        read('{"instances": [{"x": 1}, {"x": 2, "k": 1}]}', inputs, optional=["k"])


@pytest.mark.parametrize(
    ("dtype", "value", "accepted"),
    [
        (tf.int32, "2147483647", 2147483647),
        (tf.int32, "2147483648", None),
        (tf.int32, "1.5", None),
        (tf.int32, "1.0", None),
        (tf.int32, "true", None),
        (tf.int32, "null", None),
        (tf.int8, "-128", -128),
        (tf.int8, "128", None),
        (tf.uint8, "-1", None),
        (tf.uint64, "18446744073709551615", 2**64 - 1),
        (tf.int64, "-9223372036854775808", -(2**63)),
        (tf.int64, "9223372036854775808", None),
        (tf.float32, "3", 3.0),
        (tf.float32, "1e39", math.inf),
        (tf.float32, "-1e400", -math.inf),
        (tf.float64, "1" + "0" * 400, math.inf),
        (tf.float32, '"3"', None),
        (tf.float32, "false", None),
        (tf.bool, "true", True),
        (tf.bool, "1", None),
        (tf.string, "1", None),
        (tf.string, "null", None),
    ],
)
def test_values_that_a_dtype_takes(dtype, value, accepted):
    inputs = infos(x=dtype)
    if accepted is None:
        error = refusal(f'{{"inputs": [{value}]}}', inputs)
        names = {"float32": "float"}
        assert error.message.startswith(f"JSON Value: {value} Type: ")
        assert error.message.endswith(f"is not of expected type: {names.get(dtype.name, dtype.name)}")
    else:
        arrays, _ = read(f'{{"inputs": [{value}]}}', inputs)
        assert arrays["x"].tolist() == [accepted]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "JSON Parse error: The document is empty"),
        ("  ", "JSON Parse error: The document is empty"),
        ("instances = [1]", "JSON Parse error: Invalid value"),
        ('{"instances": [1', "JSON Parse error: "),
        ('{"instances": [' + "9" * 5000 + "]}", "JSON Parse error: "),
        ('{"instances": ' + "[" * 500_000, "JSON Parse error: The document is nested too deeply"),
        ("[1]", "Is not object"),
        ('{"signature_name": "a"}', "Missing 'inputs' or 'instances' key"),
        ('{"instances": [1], "inputs": [1]}', "Not formatted correctly expecting only one of"),
        ('{"instances": 1}', "Excepting 'instances' to be an list/array"),
        ('{"instances": []}', "No values in 'instances' array"),
        ('{"instances": [[1, 2], [3]]}', "Expecting tensor size: 2 but got: 1"),
        ('{"instances": [[1, 2], [[3, 4]]]}', "Expecting shape [2] but got: [1,2]"),
        ('{"instances": [1, [1]]}', "Expecting shape [] but got: [1]"),
        ('{"instances": [1, "a"]}', 'JSON Value: "a" Type: String is not of expected type: int32'),
        ('{"instances": [1, {"x": 1}]}', "Expecting value/list but got object at item 1 of input"),
        ('{"instances": [{"x": 1}, 1]}', "Expecting object but got list at item 1 of input list"),
        ('{"instances": [{"q": 1}]}', "JSON object: does not have named input: q"),
        ('{"instances": [{}]}', "keys must be equal to: x"),
        ('{"inputs": [[1, 2], [3]]}', "Encountered list at unexpected size: 1 at level: 1"),
        ('{"inputs": [[1], 2]}', "JSON Value: 2 found at incorrect level: 2"),
        ('{"inputs": [1, [2]]}', "Encountered list at unexpected level: 1 expected < 1"),
        ('{"inputs": {"q": [1]}}', "JSON object: does not have named input: q"),
        ('{"inputs": {}}', "Missing named input: x in 'inputs' object."),
        ('{"inputs": [{"b64": "aGk="}]}', "Type: Object is not of expected type: int32"),
    ],
)
def test_refusals_for_an_int32_input(text, message):
    error = refusal(text, infos(x=tf.int32))
    assert message in error.message
    assert error.http_status == 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instances": [1]}', "instances is a plain list, but expecting list of objects"),
        ('{"inputs": [1]}', "inputs is a plain value/list, but expecting an object"),
        ('{"instances": [{"x": 1}]}', "keys must be equal to: k,x"),
    ],
)
def test_refusals_for_two_inputs(text, message):
    assert message in refusal(text, infos(x=tf.int32, k=tf.int32)).message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"inputs": [{"b64": "a"}]}', "Unable to base64 decode"),
        ('{"inputs": [{"b64": 1}]}', "not formatted correctly for base64 data"),
        ('{"inputs": [{"b64": "aGk=", "c": 1}]}', "not formatted correctly for base64 data"),
        ('{"inputs": ["\\ud800"]}', "The surrogate pair in string is invalid."),
    ],
)
def test_refusals_for_a_string_input(text, message):
    assert message in refusal(text, infos(x=tf.string)).message


def test_a_body_that_is_not_utf_8_is_refused():
    with pytest.raises(ServingError, match="JSON Parse error: Invalid encoding in string"):
        json_tensor.parse_object(b'{"instances": ["\xff"]}')


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.complex64])
def test_dtypes_that_json_does_not_carry(dtype):
    error = refusal('{"inputs": [1]}', infos(x=dtype))
    assert error.http_status == 501
    assert "Conversion of JSON Value: 1 to type: " in error.message
    error = refusal('{"instances": [1]}', infos(x=dtype))
    assert error.http_status == 400
    assert "Error: UNIMPLEMENTED: Conversion of JSON Value" in error.message


def test_signature_name():
    assert json_tensor.signature_name({}) == ""
    assert json_tensor.signature_name({"signature_name": "a"}) == "a"
    with pytest.raises(ServingError, match="'signature_name' key must be a string value."):
        json_tensor.signature_name({"signature_name": 5})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9000000, "9e+06"),
        (999999, "999999.0"),
        (0.5, "0.5"),
        (0.2, "0.2"),
        (0.0003, "0.0003"),
        (0.00003, "3e-05"),
        (555557.5, "555557.5"),
        (1 / 3, "0.333333343"),
        (16777217, "16777216.0"),
        (3.4028235e38, "3.40282347e+38"),
        (-0.0, "-0.0"),
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
    ],
)
def test_float32_is_written_with_the_digits_it_needs(value, text):
    assert write(RequestFormat.COLUMNAR, x=np.float32(value)) == f'{{"outputs": {text}}}'


def test_float64_is_written_with_the_digits_it_needs():
    written = write(RequestFormat.COLUMNAR, x=np.float64([1 / 3, 0.1, 1e300]))
    assert written == '{"outputs": [0.33333333333333331, 0.1, 1e+300]}'


def test_every_float_reads_back_as_itself():
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    read_back = json.loads(write(RequestFormat.COLUMNAR, x=values))["outputs"]
    np.testing.assert_array_equal(np.float32(read_back), values)


def test_outputs_in_both_formats():
    one = np.arange(6, dtype=np.int32).reshape(3, 2)
    assert json.loads(write(RequestFormat.ROW, x=one)) == {"predictions": one.tolist()}
    assert json.loads(write(RequestFormat.COLUMNAR, x=one)) == {"outputs": one.tolist()}

    two = {"n": np.array([1, 2]), "s": np.array([[b"a"], [b"b"]], object)}
    assert json.loads(write(RequestFormat.ROW, **two)) == {
        "predictions": [{"n": 1, "s": ["a"]}, {"n": 2, "s": ["b"]}]
    }
    assert json.loads(write(RequestFormat.COLUMNAR, **two)) == {
        "outputs": {"n": [1, 2], "s": [["a"], ["b"]]}
    }


def test_empty_and_scalar_outputs():
    assert write(RequestFormat.ROW, x=np.zeros((0, 2), np.int32)) == '{"predictions": []}'
    assert write(RequestFormat.ROW, x=np.zeros((2, 0), np.int32)) == '{"predictions": [[], []]}'
    assert write(RequestFormat.COLUMNAR, x=np.zeros((2, 0, 3))) == '{"outputs": [[], []]}'
    assert write(RequestFormat.COLUMNAR, x=np.array(True)) == '{"outputs": true}'
    with pytest.raises(ServingError, match="Tensor name: x has no shape information"):
        write(RequestFormat.ROW, x=np.int32(1))


def test_rows_need_one_batch_size():
    with pytest.raises(ServingError, match="y has inconsistent batch size: 3 expecting: 2"):
        write(RequestFormat.ROW, x=np.zeros(2), y=np.zeros(3))


def test_strings_and_bytes():
    broken = np.array([b'"\xe6\xbc\xa2"\n', b"\xff\x00"], object)
    assert json.loads(write(RequestFormat.ROW, text=broken)) == {"predictions": ['"漢"\n', "\ufffd\x00"]}
    assert json.loads(write(RequestFormat.ROW, text_bytes=broken)) == {
        "predictions": [{"b64": base64.b64encode(value).decode()} for value in broken]
    }


def test_outputs_that_json_does_not_carry():
    with pytest.raises(ServingError, match="Failed to write JSON value for tensor type: half"):
        write(RequestFormat.ROW, x=np.zeros(2, np.float16))
    with pytest.raises(ServingError, match="Cannot convert empty tensor map to JSON"):
        json_tensor.json_from_tensors({}, RequestFormat.ROW)
