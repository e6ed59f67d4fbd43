"""Training of weights that are going to be stored in few bits: quantisation-aware training.

The matrices and the token table are rounded where they are used, as the LiteRT export of the same name
stores them, and the optimizer changes the exact ones; as in Liu et al.: "LLM-QAT: Data-Free Quantization
Aware Training for Large Language Models" (2023), but for the activations, which stay exact here.
In mixed precision the products then take the rounded weights in half precision, as they take exact ones.
"""

import contextlib
from collections.abc import Iterator

import keras

from kerasllm.layers import TokenEmbedding
from kerasllm.layers.dense import Dense
from kerasllm.layers.rounding import (
    BLOCK,
    Rounding,
    exact_value,
    round_to_4_bits,
    round_to_8_bits,
    weights_restored,
)
from kerasllm.models import LanguageModel

# What `make_rounding` knows.
QUANTIZATIONS = (None, "int8", "int4")


def make_rounding(model: LanguageModel, kind: str | None) -> Rounding | None:
    """Makes what rounds the weights of a model.

    Args:
        model: The model, which continues texts.
        kind: `"int8"`: 8 bits with a scale for each unit of a matrix and each row of the table. `"int4"`: 4
            bits with a scale for each 32 inputs of a unit; the table, and a matrix that has a unit for
            each token, as with `"int8"`. None: nothing is rounded.

    Returns:
        The rounding; None if `kind` is None.

    Raises:
        ValueError: If `kind` is unknown, or does not fit the model.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"`quantization_aware` must be one of {QUANTIZATIONS}. Received: {kind!r}")
    if kind is None:
        return None
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"`quantization_aware` needs the TensorFlow backend. Received: {keras.backend.backend()}"
        )
    if not isinstance(model, LanguageModel) or model.head != "causal_lm":
        raise ValueError(
            "`quantization_aware` is for models that continue texts, with the head 'causal_lm'. "
            f"Received: a {type(model).__name__} with head={getattr(model, 'head', None)!r}"
        )
    layers = _layers(model)
    if enabled := [layer.path for layer in layers if getattr(layer, "lora_enabled", False)]:
        raise ValueError(
            f"`quantization_aware` and LoRA exclude each other. Received: LoRA in {len(enabled)} layers"
        )
    if others := {_weights(layer).dtype for layer in layers} - {"float32"}:
        raise ValueError(
            "`quantization_aware` rounds float32 weights, such as those of the precisions float32 and "
            f"mixed_bfloat16. Received: weights of {sorted(others)}"
        )
    vocabulary_size = model.config.vocabulary_size

    def has_4_bits(kernel) -> bool:
        return kind == "int4" and kernel.shape[1] != vocabulary_size

    kernels = [layer.kernel for layer in layers if isinstance(layer, Dense)]
    if odd := {k.shape[0] for k in kernels if has_4_bits(k) and k.shape[0] % BLOCK}:
        raise ValueError(
            f"Weights of 4 bits need layers whose inputs' widths are multiples of {BLOCK}. "
            f"Received: {sorted(odd)}"
        )
    return Rounding(
        kernel=lambda kernel: round_to_4_bits(kernel) if has_4_bits(kernel) else round_to_8_bits(kernel, 0),
        rows=lambda rows: round_to_8_bits(rows, -1),
    )


def round_weights(model: LanguageModel, rounding: Rounding) -> None:
    """Replaces the weights of a model by the rounded ones."""
    for layer in _layers(model):
        weights = _weights(layer)
        rounded = rounding.kernel if isinstance(layer, Dense) else rounding.rows
        weights.assign(rounded(exact_value(weights)))


@contextlib.contextmanager
def rounded_weights(model: LanguageModel, rounding: Rounding | None) -> Iterator[None]:
    """While this is open, the weights of a model are the rounded ones; with None they stay as they are."""
    variables = [] if rounding is None else [_weights(layer) for layer in _layers(model)]
    with weights_restored(variables):
        if rounding is not None:
            round_weights(model, rounding)
        yield


def _layers(model: LanguageModel) -> list[keras.layers.Layer]:
    """The layers that compute with rounded weights."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, (Dense, TokenEmbedding))]


def _weights(layer: keras.layers.Layer) -> keras.Variable:
    return layer.kernel if isinstance(layer, Dense) else layer.embeddings
