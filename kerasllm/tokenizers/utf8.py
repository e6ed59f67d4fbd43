"""Texts that may hold bytes that are not UTF-8."""

import tensorflow as tf

VALID_UTF8 = r"[\x{0}-\x{d7ff}\x{e000}-\x{10ffff}]*"


def replace_invalid_utf8(texts: tf.Tensor) -> tf.Tensor:
    """Puts U+FFFD for invalid bytes, as many as Python's `errors="replace"` would."""
    return tf.cond(
        tf.reduce_all(tf.strings.regex_full_match(texts, VALID_UTF8)),
        lambda: texts,
        lambda: tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace"),
    )
