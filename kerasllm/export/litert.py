"""The `.tflite` that a phone runs: the Keras layers with the cache as inputs and outputs."""

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import tensorflow as tf

from kerasllm.files import write_json
from kerasllm.generation import GenerationConfig, cache_names, check_vocabularies
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer

# Converts in a process of its own: the converter needs many times the model's size and keeps it.
_CONVERT = """
import sys, tensorflow as tf
source, target, *signatures = sys.argv[1:]
converter = tf.lite.TFLiteConverter.from_saved_model(source, signature_keys=signatures)
with open(target, "wb") as file:
    file.write(converter.convert())
"""


def _signature(model: LanguageModel, length: int, cache_length: int, with_logits: bool):
    """A function with the inputs and outputs that LiteRT-LM expects, for `length` tokens at once."""
    specs = {
        "tokens": tf.TensorSpec([1, length], tf.int32, name="tokens"),
        "input_pos": tf.TensorSpec([length], tf.int32, name="input_pos"),
        "mask": tf.TensorSpec([1, 1, length, cache_length], tf.float32, name="mask"),
    }
    for number, pair in enumerate(model.make_cache(1, cache_length)):
        for name, array in zip(cache_names(number), pair, strict=True):
            specs[name] = tf.TensorSpec(array.shape, tf.float32, name=name)

    @tf.function(autograph=False)
    def run(tokens, input_pos, mask, **caches):
        cache = [tuple(caches[name] for name in cache_names(number)) for number in range(len(caches) // 2)]
        logits, cache = model(tokens, attention_mask=mask, cache=cache, cache_index=input_pos[0])
        outputs = {
            name: array
            for number, pair in enumerate(cache)
            for name, array in zip(cache_names(number), pair, strict=True)
        }
        return {**outputs, "logits": logits} if with_logits else outputs

    return run.get_concrete_function(**specs)


def export_litert(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    config: GenerationConfig | None = None,
    prefill_lengths: Sequence[int] = (8, 32, 128),
    cache_length: int | None = None,
) -> pathlib.Path:
    """Writes a `.tflite` of builtin ops with prefill and decode signatures, and its tokenizer beside it.

    Signatures: `prefill_<N>` for each N and `decode`. Inputs: `tokens` int32 `[1, N]`, `input_pos` int32
    `[N]`, `mask` float32 `[1, 1, N, cache_length]` (0 or a large negative number), `kv_cache_k_<i>`
    float32 `[1, kv_heads, cache_length, head_dim]`, `kv_cache_v_<i>` float32 `[1, kv_heads, head_dim,
    cache_length]`. Outputs: the caches; `decode` also `logits` float32 `[1, 1, vocabulary]`. This is the
    contract of Google's LiteRT-LM.

    Args:
        model: The model, in float32.
        tokenizer: Its tokenizer.
        path: The file to write, ending in `.tflite`, in a folder of its own: `tokenizer.json` and
            `generation_config.json` are written beside it.
        config: Defaults of the generation.
        prefill_lengths: Numbers of tokens that one call may take in; those above `cache_length` are
            left out.
        cache_length: Most tokens of prompt and continuation. None: the model's context.

    Returns:
        The file.

    Raises:
        ValueError: If a number, the precision or the name does not fit.
        FileExistsError: If `path` or a file beside it exists.
        RuntimeError: If the converter fails.
    """
    path = pathlib.Path(path)
    context = model.config.context_length
    cache_length = context if cache_length is None else cache_length
    if path.suffix != ".tflite":
        raise ValueError(f"A LiteRT model's name must end in .tflite. Received: {path}")
    for file in (path, path.parent / "tokenizer.json", path.parent / "generation_config.json"):
        if file.exists():
            raise FileExistsError(
                "An export never overwrites, and each LiteRT model needs a folder of its own. "
                f"Received: {path}, where this exists: {file.name}"
            )
    if not 1 <= cache_length <= context:
        raise ValueError(
            f"`cache_length` must be from 1 to the context of {context} tokens. Received: {cache_length}"
        )
    if not prefill_lengths or min(prefill_lengths) < 1:
        raise ValueError(f"`prefill_lengths` must be at least 1 each. Received: {prefill_lengths}")
    if model.compute_dtype != "float32":
        raise ValueError(
            f"A LiteRT export takes a float32 model. Received: compute dtype {model.compute_dtype}"
        )
    check_vocabularies(model, tokenizer)
    lengths = sorted({n for n in prefill_lengths if n <= cache_length}) or [1]

    module = tf.Module()
    # Without its variables in sight the converter writes a model without weights, and says nothing.
    module.model_variables = [variable.value for variable in model.variables]
    signatures = {f"prefill_{n}": _signature(model, n, cache_length, False) for n in lengths}
    signatures["decode"] = _signature(model, 1, cache_length, True)

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        source, target = os.path.join(work, "saved_model"), os.path.join(work, path.name)
        tf.saved_model.save(module, source, signatures=signatures)
        result = subprocess.run(
            [sys.executable, "-c", _CONVERT, source, target, *signatures],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(f"The LiteRT converter failed:\n{result.stderr[-4000:]}")
        tokenizer.save(path.parent)
        settings = (config or GenerationConfig()).to_huggingface(tokenizer.eos_id)
        write_json(path.parent / "generation_config.json", settings)
        # The model last: where it is, everything that it needs is.
        os.replace(target, path)
    return path
