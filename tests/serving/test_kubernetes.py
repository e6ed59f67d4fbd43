"""The manifests fit each other, the server's flags and paths, and setup.cfg."""

import configparser
import pathlib
import re

import pytest
import yaml
from kerasllm_serving.__main__ import make_parser

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "serving" / "kubernetes"


def read(name):
    return {d["kind"]: d for d in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))}


@pytest.fixture(scope="module")
def entry_point():
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    return yaml.safe_load(re.search(r"ENTRYPOINT (\[.*\])", dockerfile)[1])


def flags_of(entry_point, container):
    """What the server reads of the image's entry point and a container's arguments."""
    assert entry_point[:3] == ["python", "-m", "kerasllm_serving"]
    return make_parser().parse_args([*entry_point[3:], *container["args"]])


def test_replicas(entry_point):
    documents = read("server.yaml")
    pod = documents["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    flags = flags_of(entry_point, container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": flags.port, "http": flags.rest_api_port}
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(flags.rest_api_port)
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["spec"]["terminationGracePeriodSeconds"] > flags.drain_seconds + sleep
    labels = pod["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert documents[kind]["spec"]["selector"]["matchLabels"] == labels
    service = documents["Service"]["spec"]
    assert service["selector"] == labels
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert str(flags.model_base_path).startswith(container["volumeMounts"][0]["mountPath"])
    user = pod["spec"]["securityContext"]["runAsUser"]
    assert user and f"USER {user}:" in (FOLDER / "Dockerfile").read_text(encoding="utf-8")


def test_gateway(entry_point):
    documents, server = read("inference_gateway.yaml"), read("server.yaml")["Deployment"]
    pool = documents["InferencePool"]
    template = server["spec"]["template"]
    assert pool["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    flags = flags_of(entry_point, template["spec"]["containers"][0])
    assert pool["spec"]["targetPorts"] == [{"number": flags.rest_api_port}]
    route = documents["HTTPRoute"]["spec"]
    (backend,) = route["rules"][0]["backendRefs"]
    group = pool["apiVersion"].partition("/")[0]
    assert backend == {"group": group, "kind": "InferencePool", "name": pool["metadata"]["name"]}
    assert route["parentRefs"] == [{"name": documents["Gateway"]["metadata"]["name"]}]


def test_kserve(entry_point):
    service = read("kserve.yaml")["InferenceService"]
    (container,) = service["spec"]["predictor"]["containers"]
    flags = flags_of(entry_point, container)
    assert (str(flags.model_base_path), flags.model_name) == ("/mnt/models", service["metadata"]["name"])
    assert container["ports"][0]["containerPort"] == flags.rest_api_port
    image = read("server.yaml")["Deployment"]["spec"]["template"]["spec"]["containers"][0]["image"]
    assert container["image"] == image


def test_image_has_what_the_server_needs():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    known = setup["options"]["install_requires"].split() + [
        line for extra in ("serving", "grammar") for line in setup["options.extras_require"][extra].split()
    ]
    dockerfile = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    wanted = re.findall(r'"([\w.-]+>=[^"]*)"', dockerfile)
    assert set(wanted) <= set(known)
    serving = setup["options.extras_require"]["serving"].split()
    assert set(serving) <= set(wanted)
    third_party = {"grpc": "grpcio", "tensorflow_serving": "tensorflow-serving-api"}
    imported = set()
    for path in (ROOT / "serving" / "kerasllm_serving").glob("*.py"):
        for name in re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.M):
            imported.add(third_party.get(name, name))
    names = {re.split(r"[><=]", line)[0] for line in wanted}
    assert {"tensorflow", "jinja2", "tokenizers", "uvicorn", "grpcio"} <= imported & names


def test_gauges_and_paths_are_the_server_s():
    source = "".join(path.read_text() for path in (ROOT / "serving" / "kerasllm_serving").glob("*.py"))
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    gauges = re.findall(r"`(vllm:\w+)`", page)
    assert len(gauges) == 3 and all(f'"{name}"' in source for name in gauges)
    paths = re.findall(r"path: (/\w+), port", (FOLDER / "server.yaml").read_text())
    assert len(paths) == 2 and all(f'"{path}": self._health' in source for path in paths)
    named = set(re.findall(r"`([a-z_]+\.yaml|Dockerfile)`", page))
    assert named == {path.name for path in FOLDER.iterdir()} - {"README.md"}
