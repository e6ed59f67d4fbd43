"""WordPiece, as of BERT, in TensorFlow core ops."""

import json
import reprlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from kerasllm.tokenizers.base import NOT_IN_TABLE, Tokenizer
from kerasllm.tokenizers.code_points import CodePoints
from kerasllm.tokenizers.json_fields import field, spelling
from kerasllm.tokenizers.ragged import count, cumulative, empty_like, interleave, one_each, row_ids
from kerasllm.tokenizers.trie import Trie

_PER_LENGTH = 1 << 32  # More than any id.

_PRE_TOKENIZER = {"type": "BertPreTokenizer"}

_PLAIN_OPTIONS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

# The tokens of a BERT, as tokenizer_config.json names them.
_NAMED_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


class WordPieceTokenizer(Tokenizer):
    """The longest token that a word begins with, then the longest that the rest begins with.

    A word whose parts are not all in the vocabulary is `[UNK]`. Schuster and Nakajima, "Japanese
    and Korean Voice Search", 2012; Devlin et al., "BERT", 2019.
    """

    _supports = "WordPiece with the pre-tokenizer BertPreTokenizer"
    _piece_separator = b" "

    @classmethod
    def _describes(cls, config: dict) -> bool:
        return config["model"].get("type") == "WordPiece" and config.get("pre_tokenizer") == _PRE_TOKENIZER

    def _check_supported(self) -> None:
        model = self._config.model
        if self._config.model_unk_id is None:
            raise ValueError("A WordPiece model must have an `unk_token` that is in its vocabulary.")
        self._continuing_prefix = field(model, "continuing_subword_prefix", str, "##")
        self._longest_word = field(model, "max_input_chars_per_word", int, 100)
        if not 0 <= self._longest_word <= tf.int32.max:
            raise ValueError(
                f"`max_input_chars_per_word` must be from 0 to {tf.int32.max}. "
                f"Received: {reprlib.repr(self._longest_word)}"
            )

    # Text to pieces

    def _cuts(self) -> list[tuple[str, bytes]]:
        punctuation = CodePoints.named("bert_punctuation").pattern()
        other_whitespace = (CodePoints.named("whitespace") - CodePoints.of([ord(" ")])).pattern()
        cuts = [(f"[{punctuation}]", rb" \0 ")]
        normalizer = self._config.json.get("normalizer")
        if isinstance(normalizer, dict) and normalizer.get("type") == "BertNormalizer":
            if normalizer.get("clean_text"):
                return cuts  # There is no other whitespace.
        return [*cuts, (f"[{other_whitespace}]+", b" ")]

    # Pieces to ids

    def _default_piece_id(self) -> int:
        return NOT_IN_TABLE

    def _build_tokenization(self) -> None:
        vocabulary = self._config.model_vocabulary
        self._trie = Trie((token, token_id) for token, token_id in vocabulary.items() if token)
        self._continuing_node = self._trie.node_of(self._continuing_prefix)
        super()._build_tokenization()

    def _piece_ids(self) -> dict[bytes, int]:
        return {
            token.encode("utf-8"): token_id
            for token, token_id in self._config.model_vocabulary.items()
            if len(token) <= self._longest_word
        }

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
        """`[words]` strings that are no token -> `[words, None]` int32 ids."""
        is_short = tf.strings.length(words, unit="UTF8_CHAR") <= self._longest_word
        codes = tf.strings.unicode_decode(tf.where(is_short, words, ""), "UTF-8")
        starts_of_words, ends_of_words = codes.row_splits[:-1], codes.row_splits[1:]
        longest_matches = self._longest_matches(codes)

        def next_token(words_left, places, done_words, done_ids):
            match = tf.gather(longest_matches, places)
            done_words = tf.concat([done_words, words_left], 0)
            done_ids = tf.concat([done_ids, tf.where(match < 0, NOT_IN_TABLE, _id_of(match))], 0)
            places += match // _PER_LENGTH
            going_on = (match >= 0) & (places < tf.gather(ends_of_words, words_left))
            going_on = tf.where(going_on)[:, 0]
            return tf.gather(words_left, going_on), tf.gather(places, going_on), done_words, done_ids

        not_empty = tf.where(starts_of_words < ends_of_words)[:, 0]
        _, _, done_words, done_ids = tf.while_loop(
            lambda words_left, *_: tf.size(words_left) > 0,
            next_token,
            (
                not_empty,
                tf.gather(starts_of_words, not_empty),
                empty_like(not_empty, tf.int64),
                empty_like(not_empty, tf.int32),
            ),
            shape_invariants=(tf.TensorShape([None]),) * 4,
        )

        # A word with a part that is no token is unknown as a whole, and so is one that is too long.
        word_count = tf.size(words, out_type=tf.int64)
        failed = tf.math.unsorted_segment_min(done_ids, done_words, word_count) == NOT_IN_TABLE
        is_unknown = failed | ~is_short
        by_word = tf.argsort(done_words, stable=True)
        by_word = tf.boolean_mask(by_word, ~tf.gather(failed, tf.gather(done_words, by_word)))
        known, unknown = tf.where(~is_unknown)[:, 0], tf.where(is_unknown)[:, 0]
        counts = tf.gather(count(tf.gather(done_words, by_word), word_count), known)
        encoded = tf.RaggedTensor.from_row_splits(
            tf.gather(done_ids, by_word), cumulative(counts), validate=False
        )
        return interleave(
            known, encoded, unknown, one_each(tf.fill(tf.shape(unknown), self._config.model_unk_id))
        )

    def _longest_matches(self, codes: tf.RaggedTensor) -> tf.Tensor:
        """For each code point, the longest token that begins there.

        Args:
            codes: `[words, None]` int32.

        Returns:
            `[places]` int64, the length of the token in characters above its id; negative if none.
        """
        place_count = tf.size(codes.values, out_type=tf.int64)
        begins_word = tf.range(place_count) == tf.gather(codes.row_splits, row_ids(codes))
        nodes = tf.where(begins_word, tf.constant(Trie.root, tf.int64), self._continuing_node)
        starts, lengths, ids = self._trie.matches(codes, nodes)
        matches = lengths * _PER_LENGTH + tf.cast(ids, tf.int64)
        return tf.math.unsorted_segment_max(matches, starts, place_count)


