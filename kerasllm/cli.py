"""The `kerasllm` command: subcommands that each make a thin call into the library."""

import argparse
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence

from kerasllm.version import __version__

_EXAMPLES = """\
examples:
  kerasllm quickstart                                   see the whole promise hold, in a few minutes
  kerasllm train --config configs/gpt_5m_pretrain.yaml training.steps=500 output=runs/mine
  kerasllm generate runs/mine "Once upon a time" --max-new-tokens 60 --temperature 0.8
  kerasllm evaluate runs/mine --data my_texts/
  kerasllm export runs/mine served/mine/1               for TensorFlow Serving
  kerasllm export runs/mine phone/mine.tflite           for LiteRT
  kerasllm serve served/mine --rest_api_port=8501
  kerasllm doctor
"""

_TRAIN_HELP = """\
The file and the settings have the same names; a wrong one is answered with the list of all. Some:
  output=runs/mine                 where model, log and plot go
  data.paths=[moby.txt, texts/]    text files and folders (default: stories made by the library)
  tokenizer.kind=character         or byte_bpe, word; tokenizer.vocabulary_size=4096
  model.num_layers=6 model.dim=256 model.num_heads=4 model.context_length=256
  training.steps=2000 training.batch_size=16 training.sequence_length=256
  training.learning_rate=0.001 training.precision=mixed_bfloat16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0, 1 for bad input, 2 for a wrong call.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if os.environ.get("KERASLLM_TRACEBACK"):
            raise
        print(f"kerasllm {arguments.command}: error: {error}", file=sys.stderr)
        print("(set KERASLLM_TRACEBACK=1 for the whole story)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"kerasllm {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kerasllm",
        allow_abbrev=False,
        description="Language models in Keras: train, generate, export once, serve everywhere.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kerasllm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, run, text):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        return command

    command = add("quickstart", _quickstart, "train, export, serve and compare, all in a few minutes")
    command.add_argument(
        "--data", nargs="+", metavar="PATH", help="text files and folders (default: stories)"
    )
    command.add_argument(
        "--out", default="kerasllm_quickstart", help="folder to write to (default: %(default)s)"
    )
    command.add_argument(
        "--steps", type=int, default=500, help="updates of the training (default: %(default)s)"
    )

    command = add("train", _train, "train a model from a configuration")
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _TRAIN_HELP
    command.add_argument("--config", metavar="FILE", help="YAML file; configs/ holds some")
    command.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that go before the file's"
    )

    def model_argument(command):
        command.add_argument("model", help="folder written by train or save_pretrained, or a .keras file")

    command = add("generate", _generate, "continue prompts")
    model_argument(command)
    command.add_argument("prompts", nargs="+", metavar="PROMPT")
    command.add_argument("--max-new-tokens", type=int, help="most tokens to generate")
    command.add_argument("--temperature", type=float, help="0: the most likely token each time")
    command.add_argument("--top-k", type=int, help="draw among so many tokens; 0: among all")
    command.add_argument("--top-p", type=float, help="draw among the tokens that make up this probability")
    command.add_argument("--seed", type=int, help="start of the random numbers")

    command = add("evaluate", _evaluate, "measure loss and perplexity on texts")
    model_argument(command)
    command.add_argument("--data", nargs="+", required=True, metavar="PATH", help="text files and folders")
    command.add_argument(
        "--batch-size", type=int, default=32, help="sequences at once (default: %(default)s)"
    )

    command = add("export", _export, "write a SavedModel for servers or a .tflite for devices")
    model_argument(command)
    command.add_argument("path", help="a new version folder, such as served/my_model/1, or a .tflite file")

    command = add("serve", _serve, "serve an exported model over TensorFlow Serving's gRPC and REST")
    command.add_argument("path", help="folder with the numbered versions, such as served/my_model")
    command.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="--flag=value", help="flags of tensorflow_model_server"
    )

    add("doctor", _doctor, "print versions, devices and what is installed, and what is wrong with it")
    return parser


def _quickstart(arguments) -> int:
    from kerasllm.quickstart import run_quickstart

    return 0 if run_quickstart(arguments.out, arguments.data, arguments.steps) else 1


def _train(arguments) -> int:
    from kerasllm.config import load_run_config
    from kerasllm.tasks.train import train_to_folder

    run = load_run_config(arguments.config, arguments.settings)
    result = train_to_folder(run)
    print(f"validation perplexity {result.perplexity:.2f}")
    for name, perplexity in result.baselines.items():
        print(f"{name} baseline {perplexity:.2f}")
    print(f'model, log and plot: {run.output}\nnext: kerasllm generate {run.output} "…"')
    return 0


def _load(path: str):
    from kerasllm.tasks import CausalLM

    return CausalLM.load(path)


def _generate(arguments) -> int:
    model = _load(arguments.model)
    texts = model.generate(
        arguments.prompts,
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.seed,
    )
    for prompt, text in zip(arguments.prompts, texts, strict=True):
        print(prompt + text)
    return 0


def _evaluate(arguments) -> int:
    from kerasllm.data import read_documents

    documents = read_documents(arguments.data)
    results = _load(arguments.model).evaluate(documents, batch_size=arguments.batch_size)
    print(f"loss {results['loss']:.4f} nats per token, perplexity {results['perplexity']:.2f}")
    return 0


def _export(arguments) -> int:
    path = _load(arguments.model).export(arguments.path)
    print(f"written: {path}")
    if path.suffix != ".tflite":
        print(f"next: kerasllm serve {path.parent} --rest_api_port=8501")
    return 0


def _serve(arguments) -> int:
    # Another process image: the server has nothing of this library in it.
    if importlib.util.find_spec("uvicorn") is None:
        raise ModuleNotFoundError("The server needs an extra: pip install 'kerasllm[serving]'.")
    path = pathlib.Path(arguments.path)
    flags = arguments.flags
    if not any(flag.startswith("--model_name") for flag in flags):
        flags = [f"--model_name={path.resolve().name}", *flags]
    command = [sys.executable, "-m", "kerasllm_serving", f"--model_base_path={path}", *flags]
    os.execv(sys.executable, command)


def _doctor(arguments) -> int:
    from kerasllm.doctor import examine

    report = examine()
    width = max(len(name) for name, _ in report.facts)
    for name, value in report.facts:
        print(f"{name:<{width}}  {value}")
    for problem in report.problems:
        print(f"PROBLEM: {problem}")
    print("no problems found" if not report.problems else f"{len(report.problems)} problem(s) found")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
