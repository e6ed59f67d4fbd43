r"""The pre-tokenizers of byte-level BPE as regular expressions that TensorFlow has.

A tokenizer.json brings patterns of its own. They are never compiled as they are: those in use are
known here by their text, and turned into RE2's. Two things differ from the `tokenizers` library:

- RE2 has no look-ahead. All patterns use `\s+(?!\S)|\s+`, which leaves the last of several whitespace
  characters to the word that follows. A first rewrite cuts there; then `\s+` does the same.
- RE2 has another Unicode, so every class of characters is spelled out.
"""

import re
from typing import Any

from kerasllm.tokenizers.json_fields import field, steps
from kerasllm.tokenizers.marks import SEPARATOR
from kerasllm.tokenizers.unicode import unicode_class

Rewrite = tuple[str, bytes]

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_WHITESPACE_AND_LINES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

GPT2 = _CONTRACTIONS + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    + _WHITESPACE_AND_LINES
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _WHITESPACE_AND_LINES
)
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _WHITESPACE_AND_LINES
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:{_CONTRACTIONS})?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:{_CONTRACTIONS})?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _WHITESPACE_AND_LINES
)
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*" + _WHITESPACE_AND_LINES
)

# Each with whether it leaves nothing of a text between its matches.
PATTERNS: dict[str, bool] = {
    GPT2: True,
    LLAMA3: True,
    QWEN2: True,
    QWEN35: True,
    TEKKEN: True,
    GPT4O: True,
    DEEPSEEK3: False,
    # DeepSeek's other steps.
    r"[\r\n]": False,
    r"\s?\p{L}+": False,
    r"\s?\p{P}+": False,
    r"\p{N}{1,3}": False,
    r"\p{N}": False,
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+": False,
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+": False,
}
# In some files the line ends in a class are the characters themselves.
PATTERNS |= {pattern.replace(r"\r\n", "\r\n"): covers for pattern, covers in PATTERNS.items()}

_CLASSES = {
    r"\p{L}": ("letter",),
    r"\p{N}": ("number",),
    r"\p{M}": ("mark",),
    r"\p{P}": ("punctuation",),
    r"\p{S}": ("symbol",),
    r"\p{Lu}": ("uppercase",),
    r"\p{Ll}": ("lowercase",),
    r"\p{Lt}": ("titlecase",),
    r"\p{Lm}": ("modifier",),
    r"\p{Lo}": ("other_letter",),
    r"\s": ("space",),
}

GPT2_PRE_TOKENIZER = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
QWEN2_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ],
}


def byte_level_rewrites(pre_tokenizer: dict[str, Any] | None) -> list[Rewrite]:
    """What cuts a text as the pre-tokenizer of a byte-level BPE does.

    Args:
        pre_tokenizer: The entry of a tokenizer.json.

    Returns:
        Regular expressions and rewrites that put a SEPARATOR between pieces, one after the other.
        A space may come before the text.

    Raises:
        ValueError: If it is not one of those known.
    """
    all_steps = steps(pre_tokenizer, "pretokenizers")
    kinds = [step["type"] for step in all_steps]
    if kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel":
        raise ValueError(
            "The last step of the `pre_tokenizer` of a byte-level BPE, and no other, must be of type "
            f"ByteLevel. Received: {kinds}"
        )
    rewrites = []
    for step in all_steps:
        kind = step["type"]
        if kind not in _STEPS:
            raise ValueError(
                f"`pre_tokenizer` of byte-level BPE must be made of {sorted(_STEPS)}. Received: {kind!r}"
            )
        new = _STEPS[kind](step)
        if rewrites and kind == "ByteLevel" and field(step, "add_prefix_space", bool, True):
            raise ValueError(
                "`add_prefix_space` of ByteLevel must be false after other steps, for each of their pieces "
                f"would get a space. Received: {step}"
            )
        rewrites += new
    return rewrites


def _byte_level(step: dict[str, Any]) -> list[Rewrite]:
    rewrites = []
    if field(step, "add_prefix_space", bool, True):
        rewrites.append((r"^([^ ])", rb" \1"))
    if field(step, "use_regex", bool, True):
        rewrites += _rewrites_of(GPT2)
    return rewrites


def _digits(step: dict[str, Any]) -> list[Rewrite]:
    count = "" if field(step, "individual_digits", bool, False) else "+"
    return [(f"[{unicode_class('digit')}]{count}", SEPARATOR + rb"\0" + SEPARATOR)]


def _split(step: dict[str, Any]) -> list[Rewrite]:
    pattern = field(step, "pattern", dict)
    if (
        set(pattern) != {"Regex"}
        or not isinstance(pattern["Regex"], str)
        or pattern["Regex"] not in PATTERNS
    ):
        raise ValueError(
            "`pattern` of the pre-tokenizer Split must be one of those known: of GPT-2, Llama 3, Qwen 2, "
            f"Qwen 3.5, Tekken, GPT-4o and DeepSeek. Received: {str(pattern)[:500]}"
        )
    pattern = pattern["Regex"]
    behavior, invert = field(step, "behavior", str), field(step, "invert", bool, False)
    # To keep all matches as pieces and remove the rest is the same where there is no rest.
    is_isolated = behavior == "Isolated" or (behavior == "Removed" and invert and PATTERNS[pattern])
    if not is_isolated:
        raise ValueError(
            "`behavior` of the pre-tokenizer Split must be Isolated. Received: "
            f"behavior={behavior!r}, invert={invert}"
        )
    return _rewrites_of(pattern)


_STEPS = {"ByteLevel": _byte_level, "Digits": _digits, "Split": _split}


def _rewrites_of(pattern: str) -> list[Rewrite]:
    before = b"" if PATTERNS[pattern] else SEPARATOR
    rewrites = []
    if r"\s+(?!\S)|" in pattern:
        # The patterns that know of lines take whitespace up to the last line end as one piece.
        knows_lines = r"|\s*[" in pattern
        last = unicode_class("space", without="\r\n" if knows_lines else "")
        rewrites.append((f"([{last}])([{last}][^{unicode_class('space')}])", rb"\1" + SEPARATOR + rb"\2"))
    rewrites.append((_as_re2(pattern.replace(r"\s+(?!\S)|", "")), before + rb"\0" + SEPARATOR))
    return rewrites


def _as_re2(pattern: str) -> str:
    """Spells out the classes of characters in one of the PATTERNS."""
    translated = []
    in_brackets = False
    for part in re.findall(r"\\p\{\w+\}|\\.|.", pattern, re.DOTALL):
        if part in _CLASSES:
            inside = unicode_class(*_CLASSES[part])
            part = inside if in_brackets else f"[{inside}]"
        elif part in "[]":
            in_brackets = part == "["
        translated.append(part)
    return "".join(translated)
