"""The command `python -m kerasllm_serving`."""

import argparse
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

When it is ready it prints one line on stdout:

  kerasllm_serving: gRPC on 0.0.0.0:8500, REST on 0.0.0.0:8501, model my_model version 2 ready

SIGTERM or Ctrl-C lets the running requests finish and ends with exit code 0; a second one ends at
once. There is no TLS: in an open network
use --host=127.0.0.1 and a proxy.

A folder exported with slots (`kerasllm export MODEL PATH --slots 8`) is served on the REST port over
OpenAI's API as well, with continuous batching: /v1/models, /v1/completions, /v1/chat/completions,
/v1/embeddings, /tokenize, /detokenize. A page to chat with is at /, numbers for Prometheus are at /metrics.

  curl localhost:8501/v1/chat/completions \\
      -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; `sys.argv` by default.

    Returns:
        The exit code: 0 after a signal, 1 if the server cannot start.
    """
    flags = _make_parser().parse_args(argv)
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
        values = vars(flags)
        file = values.pop("api_keys_file")
        serve(ServerOptions(**values, api_keys=read_api_keys(file) if file else ()))
    except StartupError as error:
        print(f"kerasllm_serving: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while it loads; later the signal drains the server
        return 130
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kerasllm_serving",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # As in tensorflow_model_server: threads mostly wait for the model.
    threads = 4 * len(os.sched_getaffinity(0))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model_base_path",
        type=Path,
        metavar="FOLDER",
        help="folder that holds the numeric version folders",
    )
    source.add_argument(
        "--model_config_file",
        type=Path,
        metavar="FILE",
        help="text file with a ModelServerConfig: several models, versions, labels",
    )
    parser.add_argument(
        "--model_config_file_poll_wait_seconds",
        type=_not_negative,
        default=0,
        metavar="N",
        help="how often that file is read again (default 0: never)",
    )
    parser.add_argument(
        "--file_system_poll_wait_seconds",
        type=_not_negative,
        default=1,
        metavar="N",
        help="how often is looked for new versions, which are loaded before old ones go (default 1); "
        "0: never",
    )
    parser.add_argument(
        "--max_num_load_retries",
        type=_not_negative,
        default=5,
        metavar="N",
        help="how often a version that did not load is tried again, once a minute (default 5)",
    )
    parser.add_argument(
        "--allow_version_labels_for_unavailable_models",
        type=_boolean,
        default=False,
        metavar="BOOLEAN",
        help="whether a new label may name a version that is not loaded (default false)",
    )
    parser.add_argument(
        "--enable_model_warmup",
        type=_boolean,
        default=True,
        metavar="BOOLEAN",
        help="whether the requests in assets.extra/ are run before a version is served (default true)",
    )
    parser.add_argument(
        "--model_name",
        type=_non_empty,
        default="default",
        metavar="NAME",
        help='name by which requests ask for the model (default "default")',
    )
    parser.add_argument(
        "--host",
        type=_non_empty,
        default="0.0.0.0",
        metavar="ADDRESS",
        help="address to listen at (default 0.0.0.0: every network of this machine)",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=8500,
        help="port of gRPC (default 8500); 0 takes a free one, which the ready line names",
    )
    parser.add_argument(
        "--rest_api_port",
        type=_port,
        default=0,
        metavar="PORT",
        help="port of REST (default 0: no REST)",
    )
    parser.add_argument(
        "--grpc_max_threads",
        type=_positive,
        default=threads,
        metavar="N",
        help=f"gRPC requests worked on at once (default 4 x CPUs: {threads})",
    )
    parser.add_argument(
        "--rest_api_num_threads",
        type=_positive,
        default=threads,
        metavar="N",
        help=f"REST requests worked on at once (default 4 x CPUs: {threads})",
    )
    parser.add_argument(
        "--rest_api_timeout_in_ms",
        type=_positive,
        default=30000,
        metavar="MS",
        help="milliseconds after which a REST request is cancelled with 504 (default 30000); a "
        "gRPC request brings its own deadline",
    )
    parser.add_argument(
        "--rest_api_enable_cors_support",
        type=_boolean,
        default=False,
        metavar="BOOLEAN",
        help="whether pages of other servers may ask (default false)",
    )
    parser.add_argument(
        "--api_keys_file",
        type=Path,
        metavar="FILE",
        help="file with an API key per line, one of which has to come with each request as "
        "`Authorization: Bearer KEY`, over gRPC as metadata (default: anybody may ask)",
    )
    parser.add_argument(
        "--max_body_bytes",
        type=_positive,
        default=64 * 2**20,
        metavar="N",
        help="most bytes of the body of a REST request (default 64 MiB)",
    )
    parser.add_argument(
        "--access_log",
        type=_boolean,
        default=False,
        metavar="BOOLEAN",
        help="whether each REST request is logged to stderr as a line of JSON, without its text "
        "(default false)",
    )
    parser.add_argument(
        "--max_queue",
        type=_positive,
        default=256,
        metavar="N",
        help="most rows that wait for a slot of a language model; more are refused (default 256)",
    )
    parser.add_argument(
        "--steps_per_turn",
        type=_positive,
        default=4,
        metavar="N",
        help="most tokens that a row makes before others may join or leave; more are more tokens a second, "
        "in larger pieces of a stream (default 4)",
    )
    parser.add_argument(
        "--generation_timeout_in_ms",
        type=_not_negative,
        default=600_000,
        metavar="MS",
        help="milliseconds after which a generation over OpenAI's API is ended (default 600000); 0: never",
    )
    parser.add_argument(
        "--drain_seconds",
        type=_positive,
        default=30,
        metavar="N",
        help="how long running requests may take to finish after SIGTERM (default 30)",
    )
    return parser


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
