"""A SavedModel with one signature per rule under test, and the real server as a process."""

import dataclasses
import os
import re
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import tensorflow as tf
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

SERVING_FOLDER = Path(__file__).parents[2] / "serving"
START_SECONDS = 240

# The server must run where neither the library nor Keras is installed.
RUN_WITHOUT_KERASLLM = """
import runpy, sys
for name in ("kerasllm", "keras", "tf_keras"):
    sys.modules[name] = None
runpy.run_module("kerasllm_serving", run_name="__main__", alter_sys=True)
"""
READY_LINE = re.compile(
    r"kerasllm_serving: gRPC on (\S+):(?P<grpc>\d+)( and unix:\S+)?, REST on (off|(\S+):(?P<rest>\d+)), "
    r"model (?P<model>\S+) version (?P<version>\d+)(, model \S+ version \d+)* ready\n"
)


class ManySignatures(tf.Module):
    """Not a language model: every function is one shape of signature that a client may meet."""

    def __init__(self):
        super().__init__()
        self.scale = tf.Variable(2.0)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="prompt")])
    def echo(self, prompt):
        return {"text": tf.strings.join(["<", prompt, ">"])}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="data")])
    def echo_bytes(self, data):
        return {"data_bytes": tf.identity(data)}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 2], tf.float32, name="x"),
            tf.TensorSpec([None], tf.int32, name="n"),
        ]
    )
    def numeric(self, x, n):
        return {"scaled": x * self.scale, "next": n + 1}

    @tf.function(input_signature=[tf.TensorSpec([], tf.int64, name="k")])
    def scalar(self, k):
        return {"double": 2 * k}

    @tf.function(input_signature=[tf.TensorSpec([], tf.string, name="data")])
    def scalar_bytes(self, data):
        return {"data_bytes": tf.identity(data)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def dtypes(self, x):
        return {
            "double": tf.cast(x, tf.float64) / 3,
            "int8": tf.cast(x, tf.int8),
            "uint64": tf.cast(x, tf.uint64) + 2**63,
            "bool": x > 1,
            "string": tf.strings.as_string(x),
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def float32(self, x):
        return {"x": x}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float16, name="x")])
    def half(self, x):
        return {"y": x + 1}

    @tf.function(input_signature=[tf.TensorSpec([1], tf.float32, name="x")])
    def one_row(self, x):
        return {"y": x + 1}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="prompt")])
    def unequal_rows(self, prompt):
        return {"a": prompt, "b": tf.concat([prompt, prompt], 0)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="prompt")])
    def checked(self, prompt):
        tf.debugging.assert_less_equal(
            tf.strings.length(prompt), 5, message="a prompt must not exceed 5 bytes"
        )
        return {"text": prompt}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="prompt"),
            tf.TensorSpec([], tf.int32, name="count"),
        ]
    )
    def with_default(self, prompt, count=tf.constant(3)):  # noqa: B008
        return {"text": tf.strings.join([prompt, tf.strings.as_string(count)])}

    @tf.function(input_signature=[tf.TensorSpec([1], tf.float64, name="seconds")])
    def slow(self, seconds):
        end = tf.timestamp() + seconds[0]
        steps = 0
        while tf.timestamp() < end:
            steps += 1
        return {"seconds": tf.where(steps > 0, seconds, -1.0)}


# Signatures that take serialized tf.Examples with a number `x` and perhaps a `name`, good and bad.
EXAMPLE_SIGNATURES = {
    "classify": lambda x, name: {
        "classes": tf.stack([name, tf.fill(tf.shape(x), "other")], 1),
        "scores": tf.stack([x, 1 - x], 1),
    },
    "scores": lambda x, name: {"scores": tf.stack([x, 1 - x], 1)},
    "classes": lambda x, name: {"classes": name[:, None]},
    "regress": lambda x, name: {"outputs": 2 * x},
    "regress_column": lambda x, name: {"outputs": 2 * x[:, None]},
    "scores_1d": lambda x, name: {"scores": x},
    "scores_double": lambda x, name: {"scores": tf.cast(x, tf.float64)[:, None]},
    "scores_batch": lambda x, name: {"scores": tf.concat([x, x], 0)[:, None]},
    "scores_as_classes": lambda x, name: {"classes": x[:, None]},
    "widths": lambda x, name: {"classes": name[:, None], "scores": tf.stack([x, x], 1)},
    "outputs_2d": lambda x, name: {"outputs": tf.stack([x, x], 1)},
    "outputs_double": lambda x, name: {"outputs": tf.cast(x, tf.float64)},
    "outputs_batch": lambda x, name: {"outputs": tf.concat([x, x], 0)},
    "other_output": lambda x, name: {"other": x},
}


def make_example_function(outputs):
    features = {
        "x": tf.io.FixedLenFeature([], tf.float32),
        "name": tf.io.FixedLenFeature([], tf.string, "none"),
    }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def function(inputs):
        return outputs(**tf.io.parse_example(inputs, features))

    return function


