"""The files that run exported models under the official TensorFlow Serving: Docker, Kubernetes, Grafana."""

import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from kerasllm.export.extra import MANIFEST
from kerasllm.export.signatures import read_signatures
from kerasllm.files import write_text

# The newest release; its TensorFlow is what an export is tested with.
IMAGE = "tensorflow/serving:2.20.0"
# Most rows of one batch, where the models take so many; it waits so long for more, in microseconds.
_MOST_ROWS, _BATCH_TIMEOUT = 32, 2000
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
METRICS_PATH = "/monitoring/prometheus/metrics"


def find_models(folder: str | os.PathLike) -> dict[str, list[int]]:
    """Finds the models that a server can load from a folder.

    Args:
        folder: A folder of models, each a folder of numbered versions.

    Returns:
        The versions by the models' names, both sorted.
    """
    models = {}
    for file in sorted(pathlib.Path(folder).glob("*/*/saved_model.pb")):
        version, model = file.parent, file.parent.parent
        if version.name.isdecimal() and not model.name.startswith("."):
            models.setdefault(model.name, []).append(int(version.name))
    return {name: sorted(versions) for name, versions in models.items()}


def write_deployment(path: str | os.PathLike, overwrite: bool = False) -> pathlib.Path:
    """Writes the files for all models of a folder into `tf_serving/` beside them.

    Args:
        path: An exported version, such as `served/my_model/1`: the files are for all models in `served`
            and come into `served/tf_serving`.
        overwrite: Whether files that are there, and are others, may be replaced.

    Returns:
        The folder.

    Raises:
        ValueError: If a model's name cannot be in a URL or is that of the folder of files.
        FileExistsError: If a file is there that must not be replaced.
    """
    served = pathlib.Path(path).resolve().parent.parent
    models = find_models(served)
    target = served / "tf_serving"
    signatures = {
        name: list(read_signatures(served / name / str(versions[-1]))) for name, versions in models.items()
    }
    limits = [
        json.loads(file.read_text(encoding="utf-8")).get("limits") or {}
        for name, versions in models.items()
        for file in [served / name / str(versions[-1]) / "assets.extra" / MANIFEST]
        if file.is_file()
    ]
    most = min([_MOST_ROWS, *(limit["max_batch_size"] for limit in limits if limit)])
    files = deployment_files(models, signatures, most)
    for name, text in files.items():
        file = target / name
        if not overwrite and file.exists() and file.read_text(encoding="utf-8") != text:
            raise FileExistsError(
                f"A file that is another is replaced only with `overwrite`. Received: {file}"
            )
    for name, text in files.items():
        write_text(target / name, text)
    return target


def deployment_files(
    models: dict[str, Sequence[int]],
    signatures: dict[str, Sequence[str]] | None = None,
    max_batch_size: int = _MOST_ROWS,
) -> dict[str, str]:
    """Makes the files.

    Args:
        models: The versions by the models' names. Of a model with several versions the last is labelled
            `canary` and the one before `stable`; of a model with one it is `stable`.
        signatures: The signatures by the models' names, for the page that says how to call them.
        max_batch_size: Most rows of a batch; each of the models must take them.

    Returns:
        The texts by the files' names.

    Raises:
        ValueError: If there is no model, or a name cannot be in a URL.
    """
    if not models:
        raise ValueError("There must be a model with a numbered version. Received: none")
    for name in models:
        if not _NAME.fullmatch(name) or name == "tf_serving":
            raise ValueError(
                "A model's name must be letters, digits and _.- between them, and not tf_serving. "
                f"Received: {name!r}"
            )
    return {
        "Dockerfile": _dockerfile(),
        "compose.yaml": _compose(),
        "models.config": _models_config(models),
        "batching.config": _batching_config(max_batch_size),
        "monitoring.config": _monitoring_config(),
        "prometheus.yaml": _prometheus(),
        "grafana_datasource.yaml": _grafana_datasource(),
        "grafana_provider.yaml": _grafana_provider(),
        "grafana_dashboard.json": json.dumps(_grafana_dashboard(), indent=2) + "\n",
        "kserve.yaml": _kserve(sorted(models)),
        "README.md": _readme(models, signatures or {}),
    }


