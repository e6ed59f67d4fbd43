"""Public clients of both APIs, each in an environment of its own, against the running server."""

import json
import pathlib
import shutil
import subprocess
import urllib.request

import pytest
from google.protobuf import descriptor_pb2
from reference.environments import make_environment
from tensorflow_serving.apis import model_service_pb2, prediction_service_pb2

pytestmark = [pytest.mark.clean_env, pytest.mark.timeout(1800)]

SCRIPTS = pathlib.Path(__file__).parent / "clients"
# What is installed for each script, and what it can do of what is asked for.
ALL = {"text", "streamed", "structured", "call", "response", "embeddings"}
CLIENTS = {
    "litellm_client.py": ("litellm==1.106.2 mcp==2.3.0", ALL - {"response"}),
    "langchain_client.py": ("langchain-openai==1.7.3", ALL),
    "pydantic_ai_client.py": ("pydantic-ai-slim[openai]==2.68.0", ALL - {"embeddings"}),
    "llm_client.py": ("llm==0.36", {"text", "streamed", "structured"}),
    "openai_client.mjs": ("openai@6.49.0", ALL),
}
# Those of TensorFlow Serving's API, and what each tells besides texts and errors.
TF_SERVING_CLIENTS = {
    "ovmsclient_client.py": (
        "ovmsclient==2023.1",
        {api: {"state": "AVAILABLE", "dtype": "DT_STRING"} for api in ("grpc", "rest")},
    ),
    "kserve_client.py": ("kserve==0.21.0", {"rows": {}, "columns": {}}),
    "grpc_js_client.mjs": (
        "@grpc/grpc-js@1.14.7 @grpc/proto-loader@0.8.1",
        # NOT_FOUND, DEADLINE_EXCEEDED
        {"grpc": {"state": "AVAILABLE", "version": 7, "codes": [5, 4]}},
    ),
}
ASKED = {
    "embedder": "embedder",
    "messages": [{"role": "user", "content": "Sun?"}],
    "schema": {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}},
        "required": ["sunny"],
        "additionalProperties": False,
    },
    "tool": {
        "name": "weather",
        "description": "What it is like outside.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def url(tools_folder, embedder_folder, start_server, tmp_path_factory):
    """A server with a model that chats and one that embeds."""
    entries = [
        f'config {{ name: "{name}" base_path: "{folder}" model_platform: "tensorflow" }}'
        for name, folder in (("tools", tools_folder), ("embedder", embedder_folder))
    ]
    file = tmp_path_factory.mktemp("config") / "models.config"
    file.write_text(f"model_config_list {{ {' '.join(entries)} }}")
    return start_server(f"--model_config_file={file}", "--max_queue=50").url + "/v1"


def run(command, **options):
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if result.returncode and "ENOTFOUND" in result.stderr:
        pytest.skip(f"needs the package index: {command}")
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def run_client(script, package, argument, folder):
    """Installs a client, and returns what its script prints in the end."""
    if script.endswith(".mjs"):
        if shutil.which("npm") is None:
            pytest.skip("needs node and npm")
        run(["npm", "install", "--silent", "--no-audit", "--no-fund", *package.split()], cwd=folder)
        shutil.copy(SCRIPTS / script, folder)
        command = ["node", script, argument]
    else:
        python = make_environment(folder / "venv", package.split())
        command = [python, SCRIPTS / script, argument]
    return json.loads(run(command, cwd=folder, timeout=300).splitlines()[-1])


def ask(url, path, body):
    request = urllib.request.Request(f"{url}/{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


@pytest.mark.parametrize("script", CLIENTS)
def test_client(script, url, tmp_path):
    package, can = CLIENTS[script]
    found = run_client(script, package, json.dumps({**ASKED, "url": url}), tmp_path)
    assert set(found) == can
    body = {"model": "tools", "messages": ASKED["messages"], "max_tokens": 20, "temperature": 0}
    wanted = ask(url, "chat/completions", body)["choices"][0]["message"]["content"]
    assert found["text"] == found["streamed"] == found.get("response", wanted) == wanted
    assert list(found["structured"]) == ["sunny"] and type(found["structured"]["sunny"]) is bool
    if "call" in can:
        name, arguments = found["call"]
        assert name == "weather" and arguments["city"] in ("Rome", "Oslo")
    if "embeddings" in can:
        vectors = ask(url, "embeddings", {"model": "embedder", "input": ["one", "two"]})["data"]
        assert found["embeddings"] == [pytest.approx(entry["embedding"], abs=1e-6) for entry in vectors]


def write_descriptors(path):
    """Writes the descriptors of TensorFlow Serving's services and of all that they need, as protoc does."""
    files = {}

    def add(file):
        if file.name not in files:
            for needed in file.dependencies:
                add(needed)
            files[file.name] = descriptor_pb2.FileDescriptorProto.FromString(file.serialized_pb)

    add(prediction_service_pb2.DESCRIPTOR)
    add(model_service_pb2.DESCRIPTOR)
    path.write_bytes(descriptor_pb2.FileDescriptorSet(file=files.values()).SerializeToString())


@pytest.mark.parametrize("script", TF_SERVING_CLIENTS)
def test_tf_serving_client(script, server, tmp_path):
    write_descriptors(tmp_path / "descriptors.pb")
    asked = {
        "grpc": f"127.0.0.1:{server.grpc_port}",
        "rest": f"127.0.0.1:{server.rest_port}",
        "model": "test_model",
        "version": 7,
        "texts": ["Hello", "wörld", ""],
        "descriptors": str(tmp_path / "descriptors.pb"),
    }
    package, wanted = TF_SERVING_CLIENTS[script]
    found = run_client(script, package, json.dumps(asked), tmp_path)
    for answer in found.values():
        assert answer.pop("texts") == ["<Hello>", "<wörld>", "<>"]
        assert "Servable not found for request: " in answer.pop("error")
    assert found == wanted
