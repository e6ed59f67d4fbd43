"""The main job, end to end: fit, export once, and the same tokens at every stop."""

import contextlib
import dataclasses
import importlib
import json
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator

import numpy as np
import rich.console
import rich.markup
import rich.table
import tensorflow as tf

from kerasllm.config import DataSettings, LoggingSettings, RunConfig, TokenizerSettings, TrainingSettings
from kerasllm.models import GPT2Config
from kerasllm.tasks.train import TrainingResult, train_to_folder
from kerasllm.tokenizers import Tokenizer

MODEL_NAME = "quickstart"
NEW_TOKENS = 40
PROMPT_TOKENS = 40
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 7}
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}


def quickstart_config(output: pathlib.Path, data: list[str] | None, steps: int) -> RunConfig:
    """Returns the configuration of the quickstart's model, about one million parameters."""
    return RunConfig(
        output=str(output),
        family="gpt2",
        model=GPT2Config(context_length=128, num_layers=4, num_heads=4, dim=128, dropout=0.0),
        tokenizer=TokenizerSettings(kind="byte_bpe", vocabulary_size=1024),
        data=DataSettings(paths=data, stories=10000),
        training=TrainingSettings(steps=steps, batch_size=16, sequence_length=128, learning_rate=3e-3),
        logging=LoggingSettings(prompts=[]),  # it writes when it is trained
    )


def run_quickstart(
    output: str | pathlib.Path = "kerasllm_quickstart", data: list[str] | None = None, steps: int = 500
) -> bool:
    """Trains a GPT, exports it, serves it, runs it in LiteRT and compares the tokens.

    Args:
        output: Folder for everything that is written. Each run adds a number; nothing is overwritten.
        data: Text files and folders; None: the library's own stories.
        steps: Updates of the training.

    Returns:
        Whether every stop gave the same tokens.

    Raises:
        FileNotFoundError, ValueError: If the texts do not serve.
        ModuleNotFoundError: If the extras `serving` and `litert` are not installed.
    """
    console = rich.console.Console()
    begin = time.monotonic()
    _require_extras()
    output = pathlib.Path(output)
    version = max(next_version(output / name) for name in ("model", f"served/{MODEL_NAME}", "litert"))
    folder = output / "model" / str(version)

    console.rule("1. Fit")
    source = ", ".join(data) if data else "stories that the library makes up itself"
    console.print(f"A GPT of about a million parameters, {steps} steps, on {source}.")
    result = train_to_folder(quickstart_config(folder, data, steps))
    table = rich.table.Table("model", "validation perplexity", title="Lower is better")
    for name, perplexity in (*result.baselines.items(), ("this GPT", result.perplexity)):
        table.add_row(name, f"{perplexity:.2f}")
    console.print(table)
    model = result.model
    model.generation_config = dataclasses.replace(model.generation_config, max_new_tokens=NEW_TOKENS)
    prompts = choose_prompts(result.validation, model.tokenizer)
    for prompt in prompts[:2]:
        console.print(f"[bold]{rich.markup.escape(prompt)}[/bold]", end="")
        console.print(rich.markup.escape(model.generate(prompt, **SAMPLING)))
    console.print(f"The training as a page: {folder / 'report.html'}; its loss: {folder / 'loss.png'}")

    console.rule("2. Export")
    served = model.export(output / "served" / MODEL_NAME / str(version))
    litert = model.export(output / "litert" / str(version) / "model.tflite")
    for name, path in (("Hugging Face folder", folder), ("SavedModel", served), ("LiteRT", litert)):
        console.print(f"{name}: {path} ({_megabytes(path):.1f} MB)")

    console.rule("3. The same tokens at every stop")
    stops = collect_stops(result, prompts, served, litert, output / "server.log")
    table, equal = compare(stops)
    console.print(table)
    seconds = time.monotonic() - begin
    console.print(f"{'All stops agree' if equal else 'THE STOPS DIFFER'}. {seconds:.0f} s in all.")

    console.rule("What to try next")
    command = pathlib.Path(sys.executable).with_name("kerasllm")  # also where it is not on PATH
    body = json.dumps({"instances": prompts[:1]})
    commands = (
        (command, "generate", folder, prompts[0]),
        (command, "serve", served.parent, "--rest_api_port=8501"),
        ("curl", f"localhost:8501/v1/models/{MODEL_NAME}:predict", "-d", body),
        (command, "quickstart", "--data", "YOUR_TEXTS"),
        (command, "train", "--config", "configs/gpt_5m_pretrain.yaml"),
    )
    for words in commands:
        print(shlex.join(map(str, words)))
    return equal


