"""SentencePiece's compiled normalization rules, as `tokenizers` applies them, in the TensorFlow graph.

The rules are strings and what to put for them. The library looks at user-perceived characters of up to
five bytes: if there is a rule for one, or for the beginning of one, the whole of it is replaced, also
what the rule does not speak of. Otherwise each code point with a rule for itself is replaced.
"""

import base64
import binascii

import numpy as np
import tensorflow as tf

from kerasllm.tokenizers.code_points import CodePoints, Sequences
from kerasllm.tokenizers.ragged import row_ids
from kerasllm.tokenizers.trie import Trie

_LONGEST_REPLACED = 5  # In bytes.
_LONGEST_REPLACEMENT = 256  # In bytes; the longest of Unicode's has 33.

_CARRIAGE_RETURN, _LINE_FEED, _JOINER = 0x0D, 0x0A, 0x200D
_LEADS = [*range(0x1100, 0x1160), *range(0xA960, 0xA97D)]
_VOWELS = [*range(0x1160, 0x11A8), *range(0xD7B0, 0xD7C7)]
_TAILS = [*range(0x11A8, 0x1200), *range(0xD7CB, 0xD7FC)]
_SYLLABLES = range(0xAC00, 0xD7A4)
_OPEN_SYLLABLES = range(0xAC00, 0xD7A4, 28)  # Without a tail.


class Precompiled:
    """Replaces by rules.

    Args:
        charsmap: The entry `precompiled_charsmap` of a tokenizer.json.

    Attributes:
        changing: The code points that may change, or change with their neighbours.

    Raises:
        ValueError: If it is damaged.
    """

    def __init__(self, charsmap: str):
        rules = read_rules(charsmap)
        self._trie = Trie((text, index) for index, text in enumerate(rules))
        # The last sequence is for what is replaced as a part of something longer.
        self._sequences = Sequences([*([ord(c) for c in text] for text in rules.values()), []])
        self._nothing = len(rules)
        self._graphemes = Graphemes()
        # A rule for more than one code point is for a character that something is joined to.
        of_one = CodePoints.of(ord(text) for text in rules if len(text) == 1)
        self.changing = of_one | self._graphemes.joining

    def __call__(self, codes: tf.RaggedTensor) -> tf.RaggedTensor:
        """`[texts, None]` int32 code points -> the same, normalized."""
        place_count = tf.size(codes.values, out_type=tf.int64)
        begins = self._graphemes.begins(codes)
        starts = tf.where(begins)[:, 0]
        graphemes = tf.RaggedTensor.from_row_splits(
            codes.values, tf.concat([starts, [place_count]], 0), validate=False
        )
        grapheme = row_ids(graphemes)
        roots = tf.fill([place_count], tf.constant(Trie.root, tf.int64))
        places, lengths, rules = self._trie.matches(graphemes, roots)

        # The first match of a place is its shortest.
        matches = tf.range(tf.size(places, out_type=tf.int64))
        first_match = tf.math.unsorted_segment_min(matches, places, place_count)
        is_small = tf.math.segment_sum(_byte_counts(codes.values), grapheme) <= _LONGEST_REPLACED
        has_rule = tf.gather(first_match, starts) < tf.size(places, out_type=tf.int64)
        is_in_replaced = tf.gather(is_small & has_rule, grapheme)

        single = tf.where(lengths == 1, matches, tf.int64.max)
        single_match = tf.math.unsorted_segment_min(single, places, place_count)
        match = tf.where(is_in_replaced & begins, first_match, single_match)
        has_match = match < tf.size(places, out_type=tf.int64)
        rule = tf.gather(
            tf.concat([rules, [self._nothing]], 0), tf.where(has_match, match, tf.size(rules, tf.int64))
        )
        rule = tf.where(is_in_replaced & ~begins, self._nothing, rule)
        return self._sequences.put(codes, has_match | is_in_replaced, rule)


def _byte_counts(codes: tf.Tensor) -> tf.Tensor:
    return 1 + sum(tf.cast(codes >= first, tf.int32) for first in (0x80, 0x800, 0x10000))


