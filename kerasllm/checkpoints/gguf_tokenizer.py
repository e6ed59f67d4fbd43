"""From the vocabulary in a GGUF file to the text of a tokenizer.json."""

import base64
import json
import reprlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kerasllm.tokenizers import Tokenizer
from kerasllm.tokenizers.json_fields import LONGEST_TOKEN

_PREFIX = "tokenizer.ggml."
# Hugging Face's names of special tokens to llama.cpp's, which are not all spelled right.
_SPECIAL_TOKENS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
    "sep": "seperator",
    "cls": "cls",
    "mask": "mask",
}
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
# Of these, llama.cpp begins each text with BOS where the file does not say whether.
_BEGIN_WITH_BOS = ("llama3", "llama-v3", "llama-bpe")
# Ends of a text, of a turn and of a message: generation stops at each.
_ENDS = ("eos", "eot", "eom")

# Of a vocabulary, an error message shows the beginning.
_short = reprlib.repr

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer that cuts by a regular expression, and bytes after that."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_BYTE_LEVEL, "use_regex": False}]}


_DIGITS_THEN_WORDS = {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTE_LEVEL]}
_LLAMA3 = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# llama.cpp's name -> the pre-tokenizer of the tokenizer.json that it was made from, the normaliser, and
# whether a piece that is a token is not merged.
_PRE_TOKENIZERS = {
    "gpt-2": (_BYTE_LEVEL, None, False),
    "default": (_BYTE_LEVEL, None, False),
    "smollm": (_DIGITS_THEN_WORDS, None, False),
    "starcoder": (_DIGITS_THEN_WORDS, None, False),
    "refact": (_DIGITS_THEN_WORDS, None, False),
    "llama-bpe": (_LLAMA3, None, True),
    "llama3": (_LLAMA3, None, True),
    "llama-v3": (_LLAMA3, None, True),
    "smaug-bpe": (_LLAMA3, None, True),
    "qwen2": (_QWEN2, {"type": "NFC"}, False),
}


def read_tokenizer(metadata: dict[str, Any]) -> tuple[Tokenizer | None, dict[str, Any]]:
    """Makes the tokenizer of a GGUF file.

    Args:
        metadata: The file's metadata.

    Returns:
        The tokenizer, or None if the file has none; and what generation_config.json would say of its
        tokens.

    Raises:
        ValueError: If the vocabulary is incomplete or of an unknown kind.
    """
    if f"{_PREFIX}model" not in metadata:
        return None, {}
    json_text = tokenizer_json(metadata)
    vocabulary = _Vocabulary(metadata)
    settings = {
        f"{ours}_token": vocabulary.special_token(theirs)
        for ours, theirs in _SPECIAL_TOKENS.items()
        if vocabulary.special_id(theirs) is not None
    }
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        if not isinstance(template, str):
            raise ValueError(f"tokenizer.chat_template must be a text. Received: {_short(template)}")
        settings["chat_template"] = template
    generation: dict[str, Any] = {}
    if (bos_id := vocabulary.special_id("bos")) is not None:
        generation["bos_token_id"] = bos_id
    ends = [number for name in _ENDS if (number := vocabulary.special_id(name)) is not None]
    if ends := list(dict.fromkeys(ends)):
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return Tokenizer.from_json(json_text, settings=settings), generation


def tokenizer_json(metadata: dict[str, Any]) -> str:
    """Writes the tokenizer.json that tokenizes as llama.cpp's vocabulary does.

    Args:
        metadata: The metadata of a GGUF file.

    Returns:
        The text of the tokenizer.json.

    Raises:
        ValueError: If the vocabulary is incomplete or of an unknown kind.
    """
    kind = metadata.get(f"{_PREFIX}model")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{_PREFIX}model must be one of {sorted(_KINDS)}. Received: {kind!r}")
    vocabulary = _Vocabulary(metadata)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": vocabulary.post_processor(kind),
        "decoder": None,
        "model": None,
        **_KINDS[kind](vocabulary),
    }
    return json.dumps(content, ensure_ascii=False)


