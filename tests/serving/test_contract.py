"""The table of what TensorFlow Serving refuses: each case, its code and its message, over gRPC and REST.

A row of `GRPC` is a call, a request, and the code and the message of the answer. A row of `REST` is a
method, a path, a body, and the HTTP status and the message. A message that ends in `...` is the beginning
of the answer's. What is refused only by a server with other settings is in the tests of those settings:
batching in test_batching.py, changes of the configuration in test_manager.py.
"""

import json
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
import tensorflow as tf
from kerasllm_serving.inference import CLASSIFY, REGRESS
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

TIMEOUT = 30
MODEL = "/v1/models/test_model"
NO_EXAMPLES = ()


def spec(message, name="test_model", signature="", version=None, label=None):
    message.SetInParent()
    message.name, message.signature_name = name, signature
    if version is not None:
        message.version.value = version
    if label is not None:
        message.version_label = label


def predict(output_filter=(), inputs=None, **fields):
    request = predict_pb2.PredictRequest(output_filter=output_filter)
    spec(request.model_spec, **fields)
    for name, value in (inputs or {}).items():
        request.inputs[name].SetInParent()
        if value is not None:
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def add_examples(request, xs):
    for x in xs:
        request.input.example_list.examples.add().features.feature["x"].float_list.value.append(x)
    return request


def classify(signature, xs=(1.0, 2.0), **fields):
    request = classification_pb2.ClassificationRequest()
    spec(request.model_spec, signature=signature, **fields)
    return add_examples(request, xs)


def regress(signature, xs=(1.0, 2.0), **fields):
    request = regression_pb2.RegressionRequest()
    spec(request.model_spec, signature=signature, **fields)
    return add_examples(request, xs)


def multi(*tasks, xs=(1.0,)):
    request = inference_pb2.MultiInferenceRequest()
    for name, method, signature in tasks:
        task = request.tasks.add(method_name=method)
        spec(task.model_spec, name=name, signature=signature)
    return add_examples(request, xs)


def metadata(*fields, **model):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    spec(request.model_spec, **model)
    return request


def status(**model):
    request = get_model_status_pb2.GetModelStatusRequest()
    spec(request.model_spec, **model)
    return request


MISSING_FEATURE = "Name: <unknown>, Feature: x (data type: float) is required but could not be found."
A = {"prompt": ["a"]}
INVALID, FAILED, MISSING = "INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND"

