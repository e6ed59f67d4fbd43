"""Character tokenizer: every code point is one token."""

from kerasllm.tokenizers.base import Tokenizer
from kerasllm.tokenizers.marks import SEPARATOR

CHARACTER_PATTERN = r"[\s\S]"
CHARACTER_PRE_TOKENIZER = {
    "type": "Split",
    "pattern": {"Regex": CHARACTER_PATTERN},
    "behavior": "Isolated",
    "invert": False,
}


class CharacterTokenizer(Tokenizer):
    """One token for each known code point; `<unk>` for the others."""

    _supports = f"WordLevel with the pre-tokenizer Split on the regular expression {CHARACTER_PATTERN!r}"

    @classmethod
    def _describes(cls, config: dict) -> bool:
        is_word_level = config["model"].get("type") == "WordLevel"
        return is_word_level and config.get("pre_tokenizer") == CHARACTER_PRE_TOKENIZER

    def _cuts(self) -> list[tuple[str, bytes]]:
        return [(r"(?s).", rb"\0" + SEPARATOR)]
