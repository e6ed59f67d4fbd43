"""What exports learn from texts: which, and what the layers of a model get to see in them."""

from collections.abc import Callable, Sequence

import numpy as np

from kerasllm.generation import Engine, GenerationConfig, Row
from kerasllm.layers.dense import Dense
from kerasllm.models import LanguageModel
from kerasllm.tokenizers import Tokenizer

# Tokens of a row.
_ROW = 256


def see_inputs(
    model: LanguageModel,
    layers: Sequence[Dense],
    see: Sequence[Callable[[np.ndarray], object]],
    batches: Sequence[np.ndarray],
) -> None:
    """Lets a model read texts and shows the inputs of some of its layers.

    Args:
        model: The model.
        layers: Some of its layers.
        see: For each of them what is called with its inputs, floats `[tokens, width]`, again and again.
        batches: Ids, int32 `[rows, length]` each.
    """

    def watch(layer, see):
        def call(inputs, training=None):
            see(np.reshape(inputs, (-1, layer.kernel.shape[0])))
            return type(layer).call(layer, inputs, training=training)

        layer.call = call

    try:
        for layer, function in zip(layers, see, strict=True):
            watch(layer, function)
        for batch in batches:
            model(batch, with_head=False)
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def token_batches(tokenizer: Tokenizer, texts: Sequence[str], length: int, count: int) -> list[np.ndarray]:
    """Cuts texts into rows of ids, until there are enough to calibrate with.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        length: Most tokens of a row.
        count: Most tokens in all.

    Returns:
        Int32 `[1, length]` each, the last row of a text shorter.

    Raises:
        ValueError: If the texts are empty.
    """
    batches, length, missing = [], min(length, _ROW), count
    for text in texts:
        if not missing:
            break
        ids = tokenizer.encode(text)[:missing]
        rows = [ids[begin : begin + length] for begin in range(0, len(ids), length)]
        batches += [np.array([row], "int32") for row in rows]
        missing -= len(ids)
    if not batches:
        raise ValueError("`calibration_texts` must hold tokens. Received: none")
    return batches


def own_batches(model: LanguageModel, count: int) -> list[np.ndarray]:
    """Lets a model write what it is calibrated with, from tokens drawn at random on.

    So it needs no texts, and those that it writes are of the kinds that it knows. Liu et al.: "LLM-QAT:
    Data-Free Quantization Aware Training for Large Language Models" (2023).

    Args:
        model: The model.
        count: About how many tokens.

    Returns:
        Int32 `[1, length]` each.
    """
    length = min(model.config.context_length, _ROW)
    starts = np.random.default_rng(0).integers(model.config.vocabulary_size, size=max(1, count // length))
    settings = {"max_new_tokens": length - 1, "temperature": 1.0}
    # Without tokens that end them: all rows are full.
    rows = [Row([int(id)], GenerationConfig(**settings, seed=seed)) for seed, id in enumerate(starts)]
    batch = Engine(model).start(rows)
    while batch.active.any():
        batch.advance(length)
    return [np.array([[*row.prompt, *batch.new_ids(n)]], "int32") for n, row in enumerate(rows)]
