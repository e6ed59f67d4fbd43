"""Text to ids and back inside the TensorFlow graph, equal to a Hugging Face tokenizer."""

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import tensorflow as tf

from kerasllm.files import write_json, write_text

DEFAULT_EOS_TOKEN = "<|endoftext|>"

# Neither byte occurs in valid UTF-8, so both can mark places in a text.
SEPARATOR = b"\xff"
SPECIAL_MARK = b"\xfe"

_VALID_UTF8 = r"[\x{0}-\x{d7ff}\x{e000}-\x{10ffff}]*"
NOT_IN_TABLE = -1


class Tokenizer(tf.Module):
    """Text to ids and back inside the TensorFlow graph; ids equal to its Hugging Face tokenizer.

    A text is cut into pieces by regular expressions that TensorFlow and the `tokenizers` library
    read alike; a subclass says how (`_cuts`) and what ids a piece has (`_encode_pieces`). Only
    TensorFlow core ops are used, so a SavedModel with a tokenizer inside runs in every runtime.

    Make one with `Tokenizer.from_json`, `Tokenizer.from_folder` or `train_tokenizer`.

    Args:
        json_text: Contents of a tokenizer.json of the subclass's kind.
        eos_token: The token that ends a text, see `from_json`.

    Attributes:
        vocabulary_size: Number of ids, special tokens included; ids are 0 to this minus 1.
        special_tokens: The special tokens and their ids.
        eos_token: The token that ends a text, or None; `eos_id` is its id.
        unk_id: Id of what the vocabulary lacks, or None where nothing can be lacking.
    """

    def __init__(self, json_text: str, eos_token: str | None = None):
        super().__init__()
        # Plain objects stay out of TensorFlow's object tracking: a tracked list of 50,000 strings
        # is slow, and a tracked tf.function would be written into every SavedModel.
        self._config = _TokenizerConfig(json_text, eos_token)
        self._check_supported()
        self._graph_functions = _GraphFunctions(self)
        with tf.init_scope(), tf.device("CPU:0"):
            self._build_detokenization()
            self._build_tokenization()

    # Loading and saving

    @classmethod
    def from_json(cls, text: str, eos_token: str | None = None) -> "Tokenizer":
        """Builds the tokenizer that a Hugging Face tokenizer.json describes.

        Args:
            text: Contents of a tokenizer.json.
            eos_token: The token that ends a text; by default `<|endoftext|>` if it is among the
                special tokens, otherwise none.

        Returns:
            A `WordTokenizer`, `CharacterTokenizer` or `ByteBPETokenizer`.

        Raises:
            ValueError: If the text is no tokenizer.json, or asks for something unsupported.
        """
        config = _parse_json_object(text)
        kinds = cls.__subclasses__() or [cls]
        for kind in kinds:
            if kind._describes(config):
                return kind(text, eos_token)
        supported = "; ".join(f"{kind.__name__}: {kind._supports}" for kind in kinds)
        raise ValueError(
            f"The model and pre_tokenizer of a tokenizer.json must be supported ({supported}). "
            f"Received: model.type={config['model'].get('type')!r}, "
            f"pre_tokenizer={config.get('pre_tokenizer')!r}"
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads tokenizer.json, and the end-of-text token from tokenizer_config.json if there.

        Args:
            folder: A folder in the Hugging Face layout.

        Returns:
            As `from_json`.

        Raises:
            FileNotFoundError: If the folder holds no tokenizer.json.
            ValueError: As `from_json`.
        """
        folder = Path(folder)
        eos_token = None
        config_path = folder / "tokenizer_config.json"
        if config_path.exists():
            eos_token = json.loads(config_path.read_text(encoding="utf-8")).get("eos_token")
            if isinstance(eos_token, dict):  # A token with its options written out.
                eos_token = eos_token["content"]
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return cls.from_json(text, eos_token)

    def to_json(self) -> str:
        """Returns the text of a tokenizer.json, which `tokenizers.Tokenizer.from_str` loads."""
        return self._config.json_text

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `transformers` loads as well.

        Args:
            folder: Where to write; made if it does not exist.
        """
        folder = Path(folder)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        if self.eos_token is not None:
            settings["eos_token"] = self.eos_token
        if self.unk_id is not None:
            settings["unk_token"] = self.id_to_token(self.unk_id)
        write_text(folder / "tokenizer.json", self.to_json())
        write_json(folder / "tokenizer_config.json", settings)

    # Vocabulary

    @property
    def vocabulary_size(self) -> int:
        return len(self._config.tokens)

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._config.special_tokens)

    @property
    def eos_token(self) -> str | None:
        return self._config.eos_token

    @property
    def eos_id(self) -> int | None:
        return None if self.eos_token is None else self.special_tokens[self.eos_token]

    @property
    def unk_id(self) -> int | None:
        return self._config.unk_id

    def token_to_id(self, token: str) -> int:
        """Returns the id of a token as tokenizer.json spells it; ValueError if there is none."""
        if token not in self._config.ids:
            raise ValueError(f"`token` must be in the vocabulary. Received: token={token!r}")
        return self._config.ids[token]

    def id_to_token(self, id: int) -> str:
        """Returns the token of an id as tokenizer.json spells it; ValueError if there is none."""
        if not 0 <= id < self.vocabulary_size:
            raise ValueError(f"`id` must be from 0 to {self.vocabulary_size - 1}. Received: id={id}")
        return self._config.tokens[id]

    # Text to ids

    def tokenize(self, texts: tf.Tensor, parse_special: bool = False) -> tf.RaggedTensor:
        """Turns texts into ids with TensorFlow ops.

        Args:
            texts: `[batch]` strings, UTF-8. Invalid bytes become U+FFFD, as Python's
                `errors="replace"` does.
            parse_special: Whether the spelling of a special token in a text becomes that token.
                Leave it off for text from outside: whoever writes it could end the text or
                speak for someone else.

        Returns:
            `[batch, None]` int32 ids. They equal those of `tokenizers` with
            `encode(text, add_special_tokens=False)`, and with `encode_special_tokens = True`
            where `parse_special` is off.

        Raises:
            ValueError: If `texts` is not one-dimensional.
            TypeError: If `texts` does not hold strings.
        """
        texts = tf.convert_to_tensor(texts)
        if texts.dtype != tf.string:
            raise TypeError(f"`texts` must hold strings. Received: dtype={texts.dtype.name}")
        if texts.shape.rank not in (None, 1):
            raise ValueError(f"`texts` must have the shape [batch]. Received: shape={texts.shape}")
        return self._graph_functions.tokenize(texts, bool(parse_special))

    def _tokenize(self, texts: tf.Tensor, parse_special: bool) -> tf.RaggedTensor:
        """The ops of `tokenize`."""
        with tf.device("CPU:0"):
            pieces, text_of_piece = self._split(_replace_invalid_utf8(texts), parse_special)
            ids = self._encode_pieces(pieces)
            text_count = tf.size(texts, out_type=tf.int64)
            # Pieces come in the order of their texts: a text begins at its first piece.
            first_piece = tf.searchsorted(text_of_piece, tf.range(text_count + 1), out_type=tf.int64)
            return tf.RaggedTensor.from_row_splits(
                ids.values, tf.gather(ids.row_splits, first_piece), validate=False
            )

    def encode(self, text: str | Sequence[str], parse_special: bool = False) -> list[int] | list[list[int]]:
        """Turns a string into a list of ids, or several strings into several lists.

        Args:
            text: A string, or a sequence of strings.
            parse_special: As in `tokenize`.

        Returns:
            The ids; one list for a string, a list of lists for a sequence.

        Raises:
            TypeError: If something else than strings comes in.
            UnicodeEncodeError: If a string holds a lone surrogate.
        """
        if isinstance(text, str):
            return self.encode([text], parse_special)[0]
        for item in text:
            if not isinstance(item, str):
                raise TypeError(f"`text` must hold strings. Received: {type(item).__name__}")
        texts = tf.constant([item.encode("utf-8") for item in text], tf.string)
        return self.tokenize(texts, parse_special).to_list()

    # Ids to text

    @tf.autograph.experimental.do_not_convert
    def detokenize(self, ids: tf.Tensor | tf.RaggedTensor, skip_special_tokens: bool = True) -> tf.Tensor:
        """Turns ids into texts with TensorFlow ops.

        Args:
            ids: `[batch, length]` integers, dense or ragged. As in Hugging Face's `decode`, an id
                outside of the vocabulary has no text, so that rows may be padded with -1.
            skip_special_tokens: Whether special tokens are left out.

        Returns:
            `[batch]` strings, valid UTF-8; bytes that are none become U+FFFD.

        Raises:
            ValueError: If `ids` is not two-dimensional.
            TypeError: If `ids` does not hold integers.
        """
        if not isinstance(ids, tf.RaggedTensor):
            ids = tf.convert_to_tensor(ids)
        if not ids.dtype.is_integer:
            raise TypeError(f"`ids` must hold integers. Received: dtype={ids.dtype.name}")
        if ids.shape.rank not in (None, 2):
            raise ValueError(f"`ids` must have the shape [batch, length]. Received: {ids.shape}")

        def texts_of(ids: tf.Tensor) -> tf.Tensor:
            ids = tf.cast(ids, tf.int64)
            outside = (ids < 0) | (ids >= self.vocabulary_size)
            ids = tf.where(outside, tf.constant(self.vocabulary_size, tf.int64), ids)
            texts = tf.gather(self._token_texts, ids)
            if skip_special_tokens:
                texts = tf.where(tf.gather(self._is_special, ids), "", texts)
            return texts

        with tf.device("CPU:0"):
            texts = tf.ragged.map_flat_values(texts_of, ids)
            return _replace_invalid_utf8(tf.strings.reduce_join(texts, axis=1))

    def decode(self, ids, skip_special_tokens: bool = True) -> str | list[str]:
        """Turns a list of ids into a string, or several lists into several strings.

        Args:
            ids: A list of ids or a `[length]` array; or a list of lists, a ragged tensor or a
                `[batch, length]` array.
            skip_special_tokens: As in `detokenize`.

        Returns:
            A string for one list, a list of strings for several.

        Raises:
            TypeError: If `ids` does not hold integers.
        """
        if isinstance(ids, tf.RaggedTensor):
            ids = ids.to_list()
        elif not isinstance(ids, list | tuple):
            ids = np.asarray(ids)
        one_text = ids.ndim == 1 if isinstance(ids, np.ndarray) else not np.ndim(next(iter(ids), 0))
        rows = [np.asarray(row) for row in ([ids] if one_text else ids)]
        for row in rows:
            if row.size and row.dtype.kind not in "iu":
                raise TypeError(f"`ids` must hold integers. Received: dtype={row.dtype}")
            if row.ndim != 1:
                raise ValueError(f"`ids` must be one or two levels deep. Received: {ids!r}")
        ragged = tf.RaggedTensor.from_row_lengths(
            np.concatenate([np.zeros([0]), *rows]).astype(np.int64),
            np.array([len(row) for row in rows], np.int64),
        )
        texts = self._graph_functions.detokenize(ragged, bool(skip_special_tokens)).numpy()
        texts = [text.decode("utf-8") for text in texts]
        return texts[0] if one_text else texts

    # What a kind of tokenizer fills in

    _supports: str  # The supported model and pre-tokenizer, in words.
    _decoder_type: str  # The type that tokenizer.json must give for its decoder.

    @classmethod
    def _describes(cls, config: dict) -> bool:
        """Whether this class is the one for the model and pre-tokenizer of a tokenizer.json."""
        raise NotImplementedError

    def _cuts(self) -> list[tuple[str, bytes]]:
        """Regular expressions and rewrites that put a SEPARATOR between pieces, in turn."""
        raise NotImplementedError

    def _check_supported(self) -> None:
        """Raises ValueError if the tokenizer.json asks for anything this class does not do."""
        if (self._config.json.get("decoder") or {}).get("type") != self._decoder_type:
            raise ValueError(
                f"`decoder` of a tokenizer.json must have the type {self._decoder_type!r} for a "
                f"{type(self).__name__}. Received: {self._config.json.get('decoder')!r}"
            )

    def _piece_ids(self) -> dict[bytes, int]:
        """The pieces that are one token, and their ids."""
        return {token.encode("utf-8"): i for token, i in self._config.model_vocabulary.items()}

    def _encode_pieces(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        """`[pieces]` strings -> `[pieces, None]` int32 ids; here one id for each piece."""
        one_each = tf.range(tf.size(pieces, out_type=tf.int64) + 1)
        ids = self._piece_table.lookup(pieces)
        return tf.RaggedTensor.from_row_splits(ids, one_each, validate=False)

    def _token_text(self, token: str) -> bytes:
        """What a token of the vocabulary stands for in a text."""
        return token.encode("utf-8")

    # Shared parts

    def _build_tokenization(self) -> None:
        self._cut_rewrites = _PlainValue(self._cuts())
        special_tokens = self._config.special_tokens
        self._special_pattern = _any_of(special_tokens) if special_tokens else None
        table = dict(self._piece_ids())
        for token, token_id in special_tokens.items():
            table[SPECIAL_MARK + token.encode("utf-8")] = token_id
        default = NOT_IN_TABLE if self.unk_id is None else self.unk_id
        self._piece_table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                tf.constant(list(table.keys()), tf.string),
                tf.constant(list(table.values()), tf.int32),
            ),
            default,
        )

    def _build_detokenization(self) -> None:
        # The entry after the last one is for ids outside of the vocabulary.
        tokens = self._config.tokens
        special_ids = set(self._config.special_tokens.values())
        self._token_texts = tf.constant([*map(self._token_text, tokens), b""])
        self._is_special = tf.constant([i in special_ids for i in range(len(tokens) + 1)])

    def _split(self, texts: tf.Tensor, parse_special: bool) -> tuple[tf.Tensor, tf.Tensor]:
        """Cuts valid UTF-8 into pieces.

        Returns:
            `[pieces]` strings, none empty, in the order of the texts, a special token with
            SPECIAL_MARK before it; and `[pieces]` int64, the index of each piece's text.
        """
        if not parse_special or self._special_pattern is None:
            return _split_at_separators(self._mark_cuts(texts))
        marked = tf.strings.regex_replace(
            texts, self._special_pattern, SEPARATOR + SPECIAL_MARK + rb"\0" + SEPARATOR
        )
        # Each stretch between special tokens is cut as if it were a text of its own: a pattern
        # must not look past a special token.
        stretches, text_of_stretch = _split_at_separators(marked)
        is_special = tf.strings.substr(stretches, 0, 1) == SPECIAL_MARK
        cut = tf.where(is_special, stretches, self._mark_cuts(tf.where(is_special, "", stretches)))
        pieces, stretch_of_piece = _split_at_separators(cut)
        return pieces, tf.gather(text_of_stretch, stretch_of_piece)

    def _mark_cuts(self, texts: tf.Tensor) -> tf.Tensor:
        for pattern, rewrite in self._cut_rewrites.value:
            texts = tf.strings.regex_replace(texts, pattern, rewrite)
        return texts


