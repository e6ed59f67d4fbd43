"""The command `python -m kerasllm_serving`."""

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_DESCRIPTION = """\
Serves an exported model with TensorFlow Serving's gRPC and REST API.

The flags, the messages and the error codes are those of tensorflow_model_server, so clients work
with either. It serves the version folder with the highest number below --model_base_path, and a newer one
when it comes:

  served/my_model/1/saved_model.pb
  served/my_model/2/saved_model.pb      <- this one
"""

_EPILOG = """\
Example:

  python -m kerasllm_serving --model_base_path=served/my_model --model_name=my_model \\
      --port=8500 --rest_api_port=8501

  curl localhost:8501/v1/models/my_model
  curl localhost:8501/v1/models/my_model/metadata
  curl localhost:8501/v1/models/my_model:predict -d '{"instances": ["Once upon a time"]}'
  curl localhost:8501/v1/models/my_model:classify -d '{"examples": [{"text": "What a film!"}]}'

When it is ready it prints one line on stdout:

  kerasllm_serving: gRPC on 0.0.0.0:8500, REST on 0.0.0.0:8501, model my_model version 2 ready

SIGTERM or Ctrl-C lets the running requests finish and ends with exit code 0; a second one ends at
once. In an open network use --ssl_config_file, --rest_api_ssl_certfile and --api_keys_file.

A folder exported with slots (`kerasllm export MODEL PATH --slots 8`) is served on the REST port over
OpenAI's API as well, with continuous batching: /v1/models, /v1/completions, /v1/chat/completions,
/v1/embeddings, /tokenize, /detokenize. A .tflite or .litertlm answers there too, one request after the
other. A page to chat with is at /, numbers for Prometheus are at /metrics.

  curl localhost:8501/v1/chat/completions \\
      -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'
"""