def _id_of(match: tf.Tensor) -> tf.Tensor:
    return tf.cast(match % _PER_LENGTH, tf.int32)


def json_from_vocab(tokens: Sequence[str], settings: dict[str, Any]) -> str:
    """Makes the tokenizer.json of a BERT from the lines of its vocab.txt.

    Args:
        tokens: The tokens, in the order of their ids.
        settings: Contents of tokenizer_config.json: `do_lower_case`, `tokenize_chinese_chars`,
            `strip_accents` and the special tokens. What transformers takes for a special token that
            is not named is added, if the vocabulary has it.

    Returns:
        The text of a tokenizer.json, as transformers makes it.

    Raises:
        ValueError: If a setting is of the wrong type, or a token is missing or there twice.
    """
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        repeated = [token for token, times in Counter(tokens).items() if times > 1]
        raise ValueError(f"The tokens of vocab.txt must differ. Received: several of {repeated[:5]}")
    for name, token in _NAMED_TOKENS.items():
        if token in ids:
            settings.setdefault(name, token)
    named = {name: spelling(settings, name) for name in _NAMED_TOKENS}
    missing = [name for name in ("unk_token", "sep_token", "cls_token") if named[name] not in ids]
    if missing:
        raise ValueError(f"vocab.txt must hold {missing}. Received: special tokens {named}")
    special = sorted({token for token in named.values() if token in ids}, key=ids.get)
    cls, sep = ({"SpecialToken": {"id": named[name], "type_id": 0}} for name in ("cls_token", "sep_token"))
    first, second = ({"Sequence": {"id": text, "type_id": i}} for i, text in enumerate("AB"))
    last_sep = {"SpecialToken": {"id": named["sep_token"], "type_id": 1}}
    config = {
        "version": "1.0",
        "added_tokens": [
            {"id": ids[token], "content": token, "special": True} | _PLAIN_OPTIONS for token in special
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": field(settings, "tokenize_chinese_chars", bool, True),
            "strip_accents": settings.get("strip_accents"),
            "lowercase": field(settings, "do_lower_case", bool, True),
        },
        "pre_tokenizer": _PRE_TOKENIZER,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [cls, first, sep],
            "pair": [cls, first, sep, second, last_sep],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]}
                for token in (named["cls_token"], named["sep_token"])
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": named["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }
    return json.dumps(config, ensure_ascii=False)