_FLAGS_OF_CALLS = (
    # A long text takes longer than the 30 seconds that REST calls have.
    "--rest_api_timeout_in_ms=300000",
    # For folders exported with `jit_compile`; it changes nothing for others.
    "--xla_cpu_compilation_enabled=true",
)
_FLAGS = (
    "--port=8500",
    "--rest_api_port=8501",
    "--model_config_file=/config/models.config",
    "--model_config_file_poll_wait_seconds=60",
    "--monitoring_config_file=/config/monitoring.config",
    "--enable_batching=true",
    "--batching_parameters_file=/config/batching.config",
    *_FLAGS_OF_CALLS,
)


def _dockerfile() -> str:
    flags = ", \\\n    ".join(json.dumps(flag) for flag in _FLAGS)
    return f"""\
# An image with the models inside. Build it in the folder of the models:
#   docker build -f tf_serving/Dockerfile -t my_models .
#   docker run --rm -p 8500:8500 -p 8501:8501 my_models
FROM {IMAGE}
COPY . /models
COPY tf_serving/models.config tf_serving/batching.config tf_serving/monitoring.config /config/
EXPOSE 8500 8501
# The image's own entry point serves one model only.
ENTRYPOINT ["/usr/bin/tensorflow_model_server", \\
    {flags}]
"""


def _compose() -> str:
    flags = "\n".join(f"      - {flag}" for flag in _FLAGS)
    return f"""\
# The server with the models of the folder above, Prometheus and Grafana:
#   docker compose -f tf_serving/compose.yaml up
services:
  serving:
    image: {IMAGE}
    entrypoint: ["/usr/bin/tensorflow_model_server"]
    command:
{flags}
    ports: ["8500:8500", "8501:8501"]
    volumes:
      - ..:/models:ro
      - ./models.config:/config/models.config:ro
      - ./batching.config:/config/batching.config:ro
      - ./monitoring.config:/config/monitoring.config:ro
    restart: unless-stopped
    # The server does not finish its requests when it is told to end: take it out of the balancer first.
    stop_grace_period: 5s
  prometheus:
    image: prom/prometheus:v3.5.0
    ports: ["9090:9090"]
    volumes:
      - ./prometheus.yaml:/etc/prometheus/prometheus.yml:ro
  grafana:
    image: grafana/grafana:12.1.0
    ports: ["3000:3000"]
    volumes:
      - ./grafana_datasource.yaml:/etc/grafana/provisioning/datasources/prometheus.yaml:ro
      - ./grafana_provider.yaml:/etc/grafana/provisioning/dashboards/provider.yaml:ro
      - ./grafana_dashboard.json:/var/lib/grafana/dashboards/tf_serving.json:ro
"""


def _models_config(models: dict[str, Sequence[int]]) -> str:
    lines = ["# tensorflow.serving.ModelServerConfig; read again each minute, so an edit is a rollout."]
    lines += ["model_config_list {"]
    for name, versions in sorted(models.items()):
        kept = list(versions)[-2:]
        labels = {"stable": kept[0]} | ({"canary": kept[1]} if len(kept) > 1 else {})
        lines += [
            "  config {",
            f'    name: "{name}"',
            f'    base_path: "/models/{name}"',
            '    model_platform: "tensorflow"',
            "    model_version_policy {",
            "      specific {",
            *(f"        versions: {version}" for version in kept),
            "      }",
            "    }",
        ]
        for label, version in labels.items():
            lines += ["    version_labels {", f'      key: "{label}"', f"      value: {version}", "    }"]
        lines += ["  }"]
    return "\n".join([*lines, "}", ""])


def _batching_config(most: int) -> str:
    sizes = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
    allowed = "\n".join(f"allowed_batch_sizes: {size}" for size in sizes)
    return f"""\
# tensorflow.serving.BatchingParameters: requests for one signature that come within the time-out are one
# batch. Texts are strings, so nothing is padded but lists of stop strings and chats, where a row says
# itself how much of it counts. The batcher refuses inputs without rows: call no generate_scalar with it.
max_batch_size {{ value: {most} }}
batch_timeout_micros {{ value: {_BATCH_TIMEOUT} }}
max_enqueued_batches {{ value: 100 }}
num_batch_threads {{ value: 4 }}
{allowed}
pad_variable_length_inputs: true
"""


