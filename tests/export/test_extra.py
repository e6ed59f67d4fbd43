"""What lies beside the graph is true: warm-up requests are answered, examples and the manifest fit."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import json_format

from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config
from kerasllm.export.extra import describe_source, hash_weights, name_source
from kerasllm.export.signatures import read_signatures
from kerasllm.export.warmup import make_record, read_warmup, write_warmup


@pytest.fixture(scope="module")
def version(served):
    return served / "1"


@pytest.fixture(scope="module")
def extra(version):
    return version / "assets.extra"


@pytest.fixture(scope="module")
def manifest(extra):
    return json.loads((extra / "kerasllm_manifest.json").read_text())


def test_warmup_requests_are_answered(version, extra, manifest, causal_lm):
    """One that fails would keep TensorFlow Serving from loading the model."""
    signatures = tf.saved_model.load(str(version)).signatures
    requests = read_warmup(extra / "tf_serving_warmup_requests")
    assert {name for name, _ in requests} == set(signatures) == set(manifest["signature_details"])
    assert len(requests) == manifest["warmup_records"]
    for name, inputs in requests:
        outputs = signatures[name](**{key: tf.constant(value) for key, value in inputs.items()})
        if name == "generate":
            live = causal_lm.generate_tokens(inputs["prompt"][0].decode(), 4)[0]
            assert outputs["token_ids"].numpy().tolist() == [live.token_ids]


def test_warmup_has_several_lengths(tmp_path, tokenizer):
    config = GPT2Config(vocabulary_size=400, context_length=256, num_layers=1, num_heads=2, dim=8)
    path = CausalLM(GPT2(config), tokenizer, GenerationConfig(max_new_tokens=2)).export(tmp_path / "1")
    requests = read_warmup(path / "assets.extra" / "tf_serving_warmup_requests")
    lengths = [len(tokenizer.encode(r["prompt"][0].decode())) for name, r in requests if name == "generate"]
    assert len(lengths) == 2 and lengths[0] <= 8 < 48 < lengths[1] <= 64


def test_records_are_those_of_tensorflow_serving(tmp_path):
    log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    inputs = {
        "prompt": np.array([b"a\xff", "é".encode()], object),
        "n": np.array([1, 2], "int32"),
        "t": np.array(0.5, "float32"),
    }
    record = make_record("generate", "tensorflow/serving/predict", inputs)
    log = log_pb2.PredictionLog.FromString(record)
    request = log.predict_log.request
    assert log.WhichOneof("log_type") == "predict_log"
    assert request.model_spec.signature_name == "generate" and set(request.inputs) == set(inputs)
    for name, value in inputs.items():
        read = tf.make_ndarray(request.inputs[name])
        assert read.dtype == value.dtype and read.tolist() == value.tolist()
    example = tf.train.Example()
    example.features.feature["text"].bytes_list.value.append(b"a")
    examples = np.array([example.SerializeToString()], object)
    record = make_record("classify", "tensorflow/serving/classify", {"inputs": examples})
    request = log_pb2.PredictionLog.FromString(record).classify_log.request
    assert list(request.input.example_list.examples) == [example]
    assert request.model_spec.signature_name == "classify"
    # And back, from messages that the real package wrote.
    assert write_warmup(tmp_path / "requests", [log.SerializeToString(), record]) == 2
    (_, first), (name, second) = read_warmup(tmp_path / "requests")
    assert first["prompt"].tolist() == inputs["prompt"].tolist()
    assert name == "classify" and second["inputs"].tolist() == examples.tolist()
    with pytest.raises(ValueError, match="at most 1000 records. Received: 1001"):
        write_warmup(tmp_path / "requests", [record] * 1001)


def test_manifest(version, manifest, causal_lm):
    assert manifest["parameters"] == sum(int(np.prod(v.shape)) for v in causal_lm.model.weights)
    details = manifest["signature_details"]["generate"]
    assert details["inputs"]["prompt"] == {"dtype": "string", "shape": [None]}
    assert details["outputs"]["token_ids"] == {"dtype": "int32", "shape": [None, None]}
    if "generate_scalar" in manifest["signature_details"]:
        assert manifest["signature_details"]["generate_scalar"]["inputs"]["seed"]["default"] == 0
    assert manifest["weights_sha256"] == hash_weights(causal_lm.model)
    signatures = read_signatures(version)
    assert sorted(signatures) == sorted(manifest["signature_details"])


def test_hash_is_of_the_weights(random_lm, causal_lm, tmp_path):
    first = hash_weights(random_lm.model)
    again = CausalLM.from_pretrained(random_lm.save_pretrained(tmp_path / "model"))
    assert hash_weights(again.model) == first != hash_weights(causal_lm.model)
    bias = again.model.final_norm.bias
    bias.assign(np.nextafter(bias.numpy(), 9, dtype="float32"))
    assert hash_weights(again.model) != first


def test_examples_of_the_card_are_answered(extra, manifest):
    """The commands parse as a shell's, their bodies as JSON, and both calls say the same."""
    card = (extra / "README.md").read_text()
    assert f"{manifest['parameters']:,}" in card and manifest["weights_sha256"] in card
    commands = re.findall(r"^(?:curl|grpcurl) .*$", card, re.MULTILINE)
    bodies = {}
    for command in commands:
        words = shlex.split(command)
        body = json.loads(words[words.index("-d") + 1])
        if words[0] == "curl":
            bodies[body.get("signature_name", "serving_default")] = body
        else:
            predict_pb2 = pytest.importorskip("tensorflow_serving.apis.predict_pb2")
            request = json_format.ParseDict(body, predict_pb2.PredictRequest())
            inputs = bodies[request.model_spec.signature_name]["inputs"]
            for name, value in inputs.items():
                read = tf.make_ndarray(request.inputs[name])
                texts = [item.decode() for item in read.ravel()] if read.dtype == object else read.ravel()
                assert list(texts) == pytest.approx(np.ravel(np.array(value)).tolist())
                assert list(read.shape) == list(np.shape(value))
    assert bodies == manifest["examples"]
    assert set(manifest["signatures"]) - set(bodies) <= {"decode"}
    compile(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], "card", "exec")


def test_source(random_lm, tmp_path, extra):
    folder = random_lm.save_pretrained(tmp_path / "my_checkpoint")
    assert "license" not in describe_source(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    source = describe_source(folder)
    assert source["name"] == "my_checkpoint" and source["license"] == "apache-2.0"
    assert re.fullmatch("[0-9a-f]{64}", source["sha256"]["model.safetensors"])
    assert describe_source(folder, "MIT")["license"] == "MIT"
    copy = tmp_path / "1"
    shutil.copytree(extra, copy / "assets.extra")
    name_source(copy, source)
    assert "| license | apache-2.0 |" in (copy / "assets.extra" / "README.md").read_text()


def test_weights_are_stored_once_and_not_in_the_graph(version, causal_lm):
    """A graph is one message of at most 2 GB; the files of variables have no such bound."""
    graph = (version / "saved_model.pb").read_bytes()
    values = [weight.numpy().tobytes() for weight in causal_lm.model.weights]
    assert not any(value in graph for value in values if len(set(value)) > 8)
    stored = b"".join(file.read_bytes() for file in sorted(version.glob("variables/*.data-*")))
    assert all(stored.count(value) == 1 for value in values if len(value) >= 4096)
    assert len(stored) < 1.5 * sum(map(len, values))
