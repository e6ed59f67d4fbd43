"""Byte-level byte pair encoding, as of GPT-2, in TensorFlow core ops."""

import json
from collections.abc import Callable

import tensorflow as tf

from kerasllm.tokenizers.base import NOT_IN_TABLE, SEPARATOR, Tokenizer, unicode_class

# Pieces of more bytes than this are encoded in overlapping windows, so that one of 100,000 bytes
# takes as many merge steps as one of WINDOW bytes.
LONGEST_WHOLE_PIECE = 128
HALF_WINDOW = 64
WINDOW = 2 * HALF_WINDOW

_NO_MERGE = 1 << 62
_NO_SYMBOL = -1
_NOWHERE = tf.int64.max  # What the minimum over no positions is.
_RANK_SHIFT = 32
_LOW_BITS = (1 << _RANK_SHIFT) - 1


class ByteBPETokenizer(Tokenizer):
    """Byte-level BPE: nothing is unknown, and decoding gives every text back.

    Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019; Sennrich
    et al., "Neural Machine Translation of Rare Words with Subword Units", 2016.
    """

    _supports = "BPE with GPT-2's pre-tokenizer ByteLevel (use_regex, not add_prefix_space)"
    _decoder_type = "ByteLevel"

    @classmethod
    def _describes(cls, config: dict) -> bool:
        model = config["model"]
        # The oldest files name no type.
        is_bpe = model.get("type", "BPE" if "merges" in model else None) == "BPE"
        return is_bpe and _pre_tokenizer_key(config.get("pre_tokenizer")) in PRE_TOKENIZERS

    def _cuts(self) -> list[tuple[str, bytes]]:
        return PRE_TOKENIZERS[_pre_tokenizer_key(self._config.json["pre_tokenizer"])]()

    def _check_supported(self) -> None:
        super()._check_supported()
        model = self._config.model
        for option in (
            "dropout",
            "unk_token",
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "byte_fallback",
            "ignore_merges",
        ):
            if model.get(option):
                raise ValueError(
                    f"`{option}` of a byte-level BPE model is not supported. "
                    f"Received: {option}={model[option]!r}"
                )

    # Tables

    def _build_tokenization(self) -> None:
        vocabulary = self._config.model_vocabulary
        self._symbol_of_byte = tf.constant(
            [vocabulary.get(character, _NO_SYMBOL) for character in BYTE_TO_CHARACTER], tf.int32
        )
        # A byte without a token is dropped before merging, as `tokenizers` does.
        self._every_byte_has_a_symbol = set(BYTE_TO_CHARACTER) <= vocabulary.keys()
        self._token_lengths = tf.constant([len(token) for token in self._config.tokens], tf.int64)
        self._merges = self._merge_table()
        super()._build_tokenization()

    def _merge_table(self) -> tf.lookup.StaticHashTable:
        """Pair of ids, as left * vocabulary_size + right -> rank of the merge and resulting id.

        Both are in one integer, the rank in the high bits, so that the smallest is the merge
        that comes first. A pair that does not merge gives _NO_MERGE.
        """
        merges = _checked_merges(self._config.model)
        vocabulary = self._config.model_vocabulary
        table = {-1: _NO_MERGE}  # An entry so that a tokenizer without merges has a table as well.
        for rank, (left, right) in enumerate(merges):
            pair = vocabulary[left] * self.vocabulary_size + vocabulary[right]
            table[pair] = rank << _RANK_SHIFT | vocabulary[left + right]
        return tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                tf.constant(list(table.keys()), tf.int64),
                tf.constant(list(table.values()), tf.int64),
            ),
            _NO_MERGE,
        )

    def _piece_ids(self) -> dict[bytes, int]:
        """The tokens that merging their own bytes leads to: most pieces of a text are one.

        Others exist: a special token, or one whose parts are merged differently. Whether a token
        is among them is found by encoding it.
        """
        vocabulary = self._config.model_vocabulary
        candidates = {
            _bytes_of(token): token_id
            for token, token_id in vocabulary.items()
            if token and CHARACTER_TO_BYTE.keys() >= set(token)
        }
        encoded = self._merge_pieces(tf.constant(list(candidates), tf.string)).to_list()
        return {
            piece: token_id
            for (piece, token_id), ids in zip(candidates.items(), encoded, strict=True)
            if ids == [token_id]
        }

    def _token_text(self, token: str) -> bytes:
        return _bytes_of(token)

    # Pieces to ids. All pieces of a batch are worked on at once, in flat arrays.

    def _encode_pieces(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        """`[pieces]` strings -> `[pieces, None]` int32 ids."""
        ids = self._piece_table.lookup(pieces)
        known = tf.where(ids != NOT_IN_TABLE)[:, 0]
        unknown = tf.where(ids == NOT_IN_TABLE)[:, 0]

        def some_need_merging() -> tf.RaggedTensor:
            different_pieces, index = tf.unique(tf.gather(pieces, unknown))
            merged = tf.gather(self._merge_pieces(different_pieces), index)
            return _interleave(known, _one_each(tf.gather(ids, known)), unknown, merged)

        return tf.cond(tf.size(unknown) > 0, some_need_merging, lambda: _one_each(ids))

    def _merge_pieces(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        """`[pieces]` strings, any length -> `[pieces, None]` int32 ids."""
        lengths = tf.strings.length(pieces)
        short = tf.where(lengths <= LONGEST_WHOLE_PIECE)[:, 0]
        long = tf.where(lengths > LONGEST_WHOLE_PIECE)[:, 0]
        merged_short = self._merge(self._symbols(tf.gather(pieces, short)))

        def some_are_long() -> tf.RaggedTensor:
            merged_long = self._merge_in_windows(self._symbols(tf.gather(pieces, long)))
            return _interleave(short, merged_short, long, merged_long)

        return tf.cond(tf.size(long) > 0, some_are_long, lambda: merged_short)

    def _symbols(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        """`[pieces]` strings -> `[pieces, None]` int32, the ids of their bytes."""
        every_byte = tf.io.decode_raw(tf.strings.reduce_join(pieces), tf.uint8)
        symbols = tf.gather(self._symbol_of_byte, tf.cast(every_byte, tf.int32))
        splits = _cumulative(tf.strings.length(pieces))
        if self._every_byte_has_a_symbol:
            return tf.RaggedTensor.from_row_splits(symbols, splits, validate=False)
        exists = symbols != _NO_SYMBOL
        existing = tf.gather(symbols, tf.where(exists)[:, 0])
        splits = tf.gather(_cumulative(exists), splits)
        return tf.RaggedTensor.from_row_splits(existing, splits, validate=False)

    def _merge(self, symbols: tf.RaggedTensor) -> tf.RaggedTensor:
        """Byte pair encoding of every row: `[rows, None]` int32 symbols -> `[rows, None]` ids.

        BPE merges, again and again, the leftmost pair of the lowest rank. Here one step merges
        all pairs of a row's lowest rank. This is the same, because every merge that uses a token
        has a higher rank than the one that makes it (`_checked_merges`): a merge never brings up
        a pair that would have to come before the row's other pairs of the lowest rank.
        """
        row_count = tf.size(symbols.row_splits, out_type=tf.int32) - 1
        rows = tf.cast(_row_ids(symbols), tf.int32)

        def step(ids, rows, done_ids, done_rows):
            pairs = tf.cast(ids[:-1], tf.int64) * self.vocabulary_size + tf.cast(ids[1:], tf.int64)
            in_one_row = rows[:-1] == rows[1:]
            merges = self._merges.lookup(tf.where(in_one_row, pairs, tf.constant(-1, tf.int64)))
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

        nothing = tf.zeros([0], tf.int32)
        _, _, done_ids, done_rows = tf.while_loop(
            lambda ids, *_: tf.size(ids) > 0,
            step,
            (symbols.values, rows, nothing, nothing),
            shape_invariants=(tf.TensorShape([None]),) * 4,
        )
        # Rows were done in any order, the ids within a row in theirs.
        return tf.RaggedTensor.from_row_splits(
            tf.gather(done_ids, tf.argsort(done_rows, stable=True)),
            _cumulative(_count(done_rows, row_count)),
            validate=False,
        )

    def _merge_in_windows(self, symbols: tf.RaggedTensor) -> tf.RaggedTensor:
        """As `_merge`, for rows of more symbols than a window.

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
        first_window = _cumulative(windows_per_row)
        rows = _rows_of_splits(first_window, first_window[-1])
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
            tokens = self._merge(_slices(symbols.values, starts, ends))
            change_over = self._change_over(tokens, starts, ends, rows, symbols)
            is_exact = tf.reduce_all(change_over != _NOWHERE)
            return is_exact, starts, ends, rows, change_over, tokens.values, tokens.row_splits

        nothing = tf.zeros([0], tf.int32), tf.zeros([1], tf.int64)
        _, starts, ends, rows, change_over, ids, splits = tf.while_loop(
            lambda is_exact, *_: ~is_exact,
            join_and_encode,
            (tf.constant(False), starts, ends, rows, starts, *nothing),
            shape_invariants=(tf.TensorShape([]), *[tf.TensorShape([None])] * 6),
        )
        tokens = tf.RaggedTensor.from_row_splits(ids, splits, validate=False)

        # Of each window, keep what lies between its change-over and the next window's.
        token_starts = self._token_starts(tokens, starts)
        window = _row_ids(tokens)
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
            _cumulative(_count(row_of_kept, row_count)),
            validate=False,
        )

    def _token_starts(self, tokens: tf.RaggedTensor, window_starts: tf.Tensor) -> tf.Tensor:
        """The position of the first symbol of each token, given that of each window."""
        symbols_before = _cumulative(tf.gather(self._token_lengths, tokens.values))
        before_window = tf.gather(symbols_before, tokens.row_splits[:-1])
        offset_of_window = window_starts - before_window
        return symbols_before[:-1] + tf.gather(offset_of_window, _row_ids(tokens))

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
        token_starts, window = self._token_starts(tokens, starts), _row_ids(tokens)
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
        is_common = (by_this_window == by_window_before) & (by_this_window != _NO_SYMBOL)
        common = tf.where(is_common)[:, 0]
        window_of_common = tf.searchsorted(starts, common, side="right", out_type=tf.int64) - 1
        first_common = tf.math.unsorted_segment_min(
            common, window_of_common, tf.size(starts, out_type=tf.int64)
        )
        return tf.where(is_first, starts, first_common)


# The bytes as tokenizer.json spells them: printable ones of Latin-1 by themselves, the others by
# the characters from U+0100 on, in turn.
def _byte_to_character() -> list[str]:
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_TO_CHARACTER = _byte_to_character()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


def _bytes_of(token: str) -> bytes:
    """The bytes a token stands for; one that is not spelled in bytes stands for itself."""
    if CHARACTER_TO_BYTE.keys() >= set(token):
        return bytes(CHARACTER_TO_BYTE[character] for character in token)
    return token.encode("utf-8")


def _pre_tokenizer_key(pre_tokenizer: dict | None) -> str:
    """The pre-tokenizer of a tokenizer.json, less what does not change the ids."""
    settings = dict(pre_tokenizer or {})
    if settings.get("type") == "ByteLevel":
        settings.pop("trim_offsets", None)  # Moves offsets only.
        settings.setdefault("use_regex", True)
    return json.dumps(settings, sort_keys=True)


def _gpt2_cuts() -> list[tuple[str, bytes]]:
    r"""GPT-2's pattern without its look-ahead, which RE2 does not have.

    `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`

    The look-ahead leaves the last of several whitespace characters to the word that follows. So
    the first rewrite cuts there, and the second one has only plain alternatives left.
    """
    letter, number, space = map(unicode_class, ("letter", "number", "space"))
    contractions = "'s|'t|'re|'ve|'m|'ll|'d"
    others = f"[^{space}{letter}{number}]"
    pieces = f"{contractions}| ?[{letter}]+| ?[{number}]+| ?{others}+|[{space}]+"
    return [
        (f"([{space}])([{space}][^{space}])", rb"\1" + SEPARATOR + rb"\2"),
        (pieces, rb"\0" + SEPARATOR),
    ]


# What cuts a text the way a pre-tokenizer does. One more kind of model is one more row.
PRE_TOKENIZERS: dict[str, Callable[[], list[tuple[str, bytes]]]] = {
    _pre_tokenizer_key({"type": "ByteLevel", "add_prefix_space": False}): _gpt2_cuts,
}


def _checked_merges(model: dict) -> list[tuple[str, str]]:
    """The merges of a BPE model, by rank; ValueError if merging many at once would not be exact."""
    merges = []
    for merge in model.get("merges") or []:
        # Older files hold "left right", newer ones ["left", "right"].
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        if len(pair) != 2:
            raise ValueError(f"A merge must be a pair of tokens. Received: {merge!r}")
        merges.append(pair)
    if len(set(merges)) < len(merges):
        raise ValueError(
            f"Merges must differ. Received: {len(merges)} merges, {len(set(merges))} different"
        )

    vocabulary = model.get("vocab") or {}
    last_rank_making = {}
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ValueError(
                    "The tokens of a merge must be in the vocabulary. Received: merge "
                    f"{(left, right)!r}, and no token {token!r}"
                )
        last_rank_making[left + right] = rank
    for rank, (left, right) in enumerate(merges):
        for token in (left, right):
            if last_rank_making.get(token, -1) >= rank:
                raise ValueError(
                    "A merge must come after the ones that make its tokens. Received: merge "
                    f"{(left, right)!r} at rank {rank}, and one that makes {token!r} at rank "
                    f"{last_rank_making[token]}"
                )
    return merges


# Array helpers. They stand in for tf.repeat and RaggedTensor.value_rowids, which build a mask of
# the size rows * longest row.


def _cumulative(lengths: tf.Tensor) -> tf.Tensor:
    """`[n]` lengths or flags -> `[n + 1]` int64 sums of those before."""
    return tf.concat([tf.zeros([1], tf.int64), tf.cumsum(tf.cast(lengths, tf.int64))], 0)


def _rows_of_splits(splits: tf.Tensor, value_count: tf.Tensor) -> tf.Tensor:
    """`[rows + 1]` splits -> `[values]` int64, the row of each value."""
    return tf.searchsorted(splits, tf.range(value_count), side="right", out_type=tf.int64) - 1


def _row_ids(ragged: tf.RaggedTensor) -> tf.Tensor:
    return _rows_of_splits(ragged.row_splits, tf.size(ragged.values, out_type=tf.int64))


def _slices(values: tf.Tensor, starts: tf.Tensor, ends: tf.Tensor) -> tf.RaggedTensor:
    """`[slices, None]`, the values from each start up to each end; slices may overlap."""
    splits = _cumulative(ends - starts)
    row = _rows_of_splits(splits, splits[-1])
    positions = tf.range(splits[-1]) + tf.gather(starts - splits[:-1], row)
    return tf.RaggedTensor.from_row_splits(tf.gather(values, positions), splits, validate=False)


def _count(rows: tf.Tensor, row_count: tf.Tensor) -> tf.Tensor:
    """How often each of the numbers below `row_count` is in `rows`."""
    return tf.math.unsorted_segment_sum(tf.ones_like(rows, tf.int64), rows, row_count)


def _one_each(values: tf.Tensor) -> tf.RaggedTensor:
    """`[n]` values -> `[n, 1]` ragged."""
    splits = tf.range(tf.size(values, out_type=tf.int64) + 1)
    return tf.RaggedTensor.from_row_splits(values, splits, validate=False)


def _interleave(
    first_rows: tf.Tensor, first: tf.RaggedTensor, second_rows: tf.Tensor, second: tf.RaggedTensor
) -> tf.RaggedTensor:
    """One ragged tensor: its rows `first_rows` are those of `first`, the others of `second`."""
    second_splits = second.row_splits[1:] + first.row_splits[-1]
    both = tf.RaggedTensor.from_row_splits(
        tf.concat([first.values, second.values], 0),
        tf.concat([first.row_splits, second_splits], 0),
        validate=False,
    )
    return tf.gather(both, tf.math.invert_permutation(tf.concat([first_rows, second_rows], 0)))


def _scatter(values: tf.Tensor, positions: tf.Tensor, mask: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """`[size]` with the masked values at their positions and _NO_SYMBOL elsewhere."""
    masked = tf.where(mask)[:, 0]
    return tf.tensor_scatter_nd_update(
        tf.fill([size], _NO_SYMBOL),
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
