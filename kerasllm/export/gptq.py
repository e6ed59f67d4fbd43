"""Weights of 4 bits with which the layers give what they gave before: GPTQ.

Frantar et al.: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022).
The quantiser's own GPTQ (litert-quantizer 0.11) makes up for errors with the inverse of all columns, where
the paper has that of the columns that are left, and came out worse.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence

import numpy as np

from kerasllm.export.calibration import see_inputs
from kerasllm.export.litert_worker import BLOCK, block_scales, round_to_integers
from kerasllm.layers.dense import Dense
from kerasllm.layers.rounding import weights_restored
from kerasllm.models import LanguageModel

# Columns that are rounded one by one before the rest learns of it: one large product instead of many small.
_COLUMNS_AT_ONCE = 128
# Added to the diagonal, as a share of its mean, as in the paper: few tokens do not say all too exactly.
_DAMPING = 0.01
# So many tokens are enough to know how the inputs of a layer go together.
TOKENS = 8192


def round_matrix(matrix: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Rounds a matrix to 4 bits in blocks of 32, so that its products change least.

    Columns are rounded one after the other, and the error of each is made up for by those that are left.
    First come those with the largest inputs, whose errors cost most.

    Args:
        matrix: Floats `[rows, columns]`, which is multiplied with inputs `[columns]`.
        gram: Floats `[columns, columns]`, the sum of the products of each input with itself.

    Returns:
        Float32 `[rows, columns]`: integers from -8 to 7 times a scale for each 32 columns of a row.
    """
    damped = gram.astype("float64")
    damped[np.diag_indices_from(damped)] += _DAMPING * np.diag(gram).mean() + np.finfo("float32").tiny
    energy = np.diag(damped)
    scales = np.repeat(block_scales(matrix, energy), BLOCK, axis=1)
    order = np.argsort(-energy, kind="stable")
    damped = damped[np.ix_(order, order)]
    # Row i is how the columns behind i make up for an error in i, once all before i are fixed.
    remedies = np.linalg.cholesky(np.linalg.inv(damped)).T.astype("float32")
    left, scales = matrix[:, order].astype("float32"), scales[:, order]
    rounded, width = np.empty_like(left), left.shape[1]
    for begin in range(0, width, _COLUMNS_AT_ONCE):
        end = min(begin + _COLUMNS_AT_ONCE, width)
        errors = np.empty_like(left[:, begin:end])
        for i in range(begin, end):
            rounded[:, i] = round_to_integers(left[:, i], scales[:, i]) * scales[:, i]
            errors[:, i - begin] = (left[:, i] - rounded[:, i]) / remedies[i, i]
            left[:, i + 1 : end] -= np.outer(errors[:, i - begin], remedies[i, i + 1 : end])
        left[:, end:] -= errors @ remedies[begin:end, end:]
    result = np.empty_like(rounded)
    result[:, order] = rounded
    return result


def layers_of_4_bits(model: LanguageModel) -> list[Dense]:
    """Returns the layers whose matrices get 4 bits: all but a head, which has a row for each token."""
    layers = (layer for layer in model._flatten_layers() if isinstance(layer, Dense))
    return [layer for layer in layers if layer.units != model.config.vocabulary_size]


def is_of_4_bits(model: LanguageModel) -> bool:
    """Returns whether rounding to 4 bits leaves all matrices as they are."""

    def stays(matrix):
        scales = np.repeat(block_scales(matrix), BLOCK, axis=1)
        return np.array_equal(round_to_integers(matrix, scales) * scales, matrix)

    return all(stays(layer.kernel.numpy().T) for layer in layers_of_4_bits(model))


def gram_matrices(
    model: LanguageModel, layers: Sequence[Dense], batches: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Sums up the inputs of layers while a model reads texts.

    Args:
        model: The model.
        layers: Some of its layers.
        batches: Ids, int32 `[rows, length]` each.

    Returns:
        For each layer the sum of the products of each input with itself, float32 `[width, width]`.
    """
    sums = [np.zeros((layer.kernel.shape[0],) * 2, "float32") for layer in layers]

    def add_to(total):
        return lambda inputs: np.add(total, inputs.T @ inputs, out=total)

    see_inputs(model, layers, [add_to(total) for total in sums], batches)
    return sums


@contextlib.contextmanager
def rounded_weights(
    model: LanguageModel, batches: Sequence[np.ndarray], verbose: bool = False
) -> Iterator[None]:
    """While this is open, the matrices of a model are those of 4 bits that serve best on some texts.

    Args:
        model: The model; afterwards its weights are what they were.
        batches: The texts as ids, int32 `[rows, length]` each.
        verbose: Whether to print how long it took.
    """
    begin = time.monotonic()
    layers = layers_of_4_bits(model)
    grams = gram_matrices(model, layers, batches)
    with weights_restored(layer.kernel for layer in layers):
        for layer in layers:
            # Taken off the list, for what comes now needs the memory.
            layer.kernel.assign(round_matrix(layer.kernel.numpy().T, grams.pop(0)).T)
        if verbose:
            count, seconds = sum(batch.size for batch in batches), time.monotonic() - begin
            print(f"LiteRT: rounded to 4 bits on {count} tokens in {seconds:.1f} s", flush=True)
        yield
