"""SentencePiece's byte pair encoding, as of Llama 2, Mistral and Gemma, in TensorFlow core ops."""

import string
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from kerasllm.tokenizers.base import NOT_IN_TABLE, Tokenizer
from kerasllm.tokenizers.code_points import CodePoints
from kerasllm.tokenizers.json_fields import field
from kerasllm.tokenizers.marks import SEPARATOR
from kerasllm.tokenizers.merging import Merger, check_order, live_merges, read_merges
from kerasllm.tokenizers.metaspace import Metaspace
from kerasllm.tokenizers.normalizers import literal_pattern
from kerasllm.tokenizers.ragged import cumulative, interleave, one_each, row_ids, rows_of_splits

MARK = "\u2581"  # Stands for a space.

_BYTE_COUNT = 256
_NO_SYMBOL = -1


class SentencePieceBPETokenizer(Tokenizer):
    """Byte pair encoding of characters; one that is no token becomes its UTF-8 bytes or `<unk>`.

    Kudo and Richardson, "SentencePiece: A simple and language independent subword tokenizer and
    detokenizer for Neural Text Processing", 2018.
    """

    _supports = "BPE without a pre-tokenizer, with Metaspace, or with a Split on a String"

    @classmethod
    def _describes(cls, config: dict) -> bool:
        model = config["model"]
        is_bpe = model.get("type", "BPE" if "merges" in model else None) == "BPE"
        return is_bpe and Metaspace.describes(config.get("pre_tokenizer"))

    def _check_supported(self) -> None:
        model = self._config.model
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise ValueError(
                    f"`{option}` of a SentencePiece BPE model is not supported. "
                    f"Received: {option}={model[option]!r}"
                )

    # Tables

    def _build_tokenization(self) -> None:
        model, vocabulary = self._config.model, self._config.model_vocabulary
        self._metaspace = Metaspace(self._config.json.get("pre_tokenizer"))
        self._ignores_merges = field(model, "ignore_merges", bool, False)
        self._symbols = CharacterSymbols(
            vocabulary,
            byte_fallback=field(model, "byte_fallback", bool, False),
            unk_id=self._config.model_unk_id,
            fuse_unk=field(model, "fuse_unk", bool, False),
        )
        merges = read_merges(model)
        self._check_parts(merges)
        made = {left + right for left, right in merges}
        merges = live_merges(merges, vocabulary, {token: self._symbols.of(token) for token in made})
        check_order(merges)
        self._live_tokens = {left + right for left, right in merges}
        self._merger = Merger(merges, vocabulary, self.vocabulary_size)
        super()._build_tokenization()

    def _check_parts(self, merges: list[tuple[str, str]]) -> None:
        """What is merged must be spelled as the text is, or it is not known where a merge may be."""
        not_spelled = {*self._symbols.byte_tokens.values(), self.unk_token}
        for merge in merges:
            if not_spelled & {*merge}:
                raise ValueError(
                    "The tokens of a merge must not be a byte's or the unknown token. Received: merge "
                    f"{merge!r}"
                )

    def _piece_ids(self) -> dict[bytes, int]:
        vocabulary = self._config.model_vocabulary
        if not self._ignores_merges:
            characters = {token for token in vocabulary if len(token) == 1}
            vocabulary = {token: vocabulary[token] for token in self._live_tokens | characters}
        return {token.encode("utf-8"): token_id for token, token_id in vocabulary.items()}

    def _default_piece_id(self) -> int:
        return NOT_IN_TABLE

    # Text to pieces

    def _cuts(self) -> list[tuple[str, bytes]]:
        """More cuts than the pre-tokenizer's, where no merge leads across, to have more words known.

        Words are cut before their marks, and between characters of which no token has one beside the
        other: those that letters are merged with, and the rest.
        """
        may_drop_characters = self._config.model_unk_id is None and not self._symbols.byte_tokens
        if self._ignores_merges or may_drop_characters or MARK not in self._config.model_vocabulary:
            return []
        neighbours = {pair for token in self._live_tokens for pair in zip(token, token[1:], strict=False)}
        if any(after == MARK and before != MARK for before, after in neighbours):
            return []
        mark = literal_pattern(MARK)
        # A letter that is no token may have to be one unknown token with what is beside it.
        known_letters = {
            letter for letter in string.ascii_letters if letter in self._config.model_vocabulary
        }
        if not known_letters:
            return [(f"{mark}+", SEPARATOR + rb"\0")]
        with_letters = _connected(known_letters, {pair for pair in neighbours if MARK not in pair})
        letters = CodePoints.of(map(ord, with_letters)).pattern()
        return [(f"{mark}*[{letters}]+|{mark}*[^{letters}{mark}]+|{mark}+", rb"\0" + SEPARATOR)]

    def _mark_cuts(self, stretches: tf.Tensor, begins_text: tf.Tensor) -> tf.Tensor:
        return super()._mark_cuts(self._metaspace.mark_cuts(stretches, begins_text), begins_text)

    # Pieces to ids

    def _encode_pieces(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        ids = self._piece_table.lookup(pieces)
        known = tf.where(ids != NOT_IN_TABLE)[:, 0]
        unknown = tf.where(ids == NOT_IN_TABLE)[:, 0]

        def some_need_merging() -> tf.RaggedTensor:
            different_pieces, index = tf.unique(tf.gather(pieces, unknown))
            merged = self._merger.merge(self._symbols(different_pieces))
            return interleave(known, one_each(tf.gather(ids, known)), unknown, tf.gather(merged, index))

        return tf.cond(tf.size(unknown) > 0, some_need_merging, lambda: one_each(ids))


class CharacterSymbols(tf.Module):
    """The ids that a text's characters have before merging.

    Args:
        vocabulary: The tokens and their ids.
        byte_fallback: Whether a character that is no token becomes its UTF-8 bytes.
        unk_id: Id of what else is no token; None if that is dropped.
        fuse_unk: Whether several of these in a row are one.

    Attributes:
        byte_tokens: Byte -> token, if there is a fallback.
    """

    def __init__(self, vocabulary: dict[str, int], byte_fallback: bool, unk_id: int | None, fuse_unk: bool):
        super().__init__()
        self.byte_tokens = read_byte_tokens(vocabulary) if byte_fallback else {}
        self._byte_ids = None
        if self.byte_tokens:
            ids = {byte: vocabulary[token] for byte, token in self.byte_tokens.items()}
            self._byte_ids = np.array([ids.get(byte, _NO_SYMBOL) for byte in range(_BYTE_COUNT)], np.int32)
        self._unk_id, self._fuse_unk = unk_id, fuse_unk
        characters = sorted(
            (ord(token), token_id) for token, token_id in vocabulary.items() if len(token) == 1
        )
        # A code point after the last one, so that there is always an entry to look at.
        self._sorted_codes = np.array([*(code for code, _ in characters), 0x110000], np.int32)
        self._ids = np.array([*(token_id for _, token_id in characters), _NO_SYMBOL], np.int32)
        self._id_of_character = {chr(code): token_id for code, token_id in characters}

    def of(self, text: str) -> list[int]:
        """The symbols of one text, outside of the graph."""
        symbols = []
        after_unknown = False
        for character in text:
            token_id = self._id_of_character.get(character)
            is_unknown = token_id is None and self._byte_ids is None
            if token_id is not None:
                symbols.append(token_id)
            elif self._byte_ids is not None:
                symbols += [self._byte_ids[byte] for byte in character.encode("utf-8")]
            elif self._unk_id is not None and not (self._fuse_unk and after_unknown):
                symbols.append(self._unk_id)
            after_unknown = is_unknown
        return symbols

    def __call__(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """`[texts]` strings -> `[texts, None]` int32 symbols."""
        codes = tf.strings.unicode_decode(texts, "UTF-8")
        place = tf.searchsorted(self._sorted_codes, codes.values)
        is_token = tf.gather(self._sorted_codes, place) == codes.values
        symbols = codes.with_values(tf.gather(self._ids, place))

        def with_others() -> tf.RaggedTensor:
            if self._byte_ids is not None:
                return self._with_bytes(symbols, is_token, codes.values)
            return self._with_unk(symbols, is_token)

        return tf.cond(tf.reduce_all(is_token), lambda: symbols, with_others)

    def _with_bytes(
        self, symbols: tf.RaggedTensor, is_token: tf.Tensor, codes: tf.Tensor
    ) -> tf.RaggedTensor:
        """Puts the bytes of its UTF-8 form for each character that is no token."""
        byte_counts = 1 + sum(tf.cast(codes >= first, tf.int64) for first in (0x80, 0x800, 0x10000))
        counts = tf.where(is_token, tf.constant(1, tf.int64), byte_counts)
        splits = cumulative(counts)
        source = rows_of_splits(splits, splits[-1])
        code, byte_count = tf.gather(codes, source), tf.cast(tf.gather(byte_counts, source), tf.int32)
        place = tf.cast(tf.range(splits[-1]) - tf.gather(splits, source), tf.int32)
        # Each byte after this one holds six bits of the code point; the first also says how many come.
        bits = tf.bitwise.right_shift(code, 6 * tf.maximum(byte_count - 1 - place, 0))
        first = tf.where(byte_count == 1, bits, 0x100 - tf.bitwise.right_shift(0x100, byte_count) + bits)
        byte = tf.where(place == 0, first, 0x80 + bits % 0x40)
        values = tf.where(
            tf.gather(is_token, source),
            tf.gather(symbols.values, source),
            tf.gather(self._byte_ids, byte % _BYTE_COUNT),
        )
        return tf.RaggedTensor.from_row_splits(
            values, tf.gather(splits, symbols.row_splits), validate=False
        )

    def _with_unk(self, symbols: tf.RaggedTensor, is_token: tf.Tensor) -> tf.RaggedTensor:
        """Puts the unknown token for characters that are no token, or leaves them out."""
        if self._unk_id is None:
            keep = is_token
        elif self._fuse_unk:
            row = row_ids(symbols)
            goes_on = ~is_token[1:] & ~is_token[:-1] & (row[1:] == row[:-1])
            keep = tf.concat([[True], ~goes_on], 0)[: tf.size(is_token)]
        else:
            keep = tf.ones_like(is_token)
        values = (
            symbols.values if self._unk_id is None else tf.where(is_token, symbols.values, self._unk_id)
        )
        return tf.RaggedTensor.from_row_splits(
            tf.gather(values, tf.where(keep)[:, 0]),
            tf.gather(cumulative(keep), symbols.row_splits),
            validate=False,
        )


def _connected(characters: set[str], neighbours: Iterable[tuple[str, str]]) -> set[str]:
    """The characters, and all that are neighbours of them, and so on."""
    beside = defaultdict(set)
    for one, other in neighbours:
        beside[one].add(other)
        beside[other].add(one)
    connected, to_visit = set(), characters
    while to_visit:
        connected |= to_visit
        to_visit = {other for one in to_visit for other in beside[one]} - connected
    return connected


def read_byte_tokens(vocabulary: dict[str, int]) -> dict[int, str]:
    """The tokens of the bytes; none if the vocabulary has none of them.

    Raises:
        ValueError: If it has some only, and others are needed.
    """
    tokens = {byte: f"<0x{byte:02X}>" for byte in range(_BYTE_COUNT)}
    present = {byte: token for byte, token in tokens.items() if token in vocabulary}
    # ASCII bytes are needed for their own characters only, and some bytes are not in UTF-8 at all.
    needed = {byte for byte in range(0x80) if chr(byte) not in vocabulary} | {*range(0x80, 0xF5)} - {
        0xC0,
        0xC1,
    }
    if present and not needed <= present.keys():
        # `tokenizers` then puts the unknown tokens of a text in another order than its characters.
        raise ValueError(
            "A vocabulary with byte fallback must have a token for each byte or for none. "
            f"Received: no tokens for the bytes {sorted(needed - present.keys())[:10]}"
        )
    return present
