"""The loss of a language model."""

import keras
from keras import ops


def next_token_loss(logits, labels, weights):
    """Sums the cross-entropy over the tokens that count.

    Args:
        logits: Floats `[batch, length, vocabulary]`.
        labels: Integers `[batch, length]`, the token that follows each.
        weights: Floats `[batch, length]`; 0 leaves a token out.

    Returns:
        Two float32 scalars: the weighted sum of the losses in nats, and the sum of the weights. Their
        quotient is the loss per token; keep them apart to average over several batches.
    """
    losses = keras.losses.sparse_categorical_crossentropy(
        labels, ops.cast(logits, "float32"), from_logits=True
    )
    weights = ops.cast(weights, "float32")
    return ops.sum(losses * weights), ops.sum(weights)
