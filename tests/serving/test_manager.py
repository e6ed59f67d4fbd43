"""Versions come and go while requests run; a bad one leaves the good one in place."""

import shutil
import threading
import time
import urllib.request

import grpc
import pytest
from kerasllm_serving.errors import ServingError, StartupError
from kerasllm_serving.manager import ModelConfig, ModelManager, States, read_config_file
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_management_pb2,
    model_pb2,
    predict_pb2,
)

SECONDS = 60


class Version:
    """What is loaded of a folder that has a file `good`."""

    def __init__(self, name, path, log):
        self.name, self.number, self._log = name, int(path.name), log
        if not (path / "good").exists():
            raise StartupError(f"{path} is broken")
        log.append(("load", name, self.number))

    def close(self):
        self._log.append(("close", self.name, self.number))


@pytest.fixture
def log():
    return []


@pytest.fixture
def make_version(tmp_path):
    def make(name, number, good=True):
        folder = tmp_path / name / str(number)
        folder.mkdir(parents=True)
        if good:
            (folder / "good").touch()
        return tmp_path / name

    return make


@pytest.fixture
def make_manager(log):
    def make(*configs, **options):
        manager = ModelManager(lambda name, number, path: Version(name, path, log), configs, **options)
        manager.start()
        return manager

    return make


def asked(manager, name="m", **fields):
    spec = model_pb2.ModelSpec(name=name)
    if "version" in fields:
        spec.version.value = fields["version"]
    if "label" in fields:
        spec.version_label = fields["label"]
    with manager.use(spec) as loaded:
        return loaded.number


def states(manager, name="m"):
    return {status.version: status.state for status in manager.statuses(model_pb2.ModelSpec(name=name))}


def test_the_new_is_loaded_before_the_old_goes(make_version, make_manager, log):
    base = make_version("m", 1)
    manager = make_manager(ModelConfig("m", base))
    make_version("m", 2)
    manager.poll()
    assert log == [("load", "m", 1), ("load", "m", 2), ("close", "m", 1)]
    assert asked(manager) == 2 and states(manager) == {2: States.AVAILABLE}


def test_a_version_in_use_stays(make_version, make_manager, log):
    base = make_version("m", 1)
    manager = make_manager(ModelConfig("m", base))
    with manager.use(model_pb2.ModelSpec(name="m")):
        make_version("m", 2)
        poll = threading.Thread(target=manager.poll)
        poll.start()
        deadline = time.monotonic() + SECONDS
        while states(manager).get(1) != States.UNLOADING and time.monotonic() < deadline:
            time.sleep(0.005)
        assert asked(manager) == 2  # new requests do not wait
        assert ("close", "m", 1) not in log
    poll.join(SECONDS)
    assert log[-1] == ("close", "m", 1)


def test_a_bad_version_leaves_the_good_one(make_version, make_manager, log, monkeypatch):
    base = make_version("m", 1)
    manager = make_manager(ModelConfig("m", base), max_num_load_retries=1)
    make_version("m", 2, good=False)
    manager.poll()
    assert asked(manager) == 1
    assert states(manager) == {2: States.END, 1: States.AVAILABLE}
    status = manager.statuses(model_pb2.ModelSpec(name="m"))[0].status
    assert status.error_code != 0 and "is broken" in status.error_message
    (base / "2" / "good").touch()
    manager.poll()
    assert asked(manager) == 1  # not before a minute has gone by
    monkeypatch.setattr("kerasllm_serving.manager.time.monotonic", lambda: 1e12)
    manager.poll()
    assert asked(manager) == 2 and states(manager) == {2: States.AVAILABLE}


def test_policies_and_labels(make_version, make_manager):
    for number in (1, 2, 3, 10):
        base = make_version("m", number)
    assert set(states(make_manager(ModelConfig("m", base, latest=2)))) == {3, 10}
    assert set(states(make_manager(ModelConfig("m", base, latest=0)))) == {1, 2, 3, 10}
    manager = make_manager(ModelConfig("m", base, specific=(1, 3), labels={"old": 1, "new": 3}))
    assert asked(manager, label="old") == 1 and asked(manager) == asked(manager, version=3) == 3
    for fields, code, message in (
        ({"label": "other"}, "INVALID_ARGUMENT", "Unrecognized servable version label: other"),
        ({"version": 2}, "NOT_FOUND", r"Servable not found for request: Specific\(m, 2\)"),
        ({"name": "x"}, "NOT_FOUND", r"Servable not found for request: Latest\(x\)"),
        ({"name": ""}, "INVALID_ARGUMENT", "ModelSpec has no name specified."),
    ):
        with pytest.raises(ServingError, match=message) as error:
            asked(manager, **fields)
        assert error.value.code.name == code
    bad = ModelConfig("m", base, labels={"stable": 3})
    with pytest.raises(ServingError, match="assign label to version 3 of model m, which is not") as error:
        make_manager(bad)
    assert error.value.code is grpc.StatusCode.FAILED_PRECONDITION
    assert asked(make_manager(bad, allow_labels_for_unavailable=True)) == 10


def test_nothing_to_serve(make_version, make_manager, tmp_path):
    base = make_version("m", 1, good=False)
    with pytest.raises(StartupError, match="is broken"):
        make_manager(ModelConfig("m", base))
    with pytest.raises(StartupError, match="must have one of the versions"):
        make_manager(ModelConfig("m", base, specific=(4,)))
    with pytest.raises(StartupError, match="must be an existing folder"):
        make_manager(ModelConfig("m", tmp_path / "nowhere"))


