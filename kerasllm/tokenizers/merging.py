"""Byte pair encoding of many rows of symbols at once, in TensorFlow core ops."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from kerasllm.tokenizers.json_fields import field
from kerasllm.tokenizers.ragged import (
    count,
    cumulative,
    empty_like,
    interleave,
    row_ids,
    rows_of_splits,
    slices,
)

# Rows of more symbols than this are encoded in overlapping windows, so that one of 100,000 takes
# as many merge steps as one of WINDOW.
LONGEST_WHOLE_ROW = 128
HALF_WINDOW = 64
WINDOW = 2 * HALF_WINDOW

NO_SYMBOL = -1
_NO_MERGE = 1 << 62
_NOWHERE = tf.int64.max  # What the minimum over no positions is.
_RANK_SHIFT = 32
_LOW_BITS = (1 << _RANK_SHIFT) - 1


class Merger(tf.Module):
    """Merges symbols (ids of single bytes or characters) to tokens. All rows are worked on at once.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016.

    Args:
        merges: Pairs of tokens by rank, as `checked_merges` has found them good.
        ids: The ids of the tokens.
        vocabulary_size: More than the largest id.
    """

    def __init__(self, merges: list[tuple[str, str]], ids: dict[str, int], vocabulary_size: int):
        super().__init__()
        self._vocabulary_size = vocabulary_size
        # Pair of ids, as left * vocabulary_size + right -> rank of the merge and resulting id, both
        # in one integer, the rank in the high bits, so that the smallest is the merge that comes
        # first. A pair that does not merge gives _NO_MERGE.
        table = {-1: _NO_MERGE}  # An entry so that a tokenizer without merges has a table as well.
        symbol_counts = [1] * vocabulary_size
        for rank, (left, right) in enumerate(merges):
            left_id, right_id, merged_id = ids[left], ids[right], ids[left + right]
            table[left_id * vocabulary_size + right_id] = rank << _RANK_SHIFT | merged_id
            symbol_counts[merged_id] = symbol_counts[left_id] + symbol_counts[right_id]
        self._symbol_counts = tf.constant(symbol_counts, tf.int64)
        self._table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                tf.constant(list(table.keys()), tf.int64),
                tf.constant(list(table.values()), tf.int64),
            ),
            _NO_MERGE,
        )

    def merge(self, symbols: tf.RaggedTensor) -> tf.RaggedTensor:
        """`[rows, None]` int32 symbols, rows of any length -> `[rows, None]` int32 ids."""
        lengths = symbols.row_lengths()
        short = tf.where(lengths <= LONGEST_WHOLE_ROW)[:, 0]
        long = tf.where(lengths > LONGEST_WHOLE_ROW)[:, 0]
        merged_short = self._merge_rows(tf.gather(symbols, short))

        def some_are_long() -> tf.RaggedTensor:
            merged_long = self._merge_in_windows(tf.gather(symbols, long))
            return interleave(short, merged_short, long, merged_long)

        return tf.cond(tf.size(long) > 0, some_are_long, lambda: merged_short)

    def _merge_rows(self, symbols: tf.RaggedTensor) -> tf.RaggedTensor:
        """Byte pair encoding of every row: `[rows, None]` int32 symbols -> `[rows, None]` ids.

        BPE merges, again and again, the leftmost pair of the lowest rank. Here one step merges
        all pairs of a row's lowest rank. This is the same, because every merge that uses a token
        has a higher rank than the one that makes it (`checked_merges`): a merge never brings up
        a pair that would have to come before the row's other pairs of the lowest rank.
        """
        row_count = tf.size(symbols.row_splits, out_type=tf.int32) - 1
        rows = tf.cast(row_ids(symbols), tf.int32)

        def step(ids, rows, done_ids, done_rows):
            pairs = tf.cast(ids[:-1], tf.int64) * self._vocabulary_size + tf.cast(ids[1:], tf.int64)
            in_one_row = rows[:-1] == rows[1:]
            merges = self._table.lookup(tf.where(in_one_row, pairs, tf.constant(-1, tf.int64)))
            best_of_row = tf.math.unsorted_segment_min(merges, rows[:-1], row_count)
            is_best = (merges == tf.gather(best_of_row, rows[:-1])) & (merges < _NO_MERGE)
            is_best = _without_overlaps(is_best)

            # The left symbol of a pair becomes the new token, the right one goes.
            merged_ids = tf.cast(merges & _LOW_BITS, tf.int32)
            new_ids = tf.concat([tf.where(is_best, merged_ids, ids[:-1]), ids[-1:]], 0)
            stays = tf.concat([[True], ~is_best], 0)

            # A row with nothing left to merge leaves the loop.
            is_active = tf.gather(best_of_row, rows) < _NO_MERGE
            staying = tf.where(stays & is_active)[:, 0]
            done = tf.where(~is_active)[:, 0]
            return (
                tf.gather(new_ids, staying),
                tf.gather(rows, staying),
                tf.concat([done_ids, tf.gather(ids, done)], 0),
                tf.concat([done_rows, tf.gather(rows, done)], 0),
            )

        nothing = empty_like(rows, tf.int32)
        _, _, done_ids, done_rows = tf.while_loop(
            lambda ids, *_: tf.size(ids) > 0,
            step,
            (symbols.values, rows, nothing, nothing),
            shape_invariants=(tf.TensorShape([None]),) * 4,
        )
        # Rows were done in any order, the ids within a row in theirs.
        return tf.RaggedTensor.from_row_splits(
            tf.gather(done_ids, tf.argsort(done_rows, stable=True)),
            cumulative(count(done_rows, row_count)),
            validate=False,
        )

    def _merge_in_windows(self, symbols: tf.RaggedTensor) -> tf.RaggedTensor:
        """As `_merge_rows`, for rows of more symbols than a window.

        Each row is covered by windows, where one begins in the middle of the one before; each
        window is encoded by itself. Where two overlap, we change over from one encoding to the
        other at a token that both have in the same place.

        This is exact, because a sequence of tokens is the encoding of its text if and only if
        every two neighbours are the encoding of theirs: a merge across the border between two
        tokens would take place in the pair alone as well. All neighbours in our result are
        neighbours in the encoding of some window.

        Two windows with no token in common, as in a long run of one character, are joined to
        one, and all is encoded again, if need be until a row is a single window.
        """
        row_starts, row_ends = symbols.row_splits[:-1], symbols.row_splits[1:]
        # A row of n symbols needs windows at 0, HALF_WINDOW, ..., until one reaches its end.
        windows_per_row = tf.maximum((symbols.row_lengths() - 1) // HALF_WINDOW, 1)
        first_window = cumulative(windows_per_row)
        rows = rows_of_splits(first_window, first_window[-1])
        number_in_row = tf.range(first_window[-1]) - tf.gather(first_window, rows)
        starts = tf.gather(row_starts, rows) + number_in_row * HALF_WINDOW
        ends = tf.minimum(starts + WINDOW, tf.gather(row_ends, rows))

        def join_and_encode(is_exact, starts, ends, rows, change_over, ids, splits):
            fits = change_over != _NOWHERE
            first_of_joined = tf.where(fits)[:, 0]
            last_of_joined = tf.where(tf.concat([fits[1:], [True]], 0))[:, 0]
            starts = tf.gather(starts, first_of_joined)
            ends = tf.gather(ends, last_of_joined)
            rows = tf.gather(rows, first_of_joined)
            tokens = self._merge_rows(slices(symbols.values, starts, ends))
            change_over = self._change_over(tokens, starts, ends, rows, symbols)
            is_exact = tf.reduce_all(change_over != _NOWHERE)
            return is_exact, starts, ends, rows, change_over, tokens.values, tokens.row_splits

        nothing = empty_like(starts, tf.int32), empty_like(starts, tf.int64)
        _, starts, ends, rows, change_over, ids, splits = tf.while_loop(
            lambda is_exact, *_: ~is_exact,
            join_and_encode,
            (tf.constant(False), starts, ends, rows, starts, *nothing),
            shape_invariants=(tf.TensorShape([]), *[tf.TensorShape([None])] * 6),
        )
        tokens = tf.RaggedTensor.from_row_splits(ids, splits, validate=False)

        # Of each window, keep what lies between its change-over and the next window's.
        token_starts = self._token_starts(tokens, starts)
        window = row_ids(tokens)
        is_last = tf.concat([rows[1:] != rows[:-1], [True]], 0)
        next_change_over = tf.concat([change_over[1:], row_ends[-1:]], 0)
        keep_until = tf.where(is_last, tf.gather(row_ends, rows), next_change_over)
        keep = token_starts >= tf.gather(change_over, window)
        keep &= token_starts < tf.gather(keep_until, window)
        kept = tf.where(keep)[:, 0]
        row_of_kept = tf.gather(rows, tf.gather(window, kept))
        row_count = tf.size(row_starts, out_type=tf.int64)
        return tf.RaggedTensor.from_row_splits(
            tf.gather(ids, kept),
            cumulative(count(row_of_kept, row_count)),
            validate=False,
        )

    def _token_starts(self, tokens: tf.RaggedTensor, window_starts: tf.Tensor) -> tf.Tensor:
        """The position of the first symbol of each token, given that of each window."""
        symbols_before = cumulative(tf.gather(self._symbol_counts, tokens.values))
        before_window = tf.gather(symbols_before, tokens.row_splits[:-1])
        offset_of_window = window_starts - before_window
        return symbols_before[:-1] + tf.gather(offset_of_window, row_ids(tokens))

    def _change_over(
        self,
        tokens: tf.RaggedTensor,
        starts: tf.Tensor,
        ends: tf.Tensor,
        rows: tf.Tensor,
        symbols: tf.RaggedTensor,
    ) -> tf.Tensor:
        """Where to change over from the window before to this one.

        Args:
            tokens: `[windows, None]` int32, the encoding of each window.
            starts: `[windows]` int64 positions in `symbols.values`.
            ends: As `starts`.
            rows: `[windows]` int64, the row of `symbols` that a window is in.
            symbols: `[rows, None]` int32.

        Returns:
            `[windows]` int64: the position of the first token that this window has in common
            with the one before, _NOWHERE if there is none; the start of a row's first window.
        """
        token_starts, window = self._token_starts(tokens, starts), row_ids(tokens)
        is_first = tf.concat([[True], rows[1:] != rows[:-1]], 0)
        is_last = tf.concat([is_first[1:], [True]], 0)
        # The overlap with the window before and the one with the next do not meet.
        overlap_end = tf.where(is_first, starts, tf.concat([starts[:1], ends[:-1]], 0))
        overlap_start = tf.where(is_last, ends, tf.concat([starts[1:], ends[-1:]], 0))
        with_window_before = token_starts < tf.gather(overlap_end, window)
        with_next_window = token_starts >= tf.gather(overlap_start, window)

        symbol_count = tf.size(symbols.values, out_type=tf.int64)
        by_this_window = _scatter(tokens.values, token_starts, with_window_before, symbol_count)
        by_window_before = _scatter(tokens.values, token_starts, with_next_window, symbol_count)
        is_common = (by_this_window == by_window_before) & (by_this_window != NO_SYMBOL)
        common = tf.where(is_common)[:, 0]
        window_of_common = tf.searchsorted(starts, common, side="right", out_type=tf.int64) - 1
        first_common = tf.math.unsorted_segment_min(
            common, window_of_common, tf.size(starts, out_type=tf.int64)
        )
        return tf.where(is_first, starts, first_common)


def read_merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model in a tokenizer.json, by rank; ValueError if they are none."""
    merges = []
    for merge in field(model, "merges", list, []):
        # Older files hold "left right", newer ones ["left", "right"].
        pair = tuple(
            merge.split(" ") if isinstance(merge, str) else merge if isinstance(merge, list) else ()
        )
        if len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"A merge must be a pair of tokens. Received: {str(merge)[:200]!r}")
        merges.append(pair)
    if len(set(merges)) < len(merges):
        raise ValueError(
            f"Merges must differ. Received: {len(merges)} merges, {len(set(merges))} different"
        )
    vocabulary = field(model, "vocab", dict, {})
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ValueError(
                    "The tokens of a merge must be in the vocabulary. Received: merge "
                    f"{(left, right)!r}, and no token {token!r}"
                )
    return merges


