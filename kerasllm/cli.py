"""The `kerasllm` command: subcommands that each make a thin call into the library."""

import argparse
import importlib.util
import json
import os
import pathlib
import sys
import warnings
from collections.abc import Sequence

from kerasllm.version import __version__

_EXAMPLES = """\
examples:
  kerasllm quickstart                                   see the whole promise hold, in a few minutes
  kerasllm train --config configs/gpt_5m_pretrain.yaml training.steps=500 output=runs/mine
  kerasllm launch --workers 2 -- train --config configs/gpt_5m_pretrain.yaml
  kerasllm generate runs/mine "Once upon a time" --max-new-tokens 60 --temperature 0.8
  kerasllm chat SmolLM2-135M-Instruct.Q4_1.gguf         talk to a model, answers as they are written
  kerasllm embed all-MiniLM-L6-v2 "a cat" "a kitten" --similarity
  kerasllm classify my_classifier "What a film!"
  kerasllm fill-mask bert-base-uncased "Paris is the [MASK] of France."
  kerasllm convert model.gguf converted                 to Hugging Face's layout
  kerasllm evaluate runs/mine --data my_texts/
  kerasllm export runs/mine served/mine/1               for TensorFlow Serving
  kerasllm export runs/mine served/mine/2 --verify --docker
  kerasllm export runs/mine phone/mine.tflite           for LiteRT
  kerasllm export runs/mine mine.litertlm --quantize int8
  kerasllm run-litert mine.litertlm "Hello"             as a phone runs it
  kerasllm serve served/mine --rest_api_port=8501
  kerasllm doctor
"""

_TRAIN_HELP = """\
The file and the settings have the same names; a wrong one is answered with the list of all. Some:
  output=runs/mine                 where model, log, plot and report go
  family=bert                      gpt2 and llama learn the next token, bert hidden tokens, t5 cut-out spans
  data.paths=[moby.txt, texts/]    text files and folders (default: stories made by the library)
  tokenizer.kind=character         or byte_bpe, word; wordpiece for bert, sentencepiece for t5
  tokenizer.vocabulary_size=4096
  model.num_layers=6 model.dim=256 model.num_heads=4 model.context_length=256
  training.steps=2000 training.batch_size=16 training.sequence_length=256
  training.learning_rate=0.001 training.precision=mixed_bfloat16 training.microbatches=4
  training.optimizer=muon training.schedule=wsd training.save_every=100
  training.quantization_aware=int4 so that `export --quantize int4` costs less: it is computed with weights
                                   rounded to 4 bits, and those are written (int8: to 8)
  objective.packing=segments       or, for bert, objective.whole_words=true
  logging.sample_every=500 logging.peak_flops=989e12 logging.tensorboard=false
A run that was interrupted goes on from its last checkpoint when it is started again.
"""

