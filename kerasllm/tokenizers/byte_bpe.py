"""Byte-level byte pair encoding, as of GPT-2, in TensorFlow core ops."""

import tensorflow as tf

from kerasllm.tokenizers.base import NOT_IN_TABLE, Tokenizer
from kerasllm.tokenizers.decoding import BYTE_TO_CHARACTER, CHARACTER_TO_BYTE, bytes_of_byte_level
from kerasllm.tokenizers.json_fields import field, steps
from kerasllm.tokenizers.merging import NO_SYMBOL, Merger, checked_merges
from kerasllm.tokenizers.pre_tokenization import byte_level_rewrites
from kerasllm.tokenizers.ragged import cumulative, interleave, one_each


class ByteBPETokenizer(Tokenizer):
    """Byte-level BPE: nothing is unknown, and decoding gives every text back.

    Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), 2019; Sennrich
    et al., "Neural Machine Translation of Rare Words with Subword Units", 2016.
    """

    _supports = "BPE with a pre-tokenizer ByteLevel, alone or after Split and Digits"

    @classmethod
    def _describes(cls, config: dict) -> bool:
        model = config["model"]
        # The oldest files name no type.
        is_bpe = model.get("type", "BPE" if "merges" in model else None) == "BPE"
        kinds = [step["type"] for step in steps(config.get("pre_tokenizer"), "pretokenizers")]
        return is_bpe and "ByteLevel" in kinds

    def _cuts(self) -> list[tuple[str, bytes]]:
        return byte_level_rewrites(self._config.json["pre_tokenizer"])

    def _check_supported(self) -> None:
        model = self._config.model
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(option):
                raise ValueError(
                    f"`{option}` of a byte-level BPE model is not supported. "
                    f"Received: {option}={model[option]!r}"
                )
        missing = [byte for byte in BYTE_TO_CHARACTER if byte not in self._config.model_vocabulary]
        if missing and model.get("unk_token") is not None:
            raise ValueError(
                "A byte-level BPE model with an `unk_token` must have a token for each byte. "
                f"Received: unk_token={model['unk_token']!r}, and no tokens {missing}"
            )

    # Tables

    def _build_tokenization(self) -> None:
        vocabulary = self._config.model_vocabulary
        self._symbol_of_byte = tf.constant(
            [vocabulary.get(character, NO_SYMBOL) for character in BYTE_TO_CHARACTER], tf.int32
        )
        # A byte without a token is dropped before merging, as `tokenizers` does.
        self._every_byte_has_a_symbol = set(BYTE_TO_CHARACTER) <= vocabulary.keys()
        self._merger = Merger(checked_merges(self._config.model), vocabulary, self.vocabulary_size)
        super()._build_tokenization()

    def _piece_ids(self) -> dict[bytes, int]:
        """The tokens that merging their own bytes leads to: most pieces of a text are one.

        Others exist: a special token, or one whose parts are merged differently. Whether a token
        is among them is found by encoding it.
        """
        vocabulary = self._config.model_vocabulary
        candidates = {
            bytes_of_byte_level(token): token_id
            for token, token_id in vocabulary.items()
            if token and CHARACTER_TO_BYTE.keys() >= set(token)
        }
        # Llama 3 has words that merging does not lead to, and looks them up first.
        if field(self._config.model, "ignore_merges", bool, False):
            return candidates
        encoded = self._merge_pieces(tf.constant(list(candidates), tf.string)).to_list()
        return {
            piece: token_id
            for (piece, token_id), ids in zip(candidates.items(), encoded, strict=True)
            if ids == [token_id]
        }

    def _default_piece_id(self) -> int:
        return NOT_IN_TABLE

    # Pieces to ids. All pieces of a batch are worked on at once, in flat arrays.

    def _encode_pieces(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        """`[pieces]` strings -> `[pieces, None]` int32 ids."""
        ids = self._piece_table.lookup(pieces)
        known = tf.where(ids != NOT_IN_TABLE)[:, 0]
        unknown = tf.where(ids == NOT_IN_TABLE)[:, 0]

        def some_need_merging() -> tf.RaggedTensor:
            different_pieces, index = tf.unique(tf.gather(pieces, unknown))
            merged = tf.gather(self._merge_pieces(different_pieces), index)
            return interleave(known, one_each(tf.gather(ids, known)), unknown, merged)

        return tf.cond(tf.size(unknown) > 0, some_need_merging, lambda: one_each(ids))

    def _merge_pieces(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        """`[pieces]` strings, any length -> `[pieces, None]` int32 ids."""
        return self._merger.merge(self._symbols(pieces))

    def _symbols(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        """`[pieces]` strings -> `[pieces, None]` int32, the ids of their bytes."""
        every_byte = tf.io.decode_raw(tf.strings.reduce_join(pieces), tf.uint8)
        symbols = tf.gather(self._symbol_of_byte, tf.cast(every_byte, tf.int32))
        splits = cumulative(tf.strings.length(pieces))
        if self._every_byte_has_a_symbol:
            return tf.RaggedTensor.from_row_splits(symbols, splits, validate=False)
        exists = symbols != NO_SYMBOL
        existing = tf.gather(symbols, tf.where(exists)[:, 0])
        splits = tf.gather(cumulative(exists), splits)
        return tf.RaggedTensor.from_row_splits(existing, splits, validate=False)
