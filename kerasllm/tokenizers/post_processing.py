"""The ids that a tokenizer puts around its texts, [CLS] and the like."""

from dataclasses import dataclass

import tensorflow as tf

from kerasllm.tokenizers.json_fields import field, steps

_FIRST, _SECOND = "A", "B"


@dataclass(frozen=True)
class _Part:
    """A part of a template: a text ("A" or "B"), or constant ids."""

    content: str | tuple[int, ...]
    type_id: int


class PostProcessor:
    """Puts the special ids of a tokenizer.json's `post_processor` around texts.

    Args:
        config: The entry `post_processor`.
        vocabulary_size: More than the largest id.

    Raises:
        ValueError: If the post-processor is not supported.
    """

    def __init__(self, config: dict | None, vocabulary_size: int):
        # The one of type ByteLevel changes offsets only, never ids.
        templates = [step for step in steps(config, "processors") if step["type"] != "ByteLevel"]
        if len(templates) > 1:
            raise ValueError(
                "`post_processor` of a tokenizer.json must have one step at most that adds tokens. "
                f"Received: {[step['type'] for step in templates]}"
            )
        self._single = [_Part(_FIRST, 0)]
        self._pair = [_Part(_FIRST, 0), _Part(_SECOND, 1)]
        if templates:
            kind = templates[0]["type"]
            if kind not in _READERS:
                raise ValueError(
                    f"`post_processor` of a tokenizer.json must be null, Sequence, ByteLevel or one of "
                    f"{sorted(_READERS)}. Received: {kind!r}"
                )
            self._single, self._pair = _READERS[kind](templates[0])
        for part in (*self._single, *self._pair):
            ids = () if isinstance(part.content, str) else part.content
            if not all(0 <= token_id < vocabulary_size for token_id in ids):
                raise ValueError(
                    f"The ids of `post_processor` must be from 0 to {vocabulary_size - 1}. Received: {ids}"
                )

    def apply(
        self,
        texts: tf.RaggedTensor,
        second_texts: tf.RaggedTensor | None = None,
        add_special_tokens: bool = True,
    ) -> tuple[tf.RaggedTensor, tf.RaggedTensor]:
        """Puts together one row of ids for each text or pair of texts.

        Args:
            texts: `[batch, None]` int32 ids.
            second_texts: As `texts`, the second of each pair; None for single texts.
            add_special_tokens: Whether the special ids are put around; without them the texts
                themselves are still in the template's order and of its types.

        Returns:
            `[batch, None]` int32 ids, and the type id (which text it belongs to) of each.
        """
        rows = {_FIRST: texts, _SECOND: second_texts}
        ids, type_ids = [], []
        for part in self._single if second_texts is None else self._pair:
            if isinstance(part.content, str):
                row = rows[part.content]
            elif add_special_tokens:
                batch = tf.size(texts.row_splits) - 1
                row = tf.RaggedTensor.from_tensor(
                    tf.tile(tf.constant([part.content], tf.int32), [batch, 1])
                )
            else:
                continue
            ids.append(row.with_row_splits_dtype(tf.int64))
            type_ids.append(ids[-1].with_values(tf.fill(tf.shape(row.values), part.type_id)))
        return tf.concat(ids, 1), tf.concat(type_ids, 1)


def _read_template(step: dict) -> tuple[list[_Part], list[_Part]]:
    special_ids = {}
    for name, token in field(step, "special_tokens", dict).items():
        ids = field(token, "ids", list) if isinstance(token, dict) else None
        if ids is None or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ValueError(f"A special token of a template must have ids. Received: {token!r}")
        special_ids[name] = tuple(ids)

    def read(pieces: list, texts: tuple[str, ...]) -> list[_Part]:
        parts = []
        for piece in pieces:
            if not isinstance(piece, dict) or len(piece) != 1:
                raise ValueError(
                    f"A piece of a template must be an object with one entry. Received: {piece!r}"
                )
            kind = next(iter(piece))
            inner = field(piece, kind, dict)
            name, type_id = field(inner, "id", str), field(inner, "type_id", int)
            known = {"SpecialToken": special_ids, "Sequence": dict.fromkeys(texts)}.get(kind, {})
            if name not in known or not 0 <= type_id < 1 << 31:
                raise ValueError(f"A template must name special tokens and texts. Received: {piece!r}")
            parts.append(_Part(name if kind == "Sequence" else special_ids[name], type_id))
        if not {*texts} <= {part.content for part in parts}:
            raise ValueError(f"A template must hold the texts {texts}. Received: {pieces!r}")
        return parts

    return (
        read(field(step, "single", list), (_FIRST,)),
        read(field(step, "pair", list), (_FIRST, _SECOND)),
    )


def _read_pair(step: dict, name: str) -> tuple[int, ...]:
    """The id of an entry like ["[SEP]", 102]."""
    pair = field(step, name, list)
    if len(pair) != 2 or not isinstance(pair[1], int) or isinstance(pair[1], bool):
        raise ValueError(f"`{name}` of a post-processor must be a token and its id. Received: {pair!r}")
    return (pair[1],)


def _read_bert(step: dict) -> tuple[list[_Part], list[_Part]]:
    """[CLS] A [SEP] and [CLS] A [SEP] B [SEP]; the second text and its end are of type 1."""
    sep, cls = _read_pair(step, "sep"), _read_pair(step, "cls")
    single = [_Part(cls, 0), _Part(_FIRST, 0), _Part(sep, 0)]
    return single, [*single, _Part(_SECOND, 1), _Part(sep, 1)]


def _read_roberta(step: dict) -> tuple[list[_Part], list[_Part]]:
    """<s> A </s> and <s> A </s></s> B </s>; all of type 0."""
    sep, cls = _read_pair(step, "sep"), _read_pair(step, "cls")
    single = [_Part(cls, 0), _Part(_FIRST, 0), _Part(sep, 0)]
    return single, [*single, _Part(sep, 0), _Part(_SECOND, 0), _Part(sep, 0)]


_READERS = {
    "TemplateProcessing": _read_template,
    "BertProcessing": _read_bert,
    "RobertaProcessing": _read_roberta,
}
