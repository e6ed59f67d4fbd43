"""Character classes as the `tokenizers` library has them."""

import json
from functools import cache
from importlib import resources

# What Python's `str.isspace` takes for a space; all of them are in the basic plane.
PYTHON_SPACES = "".join(filter(str.isspace, map(chr, range(0x10000))))


@cache
def _ranges() -> dict[str, list[list[int]]]:
    file = resources.files("kerasllm.tokenizers").joinpath("unicode_ranges.json")
    return json.loads(file.read_text(encoding="utf-8"))


@cache
def unicode_class(*names: str, without: str = "") -> str:
    """The inside of a bracketed regular expression class.

    Args:
        *names: Any of "letter" (`\\p{L}`), "uppercase" (`\\p{Lu}`), "lowercase" (`\\p{Ll}`),
            "titlecase" (`\\p{Lt}`), "modifier" (`\\p{Lm}`), "other_letter" (`\\p{Lo}`), "mark"
            (`\\p{M}`), "number" (`\\p{N}`), "punctuation" (`\\p{P}`), "symbol" (`\\p{S}`), "space"
            (`\\s`), "word" (`[\\w]`); "digit" (of the pre-tokenizer Digits), "added_token_space"
            and "added_token_word" (beside added tokens): these three are of another Unicode.
        without: Characters to leave out.

    Returns:
        Ranges of code points, to be put between `[` or `[^` and `]`.
    """
    ranges = [(first, last) for name in names for first, last in _ranges()[name]]
    for code_point in map(ord, without):
        ranges = [part for whole in ranges for part in _cut_out(*whole, code_point)]
    return "".join(f"\\x{{{first:x}}}-\\x{{{last:x}}}" for first, last in ranges)


def _cut_out(first: int, last: int, code_point: int) -> list[tuple[int, int]]:
    if not first <= code_point <= last:
        return [(first, last)]
    parts = [(first, code_point - 1), (code_point + 1, last)]
    return [(first, last) for first, last in parts if first <= last]
