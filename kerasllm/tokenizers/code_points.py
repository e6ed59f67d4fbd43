"""Sets and maps of Unicode code points, for regular expressions and for tensors.

In tensors, texts are ragged: `[texts, None]` int32 code points.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
import tensorflow as tf

from kerasllm.tokenizers.ragged import cumulative, rows_of_splits

CODE_POINT_COUNT = 0x110000
_SURROGATES = slice(0xD800, 0xE000)


@cache
def unicode_tables() -> dict[str, Any]:
    """The contents of unicode_tables.json, which tools/make_unicode_tables writes."""
    file = resources.files("kerasllm.tokenizers").joinpath("unicode_tables.json")
    return json.loads(file.read_text(encoding="utf-8"))


def unicode_map(name: str) -> dict[int, list[int]]:
    """A map of unicode_tables.json, from code points to sequences of them."""
    return {int(key, 16): [ord(c) for c in text] for key, text in unicode_tables()[name].items()}


class CodePoints:
    """A set of code points.

    Args:
        members: `[0x110000]` bool.
    """

    def __init__(self, members: np.ndarray):
        self.members = members

    @classmethod
    def of(cls, code_points: Iterable[int]) -> "CodePoints":
        members = np.zeros(CODE_POINT_COUNT, bool)
        members[list(code_points)] = True
        return cls(members)

    @classmethod
    def named(cls, name: str) -> "CodePoints":
        """One of the sets of unicode_tables.json."""
        return cls.of(c for first, last in unicode_tables()[name] for c in range(first, last + 1))

    def __or__(self, other: "CodePoints") -> "CodePoints":
        return CodePoints(self.members | other.members)

    def __sub__(self, other: "CodePoints") -> "CodePoints":
        return CodePoints(self.members & ~other.members)

    def __invert__(self) -> "CodePoints":
        return CodePoints(~self.members)

    def pattern(self) -> str:
        """The inside of a bracketed regular expression class."""
        members = self.members.copy()
        members[_SURROGATES] = False  # No text holds one, and RE2 takes none.
        starts, ends = _ranges(members)
        return "".join(
            f"\\x{{{start:x}}}-\\x{{{end - 1:x}}}" for start, end in zip(starts, ends, strict=True)
        )

    def contains(self, codes: tf.Tensor) -> tf.Tensor:
        """`[n]` int32 code points -> `[n]` bool."""
        starts, ends = _ranges(self.members)
        # Of starts and ends together, an odd number are at or before what is in a range.
        return tf.searchsorted(np.stack([starts, ends], 1).reshape(-1), codes, side="right") % 2 == 1


def _ranges(members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first code points of each range, and those after its last."""
    steps = np.diff(members.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(steps == 1).astype(np.int32), np.flatnonzero(steps == -1).astype(np.int32)


class Sequences:
    """Sequences of code points that take the places of single ones.

    Args:
        sequences: The sequences; some may be empty.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]):
        self._lengths = np.array([len(sequence) for sequence in sequences], np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        # A code point more, so that there is always one to look at.
        self._values = np.array([*(code for sequence in sequences for code in sequence), 0], np.int32)

    def put(self, codes: tf.RaggedTensor, is_replaced: tf.Tensor, indices: tf.Tensor) -> tf.RaggedTensor:
        """Replaces some code points.

        Args:
            codes: `[texts, None]` int32.
            is_replaced: `[places]` bool, for each of the code points.
            indices: `[places]` integers, which sequence to put; any number below theirs elsewhere.

        Returns:
            `[texts, None]` int32.
        """
        lengths = tf.where(is_replaced, tf.gather(self._lengths, indices), tf.constant(1, tf.int64))
        splits = cumulative(lengths)
        source = rows_of_splits(splits, splits[-1])
        place = tf.range(splits[-1]) - tf.gather(splits, source)
        place_in_values = tf.gather(tf.gather(self._starts, indices), source) + place
        values = tf.where(
            tf.gather(is_replaced, source),
            tf.gather(self._values, tf.minimum(place_in_values, len(self._values) - 1)),
            tf.gather(codes.values, source),
        )
        return tf.RaggedTensor.from_row_splits(values, tf.gather(splits, codes.row_splits), validate=False)


class CodePointMap:
    """Puts a sequence of code points for each of some code points.

    Args:
        mapping: The code points, at least one, and what to put.

    Attributes:
        keys: The code points.
    """

    def __init__(self, mapping: dict[int, Sequence[int]]):
        self.keys = CodePoints.of(mapping)
        self._sorted_keys = np.array(sorted(mapping), np.int32)
        self._sequences = Sequences([mapping[key] for key in sorted(mapping)])

    def __call__(self, codes: tf.RaggedTensor) -> tf.RaggedTensor:
        entry = tf.searchsorted(self._sorted_keys, codes.values)
        entry = tf.minimum(entry, len(self._sorted_keys) - 1)
        is_key = tf.gather(self._sorted_keys, entry) == codes.values
        return self._sequences.put(codes, is_key, entry)
