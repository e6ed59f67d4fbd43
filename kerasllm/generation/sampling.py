"""Choosing the next token of each row, with settings of its own.

A vocabulary is never sorted: what a sort would find is found by bisection, a few dozen sums over the
vocabulary, which are quick in XLA and in a plain graph alike and exact.
"""

import tensorflow as tf

# The score of a token that must not come. Finite, so that a row in which all are forbidden has no NaN.
FORBIDDEN = tf.float32.min
_BLOCK = 256

_SCORES = tf.TensorSpec([None, None], tf.float32)
_NUMBERS = tf.TensorSpec([None], tf.float32)


def uniform_numbers(seed: tf.Tensor, count: tf.Tensor, copy: tf.Tensor | None = None) -> tf.Tensor:
    """Draws one random number per row and step, from the row's own seed.

    A row's numbers depend on its seed and copy alone: not on its neighbours, and not on `count`, for the
    generator is counter-based.

    Args:
        seed: Int32 `[batch]`.
        count: Int32 `[]`, numbers per row.
        copy: Int32 `[batch]`: rows of one seed that differ in it have unlike numbers. None: zeros.

    Returns:
        Float32 `[batch, count]` in `[0, 1)`.
    """

    def row(pair):
        return tf.random.stateless_uniform([count], pair, alg="philox")

    pairs = tf.stack([seed, tf.zeros_like(seed) if copy is None else copy], axis=1)
    return tf.map_fn(row, pairs, fn_output_signature=tf.TensorSpec([None], tf.float32))


def _bisect(low: tf.Tensor, high: tf.Tensor, steps: int, is_low) -> tf.Tensor:
    """Finds, for each row, the least integer above `low` for which `is_low` is False.

    Args:
        low, high: Int32 `[batch]`; `is_low` is taken to be True at `low` and False at `high`.
        steps: How often the range is halved.
        is_low: From int32 `[batch, 1]` to booleans `[batch]`, True up to some integer.
    """

    def halve(step, low, high):
        middle = (low & high) + tf.bitwise.right_shift(low ^ high, 1)  # a sum could overflow
        below = is_low(middle[:, None])
        return step + 1, tf.where(below, middle, low), tf.where(below, high, middle)

    return tf.while_loop(lambda step, *_: step < steps, halve, [tf.constant(0), low, high])[2]


@tf.function(input_signature=[_SCORES, _SCORES, _NUMBERS], autograph=False)  # to be traced only once
def keep_first(keys: tf.Tensor, weights: tf.Tensor, amount: tf.Tensor) -> tf.Tensor:
    """Keeps the tokens with the largest keys until their weights reach an amount.

    A token stays if the weights of those before it, by falling key and then by rising id, sum to less
    than the amount. So weights of 1 keep a number of tokens, and probabilities keep a mass.

    Args:
        keys: Float32 `[batch, vocabulary]`.
        weights: Float32 `[batch, vocabulary]`, not negative.
        amount: Float32 `[batch]`, above 0.

    Returns:
        Booleans `[batch, vocabulary]`.
    """
    # Integers in the order of the floats.
    bits = tf.bitcast(keys, tf.int32)
    ranks = tf.where(bits < 0, bits ^ tf.int32.max, bits)

    def weight_of(mask):
        return tf.reduce_sum(tf.where(mask, weights, 0.0), axis=-1)

    smallest = tf.fill(tf.shape(amount), tf.int32.min)
    threshold = _bisect(
        smallest, tf.reduce_max(ranks, axis=-1), 32, lambda rank: weight_of(ranks > rank) >= amount
    )[:, None]
    above, ties = ranks > threshold, ranks == threshold
    missing = amount - weight_of(above)

    def break_ties():
        vocabulary = tf.shape(keys)[-1]
        ids = tf.range(vocabulary)[None]
        # Keep the ties with ids below the least id before which there is enough.
        before = _bisect(
            tf.zeros_like(smallest),
            tf.fill(tf.shape(amount), vocabulary),
            32,
            lambda id: weight_of(ties & (ids < id)) < missing,
        )
        return ties & (ids < before[:, None])

    several = tf.reduce_any(tf.reduce_sum(tf.cast(ties, tf.int32), axis=-1) > 1)
    return above | tf.cond(several, break_ties, lambda: ties)


def _top_k(scores, top_k):
    vocabulary = tf.shape(scores)[-1]
    amount = tf.where(top_k > 0, tf.minimum(top_k, vocabulary), vocabulary)
    return keep_first(scores, tf.ones_like(scores), tf.cast(amount, tf.float32))


def _top_p(scores, top_p):
    weights = tf.exp(scores)
    kept = keep_first(scores, weights, top_p * tf.reduce_sum(weights, axis=-1))
    return kept | (top_p >= 1)[:, None]


def _min_p(scores, min_p):
    return tf.exp(scores) >= min_p[:, None]


