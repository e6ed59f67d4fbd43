"""The tokenizer.json of a SentencePiece model, as transformers makes it."""

import base64
import json
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from kerasllm.tokenizers.folder import PLAIN_CLASSES
from kerasllm.tokenizers.json_fields import LONGEST_TOKEN, field, spelling

_MARK = "\u2581"
_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

# How transformers' classes treat a model. Those not here read its vocabulary in ways of their own.
_LLAMA = ("Llama", "CodeLlama", "Gemma", "Mistral")
_T5 = ("T5", "MT5")
_XLM_ROBERTA = ("XLMRoberta",)
_WORDS = (*_T5, *_XLM_ROBERTA)  # These drop all whitespace.
_T5_EXTRA_IDS = 100
_MOST_EXTRA_IDS = 10_000
# Per token, on average. By default the trainer makes none of more than 16 characters, so 15 merges.
_MOST_MERGES = 32


def json_from_model(content: bytes, settings: dict[str, Any]) -> str:
    """Makes a tokenizer.json.

    The ids are those of transformers. The sentencepiece package has others in a few places: it adds
    scores up in single precision and over the whole text, so that a unigram model may choose another
    one of two ways to cut a word that are equally likely; it replaces code points one by one where
    `tokenizers` replaces a letter with its marks; spaces at the beginning of a text may count
    otherwise; and it never takes the spelling of `<unk>` for the token.

    Args:
        content: A SentencePiece model: unigram or BPE.
        settings: Contents of tokenizer_config.json. `tokenizer_class` says which of transformers'
            classes to follow; without one, what the model itself says counts. Special tokens that are
            not named are added.

    Returns:
        The text of a tokenizer.json.

    Raises:
        ValueError: If the model is damaged or of a kind that is not supported.
    """
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        pieces = [(piece.piece, float(piece.score), piece.type) for piece in model.pieces]
    except (DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"A SentencePiece model must be readable. Received: {error}") from error
    # What is no UTF-8 comes as bytes, or raises above, as protobuf's versions like.
    if not all(isinstance(piece, str) for piece, _, _ in pieces):
        raise ValueError("The tokens of a SentencePiece model must be UTF-8. Received: some that are not")
    longest = max((len(piece) for piece, _, _ in pieces), default=0)
    if longest > LONGEST_TOKEN:
        raise ValueError(
            f"The tokens of a SentencePiece model must have up to {LONGEST_TOKEN} characters. "
            f"Received: one of {longest}"
        )
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE) or trainer.treat_whitespace_as_suffix:
        raise ValueError(
            "A SentencePiece model must be unigram (1) or BPE (2), with the mark before words. Received: "
            f"model_type={trainer.model_type}, "
            f"treat_whitespace_as_suffix={trainer.treat_whitespace_as_suffix}"
        )
    if not pieces or not normalizer.escape_whitespaces:
        raise ValueError(
            "A SentencePiece model must have tokens, and `escape_whitespaces`. Received: "
            f"{len(pieces)} tokens, escape_whitespaces={normalizer.escape_whitespaces}"
        )
    kind = field(settings, "tokenizer_class", str, "").removesuffix("Fast").removesuffix("Tokenizer")
    if kind not in (*_LLAMA, *_T5, *_XLM_ROBERTA, *PLAIN_CLASSES):
        raise ValueError(
            "`tokenizer_class` of a SentencePiece model without a tokenizer.json must be one of "
            f"{[*_LLAMA, *_T5, *_XLM_ROBERTA]} and Tokenizer, or none. Received: {kind}Tokenizer"
        )
    return json.dumps(_config(kind, model, pieces, settings), ensure_ascii=False)


