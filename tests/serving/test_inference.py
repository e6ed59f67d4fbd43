"""Classify, Regress and MultiInference on plain SavedModels, and tf.Examples from JSON."""

import json
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
import tensorflow as tf
from kerasllm_serving.errors import ServingError
from kerasllm_serving.inference import CLASSIFY, REGRESS, run_classify, run_multi_inference, run_regress
from kerasllm_serving.json_examples import input_from_json
from kerasllm_serving.json_tensor import parse_object
from kerasllm_serving.model import ModelOptions, Servable
from kerasllm_serving.warmup import warm_up
from tensorflow_serving.apis import classification_pb2, inference_pb2, regression_pb2

TIMEOUT = 30
ROWS = [(0.25, b"a"), (0.5, b"b")]


def example(**features):
    made = tf.train.Example()
    for name, value in features.items():
        if isinstance(value, bytes):
            made.features.feature[name].bytes_list.value.append(value)
        else:
            made.features.feature[name].float_list.value.append(value)
    return made


def fill(message, signature="", rows=ROWS, context=None, model="test_model"):
    """Puts model, signature and examples into a request."""
    message.model_spec.name = model
    message.model_spec.signature_name = signature
    examples = message.input.example_list
    if context is not None:
        examples = message.input.example_list_with_context
        examples.context.CopyFrom(context)
    examples.examples.extend([example(x=x, name=name) if name else example(x=x) for x, name in rows])
    return message


def classify_request(*args, **kwargs):
    return fill(classification_pb2.ClassificationRequest(), *args, **kwargs)


def regress_request(*args, **kwargs):
    return fill(regression_pb2.RegressionRequest(), *args, **kwargs)


def pairs(result):
    return [[(each.label, each.score) for each in row.classes] for row in result.classifications]


# gRPC


def test_classify(server):
    response = server.prediction.Classify(classify_request("classify"), timeout=TIMEOUT)
    assert pairs(response.result) == [[("a", 0.25), ("other", 0.75)], [("b", 0.5), ("other", 0.5)]]
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("test_model", 7, "classify")
    scores = server.prediction.Classify(classify_request("scores"), timeout=TIMEOUT)
    assert pairs(scores.result) == [[("", 0.25), ("", 0.75)], [("", 0.5), ("", 0.5)]]
    classes = server.prediction.Classify(classify_request("classes"), timeout=TIMEOUT)
    assert pairs(classes.result) == [[("a", 0.0)], [("b", 0.0)]]


def test_regress(server):
    for signature in ("regress", "regress_column"):
        response = server.prediction.Regress(regress_request(signature), timeout=TIMEOUT)
        assert [each.value for each in response.result.regressions] == [0.5, 1.0]
        assert response.model_spec.signature_name == signature


def test_a_context_belongs_to_each_example(server):
    request = classify_request("classify", [(0.25, None), (0.5, b"own")], example(name=b"shared"))
    rows = pairs(server.prediction.Classify(request, timeout=TIMEOUT).result)
    assert [row[0][0] for row in rows] == ["shared", "own"]


def test_an_answer_is_text(server):
    """A label that is no UTF-8 could not be put into the message."""
    response = server.prediction.Classify(classify_request("classes", [(1.0, b"\xff!")]), timeout=TIMEOUT)
    assert pairs(response.result) == [[("\ufffd!", 0.0)]]


def multi_request(*tasks, rows=ROWS, model="test_model"):
    request = inference_pb2.MultiInferenceRequest()
    request.input.example_list.examples.extend([example(x=x, name=name) for x, name in rows])
    for method, signature in tasks:
        task = request.tasks.add(method_name=method)
        task.model_spec.name, task.model_spec.signature_name = model, signature
    return request


