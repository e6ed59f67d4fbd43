"""The `.tflite` that a phone runs: the Keras layers with the cache as inputs and outputs."""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kerasllm.export import gptq, litert_worker, smooth
from kerasllm.export.calibration import own_batches, token_batches
from kerasllm.files import write_json
from kerasllm.generation import GenerationConfig, cache_names, check_vocabularies
from kerasllm.layers.table import TableFunctions, tables_used_with
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer

# The largest mean divergence from the float32 model, in nats per token, at which an export is written.
LARGEST_DIVERGENCE = {None: 1e-3, "fp16": 1e-2, "int8": 0.1, "int4": 0.5, "int8_weights": 0.03}
# For those that learn from texts: the recipe of the worker, what changes the weights while it runs, and of
# how many tokens.
_CALIBRATED = {
    "int8": ("int8_smoothed", smooth.smoothed, smooth.TOKENS),
    "int4": ("int4", gptq.rounded_weights, gptq.TOKENS),
}
# So many times the float32 weights is what the converter needs at its peak, and so many times more for each
# signature, measured with 135 million weights and 2, 5 and 12 signatures.
_CONVERTER_MEMORY, _SIGNATURE_MEMORY = 10, 0.45
# Cache of a model with a longer context: attention reads all of it for each token.
_LONGEST_CACHE = 2048
# A conversation is at first much shorter than that. Each is at most a half longer than the one before, so
# that little of what decoding looks at is empty.
SHORT_LENGTHS = (128, 192, 256, 384, 512, 768, 1024)
# Reading, which empty columns cost less, has one call for short texts, of so many tokens at least.
_SHORT_READ = 256
# TensorFlow operations that TFLite has as builtin ones, of those that graphs of the layers are made of.
_CONVERTIBLE = frozenset(
    "Add AddV2 ArgMax BatchMatMulV2 BiasAdd BroadcastTo Cast ConcatV2 Const Cos Cumsum Div Einsum "
    "Equal Erf Erfc Exp ExpandDims Fill FloorMod Gather GatherNd GatherV2 Greater GreaterEqual Identity "
    "IdentityN Less LessEqual Log LogicalAnd LogicalNot LogicalOr MatMul Max Maximum Mean Min Minimum "
    "Mul Neg NoOp NotEqual OneHot Pack Pad PadV2 PartitionedCall Placeholder Pow Prod Range ReadVariableOp "
    "RealDiv Relu Reshape ResourceGather ReverseV2 Rsqrt Select SelectV2 Shape Sigmoid Sin Slice "
    "Softmax Split Sqrt Square SquaredDifference Squeeze StatefulPartitionedCall StopGradient "
    "StridedSlice Sub Sum Tanh Tile Transpose Unpack XlaDynamicUpdateSlice ZerosLike".split()
)


@tf.function(experimental_implements="embedding_matmul", autograph=False)
def _embedding_lookup(table, ids):
    """What the converter turns into EMBEDDING_LOOKUP, which shares its table with a tied head."""
    return tf.gather(table, ids)


def _look_up(table, ids):
    rows = _embedding_lookup(table, tf.reshape(ids, [-1]))
    return tf.reshape(rows, [*ids.shape, table.shape[-1]])


def _score(vectors, table):
    logits = tf.matmul(vectors, table, transpose_b=True)
    # Nothing is smaller, and behind this no factor, such as that of a logit cap, is folded into the
    # matrix: a tied table would be stored a second time.
    return tf.maximum(logits, logits.dtype.min)


def lite_tables():
    """While this is open, token tables are used as LiteRT stores them once."""
    return tables_used_with(TableFunctions(_look_up, _score))


def by_name(pairs, names: Callable[[int], tuple[str, str]] = cache_names) -> dict[str, tf.Tensor]:
    """Keys and values of each layer, by the names that they have outside."""
    return {
        name: array
        for number, pair in enumerate(pairs)
        for name, array in zip(names(number), pair, strict=True)
    }


