"""Sizes that are rounded up, so that few shapes occur: XLA compiles for each."""

from typing import Any

import tensorflow as tf

from kerasllm.generation.decoding import DecodeState, pad_to
from kerasllm.layers.attention import swap_cache_layout

# The smallest bucket of the lengths of sequences.
SHORTEST_LENGTH = 64


def bucket(size: int, smallest: int = 1, limit: int | None = None) -> int:
    """Rounds a size up to a power of two or to three halves of one.

    Args:
        size: The size.
        smallest: The smallest bucket, a power of two.
        limit: The largest useful bucket, at least `size`; None: none.
    """
    power = smallest
    while power < size:
        power *= 2
    rounded = power * 3 // 4 if power > smallest and power % 4 == 0 and power * 3 // 4 >= size else power
    return rounded if limit is None else min(rounded, limit)


def buckets(smallest: int, limit: int) -> list[int]:
    """All that `bucket` may return, in order."""
    found = [bucket(1, smallest, limit)]
    while found[-1] < limit:
        found.append(bucket(found[-1] + 1, smallest, limit))
    return found


def bucket_in_graph(size: tf.Tensor, smallest: int, limit: int) -> tf.Tensor:
    """Rounds a size up as `bucket` does.

    Args:
        size: Int32 `[]`, at most `limit`.
        smallest, limit: As in `bucket`.

    Returns:
        Int32 `[]`.
    """
    sizes = tf.constant(buckets(smallest, limit))
    return tf.reduce_min(tf.boolean_mask(sizes, sizes >= size))


def power_of_two(count: tf.Tensor) -> tf.Tensor:
    """Rounds a number of rows up to a power of two, int32 `[]`."""
    powers = tf.constant([2**n for n in range(31)])  # all of int32
    return tf.reduce_min(tf.boolean_mask(powers, powers >= count))


def fill_up_rows(structure: Any, size: tf.Tensor) -> Any:
    """Adds rows of zeros to tensors, in a graph."""
    return tf.nest.map_structure(lambda tensor: pad_to(tensor, size, axis=0), structure)


def fill_up_state(state: DecodeState, size: tf.Tensor, for_xla: bool) -> DecodeState:
    """Adds rows that have ended and have one token, and lays caches out as the decoding wants them."""
    state = fill_up_rows(state, size)
    if for_xla:
        state = state._replace(
            cache=swap_cache_layout(state.cache), draft_cache=swap_cache_layout(state.draft_cache)
        )
    return state._replace(
        lengths=tf.maximum(state.lengths, 1), prompt_lengths=tf.maximum(state.prompt_lengths, 1)
    )
