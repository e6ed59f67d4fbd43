"""The files for the official server: protos by their text format, YAML and JSON by their schemas."""

import json
import pathlib
import re
import shutil

import pytest
import yaml
from google.protobuf import text_format
from kerasllm_serving.batching import read_batching_parameters
from kerasllm_serving.config_files import read_config
from tensorflow_serving.config import model_server_config_pb2

from kerasllm.data.assets import asset_path
from kerasllm.export.deployment import deployment_files, find_models, write_deployment

FOLDER = pathlib.Path(__file__).parents[2] / "serving" / "tf_serving"
MODELS = {"my_embedder": [1], "my_model": [1, 2]}


@pytest.fixture(scope="module")
def files():
    return {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.is_file()}


def test_the_folder_is_what_the_command_writes(files):
    """Change kerasllm/export/deployment.py and write them again, see tools/README.md."""
    assert files == deployment_files(MODELS)


def test_models_config(files):
    config = text_format.Parse(files["models.config"], model_server_config_pb2.ModelServerConfig())
    found = {}
    for model in config.model_config_list.config:
        found[model.name] = list(model.model_version_policy.specific.versions)
        assert model.base_path == f"/models/{model.name}" and model.model_platform == "tensorflow"
        assert set(model.version_labels.values()) <= set(found[model.name])
        assert model.version_labels["stable"] == 1
        assert ("canary" in model.version_labels) == (len(found[model.name]) > 1)
    assert found == MODELS


@pytest.mark.parametrize("most", [1, 3, 32])
def test_batching_config(most, tmp_path):
    """The embedded server takes the file as well, and checks what the official one does."""
    file = tmp_path / "batching.config"
    file.write_text(deployment_files(MODELS, max_batch_size=most)["batching.config"])
    parameters = read_batching_parameters(file)
    assert parameters.max_batch_size == parameters.allowed_batch_sizes[-1] == most
    assert parameters.pad_variable_length_inputs and parameters.batch_timeout_micros > 0


def test_monitoring_config(files):
    config = read_config(FOLDER / "monitoring.config", "MonitoringConfig", "")
    assert config.prometheus_config.enable
    prometheus = yaml.safe_load(files["prometheus.yaml"])
    assert prometheus["scrape_configs"][0]["metrics_path"] == config.prometheus_config.path


def test_compose_and_image(files):
    services = yaml.safe_load(files["compose.yaml"])["services"]
    assert services["serving"]["image"] in files["Dockerfile"]
    flags = services["serving"]["command"]
    assert flags == re.findall(r'"(--[^"]*)"', files["Dockerfile"])
    assert any(flag.startswith("--model_config_file=") for flag in flags)
    # Each file that is mounted is there, and each file that a flag names is mounted and copied.
    mounted = {}
    for service in services.values():
        for volume in service.get("volumes", []):
            source, target = volume.removesuffix(":ro").split(":")
            mounted[target] = source
            assert source == ".." or source.removeprefix("./") in files
    for flag in flags:
        name, _, value = flag.partition("=")
        if name.endswith("_file"):
            assert value in mounted
            assert f"tf_serving/{pathlib.Path(value).name}" in files["Dockerfile"]


def test_kserve(files):
    documents = list(yaml.safe_load_all(files["kserve.yaml"]))
    assert len(documents) == len(MODELS)
    for document, name in zip(documents, sorted(MODELS), strict=True):
        assert document["apiVersion"] == "serving.kserve.io/v1beta1"
        assert document["kind"] == "InferenceService"
        assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
        model = document["spec"]["predictor"]["model"]
        assert model["modelFormat"] == {"name": "tensorflow"} and model["storageUri"].endswith(name)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("name", "schema"), [("compose.yaml", "compose-spec.json"), ("prometheus.yaml", "prometheus.json")]
)
def test_published_schemas(files, name, schema):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((asset_path("schemas") / schema).read_text(encoding="utf-8"))
    validator = jsonschema.Draft201909Validator(schema)
    content = yaml.safe_load(files[name])
    validator.validate(content)
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**content, "no_such_key": 1})