def _require_extras() -> None:
    try:
        for module in ("ai_edge_litert.interpreter", "tensorflow_serving.apis.predict_pb2", "uvicorn"):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The quickstart needs the extras: pip install 'kerasllm[serving,litert]'. "
            f"Received: no module {error.name!r}",
            name=error.name,
        ) from error


def choose_prompts(documents: list[str], tokenizer: Tokenizer, count: int = 4) -> list[str]:
    """Takes the beginnings of documents, cut after a word, of differing lengths.

    Args:
        documents: Texts.
        tokenizer: Counts their tokens: a prompt has at most `PROMPT_TOKENS`.
        count: Number of prompts.

    Returns:
        The prompts; from fewer documents they are taken at several places.
    """
    if len(documents) < count:
        text = " ".join(documents)
        documents = [text[len(text) * number // count :] for number in range(count)]
    prompts = []
    for number, document in enumerate(documents[:count]):
        prompt = " ".join(document[:1000].split())[: PROMPT_TOKENS * (number + 1) // count]
        prompt = prompt.rpartition(" ")[0] or prompt or "The"
        while len(tokenizer.encode(prompt)) > PROMPT_TOKENS:
            prompt = prompt[: len(prompt) // 2]
        prompts.append(prompt)
    return prompts


def next_version(folder: pathlib.Path) -> int:
    """Returns the number after the highest version folder."""
    versions = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return max(versions, default=0) + 1


def _megabytes(path: pathlib.Path) -> float:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


# What a stop returns: for each prompt the text, and the token ids where the stop gives ids.
Answers = list[tuple[str, list[int] | None]]


@dataclasses.dataclass(frozen=True)
class Stop:
    """One way to run the model.

    Args:
        name: What people call it.
        greedy: Its continuations of the prompts with the most likely tokens.
        sampled: With a fixed seed; None where the stop does not sample.
    """

    name: str
    greedy: Answers
    sampled: Answers | None


def collect_stops(
    result: TrainingResult,
    prompts: list[str],
    served: pathlib.Path,
    litert: pathlib.Path,
    log: pathlib.Path,
) -> list[Stop]:
    """Asks the live model, the reloaded export, the server over gRPC and REST, and LiteRT."""

    def stop(name: str, ask: Callable[[dict], Answers]) -> Stop:
        return Stop(name, ask(GREEDY), ask(SAMPLING))

    def live(settings):
        completions = result.model.generate_tokens(prompts, NEW_TOKENS, **settings)
        return [(completion.text, completion.token_ids) for completion in completions]

    reloaded = tf.saved_model.load(str(served))

    def reload(settings):
        inputs = {name: tf.constant(value) for name, value in request(prompts, settings).items()}
        return _answers(reloaded.signatures["generate"](**inputs))

    stops = [stop("Python", live), stop("reloaded SavedModel", reload)]
    with running_server(served.parent, log) as (grpc_address, rest_address):
        stops.append(stop("gRPC", lambda settings: ask_grpc(grpc_address, prompts, settings)))
        stops.append(stop("REST", lambda settings: ask_rest(rest_address, prompts, settings)))
        stops.append(Stop("REST, bare prompts", ask_rest_bare(rest_address, prompts), None))

    from kerasllm.litert import Generator

    generator = Generator(litert, num_threads=2)
    ids = [generator.generate_ids(prompt, NEW_TOKENS) for prompt in prompts]
    stops.append(Stop("LiteRT", [(generator.tokenizer.decode(i), i) for i in ids], None))
    return stops


def request(prompts: list[str], settings: dict) -> dict[str, np.ndarray]:
    """Makes the inputs of the `generate` signature: every setting once per prompt."""
    count = len(prompts)
    return {
        "prompt": np.array(prompts, object),
        "max_new_tokens": np.full(count, NEW_TOKENS, "int32"),
        "temperature": np.full(count, settings["temperature"], "float32"),
        "top_k": np.full(count, settings["top_k"], "int32"),
        "top_p": np.full(count, settings["top_p"], "float32"),
        "min_p": np.zeros(count, "float32"),
        "repetition_penalty": np.ones(count, "float32"),
        "stop": np.full([count, 1], "", object),
        "seed": np.full(count, settings["seed"], "int32"),
    }


def _answers(outputs) -> Answers:
    texts, ids, counts = (np.asarray(outputs[name]) for name in ("text", "token_ids", "num_tokens"))
    return [
        (text.decode("utf-8"), row[:count].tolist())
        for text, row, count in zip(texts, ids, counts, strict=True)
    ]


def ask_grpc(address: str, prompts: list[str], settings: dict) -> Answers:
    """Asks with the public TensorFlow Serving client."""
    import grpc
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    message = predict_pb2.PredictRequest()
    message.model_spec.name = MODEL_NAME
    message.model_spec.signature_name = "generate"
    for name, value in request(prompts, settings).items():
        message.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    with grpc.insecure_channel(address) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        outputs = stub.Predict(message, timeout=120).outputs
    return _answers({name: tf.make_ndarray(tensor) for name, tensor in outputs.items()})


def _post(address: str, body: dict) -> list:
    url = f"http://{address}/v1/models/{MODEL_NAME}:predict"
    post = urllib.request.Request(url, json.dumps(body).encode("utf-8"))
    with urllib.request.urlopen(post, timeout=120) as response:
        return json.load(response)["predictions"]


def ask_rest(address: str, prompts: list[str], settings: dict) -> Answers:
    """Asks the `generate` signature over REST."""
    columns = {name: value.tolist() for name, value in request(prompts, settings).items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    answers = _post(address, {"signature_name": "generate", "instances": rows})
    return [(row["text"], row["token_ids"][: row["num_tokens"]]) for row in answers]


def ask_rest_bare(address: str, prompts: list[str]) -> Answers:
    """Asks `serving_default`, as a plain curl does: prompts in, texts out."""
    return [(text, None) for text in _post(address, {"instances": prompts})]


@contextlib.contextmanager
def running_server(
    base_path: pathlib.Path, log: pathlib.Path, timeout: float = 120
) -> Iterator[tuple[str, str]]:
    """Runs the embedded server on free ports of this machine.

    Args:
        base_path: Folder with the numbered versions.
        log: File for what the server says.
        timeout: Seconds until it must be ready.

    Yields:
        The addresses of gRPC and REST.

    Raises:
        RuntimeError: If it does not start.
    """
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in (first, second)]
    command = [sys.executable, "-m", "kerasllm_serving", "--host=127.0.0.1"]
    command += [f"--port={ports[0]}", f"--rest_api_port={ports[1]}"]
    command += [f"--model_name={MODEL_NAME}", f"--model_base_path={base_path}"]
    with open(log, "w", encoding="utf-8") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + timeout
            while not re.search(r"^kerasllm_serving: gRPC on .* ready$", log.read_text(), re.MULTILINE):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"The server did not start; see {log}")
                time.sleep(0.2)
            yield f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def compare(stops: list[Stop]) -> tuple[rich.table.Table, bool]:
    """Compares each stop's continuations with the first stop's.

    Args:
        stops: The stops; the first is the one to agree with.

    Returns:
        A table, and whether all are equal.
    """
    table = rich.table.Table("stop", "decoding", "tokens", "equal", title=f"Compared with {stops[0].name}")
    # Stops that say nothing agree on nothing.
    all_equal = any(ids for _, ids in stops[0].greedy)
    for stop in stops:
        for decoding in ("greedy", "sampled"):
            answers, expected = getattr(stop, decoding), getattr(stops[0], decoding)
            if answers is None:
                table.add_row(stop.name, decoding, "–", "the stop does not sample")
                continue
            equal = len(answers) == len(expected) and all(
                text == wanted_text and ids in (None, wanted_ids)
                for (text, ids), (wanted_text, wanted_ids) in zip(answers, expected, strict=True)
            )
            counts = [len(ids) for _, ids in answers if ids is not None]
            number = str(sum(counts)) if counts else "text only"
            verdict = "–" if stop is stops[0] else "yes" if equal else "NO"
            table.add_row(stop.name, decoding, number, verdict)
            all_equal &= equal
    return table, all_equal
