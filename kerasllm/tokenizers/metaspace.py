"""The pre-tokenizers of SentencePiece tokenizers: a mark stands for a space and begins a word."""

from typing import Any

import tensorflow as tf

from kerasllm.tokenizers.code_points import CodePoints
from kerasllm.tokenizers.json_fields import field, steps
from kerasllm.tokenizers.marks import SEPARATOR
from kerasllm.tokenizers.normalizers import literal_pattern, literal_rewrite

_SUPPORTED = "null; Metaspace, maybe after WhitespaceSplit; or Split on a String, MergedWithPrevious"


class Metaspace:
    """Marks in texts where a pre-tokenizer cuts them.

    Args:
        config: The entry `pre_tokenizer` of a tokenizer.json.

    Attributes:
        splits: Whether it cuts at all.

    Raises:
        ValueError: If the pre-tokenizer is not supported.
    """

    def __init__(self, config: dict[str, Any] | None):
        all_steps = steps(config, "pretokenizers")
        kinds = [step["type"] for step in all_steps]
        self.splits = False
        self._mark = None
        self._rewrites: list[tuple[str, bytes]] = []
        self._splits_whitespace = kinds == ["WhitespaceSplit", "Metaspace"]
        if kinds == ["Metaspace"] or self._splits_whitespace:
            self._read_metaspace(all_steps[-1])
        elif kinds == ["Split"]:
            self._read_split(all_steps[0])
        elif kinds:
            raise ValueError(f"`pre_tokenizer` of a tokenizer.json must be {_SUPPORTED}. Received: {kinds}")

    @staticmethod
    def describes(config: dict[str, Any] | None) -> bool:
        """Whether a pre-tokenizer is of the kind, if not in each detail."""
        kinds = {step["type"] for step in steps(config, "pretokenizers")}
        return kinds <= {"Metaspace", "WhitespaceSplit", "Split"}

    def _read_metaspace(self, step: dict[str, Any]) -> None:
        self._mark = field(step, "replacement", str)
        if len(self._mark) != 1:
            raise ValueError(f"`replacement` of Metaspace must be one character. Received: {self._mark!r}")
        # Older files say it by a flag.
        default = "always" if field(step, "add_prefix_space", bool, True) else "never"
        self._prepend_scheme = field(step, "prepend_scheme", str, default)
        if self._prepend_scheme not in ("always", "first", "never"):
            raise ValueError(
                "`prepend_scheme` of Metaspace must be always, first or never. Received: "
                f"{self._prepend_scheme!r}"
            )
        self.splits = field(step, "split", bool, True) or self._splits_whitespace
        if self._splits_whitespace and (
            self._prepend_scheme == "first" or not field(step, "split", bool, True)
        ):
            raise ValueError(
                "Metaspace after WhitespaceSplit must have `split`, and not the `prepend_scheme` first. "
                f"Received: {step}"
            )

    def _read_split(self, step: dict[str, Any]) -> None:
        pattern = field(step, "pattern", dict)
        is_string = set(pattern) == {"String"} and field(pattern, "String", str) != ""
        if not is_string or step.get("behavior") != "MergedWithPrevious" or step.get("invert"):
            raise ValueError(f"`pre_tokenizer` of a tokenizer.json must be {_SUPPORTED}. Received: {step}")
        self.splits = True
        self._rewrites = [(literal_pattern(pattern["String"]), rb"\0" + SEPARATOR)]

    def mark_cuts(self, texts: tf.Tensor, begins_text: tf.Tensor) -> tf.Tensor:
        """Puts a SEPARATOR between pieces.

        Args:
            texts: `[texts]` strings.
            begins_text: `[texts]` bool, whether nothing of a text is before this part of it.

        Returns:
            `[texts]` strings.
        """
        if self._splits_whitespace:
            return self._mark_words(texts)
        if self._mark is not None:
            mark = literal_rewrite(self._mark)
            texts = tf.strings.regex_replace(texts, " ", mark)
            if self._prepend_scheme != "never":
                bare = ~tf.strings.regex_full_match(texts, f"(?s)(?:{literal_pattern(self._mark)}.*)?")
                prepend = bare if self._prepend_scheme == "always" else bare & begins_text
                texts = tf.where(prepend, tf.strings.join([self._mark, texts]), texts)
            if self.splits:
                texts = tf.strings.regex_replace(texts, literal_pattern(self._mark), SEPARATOR + rb"\0")
        for pattern, rewrite in self._rewrites:
            texts = tf.strings.regex_replace(texts, pattern, rewrite)
        return texts

    def _mark_words(self, texts: tf.Tensor) -> tf.Tensor:
        """Whitespace goes, and each word is cut before its marks; it gets one if it begins with none."""
        space, mark = CodePoints.named("whitespace").pattern(), literal_pattern(self._mark)
        new_mark = b"" if self._prepend_scheme == "never" else literal_rewrite(self._mark)

        def with_own_marks() -> tf.Tensor:
            words = f"{mark}([^{space}]*)|([^{space}]+)" if new_mark else f"([^{space}]+)"
            rewrite = SEPARATOR + new_mark + (rb"\1\2" if new_mark else rb"\1") + SEPARATOR
            marked = tf.strings.regex_replace(texts, words, rewrite)
            marked = tf.strings.regex_replace(marked, f"[{space}]+", SEPARATOR)
            return tf.strings.regex_replace(marked, mark, SEPARATOR + rb"\0")

        def without() -> tf.Tensor:
            marked = tf.strings.regex_replace(texts, f"[{space}]+", SEPARATOR)
            return tf.strings.regex_replace(marked, f"[^{space}]+", SEPARATOR + new_mark + rb"\0")

        has_marks = tf.reduce_any(tf.strings.regex_full_match(texts, f"(?s).*{mark}.*"))
        return tf.cond(has_marks, with_own_marks, without)