def _monitoring_config() -> str:
    return f"""\
# tensorflow.serving.MonitoringConfig, served on the port of REST.
prometheus_config {{
  enable: true
  path: "{METRICS_PATH}"
}}
"""


def _prometheus() -> str:
    return f"""\
scrape_configs:
  - job_name: tf_serving
    scrape_interval: 15s
    metrics_path: {METRICS_PATH}
    static_configs:
      - targets: ["serving:8501"]
"""


def _grafana_datasource() -> str:
    return """\
apiVersion: 1
datasources:
  - name: Prometheus
    uid: prometheus
    type: prometheus
    access: proxy
    url: http://prometheus:9090
    isDefault: true
"""


def _grafana_provider() -> str:
    return """\
apiVersion: 1
providers:
  - name: tf_serving
    type: file
    options:
      path: /var/lib/grafana/dashboards
"""


def _grafana_dashboard() -> dict[str, Any]:
    name = ":tensorflow:serving:"
    rate = "[$__rate_interval]"

    def quantile(metric, share, by):
        series = f'{name}{metric}_bucket{{model_name=~"$model"}}{rate}'
        return f"histogram_quantile({share}, sum by (le, {by}) (rate({series})))"

    panels = [
        ("Requests per second", "reqps", [(f"sum by (model_name, status) (rate({name}request_count"
         f'{{model_name=~"$model"}}{rate}))', "{{model_name}} {{status}}")]),
        ("Latency of requests", "µs", [(quantile("request_latency", share, "model_name"),
         "{{model_name}} p" + str(round(100 * share))) for share in (0.5, 0.95, 0.99)]),
        ("Time in TensorFlow", "µs", [(quantile("runtime_latency", share, "model_name"),
         "{{model_name}} p" + str(round(100 * share))) for share in (0.5, 0.95)]),
        ("Rows per batch", "none", [(f"sum(rate({name}batching_session:processed_batch_size_sum{rate})) / "
         f"sum(rate({name}batching_session:processed_batch_size_count{rate}))", "mean")]),
        ("Wait for a batch", "µs", [(f"histogram_quantile(0.95, sum by (le) (rate({name}batching_session:"
         f"queuing_latency_bucket{rate})))", "p95")]),
        ("Warm-up", "µs", [(f"sum by (model_path) ({name}model_warmup_latency_sum)", "{{model_path}}")]),
    ]  # fmt: skip
    source = {"type": "prometheus", "uid": "prometheus"}
    return {
        "title": "TensorFlow Serving",
        "uid": "tf_serving",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {
                    "name": "model",
                    "type": "query",
                    "datasource": source,
                    "query": f"label_values({name}request_count, model_name)",
                    "includeAll": True,
                    "allValue": ".*",
                    "multi": True,
                    "refresh": 2,
                }
            ]
        },
        "panels": [
            {
                "id": number + 1,
                "type": "timeseries",
                "title": title,
                "datasource": source,
                "gridPos": {"x": 12 * (number % 2), "y": 8 * (number // 2), "w": 12, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + place), "datasource": source, "expr": query, "legendFormat": legend}
                    for place, (query, legend) in enumerate(queries)
                ],
            }
            for number, (title, unit, queries) in enumerate(panels)
        ],
    }


def _kserve(names: Sequence[str]) -> str:
    """One InferenceService per model: KServe starts a server for each."""
    documents = []
    for name in names:
        # A name in Kubernetes is of a to z, 0 to 9 and hyphens.
        host = re.sub(r"[^a-z0-9]+", "-", name.lower())
        documents.append(f"""\
# KServe's TensorFlow runtime. Copy the model's folder to the address first.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {host}
spec:
  predictor:
    minReplicas: 1
    model:
      modelFormat:
        name: tensorflow
      protocolVersion: v1
      runtimeVersion: {IMAGE.rpartition(":")[2]}
      storageUri: s3://my-bucket/served/{name}
      # Beside those of the runtime: a long text takes long, and some folders are compiled by XLA.
      args: [{", ".join(_FLAGS_OF_CALLS)}]
      resources:
        requests:
          cpu: "2"
          memory: 4Gi
        limits:
          memory: 8Gi
""")
    return "---\n".join(documents)