@dataclasses.dataclass
class ServerProcess:
    """A running server and how to reach it."""

    process: subprocess.Popen
    ready_line: str
    log: Path
    grpc_port: int
    rest_port: int

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}")
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.url = f"http://127.0.0.1:{self.rest_port}"


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version folder; tests copy it before they damage it."""
    module = ManySignatures()
    path = tmp_path_factory.mktemp("model") / "7"
    names = [name for name, value in vars(ManySignatures).items() if hasattr(value, "input_signature")]
    signatures = {name: getattr(module, name) for name in names}
    signatures["serving_default"] = module.echo
    for name, outputs in EXAMPLE_SIGNATURES.items():
        signatures[name] = make_example_function(outputs)
    tf.saved_model.save(module, str(path), signatures=signatures)
    return path


@pytest.fixture(scope="session")
def model_base_path(saved_model: Path) -> Path:
    """The folder of version 7, with an older version and things that are no version beside it."""
    base_path = saved_model.parent
    (base_path / "6").mkdir()
    (base_path / "10.tmp").mkdir()
    (base_path / "notes.txt").write_text("not a version")
    return base_path


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def start_server(
    model_base_path: Path,
    free_port: Callable[[], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers, waits until they are ready, and ends them after the tests.

    Warming up takes most of a start. So servers go without, but for those that are started with
    `warms_up`; those of tests/test_cli.py and tests/test_clean_env.py do it, too.
    """
    processes = []

    def start(*flags: str, warms_up: bool = False) -> ServerProcess:
        log = tmp_path_factory.mktemp("log") / "stderr.txt"
        rest_port = free_port()
        has_source = any(flag.startswith(("--model_base_path", "--model_config_file")) for flag in flags)
        source = [] if has_source else [f"--model_base_path={model_base_path}"]
        command = [
            *(sys.executable, "-c", RUN_WITHOUT_KERASLLM),
            *source,
            "--host=127.0.0.1",
            "--port=0",
            f"--rest_api_port={rest_port}",
            f"--enable_model_warmup={'true' if warms_up else 'false'}",
            *flags,
        ]
        environment = {**os.environ, "PYTHONPATH": str(SERVING_FOLDER)}
        with log.open("w") as stderr:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, env=environment, text=True
            )
        processes.append(process)
        line = read_line(process, START_SECONDS)
        match = READY_LINE.fullmatch(line)
        assert match, f"no ready line but {line!r}; stderr:\n{log.read_text()}"
        return ServerProcess(process, line, log, int(match["grpc"]), int(match["rest"]))

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., ServerProcess]) -> ServerProcess:
    """The server that most tests share."""
    return start_server("--model_name=test_model")


@pytest.fixture(scope="session")
def llm_server(start_server, random_served) -> ServerProcess:
    """A server of a random model with slots."""
    return start_server(f"--model_base_path={random_served}", "--model_name=tiny", "--max_queue=4")


def read_line(process: subprocess.Popen, timeout: float) -> str:
    """Returns the next line of a process, or an empty string when it ends or time is up."""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if selector.select(0.1):
                return process.stdout.readline()
    return ""


# Writes calls of tools between tags, as Hermes' and Qwen's do.
TOOL_TEMPLATE = """
{%- for tool in tools or [] %}{{ tool.function | tojson }}
{% endfor %}
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="session")
def tools_lm(tokenizer):
    """A model of random numbers, with room for tools in its prompt."""
    from reference.weights import randomize

    from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config, Tokenizer

    config = GPT2Config(vocabulary_size=400, context_length=1024, num_layers=1, num_heads=2, dim=16)
    settings = {"chat_template": TOOL_TEMPLATE, "eos_token": tokenizer.eos_token}
    tokenizer = Tokenizer.from_json(tokenizer.to_json(), settings=settings)
    return CausalLM(randomize(GPT2(config)), tokenizer, GenerationConfig(max_new_tokens=200))


@pytest.fixture(scope="session")
def tools_folder(tools_lm, make_once) -> Path:
    """It, exported."""
    return make_once("tools/1", lambda path: tools_lm.export(path, slots=4)).parent


@pytest.fixture(scope="session")
def tools_server(tools_folder, start_server) -> ServerProcess:
    """It, served."""
    return start_server(f"--model_base_path={tools_folder}", "--model_name=tools")


@pytest.fixture(scope="session")
def make_bert(stories):
    """Makes a small random BERT with a head, and its tokenizer."""
    from reference.weights import randomize

    from kerasllm import Bert, BertConfig, train_tokenizer

    def make(head, **more):
        word_pieces = train_tokenizer("wordpiece", stories[:50], 300)
        size = word_pieces.vocabulary_size
        sizes = {"context_length": 32, "num_layers": 1, "num_heads": 2, "dim": 16}
        config = BertConfig(vocabulary_size=size, **sizes, **more)
        return randomize(Bert(config, head=head)), word_pieces

    return make


@pytest.fixture(scope="session")
def embedder_folder(make_bert, make_once):
    from kerasllm import TextEmbedder

    return make_once("embedder/1", TextEmbedder(*make_bert(None)).export).parent


@pytest.fixture(scope="session")
def embedder_server(embedder_folder, start_server) -> ServerProcess:
    """It, served."""
    return start_server(f"--model_base_path={embedder_folder}", "--model_name=embedder")