def _signature(model: LanguageModel, length: int, cache_length: int, columns: int, with_logits: bool):
    """A function with the inputs and outputs that LiteRT-LM expects, for `length` tokens at once."""
    specs = {
        "tokens": tf.TensorSpec([1, length], tf.int32, name="tokens"),
        "input_pos": tf.TensorSpec([length], tf.int32, name="input_pos"),
        "mask": tf.TensorSpec([1, 1, length, columns], tf.float32, name="mask"),
    }
    for name, array in by_name(model.make_cache(1, cache_length)).items():
        specs[name] = tf.TensorSpec(array.shape, tf.float32, name=name)

    @tf.function(autograph=False)
    def run(tokens, input_pos, mask, **caches):
        cache = [tuple(caches[name] for name in cache_names(number)) for number in range(len(caches) // 2)]
        arguments = {"attention_mask": mask, "cache": cache, "cache_index": input_pos[0]}
        # Without logits the head is left out: what reads a prompt does not pay for it.
        logits, cache = model(tokens, with_head=with_logits, **arguments)
        outputs = by_name(cache)
        return {**outputs, "logits": logits} if with_logits else outputs

    with lite_tables():
        return run.get_concrete_function(**specs)


def export_litert(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    config: GenerationConfig | None = None,
    prefill_lengths: Sequence[int] = (8, 32, 128, 512),
    cache_length: int | None = None,
    short_lengths: Sequence[int] = SHORT_LENGTHS,
    quantize: str | None = None,
    texts: Sequence[str] = (),
    calibration_texts: Sequence[str] = (),
    largest_divergence: float | None = None,
    force: bool = False,
    verbose: bool = True,
) -> pathlib.Path:
    """Writes a `.tflite` of builtin ops with prefill and decode signatures, and its tokenizer beside it.

    Signatures: `prefill_<N>` for each N and `decode`. Inputs: `tokens` int32 `[1, N]`, `input_pos` int32
    `[N]`, `mask` float32 `[1, 1, N, cache_length]` (0 or a large negative number), `kv_cache_k_<i>`
    float32 `[1, kv_heads, cache_length, head_dim]`, `kv_cache_v_<i>` float32 `[1, kv_heads, head_dim,
    cache_length]`. Outputs: the caches; `decode` also `logits` float32 `[1, 1, vocabulary]`. This is the
    contract of Google's LiteRT-LM. `decode_<M>` and `read_<N>_<M>` are `decode` and `prefill_<N>` with a
    mask of M columns, which look at the beginning of the cache only.

    Args:
        model: The model, in float32.
        tokenizer: Its tokenizer.
        path: The file to write, ending in `.tflite`, in a folder of its own: `tokenizer.json`,
            `generation_config.json` and `report.json` are written beside it.
        config: Defaults of the generation.
        prefill_lengths: Numbers of tokens that one call may take in; those above `cache_length` are
            left out.
        cache_length: Most tokens of prompt and continuation. None: the model's context, but not more
            than 2,048.
        short_lengths: Lengths of a text up to which calls of their own decode it, which look at no more of
            the cache and so are quicker; and for each of `prefill_lengths` one that reads, up to the
            shortest of these lengths that it fits in and that is not below 256, if there is one. Each call
            takes a quarter of a megabyte of the file for 30 layers. Lengths not below `cache_length` are
            left out.
        quantize: `"int8"`: weights of 8 bits with a scale per row. `"int4"`: weights of 4 bits in blocks
            of 32, token table and head of 8. Both quantise the activations as they come; that can cost
            more than a divergence on prose shows, in chats most. `"int8_weights"`: weights of 8 bits that
            are widened, so that all activations stay float32: hardly any divergence, and about the speed
            of float32. `"fp16"`: weights of 16 bits. None: float32.
        texts: Held-out texts on which the export is compared with the model; none: it is not compared.
        calibration_texts: For `"int8"` and `"int4"`: texts such as the model is going to read, of which
            2,048 and 8,192 tokens are used; none: texts that the model writes. On them activations are
            made fit for 8 bits, as `kerasllm.export.smooth` says, and weights of 4 bits are rounded so
            that the layers give what they gave before, as `kerasllm.export.gptq` says. Weights that are
            of 4 bits already, as those of a training for that, stay what they are.
        largest_divergence: The largest mean Kullback-Leibler divergence from the model, in nats per
            token, with which a file is written. None: that of `LARGEST_DIVERGENCE`.
        force: Whether the file is written above that, and where memory seems too small.
        verbose: Whether to print what is done, with seconds and memory.

    Returns:
        The file.

    Raises:
        ValueError: If a number, the precision or the name does not fit, the model has an operation that
            LiteRT has not, or the export diverges.
        FileExistsError: If `path` or a file beside it exists.
        ModuleNotFoundError: If what quantises or compares is not installed.
        MemoryError: If there is too little memory for the conversion.
        RuntimeError: If the converter fails.
    """
    path = pathlib.Path(path)
    beside = [path.parent / name for name in ("tokenizer.json", "generation_config.json", "report.json")]
    check_new(path, beside)
    settings = (config or GenerationConfig()).to_huggingface(tokenizer.eos_id)
    with converted(
        model,
        tokenizer,
        path,
        prefill_lengths=prefill_lengths,
        cache_length=cache_length,
        short_lengths=short_lengths,
        quantize=quantize,
        texts=texts,
        calibration_texts=calibration_texts,
        largest_divergence=largest_divergence,
        force=force,
        verbose=verbose,
    ) as (file, report):
        tokenizer.save(path.parent)
        write_json(beside[1], settings)
        write_json(beside[2], report)
        # The model last: where it is, everything that it needs is.
        os.replace(file, path)
    return path


@contextlib.contextmanager
def converted(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: pathlib.Path,
    *,
    prefill_lengths: Sequence[int],
    cache_length: int | None = None,
    short_lengths: Sequence[int] = SHORT_LENGTHS,
    quantize: str | None = None,
    texts: Sequence[str] = (),
    calibration_texts: Sequence[str] = (),
    largest_divergence: float | None = None,
    force: bool = False,
    verbose: bool = True,
) -> Iterator[tuple[pathlib.Path, dict[str, Any]]]:
    """Converts a model into a temporary folder beside a file to be, and compares it.

    Args:
        path: The file to be.
        model, tokenizer, prefill_lengths, cache_length, short_lengths, quantize, texts, calibration_texts,
        largest_divergence, force, verbose: As in `export_litert`, which says what is raised.

    Yields:
        The `.tflite` in the folder, and the report.
    """
    context = model.config.context_length
    cache_length = min(context, _LONGEST_CACHE) if cache_length is None else cache_length
    if model.head != "causal_lm":
        raise ValueError(
            f"This export takes a model that continues texts. Received: a {type(model).__name__} with "
            f"head={model.head!r}"
        )
    if not 1 <= cache_length <= context:
        raise ValueError(
            f"`cache_length` must be from 1 to the context of {context} tokens. Received: {cache_length}"
        )
    if not prefill_lengths or min(prefill_lengths) < 1:
        raise ValueError(f"`prefill_lengths` must be at least 1 each. Received: {prefill_lengths}")
    if short_lengths and min(short_lengths) < 1:
        raise ValueError(f"`short_lengths` must be at least 1 each. Received: {short_lengths}")
    if calibration_texts and quantize not in _CALIBRATED:
        raise ValueError(
            f"`calibration_texts` are for quantize={' or '.join(map(repr, _CALIBRATED))}. "
            f"Received: quantize={quantize!r}"
        )
    shapes = _shapes(prefill_lengths, cache_length, short_lengths)
    check_convertible(model, tokenizer, quantize, force, runs=bool(texts), signatures=len(shapes))
    kind, change, tokens = _CALIBRATED.get(quantize, (quantize, None, 0))
    batches = token_batches(tokenizer, calibration_texts, context, tokens) if calibration_texts else []
    signatures = {
        name: _signature(model, length, cache_length, columns, name.startswith("decode"))
        for name, (length, columns) in shapes.items()
    }
    check_operations(signatures)

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        file = pathlib.Path(work, "model.tflite")
        report = {"quantize": quantize, "cache_length": cache_length, "signatures": list(shapes)}
        if quantize == "int4" and gptq.is_of_4_bits(model):
            change, report["calibration_tokens"] = None, 0  # nothing would move
            if verbose:
                print("LiteRT: the weights are of 4 bits already, so nothing is calibrated", flush=True)
        if change:
            if verbose and not batches:
                print("LiteRT: the model writes what it is calibrated on", flush=True)
            batches = batches or own_batches(model, tokens)
            report["calibration_tokens"] = sum(batch.size for batch in batches)
        with change(model, batches, verbose) if change else contextlib.nullcontext():
            report |= convert(model, signatures, file, kind, verbose)
        if texts:
            report |= compare_litert(model, tokenizer, file, texts, cache_length)
            bound = LARGEST_DIVERGENCE[quantize] if largest_divergence is None else largest_divergence
            report["largest_divergence"] = bound
            if verbose:
                print(format_report(report), flush=True)
            # Written so that a divergence that is no number is above any bound.
            if not report["divergence"] <= bound and not force:
                raise ValueError(
                    f"The export must not diverge from the model by more than {bound} nats per token; "
                    f"`force` writes it all the same. Received: {report['divergence']:.4f}"
                )
        yield file, report


def _shapes(prefill_lengths, cache_length, short_lengths) -> dict[str, tuple[int, int]]:
    """Returns how many tokens each signature takes, and at how many columns of the cache it looks."""
    shapes = {f"prefill_{n}": (n, cache_length) for n in sorted(set(prefill_lengths)) if n <= cache_length}
    shapes = shapes or {"prefill_1": (1, cache_length)}
    short_lengths = [n for n in sorted(set(short_lengths)) if n < cache_length]
    for length, _ in list(shapes.values()):
        least = max(length, min(_SHORT_READ, short_lengths[-1])) if short_lengths else 0
        if columns := next((n for n in short_lengths if n >= least), None):
            shapes[f"read_{length}_{columns}"] = length, columns
    shapes |= {f"decode_{n}": (1, n) for n in short_lengths}
    return {**shapes, "decode": (1, cache_length)}


def check_new(path: pathlib.Path, beside: Sequence[pathlib.Path]) -> None:
    """Raises an error if a `.tflite` cannot be made at a path, with the files beside it."""
    if path.suffix != ".tflite":
        raise ValueError(f"A LiteRT model's name must end in .tflite. Received: {path}")
    for file in (path, *beside):
        if file.exists():
            raise FileExistsError(
                "An export never overwrites, and each LiteRT model needs a folder of its own. "
                f"Received: {path}, where this exists: {file.name}"
            )


def check_convertible(
    model: LanguageModel,
    tokenizer: Tokenizer,
    quantize: str | None,
    force: bool,
    runs: bool = False,
    signatures: int = 1,
) -> None:
    """Raises an error if a model cannot be converted here.

    Args:
        model, tokenizer, quantize, force: As in `export_litert`.
        runs: Whether the file is going to be run as well.
        signatures: How many the file is going to have.
    """
    if quantize not in LARGEST_DIVERGENCE:
        kinds = ", ".join(map(repr, LARGEST_DIVERGENCE))
        raise ValueError(f"`quantize` must be one of {kinds}. Received: {quantize!r}")
    if model.compute_dtype != "float32":
        raise ValueError(
            f"A LiteRT export takes a float32 model. Received: compute dtype {model.compute_dtype}"
        )
    check_vocabularies(model, tokenizer)
    for module, is_needed in (("litert_quantizer", quantize), ("ai_edge_litert", quantize or runs)):
        if is_needed and importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(
                f"This export needs an extra: pip install 'kerasllm[litert]'. There is no {module}."
            )
    layers = [layer for layer in model._flatten_layers() if getattr(layer, "lora_enabled", False)]
    if layers and quantize in _CALIBRATED:
        raise ValueError(
            f"An export with quantize={quantize!r} fits the weights to texts, and takes no LoRA. "
            f"Received: LoRA in {len(layers)} layers"
        )
    if quantize == "int4":
        widths = {layer.kernel.shape[0] for layer in gptq.layers_of_4_bits(model)}
        if odd := sorted(width for width in widths if width % litert_worker.BLOCK):
            raise ValueError(
                f"Weights of 4 bits need layers whose inputs' widths are multiples of "
                f"{litert_worker.BLOCK}. Received: {odd}"
            )
    if not force:
        check_memory(model, signatures)


def available_memory() -> int | None:
    """Returns the bytes of memory that a new process may take, or None where the system does not say."""
    found = []
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    with contextlib.suppress(OSError, ValueError):  # a container's bound; "max" where there is none
        group = pathlib.Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(stat.get("inactive_file", 0)))  # the cache of files gives way
    return min(found, default=None)


def check_memory(model: LanguageModel, signatures: int) -> None:
    """Raises a MemoryError where there is too little memory to convert so many signatures of a model."""
    times = _CONVERTER_MEMORY + _SIGNATURE_MEMORY * signatures
    needed, available = times * 4 * model.count_params(), available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"The conversion needs about {needed / 1e9:.1f} GB of memory; `force` tries all the same. "
            f"Received: {available / 1e9:.1f} GB available"
        )


