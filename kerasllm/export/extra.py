"""What lies beside an exported graph in `assets.extra/`: model card, warm-up requests, the manifest.

All of it is made from the folder as it is, so it fits whatever signatures there are.
"""

import base64
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from kerasllm.export.signatures import CLASSIFY, Signature, example_inputs, read_signatures
from kerasllm.export.warmup import FILE_NAME, make_record, write_warmup
from kerasllm.files import write_json, write_text
from kerasllm.generation.padding import SHORTEST_LENGTH, buckets
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer

MANIFEST = "kerasllm_manifest.json"
# Tokens of the warm-up requests, and of the answers to them.
WARMUP_LENGTHS = (8, 64, 512)
WARMUP_NEW_TOKENS = 4
# Of the requests for which XLA compiles beforehand: it takes seconds for each of the lengths up to here.
_LONGEST_COMPILED = 1024
_EXAMPLE_TEXT = "The quick brown fox jumps over the lazy dog."
# A cache is megabytes of numbers, which no manifest should hold.
_MOST_VALUES = 64


def write_extra(folder: str | os.PathLike, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Completes the `assets.extra/` of an exported folder.

    Writes the warm-up requests and `README.md`, the model card, and completes the manifest that is there:
    `parameters`, `weights_sha256` (see `hash_weights`), `tokenizer`, `signature_details` (method, inputs,
    outputs with dtypes, shapes and defaults), `examples` (bodies for REST), `warmup_records`.

    Args:
        folder: The folder with `saved_model.pb`, with the tokenizer and a manifest in `assets.extra/`.
        model: The model.
        tokenizer: Its tokenizer.

    Raises:
        FileNotFoundError: If the folder is not one.
    """
    extra = pathlib.Path(folder) / "assets.extra"
    manifest = json.loads((extra / MANIFEST).read_text(encoding="utf-8"))
    signatures = read_signatures(folder)
    requests = _warmup_requests(signatures, model, tokenizer, manifest)
    count = write_warmup(
        extra / FILE_NAME, (make_record(name, signatures[name].method, inputs) for name, inputs in requests)
    )
    bodies: dict[str, Any] = {}
    for name, inputs in requests:
        if name not in bodies and sum(value.size for value in inputs.values()) <= _MOST_VALUES:
            bodies[name] = rest_body(name, signatures[name], inputs)
    manifest |= {
        "parameters": sum(int(np.prod(variable.shape)) for variable in model.weights),
        "weights_sha256": hash_weights(model),
        "tokenizer": {"class": type(tokenizer).__name__, "vocabulary_size": tokenizer.vocabulary_size},
        "signature_details": {name: signature.describe() for name, signature in signatures.items()},
        "examples": bodies,
        "warmup_records": count,
    }
    write_json(extra / MANIFEST, manifest)
    write_text(extra / "README.md", model_card(manifest))


def name_source(folder: str | os.PathLike, source: Mapping[str, Any]) -> None:
    """Says in manifest and model card where the weights are from.

    Args:
        folder: The exported folder.
        source: What `describe_source` returns.
    """
    extra = pathlib.Path(folder) / "assets.extra"
    manifest = json.loads((extra / MANIFEST).read_text(encoding="utf-8")) | {"source": dict(source)}
    write_json(extra / MANIFEST, manifest)
    write_text(extra / "README.md", model_card(manifest))


def describe_source(path: str | os.PathLike, license: str | None = None) -> dict[str, Any]:
    """Describes a checkpoint by its files.

    Args:
        path: A file, or a folder in Hugging Face's layout.
        license: Its license. None: what the checkpoint says, in the head of its README.md or, of a GGUF
            file, as `general.license`.

    Returns:
        `name`, of the file or folder; `sha256` of the files with weights, by their names; and `license`,
        where one is known.
    """
    path = pathlib.Path(path)
    endings = (".safetensors", ".gguf", ".h5", ".keras")
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in endings)
    found = license or _license_of(path)
    return {
        "name": path.resolve().name,
        "sha256": {file.name: _hash_file(file) for file in files},
        **({"license": found} if found else {}),
    }


def _hash_file(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _license_of(path: pathlib.Path) -> str | None:
    if path.suffix == ".gguf":
        import gguf

        field = gguf.GGUFReader(path).get_field("general.license")
        return field.contents() if field else None
    readme = path / "README.md"
    if not readme.is_file():
        return None
    import yaml

    head = readme.read_text(encoding="utf-8", errors="replace").split("---\n")
    if len(head) < 3 or head[0].strip():
        return None
    try:
        content = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return None
    name = content.get("license") if isinstance(content, dict) else None
    return str(name) if name else None


def hash_weights(model: LanguageModel) -> str:
    """Hashes the weights: the same number for the same weights, whatever file they came from.

    Args:
        model: The model.

    Returns:
        The SHA-256, in hexadecimal digits, of paths, dtypes, shapes and bytes in the order of the paths.
    """
    digest = hashlib.sha256()
    for variable in sorted(model.weights, key=lambda variable: variable.path):
        value = np.ascontiguousarray(variable.numpy())
        # Names are numbered by how many models a process has made; places in the model are not.
        place = variable.path.partition("/")[2]
        digest.update(f"{place}:{value.dtype}:{value.shape}:".encode())
        digest.update(value.view(np.uint8).data if value.ndim else value.tobytes())
    return digest.hexdigest()


# Warm-up


def _warmup_requests(
    signatures: Mapping[str, Signature],
    model: LanguageModel,
    tokenizer: Tokenizer,
    manifest: Mapping[str, Any],
) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Requests for each signature, with texts of several lengths where it takes texts."""
    limits = manifest.get("limits") or {}
    context = model.config.context_length
    new_tokens = min(WARMUP_NEW_TOKENS, limits.get("max_new_tokens") or WARMUP_NEW_TOKENS)
    # Half of a prompt's room: special tokens, a template or a default prompt may be added.
    most = (limits.get("max_prompt_tokens") or context) // 2
    most = min(most, max(1, context // 2 - new_tokens))
    texts = _texts(tokenizer, [length for length in WARMUP_LENGTHS if length <= most] or [most])
    token_ids = tokenizer.encode(texts[0])
    requests = []
    if manifest.get("jit_compile") and "generate" in signatures:
        # What is compiled for one signature is compiled for all.
        sizes = buckets(SHORTEST_LENGTH, min(context, _LONGEST_COMPILED))
        lengths = [size - new_tokens for size in sizes if size - new_tokens <= most]
        for text in _texts(tokenizer, lengths):
            requests.append(
                ("generate", example_inputs(signatures["generate"], [text], token_ids, new_tokens))
            )
    for name, signature in signatures.items():
        mask = f" {tokenizer.mask_token}" if "num_masks" in signature.outputs else ""
        for text in texts if signature.text_inputs else texts[:1]:
            if "second_text" in signature.inputs and text is not texts[0]:
                continue
            is_chat = "contents" in signature.inputs
            if is_chat and not _chat_fits(tokenizer, text, most * 2 - new_tokens):
                continue
            inputs = example_inputs(signature, [text + mask], token_ids, new_tokens)
            if inputs is not None:
                requests.append((name, inputs))
    return requests


def _texts(tokenizer: Tokenizer, lengths: list[int]) -> list[str]:
    """Texts of at most so many tokens."""
    texts = []
    for length in lengths:
        words = (_EXAMPLE_TEXT + " ") * (1 + length // 4)
        ids = tokenizer.encode(words)[:length]
        # Decoded ids may be more ids than they were, at the border of a character or a word.
        while len(ids) > 1 and len(tokenizer.encode(tokenizer.decode(ids))) > length:
            ids = ids[:-1]
        texts.append(tokenizer.decode(ids).strip() or _EXAMPLE_TEXT[:1])
    return texts


def _chat_fits(tokenizer: Tokenizer, text: str, most: int) -> bool:
    messages = [{"role": "user", "content": text}]
    return len(tokenizer.encode_chat(messages, add_generation_prompt=True)) <= most


# The examples


def rest_body(name: str, signature: Signature, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Makes the body of a `:predict` or `:classify` call over REST.

    Args:
        name: The signature's name.
        signature: The signature.
        inputs: Arrays by the inputs' names.

    Returns:
        The body, for `json.dumps`.
    """
    body = {} if name == "serving_default" else {"signature_name": name}
    if signature.method == CLASSIFY:
        return body | {"examples": [{"text": _EXAMPLE_TEXT}]}
    return body | {"inputs": {key: _to_json(value) for key, value in inputs.items()}}


def _to_json(value: np.ndarray) -> Any:
    if value.dtype == np.float32:
        # In as few digits as tell it from its neighbours: 0.9, not 0.8999999761581421.
        return np.array([float(str(number)) for number in value.ravel()]).reshape(value.shape).tolist()
    if value.dtype != object:
        return value.tolist()
    if value.ndim == 0:
        return _text_to_json(value.item())
    return [_to_json(row) if isinstance(row, np.ndarray) else _text_to_json(row) for row in value]


def _text_to_json(text: bytes) -> Any:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return {"b64": base64.b64encode(text).decode()}


def grpc_request(
    name: str, body: Mapping[str, Any], signature: Signature, model_name: str
) -> dict[str, Any]:
    """Makes the request of PredictionService's Predict, as grpcurl takes it.

    Args:
        name: The signature's name.
        body: The body for REST, see `rest_body`.
        signature: The signature.
        model_name: The name that the server has for the model.

    Returns:
        The message as JSON.
    """
    fields = {"string": "stringVal", "float32": "floatVal", "int32": "intVal", "bool": "boolVal"}
    inputs = {}
    for key, value in body["inputs"].items():
        dtype = signature.inputs[key].dtype
        array = np.array(value, object)
        flat = [
            base64.b64encode(v.encode()).decode() if isinstance(v, str) else v
            for v in array.ravel().tolist()
        ]
        inputs[key] = {
            "dtype": f"DT_{'FLOAT' if dtype.name == 'float32' else dtype.name.upper()}",
            "tensorShape": {"dim": [{"size": size} for size in array.shape]},
            fields[dtype.name]: flat,
        }
    return {"modelSpec": {"name": model_name, "signatureName": name}, "inputs": inputs}


# The model card

_COMPILED = """
XLA compiles its decoding: TensorFlow Serving has to be started with `--xla_cpu_compilation_enabled`, and
the one for GPUs cannot run it. The first call for each number of prompts and each length takes seconds."""

_PYTHON = """\
```python
import grpc
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

stub = prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel("localhost:8500"))


def predict(signature, **inputs):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "my_model", signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    outputs = stub.Predict(request, timeout=60).outputs
    return {{name: tf.make_ndarray(value) for name, value in outputs.items()}}


print(predict({call}))
```
"""


def _shape(tensor: Mapping[str, Any]) -> str:
    sizes = ", ".join("n" if size is None else str(size) for size in tensor["shape"])
    default = f", may be left out over gRPC: {tensor['default']!r}" if "default" in tensor else ""
    return f"{tensor['dtype']} [{sizes}]{default}"


def _one_line(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False)


def model_card(manifest: Mapping[str, Any]) -> str:
    """Writes the model card.

    Args:
        manifest: The content of the manifest.

    Returns:
        Markdown.
    """
    config, tokenizer = manifest["model_config"], manifest["tokenizer"]
    source = manifest.get("source", {})
    lines = [
        f"# {manifest['model_class']}, exported for TensorFlow Serving",
        "",
        "This folder is a SavedModel that reads text, tokenizer inside. It needs TensorFlow "
        f"{manifest['tensorflow_version'].rpartition('.')[0]} or TensorFlow Serving 2.20 and nothing else."
        + (_COMPILED if manifest.get("jit_compile") else ""),
        "",
        "| | |",
        "|---|---|",
        f"| architecture | {manifest['model_class']} |",
        f"| parameters | {manifest['parameters']:,} |",
        f"| tokenizer | {tokenizer['class']}, {tokenizer['vocabulary_size']:,} tokens |",
        f"| license | {source.get('license', 'not known; ask whoever made the weights')} |",
        f"| source | {source.get('name', 'a model in memory')} |",
        f"| SHA-256 of the weights | `{manifest['weights_sha256']}` |",
        f"| written by | kerasllm {manifest['kerasllm_version']}, "
        f"TensorFlow {manifest['tensorflow_version']} |",
    ]
    lines += [f"| {name.replace('_', ' ')} | {value} |" for name, value in sorted(config.items())]
    if manifest.get("limits"):
        lines += ["", "## Limits of a request", ""]
        lines += [f"- {name}: {value}" for name, value in manifest["limits"].items()]
    lines += ["", "## Signatures", "", "`n` is any number; rows lie along the first axis.", ""]
    for name, details in manifest["signature_details"].items():
        lines += [f"### {name}", ""]
        for way in ("inputs", "outputs"):
            tensors = [f"`{key}` {_shape(tensor)}" for key, tensor in details[way].items()]
            lines += [f"{way}: {'; '.join(tensors)}", ""]
        body = manifest["examples"].get(name)
        if body is not None:
            lines += _example_lines(name, body, details)
    lines += ["## From Python", "", _PYTHON.format(call=_python_call(manifest)).rstrip(), ""]
    return "\n".join(lines)


def _example_lines(name: str, body: Mapping[str, Any], details: Mapping[str, Any]) -> list[str]:
    verb = "classify" if "examples" in body else "predict"
    quoted = _one_line(body).replace("'", "'\\''")
    lines = ["```", f"curl localhost:8501/v1/models/my_model:{verb} -d '{quoted}'"]
    if verb == "predict":
        specs = {k: tf.TensorSpec(v["shape"], v["dtype"], name=k) for k, v in details["inputs"].items()}
        request = grpc_request(name, body, Signature(details["method"], specs, {}, {}), "my_model")
        quoted = _one_line(request).replace("'", "'\\''")
        lines += [
            "grpcurl -plaintext -import-path . -proto tensorflow_serving/apis/prediction_service.proto "
            f"-d '{quoted}' localhost:8500 tensorflow.serving.PredictionService/Predict"
        ]
    return [*lines, "```", ""]


def _python_call(manifest: Mapping[str, Any]) -> str:
    names = [name for name, body in manifest["examples"].items() if "inputs" in body]
    name = "serving_default" if "serving_default" in names else names[0]
    inputs = manifest["examples"][name]["inputs"]
    return ", ".join([repr(name), *(f"{key}={value!r}" for key, value in inputs.items())])