GRPC = [
    # which model
    ("Predict", predict_pb2.PredictRequest(), INVALID, "Missing ModelSpec"),
    ("Classify", classification_pb2.ClassificationRequest(), INVALID, "Missing ModelSpec"),
    ("Regress", regression_pb2.RegressionRequest(), INVALID, "Missing ModelSpec"),
    ("GetModelMetadata", get_model_metadata_pb2.GetModelMetadataRequest(), INVALID, "Missing ModelSpec"),
    ("GetModelStatus", get_model_status_pb2.GetModelStatusRequest(), INVALID, "Missing ModelSpec"),
    ("Predict", predict(name=""), INVALID, "ModelSpec has no name specified."),
    ("Classify", classify("", name=""), INVALID, "ModelSpec has no name specified."),
    ("MultiInference", multi(), INVALID, "ModelSpec has no name specified."),
    ("Predict", predict(name="m"), MISSING, "Servable not found for request: Latest(m)"),
    ("Classify", classify("", name="m"), MISSING, "Servable not found for request: Latest(m)"),
    ("Regress", regress("", name="m"), MISSING, "Servable not found for request: Latest(m)"),
    ("MultiInference", multi(("m", CLASSIFY, "")), MISSING, "Servable not found for request: Latest(m)"),
    ("Predict", predict(name="m", version=7), MISSING, "Servable not found for request: Specific(m, 7)"),
    (
        "Regress",
        regress("regress", version=6),
        MISSING,
        "Servable not found for request: Specific(test_model, 6)",
    ),
    ("Predict", predict(label="stable"), INVALID, "Unrecognized servable version label: stable"),
    ("Classify", classify("", label="stable"), INVALID, "Unrecognized servable version label: stable"),
    # Predict
    ("Predict", predict(signature="s", inputs=A), FAILED, 'Serving signature key "s" not found.'),
    (
        "Predict",
        predict(),
        INVALID,
        "input size does not match signature: 0!=1 len({}) != len({prompt}). "
        "Sent extra: {}. Missing but required: {prompt}.",
    ),
    (
        "Predict",
        predict(inputs={"prompt": ["a"], "b": ["a"], "a": ["a"]}),
        INVALID,
        "input size does not match signature: 3!=1 len({a,b,prompt}) != len({prompt}). "
        "Sent extra: {a,b}. Missing but required: {}.",
    ),
    (
        "Predict",
        predict(inputs={"q": ["a"]}),
        INVALID,
        "Signature input alias: prompt(feed name: serving_default_prompt:0) not found in "
        "request and no default value provided. Inputs expected to be in the request {q}, "
        "or default input alias set: ",
    ),
    (
        "Predict",
        predict(signature="with_default", inputs={"prompt": ["a"], "q": ["a"]}),
        INVALID,
        "Inputs contains invalid name. Used request inputs: prompt, request input: prompt,q",
    ),
    (
        "Predict",
        predict(["q"], A),
        INVALID,
        "output tensor alias not found in signature: q Outputs expected to be in the set {text}.",
    ),
    ("Predict", predict(["text", "text"], A), INVALID, "duplicate output tensor alias: text"),
    (
        "Predict",
        predict(inputs={"prompt": [1.0]}),
        INVALID,
        "Expects arg[0] to be string but float is provided",
    ),
    (
        "Predict",
        predict(signature="numeric", inputs={"x": np.float64([[1, 2]]), "n": np.int32([1])}),
        INVALID,
        "Expects arg[1] to be float but double is provided",
    ),
    (
        "Predict",
        predict(signature="__saved_model_init_op"),
        INVALID,
        "Signature inputs and outputs must be dense tensors. Received: __saved_model_init_op",
    ),
    ("Predict", predict(inputs={"prompt": None}), INVALID, "tensor parsing error: prompt"),
    # Classify
    ("Classify", classify("s"), INVALID, "No signature was found with the name: s"),
    ("Classify", classify("scores", NO_EXAMPLES), INVALID, "Input is empty."),
    ("Classify", classify("numeric"), INVALID, "Expected one input Tensor."),
    ("Classify", classify("dtypes"), INVALID, "Expected one or two output Tensors, found 5"),
    ("Classify", classify(""), FAILED, "No classification inputs found in SignatureDef: ..."),
    (
        "Classify",
        classify("regress"),
        FAILED,
        'Expected classification signature outputs to contain at least one of "classes" or "scores". '
        "Signature was: ...",
    ),
    (
        "Classify",
        classify("scores_1d"),
        INVALID,
        "Expected Tensor shape: [batch_size num_classes] but got [2]",
    ),
    ("Classify", classify("scores_double"), INVALID, "Expected scores Tensor of DT_FLOAT. Got: DT_DOUBLE"),
    (
        "Classify",
        classify("scores_as_classes"),
        INVALID,
        "Expected classes Tensor of DT_STRING. Got: DT_FLOAT",
    ),
    ("Classify", classify("scores_batch"), INVALID, "Expected scores output batch size of 2. Got: 4"),
    (
        "Classify",
        classify("widths"),
        INVALID,
        "Tensors class and score should match in dim_size(1). Got 1 vs. 2",
    ),
    # Regress
    ("Regress", regress("s"), INVALID, "No signature was found with the name: s"),
    ("Regress", regress("regress", NO_EXAMPLES), INVALID, "Input is empty."),
    ("Regress", regress("numeric"), INVALID, "Expected one input Tensor."),
    ("Regress", regress("classify"), INVALID, "Expected one output Tensor."),
    ("Regress", regress(""), FAILED, "No regression inputs found in SignatureDef: ..."),
    ("Regress", regress("other_output"), FAILED, "No regression outputs found in SignatureDef: ..."),
    (
        "Regress",
        regress("outputs_2d"),
        INVALID,
        "Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got [2,2]",
    ),
    (
        "Regress",
        regress("outputs_batch"),
        INVALID,
        "Input batch size did not match output batch size: 2 vs. 4",
    ),
    ("Regress", regress("outputs_double"), INVALID, "Expected output Tensor of DT_FLOAT.  Got: DT_DOUBLE"),
    # MultiInference
    (
        "MultiInference",
        multi(("test_model", CLASSIFY, "scores"), ("", CLASSIFY, "classes")),
        INVALID,
        "Found ModelSpec with an empty model name.",
    ),
    (
        "MultiInference",
        multi(("test_model", CLASSIFY, "scores"), ("m", CLASSIFY, "classes")),
        INVALID,
        "All ModelSpecs in a MultiInferenceRequest must access the same model name.",
    ),
    (
        "MultiInference",
        multi(*2 * [("test_model", CLASSIFY, "scores")]),
        INVALID,
        "Duplicate evaluation of signature: scores",
    ),
    (
        "MultiInference",
        multi(("test_model", CLASSIFY, "s")),
        INVALID,
        "Requested signature not found in model graph: s",
    ),
    (
        "MultiInference",
        multi(("test_model", "m", "scores")),
        "UNIMPLEMENTED",
        "Unsupported signature method_name: m",
    ),
    (
        "MultiInference",
        multi(("test_model", CLASSIFY, "classify"), ("test_model", REGRESS, "regress")),
        INVALID,
        "Input tensor must be the same for all Signatures.",
    ),
    ("MultiInference", multi(("test_model", CLASSIFY, "scores"), xs=()), INVALID, "Input is empty."),
    # metadata and status
    (
        "GetModelMetadata",
        metadata(),
        INVALID,
        "GetModelMetadataRequest must specify at least one metadata_field",
    ),
    ("GetModelMetadata", metadata("f"), INVALID, "Metadata field f is not supported"),
    (
        "GetModelMetadata",
        metadata("signature_def", name="m"),
        MISSING,
        "Servable not found for request: Latest(m)",
    ),
    ("GetModelMetadata", metadata("signature_def", name=""), INVALID, "ModelSpec has no name specified."),
    ("GetModelStatus", status(version=6), MISSING, "Could not find version 6 of model test_model"),
    (
        "GetModelStatus",
        status(name="m", label="ignored"),
        MISSING,
        "Could not find any versions of model m",
    ),
    # configuration; more in test_manager.py
    (
        "HandleReloadConfigRequest",
        model_management_pb2.ReloadConfigRequest(),
        INVALID,
        "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is "
        "currently supported",
    ),
]