def check_operations(signatures: dict[str, Any]) -> None:
    """Raises a ValueError if a graph has an operation that would need more than LiteRT's builtin ones.

    Args:
        signatures: Concrete functions by name.
    """
    for name, function in signatures.items():
        graph = function.graph.as_graph_def()
        nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
        if unknown := sorted({node.op for node in nodes} - _CONVERTIBLE):
            raise ValueError(
                f"A LiteRT export is made of LiteRT's builtin operations. Received: {unknown} in {name}"
            )


def convert(
    model: LanguageModel,
    signatures: dict[str, Any],
    target: pathlib.Path,
    quantize: str | None = None,
    verbose: bool = True,
) -> dict[str, Any]:
    """Converts functions of a model in a process of its own.

    Args:
        model: The model, whose weights the functions use.
        signatures: Concrete functions of fixed shapes, by name.
        target: The `.tflite` to write.
        quantize: A recipe of `litert_worker.recipe`, or None.
        verbose: Whether to print what is done.

    Returns:
        What it took: `size_bytes`, `weight_bytes` (of the model, in float32), `peak_bytes`, `seconds`.

    Raises:
        RuntimeError: If the converter fails.
    """
    begin, peak = time.monotonic(), 0
    weights = 4 * model.count_params()
    if verbose:
        print(f"LiteRT: converting {weights / 1e6:.1f} MB of weights", flush=True)
    module = tf.Module()
    # Without its variables in sight the converter writes a model without weights, and says nothing.
    module.model_variables = [variable.value for variable in model.variables]
    with tempfile.TemporaryDirectory(prefix="saved_model.", dir=target.parent) as source:
        tf.saved_model.save(module, source, signatures=signatures)
        rows = model.config.vocabulary_size
        # -P: the folder of the program is no place to import from.
        command = [sys.executable, "-P", litert_worker.__file__, source, target, quantize or "none", rows]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(
                [*map(str, command), *signatures], stdout=subprocess.PIPE, stderr=errors, text=True
            )
            for line in process.stdout:
                if not line.startswith('{"step"'):
                    continue
                step = json.loads(line)
                peak = max(peak, step["peak_bytes"])
                if verbose:
                    print(
                        f"LiteRT: {step['step']} in {step['seconds']:.1f} s, "
                        f"peak memory {step['peak_bytes'] / 1e9:.2f} GB",
                        flush=True,
                    )
            if process.wait():
                errors.seek(0)
                why = errors.read()[-4000:]
                if process.returncode == -9:
                    why = "It was killed, as the system does where memory ends.\n" + why
                raise RuntimeError(f"The LiteRT converter failed:\n{why}")
    return {
        "size_bytes": target.stat().st_size,
        "weight_bytes": weights,
        "peak_bytes": peak,
        "seconds": round(time.monotonic() - begin, 1),
    }