def _config(
    kind: str, model: Any, pieces: list[tuple[str, float, int]], settings: dict[str, Any]
) -> dict[str, Any]:
    trainer = model.trainer_spec
    unk_id = trainer.unk_id
    if kind in _T5:
        count = field(settings, "extra_ids", int, _T5_EXTRA_IDS if kind == "T5" else 0)
        if not 0 <= count <= _MOST_EXTRA_IDS:
            raise ValueError(f"`extra_ids` must be from 0 to {_MOST_EXTRA_IDS}. Received: {count}")
        extra = [(f"<extra_id_{i}>", 0.0, _CONTROL) for i in reversed(range(count))]
        present = {piece for piece, _, _ in pieces}
        pieces = pieces + [piece for piece in extra if piece[0] not in present]
    if kind in _XLM_ROBERTA:
        first = [("<s>", 0.0, _CONTROL), ("<pad>", 0.0, _CONTROL), ("</s>", 0.0, _CONTROL)]
        pieces = [*first, ("<unk>", 0.0, _UNKNOWN), *pieces[3:], ("<mask>", 0.0, _CONTROL)]
        unk_id = 3
    if not 0 <= unk_id < len(pieces):
        raise ValueError(f"`unk_id` of a SentencePiece model must be the id of a token. Received: {unk_id}")
    ids = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    if len(ids) < len(pieces) or "" in ids:
        raise ValueError(
            "The tokens of a SentencePiece model must differ and not be empty. Received: "
            f"{len(pieces)} tokens, {len(ids)} different"
        )
    _name_tokens(kind, trainer, pieces, settings)
    config = {
        "version": "1.0",
        "added_tokens": [
            _added_token(piece, i, piece_type)
            for i, (piece, _, piece_type) in enumerate(pieces)
            if piece_type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": _normalizer(kind, model, settings),
        "post_processor": _post_processor(kind, settings, ids),
    }
    scheme = _prepend_scheme(kind, model.normalizer_spec, settings)
    metaspace = {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": scheme, "split": True}
    byte_fallback = trainer.byte_fallback and kind not in _WORDS
    if trainer.model_type == _BPE:
        is_legacy = _is_legacy(kind, model.normalizer_spec, settings)
        config["pre_tokenizer"] = None if is_legacy else metaspace | {"split": False}
        config["model"] = {
            "type": "BPE",
            "unk_token": pieces[unk_id][0],
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "vocab": ids,
            "merges": _merges(pieces, ids),
        }
    else:
        words = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
        config["pre_tokenizer"] = words if kind in _WORDS else metaspace
        config["model"] = {
            "type": "Unigram",
            "unk_id": unk_id,
            "byte_fallback": byte_fallback,
            "vocab": [[piece, score] for piece, score, _ in pieces],
        }
    if trainer.model_type == _BPE or byte_fallback:
        decoders = [
            {"type": "Replace", "pattern": {"String": _MARK}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ]
        if scheme != "never":
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        config["decoder"] = {"type": "Sequence", "decoders": decoders}
    else:
        config["decoder"] = metaspace
    return config


def _name_tokens(
    kind: str, trainer: Any, pieces: list[tuple[str, float, int]], settings: dict[str, Any]
) -> None:
    """Adds to the settings which token is which."""
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if kind in _XLM_ROBERTA:
        names |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    else:
        token_ids = {
            "unk": trainer.unk_id,
            "bos": trainer.bos_id,
            "eos": trainer.eos_id,
            "pad": trainer.pad_id,
        }
        names = {
            f"{name}_token": pieces[token_id][0]
            for name, token_id in token_ids.items()
            if 0 <= token_id < len(pieces)
        }
    for name, token in names.items():
        settings.setdefault(name, token)


def _added_token(content: str, token_id: int, piece_type: int) -> dict[str, Any]:
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    options["lstrip"] = content == "<mask>"
    return {"id": token_id, "content": content, "special": piece_type != _USER_DEFINED} | options


def _normalizer(kind: str, model: Any, settings: dict[str, Any]) -> dict[str, Any] | None:
    spec = model.normalizer_spec
    steps = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    # The pre-tokenizer of T5 and XLM-R drops all whitespace.
    if spec.remove_extra_whitespaces and kind not in _WORDS:
        steps.append({"type": "Strip", "strip_left": False, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": _MARK})
    if model.trainer_spec.model_type == _BPE and _is_legacy(kind, spec, settings):
        if _prepend_scheme(kind, spec, settings) != "never":
            steps.append({"type": "Prepend", "prepend": _MARK})
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _MARK})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def _is_legacy(kind: str, spec: Any, settings: dict[str, Any]) -> bool:
    """Whether text after a special token gets a mark as at the beginning, whatever it begins with.

    Where a model drops spaces at the beginning of a text, the pre-tokenizer has to put the mark.
    """
    return field(settings, "legacy", bool, kind not in _LLAMA) and not spec.remove_extra_whitespaces


def _prepend_scheme(kind: str, spec: Any, settings: dict[str, Any]) -> str:
    if not field(settings, "add_prefix_space", bool, spec.add_dummy_prefix):
        return "never"
    return "always" if field(settings, "legacy", bool, kind not in _LLAMA) else "first"


def _post_processor(kind: str, settings: dict[str, Any], ids: dict[str, int]) -> dict[str, Any] | None:
    adds_bos = field(settings, "add_bos_token", bool, kind in (*_LLAMA, *_XLM_ROBERTA))
    adds_eos = field(settings, "add_eos_token", bool, kind in _WORDS)
    bos = spelling(settings, "bos_token") if adds_bos else None
    eos = spelling(settings, "eos_token") if adds_eos else None
    if bos is None and eos is None:
        return None
    missing = [token for token in (bos, eos) if token is not None and token not in ids]
    if missing:
        raise ValueError(f"The tokens around texts must be in the vocabulary. Received: {missing}")

    def part(text: str, type_id: int) -> list[dict[str, Any]]:
        around = [
            [{"SpecialToken": {"id": token, "type_id": type_id}}] if token else [] for token in (bos, eos)
        ]
        return [*around[0], {"Sequence": {"id": text, "type_id": type_id}}, *around[1]]

    # Only XLM-R has a token of its own between two texts, and it has no types.
    second = part("B", 0 if kind in _WORDS else 1)
    if kind in _XLM_ROBERTA:
        second[0] = {"SpecialToken": {"id": eos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *second],
        "special_tokens": {
            token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (bos, eos) if token
        },
    }


def _merges(pieces: list[tuple[str, float, int]], ids: dict[str, int]) -> list[list[str]]:
    """The merges that make the tokens, the one of the highest score first."""
    merges = []
    for piece, score, _ in pieces:
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [
            (ids[left], ids[right], left, right) for left, right in cuts if left in ids and right in ids
        ]
        merges += [(score, len(left), len(right), left, right) for _, _, left, right in sorted(pairs)]
        if len(merges) > _MOST_MERGES * len(pieces):
            raise ValueError(
                f"The tokens of a SentencePiece model must be made by up to {_MOST_MERGES} merges each, on "
                f"average. Received: more, of {len(pieces)} tokens"
            )
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [[left, right] for *_, left, right in merges]