def test_multi_inference_over_grpc(server):
    request = multi_request((CLASSIFY, "classify"))
    (result,) = server.prediction.MultiInference(request, timeout=TIMEOUT).results
    assert pairs(result.classification_result)[0][0] == ("a", 0.25)
    assert result.model_spec.version.value == 7
    # Each function of TensorFlow 2 has an input of its own.
    request = multi_request((CLASSIFY, "classify"), (REGRESS, "regress"))
    with pytest.raises(grpc.RpcError) as caught:
        server.prediction.MultiInference(request, timeout=TIMEOUT)
    assert caught.value.details() == "Input tensor must be the same for all Signatures."


@pytest.fixture(scope="module")
def shared_input(tmp_path_factory):
    """A graph of TensorFlow 1 with a classification and a regression of the same examples."""
    v1 = tf.compat.v1
    path = tmp_path_factory.mktemp("v1") / "3"
    with tf.Graph().as_default(), v1.Session() as session:
        serialized = v1.placeholder(tf.string, [None], name="examples")
        x = v1.parse_example(serialized, {"x": v1.FixedLenFeature([], tf.float32)})["x"]
        scale = v1.get_variable("scale", initializer=3.0)
        session.run(v1.global_variables_initializer())
        make = v1.saved_model.signature_def_utils
        classify = make.classification_signature_def(serialized, None, (scale * x)[:, None])
        regress = make.regression_signature_def(serialized, -x)
        builder = v1.saved_model.Builder(str(path))
        signatures = {"c": classify, "r": regress, "serving_default": regress}
        builder.add_meta_graph_and_variables(session, ["serve"], signature_def_map=signatures)
        builder.save()
    servable = Servable(path, ModelOptions(checks_method_names=True))
    yield servable
    servable.close()


def test_multi_inference_runs_the_graph_once(shared_input):
    runs = []

    def run(feeds, fetches):
        runs.append(fetches)
        return shared_input.run(feeds, fetches)

    request = multi_request((CLASSIFY, "c"), (REGRESS, "r"))
    first, second = run_multi_inference(shared_input, request, run).results
    assert len(runs) == 1 and len(runs[0]) == 2
    assert pairs(first.classification_result) == [[("", 0.75)], [("", 1.5)]]
    assert [each.value for each in second.regression_result.regressions] == [-0.25, -0.5]
    assert (first.model_spec.signature_name, second.model_spec.signature_name) == ("c", "r")


def test_method_names_are_checked_where_asked(shared_input, saved_model):
    run = shared_input.run
    assert run_classify(shared_input, classify_request("c"), run).model_spec.version.value == 3
    assert run_regress(shared_input, regress_request(), run).model_spec.signature_name == "serving_default"
    for call, request, kind, method, found in (
        (run_classify, classify_request("r"), "classification", CLASSIFY, REGRESS),
        (run_regress, regress_request("c"), "regression", REGRESS, CLASSIFY),
    ):
        with pytest.raises(ServingError) as caught:
            call(shared_input, request, run)
        message = f"Expected {kind} signature method_name to be {method}. Was: {found}"
        assert (caught.value.code.name, caught.value.message) == ("INVALID_ARGUMENT", message)


def test_an_exported_classifier(make_bert, tmp_path):
    """What the library exports answers Classify, and its own warm-up requests."""
    from kerasllm import SequenceClassifier

    task = SequenceClassifier(*make_bert("classifier", labels=("bad", "fair", "good")))
    servable = Servable(task.export(tmp_path / "1"), ModelOptions(checks_method_names=True))
    texts = ["Mia went home.", "the garden"]
    request = classification_pb2.ClassificationRequest()
    request.model_spec.signature_name = "classify"
    request.input.example_list.examples.extend([example(text=text.encode()) for text in texts])
    answered = pairs(run_classify(servable, request, servable.run).result)
    for row, live in zip(answered, task.classify(texts), strict=True):
        wanted = {entry["label"]: entry["score"] for entry in live}
        assert dict(row) == pytest.approx(wanted, abs=1e-5)
    assert warm_up(servable, tmp_path / "1", servable.run) > 0
    servable.close()


# REST