def check_order(merges: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError if to merge many pairs at once would not be exact."""
    last_rank_making = {left + right: rank for rank, (left, right) in enumerate(merges)}
    for rank, (left, right) in enumerate(merges):
        for token in (left, right):
            if last_rank_making.get(token, -1) >= rank:
                raise ValueError(
                    "A merge must come after the ones that make its tokens. Received: merge "
                    f"{(left, right)!r} at rank {rank}, and one that makes {token!r} at rank "
                    f"{last_rank_making[token]}"
                )


def checked_merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE model, by rank; ValueError if merging many at once would not be exact."""
    merges = read_merges(model)
    check_order(merges)
    return merges


def live_merges(
    merges: Sequence[tuple[str, str]], ids: dict[str, int], symbols: Mapping[str, Sequence[int]]
) -> list[tuple[str, str]]:
    """The merges that ever take place: for each token at most one.

    Merges made from a SentencePiece model have an entry for every way to cut a token in two. Only the
    last merge that makes the token from its own symbols can take place, whatever the text: as long as
    nothing is merged across the borders of a part of a text, the merges inside are those of the part
    alone, in the same order. So where a pair comes up in a text, it comes up in its token alone, too.

    Args:
        merges: Pairs of tokens by rank.
        ids: The ids of the tokens.
        symbols: For each token that a merge makes, the ids of its symbols before merging.

    Returns:
        Some of the merges, in the same order.
    """
    if not merges:
        return []
    token_count = max(ids.values()) + 1
    pairs = np.array([ids[left] * token_count + ids[right] for left, right in merges], np.int64)
    made = np.array([ids[left + right] for left, right in merges], np.int64)
    order = np.argsort(pairs)
    sorted_pairs = pairs[order]

    rows = [symbols[token] for token in dict.fromkeys(left + right for left, right in merges)]
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    values = np.fromiter((symbol for row in rows for symbol in row), np.int64)
    live = []
    # Each step does the first merge of every row, the leftmost of the lowest rank.
    while True:
        pair = values[:-1] * token_count + values[1:]
        place = np.minimum(np.searchsorted(sorted_pairs, pair), len(sorted_pairs) - 1)
        merges_here = (sorted_pairs[place] == pair) & (row_of[:-1] == row_of[1:])
        positions = np.flatnonzero(merges_here)
        ranks = order[place[positions]]
        by_row = np.lexsort((positions, ranks, row_of[positions]))
        first_of_row = np.unique(row_of[positions[by_row]], return_index=True)[1]
        chosen = by_row[first_of_row]
        if not len(chosen):
            return [merges[rank] for rank in sorted(live)]
        positions, ranks = positions[chosen], ranks[chosen]
        row_lengths = np.bincount(row_of, minlength=len(rows))
        live += ranks[row_lengths[row_of[positions]] == 2].tolist()
        values[positions] = made[ranks]
        stays = np.ones(len(values), bool)
        stays[positions + 1] = False
        # Rows without anything left to merge go.
        stays &= np.isin(row_of, row_of[positions])
        values, row_of = values[stays], row_of[stays]


def _scatter(values: tf.Tensor, positions: tf.Tensor, mask: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """`[size]` with the masked values at their positions and NO_SYMBOL elsewhere."""
    masked = tf.where(mask)[:, 0]
    return tf.tensor_scatter_nd_update(
        tf.fill([size], NO_SYMBOL),
        tf.gather(positions, masked)[:, tf.newaxis],
        tf.gather(values, masked),
    )


def _without_overlaps(is_pair: tf.Tensor) -> tf.Tensor:
    """Of pairs that overlap, as in "aaa", every second one, from the left.

    Args:
        is_pair: `[symbols - 1]` bool, whether a symbol and the next are a pair to merge.

    Returns:
        The same, without two neighbours that are both True.
    """
    after_a_pair = tf.concat([[False], is_pair[:-1]], 0)

    def every_second() -> tf.Tensor:
        begins = is_pair & ~after_a_pair
        positions = tf.range(tf.size(is_pair, out_type=tf.int64))
        run = tf.maximum(tf.cumsum(tf.cast(begins, tf.int32)) - 1, 0)
        place_in_run = positions - tf.gather(tf.where(begins)[:, 0], run)
        return is_pair & (place_in_run % 2 == 0)

    return tf.cond(tf.reduce_any(is_pair & after_a_pair), every_second, lambda: is_pair)