def _readme(models: dict[str, Sequence[int]], signatures: dict[str, Sequence[str]]) -> str:
    name = sorted(models)[0]
    lines = [
        "# Exported models under TensorFlow Serving",
        "",
        "Written by `kerasllm export --docker`. The folder above, which all commands are for, holds",
        f"the models, each a folder of numbered versions: {', '.join(f'`{m}`' for m in sorted(models))}.",
        "",
        "| file | what |",
        "|---|---|",
        "| `compose.yaml` | the server with Prometheus and Grafana on this machine |",
        "| `Dockerfile` | an image with the models inside |",
        "| `models.config` | models, versions and the labels `stable` and `canary` |",
        "| `batching.config` | how requests become batches |",
        "| `monitoring.config` | metrics for Prometheus |",
        "| `prometheus.yaml`, `grafana_datasource.yaml`, `grafana_provider.yaml` | settings of the two |",
        "| `grafana_dashboard.json` | requests, latencies, batches |",
        "| `kserve.yaml` | an InferenceService for each model, on Kubernetes |",
        "",
        "## Run",
        "",
        "```",
        "docker compose -f tf_serving/compose.yaml up             # gRPC 8500, REST 8501, Grafana 3000",
        "docker build -f tf_serving/Dockerfile -t my_models .     # or an image",
        "docker run --rm -p 8500:8500 -p 8501:8501 my_models",
        "kubectl apply -f tf_serving/kserve.yaml                  # or Kubernetes, see the addresses in it",
        "kerasllm serve " + name + " --rest_api_port=8501              # or without Docker",
        "```",
        "",
        "All of these let XLA compile what was exported with `jit_compile`. Of such a folder the first",
        "call for each number of prompts and each length takes seconds; the image for GPUs cannot run it.",
        "",
        "## Call",
        "",
        "Each version's `assets.extra/README.md` has an example for each of its signatures.",
        "",
        "```",
        f"curl localhost:8501/v1/models/{name}                       # is it there?",
        f"curl localhost:8501/v1/models/{name}/metadata              # its signatures",
        f'curl localhost:8501/v1/models/{name}:predict -d \'{{"instances": ["Once upon a time"]}}\'',
        f'curl localhost:8501/v1/models/{name}/labels/stable:predict -d \'{{"instances": ["Once"]}}\'',
        "curl localhost:8501" + METRICS_PATH,
        "```",
        "",
        "Over gRPC, with the protos of [tensorflow/serving](https://github.com/tensorflow/serving) and",
        "[tensorflow](https://github.com/tensorflow/tensorflow) in `protos/`:",
        "",
        "```",
        "grpcurl -plaintext -import-path protos -proto tensorflow_serving/apis/prediction_service.proto \\",
        f'  -d \'{{"modelSpec": {{"name": "{name}"}}, "metadataField": ["signature_def"]}}\' \\',
        "  localhost:8500 tensorflow.serving.PredictionService/GetModelMetadata",
        "```",
        "",
        "From Python, with `pip install tensorflow-serving-api`: the end of each model card.",
        "",
        "## A new version",
        "",
        "Export it as the next number, write it into `models.config` with the label `canary`, and send",
        f"requests to `/v1/models/{name}/labels/canary:predict`; when it is good, move `stable`. The",
        "server reads `models.config` each minute. A label can go to a version only when that is loaded:",
        "add the version first, and the label a minute later.",
        "",
    ]
    for model in sorted(signatures):
        lines += [f"Signatures of `{model}`: {', '.join(f'`{s}`' for s in signatures[model])}.", ""]
    return "\n".join(lines).rstrip("\n") + "\n"
