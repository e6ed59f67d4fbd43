"""The requests beside a model are run before it is served; one that fails keeps it from being served."""

import shutil

import grpc
import numpy as np
import pytest
import tensorflow as tf
from kerasllm_serving.__main__ import main
from kerasllm_serving.errors import ServingError, StartupError
from kerasllm_serving.inference import CLASSIFY
from kerasllm_serving.model import Servable
from kerasllm_serving.warmup import FILE, warm_up
from tensorflow_serving.apis import prediction_log_pb2


@pytest.fixture(scope="module")
def servable(saved_model):
    servable = Servable(saved_model)
    yield servable
    servable.close()


@pytest.fixture
def write(tmp_path):
    """Writes records into a folder and returns that."""

    def write_records(*records):
        file = tmp_path / FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        with tf.io.TFRecordWriter(str(file)) as writer:
            for record in records:
                writer.write(record if isinstance(record, bytes) else record.SerializeToString())
        return tmp_path

    return write_records


def make_log(kind, signature, rows=(0.5,)):
    log = prediction_log_pb2.PredictionLog()
    request = getattr(log, kind).request
    if kind == "multi_inference_log":
        task = request.tasks.add(method_name=CLASSIFY)
        task.model_spec.name, task.model_spec.signature_name = "any", signature
    else:
        request.model_spec.signature_name = signature
    if kind == "predict_log":
        request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.float32(rows)))
    else:
        for x in rows:
            example = request.input.example_list.examples.add()
            example.features.feature["x"].float_list.value.append(x)
    return log


def test_all_kinds_are_run(servable, write):
    runs = []

    def run(feeds, fetches):
        runs.append(sorted(feeds))
        return servable.run(feeds, fetches)

    folder = write(
        make_log("predict_log", "float32"),
        make_log("classify_log", "classify"),
        make_log("regress_log", "regress"),
        make_log("multi_inference_log", "scores"),
        prediction_log_pb2.PredictionLog(),  # which upstream passes over
    )
    assert warm_up(servable, folder, run) == 5
    signatures = [servable.signatures[name] for name in ("float32", "classify", "regress", "scores")]
    assert runs == [[info.name for info in signature.inputs.values()] for signature in signatures]
    runs.clear()
    assert warm_up(servable, folder, run, iterations=3) == 5
    assert len(runs) == 12


def test_what_fails(servable, write, tmp_path):
    assert warm_up(servable, tmp_path / "nothing", servable.run) == 0
    session_run = prediction_log_pb2.PredictionLog()
    session_run.session_run_log.SetInParent()
    for log, code, message in (
        (make_log("regress_log", "s"), "INVALID_ARGUMENT", "No signature was found with the name: s"),
        (make_log("classify_log", "scores", rows=()), "INVALID_ARGUMENT", "Input is empty."),
        (session_run, "UNIMPLEMENTED", "Unsupported log_type for warmup: session_run_log"),
    ):
        with pytest.raises(ServingError) as caught:
            warm_up(servable, write(log), servable.run)
        assert (caught.value.code, caught.value.message) == (grpc.StatusCode[code], message)
    with pytest.raises(StartupError, match="TFRecord file of PredictionLog. Received: .*requests"):
        warm_up(servable, write(b"no message"), servable.run)
    folder = write(make_log("predict_log", "float32"))
    with (folder / FILE).open("ab") as file:
        file.write(b"no record" * 9)
    with pytest.raises(StartupError, match="TFRecord file"):
        warm_up(servable, folder, servable.run)
    empty = prediction_log_pb2.PredictionLog()
    assert warm_up(servable, write(*1000 * [empty]), servable.run) == 1000
    with pytest.raises(StartupError, match="at most 1000. Received: more"):
        warm_up(servable, write(*1001 * [empty]), servable.run)


def test_a_model_that_fails_its_requests_is_not_served(saved_model, write, capsys):
    folder = write(make_log("regress_log", "scores_1d"))
    base = folder / "base"
    shutil.copytree(saved_model, base / "1")
    (base / "1" / FILE).parent.mkdir()
    shutil.copy(folder / FILE, base / "1" / FILE)
    assert main([f"--model_base_path={base}", "--host=127.0.0.1", "--port=0"]) == 1
    assert "No regression outputs found in SignatureDef" in capsys.readouterr().err
