"""Text to ids and back inside the TensorFlow graph, equal to a Hugging Face tokenizer."""

import os
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from kerasllm.files import write_json, write_text
from kerasllm.tokenizers.added_tokens import AddedToken, AddedTokens, Stretches
from kerasllm.tokenizers.chat import BUILT_IN_TEMPLATES, ChatTemplate, Shield
from kerasllm.tokenizers.chat_graph import ChatEncoder, find_chat_form
from kerasllm.tokenizers.decoding import Decoder
from kerasllm.tokenizers.folder import chat_templates_of, read_folder
from kerasllm.tokenizers.json_fields import field, parse_object
from kerasllm.tokenizers.marks import MARK, SEPARATOR, split_at_separators
from kerasllm.tokenizers.normalizers import build_normalizer
from kerasllm.tokenizers.post_processing import PostProcessor
from kerasllm.tokenizers.ragged import interleave, one_each
from kerasllm.tokenizers.utf8 import replace_invalid_utf8

DEFAULT_EOS_TOKEN = "<|endoftext|>"
NOT_IN_TABLE = -1

# The tokens that the settings of a tokenizer name, as "bos_token" and so on.
NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer(tf.Module):
    """Text to ids and back inside the TensorFlow graph; ids equal to its Hugging Face tokenizer.

    A text is cut at the added tokens, normalized, and cut into pieces by regular expressions that
    TensorFlow and the `tokenizers` library read alike; a subclass says how (`_cuts`) and what ids a
    piece has (`_encode_pieces`). Only TensorFlow core ops are used, so a SavedModel with a tokenizer
    inside runs in every runtime.

    Make one with `Tokenizer.from_json`, `Tokenizer.from_folder` or `train_tokenizer`.

    Args:
        json_text: Contents of a tokenizer.json of the subclass's kind.
        eos_token: The token that ends a text, see `from_json`.
        settings: Contents of a tokenizer_config.json, see `from_json`.

    Attributes:
        vocabulary_size: Number of ids, added tokens included; ids are 0 to this minus 1.
        special_tokens: The special tokens and their ids.
        chat_template: The Jinja text that turns chats into prompts, or None.
        bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token: The tokens that
            the settings name so, or None.
        bos_id, eos_id, unk_id, sep_id, pad_id, cls_id, mask_id: Their ids, or None.
    """

    def __init__(
        self, json_text: str, eos_token: str | None = None, settings: dict[str, Any] | None = None
    ):
        super().__init__()
        # Plain objects stay out of TensorFlow's object tracking: a tracked list of 50,000 strings
        # is slow, and a tracked tf.function would be written into every SavedModel.
        self._config = _TokenizerConfig(json_text, eos_token, settings or {}, self._read_vocabulary)
        self._check_supported()
        self._graph_functions = _GraphFunctions(self)
        with tf.init_scope(), tf.device("CPU:0"):
            special_ids = set(self.special_tokens.values())
            self.decoder = Decoder(self._config.json.get("decoder"), self._config.tokens, special_ids)
            self._post_processor = PostProcessor(
                self._config.json.get("post_processor"), self.vocabulary_size
            )
            self._build_tokenization()

    # Loading and saving

    @classmethod
    def from_json(
        cls, text: str, eos_token: str | None = None, settings: dict[str, Any] | None = None
    ) -> "Tokenizer":
        """Builds the tokenizer that a Hugging Face tokenizer.json describes.

        `truncation` and `padding` of the file say how batches are formed, not what a text's ids are;
        they are kept and not applied, as in transformers.

        Args:
            text: Contents of a tokenizer.json.
            eos_token: The token that ends a text; by default the one of the settings, or
                `<|endoftext|>` if it is among the special tokens, otherwise none.
            settings: Contents of a tokenizer_config.json: which tokens are bos_token, eos_token,
                pad_token and so on, and the chat template. The tokens it names are special.

        Returns:
            A `ByteBPETokenizer`, `WordTokenizer` or another subclass.

        Raises:
            ValueError: If the text is no tokenizer.json, or asks for something unsupported.
        """
        config = _parse_tokenizer_json(text)
        kinds = cls.__subclasses__() or [cls]
        for kind in kinds:
            if kind._describes(config):
                return kind(text, eos_token, settings)
        supported = "; ".join(f"{kind.__name__}: {kind._supports}" for kind in kinds)
        raise ValueError(
            f"The model and pre_tokenizer of a tokenizer.json must be supported ({supported}). "
            f"Received: model.type={reprlib.repr(config['model'].get('type'))}, "
            f"pre_tokenizer={str(config.get('pre_tokenizer'))[:500]}"
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Reads a tokenizer in any of the layouts in use.

        Args:
            folder: A folder with tokenizer.json; or vocab.json and merges.txt; or vocab.txt
                (WordPiece); or tokenizer.model or spiece.model (SentencePiece). Settings come from
                tokenizer_config.json and special_tokens_map.json, the chat template from these or
                from chat_template.jinja or chat_template.json.

        Returns:
            As `from_json`.

        Raises:
            FileNotFoundError: If the folder holds none of these.
            ValueError: As `from_json`.
        """
        text, settings = read_folder(Path(folder))
        return cls.from_json(text, settings=settings)

    def to_json(self) -> str:
        """Returns the text of a tokenizer.json, which `tokenizers.Tokenizer.from_str` loads."""
        return self._config.json_text

    def save(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json and its settings as they were read; `transformers` loads them as well.

        Args:
            folder: Where to write; made if it does not exist.
        """
        folder = Path(folder)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        settings |= self._config.settings
        settings |= {f"{name}_token": token for name, token in self._config.named_tokens.items()}
        templates = chat_templates_of(settings)
        chat_template = folder / "chat_template.jinja"
        if set(templates) == {"default"}:
            del settings["chat_template"]
            write_text(chat_template, self.chat_template)
        else:  # One of an earlier save would come before those in the settings.
            chat_template.unlink(missing_ok=True)
        write_text(folder / "tokenizer.json", self.to_json())
        write_json(folder / "tokenizer_config.json", settings)

    # Vocabulary

    @property
    def vocabulary_size(self) -> int:
        return len(self._config.tokens)

    @property
    def special_tokens(self) -> dict[str, int]:
        return {token.content: token.id for token in self._config.added_tokens if token.special}

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

    def token_bytes(self, id: int) -> bytes:
        """Returns what a token stands for inside of a text; ValueError if there is no such id."""
        self.id_to_token(id)
        return self.decoder.token_bytes(id)

    # Text to ids

    def tokenize(
        self, texts: tf.Tensor, parse_special: bool = False, add_special_tokens: bool = False
    ) -> tf.RaggedTensor:
        """Turns texts into ids with TensorFlow ops.

        Args:
            texts: `[batch]` strings, UTF-8. Invalid bytes become U+FFFD, as Python's
                `errors="replace"` does.
            parse_special: Whether the spelling of a special token in a text becomes that token.
                Leave it off for text from outside: whoever writes it could end the text or
                speak for someone else. Added tokens that are not special count in any case.
            add_special_tokens: Whether to put the tokenizer's special tokens around each text, as
                [CLS] and [SEP]; of some tokenizers there are none.

        Returns:
            `[batch, None]` int32 ids. They equal those of `tokenizers` with the same
            `add_special_tokens`, and with `encode_special_tokens = True` where `parse_special` is
            off.

        Raises:
            ValueError: If `texts` is not one-dimensional.
            TypeError: If `texts` does not hold strings.
        """
        ids = self._graph_functions.tokenize(_checked_texts(texts), bool(parse_special))
        return self._post_processor.apply(ids)[0] if add_special_tokens else ids

    def tokenize_pairs(
        self,
        texts: tf.Tensor,
        second_texts: tf.Tensor,
        parse_special: bool = False,
        add_special_tokens: bool = True,
    ) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Turns pairs of texts into one row of ids each, with TensorFlow ops.

        Args:
            texts: As in `tokenize`.
            second_texts: `[batch]` strings, the second text of each pair.
            parse_special: As in `tokenize`.
            add_special_tokens: As in `tokenize`; those between the texts, too.

        Returns:
            `[batch, None]` int32 ids, and `[batch, None]` int32 type ids: which text an id is of.

        Raises:
            ValueError: If the texts are not one-dimensional.
            TypeError: If the texts are no strings.
        """
        tokenize = self._graph_functions.tokenize
        first = tokenize(_checked_texts(texts), bool(parse_special))
        second = tokenize(_checked_texts(second_texts), bool(parse_special))
        return self._post_processor.apply(first, second, add_special_tokens)

    def with_special_tokens(
        self, ids: tf.RaggedTensor, second_ids: tf.RaggedTensor | None = None
    ) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Puts the tokenizer's special tokens around texts that are ids already, such as shortened ones.

        Args:
            ids: `[batch, None]` int32.
            second_ids: As `ids`, of the second text of each pair; None for single texts.

        Returns:
            As `tokenize_pairs`.
        """
        return self._post_processor.apply(ids, second_ids)

    def encode(
        self, text: str | Sequence[str], parse_special: bool = False, add_special_tokens: bool = False
    ) -> list[int] | list[list[int]]:
        """Turns a string into a list of ids, or several strings into several lists.

        Args:
            text: A string, or a sequence of strings.
            parse_special: As in `tokenize`.
            add_special_tokens: As in `tokenize`.

        Returns:
            The ids; one list for a string, a list of lists for a sequence.

        Raises:
            TypeError: If something else than strings comes in.
            UnicodeEncodeError: If a string holds a lone surrogate.
        """
        if isinstance(text, str):
            return self.encode([text], parse_special, add_special_tokens)[0]
        for item in text:
            if not isinstance(item, str):
                raise TypeError(f"`text` must hold strings. Received: {type(item).__name__}")
        texts = tf.constant([item.encode("utf-8") for item in text], tf.string)
        return self.tokenize(texts, parse_special, add_special_tokens).to_list()

    # Chats

    @property
    def chat_template(self) -> str | None:
        template = self._config.chat_templates.get("default")
        return None if template is None else template.source

    def render_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """Turns a chat into the text that the model was trained to continue.

        Args:
            messages: The messages, each with a "role" and mostly a "content".
            **options: `add_generation_prompt`, `continue_final_message`, `tools`, `chat_template`
                and variables of the template, see `ChatTemplate.render`. `chat_template` is a Jinja
                text, the name of one of the tokenizer's, or of a built-in one ("chatml", ...).

        Returns:
            The prompt, equal to transformers' `apply_chat_template(tokenize=False)`.

        Raises:
            ValueError: If there is no template, or it fails.
        """
        template, named, options = self._chat_template_of(options)
        return template.render(messages, **(named | options))

    def encode_chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Turns a chat into the ids of its prompt.

        The special tokens that the template writes become ids. What is in the messages never does:
        a user who writes `<|im_end|>` has written some characters.

        Args:
            messages: As in `render_chat`.
            **options: As in `render_chat`.

        Returns:
            The ids. They equal transformers' `apply_chat_template` where no message spells a
            special token.

        Raises:
            ValueError: As `render_chat`.
        """
        self._require_shield()
        template, named, options = self._chat_template_of(options)
        shield = Shield(list(self.special_tokens))
        protected = shield.protect(options)
        prompt = template.render(shield.protect_messages(messages), **(named | protected))
        ids = self.tokenize_shielded(tf.constant([shield.to_bytes(prompt)]))
        return ids.values.numpy().tolist()

    @property
    def can_be_shielded(self) -> bool:
        """Whether `tokenize_shielded` works: special tokens stay as they are when text is normalized."""
        return not self._respelled.value

    def tokenize_shielded(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Turns rendered chats, with `Shield`'s marks in them, into ids with TensorFlow ops.

        Args:
            texts: `[batch]` strings, UTF-8 but for the marks.

        Returns:
            `[batch, None]` int32 ids. A special token is one where no mark is in its spelling.

        Raises:
            ValueError: If special tokens are respelled when text is normalized.
        """
        self._require_shield()
        return self._graph_functions.tokenize_shielded(texts)

    def _require_shield(self) -> None:
        if not self.can_be_shielded:
            raise ValueError(
                "A chat needs special tokens that stay as they are when text is normalized. Received: "
                f"{self._respelled.value}"
            )

    def make_chat_encoder(self, chat_template: str | None = None) -> ChatEncoder:
        """Makes what `encode_chat` does, with `add_generation_prompt`, a function of a graph.

        Args:
            chat_template: As in `encode_chat`. None: the tokenizer's.

        Returns:
            The function, whose ids are those of `encode_chat`.

        Raises:
            ValueError: If there is no template, or one that does more than a graph can do.
        """
        template, named, _ = self._chat_template_of({"chat_template": chat_template})
        self._require_shield()
        if "strftime_now" in template.source:
            raise ValueError("A template in a graph must not depend on the day. Received: one that does")
        shield = Shield(list(self.special_tokens))

        def render(roles: Sequence[str], contents: Sequence[str]) -> str | None:
            pairs = zip(roles, contents, strict=True)
            messages = [{"role": role, "content": content} for role, content in pairs]
            try:
                return template.render(messages, add_generation_prompt=True, **named)
            except ValueError:
                return None

        form = find_chat_form(render, shield.protect)
        return ChatEncoder(form, list(self.special_tokens), self._graph_functions.tokenize_shielded)

    def _chat_template_of(
        self, options: dict[str, Any]
    ) -> tuple[ChatTemplate, dict[str, str], dict[str, Any]]:
        """The template, the named tokens that it may write, and the other options."""
        named = {f"{name}_token": token for name, token in self._config.named_tokens.items()}
        options = dict(options)
        template = self._config.find_chat_template(
            options.pop("chat_template", None), bool(options.get("tools"))
        )
        return template, named, options

    # Ids to text

    def detokenize(
        self,
        ids: tf.Tensor | tf.RaggedTensor,
        skip_special_tokens: bool = True,
        after: tf.Tensor | tf.RaggedTensor | None = None,
    ) -> tf.Tensor:
        """Turns ids into texts with TensorFlow ops.

        Args:
            ids: `[batch, length]` integers, dense or ragged. As in Hugging Face's `decode`, an id
                outside of the vocabulary has no text, so that rows may be padded with -1.
            skip_special_tokens: Whether special tokens are left out.
            after: The ids that come before, `[batch, length]`, such as those of prompts; their text is
                not returned. Many tokenizers drop the space that begins a text: with the prompt's ids
                here, a text that goes on keeps its space. None: every row begins a text.

        Returns:
            `[batch]` strings, valid UTF-8; bytes that are none become U+FFFD.

        Raises:
            ValueError: If `ids` is not two-dimensional.
            TypeError: If `ids` does not hold integers.
        """
        with tf.device("CPU:0"):
            ids = _ragged_ids("ids", ids)
            after = None if after is None else _ragged_ids("after", after)
            return self.decoder.decode(ids, skip_special_tokens, after)

    def decode(self, ids, skip_special_tokens: bool = True, after=None) -> str | list[str]:
        """Turns a list of ids into a string, or several lists into several strings.

        Args:
            ids: A list of ids or a `[length]` array; or a list of lists, a ragged tensor or a
                `[batch, length]` array.
            skip_special_tokens: As in `detokenize`.
            after: The ids that come before, as in `detokenize`; a list or several, like `ids`.

        Returns:
            A string for one list, a list of strings for several.

        Raises:
            TypeError: If `ids` does not hold integers.
            ValueError: If `after` has not as many lists as `ids`.
        """
        rows, one_text = _rows_of_ids("ids", ids)
        rows_after = [[]] * len(rows) if after is None else _rows_of_ids("after", after)[0]
        if len(rows_after) != len(rows):
            raise ValueError(
                "`after` must have a list for each of `ids`. "
                f"Received: {len(rows_after)} lists, {len(rows)} of `ids`"
            )
        texts = self._graph_functions.detokenize(
            _ragged_rows(rows), _ragged_rows(rows_after), bool(skip_special_tokens)
        ).numpy()
        texts = [text.decode("utf-8") for text in texts]
        return texts[0] if one_text else texts

    # What a kind of tokenizer fills in

    _piece_separator = SEPARATOR  # What `_cuts` puts between pieces.
    _supports: str  # The supported model and pre-tokenizer, in words.

    @classmethod
    def _describes(cls, config: dict) -> bool:
        """Whether this class is the one for the model and pre-tokenizer of a tokenizer.json."""
        raise NotImplementedError

    def _check_supported(self) -> None:
        """Raises ValueError if the tokenizer.json asks for anything this class does not do."""

    @staticmethod
    def _read_vocabulary(model: dict) -> dict[str, int]:
        """The tokens of the entry `model` of a tokenizer.json, and their ids."""
        return field(model, "vocab", dict, {})

    def _normalize(self, stretches: tf.Tensor, begins_text: tf.Tensor) -> tf.Tensor:
        """What a text becomes before it is cut.

        Args:
            stretches: `[stretches]` strings: what a text has between two added tokens.
            begins_text: `[stretches]` bool, whether nothing of the text comes before it.
        """
        return self._normalizer.value(stretches)

    def _cuts(self) -> list[tuple[str, bytes]]:
        """Regular expressions and rewrites that put a SEPARATOR between pieces, in turn."""
        raise NotImplementedError

    def _mark_cuts(self, stretches: tf.Tensor, begins_text: tf.Tensor) -> tf.Tensor:
        """Puts a SEPARATOR between pieces; as `_normalize`, but of normalized stretches."""
        for pattern, rewrite in self._cut_rewrites.value:
            stretches = tf.strings.regex_replace(stretches, pattern, rewrite)
        return stretches

    def _piece_ids(self) -> dict[bytes, int]:
        """The pieces that are one token, and their ids."""
        return {token.encode("utf-8"): i for token, i in self._config.model_vocabulary.items()}

    def _default_piece_id(self) -> int:
        """What the table of the pieces that are one token gives for other pieces."""
        model_unk_id = self._config.model_unk_id
        return NOT_IN_TABLE if model_unk_id is None else model_unk_id

    def _encode_pieces(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        """`[pieces]` strings -> `[pieces, None]` int32 ids; here one id for each piece."""
        return one_each(self._piece_table.lookup(pieces))

    # Shared parts

    def _build_tokenization(self) -> None:
        self._cut_rewrites = _PlainValue(self._cuts())
        self._normalizer = _PlainValue(build_normalizer(self._config.json.get("normalizer")))
        # An entry so that there is a table where no piece is one token; no piece is a mark.
        table = self._piece_ids() or {MARK: self._default_piece_id()}
        self._piece_table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(
                tf.constant(list(table.keys()), tf.string),
                tf.constant(list(table.values()), tf.int32),
            ),
            self._default_piece_id(),
        )
        raw = [token for token in self._config.added_tokens if not token.normalized]
        normalized = [token for token in self._config.added_tokens if token.normalized]
        self._raw_tokens = AddedTokens(raw, [token.content for token in raw]) if raw else None
        spellings = self._normalized_spellings(normalized) if normalized else []
        self._normalized_tokens = AddedTokens(normalized, spellings) if normalized else None
        # In a chat, special tokens are found before anything is normalized, see `encode_chat`.
        spelled = zip(normalized, spellings, strict=True)
        special = [(token, spelling) for token, spelling in spelled if token.special]
        contents = [token.content for token, _ in special]
        self._chat_tokens = AddedTokens([token for token, _ in special], contents) if special else None
        self._respelled = _PlainValue([t.content for t, spelling in special if t.content != spelling])

    def _normalized_spellings(self, tokens: list[AddedToken]) -> list[str]:
        """How the tokens are spelled in normalized text."""
        spellings = tf.constant([token.content for token in tokens])
        normalized = self._normalize(spellings, tf.ones([len(tokens)], tf.bool)).numpy()
        return [spelling.decode("utf-8") for spelling in normalized]

    def _tokenize(self, texts: tf.Tensor, parse_special: bool) -> tf.RaggedTensor:
        """The ops of `tokenize`."""
        with tf.device("CPU:0"):
            stretches = Stretches.of_texts(replace_invalid_utf8(texts))
            if self._raw_tokens is not None:
                stretches = self._raw_tokens.cut(stretches, parse_special)
            return self._encode_stretches(stretches, parse_special, tf.size(texts, tf.int64))

    def _tokenize_shielded(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """As `_tokenize` with special tokens, for texts with Shield.MARK in spellings that are none."""
        with tf.device("CPU:0"):
            stretches = Stretches.of_texts(texts)
            for tokens in (self._raw_tokens, self._chat_tokens):
                if tokens is not None:
                    stretches = tokens.cut(stretches, parse_special=True)
            parts = tf.raw_ops.StringSplitV2(input=stretches.strings, sep=Shield.MARK)
            count = tf.size(stretches.strings)
            strings = tf.strings.unsorted_segment_join(parts.values, parts.indices[:, 0], count)
            stretches = stretches._replace(strings=strings)
            return self._encode_stretches(stretches, False, tf.size(texts, tf.int64))

    def _encode_stretches(
        self, stretches: Stretches, parse_special: bool, text_count: tf.Tensor
    ) -> tf.RaggedTensor:
        """The ids of each text, from its stretches of plain text and added tokens."""
        normalized = self._normalize(stretches.strings, stretches.begins_text())
        stretches = stretches._replace(strings=normalized)
        if self._normalized_tokens is not None:
            stretches = self._normalized_tokens.cut(stretches, parse_special)
        marked = self._mark_cuts(stretches.strings, stretches.begins_text())
        marked = tf.where(stretches.is_plain(), marked, MARK)
        pieces, source = split_at_separators(marked, self._piece_separator)

        others = tf.where(pieces != MARK)[:, 0]
        encoded = self._graph_functions.encode_pieces(tf.gather(pieces, others))

        def put_tokens_between() -> tf.RaggedTensor:
            tokens = tf.where(pieces == MARK)[:, 0]
            token_ids = tf.gather(stretches.token_id, tf.gather(source, tokens))
            return interleave(tokens, one_each(token_ids), others, encoded)

        has_tokens = tf.size(others) < tf.size(pieces)
        ids = tf.cond(has_tokens, put_tokens_between, lambda: encoded)
        # Pieces come in the order of their texts: a text begins at its first piece.
        text_of_piece = tf.gather(stretches.text, source)
        first_piece = tf.searchsorted(text_of_piece, tf.range(text_count + 1), out_type=tf.int64)
        return tf.RaggedTensor.from_row_splits(
            ids.values, tf.gather(ids.row_splits, first_piece), validate=False
        )


def _named_token(name: str) -> property:
    return property(lambda self: self._config.named_tokens.get(name))


def _named_id(name: str) -> property:
    return property(lambda self: self._config.ids.get(self._config.named_tokens.get(name)))


for _name in NAMED_TOKENS:
    setattr(Tokenizer, f"{_name}_token", _named_token(_name))
    setattr(Tokenizer, f"{_name}_id", _named_id(_name))


class _TokenizerConfig:
    """The checked contents of a tokenizer.json and of the settings beside it."""

    def __init__(
        self,
        json_text: str,
        eos_token: str | None,
        settings: dict[str, Any],
        read_vocabulary: Callable[[dict], dict[str, int]],
    ):
        self.json_text = json_text
        self.json = _parse_tokenizer_json(json_text)
        self.settings = settings
        self.model = self.json["model"]
        self.model_vocabulary = read_vocabulary(self.model)
        for token, token_id in self.model_vocabulary.items():
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise ValueError(f"A token's id must be an integer. Received: {token!r}: {token_id!r:.80}")
        named = self._read_named_tokens()
        self.added_tokens = self._read_added_tokens(named)
        self.ids = self.model_vocabulary | {token.content: token.id for token in self.added_tokens}
        if sorted(self.ids.values()) != list(range(len(self.ids))):
            raise ValueError(
                "Token ids must be 0 to n - 1, each used once. Received: "
                f"{len(self.ids)} tokens, ids up to {max(self.ids.values(), default=None)}"
            )
        self.tokens = sorted(self.ids, key=self.ids.__getitem__)
        self.model_unk_id = self._read_model_unk_id()
        self.named_tokens = self._complete(named, eos_token)
        self.chat_templates = {
            name: ChatTemplate(source) for name, source in chat_templates_of(settings).items()
        }

    def _read_named_tokens(self) -> dict[str, str]:
        """The tokens that the settings name."""
        named = {}
        for name in NAMED_TOKENS:
            token = self.settings.get(f"{name}_token")
            if isinstance(token, dict):  # A token with its options written out.
                token = field(token, "content", str)
            if token is None:
                continue
            if not isinstance(token, str):
                raise ValueError(f"`{name}_token` of the settings must be a string. Received: {token!r}")
            named[name] = token
        return named

    def _read_added_tokens(self, named: dict[str, str]) -> list[AddedToken]:
        added = [AddedToken.from_json(entry) for entry in field(self.json, "added_tokens", list, [])]
        next_id = len(self.model_vocabulary)
        contents = set()
        for token in added:
            # `tokenizers` does not read the id: it takes the model's or the next free one.
            expected_id = self.model_vocabulary.get(token.content, next_id)
            if token.id != expected_id or token.content in contents:
                raise ValueError(
                    "Added tokens must differ, and have the id of the model's vocabulary or the "
                    f"next one after it. Received: {token!r}, expected id {expected_id}"
                )
            next_id += token.id == next_id
            contents.add(token.content)
        for name, content in named.items():
            if content in contents:
                continue
            if content not in self.model_vocabulary:
                raise ValueError(
                    f"`{name}_token` of the settings must be in the vocabulary. Received: {content!r}"
                )
            added.append(AddedToken(content, self.model_vocabulary[content], special=True))
            contents.add(content)
        return added

    def _read_model_unk_id(self) -> int | None:
        unk_token = self.model.get("unk_token")
        if unk_token is None:
            return None
        if not isinstance(unk_token, str) or unk_token not in self.ids:
            raise ValueError(
                f"`unk_token` must be in the model's vocabulary. Received: unk_token={unk_token!r:.80}"
            )
        return self.ids[unk_token]

    def _complete(self, named: dict[str, str], eos_token: str | None) -> dict[str, str]:
        """The named tokens, with what needs no naming."""
        special = [token.content for token in self.added_tokens if token.special]
        if eos_token is not None and eos_token not in special:
            raise ValueError(
                "`eos_token` must be a special token of the tokenizer. Received: "
                f"eos_token={eos_token!r}, special tokens {special}"
            )
        defaults = {}
        if DEFAULT_EOS_TOKEN in special:
            defaults["eos"] = DEFAULT_EOS_TOKEN
        if self.model_unk_id is not None:
            defaults["unk"] = self.tokens[self.model_unk_id]
        return defaults | named | ({} if eos_token is None else {"eos": eos_token})

    def find_chat_template(self, chosen: str | None, has_tools: bool) -> ChatTemplate:
        """The template of that name or text; by default the tokenizer's, for tools if there are any."""
        if chosen is not None:
            return self.chat_templates.get(chosen) or ChatTemplate.built_in_or_source(chosen)
        name = "tool_use" if has_tools and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise ValueError(
                "The tokenizer has no chat template; choose one with `chat_template`: a Jinja text, one of "
                f"{sorted(self.chat_templates)} or of the built-in {sorted(BUILT_IN_TEMPLATES)}."
            )
        return self.chat_templates[name]


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
        return self._get(self._tokenizer._tokenize, signature, parse_special)(texts)

    def tokenize_shielded(self, texts: tf.Tensor) -> tf.RaggedTensor:
        return self._get(self._tokenizer._tokenize_shielded, [tf.TensorSpec([None], tf.string)])(texts)

    def encode_pieces(self, pieces: tf.Tensor) -> tf.RaggedTensor:
        return self._get(self._tokenizer._encode_pieces, [tf.TensorSpec([None], tf.string)])(pieces)

    def detokenize(
        self, ids: tf.RaggedTensor, after: tf.RaggedTensor, skip_special_tokens: bool
    ) -> tf.Tensor:
        signature = [tf.RaggedTensorSpec([None, None], tf.int64)] * 2
        return self._get(self._detokenize, signature, skip_special_tokens)(ids, after)

    def _detokenize(
        self, ids: tf.RaggedTensor, after: tf.RaggedTensor, skip_special_tokens: bool
    ) -> tf.Tensor:
        return self._tokenizer.detokenize(ids, skip_special_tokens, after)

    def _get(self, method: Callable, signature: list[tf.TypeSpec], *flags: bool):
        key = (method.__name__, *flags)
        if key not in self._traced:
            self._traced[key] = tf.function(
                lambda *values: method(*values, *flags), input_signature=signature, autograph=False
            )
        return self._traced[key]


def _checked_texts(texts: tf.Tensor) -> tf.Tensor:
    texts = tf.convert_to_tensor(texts)
    if texts.dtype != tf.string:
        raise TypeError(f"`texts` must hold strings. Received: dtype={texts.dtype.name}")
    if texts.shape.rank not in (None, 1):
        raise ValueError(f"`texts` must have the shape [batch]. Received: shape={texts.shape}")
    return texts


def _ragged_ids(name: str, ids: tf.Tensor | tf.RaggedTensor) -> tf.RaggedTensor:
    if not isinstance(ids, tf.RaggedTensor):
        ids = tf.convert_to_tensor(ids)
    if not ids.dtype.is_integer:
        raise TypeError(f"`{name}` must hold integers. Received: dtype={ids.dtype.name}")
    if ids.shape.rank not in (None, 2):
        raise ValueError(f"`{name}` must have the shape [batch, length]. Received: {ids.shape}")
    if not isinstance(ids, tf.RaggedTensor):
        ids = tf.RaggedTensor.from_tensor(ids)
    return ids.with_row_splits_dtype(tf.int64)


def _rows_of_ids(name: str, ids) -> tuple[list[np.ndarray], bool]:
    """One list of ids or several as arrays, and whether it was one."""
    if isinstance(ids, tf.RaggedTensor):
        ids = ids.to_list()
    elif not isinstance(ids, list | tuple):
        ids = np.asarray(ids)
    one_list = ids.ndim == 1 if isinstance(ids, np.ndarray) else not np.ndim(next(iter(ids), 0))
    rows = [np.asarray(row) for row in ([ids] if one_list else ids)]
    for row in rows:
        if row.size and row.dtype.kind not in "iu":
            raise TypeError(f"`{name}` must hold integers. Received: dtype={row.dtype}")
        if row.ndim != 1:
            raise ValueError(f"`{name}` must be one or two levels deep. Received: {ids!r}")
    return rows, one_list


def _ragged_rows(rows: Sequence[Sequence[int]]) -> tf.RaggedTensor:
    return tf.RaggedTensor.from_row_lengths(
        np.concatenate([np.zeros([0]), *rows]).astype(np.int64),
        np.array([len(row) for row in rows], np.int64),
    )


def _parse_tokenizer_json(text: str) -> dict:
    config = parse_object(text, "A tokenizer.json")
    if not isinstance(config.get("model"), dict):
        raise ValueError(
            f"A tokenizer.json must be an object with the entry `model`. Received: {text[:80]!r}"
        )
    return config
