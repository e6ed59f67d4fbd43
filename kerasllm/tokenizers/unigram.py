"""SentencePiece's unigram language model, as of T5, XLM-R and ALBERT, in TensorFlow core ops."""

import json
import math
import reprlib

import tensorflow as tf

from kerasllm.tokenizers.base import NOT_IN_TABLE, Tokenizer
from kerasllm.tokenizers.json_fields import field
from kerasllm.tokenizers.metaspace import Metaspace
from kerasllm.tokenizers.ragged import (
    count,
    cumulative,
    interleave,
    one_each,
    row_ids,
    rows_of_splits,
    slices,
)
from kerasllm.tokenizers.trie import Trie

# An unknown character counts as a token so much less likely than the least likely one.
_UNK_PENALTY = 10.0

_BYTE_COUNT = 256
_TOKENS_AT_ONCE = 20_000
_LARGEST_U64 = (1 << 64) - 1


class UnigramTokenizer(Tokenizer):
    """The most likely way to cut a word into tokens, each with a probability of its own.

    Kudo, "Subword Regularization: Improving Neural Network Translation Models with Multiple Subword
    Candidates", 2018. Where two ways are equally likely, the `tokenizers` library and the
    sentencepiece package may choose differently; here it is as in the former.
    """

    _supports = "Unigram without a pre-tokenizer, or with Metaspace, alone or after WhitespaceSplit"

    @classmethod
    def _describes(cls, config: dict) -> bool:
        return config["model"].get("type") == "Unigram" and Metaspace.describes(config.get("pre_tokenizer"))

    @staticmethod
    def _read_vocabulary(model: dict) -> dict[str, int]:
        vocabulary = {}
        for entry in field(model, "vocab", list):
            is_pair = isinstance(entry, list) and len(entry) == 2
            if not is_pair or not isinstance(entry[0], str) or not isinstance(entry[1], int | float):
                raise ValueError(
                    "`vocab` of a Unigram model must hold pairs of a token and its score. "
                    f"Received: {reprlib.repr(entry)}"
                )
            token, score = entry
            if token == "" or token in vocabulary or not _is_finite(score):
                raise ValueError(
                    "The tokens of a Unigram model must differ and not be empty, and have finite scores. "
                    f"Received: {reprlib.repr(entry)}"
                )
            vocabulary[token] = len(vocabulary)
        return vocabulary

    def _check_supported(self) -> None:
        unk_id = field(self._config.model, "unk_id", int)
        if not 0 <= unk_id < len(self._config.model_vocabulary):
            raise ValueError(f"`unk_id` of a Unigram model must be the id of a token. Received: {unk_id}")

    # Tables

    def _build_tokenization(self) -> None:
        vocabulary = self._config.model_vocabulary
        self._metaspace = Metaspace(self._config.json.get("pre_tokenizer"))
        self._unk_id = self._config.model["unk_id"]
        scores = _scores_as_read_by_serde(self._config.json_text)
        self._scores = tf.constant(scores, tf.float64)
        self._unk_score = min(scores) - _UNK_PENALTY
        self._longest_token = max(map(len, vocabulary))
        self._trie = Trie(vocabulary.items())
        self._byte_ids = None
        if field(self._config.model, "byte_fallback", bool, False):
            ids = [vocabulary.get(f"<0x{byte:02X}>", NOT_IN_TABLE) for byte in range(_BYTE_COUNT)]
            self._byte_ids = tf.constant(ids, tf.int32)
        self._unknown_tokens = self._table_of_unknown_tokens()
        super()._build_tokenization()

    def _table_of_unknown_tokens(self) -> tf.lookup.StaticHashTable:
        """The tokens that unknown characters, put together, may be."""
        vocabulary = self._config.model_vocabulary
        unk_token = self._config.tokens[self._unk_id]
        table = {
            token: token_id
            for token, token_id in vocabulary.items()
            if not any(character in vocabulary for character in token.replace(unk_token, ""))
        }
        return tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                tf.constant([token.encode("utf-8") for token in table]),
                tf.constant(list(table.values()), tf.int32),
            ),
            NOT_IN_TABLE,
        )

    def _piece_ids(self) -> dict[bytes, int]:
        """The tokens that are the most likely way to write themselves."""
        table = {}
        tokens = list(self._config.model_vocabulary.items())
        for first in range(0, len(tokens), _TOKENS_AT_ONCE):
            chunk = tokens[first : first + _TOKENS_AT_ONCE]
            encoded = self._encode_words(tf.constant([token.encode("utf-8") for token, _ in chunk]))
            is_whole = (encoded.row_lengths() == 1).numpy()
            first_ids = tf.gather(encoded.values, encoded.row_splits[:-1]).numpy()
            for (token, token_id), whole, first_id in zip(chunk, is_whole, first_ids, strict=True):
                if whole and first_id == token_id:
                    table[token.encode("utf-8")] = token_id
        return table

    def _default_piece_id(self) -> int:
        return NOT_IN_TABLE

    # Text to pieces

    def _cuts(self) -> list[tuple[str, bytes]]:
        return []

    def _mark_cuts(self, stretches: tf.Tensor, begins_text: tf.Tensor) -> tf.Tensor:
        return self._metaspace.mark_cuts(stretches, begins_text)

    # Pieces to ids

    def _encode_pieces(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        ids = self._piece_table.lookup(pieces)
        known = tf.where(ids != NOT_IN_TABLE)[:, 0]
        unknown = tf.where(ids == NOT_IN_TABLE)[:, 0]

        def some_are_no_token() -> tf.RaggedTensor:
            words, index = tf.unique(tf.gather(pieces, unknown))
            encoded = tf.gather(self._encode_words(words), index)
            return interleave(known, one_each(tf.gather(ids, known)), unknown, encoded)

        return tf.cond(tf.size(unknown) > 0, some_are_no_token, lambda: one_each(ids))

    def _encode_words(self, words: tf.Tensor) -> tf.RaggedTensor:
        """`[words]` strings, none empty -> `[words, None]` int32 ids."""
        codes = tf.strings.unicode_decode(words, "UTF-8")
        starts, ends, ids = self._most_likely(codes)
        row = row_ids(codes)
        word_of_token = tf.gather(row, starts)

        # Unknown tokens in a row are one.
        is_unk = ids == self._unk_id
        goes_on = is_unk[1:] & is_unk[:-1] & (word_of_token[1:] == word_of_token[:-1])
        first = tf.where(tf.concat([[True], ~goes_on], 0)[: tf.size(ids)])[:, 0]
        last = tf.where(tf.concat([~goes_on, [True]], 0)[-tf.size(ids) :])[:, 0]
        starts, ends = tf.gather(starts, first), tf.gather(ends, last)
        ids, word_of_token = tf.gather(ids, first), tf.gather(word_of_token, first)
        known, unknown = (tf.where(flags)[:, 0] for flags in (ids != self._unk_id, ids == self._unk_id))

        def with_unknown() -> tf.RaggedTensor:
            spelled = slices(codes.values, tf.gather(starts, unknown), tf.gather(ends, unknown))
            unknown_ids = self._unknown_ids(tf.strings.unicode_encode(spelled, "UTF-8"))
            return interleave(known, one_each(tf.gather(ids, known)), unknown, unknown_ids)

        tokens = tf.cond(tf.size(unknown) > 0, with_unknown, lambda: one_each(ids))
        word_splits = cumulative(count(word_of_token, tf.size(words, out_type=tf.int64)))
        return tf.RaggedTensor.from_row_splits(
            tokens.values, tf.gather(tokens.row_splits, word_splits), validate=False
        )

    def _unknown_ids(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """`[texts]` strings of unknown characters -> `[texts, None]` int32 ids."""
        ids = self._unknown_tokens.lookup(texts)
        if self._byte_ids is None:
            return one_each(tf.where(ids == NOT_IN_TABLE, self._unk_id, ids))
        every_byte = tf.io.decode_raw(tf.strings.reduce_join(texts), tf.uint8)
        byte_ids = tf.gather(self._byte_ids, tf.cast(every_byte, tf.int32))
        byte_ids = tf.RaggedTensor.from_row_splits(
            byte_ids, cumulative(tf.strings.length(texts)), validate=False
        )
        # A text with a byte that has no token stays unknown as a whole.
        least = tf.math.unsorted_segment_min(byte_ids.values, row_ids(byte_ids), tf.size(texts))
        becomes_bytes = (ids == NOT_IN_TABLE) & (least != NOT_IN_TABLE)
        as_bytes, as_one = tf.where(becomes_bytes)[:, 0], tf.where(~becomes_bytes)[:, 0]
        ids = tf.where(ids == NOT_IN_TABLE, self._unk_id, ids)
        return interleave(as_one, one_each(tf.gather(ids, as_one)), as_bytes, tf.gather(byte_ids, as_bytes))

    def _most_likely(self, codes: tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Cuts each row into tokens: Viterbi, "Error bounds for convolutional codes", 1967.

        The scores are added up in the order and precision of the `tokenizers` library, so that two
        ways are as likely here if and only if they are there; then the longest last token wins.

        Args:
            codes: `[words, None]` int32 code points.

        Returns:
            `[tokens]` int64 places in `codes.values` where tokens start, and where they end; and
            `[tokens]` int32 ids, in the order of the text.
        """
        starts, ends, ids, scores = self._candidates(codes)
        nodes, column_splits = _nodes_by_column(codes)
        row_of_candidate = tf.gather(row_ids(codes), starts)
        from_node = tf.gather(nodes, starts + row_of_candidate)
        to_node = tf.gather(nodes, ends + row_of_candidate)
        node_count = tf.size(nodes, out_type=tf.int64)

        # By the node they lead to; of those that lead to one node, the longest first.
        order = tf.argsort(to_node * node_count + from_node)
        from_node, to_node, scores = (tf.gather(values, order) for values in (from_node, to_node, scores))
        candidate_splits = tf.searchsorted(to_node, column_splits, out_type=tf.int64)
        last_column = tf.reduce_max(codes.row_lengths())

        def next_column(column, first_node, node_scores, best_candidates):
            first, end = candidate_splits[column], candidate_splits[column + 1]
            sums = scores[first:end] + tf.gather(node_scores, from_node[first:end] - first_node)
            node = to_node[first:end] - column_splits[column]
            best_sums = tf.math.segment_max(sums, node)
            best = tf.where(sums == tf.gather(best_sums, node))[:, 0]
            first_of_best = tf.math.segment_min(best, tf.gather(node, best)) + first
            best_candidates = best_candidates.write(tf.cast(column - 1, tf.int32), first_of_best)
            # No token reaches further back.
            next_first_node = column_splits[tf.maximum(column + 1 - self._longest_token, 0)]
            node_scores = tf.concat([node_scores, best_sums], 0)[next_first_node - first_node :]
            return column + 1, next_first_node, node_scores, best_candidates

        zero, one = tf.constant(0, tf.int64), tf.constant(1, tf.int64)
        columns = tf.TensorArray(
            tf.int64, tf.cast(last_column, tf.int32), element_shape=[None], infer_shape=False
        )
        _, _, _, columns = tf.while_loop(
            lambda column, *_: column <= last_column,
            next_column,
            (one, zero, tf.zeros([column_splits[1]], tf.float64), columns),
            shape_invariants=(*[tf.TensorShape([])] * 2, tf.TensorShape([None]), tf.TensorShape(None)),
        )
        candidates = columns.concat()  # Of each node but those of the first column.
        token_ends = _on_path(
            last_nodes=tf.gather(nodes, codes.row_splits[1:] + tf.range(column_splits[1])),
            before=tf.concat([tf.range(column_splits[1]), tf.gather(from_node, candidates)], 0),
        )
        chosen = tf.gather(order, tf.gather(candidates, token_ends - column_splits[1]))
        chosen = tf.gather(chosen, tf.argsort(tf.gather(starts, chosen)))
        return tf.gather(starts, chosen), tf.gather(ends, chosen), tf.gather(ids, chosen)

    def _candidates(self, codes: tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Every token at every place, and the unknown one where a character is none.

        Returns:
            `[candidates]` int64 places of their starts and ends, int32 ids, float64 scores.
        """
        place_count = tf.size(codes.values, out_type=tf.int64)
        roots = tf.fill([place_count], tf.constant(Trie.root, tf.int64))
        starts, lengths, ids = self._trie.matches(codes, roots)
        is_known = tf.math.unsorted_segment_max(tf.cast(lengths == 1, tf.int32), starts, place_count) == 1
        unknown = tf.where(~is_known)[:, 0]
        scores = tf.gather(self._scores, ids)
        return (
            tf.concat([starts, unknown], 0),
            tf.concat([starts + lengths, unknown + 1], 0),
            tf.concat([ids, tf.fill(tf.shape(unknown), self._unk_id)], 0),
            tf.concat([scores, tf.fill(tf.shape(unknown), tf.constant(self._unk_score, tf.float64))], 0),
        )


def _nodes_by_column(codes: tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Numbers the places between the code points, those before and after a row included.

    Returns:
        `[places]` int64, the numbers, in the order of the text: first come those at the beginnings of
        the rows, then those one code point on, and so on; and where in the numbers each of these
        columns begins, with an end.
    """
    row_count = tf.size(codes.row_splits, out_type=tf.int64) - 1
    row_splits = codes.row_splits + tf.range(row_count + 1)
    row = rows_of_splits(row_splits, row_splits[-1])
    column = tf.range(row_splits[-1]) - tf.gather(row_splits, row)
    by_column = tf.argsort(column, stable=True)
    column_splits = tf.searchsorted(
        tf.gather(column, by_column), tf.range(tf.reduce_max(column) + 2), out_type=tf.int64
    )
    return tf.cast(tf.math.invert_permutation(by_column), tf.int64), column_splits


def _on_path(last_nodes: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
    """The nodes on the ways back from some, without those where the ways begin, in order.

    Each step goes twice as far back as the one before, from all nodes found so far.

    Args:
        last_nodes: `[rows]` int64.
        before: `[nodes]` int64, the node before each; one where a way begins is before itself.
    """
    flags = tf.zeros(tf.shape(before), tf.bool)

    def marked(flags: tf.Tensor, nodes: tf.Tensor) -> tf.Tensor:
        return tf.tensor_scatter_nd_update(flags, nodes[:, tf.newaxis], tf.ones_like(nodes, tf.bool))

    def step(grows, on_path, far_before):
        more = marked(on_path, tf.gather(far_before, tf.where(on_path)[:, 0]))
        return tf.reduce_any(more != on_path), more, tf.gather(far_before, far_before)

    _, on_path, _ = tf.while_loop(
        lambda grows, *_: grows, step, (tf.constant(True), marked(flags, last_nodes), before)
    )
    is_beginning = before == tf.range(tf.size(before, out_type=tf.int64))
    return tf.where(on_path & ~is_beginning)[:, 0]


def _is_finite(score: int | float) -> bool:
    try:
        return not isinstance(score, bool) and math.isfinite(score)
    except OverflowError:  # An integer beyond all floats.
        return False


def _scores_as_read_by_serde(json_text: str) -> list[float]:
    """The scores of a Unigram model as the `tokenizers` library has them after reading the file."""
    config = json.loads(json_text, parse_float=_float_of_serde)
    return [float(score) for _, score in config["model"]["vocab"]]


def _float_of_serde(literal: str) -> float:
    """Parses a JSON number as serde_json does, which is off by one in the last place now and then.

    It takes as many digits as fit into 64 bits, and multiplies or divides by a power of ten.
    """
    mantissa, _, exponent_digits = literal.lower().partition("e")
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    exponent = int(exponent_digits or 0)
    significand, is_full = 0, False
    for position, digit in enumerate(whole + fraction):
        larger = significand * 10 + int(digit)
        is_full |= larger > _LARGEST_U64
        if not is_full:
            significand = larger
        # Every digit after the point that counts makes the exponent smaller; one before it that does
        # not count any more makes it larger.
        exponent += is_full * (position < len(whole)) - (not is_full) * (position >= len(whole))
    value = float(significand)
    while abs(exponent) > 308 and value:
        if exponent > 0:
            return math.inf  # `tokenizers` refuses the file.
        value /= 1e308
        exponent += 308
    power = float(f"1e{abs(exponent)}")  # Nearest; 10.0**23 is not.
    value = value * power if exponent >= 0 else value / power
    return -value if literal.startswith("-") else value
