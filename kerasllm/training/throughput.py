"""How fast a training is: tokens per second, and the share of the hardware's peak."""

import collections
import math
import time

import keras
from keras import ops

from kerasllm.models import LanguageModel
from kerasllm.training.checkpoint import is_multi_worker
from kerasllm.training.step import TokenTraining

# Steps that the last speed is of.
_WINDOW = 20


def training_flops(model: LanguageModel, length: int, source_length: int | None = None) -> int:
    """Counts the floating-point operations of the forward and backward pass of one row.

    As in appendix B of Chowdhery et al., "PaLM" (2022): for each token 6 times the weights that it is
    multiplied by, and 12 times layers, width of all heads and number of tokens that are attended to.
    Lookups, norms and activations count nothing, what is computed twice to save memory counts once, and no
    account is taken of the half that a causal mask hides.

    Args:
        model: The model, with a head that predicts tokens or without one.
        length: Tokens of a row; of an encoder-decoder, those of the target.
        source_length: Of an encoder-decoder, the tokens of the source.

    Returns:
        FLOPs of a row; of a batch, as many times its rows.

    Raises:
        ValueError: If a source is given to a model that reads none, or none to one that does.
    """
    config = model.config
    reads_source = model.head == "seq2seq"
    if (source_length is not None) != reads_source:
        raise ValueError(
            "`source_length` is for an encoder-decoder, and needed there. "
            f"Received: source_length={source_length} for a model with the head {model.head!r}"
        )
    width = config.num_heads * getattr(config, "head_dim", config.dim // config.num_heads)
    weights, source_weights = 0, 0
    for path, variable in model.variables_by_path().items():
        size = math.prod(variable.shape)
        if path == "head/embeddings":
            weights += size
        elif path.endswith("/kernel") and not path.startswith("classifier"):  # that is for one token only
            is_of_source = path.startswith("encoder_") or "/memory_attention/key/" in path
            if is_of_source or "/memory_attention/value/" in path:
                source_weights += size
            else:
                weights += size
    if model.head not in (None, "classifier") and config.tie_embeddings:
        weights += config.vocabulary_size * config.dim
    if not reads_source:
        return length * (6 * weights + 12 * config.num_layers * width * length)
    of_source = 6 * source_weights + 12 * config.num_layers * width * source_length
    of_target = 6 * weights + 12 * config.num_decoder_layers * width * (length + source_length)
    return source_length * of_source + length * of_target


class Throughput(keras.callbacks.Callback):
    """Puts the tokens per second, and the share of the peak (MFU), into the logs of `fit`.

    Those of a batch are of the last 20 steps, those of an epoch of all its steps; the first step, in which
    compilers work, is left out, as is what happens between steps. Callbacks that come later see them, such
    as Keras's `TensorBoard` and `History`: `tokens_per_second` and `mfu`.

    Args:
        tokens_per_step: Tokens of one update, of all replicas together. None: those that the loss counts,
            which for a masked model are the masked ones only; on one machine, for the tasks that predict
            tokens.
        flops_per_step: Floating-point operations of one update: the rows of a batch times
            `training_flops`.
        peak_flops: Most floating-point operations per second of all devices together, as their makers
            state it for the precision that is used; None: no share is told. Not guessed, for no program
            can ask a device for it.

    Attributes:
        tokens_per_second: Of the last steps; None before the second one.
        mfu: Model FLOPs utilisation, the share of the peak; None where it is not known.
        seconds_per_step: Likewise.
        tokens: Trained on so far.

    Raises:
        ValueError: If an argument is not above 0, or a peak is given without `flops_per_step`.
    """

    def __init__(
        self,
        tokens_per_step: float | None = None,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
    ):
        super().__init__()
        given = {
            "tokens_per_step": tokens_per_step,
            "flops_per_step": flops_per_step,
            "peak_flops": peak_flops,
        }
        for name, value in given.items():
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be None or above 0. Received: {name}={value}")
        if peak_flops is not None and flops_per_step is None:
            raise ValueError(
                "A share of `peak_flops` needs `flops_per_step`, rows times `training_flops(model, length)`"
                f". Received: peak_flops={peak_flops}, flops_per_step=None"
            )
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops

    def on_train_begin(self, logs=None):
        if self.tokens_per_step is None:
            if not isinstance(self.model, TokenTraining):
                raise ValueError(
                    "`tokens_per_step` must be given for a model whose loss counts no tokens. "
                    f"Received: None for a {type(self.model).__name__}"
                )
            if is_multi_worker(self.model.distribute_strategy):
                raise ValueError("`tokens_per_step` must be given on several workers. Received: None")
        self.tokens_per_second = self.mfu = self.seconds_per_step = None
        self.tokens = 0.0
        self._is_compiled = False
        self._last = collections.deque(maxlen=_WINDOW)  # steps, seconds and tokens of each execution

    def on_epoch_begin(self, epoch, logs=None):
        self._batch = -1
        self._counted = self._count()
        self._epoch = [0, 0.0, 0.0]

    def on_train_batch_begin(self, batch, logs=None):
        self._begin = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        seconds, steps = time.monotonic() - self._begin, batch - self._batch
        self._batch = batch
        if self.tokens_per_step is None:
            before, self._counted = self._counted, self._count()
            tokens = self._counted - before
        else:
            tokens = steps * self.tokens_per_step
        self.tokens += tokens
        if self._is_compiled:
            part = (steps, seconds, tokens)
            self._last.append(part)
            self._epoch = [total + more for total, more in zip(self._epoch, part, strict=True)]
            speeds = self._speeds(*map(sum, zip(*self._last, strict=True)))
            self.seconds_per_step, self.tokens_per_second, self.mfu = speeds
            self._tell(logs, speeds)
        self._is_compiled = True

    def on_epoch_end(self, epoch, logs=None):
        if self._epoch[0]:
            self._tell(logs, self._speeds(*self._epoch))

    def _count(self) -> float:
        """The tokens that the loss of this epoch is the mean of."""
        if self.tokens_per_step is not None:
            return 0.0
        return float(ops.convert_to_numpy(self.model.metrics[0].count))

    def _speeds(self, steps, seconds, tokens):
        seconds = max(seconds, 1e-9)
        mfu = None
        if self.peak_flops is not None:
            mfu = self.flops_per_step * steps / seconds / self.peak_flops
        return seconds / steps, tokens / seconds, mfu

    @staticmethod
    def _tell(logs, speeds):
        if logs is not None:
            _, logs["tokens_per_second"], mfu = speeds
            if mfu is not None:
                logs["mfu"] = mfu