def post(server, verb, body):
    if not isinstance(body, str):
        body = json.dumps(body)
    url = f"{server.url}/v1/models/test_model:{verb}"
    try:
        with urllib.request.urlopen(url, data=body.encode(), timeout=TIMEOUT) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["error"]


def test_rest_classify_and_regress(server):
    rows = [{"x": 0.25, "name": "a"}, {"x": [0.1], "name": {"b64": "Yg=="}}]
    status, answer = post(server, "classify", {"signature_name": "classify", "examples": rows})
    assert status == 200
    assert answer == {"results": [[["a", 0.25], ["other", 0.75]], [["b", 0.1], ["other", 0.9]]]}
    status, answer = post(server, "regress", {"signature_name": "regress", "examples": rows})
    assert (status, answer) == (200, {"results": [0.5, 0.2]})
    body = {"signature_name": "classify", "context": {"name": "shared"}, "examples": [{"x": 1.0}]}
    assert post(server, "Classify", body)[1] == {"results": [[["shared", 1.0], ["other", 0.0]]]}
    status, answer = post(server, "regress", '{"signature_name": "regress", "examples": [{"x": NaN}]}')
    assert status == 200 and np.isnan(answer["results"][0])


def features(body):
    return input_from_json(parse_object(body.encode())).example_list.examples[0].features.feature


def test_kinds_of_features():
    found = features(
        '{"examples": [{"text": "ä", "texts": ["a", {"b64": "/w=="}], "whole": 3, '
        '"flags": [true, false, 2], "fraction": [1.5, 2e0, NaN], "huge": 1e39, '
        '"beyond": 36893488147419103232, "none": []}]}'
    )
    assert list(found["text"].bytes_list.value) == ["ä".encode()]
    assert list(found["texts"].bytes_list.value) == [b"a", b"\xff"]
    assert list(found["whole"].int64_list.value) == [3]
    assert list(found["flags"].int64_list.value) == [1, 0, 2]
    assert list(found["fraction"].float_list.value)[:2] == [1.5, 2.0]
    assert list(found["huge"].float_list.value) == [np.inf]
    assert list(found["beyond"].float_list.value) == [2.0**65]
    assert found["none"].WhichOneof("kind") is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"examples": [{"f": null}]}', "Feature: f has element with unexpected JSON type: Null"),
        ('{"examples": [{"f": [[1]]}]}', "Feature: f has element with unexpected JSON type: Array"),
        ('{"examples": [{"f": {"a": 1}}]}', "Feature: f has element with unexpected JSON type: Object"),
        ('{"examples": [{"f": [1, 2.5]}]}', "Unexpected element type in feature: f expecting type: int64"),
        ('{"examples": [{"f": [2.5, 1]}]}', "Unexpected element type in feature: f expecting type: float"),
        ('{"examples": [{"f": ["a", 1]}]}', "Unexpected element type in feature: f expecting type: bytes"),
        (
            '{"examples": [{"f": 9223372036854775808}]}',
            "Feature: f has uint64 element. Only int64 is supported.",
        ),
        ('{"examples": [{"f": {"b64": "?"}}]}', "Unable to base64 decode"),
        ('{"examples": [{"f": "\\ud800"}]}', "JSON Parse error: The surrogate pair in string is invalid."),
        ('{"examples": [{"\\ud800": 1}]}', "JSON Parse error: The surrogate pair in string is invalid."),
        ('{"examples": [1]}', "Example must be JSON object but got JSON Number"),
        ('{"context": [], "examples": [{}]}', "Example must be JSON object but got JSON Array"),
        ("{}", "JSON Value: {} When method is classify, key 'examples' is expected and was not found"),
        ('{"examples": {}}', "Expecting 'examples' value to be an list/array"),
        ('{"examples": []}', "'examples' value is an empty array"),
    ],
)
def test_refused_examples(body, message):
    with pytest.raises(ServingError) as caught:
        features(body)
    assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert message in caught.value.message
