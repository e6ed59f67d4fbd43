"""The Unicode normalization forms NFD, NFC, NFKD and NFKC in the TensorFlow graph.

Unicode Standard Annex 15, with the tables of the `tokenizers` library.
"""

import numpy as np
import tensorflow as tf

from kerasllm.tokenizers.code_points import (
    CODE_POINT_COUNT,
    CodePointMap,
    CodePoints,
    unicode_map,
    unicode_tables,
)
from kerasllm.tokenizers.ragged import cumulative, row_ids

# Hangul syllables are composed by arithmetic: The Unicode Standard, section 3.12.
_FIRST_SYLLABLE, _FIRST_LEAD, _FIRST_VOWEL, _BEFORE_FIRST_TAIL = 0xAC00, 0x1100, 0x1161, 0x11A7
_VOWEL_COUNT, _TAIL_COUNT, _SYLLABLE_COUNT = 21, 28, 11172

_NOT_COMPOSED = -1


class UnicodeForm:
    """One of the four forms.

    Args:
        compatibility: Whether characters that only look different become the same (NFKD, NFKC).
        compose: Whether letters and marks are put together in the end (NFC, NFKC).

    Attributes:
        changing: The code points that may change, or change with those before them.
    """

    def __init__(self, compatibility: bool, compose: bool):
        classes = np.zeros(CODE_POINT_COUNT, np.int64)
        for combining_class, ranges in unicode_tables()["combining_class"].items():
            for first, last in ranges:
                classes[first : last + 1] = int(combining_class)
        decomposition = unicode_map("decomposition")
        for syllable in range(_FIRST_SYLLABLE, _FIRST_SYLLABLE + _SYLLABLE_COUNT):
            decomposition[syllable] = _jamo(syllable)
        compatible = unicode_map("compatibility_decomposition") if compatibility else {}
        self._steps = [CodePointMap(decomposition | compatible), CanonicalOrder(classes)]
        self.changing = CodePoints(classes != 0) | CodePoints.of(compatible)
        if compose:
            composition = Composition(classes)
            self._steps.append(composition)
            # What is composed already stays, if no mark follows.
            self.changing |= CodePoints.of(decomposition) - composition.composed
            self.changing |= composition.seconds
        else:
            self.changing |= CodePoints.of(decomposition)

    def __call__(self, codes: tf.RaggedTensor) -> tf.RaggedTensor:
        """`[texts, None]` int32 code points -> the same, normalized."""
        for step in self._steps:
            codes = step(codes)
        return codes


