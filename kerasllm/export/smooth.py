"""Activations that lose little in 8 bits: factors move from what is wide to the weights behind it.

Xiao et al.: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models"
(2023).
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence

import keras
import numpy as np

from kerasllm.export.calibration import see_inputs
from kerasllm.layers import DecoderBlock
from kerasllm.layers.dense import Dense
from kerasllm.layers.feed_forward import GatedFeedForward
from kerasllm.layers.norm import RMSNorm
from kerasllm.layers.rounding import weights_restored
from kerasllm.models import LanguageModel

# So many tokens are enough to know which columns are wide: four times as many change nothing.
TOKENS = 2048
# The share of a column's range that the weights take over: as in the paper, half.
_SHARE = 0.5
# No column changes by more: what is all but zero in the texts need not be so elsewhere.
_MOST = 2.0**10


@dataclasses.dataclass
class _Link:
    """A layer, linear in its weights, whose outputs are the inputs of matrices, maybe several times."""

    source: keras.layers.Layer
    matrices: Sequence[Dense]
    # The inputs are the outputs cut into heads of so many columns, with each head so many times in a row.
    head_dim: int = 1
    copies: int = 1

    @property
    def variables(self) -> list[keras.Variable]:
        source, matrices = self.source, [matrix.kernel for matrix in self.matrices]
        return [source.kernel if isinstance(source, Dense) else source.scale, *_biases(source), *matrices]

    def widest(self, columns: np.ndarray) -> np.ndarray:
        """The largest of all copies of each output, of a number for each input."""
        return columns.reshape(-1, self.copies, self.head_dim).max(1).ravel()

    def copied(self, columns: np.ndarray) -> np.ndarray:
        """A number for each input, of one for each output."""
        return np.repeat(columns.reshape(-1, 1, self.head_dim), self.copies, axis=1).ravel()

    def divide(self, factors: np.ndarray) -> None:
        """Divides the outputs and multiplies the matrices: the products stay what they are."""
        source = self.source
        for bias in _biases(source):
            bias.assign(bias / factors)
        if isinstance(source, Dense):
            source.kernel.assign(source.kernel / factors)
        elif isinstance(source, RMSNorm) and source.unit_offset:
            source.scale.assign((1.0 + source.scale) / factors - 1.0)
        else:
            source.scale.assign(source.scale / factors)
        for matrix in self.matrices:
            matrix.kernel.assign(matrix.kernel * self.copied(factors)[:, None])


def _biases(layer):
    bias = getattr(layer, "bias", None)
    return [] if bias is None else [bias]


def _links(model: LanguageModel) -> Iterator[_Link]:
    for block in model._flatten_layers():
        if not isinstance(block, DecoderBlock):
            continue
        attention, feed_forward = block.attention, block.feed_forward
        wide = [getattr(feed_forward, name) for name in feed_forward.input_names]
        if block.norm_first:  # otherwise the norm's output is also the residual stream
            yield _Link(block.attention_norm, [attention.query, attention.key, attention.value])
            yield _Link(block.feed_forward_norm, wide)
        copies = attention.num_heads // attention.num_kv_heads
        yield _Link(attention.value, [attention.output_dense], attention.head_dim, copies)
        if isinstance(feed_forward, GatedFeedForward):
            yield _Link(feed_forward.up, [feed_forward.down])


def _factors(link: _Link, largest_inputs: np.ndarray) -> np.ndarray:
    """What the outputs of a link are divided by: powers of two, with which nothing is rounded."""
    weights = np.max([np.abs(matrix.kernel).max(1) for matrix in link.matrices], axis=0)
    inputs, weights = link.widest(largest_inputs), link.widest(weights)
    inputs, weights = (np.maximum(x, np.finfo("float32").tiny + x.max() / _MOST) for x in (inputs, weights))
    exponents = _SHARE * np.log2(inputs) - (1 - _SHARE) * np.log2(weights)
    return 2.0 ** np.rint(exponents - exponents.mean()).astype("float32")


@contextlib.contextmanager
def smoothed(model: LanguageModel, batches: Sequence[np.ndarray], verbose: bool = False) -> Iterator[None]:
    """While this is open, columns of a model's activations are about as wide as each other.

    Those that are much wider than the others in some texts are divided by a power of two where they are
    made, in a norm or a matrix, and the weights that they meet are multiplied. What the model gives stays
    the same to the bit (with norms of a unit offset up to a rounding).

    Args:
        model: The model; afterwards its weights are what they were.
        batches: The texts as ids, int32 `[rows, length]` each.
        verbose: Whether to print how long it took.
    """
    begin = time.monotonic()
    links = list(_links(model))
    largest = [np.zeros(link.matrices[0].kernel.shape[0], "float32") for link in links]

    def widen(total):
        return lambda inputs: np.maximum(total, np.abs(inputs).max(0), out=total)

    first = [link.matrices[0] for link in links]  # they all have the same inputs
    see_inputs(model, first, [widen(total) for total in largest], batches)
    with weights_restored(variable for link in links for variable in link.variables):
        for link, inputs in zip(links, largest, strict=True):
            link.divide(_factors(link, inputs))
        if verbose:
            count, seconds = sum(batch.size for batch in batches), time.monotonic() - begin
            print(f"LiteRT: activations smoothed on {count} tokens in {seconds:.1f} s", flush=True)
        yield
