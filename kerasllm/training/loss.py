"""The loss of a language model."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import keras
import tensorflow as tf
from keras import ops

from kerasllm.layers.precision import widen

# Logits that `chunked_token_loss` holds at once: 32 MB in float32.
_CHUNK_LOGITS = 2**23


class TokenSums(NamedTuple):
    """Sums over the tokens of a batch, each token counting by its weight; scalars.

    Attributes:
        objective: What training minimises, in nats.
        loss: Cross-entropy in nats, without smoothing and z-loss.
        correct: Tokens whose label has the highest logit.
        weight: The weights.
    """

    objective: tf.Tensor
    loss: tf.Tensor
    correct: tf.Tensor
    weight: tf.Tensor


def token_sums(logits, labels, weights, label_smoothing: float = 0.0, z_loss: float = 0.0) -> TokenSums:
    """Sums the cross-entropy over the tokens that count.

    Label smoothing is due to Szegedy et al., "Rethinking the Inception Architecture" (2016); the z-loss,
    which keeps the softmax's normaliser near 1, to Chowdhery et al., "PaLM" (2022).

    Args:
        logits: Floats `[..., vocabulary]`.
        labels: Integers `[...]`, the right tokens.
        weights: Floats `[...]`; 0 leaves a token out.
        label_smoothing: Part of the label's probability that is spread over all tokens.
        z_loss: Factor of the squared logarithm of the normaliser.

    Returns:
        The sums. The quotient of `loss` and `weight` is the loss per token; they are apart for an average
        over several batches.
    """
    logits = widen(logits)
    labels = ops.cast(labels, "int32")
    weights = ops.cast(weights, logits.dtype)
    losses = objectives = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    if label_smoothing or z_loss:
        normalizers = ops.logsumexp(logits, axis=-1)
    if label_smoothing:
        even = normalizers - ops.mean(logits, axis=-1)
        objectives = (1.0 - label_smoothing) * losses + label_smoothing * even
    if z_loss:
        objectives = objectives + z_loss * ops.square(normalizers)
    correct = ops.cast(ops.equal(_argmax(logits), labels), logits.dtype)
    return TokenSums(*(ops.sum(each * weights) for each in (objectives, losses, correct)), ops.sum(weights))


def _argmax(logits):
    """The place of the highest logit; the first one of several."""
    if keras.backend.backend() == "tensorflow":  # where Keras looks for negative zeros first, in six passes
        return tf.argmax(logits, axis=-1, output_type=tf.int32)
    return ops.argmax(logits, axis=-1)


def next_token_loss(logits, labels, weights):
    """Sums the cross-entropy over the tokens that count.

    Args:
        logits: Floats `[batch, length, vocabulary]`.
        labels: Integers `[batch, length]`, the token that follows each.
        weights: Floats `[batch, length]`; 0 leaves a token out.

    Returns:
        Two scalars: the weighted sum of the losses in nats, and the sum of the weights. Their quotient is
        the loss per token; keep them apart to average over several batches.
    """
    sums = token_sums(logits, labels, weights)
    return sums.loss, sums.weight


def chunked_token_loss(
    hidden,
    labels,
    weights,
    score: Callable,
    variables: Sequence[tf.Variable],
    scale,
    vocabulary_size: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
):
    """Sums the loss and takes its gradient, without ever holding the logits of all tokens.

    The logits of a chunk of tokens are made, scored, differentiated and forgotten before those of the next,
    and nothing is computed twice: the gradient of a sum needs to know nothing of the other chunks. Hsu et
    al.: "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024) does the same.

    Args:
        hidden: Floats `[batch, length, dim]`: what the head reads.
        labels: Integers `[batch, length]`.
        weights: Floats `[batch, length]`.
        score: The head, from `[tokens, dim]` to logits `[tokens, vocabulary]`.
        variables: The variables that the head may use.
        scale: Float scalar that the gradient is multiplied by.
        vocabulary_size: Number of logits of a token.
        label_smoothing, z_loss: As in `token_sums`.

    Returns:
        The sums; the gradient of `scale * objective` for `hidden`; and a list of those for `variables`,
        with None for a variable that the head does not use.
    """

    def differentiate(hidden, labels, weights):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(hidden)
            tape.watch(variables)
            sums = token_sums(score(hidden), labels, weights, label_smoothing, z_loss)
            target = sums.objective * ops.cast(scale, sums.objective.dtype)
        to_hidden, to_variables = tape.gradient(target, (hidden, list(variables)))
        return sums, to_hidden, [None if g is None else tf.convert_to_tensor(g) for g in to_variables]

    parts, chunks = _split_tokens(hidden, labels, weights, vocabulary_size)
    # The first chunk tells which variables the head uses; the loop adds the others to it.
    sums, first, to_variables = differentiate(*(values[0] for values in parts))
    used = [gradient for gradient in to_variables if gradient is not None]
    to_hidden = tf.TensorArray(first.dtype, chunks, element_shape=first.shape).write(0, first)

    def add_chunk(number, sums, to_hidden, used):
        more, part, gradients = differentiate(*(values[number] for values in parts))
        gradients = [gradient for gradient in gradients if gradient is not None]
        return (
            number + 1,
            TokenSums(*(old + new for old, new in zip(sums, more, strict=True))),
            to_hidden.write(number, part),
            [old + new for old, new in zip(used, gradients, strict=True)],
        )

    if not (isinstance(chunks, int) and chunks == 1):
        _, sums, to_hidden, used = tf.while_loop(
            lambda number, *_: number < chunks,
            add_chunk,
            (tf.constant(1), sums, to_hidden, used),
            parallel_iterations=1,
            maximum_iterations=chunks - 1,
        )
    to_hidden = tf.reshape(to_hidden.stack(), [-1, hidden.shape[-1]])
    to_hidden = ops.reshape(to_hidden[: ops.size(labels)], ops.shape(hidden))
    used = iter(used)
    return sums, to_hidden, [None if gradient is None else next(used) for gradient in to_variables]


def chunked_token_sums(hidden, labels, weights, score: Callable, vocabulary_size: int) -> TokenSums:
    """Sums the loss without ever holding the logits of all tokens.

    Args:
        hidden, labels, weights, score, vocabulary_size: As in `chunked_token_loss`.

    Returns:
        The sums.
    """
    parts, chunks = _split_tokens(hidden, labels, weights, vocabulary_size)

    def sum_chunk(number):
        hidden, labels, weights = (values[number] for values in parts)
        return token_sums(score(hidden), labels, weights)

    def add_chunk(number, sums):
        more = sum_chunk(number)
        return number + 1, TokenSums(*(old + new for old, new in zip(sums, more, strict=True)))

    first = sum_chunk(0)
    if isinstance(chunks, int) and chunks == 1:
        return first
    _, sums = tf.while_loop(
        lambda number, _: number < chunks, add_chunk, (tf.constant(1), first), parallel_iterations=1
    )
    return sums


def _split_tokens(hidden, labels, weights, vocabulary_size):
    """The three as `[chunks, tokens of a chunk, ...]`, and the number of chunks, an int if it is known."""
    hidden = ops.reshape(hidden, (-1, hidden.shape[-1]))
    labels, weights = ops.reshape(labels, (-1,)), ops.reshape(weights, (-1,))
    tokens = ops.shape(hidden)[0]
    limit = max(64, _CHUNK_LOGITS // vocabulary_size)
    # As even chunks as can be, for what fills the last one up is computed too.
    if isinstance(tokens, int):
        chunks = max(1, math.ceil(tokens / limit))
        chunk = math.ceil(tokens / chunks)
    else:
        chunks = tf.maximum(1, (tokens + limit - 1) // limit)
        chunk = (tokens + chunks - 1) // chunks
    missing = chunks * chunk - tokens

    def split(values):  # tokens of no weight fill the last chunk
        padded = tf.pad(values, [[0, missing]] + [[0, 0]] * (len(values.shape) - 1))
        return tf.reshape(padded, [chunks, chunk, *values.shape[1:]])

    return [split(values) for values in (hidden, labels, weights)], chunks
