"""Bytes that mark places in a text while it is cut up."""

import tensorflow as tf

# Neither byte occurs in valid UTF-8.
SEPARATOR = b"\xff"
MARK = b"\xfe"


def split_at_separators(texts: tf.Tensor, separator: bytes = SEPARATOR) -> tuple[tf.Tensor, tf.Tensor]:
    """`[texts]` -> the parts that are not empty, and for each the index of its text."""
    split = tf.raw_ops.StringSplitV2(input=texts, sep=separator)
    parts, text_of_part = split.values, split.indices[:, 0]
    not_empty = tf.where(parts != "")[:, 0]
    return tf.gather(parts, not_empty), tf.gather(text_of_part, not_empty)
