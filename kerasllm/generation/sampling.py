"""Choosing the next token of each row, with settings of its own."""

import tensorflow as tf


def uniform_numbers(seed: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Draws one random number per row and step, from the row's own seed.

    A row's numbers depend on its seed alone: not on its neighbours, and not on `count`, for the
    generator is counter-based.

    Args:
        seed: Int32 `[batch]`.
        count: Int32 `[]`, numbers per row.

    Returns:
        Float32 `[batch, count]` in `[0, 1)`.
    """

    def row(row_seed):
        pair = tf.stack([row_seed, tf.zeros_like(row_seed)])
        return tf.random.stateless_uniform([count], pair, alg="philox")

    return tf.map_fn(row, seed, fn_output_signature=tf.TensorSpec([None], tf.float32))


def choose_tokens(
    logits: tf.Tensor,
    uniform: tf.Tensor,
    temperature: tf.Tensor,
    top_k: tf.Tensor,
    top_p: tf.Tensor,
) -> tf.Tensor:
    """Chooses a token for each row.

    The order is that of Hugging Face: temperature, then top-k, then top-p (Holtzman et al., "The
    Curious Case of Neural Text Degeneration", 2019) on what is left.

    Args:
        logits: Floats `[batch, vocabulary]`.
        uniform: Float32 `[batch]` in `[0, 1)`, the random number that decides.
        temperature: Float32 `[batch]`; 0 takes the most likely token.
        top_k: Int32 `[batch]`; 0 keeps all tokens.
        top_p: Float32 `[batch]` in `(0, 1]`.

    Returns:
        Int32 `[batch]`.
    """
    logits = tf.cast(logits, tf.float32)
    most_likely = tf.argmax(logits, axis=-1, output_type=tf.int32)

    def sample():
        vocabulary = tf.shape(logits)[-1]
        sampled = temperature > 0
        # Below the largest score, so that a tiny temperature cannot overflow.
        below = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
        scaled = below / tf.where(sampled, temperature, 1.0)[:, None]
        ordered, ids = tf.math.top_k(scaled, k=vocabulary)
        limit = tf.where(top_k > 0, tf.minimum(top_k, vocabulary), vocabulary)[:, None]
        in_top_k = tf.range(vocabulary)[None] < limit
        probabilities = tf.nn.softmax(tf.where(in_top_k, ordered, ordered.dtype.min))
        # A token stays while the more likely ones have not reached top_p; the first always stays.
        before = tf.cumsum(probabilities, axis=-1, exclusive=True)
        kept = in_top_k & (before < top_p[:, None])
        cumulative = tf.cumsum(tf.where(kept, probabilities, 0.0), axis=-1)
        threshold = uniform[:, None] * cumulative[:, -1:]
        place = tf.reduce_sum(tf.cast(cumulative <= threshold, tf.int32), axis=-1)
        # Rounding may put the threshold on the very end of the sum.
        place = tf.minimum(place, tf.reduce_sum(tf.cast(kept, tf.int32), axis=-1) - 1)
        drawn = tf.gather(ids, place, batch_dims=1)
        return tf.where(sampled, drawn, most_likely)

    return tf.cond(tf.reduce_any(temperature > 0), sample, lambda: most_likely)