NOT_FOUND_JSON = "Servable not found for request: Specific(test_model, 6)"
REST = [
    ("GET", "/v1/models/", "", 400, "Malformed request: GET /v1/models/"),
    ("GET", "/v1/modelsx", "", 400, "Malformed request: GET /v1/modelsx"),
    ("GET", f"{MODEL}:predict", "", 400, f"Malformed request: GET {MODEL}:predict"),
    ("POST", MODEL, "{}", 400, f"Malformed request: POST {MODEL}"),
    (
        "POST",
        f"{MODEL}/versions/7/labels/a:predict",
        "{}",
        400,
        f"Malformed request: POST {MODEL}/versions/7/labels/a:predict",
    ),
    ("POST", f"{MODEL}/metadata", "{}", 400, f"Malformed request: POST {MODEL}/metadata"),
    ("GET", f"{MODEL}/a/b", "", 400, f"Malformed request: GET {MODEL}/a/b"),
    ("POST", f"{MODEL}:explain", "{}", 400, f"Malformed request: POST {MODEL}:explain"),
    ("GET", f"{MODEL}/versions/6", "", 404, "Could not find version 6 of model test_model"),
    ("GET", "/v1/models/m", "", 404, "Could not find any versions of model m"),
    ("GET", "/v1/models/m/metadata", "", 404, "Servable not found for request: Latest(m)"),
    ("GET", f"{MODEL}/labels/l/metadata", "", 400, "Unrecognized servable version label: l"),
    (
        "POST",
        f"{MODEL}/versions/18446744073709551615:predict",
        "{}",
        400,
        "Failed to convert version: 18446744073709551615 to numeric.",
    ),
    ("POST", f"{MODEL}/versions/6:predict", '{"instances": ["a"]}', 404, NOT_FOUND_JSON),
    ("POST", f"{MODEL}/versions/6:classify", '{"examples": [{}]}', 404, NOT_FOUND_JSON),
    (
        "POST",
        f"{MODEL}/labels/stable%21:regress",
        '{"examples": [{}]}',
        400,
        "Unrecognized servable version label: stable!",
    ),
    ("POST", f"{MODEL}:predict", "", 400, "JSON Parse error: The document is empty"),
    ("POST", f"{MODEL}:classify", "[", 400, "JSON Parse error: Invalid value...."),
    ("POST", f"{MODEL}:predict", "[]", 400, "JSON Value: [] Is not object"),
    (
        "POST",
        f"{MODEL}:predict",
        '{"signature_name": "s", "instances": ["a"]}',
        400,
        'Serving signature name: "s" not found in signature def',
    ),
    ("POST", f"{MODEL}:predict", '{"prompt": "a"}', 400, "Missing 'inputs' or 'instances' key"),
    (
        "POST",
        f"{MODEL}:predict",
        '{"inputs": {"p": ["a"]}}',
        400,
        "JSON object: does not have named input: p",
    ),
    ("POST", f"{MODEL}:predict", '{"inputs": {}}', 400, "Missing named input: prompt in 'inputs' object."),
    (
        "POST",
        f"{MODEL}:predict",
        '{"signature_name": "unequal_rows", "instances": ["a"]}',
        400,
        "Tensor name: b has inconsistent batch size: 2 expecting: 1",
    ),
    (
        "POST",
        f"{MODEL}:predict",
        '{"instances": [1]}',
        400,
        "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: JSON Value: 1 Type: "
        "Number is not of expected type: string",
    ),
    (
        "POST",
        f"{MODEL}:predict",
        '{"signature_name": 5}',
        400,
        "JSON Value: {\n    \"signature_name\": 5\n} not formatted correctly. 'signature_name' key must be "
        "a string value.",
    ),
    (
        "POST",
        f"{MODEL}:predict",
        '{"signature_name": "half", "instances": [1.0]}',
        400,
        "Failed to process element: 0 of 'instances' list. Error: UNIMPLEMENTED: Conversion of JSON Value: "
        "1.0 to type: half",
    ),
    (
        "POST",
        f"{MODEL}:predict",
        '{"signature_name": "checked", "instances": ["123456"]}',
        400,
        "assertion failed: [a prompt must not exceed 5 bytes]...",
    ),
    (
        "POST",
        f"{MODEL}:predict",
        '{"signature_name": "numeric", "inputs": {"x": [[1, 2, 3]], "n": ["a"]}}',
        400,
        'JSON Value: "a" Type: String is not of expected type: int32',
    ),
    (
        "POST",
        f"{MODEL}:predict",
        '{"signature_name": "half", "inputs": [1.0]}',
        501,
        "Conversion of JSON Value: 1.0 to type: half",
    ),
    (
        "POST",
        f"{MODEL}:classify",
        '{"signature_name": "s", "examples": [{}]}',
        400,
        "No signature was found with the name: s",
    ),
    (
        "POST",
        f"{MODEL}:classify",
        '{"signature_name": "scores", "examples": [{"x": 1.0}, {"y": 1.0}]}',
        400,
        MISSING_FEATURE,
    ),
    (
        "POST",
        f"{MODEL}:regress",
        '{"signature_name": "classify", "examples": [{"x": 1.0}]}',
        400,
        "Expected one output Tensor.",
    ),
    (
        "POST",
        f"{MODEL}:regress",
        '{"examples": 1}',
        400,
        "JSON Value: {\n    \"examples\": 1\n} Expecting 'examples' value to be an list/array",
    ),
]


def assert_message(found, wanted):
    if wanted.endswith("..."):
        assert found.startswith(wanted.removesuffix("..."))
    else:
        assert found == wanted


@pytest.mark.parametrize(
    ("call", "request_message", "code", "message"), GRPC, ids=[f"{row[0]}: {row[3][:50]}" for row in GRPC]
)
def test_grpc(server, call, request_message, code, message):
    stub = server.prediction if hasattr(server.prediction, call) else server.models
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, call)(request_message, timeout=TIMEOUT)
    assert caught.value.code().name == code
    assert_message(caught.value.details(), message)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"), REST, ids=[f"{row[3]}: {row[4][:50]}" for row in REST]
)
def test_rest(server, method, path, body, status, message):
    data = body.encode() if method == "POST" else None
    request = urllib.request.Request(server.url + path, data=data, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=TIMEOUT)
    with caught.value as error:
        assert error.code == status
        assert error.headers["Content-Type"] == "application/json"
        body = json.loads(error.read())
    assert list(body) == ["error"] and "Traceback" not in body["error"] and "{{node" not in body["error"]
    assert_message(body["error"], message)