def compare_litert(
    model: LanguageModel,
    tokenizer: Tokenizer,
    file: str | os.PathLike,
    texts: Sequence[str],
    cache_length: int,
    most_tokens: int = 512,
) -> dict[str, float]:
    """Compares a `.tflite` with the model that it was made of.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        file: The file.
        texts: Held-out texts.
        cache_length: Of the file; longer texts are cut.
        most_tokens: How many tokens are predicted, those of the second halves of the texts, one text after
            the other.

    Returns:
        `tokens`: how many tokens were predicted; `nll` and `model_nll`: mean negative log-likelihood of
        the file and of the model, in nats per token; `divergence`: mean Kullback-Leibler divergence of
        the file from the model, in nats per token; `top1_agreement`: how often their likeliest tokens
        agree; `decode_tokens_per_second`.

    Raises:
        ValueError: If the texts hold no two tokens.
    """
    from kerasllm.litert import CachedModel

    runtime = CachedModel(file)
    sums = dict.fromkeys(("nll", "model_nll", "divergence", "top1_agreement"), 0.0)
    count, steps, seconds = 0, 0, 0.0
    for text in texts:
        ids = tokenizer.encode(text)[: min(cache_length, 2 * (most_tokens - count) + 1)]
        if len(ids) < 2:
            continue
        wanted = tf.nn.log_softmax(model(np.array([ids], "int32"))[0]).numpy()
        # The first half is read at once, so that errors of what reads show too.
        half = (len(ids) - 1) // 2
        runtime.prefill(ids[:half])
        begin = time.monotonic()
        logits = np.stack([runtime.decode(ids[place], place) for place in range(half, len(ids))])
        seconds, steps = seconds + time.monotonic() - begin, steps + len(logits)
        got, wanted = tf.nn.log_softmax(logits).numpy(), wanted[half:]
        follows = np.arange(len(logits) - 1), ids[half + 1 :]
        sums["nll"] -= float(got[follows].sum())
        sums["model_nll"] -= float(wanted[follows].sum())
        wanted, got = wanted[:-1].astype("float64"), got[:-1].astype("float64")
        sums["divergence"] += float((np.exp(wanted) * (wanted - got)).sum())
        sums["top1_agreement"] += float((wanted.argmax(-1) == got.argmax(-1)).sum())
        count += len(logits) - 1
        if count >= most_tokens:
            break
    if not count:
        raise ValueError("`texts` must hold at least two tokens in one text. Received: none")
    speed = steps / seconds if seconds else math.inf
    means = {name: total / count for name, total in sums.items()}
    return {"tokens": count, **means, "decode_tokens_per_second": speed}


def format_report(report: dict[str, Any]) -> str:
    """Returns the lines that say what an export is like, of a report as `report.json` holds it."""
    weights = report["quantize"] or "float32"
    if "calibration_tokens" in report:
        weights += f", calibrated on {report['calibration_tokens']} tokens"
    rows = [
        ("weights", weights),
        ("size", f"{report['size_bytes'] / 1e6:.1f} MB (float32: {report['weight_bytes'] / 1e6:.1f} MB)"),
        ("held-out tokens", report["tokens"]),
        ("nats per token", f"{report['nll']:.4f} (float32: {report['model_nll']:.4f})"),
        ("divergence", f"{report['divergence']:.5f} (at most {report['largest_divergence']})"),
        ("top-1 agreement", f"{report['top1_agreement']:.4f}"),
        ("decode", f"{report['decode_tokens_per_second']:.1f} tokens/s on this machine"),
    ]
    return "\n".join(f"{name:<16} {value}" for name, value in rows)