def test_a_folder_that_is_gone_changes_nothing(make_version, make_manager):
    base = make_version("m", 1)
    manager = make_manager(ModelConfig("m", base))
    shutil.rmtree(base)
    manager.poll()
    assert asked(manager) == 1


def test_config_file(tmp_path):
    file = tmp_path / "models.config"
    file.write_text(
        """model_config_list {
          config { name: "a" base_path: "/models/a" model_platform: "tensorflow" }
          config { name: "b" base_path: "/models/b"
            model_version_policy { specific { versions: 2 versions: 5 } }
            version_labels { key: "stable" value: 2 } }
          config { name: "c" base_path: "/models/c" model_version_policy { all {} } }
          config { name: "d" base_path: "/models/d" model_version_policy { latest { num_versions: 3 } } }
        }"""
    )
    a, b, c, d = read_config_file(file)
    assert (a.latest, a.specific, a.labels) == (1, (), {})
    assert (b.specific, b.labels) == ((2, 5), {"stable": 2})
    assert (c.latest, d.latest) == (0, 3)
    for text, message in (
        ("model_config_list {", "text format"),
        ("custom_model_config {}", "Only ModelConfigList is currently supported"),
        ('model_config_list { config { name: "a" base_path: "a" } }', r"absolute path .* base_path\(\)=a"),
        (
            "model_config_list {" + 2 * 'config { name: "a" base_path: "/a" }' + "}",
            "Illegal to list model a multiple times in config list",
        ),
        (
            'model_config_list { config { name: "a" base_path: "/a" model_platform: "tflite" } }',
            "Model a must be of the platform tensorflow. Received: tflite",
        ),
        (
            'model_config_list { config { name: "a" base_path: "/a" logging_config {} } }',
            "No request-logger-creator provided.",
        ),
        (
            'model_config_list { config { name: "a" base_path: "/a" model_version_policy '
            "{ specific {} } } }",
            "Model a must have versions where its policy is specific. Received: none",
        ),
    ):
        file.write_text(text)
        with pytest.raises(StartupError, match=message):
            read_config_file(file)


# The running server


def predict(server, name, **fields):
    request = predict_pb2.PredictRequest()
    request.model_spec.CopyFrom(model_pb2.ModelSpec(name=name, signature_name="scalar"))
    if "label" in fields:
        request.model_spec.version_label = fields["label"]
    request.inputs["k"].dtype = 9  # DT_INT64
    request.inputs["k"].tensor_shape.SetInParent()
    request.inputs["k"].int64_val.append(4)
    return server.prediction.Predict(request, timeout=SECONDS).model_spec.version.value


def test_hot_reload_under_load(start_server, saved_model, tmp_path):
    """A new version, a broken one, another configuration: no request fails."""
    base = tmp_path / "first"
    shutil.copytree(saved_model, base / "1")
    file = tmp_path / "models.config"
    file.write_text(f'model_config_list {{ config {{ name: "a" base_path: "{base}" }} }}')
    server = start_server(f"--model_config_file={file}", "--model_config_file_poll_wait_seconds=1")
    versions, stop = [], threading.Event()

    def ask():
        while not stop.is_set():
            versions.append(predict(server, "a"))

    def wait_for(holds):
        deadline = time.monotonic() + SECONDS
        while not holds() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert holds()

    def version_states(name="a"):
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        statuses = server.models.GetModelStatus(request, timeout=SECONDS).model_version_status
        return {status.version: status.state for status in statuses}

    def answers(name):
        try:
            return predict(server, name)
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.NOT_FOUND
            return False

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        shutil.copytree(saved_model, tmp_path / "copy")
        (tmp_path / "copy").rename(base / "2")
        wait_for(lambda: version_states() == {2: States.AVAILABLE})
        (base / "3").mkdir()
        wait_for(lambda: version_states().get(3) == States.END)
        assert version_states()[2] == States.AVAILABLE
        file.write_text(
            f"""model_config_list {{
              config {{ name: "a" base_path: "{base}" model_version_policy {{ specific {{ versions: 1
                versions: 2 }} }} version_labels {{ key: "stable" value: 1 }} }}
              config {{ name: "b" base_path: "{base}" model_version_policy {{ specific {{
                versions: 1 }} }} }} }}"""
        )
        wait_for(lambda: version_states() == dict.fromkeys((1, 2), States.AVAILABLE))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(versions) == {1, 2} and versions[-1] == 2
    wait_for(lambda: answers("b"))
    assert predict(server, "b") == 1
    assert predict(server, "a", label="stable") == 1
    url = f"{server.url}/v1/models/a/labels/stable/metadata"
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        assert b'"version": "1"' in answer.read()

    def reload(*configs):
        request = model_management_pb2.ReloadConfigRequest()
        for name, path in configs:
            request.config.model_config_list.config.add(name=name, base_path=str(path))
        if not configs:
            request.config.custom_model_config.SetInParent()
        return server.models.HandleReloadConfigRequest(request, timeout=SECONDS)

    for configs, message in (
        ((), "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList"),
        ((("a", base), ("a", base)), "Illegal to list model a multiple times in config list"),
        (
            (("a", "relative"),),
            "Expected model a to have an absolute path or URI; got base_path()=relative",
        ),
        ((("a", tmp_path / "no"),), f"Could not find base path {tmp_path / 'no'} for servable a"),
    ):
        with pytest.raises(grpc.RpcError) as error:
            reload(*configs)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert message in error.value.details()
    (base / "3").rmdir()
    reload(("c", base))
    assert predict(server, "c") == 2
    with pytest.raises(grpc.RpcError, match="Servable not found"):
        predict(server, "a")