def _jamo(syllable: int) -> list[int]:
    index = syllable - _FIRST_SYLLABLE
    lead, vowel = divmod(index // _TAIL_COUNT, _VOWEL_COUNT)
    tail = index % _TAIL_COUNT
    jamo = [_FIRST_LEAD + lead, _FIRST_VOWEL + vowel]
    return [*jamo, _BEFORE_FIRST_TAIL + tail] if tail else jamo


class _CombiningClasses:
    """Looks combining classes up; 0 is that of letters.

    Args:
        classes: `[0x110000]` int64.
    """

    def __init__(self, classes: np.ndarray):
        self._marks = np.flatnonzero(classes).astype(np.int32)
        self._classes = classes[self._marks]

    def __call__(self, codes: tf.Tensor) -> tf.Tensor:
        entry = tf.minimum(tf.searchsorted(self._marks, codes), len(self._marks) - 1)
        is_mark = tf.gather(self._marks, entry) == codes
        return tf.where(is_mark, tf.gather(self._classes, entry), tf.constant(0, tf.int64))


class CanonicalOrder:
    """Sorts each run of combining marks by their combining classes."""

    def __init__(self, classes: np.ndarray):
        self._class_of = _CombiningClasses(classes)

    def __call__(self, codes: tf.RaggedTensor) -> tf.RaggedTensor:
        classes = self._class_of(codes.values)

        def sort() -> tf.Tensor:
            run = tf.cumsum(tf.cast((classes == 0) | _begins_row(codes), tf.int64))
            return tf.gather(codes.values, tf.argsort(run * 256 + classes, stable=True))

        may_be_in_wrong_order = (classes[:-1] > classes[1:]) & (classes[1:] > 0)
        values = tf.cond(tf.reduce_any(may_be_in_wrong_order), sort, lambda: codes.values)
        return codes.with_values(values)


class Composition:
    """Puts letters and the marks after them together, as the last step of NFC and NFKC.

    Attributes:
        composed: The code points that come out of it.
        seconds: The code points that may be put together with one before them.
    """

    def __init__(self, classes: np.ndarray):
        self._class_of = _CombiningClasses(classes)
        composition = {pair: int(code, 16) for pair, code in unicode_tables()["composition"].items()}
        pairs = {ord(pair[0]) * CODE_POINT_COUNT + ord(pair[1]): code for pair, code in composition.items()}
        self._pairs = np.array(sorted(pairs), np.int64)
        self._composed = np.array([pairs[pair] for pair in sorted(pairs)], np.int32)
        syllables = range(_FIRST_SYLLABLE, _FIRST_SYLLABLE + _SYLLABLE_COUNT)
        self.composed = CodePoints.of([*composition.values(), *syllables])
        vowels = range(_FIRST_VOWEL, _FIRST_VOWEL + _VOWEL_COUNT)
        tails = range(_BEFORE_FIRST_TAIL + 1, _BEFORE_FIRST_TAIL + _TAIL_COUNT)
        self.seconds = CodePoints.of([*(ord(pair[1]) for pair in composition), *vowels, *tails])

    def __call__(self, codes: tf.RaggedTensor) -> tf.RaggedTensor:
        """Decomposed, canonically ordered code points -> composed ones."""
        values = codes.values
        classes = self._class_of(values)
        # Nothing is put together across the beginning of a run: a letter that is never a second.
        begins_run = ((classes == 0) & ~self.seconds.contains(values)) | _begins_row(codes)
        run_starts = tf.where(begins_run)[:, 0]
        run_ends = tf.concat([run_starts[1:], [tf.size(values, out_type=tf.int64)]], 0)

        def next_in_run(length, runs, starters, starter_codes, last_classes, joined, changed, changes):
            """Takes one more code point of each run: it joins the last letter, or stays.

            Of each run there are the last letter, where it is, and the class of the last code point
            that stayed after it (-1 if none did).
            """
            places = tf.gather(run_starts, runs) + length
            code, combining_class = tf.gather(values, places), tf.gather(classes, places)
            composed = self._compose(starter_codes, code)
            is_letter = tf.gather(classes, starters) == 0
            joins = (composed != _NOT_COMPOSED) & is_letter & (last_classes < combining_class)
            joining = tf.where(joins)[:, 0]
            step = tf.cast(length - 1, tf.int32)
            joined = joined.write(step, tf.gather(places, joining))
            changed = changed.write(step, tf.gather(starters, joining))
            changes = changes.write(step, tf.gather(composed, joining))

            is_starter = ~joins & (combining_class == 0)
            starters = tf.where(is_starter, places, starters)
            starter_codes = tf.where(is_starter, code, tf.where(joins, composed, starter_codes))
            stayed = tf.where(is_starter, tf.constant(-1, tf.int64), combining_class)
            last_classes = tf.where(joins, last_classes, stayed)
            length += 1
            going_on = tf.where(tf.gather(run_starts, runs) + length < tf.gather(run_ends, runs))[:, 0]
            of_runs = (runs, starters, starter_codes, last_classes)
            of_runs = [tf.gather(of_run, going_on) for of_run in of_runs]
            return length, *of_runs, joined, changed, changes

        longer = tf.where(run_ends - run_starts > 1)[:, 0]
        starters = tf.gather(run_starts, longer)
        step_count = tf.cast(tf.reduce_max(tf.concat([run_ends - run_starts, [1]], 0)) - 1, tf.int32)
        of_steps = [
            tf.TensorArray(dtype, step_count, element_shape=[None], infer_shape=False)
            for dtype in (tf.int64, tf.int64, tf.int32)
        ]
        *_, joined, changed, changes = tf.while_loop(
            lambda length, runs, *_: tf.size(runs) > 0,
            next_in_run,
            (
                tf.constant(1, tf.int64),
                longer,
                starters,
                tf.gather(values, starters),
                tf.fill(tf.shape(longer), tf.constant(-1, tf.int64)),
                *of_steps,
            ),
            shape_invariants=(
                tf.TensorShape([]),
                *[tf.TensorShape([None])] * 4,
                *[tf.TensorShape(None)] * 3,
            ),
        )

        def put_together() -> tf.RaggedTensor:
            places, letters, composed = joined.concat(), changed.concat(), changes.concat()
            # What a letter becomes in the end is the last of its changes.
            last_change = tf.math.unsorted_segment_max(
                tf.range(tf.size(letters, out_type=tf.int64)), letters, tf.size(values, out_type=tf.int64)
            )
            composed = tf.concat([composed, [0]], 0)  # There may be no change to look up.
            new_values = tf.where(last_change >= 0, tf.gather(composed, tf.maximum(last_change, 0)), values)
            keep = tf.tensor_scatter_nd_update(
                tf.ones_like(values, tf.bool), places[:, tf.newaxis], tf.zeros_like(places, tf.bool)
            )
            return tf.RaggedTensor.from_row_splits(
                tf.gather(new_values, tf.where(keep)[:, 0]),
                tf.gather(cumulative(keep), codes.row_splits),
                validate=False,
            )

        return tf.cond(tf.size(longer) > 0, put_together, lambda: codes)

    def _compose(self, first: tf.Tensor, second: tf.Tensor) -> tf.Tensor:
        """`[n]` int32 code points, two times -> `[n]` int32 what they make, or _NOT_COMPOSED."""
        pairs = tf.cast(first, tf.int64) * CODE_POINT_COUNT + tf.cast(second, tf.int64)
        entry = tf.minimum(tf.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        composed = tf.where(
            tf.gather(self._pairs, entry) == pairs, tf.gather(self._composed, entry), _NOT_COMPOSED
        )
        lead, vowel = first - _FIRST_LEAD, second - _FIRST_VOWEL
        lead_count = _SYLLABLE_COUNT // (_VOWEL_COUNT * _TAIL_COUNT)
        is_open = (lead >= 0) & (lead < lead_count) & (vowel >= 0) & (vowel < _VOWEL_COUNT)
        composed = tf.where(
            is_open, _FIRST_SYLLABLE + (lead * _VOWEL_COUNT + vowel) * _TAIL_COUNT, composed
        )
        syllable, tail = first - _FIRST_SYLLABLE, second - _BEFORE_FIRST_TAIL
        takes_tail = (syllable >= 0) & (syllable < _SYLLABLE_COUNT) & (syllable % _TAIL_COUNT == 0)
        is_closed = takes_tail & (tail > 0) & (tail < _TAIL_COUNT)
        return tf.where(is_closed, first + tail, composed)


def _begins_row(codes: tf.RaggedTensor) -> tf.Tensor:
    places = tf.range(tf.size(codes.values, out_type=tf.int64))
    return places == tf.gather(codes.row_splits, row_ids(codes))
