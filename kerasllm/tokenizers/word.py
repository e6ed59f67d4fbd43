"""Word-level tokenizer: every frequent word, number or run of punctuation is one token."""

from kerasllm.tokenizers.base import Tokenizer
from kerasllm.tokenizers.marks import SEPARATOR
from kerasllm.tokenizers.unicode import unicode_class

# Every character belongs to exactly one piece, so that the pieces put together are the text:
# a word or a run of punctuation, each with the space before it, or one whitespace character.
# The brackets around the first \w matter: without them the library counts "½" as a word there, but
# as punctuation in the second part.
WORD_PATTERN = r" ?[\w]+| ?[^\w\s]+|\s"
WORD_PRE_TOKENIZER = {
    "type": "Split",
    "pattern": {"Regex": WORD_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}


class WordTokenizer(Tokenizer):
    """One token for each known word with the space before it; `<unk>` for the other words."""

    _supports = f"WordLevel with the pre-tokenizer Split on the regular expression {WORD_PATTERN!r}"

    @classmethod
    def _describes(cls, config: dict) -> bool:
        is_word_level = config["model"].get("type") == "WordLevel"
        return is_word_level and config.get("pre_tokenizer") == WORD_PRE_TOKENIZER

    def _cuts(self) -> list[tuple[str, bytes]]:
        word, space = unicode_class("word"), unicode_class("space")
        return [(f" ?[{word}]+| ?[^{word}{space}]+|[{space}]", rb"\0" + SEPARATOR)]
