"""The normalizers of a tokenizer.json, inside the TensorFlow graph.

Most normalizers work character by character and leave most characters alone. So a text is looked at
for those that may change; each different stretch of them, with the character before it, which it may
combine with, is normalized once, whatever the size of the batch.
"""

from collections.abc import Callable

import tensorflow as tf

from kerasllm.tokenizers.code_points import CodePointMap, CodePoints, unicode_map
from kerasllm.tokenizers.json_fields import field, steps
from kerasllm.tokenizers.marks import MARK, SEPARATOR, split_at_separators
from kerasllm.tokenizers.precompiled import Precompiled
from kerasllm.tokenizers.unicode_forms import UnicodeForm

# Those in use. TensorFlow and `tokenizers` read them alike.
_REGULAR_EXPRESSIONS = (" {2,}",)

Rewrite = Callable[[tf.Tensor], tf.Tensor]


def literal_pattern(text: str) -> str:
    """The regular expression that matches a text and nothing else."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def literal_rewrite(text: str) -> bytes:
    """The rewrite of a regular expression that puts a text as it is."""
    return text.replace("\\", "\\\\").encode("utf-8")


class Local:
    """A step that changes some code points, maybe together with their neighbours.

    Args:
        rewrite: What it does, `[texts]` strings -> `[texts]` strings.
        changing: The code points that may change, or may change others next to them: a text without
            any stays as it is, and two texts may be joined, or one cut, between two that are not
            among these.
    """

    def __init__(self, rewrite: Rewrite, changing: CodePoints):
        self.rewrite = rewrite
        self.changing = changing


def build_normalizer(config: dict | None) -> Rewrite:
    """The ops that do what a normalizer of a tokenizer.json does.

    Args:
        config: The entry `normalizer`.

    Returns:
        A function from `[texts]` strings, valid UTF-8, to their normalized forms.

    Raises:
        ValueError: If the normalizer is not supported.
    """
    rewrites: list[Rewrite] = []
    local: list[Local] = []
    for step in _steps(config):
        if isinstance(step, Local):
            local.append(step)
            continue
        if local:
            rewrites.append(_join_local(local))
            local = []
        rewrites.append(step)
    if local:
        rewrites.append(_join_local(local))
    return _in_turn(rewrites)


def _steps(config: dict | None) -> list[Local | Rewrite]:
    built = []
    for step in steps(config, "normalizers"):
        kind = step["type"]
        if kind not in _STEPS:
            raise ValueError(
                f"`normalizer` of a tokenizer.json must be made of {sorted(_STEPS)}. Received: {kind!r}"
            )
        built += _STEPS[kind](step)
    return built


def _in_turn(rewrites: list[Rewrite]) -> Rewrite:
    def rewrite(texts: tf.Tensor) -> tf.Tensor:
        for one in rewrites:
            texts = one(texts)
        return texts

    return rewrite


def _join_local(steps: list[Local]) -> Rewrite:
    """Applies local steps to the stretches of the texts where one of them may change something."""
    changing = steps[0].changing
    for step in steps[1:]:
        changing |= step.changing
    others = (~changing).pattern()
    every_other = f"[{others}]*"
    # The character before a stretch may combine with it, the one after it, too.
    stretch = f"(?:[{others}]?[^{others}]+)+[{others}]?"
    rewrite = _in_turn([step.rewrite for step in steps])

    def rewrite_stretches(texts: tf.Tensor) -> tf.Tensor:
        marked = tf.strings.regex_replace(texts, stretch, SEPARATOR + MARK + rb"\0" + SEPARATOR)
        parts, text_of_part = split_at_separators(marked)
        is_stretch = tf.strings.substr(parts, 0, 1) == MARK
        stretches = tf.where(is_stretch)[:, 0]
        different, index = tf.unique(tf.gather(parts, stretches))
        rewritten = rewrite(tf.strings.substr(different, 1, -1))
        parts = tf.tensor_scatter_nd_update(parts, stretches[:, tf.newaxis], tf.gather(rewritten, index))
        return tf.strings.unsorted_segment_join(parts, text_of_part, tf.size(texts))

    def rewrite_texts(texts: tf.Tensor) -> tf.Tensor:
        nothing_changes = tf.reduce_all(tf.strings.regex_full_match(texts, every_other))
        return tf.cond(nothing_changes, lambda: texts, lambda: rewrite_stretches(texts))

    return rewrite_texts


# The steps


def _bert_normalizer(config: dict) -> list[Local | Rewrite]:
    lowercase = field(config, "lowercase", bool)
    strip_accents = field(config, "strip_accents", bool, lowercase)
    steps: list[Local | Rewrite] = []
    if lowercase:
        # ASCII first, which is fast, and which leaves the other letters to the steps below: none of
        # those brings an ASCII capital up but by taking an accent away.
        steps.append(tf.strings.lower)
    if field(config, "clean_text", bool):
        steps += [_replace_each("bert_deleted", ""), _replace_each("bert_space", " ")]
    if field(config, "handle_chinese_chars", bool):
        steps.append(_replace_each("bert_chinese", r" \0 "))
    if strip_accents:
        steps += [_unicode_form(compatibility=False, compose=False), _replace_each("bert_accent", "")]
    if lowercase:
        steps.append(_lowercase())
    return steps


def _replace_each(name: str, rewrite: str) -> Local:
    """Puts something for each code point of a set of unicode_tables.json."""
    code_points = CodePoints.named(name)
    pattern = f"[{code_points.pattern()}]"
    return Local(lambda texts: tf.strings.regex_replace(texts, pattern, rewrite), code_points)


def _lowercase() -> Local:
    mapping = CodePointMap(unicode_map("lowercase"))
    return Local(_on_code_points(mapping), mapping.keys)


def _unicode_form(compatibility: bool, compose: bool) -> Local:
    form = UnicodeForm(compatibility, compose)
    return Local(_on_code_points(form), form.changing)


def _precompiled(config: dict) -> list[Local | Rewrite]:
    rules = Precompiled(field(config, "precompiled_charsmap", str))
    return [Local(_on_code_points(rules), rules.changing)]


def _replace(config: dict) -> list[Local | Rewrite]:
    pattern, content = field(config, "pattern", dict), literal_rewrite(field(config, "content", str))
    if set(pattern) == {"String"} and field(pattern, "String", str):
        expression = literal_pattern(pattern["String"])
    elif set(pattern) == {"Regex"} and pattern["Regex"] in _REGULAR_EXPRESSIONS:
        expression = pattern["Regex"]
    else:
        raise ValueError(
            "`pattern` of the normalizer Replace must be a String, not empty, or a Regex out of "
            f"{_REGULAR_EXPRESSIONS}. Received: {str(pattern)[:200]}"
        )
    return [lambda texts: tf.strings.regex_replace(texts, expression, content)]


def _strip(config: dict) -> list[Local | Rewrite]:
    whitespace = CodePoints.named("whitespace").pattern()
    left, right = f"^[{whitespace}]+", f"[{whitespace}]+$"
    patterns = [left] if field(config, "strip_left", bool) else []
    patterns += [right] if field(config, "strip_right", bool) else []
    return [
        lambda texts, pattern=pattern: tf.strings.regex_replace(texts, pattern, "") for pattern in patterns
    ]


def _prepend(config: dict) -> list[Local | Rewrite]:
    text = field(config, "prepend", str)
    return [lambda texts: tf.where(texts == "", texts, tf.strings.join([text, texts]))]


_STEPS: dict[str, Callable[[dict], list[Local | Rewrite]]] = {
    "BertNormalizer": _bert_normalizer,
    "Lowercase": lambda config: [_lowercase()],
    "StripAccents": lambda config: [_replace_each("accent", "")],
    "Nmt": lambda config: [_replace_each("nmt_deleted", ""), _replace_each("nmt_space", " ")],
    "Replace": _replace,
    "Strip": _strip,
    "Prepend": _prepend,
    "Precompiled": _precompiled,
    "NFD": lambda config: [_unicode_form(compatibility=False, compose=False)],
    "NFC": lambda config: [_unicode_form(compatibility=False, compose=True)],
    "NFKD": lambda config: [_unicode_form(compatibility=True, compose=False)],
    "NFKC": lambda config: [_unicode_form(compatibility=True, compose=True)],
}


def _on_code_points(*steps: Callable[[tf.RaggedTensor], tf.RaggedTensor]) -> Rewrite:
    def rewrite(texts: tf.Tensor) -> tf.Tensor:
        codes = tf.strings.unicode_decode(texts, "UTF-8")
        for step in steps:
            codes = step(codes)
        return tf.strings.unicode_encode(codes, "UTF-8")

    return rewrite