class _Vocabulary:
    """The checked `tokenizer.ggml.*` metadata."""

    def __init__(self, metadata: dict[str, Any]):
        self._metadata = metadata
        self.tokens: list[str] = self.get("tokens", list)
        if not all(isinstance(t, str) for t in self.tokens) or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(
                f"{_PREFIX}tokens must be texts, no two equal. Received: {_short(self.tokens)}"
            )
        self.kinds: Sequence[int] = self._numbers("token_type", 1)
        self.scores: Sequence[float] = self._numbers("scores", 0.0)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(_PREFIX + name, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{_PREFIX}{name} must be of type {kind.__name__}. Received: {_short(value)}")
        return value

    def _numbers(self, name: str, default: float) -> Sequence:
        numbers = self._metadata.get(_PREFIX + name)
        if numbers is None:
            return [default] * len(self.tokens)
        if not isinstance(numbers, np.ndarray) or len(numbers) != len(self.tokens):
            raise ValueError(f"{_PREFIX}{name} must be a number per token. Received: {_short(numbers)}")
        return numbers.tolist()

    def special_id(self, name: str) -> int | None:
        key = f"{name}_token_id"
        if f"{_PREFIX}{key}" not in self._metadata:
            return None
        if not 0 <= (number := self.get(key, int)) < len(self.tokens):
            raise ValueError(f"{_PREFIX}{key} must be one of {len(self.tokens)} ids. Received: {number}")
        return number

    def special_token(self, name: str, default: str | None = None) -> str | None:
        number = self.special_id(name)
        return default if number is None else self.tokens[number]

    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens that are found in a text before it is cut."""
        special = {self.special_id(name) for name in _SPECIAL_TOKENS.values()}
        added = []
        for number, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            is_special = kind in (_UNKNOWN, _CONTROL) or number in special
            if is_special or kind == _USER_DEFINED:
                options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                added.append({"id": number, "content": token, **options, "special": is_special})
        return added

    def post_processor(self, kind: str) -> dict[str, Any] | None:
        """What adds a first and a last token to a text."""
        bos, eos = self.special_token("bos"), self.special_token("eos")
        before, after = [], []
        if kind == "bert":
            before, after = [self.special_token("cls", bos)], [self.special_token("seperator", eos)]
        else:
            is_llama3 = kind == "gpt2" and self.get("pre", str, "default") in _BEGIN_WITH_BOS
            if self.get("add_bos_token", bool, kind == "llama" or (is_llama3 and bos is not None)):
                before = [bos]
            if self.get("add_eos_token", bool, kind == "t5"):
                after = [eos]
        if None in before + after:
            raise ValueError(f"A text begins or ends with a token that {_PREFIX}*_token_id does not name")
        if not before + after:
            return None
        ids = {token: self.tokens.index(token) for token in before + after}

        def template(name: str, segment: int) -> list[dict[str, Any]]:
            def special(token: str) -> dict[str, Any]:
                return {"SpecialToken": {"id": token, "type_id": segment}}

            text = {"Sequence": {"id": name, "type_id": segment}}
            # Of a pair of texts, BERT's second has no first token.
            first = [special(token) for token in before] if name == "A" or kind != "bert" else []
            return [*first, text, *(special(token) for token in after)]

        return {
            "type": "TemplateProcessing",
            "single": template("A", 0),
            "pair": template("A", 0) + template("B", 1),
            "special_tokens": {
                token: {"id": token, "ids": [number], "tokens": [token]} for token, number in ids.items()
            },
        }

    def ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


def _byte_level(vocabulary: _Vocabulary) -> dict[str, Any]:
    """Byte-level BPE, as GPT-2's."""
    name = vocabulary.get("pre", str, "default")
    if name not in _PRE_TOKENIZERS:
        raise ValueError(f"{_PREFIX}pre must be one of {sorted(_PRE_TOKENIZERS)}. Received: {name!r}")
    pre_tokenizer, normalizer, ignore_merges = _PRE_TOKENIZERS[name]
    merges = [str(merge).split(" ") for merge in vocabulary.get("merges", list)]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"A merge must be two tokens with a space between. Received: {_short(wrong)}")
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": _bpe(vocabulary.ids(), merges, ignore_merges=ignore_merges),
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **settings) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **settings,
        "vocab": vocabulary,
        "merges": merges,
    }


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> dict[str, Any]:
    """SentencePiece's BPE, as Llama's and Gemma's: what merges first is the token with the best score."""
    ids = vocabulary.ids()
    # Every cut of a token is looked up.
    if (length := max(map(len, ids), default=0)) > LONGEST_TOKEN:
        raise ValueError(
            f"{_PREFIX}tokens must have up to {LONGEST_TOKEN} characters each. Received: one of {length}"
        )
    pairs = []
    for token, number in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                # Order of equal scores as in transformers' conversion of SentencePiece models.
                pairs.append((-vocabulary.scores[number], len(left), len(right), ids[left], ids[right]))
    merges = [[vocabulary.tokens[left], vocabulary.tokens[right]] for *_, left, right in sorted(pairs)]
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if vocabulary.get("add_space_prefix", bool, True):
        normalizers.insert(0, {"type": "Prepend", "prepend": "▁"})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unk_token = vocabulary.special_token("unknown", "<unk>")
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(ids, merges, unk_token=unk_token, fuse_unk=True, byte_fallback=True),
    }


def _wordpiece(vocabulary: _Vocabulary) -> dict[str, Any]:
    """BERT's WordPiece; llama.cpp marks the beginning of a word where BERT marks its continuation."""
    special = {token["content"] for token in vocabulary.added_tokens()} | {"[PAD]"}
    ids = {}
    for number, token in enumerate(vocabulary.tokens):
        if token.startswith("▁"):
            token = token[1:]
        elif token not in special and not (token.startswith("[") and token.endswith("]")):
            token = "##" + token
        ids[token] = number
    # No file says whether letters were made small; a vocabulary with capitals answers it.
    lowercase = not any(token != token.lower() for token in ids if not token.startswith("["))
    return {
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": vocabulary.special_token("unknown", "[UNK]"),
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }


def _unigram(vocabulary: _Vocabulary) -> dict[str, Any]:
    """SentencePiece's unigram model, as T5's."""
    scheme = "always" if vocabulary.get("add_space_prefix", bool, True) else "never"
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
    charsmap = vocabulary.get("precompiled_charsmap", np.ndarray, np.zeros(0, "uint8"))
    normalizers: list[dict[str, Any]] = []
    if charsmap.size:
        text = base64.b64encode(charsmap.astype("uint8").tobytes()).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": text})
    if vocabulary.get("remove_extra_whitespaces", bool, False):
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": metaspace,
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": vocabulary.special_id("unknown"),
            "vocab": [list(pair) for pair in zip(vocabulary.tokens, vocabulary.scores, strict=True)],
            "byte_fallback": False,
        },
    }


# By `tokenizer.ggml.model`.
_KINDS: dict[str, Callable[[_Vocabulary], dict[str, Any]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece_bpe,
    "bert": _wordpiece,
    "t5": _unigram,
}