class _TokenizerConfig:
    """The checked contents of a tokenizer.json."""

    def __init__(self, json_text: str, eos_token: str | None):
        self.json_text = json_text
        self.json = _parse_json_object(json_text)
        self._check_only_supported_steps()
        self.model = self.json["model"]
        self.model_vocabulary: dict[str, int] = self.model.get("vocab") or {}
        self.special_tokens = self._read_special_tokens()
        self.ids = self.model_vocabulary | self.special_tokens
        if sorted(self.ids.values()) != list(range(len(self.ids))):
            raise ValueError(
                "Token ids must be 0 to n - 1, each used once. Received: "
                f"{len(self.ids)} tokens, ids up to {max(self.ids.values(), default=None)}"
            )
        self.tokens = sorted(self.ids, key=self.ids.__getitem__)
        self.unk_id = self._read_unk_id()
        if eos_token is None and DEFAULT_EOS_TOKEN in self.special_tokens:
            eos_token = DEFAULT_EOS_TOKEN
        if eos_token is not None and eos_token not in self.special_tokens:
            raise ValueError(
                "`eos_token` must be a special token of the tokenizer. Received: "
                f"eos_token={eos_token!r}, special tokens {list(self.special_tokens)}"
            )
        self.eos_token = eos_token

    def _check_only_supported_steps(self) -> None:
        for step in ("truncation", "padding", "normalizer"):
            if self.json.get(step) is not None:
                raise ValueError(
                    f"`{step}` of a tokenizer.json is not supported. Received: {self.json[step]!r}"
                )
        post_processor = self.json.get("post_processor")
        # The one of type ByteLevel changes offsets only, never ids.
        if post_processor is not None and post_processor.get("type") != "ByteLevel":
            raise ValueError(
                "`post_processor` of a tokenizer.json must be null or of type ByteLevel. "
                f"Received: {post_processor!r}"
            )

    def _read_special_tokens(self) -> dict[str, int]:
        """The added tokens; ValueError where `tokenizers` would treat one in a way we do not."""
        special_tokens = {}
        next_id = len(self.model_vocabulary)
        normalized = set()
        for token in self.json.get("added_tokens") or []:
            content, token_id = token["content"], token["id"]
            unsupported = [f for f in ("single_word", "lstrip", "rstrip") if token.get(f)]
            if not content or not token.get("special") or unsupported:
                raise ValueError(
                    "An added token must be a special one, not empty, without the options "
                    f"single_word, lstrip and rstrip. Received: {token!r}"
                )
            # `tokenizers` does not read the id: it takes the model's or the next free one.
            expected_id = self.model_vocabulary.get(content, next_id)
            if token_id != expected_id or content in special_tokens:
                raise ValueError(
                    "Added tokens must differ, and have the id of the model's vocabulary or the "
                    f"next one after it. Received: {token!r}, expected id {expected_id}"
                )
            next_id += token_id == next_id
            normalized.add(bool(token.get("normalized")))
            special_tokens[content] = token_id
        if len(normalized) > 1:  # Those not normalized are searched first, whatever their place.
            raise ValueError("`normalized` must be the same for all added tokens. Received: both values")
        return special_tokens

    def _read_unk_id(self) -> int | None:
        unk_token = self.model.get("unk_token")
        if unk_token is None:
            return None
        if unk_token not in self.model_vocabulary:
            raise ValueError(
                f"`unk_token` must be in the model's vocabulary. Received: unk_token={unk_token!r}"
            )
        return self.model_vocabulary[unk_token]


