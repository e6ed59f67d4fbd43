"""A `.tflite` of models that read whole texts: BERT's kind with static lengths, and encoder-decoders."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from kerasllm.export.litert import (
    by_name,
    check_convertible,
    check_new,
    check_operations,
    convert,
    lite_tables,
)
from kerasllm.files import write_json
from kerasllm.generation import GenerationConfig, cache_names
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer

# How the file of an encoder is described, beside it.
ENCODER_SETTINGS = "encoder.json"


def export_litert_encoder(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    compute: Callable[[dict[str, tf.Tensor]], dict[str, tf.Tensor]],
    settings: Mapping[str, Any],
    with_token_types: bool = False,
    lengths: Sequence[int] = (32, 64, 128, 256, 512),
    quantize: str | None = None,
    force: bool = False,
    verbose: bool = True,
) -> pathlib.Path:
    """Writes a `.tflite` that turns token ids into what a task finds, and its tokenizer beside it.

    Signatures: `encode_<N>` for each length. Inputs: `token_ids` and `attention_mask`, and perhaps
    `token_type_ids`, int32 `[1, N]`; what stands behind a text has the mask 0. Outputs: those of `compute`.

    Args:
        model: The model, in float32.
        tokenizer: Its tokenizer.
        path: The file to write, ending in `.tflite`, in a folder of its own: `tokenizer.json` and
            `encoder.json` are written beside it.
        compute: From the inputs by name to the outputs by name.
        settings: What `encoder.json` says besides, such as the id that fills texts up.
        with_token_types: Whether there are `token_type_ids`.
        lengths: Lengths of a text, which takes the shortest that it fits into; for those above the longest
            that the model reads, that one.
        quantize, force, verbose: As in `export_litert`; `"int4"` chooses scales only, without GPTQ.

    Returns:
        The file.

    Raises:
        ValueError, FileExistsError, ModuleNotFoundError, MemoryError, RuntimeError: As in `export_litert`.
    """
    context = model.config.context_length
    lengths = _checked_lengths("lengths", lengths, min(context, settings.get("max_length") or context))
    names = ["token_ids", "attention_mask"] + ["token_type_ids"] * with_token_types

    def signature(length):
        specs = {name: tf.TensorSpec([1, length], tf.int32, name=name) for name in names}
        run = tf.function(lambda **inputs: compute(inputs), autograph=False)
        with lite_tables():
            return run.get_concrete_function(**specs)

    with _new_model(model, tokenizer, path, ENCODER_SETTINGS, quantize, force, len(lengths)) as (
        path,
        file,
    ):
        signatures = {f"encode_{length}": signature(length) for length in lengths}
        check_operations(signatures)
        took = convert(model, signatures, file, quantize, verbose)
        write_json(
            path.parent / ENCODER_SETTINGS, {**settings, "lengths": lengths, "quantize": quantize, **took}
        )
    return path


def export_litert_seq2seq(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    config: GenerationConfig | None = None,
    source_lengths: Sequence[int] = (32, 128, 512),
    cache_length: int = 128,
    quantize: str | None = None,
    force: bool = False,
    verbose: bool = True,
) -> pathlib.Path:
    """Writes a `.tflite` of an encoder-decoder, and its tokenizer beside it.

    Signatures: `encode_<N>` for each source length: `token_ids` and `attention_mask` int32 `[1, N]` → what
    the decoder reads of the source, `memory_k_<i>` float32 `[1, heads, S, head_dim]` and `memory_v_<i>`
    float32 `[1, heads, head_dim, S]`, for the longest source length S. `decode`: these, `memory_mask` int32
    `[1, S]`, and `tokens`, `input_pos`, `mask` and the cache as `export_litert` says → the cache and
    `logits` float32 `[1, 1, vocabulary]`.

    Args:
        model: The model, in float32.
        tokenizer: Its tokenizer.
        path: The file to write, ending in `.tflite`, in a folder of its own: `tokenizer.json` and
            `generation_config.json` are written beside it.
        config: Defaults of the generation.
        source_lengths: Lengths of a source; for those above the model's context, that one.
        cache_length: Most tokens of an answer.
        quantize, force, verbose: As in `export_litert`; `"int4"` chooses scales only, without GPTQ.

    Returns:
        The file.

    Raises:
        ValueError, FileExistsError, ModuleNotFoundError, MemoryError, RuntimeError: As in `export_litert`.
    """
    context = model.config.context_length
    lengths = _checked_lengths("source_lengths", source_lengths, context)
    if not 1 <= cache_length <= context:
        raise ValueError(
            f"`cache_length` must be from 1 to the context of {context} tokens. Received: {cache_length}"
        )
    longest = lengths[-1]

    def encode(token_ids, attention_mask):
        memory = model.encode(token_ids, attention_mask)
        missing = [[0, 0], [0, longest - memory.shape[1]], [0, 0]]
        pairs = model.make_memory_cache(tf.pad(memory, missing))
        return by_name(pairs, memory_names)

    def decode(tokens, input_pos, mask, memory_mask, **caches):
        count = len(caches) // 4
        cache = [tuple(caches[name] for name in cache_names(number)) for number in range(count)]
        memory_cache = [tuple(caches[name] for name in memory_names(number)) for number in range(count)]
        logits, cache = model(
            tokens,
            memory_cache=memory_cache,
            memory_mask=memory_mask,
            attention_mask=mask,
            cache=cache,
            cache_index=input_pos[0],
        )
        return {**by_name(cache), "logits": logits}

    def trace(function, **specs):
        specs = {name: tf.TensorSpec(shape, dtype, name=name) for name, (shape, dtype) in specs.items()}
        with lite_tables():
            return tf.function(function, autograph=False).get_concrete_function(**specs)

    config_file = "generation_config.json"
    with _new_model(model, tokenizer, path, config_file, quantize, force, len(lengths) + 1) as (path, file):
        signatures = {
            f"encode_{n}": trace(encode, token_ids=([1, n], tf.int32), attention_mask=([1, n], tf.int32))
            for n in lengths
        }
        outputs = signatures[f"encode_{longest}"].structured_outputs
        caches = by_name(model.make_cache(1, cache_length))
        signatures["decode"] = trace(
            decode,
            tokens=([1, 1], tf.int32),
            input_pos=([1], tf.int32),
            mask=([1, 1, 1, cache_length], tf.float32),
            memory_mask=([1, longest], tf.int32),
            **{name: (array.shape, tf.float32) for name, array in {**caches, **outputs}.items()},
        )
        check_operations(signatures)
        convert(model, signatures, file, quantize, verbose)
        write_json(
            path.parent / config_file, (config or GenerationConfig()).to_huggingface(tokenizer.eos_id)
        )
    return path


def memory_names(number: int) -> tuple[str, str]:
    """What the keys and the values of a source are called in a layer of the decoder."""
    return f"memory_k_{number}", f"memory_v_{number}"


def _checked_lengths(name: str, lengths: Sequence[int], longest: int) -> list[int]:
    if not lengths or min(lengths) < 1:
        raise ValueError(f"`{name}` must be at least 1 each. Received: {lengths}")
    return sorted({min(length, longest) for length in lengths})


@contextlib.contextmanager
def _new_model(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | os.PathLike,
    beside: str,
    quantize: str | None,
    force: bool,
    signatures: int,
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Checks what is asked for; yields the path and a file to fill, which then gets its name."""
    path = pathlib.Path(path)
    check_new(path, [path.parent / "tokenizer.json", path.parent / beside])
    check_convertible(model, tokenizer, quantize, force, signatures=signatures)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        file = pathlib.Path(work, "model.tflite")
        yield path, file
        tokenizer.save(path.parent)
        os.replace(file, path)