def _typical_p(scores, typical_p):
    weights = tf.exp(scores)
    total = tf.reduce_sum(weights, axis=-1, keepdims=True)
    surprise = tf.math.log(total) - scores
    entropy = tf.reduce_sum(tf.where(weights > 0, weights * surprise, 0.0), axis=-1, keepdims=True) / total
    # What has no probability comes last.
    distance = tf.where(weights > 0, tf.abs(surprise - entropy), tf.float32.max)
    kept = keep_first(-distance, weights, typical_p * total[:, 0])
    return kept | (typical_p >= 1)[:, None]


def filter_scores(
    scores: tf.Tensor,
    top_k: tf.Tensor | None = None,
    top_p: tf.Tensor | None = None,
    min_p: tf.Tensor | None = None,
    typical_p: tf.Tensor | None = None,
) -> tf.Tensor:
    """Forbids the tokens that a row's settings leave out, in Hugging Face's order.

    Args:
        scores: Float32 `[batch, vocabulary]`.
        top_k: Int32 `[batch]`; 0 keeps all. None: left out of the graph, as the others.
        top_p: Float32 `[batch]` in `(0, 1]`.
        min_p: Float32 `[batch]` in `[0, 1]`.
        typical_p: Float32 `[batch]` in `(0, 1]`.

    Returns:
        The scores less the largest of the row, `FORBIDDEN` where a token may not come.
    """
    # Below the largest score, so that no exponential overflows.
    scores = tf.maximum(scores - tf.reduce_max(scores, axis=-1, keepdims=True), FORBIDDEN)
    for setting, neutral, filter in (
        (top_k, 0, _top_k),
        (top_p, 1.0, _top_p),
        (min_p, 0.0, _min_p),
        (typical_p, 1.0, _typical_p),
    ):
        if setting is not None:
            scores = tf.cond(
                tf.reduce_any(setting != neutral),
                lambda s=scores, v=setting, f=filter: tf.where(f(s, v), s, FORBIDDEN),
                lambda s=scores: s,
            )
    return scores


@tf.function(input_signature=[_SCORES, _NUMBERS], autograph=False)
def draw(scores: tf.Tensor, uniform: tf.Tensor) -> tf.Tensor:
    """Draws a token from the softmax of each row, by the inverse of its cumulative distribution.

    Args:
        scores: Float32 `[batch, vocabulary]`, at most 0.
        uniform: Float32 `[batch]` in `[0, 1)`, the random number that decides.

    Returns:
        Int32 `[batch]`: the first id up to which the probabilities sum to more than the number.
    """
    batch, vocabulary = tf.shape(scores)[0], tf.shape(scores)[1]
    # In two stages, blocks and then the ids of one block: quicker, and it loses less to rounding.
    weights = tf.pad(tf.exp(scores), [[0, 0], [0, -vocabulary % _BLOCK]])
    blocks = tf.reshape(weights, [batch, -1, _BLOCK])

    def first_above(weights, target):
        """The first place up to which the weights sum to more than the target, and what is left."""
        cumulative = tf.cumsum(weights, axis=-1)
        place = tf.reduce_sum(tf.cast(cumulative <= target[:, None], tf.int32), axis=-1)
        # Rounding may put the target on the very end of the sum.
        places = tf.range(tf.shape(weights)[-1])[None]
        last = tf.reduce_max(tf.where(weights > 0, places, 0), axis=-1)
        place = tf.minimum(place, last)
        before = tf.where(places < place[:, None], weights, 0.0)
        return place, target - tf.reduce_sum(before, axis=-1)

    sums = tf.reduce_sum(blocks, axis=-1)
    block, rest = first_above(sums, uniform * tf.reduce_sum(sums, axis=-1))
    place, _ = first_above(tf.gather(blocks, block, batch_dims=1), rest)
    return block * _BLOCK + place


def choose_tokens(
    scores: tf.Tensor,
    uniform: tf.Tensor,
    temperature: tf.Tensor,
    top_k: tf.Tensor | None = None,
    top_p: tf.Tensor | None = None,
    min_p: tf.Tensor | None = None,
    typical_p: tf.Tensor | None = None,
) -> tf.Tensor:
    """Chooses a token for each row.

    Args:
        scores: Floats `[batch, vocabulary]`.
        uniform: Float32 `[batch]` in `[0, 1)`, the random number that decides.
        temperature: Float32 `[batch]`; 0 takes the most likely token, the first of equal ones.
        top_k, top_p, min_p, typical_p: As in `filter_scores`.

    Returns:
        Int32 `[batch]`.
    """
    scores = tf.cast(scores, tf.float32)
    most_likely = tf.argmax(scores, axis=-1, output_type=tf.int32)

    def sample():
        is_drawn = temperature > 0
        below = scores - tf.reduce_max(scores, axis=-1, keepdims=True)
        scaled = below / tf.where(is_drawn, temperature, 1.0)[:, None]
        drawn = draw(filter_scores(scaled, top_k, top_p, min_p, typical_p), uniform)
        return tf.where(is_drawn, drawn, most_likely)

    return tf.cond(tf.reduce_any(temperature > 0), sample, lambda: most_likely)