@pytest.mark.reference
def test_published_fields(files):
    """Names and types are those of KServe's own client."""
    classes = json.loads(asset_path("kserve").read_text(encoding="utf-8"))
    plain = {"str": str, "int": int, "bool": bool}
    checked = []

    def check(value, kind, place):
        checked.append(place)
        if kind in classes:
            for key, part in value.items():
                assert key in classes[kind], f"{place}.{key}"
                check(part, classes[kind][key], f"{place}.{key}")
        elif kind == "list[str]":
            assert all(type(part) is str for part in value), place
        elif kind in plain:
            assert type(value) is plain[kind], place
        else:  # Kubernetes' own
            assert kind in ("V1ObjectMeta", "V1ResourceRequirements"), place

    for document in yaml.safe_load_all(files["kserve.yaml"]):
        check(document, "V1beta1InferenceService", "")
        assert {".metadata", ".spec.predictor.minReplicas"} <= set(checked)
        assert ".spec.predictor.model.modelFormat.name" in checked
        document["spec"]["predictor"]["replicas"] = 1
        with pytest.raises(AssertionError, match=r"^\.spec\.predictor\.replicas"):
            check(document, "V1beta1InferenceService", "")


def test_dashboard(files):
    dashboard = json.loads(files["grafana_dashboard.json"])
    uid = yaml.safe_load(files["grafana_datasource.yaml"])["datasources"][0]["uid"]
    places = set()
    for panel in dashboard["panels"]:
        assert panel["datasource"]["uid"] == uid and panel["targets"]
        places.add((panel["gridPos"]["x"], panel["gridPos"]["y"]))
        for target in panel["targets"]:
            query = target["expr"]
            assert ":tensorflow:serving:" in query
            for opening, closing in ("()", "{}", "[]"):
                assert query.count(opening) == query.count(closing), query
    assert len(places) == len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_page_names_files_that_are_there(files):
    named = set(re.findall(r"`([a-zA-Z_]+\.(?:yaml|json|config)|Dockerfile)`", files["README.md"]))
    assert named == set(files) - {"README.md"}
    assert set(re.findall(r"tf_serving/([\w.]+\w)", files["README.md"])) <= set(files)


def test_written_beside_the_models(tmp_path, saved_model):
    for name, version, most in (("a", 1, 256), ("a", 10, 3), ("a", 9, 256), ("b", 1, 8)):
        folder = shutil.copytree(saved_model, tmp_path / name / str(version))
        (folder / "assets.extra").mkdir()
        manifest = {"limits": {"max_batch_size": most}}
        (folder / "assets.extra" / "kerasllm_manifest.json").write_text(json.dumps(manifest))
    shutil.copytree(saved_model, tmp_path / "b" / ".incomplete-2")
    assert find_models(tmp_path) == {"a": [1, 9, 10], "b": [1]}
    target = write_deployment(tmp_path / "a" / "10")
    assert target == tmp_path / "tf_serving"
    config = text_format.Parse(
        (target / "models.config").read_text(), model_server_config_pb2.ModelServerConfig()
    )
    versions = [list(m.model_version_policy.specific.versions) for m in config.model_config_list.config]
    assert versions == [[9, 10], [1]]
    assert "max_batch_size { value: 3 }" in (target / "batching.config").read_text()
    assert "Signatures of `b`: " in (target / "README.md").read_text()
    write_deployment(tmp_path / "a" / "10")  # the same files again
    (target / "batching.config").write_text("# mine")
    with pytest.raises(FileExistsError, match="another is replaced only with `overwrite`.*batching.config"):
        write_deployment(tmp_path / "a" / "10")
    write_deployment(tmp_path / "a" / "10", overwrite=True)
    assert "# mine" not in (target / "batching.config").read_text()
    with pytest.raises(ValueError, match="must be letters, digits"):
        deployment_files({"a b": [1]})
    with pytest.raises(ValueError, match="must be a model with a numbered version"):
        deployment_files({})