_LAUNCH_HELP = """\
examples:
  kerasllm launch --workers 2 -- train --config configs/gpt_5m_pretrain.yaml training.save_every=100
  kerasllm launch --print-config host-a:2222 host-b:2222      then run the same train on both hosts
  kerasllm launch --print-kubernetes --workers 4 -- train --config /runs/config.yaml > training.yaml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code: 0, 1 for bad input, 2 for a wrong call.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Without the line of code that warns, which says nothing to who calls a command.
    warnings.formatwarning = lambda message, *_, **__: f"kerasllm: warning: {message}\n"
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

    command = add("launch", _launch, "train with several workers: start, watch and restart them")
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _LAUNCH_HELP
    command.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    command.add_argument(
        "--restarts", type=int, default=3, help="how often all are started again (default: %(default)s)"
    )
    command.add_argument(
        "--print-config",
        nargs="+",
        metavar="HOST:PORT",
        help="only print TF_CONFIG for a cluster of workers at these addresses",
    )
    command.add_argument("--index", type=int, help="with --print-config: only that of this worker")
    command.add_argument("--print-kubernetes", action="store_true", help="only print a Kubernetes manifest")
    command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- train ...")

    def model_argument(command, dtype_help="precision, such as bfloat16 (default: float32)"):
        command.add_argument(
            "model",
            help="folder in Hugging Face's layout (train writes one), hub id, .gguf file, KerasHub preset "
            "or .keras file",
        )
        command.add_argument("--dtype", help=dtype_help)

    def texts_argument(command, what):
        command.add_argument(
            "texts", nargs="*", metavar="TEXT", help=f"{what}; none: a text per line of stdin"
        )

    command = add("generate", _generate, "continue prompts, or answer them with an encoder-decoder")
    model_argument(command)
    command.add_argument("prompts", nargs="+", metavar="PROMPT")
    _add_generation_options(command)
    command.add_argument("--num-beams", type=int, help="beams of a beam search")
    command.add_argument("-n", type=int, default=1, help="results per prompt (default: %(default)s)")
    command.add_argument("--stream", action="store_true", help="print one prompt's text as it is made")
    command.add_argument("--json-schema", metavar="FILE", help="the result fits this JSON schema")
    command.add_argument("--regex", help="the result matches this regular expression")
    command.add_argument("--grammar", metavar="FILE", help="the result fits this Lark grammar")

    command = add("chat", _chat, "talk to a chat model; /help there lists the commands")
    model_argument(command)
    command.add_argument("--system", metavar="TEXT", help="system prompt")
    _add_generation_options(command)

    command = add("embed", _embed, "turn texts into vectors, one JSON line each")
    model_argument(command)
    texts_argument(command, "texts to embed")
    command.add_argument(
        "--similarity", action="store_true", help="print the cosines between the texts instead"
    )

    command = add("classify", _classify, "classify texts")
    model_argument(command)
    texts_argument(command, "texts to classify")
    command.add_argument("--top-k", type=int, default=1, help="labels to print (default: %(default)s)")
    command.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="cut longer texts (default: refuse what does not fit)",
    )

    command = add("fill-mask", _fill_mask, "say what stands at the masks of texts")
    model_argument(command)
    texts_argument(command, "texts with the tokenizer's mask token, such as [MASK]")
    command.add_argument("--top-k", type=int, default=5, help="candidates to print (default: %(default)s)")

    command = add("convert", _convert, "load a checkpoint of any kind and write Hugging Face's layout")
    command.add_argument("source", help="folder, hub id, .gguf file or KerasHub preset")
    command.add_argument("path", help="folder to write")
    command.add_argument("--dtype", help="precision to store, such as bfloat16 (default: float32)")

    command = add("evaluate", _evaluate, "measure loss and perplexity on texts")
    model_argument(command)
    command.add_argument("--data", nargs="+", required=True, metavar="PATH", help="text files and folders")
    command.add_argument(
        "--batch-size", type=int, default=32, help="sequences at once (default: %(default)s)"
    )

    command = add(
        "export", _export, "write a SavedModel for servers, or a .tflite or .litertlm for devices"
    )
    model_argument(
        command,
        "precision of the weights: float32 (default), bfloat16, or, to save memory, float16 or int8, with "
        "which a SavedModel computes in float32",
    )
    command.add_argument(
        "path", help="a new version folder, such as served/my_model/1, or a .tflite or .litertlm"
    )
    command.add_argument(
        "--overwrite", action="store_true", help="replace a folder, and files of --docker, that are there"
    )
    command.add_argument(
        "--verify",
        action="store_true",
        help="load the folder where only TensorFlow is, compare it with the model, and only then put it "
        "where servers look",
    )
    command.add_argument(
        "--docker",
        action="store_true",
        help="write what runs the models under TensorFlow Serving into tf_serving/ beside them",
    )
    command.add_argument("--license", help="license of the weights (default: what the checkpoint says)")
    command.add_argument(
        "--slots",
        type=int,
        default=0,
        help="rows of the continuous batching with which `kerasllm serve` answers OpenAI's API "
        "(default: %(default)s, no such API)",
    )
    command.add_argument(
        "--slot-length", type=int, metavar="TOKENS", help="most tokens of a row (default: the context)"
    )
    command.add_argument(
        "--jit-compile",
        action=argparse.BooleanOptionalAction,
        help="whether XLA compiles the decoding: quicker, but TensorFlow Serving needs "
        "--xla_cpu_compilation_enabled then (default: only for the slots of a large model)",
    )

    devices = command.add_argument_group("for devices", "options of a .tflite or .litertlm")
    devices.add_argument(
        "--quantize",
        choices=["none", "fp16", "int8", "int8_weights", "int4"],
        help="precision of the weights (default: int8 for a .litertlm, none for a .tflite)",
    )
    devices.add_argument(
        "--calibration-data",
        nargs="+",
        metavar="PATH",
        help="for int8 and int4: texts that the export is fitted to (default: what the model writes)",
    )
    devices.add_argument(
        "--cache-length",
        type=int,
        metavar="TOKENS",
        help="most tokens of prompt and answer; in a .litertlm unused ones cost time too",
    )
    devices.add_argument(
        "--prefill-lengths", type=int, nargs="+", metavar="TOKENS", help="tokens that one call may read"
    )
    devices.add_argument(
        "--short-lengths",
        type=int,
        nargs="*",
        metavar="TOKENS",
        help="of a .tflite: lengths up to which calls are quicker (default: 256 512 1024)",
    )
    devices.add_argument(
        "--sentencepiece-model",
        metavar="FILE",
        help="of a .litertlm: the tokenizer's tokenizer.model, to be bundled instead of its tokenizer.json",
    )
    devices.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="held-out texts to compare the export on (default: stories)",
    )
    devices.add_argument(
        "--largest-divergence", type=float, metavar="NATS", help="refuse an export that diverges further"
    )
    devices.add_argument(
        "--force", action="store_true", help="write it all the same, and where memory seems too small"
    )

    command = add("run-litert", _run_litert, "run a .litertlm with LiteRT-LM, or a .tflite with LiteRT")
    command.add_argument("path", help="the file")
    command.add_argument("prompt", metavar="PROMPT", help="a message; for a .tflite a text to continue")
    command.add_argument("--max-new-tokens", type=int, help="most tokens to generate")
    command.add_argument("--raw", action="store_true", help="of a .litertlm: no chat, continue the prompt")
    command.add_argument("--threads", type=int, help="threads (default: those of the processor)")

    command = add("benchmark-litert", _benchmark_litert, "measure a .litertlm with LiteRT-LM")
    command.add_argument("path", help="the file")
    command.add_argument("--prompt-tokens", type=int, default=128, help="(default: %(default)s)")
    command.add_argument("--new-tokens", type=int, default=64, help="(default: %(default)s)")
    command.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")

    command = add(
        "serve", _serve, "serve an exported model over TensorFlow Serving's gRPC and REST and OpenAI's API"
    )
    command.add_argument(
        "path", help="folder with the numbered versions, such as served/my_model; or a .tflite or .litertlm"
    )
    command.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="--flag=value", help="flags of tensorflow_model_server"
    )

    add("doctor", _doctor, "print versions, devices and what is installed, and what is wrong with it")
    return parser


# Options of generate and chat, which have the names of `GenerationConfig`.
_GENERATION_OPTIONS = (
    ("max_new_tokens", int, "most tokens to generate"),
    ("min_new_tokens", int, "no end before so many tokens"),
    ("temperature", float, "0: the most likely token each time; above 0: drawn"),
    ("top_k", int, "draw among so many tokens; 0: among all"),
    ("top_p", float, "draw among the tokens that make up this probability"),
    ("min_p", float, "draw among the tokens at least this likely, beside the likeliest"),
    ("typical_p", float, "draw among the typical tokens that make up this probability"),
    ("repetition_penalty", float, "above 1: repeat less"),
    ("presence_penalty", float, "taken off the score of each token that was there"),
    ("frequency_penalty", float, "taken off for each time it was there"),
    ("no_repeat_ngram_size", int, "no sequence of so many tokens twice"),
    ("seed", int, "start of the random numbers"),
)


def _add_generation_options(command: argparse.ArgumentParser) -> None:
    for name, kind, text in _GENERATION_OPTIONS:
        command.add_argument("--" + name.replace("_", "-"), type=kind, help=text)
    command.add_argument("--stop", action="append", metavar="TEXT", help="end before this; may be repeated")


def _generation_settings(arguments) -> dict:
    """The options that were given."""
    settings = {name: getattr(arguments, name) for name, _, _ in _GENERATION_OPTIONS}
    settings["stop_strings"] = arguments.stop
    return {name: value for name, value in settings.items() if value is not None}


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
    print(f"model, log, plot and report: {run.output}")
    if run.objective_name == "masked_lm":
        mask = result.model.tokenizer.mask_token
        print(f'next: kerasllm fill-mask {run.output} "… {mask} …"')
    elif run.objective_name == "classification":
        print(f'next: kerasllm classify {run.output} "…"')
    else:
        print(f'next: kerasllm generate {run.output} "…"')
    return 0


def _launch(arguments) -> int:
    from kerasllm.launch import kubernetes_manifest, launch, tf_config

    command = arguments.arguments[arguments.arguments[:1] == ["--"] :]
    if arguments.print_config:
        addresses = arguments.print_config
        indices = range(len(addresses)) if arguments.index is None else [arguments.index]
        for index in indices:
            print(tf_config(addresses, index))
        return 0
    if arguments.print_kubernetes:
        print(kubernetes_manifest(arguments.workers, command), end="")
        return 0
    return launch(command, arguments.workers, arguments.restarts)


def _load(arguments, *tasks: str):
    """Loads the model as one of the named tasks: as the one that its checkpoint is for."""
    from kerasllm.tasks import load_task

    return load_task(arguments.model, tasks, arguments.dtype)


def _texts(arguments) -> list[str]:
    return arguments.texts or [line.rstrip("\n") for line in sys.stdin]


def _generate(arguments) -> int:
    model = _load(arguments, "text-generation", "text2text-generation")
    settings = _generation_settings(arguments)
    if arguments.json_schema:
        settings["json_schema"] = pathlib.Path(arguments.json_schema).read_text(encoding="utf-8")
    if arguments.grammar:
        settings["grammar"] = pathlib.Path(arguments.grammar).read_text(encoding="utf-8")
    if arguments.regex:
        settings["regex"] = arguments.regex
    # A continuation is read after its prompt, an answer of an encoder-decoder alone.
    shown = [prompt if model.continues_prompts else "" for prompt in arguments.prompts]
    if arguments.stream:
        if len(arguments.prompts) != 1 or arguments.n != 1:
            raise ValueError(
                "`--stream` is for one result of one prompt. "
                f"Received: {len(arguments.prompts)} prompts, -n {arguments.n}"
            )
        print(shown[0], end="", flush=True)
        for piece in model.generate(arguments.prompts[0], stream=True, **settings):
            print(piece, end="", flush=True)
        print()
        return 0
    results = model.generate(arguments.prompts, n=arguments.n, **settings)
    for prompt, texts in zip(shown, results, strict=True):
        for text in [texts] if isinstance(texts, str) else texts:
            print(prompt + text)
    return 0


def _chat(arguments) -> int:
    from kerasllm.terminal import run_chat

    model = _load(arguments, "text-generation")
    run_chat(model, arguments.system, _generation_settings(arguments))
    return 0


def _embed(arguments) -> int:
    model, texts = _load(arguments, "feature-extraction"), _texts(arguments)
    vectors = model.encode(texts)
    if arguments.similarity:
        for row in model.similarity(vectors, vectors):
            print(" ".join(f"{cosine:7.4f}" for cosine in row))
    else:
        for text, vector in zip(texts, vectors, strict=True):
            print(json.dumps({"text": text, "embedding": [round(float(x), 7) for x in vector]}))
    return 0


def _classify(arguments) -> int:
    model, texts = _load(arguments, "text-classification"), _texts(arguments)
    results = model.classify(texts, top_k=arguments.top_k, max_length=arguments.max_length)
    for text, scores in zip(texts, results, strict=True):
        print("  ".join(f"{score['label']} {score['score']:.4f}" for score in scores) + f"  {text}")
    return 0


def _fill_mask(arguments) -> int:
    model, texts = _load(arguments, "fill-mask"), _texts(arguments)
    for text, masks in zip(texts, model.fill_mask(texts, top_k=arguments.top_k), strict=True):
        print(text)
        for candidates in masks:
            for candidate in candidates:
                print(f"  {candidate['score']:.4f}  {candidate['token']:<16}  {candidate['sequence']}")
    return 0


def _convert(arguments) -> int:
    from kerasllm.checkpoints import convert
    from kerasllm.checkpoints.load import find_checkpoint
    from kerasllm.tasks import TextEmbedder

    path = find_checkpoint(arguments.source)
    if (path / "modules.json").is_file():  # of sentence-transformers: with its pooling and prompts
        written = TextEmbedder.from_pretrained(path, arguments.dtype).save_pretrained(arguments.path)
    else:
        written = convert(path, arguments.path, arguments.dtype)
    print(f"written: {written}")
    return 0


def _evaluate(arguments) -> int:
    from kerasllm.data import read_documents

    documents = read_documents(arguments.data)
    results = _load(arguments, "text-generation").evaluate(documents, batch_size=arguments.batch_size)
    print(f"loss {results['loss']:.4f} nats per token, perplexity {results['perplexity']:.2f}")
    return 0


def _export(arguments) -> int:
    from kerasllm.checkpoints.load import find_checkpoint
    from kerasllm.export import describe_source, release, write_deployment
    from kerasllm.tasks import load_task
    from kerasllm.tasks.pipeline import PIPELINES

    device_options = _device_options(arguments)
    if arguments.path.endswith((".tflite", ".litertlm")):
        others = (
            arguments.overwrite,
            arguments.verify,
            arguments.docker,
            arguments.license,
            arguments.slots,
            arguments.jit_compile is not None,
        )
        if any(others):
            raise ValueError(
                "A file for devices takes none of --overwrite, --verify, --docker, --license, --slots, "
                "--jit-compile."
            )
        other = "sentencepiece_model" if arguments.path.endswith(".tflite") else "short_lengths"
        if other in device_options:
            option = "--" + other.replace("_", "-")
            raise ValueError(f"This kind of file takes no {option}. Received: {arguments.path}")
        path = _load(arguments, "text-generation").export(arguments.path, **device_options)
        print(f"written: {path}")
        print(f'next: kerasllm run-litert {path} "…"')
        return 0
    if device_options:
        names = ", ".join("--" + name.replace("_", "-") for name in device_options)
        raise ValueError(f"{names}: for a .tflite or .litertlm only. Received: {arguments.path}")
    stored = arguments.dtype if arguments.dtype in ("float16", "int8") else None
    model = load_task(arguments.model, PIPELINES, None if stored else arguments.dtype)
    options = {"slots": arguments.slots, "slot_length": arguments.slot_length} if arguments.slots else {}
    if options and not getattr(model, "continues_prompts", False):
        raise ValueError(f"`--slots` is for models that continue a text. Received: {arguments.model}")
    if arguments.jit_compile is not None:
        if not hasattr(model, "generate"):
            raise ValueError(f"`--jit-compile` is for models that write text. Received: {arguments.model}")
        options["jit_compile"] = arguments.jit_compile
    path = release(
        model,
        arguments.path,
        dtype=stored,
        overwrite=arguments.overwrite,
        verify=arguments.verify,
        source=describe_source(find_checkpoint(arguments.model), arguments.license),
        **options,
    )
    print(f"written: {path}")
    if arguments.docker:
        print(f"written: {write_deployment(path, arguments.overwrite)}")
    print(f"next: kerasllm serve {path.parent} --rest_api_port=8501")
    return 0


def _device_options(arguments) -> dict:
    """What was given of the options of an export for devices."""
    names = (
        *("quantize", "cache_length", "prefill_lengths", "short_lengths", "sentencepiece_model"),
        *("largest_divergence", "force"),
    )
    options = {name: getattr(arguments, name) for name in names}
    for name, paths in (("texts", arguments.data), ("calibration_texts", arguments.calibration_data)):
        if paths:
            from kerasllm.data import read_documents

            options[name] = read_documents(paths)
    options = {name: value for name, value in options.items() if value not in (None, False)}
    if options.get("quantize") == "none":
        options["quantize"] = None
    return options


def _run_litert(arguments) -> int:
    settings = {"num_threads": arguments.threads}
    if arguments.path.endswith(".litertlm"):
        from kerasllm.litertlm import generate

        settings["raw"] = arguments.raw
    else:
        from kerasllm.litert import generate
    for piece in generate(arguments.path, arguments.prompt, arguments.max_new_tokens, **settings):
        print(piece, end="", flush=True)
    print()
    return 0


def _benchmark_litert(arguments) -> int:
    from kerasllm.litertlm import benchmark

    results = benchmark(arguments.path, arguments.prompt_tokens, arguments.new_tokens, arguments.threads)
    for name, value in results.items():
        print(f"{name:<26} {value:.4g}")
    return 0


def _serve(arguments) -> int:
    # Another process image: the server has nothing of this library in it.
    if importlib.util.find_spec("uvicorn") is None:
        raise ModuleNotFoundError("The server needs an extra: pip install 'kerasllm[serving]'.")
    path = pathlib.Path(arguments.path)
    flags = arguments.flags
    if not any(flag.startswith("--model_name") for flag in flags):
        resolved = path.resolve()
        flags = [f"--model_name={resolved.stem if resolved.is_file() else resolved.name}", *flags]
    if not any(flag.startswith("--rest_api_port") for flag in flags):
        flags = ["--rest_api_port=8501", *flags]
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