class Graphemes:
    """Finds user-perceived characters: Unicode Standard Annex 29, extended grapheme clusters.

    Flags are not put together: a half of one has four bytes, so that nothing of up to five has two.

    Attributes:
        joining: The code points that join others, or are joined whatever comes before them.
    """

    def __init__(self):
        self._control = CodePoints.named("grapheme_control")
        self._extending = CodePoints.named("grapheme_extend")
        self._prepending = CodePoints.named("grapheme_prepend")
        self._pictographic = CodePoints.named("pictographic")
        self._extending_pictographic = CodePoints.named("pictographic_extend")
        self._consonant = CodePoints.named("conjunct_consonant")
        self._linker = CodePoints.named("conjunct_linker")
        self._extending_consonant = CodePoints.named("conjunct_extend")
        self._lead, self._vowel = CodePoints.of(_LEADS), CodePoints.of(_VOWELS)
        self._before_vowel = CodePoints.of([*_LEADS, *_VOWELS, *_OPEN_SYLLABLES])
        self._after_lead = CodePoints.of([*_LEADS, *_VOWELS, *_SYLLABLES])
        self._tail = CodePoints.of(_TAILS)
        self._before_tail = CodePoints.of([*_VOWELS, *_TAILS, *_SYLLABLES])
        self.joining = self._extending | self._prepending | CodePoints.of([*_LEADS, *_VOWELS, *_TAILS])
        self.joining |= CodePoints.of([_CARRIAGE_RETURN, _LINE_FEED])

    def begins(self, codes: tf.RaggedTensor) -> tf.Tensor:
        """`[texts, None]` int32 code points -> `[places]` bool, whether a grapheme begins there."""
        values = codes.values
        row = row_ids(codes)
        before, after = values[:-1], values[1:]
        is_line_end = (before == _CARRIAGE_RETURN) & (after == _LINE_FEED)
        is_control = self._control.contains(values)
        joins = self._extending.contains(after) | self._prepending.contains(before)
        joins |= self._lead.contains(before) & self._after_lead.contains(after)
        joins |= self._before_vowel.contains(before) & self._vowel.contains(after)
        joins |= self._before_tail.contains(before) & self._tail.contains(after)
        joins |= self._joins_pictures(values, row) | self._joins_consonants(values, row)
        joins &= ~is_control[:-1] & ~is_control[1:]
        joins = (joins | is_line_end) & (row[:-1] == row[1:])
        return tf.concat([tf.ones_like(values[:1], tf.bool), ~joins], 0)

    def _joins_pictures(self, values: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
        """Whether a joiner after a picture, maybe with marks, joins a picture to it (GB11)."""
        is_picture = self._pictographic.contains(values)
        # For each joiner, what is before the marks before it.
        base = _last_without(self._extending_pictographic.contains(values) & (values != _JOINER))
        joiner_follows_picture = tf.gather(is_picture, base) & (tf.gather(row, base) == row)
        return (values[:-1] == _JOINER) & joiner_follows_picture[:-1] & is_picture[1:]

    def _joins_consonants(self, values: tf.Tensor, row: tf.Tensor) -> tf.Tensor:
        """Whether a consonant is joined to another by a linker between them (GB9c)."""
        is_consonant, is_linker = self._consonant.contains(values), self._linker.contains(values)
        base = _last_without(is_linker | self._extending_consonant.contains(values))
        linkers_until = tf.cumsum(tf.cast(is_linker, tf.int32), exclusive=True)
        has_linker = tf.gather(linkers_until, base) < linkers_until
        joins = is_consonant & has_linker & tf.gather(is_consonant, base) & (tf.gather(row, base) == row)
        return joins[1:]


def _last_without(flags: tf.Tensor) -> tf.Tensor:
    """For each place, the last one before it without a flag; 0 if there is none."""
    without = tf.where(~flags)[:, 0]
    without = tf.concat([tf.zeros([1], tf.int64), without], 0)
    places = tf.range(tf.size(flags, out_type=tf.int64))
    return tf.gather(without, tf.maximum(tf.searchsorted(without[1:], places), 0))


def read_rules(charsmap: str) -> dict[str, str]:
    """Reads compiled rules: a double-array trie of UTF-8, and the replacements.

    Yata et al., "A compact static double-array keeping character codes", 2007; the layout is that of
    darts-clone.

    Args:
        charsmap: Base64 of the length of the trie in bytes, the trie, and the replacements, each of
            which ends with a zero byte.

    Returns:
        The strings with a rule, and the replacements. A string that begins with another one that has
        a rule is left out, for the shorter one always wins.

    Raises:
        ValueError: If the rules are damaged.
    """
    try:
        content = base64.b64decode(charsmap, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"`precompiled_charsmap` must be Base64. Received: {error}") from error
    trie_size = int.from_bytes(content[:4], "little")
    if len(content) < 4 or trie_size % 4 or not 4 <= trie_size <= len(content) - 4:
        raise _damaged(f"a trie of {trie_size} bytes in {len(content)}")
    units = np.frombuffer(content, "<u4", trie_size // 4, offset=4).astype(np.int64)
    replacements = content[4 + trie_size :]

    rules = {}
    to_visit = [(b"", _offset(units[0]))]
    visited = 0
    while to_visit:
        prefix, node = to_visit.pop()
        visited += 1
        # Each has a unit of its own, or the same are found again and again.
        if visited + len(to_visit) + len(rules) > len(units):
            raise _damaged("a trie with a loop")
        if len(prefix) == _LONGEST_REPLACED:
            continue  # What is longer is never replaced.
        places = node ^ np.arange(1, 256)
        inside = places[places < len(units)]
        # A unit is a child where its label is the byte that leads to it.
        labels = units[inside] & (1 << 31 | 0xFF)
        for place in inside[labels == inside ^ node]:
            unit = units[place]
            text, child = prefix + bytes([place ^ node]), place ^ _offset(unit)
            if unit >> 8 & 1:
                rules[_text_of(text)] = _replacement(replacements, units, child)
            else:
                to_visit.append((text, child))
    return rules


def _offset(unit: int) -> int:
    return int(unit) >> 10 << ((int(unit) & 1 << 9) >> 6)


def _replacement(replacements: bytes, units: np.ndarray, place: int) -> str:
    if place >= len(units):
        raise _damaged("a value outside of the trie")
    start = int(units[place]) & ((1 << 31) - 1)
    if start > len(replacements):
        raise _damaged(f"a replacement at {start} of {len(replacements)} bytes")
    content, end, _ = replacements[start : start + _LONGEST_REPLACEMENT + 1].partition(b"\0")
    if not end and len(content) > _LONGEST_REPLACEMENT:
        raise _damaged(f"a replacement of more than {_LONGEST_REPLACEMENT} bytes")
    return _text_of(content)


def _text_of(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(str(error)) from error


def _damaged(what: str) -> ValueError:
    return ValueError(f"`precompiled_charsmap` must hold a trie and replacements. Received: {what}")