class _PlainValue:
    """Keeps a value out of TensorFlow's object tracking."""

    def __init__(self, value):
        self.value = value


class _GraphFunctions:
    """The traced functions behind the tokenizer, made at their first use.

    Whatever graph tokenizes calls the same one, so that the ops are traced once and not for every
    dataset, generation and export.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._traced = {}

    def tokenize(self, texts: tf.Tensor, parse_special: bool) -> tf.RaggedTensor:
        signature = [tf.TensorSpec([None], tf.string)]
        return self._get(self._tokenizer._tokenize, parse_special, signature)(texts)

    def detokenize(self, ids: tf.RaggedTensor, skip_special_tokens: bool) -> tf.Tensor:
        signature = [tf.RaggedTensorSpec([None, None], tf.int64)]
        return self._get(self._tokenizer.detokenize, skip_special_tokens, signature)(ids)

    def _get(self, method: Callable, flag: bool, signature: list):
        key = (method.__name__, flag)
        if key not in self._traced:
            self._traced[key] = tf.function(
                lambda value: method(value, flag), input_signature=signature, autograph=False
            )
        return self._traced[key]


@cache
def _unicode_ranges() -> dict[str, list[list[int]]]:
    file = resources.files("kerasllm.tokenizers").joinpath("unicode_ranges.json")
    return json.loads(file.read_text(encoding="utf-8"))


def unicode_class(name: str) -> str:
    """The inside of a bracketed regular expression class, as the `tokenizers` library has it.

    Args:
        name: "letter" (`\\p{L}`), "number" (`\\p{N}`), "space" (`\\s`) or "word" (`[\\w]`).

    Returns:
        Ranges of code points, to be put between `[` or `[^` and `]`.
    """
    return "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in _unicode_ranges()[name])


def _any_of(tokens: Sequence[str]) -> str:
    """A regular expression for any of the tokens; where several match, the longest wins."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return "|".join("".join(f"\\x{{{ord(c):x}}}" for c in token) for token in longest_first)


def _replace_invalid_utf8(texts: tf.Tensor) -> tf.Tensor:
    """Puts U+FFFD for invalid bytes, as many as Python's `errors="replace"` would."""
    return tf.cond(
        tf.reduce_all(tf.strings.regex_full_match(texts, _VALID_UTF8)),
        lambda: texts,
        lambda: tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace"),
    )


def _split_at_separators(texts: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`[texts]` -> the parts that are not empty, and for each the index of its text."""
    split = tf.raw_ops.StringSplitV2(input=texts, sep=SEPARATOR)
    parts, text_of_part = split.values, split.indices[:, 0]
    not_empty = tf.where(parts != "")[:, 0]
    return tf.gather(parts, not_empty), tf.gather(text_of_part, not_empty)


def _parse_json_object(text: str) -> dict:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"A tokenizer.json must be valid JSON. Received: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise ValueError(
            f"A tokenizer.json must be an object with the entry `model`. Received: {text[:80]!r}"
        )
    return config