# As in tensorflow_model_server: threads mostly wait for the model.
_THREADS = 4 * len(os.sched_getaffinity(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; `sys.argv` by default.

    Returns:
        The exit code: 0 after a signal, 1 if the server cannot start.
    """
    flags = make_parser().parse_args(argv)
    if flags.rest_api_port == flags.port != 0:
        print(
            "kerasllm_serving: error: `--rest_api_port` must differ from `--port`. "
            f"Received: {flags.port} for both",
            file=sys.stderr,
        )
        return 1
    # TensorFlow's start-up chatter would bury the one message that matters.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Imported here, so that --help and a wrong flag answer at once.
    from kerasllm_serving.api_keys import read_api_keys
    from kerasllm_serving.errors import StartupError
    from kerasllm_serving.server import ServerOptions, serve

    try:
        values = {name: value for name, value in vars(flags).items() if name not in _FIXED}
        file = values.pop("api_keys_file")
        serve(ServerOptions(**values, api_keys=read_api_keys(file) if file else ()))
    except StartupError as error:
        print(f"kerasllm_serving: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while it loads; later the signal drains the server
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m kerasllm_serving",
        usage="%(prog)s (--model_base_path=FOLDER | --model_config_file=FILE) [--flag=value ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version",
        action=_ShowVersion,
        nargs=0,
        default=argparse.SUPPRESS,
        help="say the versions and end",
    )
    _add_models(parser.add_argument_group("models"))
    _add_grpc(parser.add_argument_group("gRPC"))
    _add_rest(parser.add_argument_group("REST"))
    _add_batching(parser.add_argument_group("batching: requests that come together become one run"))
    _add_language_models(parser.add_argument_group("language models over OpenAI's API"))
    _add_runtime(parser.add_argument_group("runtime"))
    fixed = parser.add_argument_group("flags of tensorflow_model_server with at most one value here")
    for name, (accepted, reason) in _FIXED.items():
        fixed.add_argument(
            f"--{name}",
            type=functools.partial(_fixed, accepted, reason),
            nargs="?",
            const="true",
            default=argparse.SUPPRESS,
            metavar=accepted or "",
            help=f"{reason}{'' if accepted else ': refused'}",
        )
    return parser


# Flags that would change nothing here, or ask for what there is not: the one value that holds, and why.
_FIXED = {
    "enable_profiler": ("false", "there is no profiler; profile the SavedModel with tf.profiler"),
    "use_alts_credentials": ("false", "there is no ALTS; see --ssl_config_file"),
    "prefer_tflite_model": ("false", "a .tflite is served where there is no SavedModel"),
    "num_tflite_pools": ("", "SavedModels only"),
    "num_tflite_interpreters_per_pool": ("", "SavedModels only"),
    "platform_config_file": ("", "the platform is TensorFlow; see the flags of the runtime"),
    "thread_pool_factory_config_file": ("", "see --tensorflow_inter_op_parallelism"),
    "num_load_threads": ("0", "versions are loaded one by one, while requests go on"),
    "num_unload_threads": ("0", "versions are dropped one by one, while requests go on"),
    "flush_filesystem_caches": ("false", "caches are left to the operating system"),
    "remove_unused_fields_from_bundle_metagraph": ("true", "only signatures are kept"),
    "xla_cpu_compilation_enabled": ("true", "models that ask for XLA get it"),
    "xla_gpu_compilation_enabled": ("true", "models that ask for XLA get it"),
    "mixed_precision": ("", "the precision is that of the export"),
    "skip_initialize_tpu": ("true", "there are no TPUs"),
}


def _add_models(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model_base_path",
        type=Path,
        metavar="FOLDER",
        help="folder that holds the numeric version folders; or a .tflite or .litertlm of a language "
        "model, which may also lie in a version folder by itself",
    )
    source.add_argument(
        "--model_config_file",
        type=Path,
        metavar="FILE",
        help="text file with a ModelServerConfig: several models, versions, labels",
    )
    group.add_argument(
        "--model_name",
        type=_non_empty,
        default="default",
        metavar="NAME",
        help='name by which requests ask for the model (default "default")',
    )
    group.add_argument(
        "--model_config_file_poll_wait_seconds",
        type=_not_negative,
        default=0,
        metavar="N",
        help="how often that file is read again (default 0: never)",
    )
    group.add_argument(
        "--file_system_poll_wait_seconds",
        type=_not_negative,
        default=1,
        metavar="N",
        help="how often is looked for new versions, which are loaded before old ones go (default 1); "
        "0: never",
    )
    group.add_argument(
        "--max_num_load_retries",
        type=_not_negative,
        default=5,
        metavar="N",
        help="how often a version that did not load is tried again (default 5)",
    )
    group.add_argument(
        "--load_retry_interval_micros",
        type=_not_negative,
        default=60_000_000,
        metavar="N",
        help="microseconds before it is (default 60000000: a minute)",
    )
    _add_boolean(
        group,
        "--allow_version_labels_for_unavailable_models",
        False,
        "whether a new label may name a version that is not loaded",
    )
    _add_boolean(
        group,
        "--enable_model_warmup",
        True,
        "whether the requests in assets.extra/ are run before a version is served",
    )
    group.add_argument(
        "--num_request_iterations_for_warmup",
        type=_positive,
        default=1,
        metavar="N",
        help="how often each of them is run (default 1)",
    )
    group.add_argument(
        "--saved_model_tags",
        type=_names,
        default=("serve",),
        metavar="TAG,...",
        help="tags of the graph to load (default serve)",
    )
    _add_boolean(
        group,
        "--enable_signature_method_name_check",
        False,
        "whether Classify and Regress take only signatures that are declared for them, as those of "
        "TensorFlow 1 are",
    )


def _add_grpc(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        type=_non_empty,
        default="0.0.0.0",
        metavar="ADDRESS",
        help="address to listen at, REST too (default 0.0.0.0: every network of this machine)",
    )
    group.add_argument(
        "--port",
        type=_port,
        default=8500,
        help="port of gRPC (default 8500); 0 takes a free one, which the ready line names",
    )
    group.add_argument(
        "--grpc_socket_path",
        type=_non_empty,
        metavar="PATH",
        help="a Unix socket to listen at as well",
    )
    group.add_argument(
        "--grpc_max_threads",
        type=_positive,
        default=_THREADS,
        metavar="N",
        help=f"gRPC requests worked on at once (default 4 x CPUs: {_THREADS})",
    )
    group.add_argument(
        "--grpc_channel_arguments",
        type=_channel_arguments,
        default={},
        metavar="KEY=VALUE,...",
        help="settings of gRPC, such as grpc.max_connection_age_ms=2000",
    )
    group.add_argument(
        "--ssl_config_file",
        type=Path,
        metavar="FILE",
        help="text file with an SSLConfig, which encrypts gRPC: server_key, server_cert and custom_ca as "
        "PEM, and client_verify",
    )
    _add_boolean(
        group,
        "--enable_grpc_healthcheck_service",
        False,
        'whether grpc.health.v1 answers for "", ModelService and PredictionService',
    )
    _add_boolean(
        group,
        "--enable_serialization_as_tensor_content",
        False,
        "whether answers hold the bytes of tensors instead of typed values",
    )


def _add_rest(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rest_api_port",
        type=_port,
        default=0,
        metavar="PORT",
        help="port of REST (default 0: no REST)",
    )
    group.add_argument(
        "--rest_api_num_threads",
        type=_positive,
        default=_THREADS,
        metavar="N",
        help=f"REST requests worked on at once (default 4 x CPUs: {_THREADS})",
    )
    group.add_argument(
        "--rest_api_timeout_in_ms",
        type=_positive,
        default=30000,
        metavar="MS",
        help="milliseconds after which a REST request is cancelled with 504 (default 30000); a "
        "gRPC request brings its own deadline",
    )
    _add_boolean(group, "--rest_api_enable_cors_support", False, "whether pages of other servers may ask")
    group.add_argument(
        "--rest_api_ssl_certfile",
        type=Path,
        metavar="FILE",
        help="certificate that encrypts REST, and those it was signed with, as PEM (default: none)",
    )
    group.add_argument(
        "--rest_api_ssl_keyfile",
        type=Path,
        metavar="FILE",
        help="its key, as PEM (default: in the same file)",
    )
    group.add_argument(
        "--rest_api_ssl_ca_certs",
        type=Path,
        metavar="FILE",
        help="authorities whose certificates clients must bring, as PEM (default: they need none)",
    )
    group.add_argument(
        "--monitoring_config_file",
        type=Path,
        metavar="FILE",
        help="text file with a MonitoringConfig: where Prometheus finds the numbers, besides /metrics",
    )
    group.add_argument(
        "--api_keys_file",
        type=Path,
        metavar="FILE",
        help="file with an API key per line, one of which has to come with each request as "
        "`Authorization: Bearer KEY`, over gRPC as metadata (default: anybody may ask)",
    )
    group.add_argument(
        "--max_requests_per_minute_per_key",
        type=_positive,
        metavar="N",
        help="how often a key may ask in a minute; more gets 429 with Retry-After, over gRPC "
        "RESOURCE_EXHAUSTED; without keys all are one (default: as often as it likes)",
    )
    group.add_argument(
        "--max_concurrent_requests_per_key",
        type=_positive,
        metavar="N",
        help="how many requests of a key are answered at once (default: any number)",
    )
    group.add_argument(
        "--max_body_bytes",
        type=_positive,
        default=64 * 2**20,
        metavar="N",
        help="most bytes of the body of a REST request (default 64 MiB)",
    )
    _add_boolean(
        group,
        "--access_log",
        False,
        "whether each REST request is logged to stderr as a line of JSON, without its text",
    )
    _add_boolean(
        group,
        "--enable_opentelemetry",
        False,
        "whether each request makes a span that is sent to $OTEL_EXPORTER_OTLP_ENDPOINT, with the tokens "
        "read and made, without the texts; needs pip install 'kerasllm[telemetry]'",
    )
    group.add_argument(
        "--drain_seconds",
        type=_positive,
        default=30,
        metavar="N",
        help="how long running requests, of gRPC too, may take to finish after SIGTERM (default 30)",
    )


def _add_batching(group: argparse._ArgumentGroup) -> None:
    _add_boolean(group, "--enable_batching", False, "whether they do")
    group.add_argument(
        "--batching_parameters_file",
        type=Path,
        metavar="FILE",
        help="text file with BatchingParameters (default: up to 1000 rows, no waiting)",
    )
    _add_boolean(
        group,
        "--enable_per_model_batching_parameters",
        False,
        "whether each version says so itself, in batching_params.pbtxt; one without it is not batched",
    )


def _add_language_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max_queue",
        type=_positive,
        default=256,
        metavar="N",
        help="most rows that wait for a slot of a language model; more are refused (default 256)",
    )
    group.add_argument(
        "--steps_per_turn",
        type=_positive,
        default=4,
        metavar="N",
        help="most tokens that a row makes before others may join or leave; more are more tokens a second, "
        "in larger pieces of a stream (default 4)",
    )
    group.add_argument(
        "--prefill_chunk_tokens",
        type=_positive,
        default=128,
        metavar="N",
        help="most tokens of each prompt that are read between two turns: a long prompt keeps streams "
        "waiting no longer than so many tokens take, several prompts as many times (default 128)",
    )
    _add_boolean(
        group,
        "--enable_prefix_cache",
        True,
        "whether a prompt goes on from the longest beginning of it that a slot still holds; this takes no "
        "memory beyond that of the slots, where what a request read stays until the room is needed",
    )
    group.add_argument(
        "--generation_timeout_in_ms",
        type=_not_negative,
        default=600_000,
        metavar="MS",
        help="milliseconds after which a generation is ended (default 600000); 0: never",
    )


def _add_runtime(group: argparse._ArgumentGroup) -> None:
    for name, text in (
        ("session", "threads of both kinds below"),
        ("intra_op", "threads for one op"),
        ("inter_op", "ops that run at once"),
    ):
        group.add_argument(
            f"--tensorflow_{name}_parallelism",
            type=_not_negative,
            default=0,
            metavar="N",
            help=f"{text} (default 0: TensorFlow chooses)",
        )
    group.add_argument(
        "--tensorflow_session_config_file",
        type=Path,
        metavar="FILE",
        help="text file with a ConfigProto; the flags above go before it",
    )
    group.add_argument(
        "--per_process_gpu_memory_fraction",
        type=_fraction,
        default=0.0,
        metavar="X",
        help="share of the GPU's memory to take at once (default 0: TensorFlow chooses)",
    )


def _add_boolean(group: argparse._ArgumentGroup, name: str, default: bool, text: str) -> None:
    """Adds a flag that is true where it has no value, as in tensorflow_model_server."""
    group.add_argument(
        name,
        type=_boolean,
        nargs="?",
        const=True,
        default=default,
        metavar="BOOLEAN",
        help=f"{text} (default {str(default).lower()})",
    )


class _ShowVersion(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from importlib import metadata

        for package in ("kerasllm", "tensorflow", "grpcio"):
            try:
                print(package, metadata.version(package))
            except metadata.PackageNotFoundError:  # the server may have been copied
                print(package, "is not installed as a package")
        parser.exit()


def _fixed(accepted: str, reason: str, text: str) -> str:
    if not accepted or text.lower() != accepted:
        rule = f"must be {accepted}" if accepted else "is not supported"
        raise argparse.ArgumentTypeError(f"{rule}: {reason}. Received: {text}")
    return text


def _names(text: str) -> tuple[str, ...]:
    return tuple(_non_empty(part) for part in text.split(","))


def _channel_arguments(text: str) -> dict[str, int | str]:
    settings = {}
    for part in text.split(",") if text else ():
        key, separator, value = part.partition("=")
        if not key or not separator:
            raise argparse.ArgumentTypeError(f"must be KEY=VALUE,... Received: {text}")
        settings[key] = int(value) if value.removeprefix("-").isdecimal() else value
    return settings


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1. Received: {text}")
    return value


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"must be true or false. Received: {text}")
    return text.lower() in ("true", "1")


def _not_negative(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _non_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535. Received: {text}")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a positive whole number. Received: {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
