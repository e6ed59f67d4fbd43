"""Texts of many sorts to compare tokenizers on, real ones and those made to differ."""

import itertools
import json
import pathlib
import random
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence

import tensorflow as tf
import tokenizers
from reference.tokenizer_texts import (
    INVALID_BYTES,
    WRITTEN_TEXTS,
    random_bytes,
    random_code_points,
    random_texts,
)

from kerasllm.data.assets import asset_path
from kerasllm.tokenizers import Tokenizer

BATCH_BYTES = 1 << 18
_SITE_PACKAGES = sysconfig.get_paths()["purelib"]


def moby() -> Iterable[bytes]:
    return [
        paragraph.encode() for paragraph in asset_path("moby").read_text(encoding="utf-8").split("\n\n")
    ]


def sotu() -> Iterable[bytes]:
    return [
        paragraph.encode() for paragraph in asset_path("sotu").read_text(encoding="utf-8").split("\n\n")
    ]


def mail() -> Iterable[bytes]:
    with asset_path("spam").open(encoding="utf-8") as lines:
        return [json.loads(line)["text"].encode() for line in lines]


def _files(ending: str, *folders: str) -> Callable[[], Iterable[bytes]]:
    """The files below some folders, in the order of their names, as they are."""

    def read() -> Iterable[bytes]:
        paths = (path for folder in folders for path in sorted(pathlib.Path(folder).rglob(f"*{ending}")))
        return (path.read_bytes() for path in paths if path.is_file() and path.stat().st_size < 1 << 20)

    return read


def code_points() -> Iterable[bytes]:
    """Every code point between letters, after a space and before a digit, and twice in a row."""
    every = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    for template in ("a{0}b.", " {0}1", "{0}{0} "):
        for first in range(0, len(every), 128):
            yield "".join(template.format(c) for c in every[first : first + 128]).encode()


def invalid() -> Iterable[bytes]:
    return [*INVALID_BYTES, *random_bytes(20_000, seed=11)]


def long_words() -> Iterable[bytes]:
    generator = random.Random(12)
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["a" * 100_000, "ab" * 50_000, "=" * 100_000, "9" * 100_000, "ACGT" * 25_000, "日本語" * 30_000]
    texts += [
        "".join(generator.choices(alphabet, k=100_000)) for alphabet in (letters, "ACGT", "01", "é日🙂a")
    ]
    return [text.encode() for text in texts]


def spaces() -> Iterable[bytes]:
    generator = random.Random(13)
    texts = [
        character * count for character in " \n\t\r\u00a0\u3000" for count in (1, 2, 3, 15, 16, 17, 10_000)
    ]
    texts += ["x" + " " * count + "x" for count in range(70)] + [
        "\n" + " " * count + "return" for count in range(70)
    ]
    texts += ["".join(generator.choices(" \n\t\r\u00a0x.", k=50)) for _ in range(3000)]
    return [text.encode() for text in texts]


def adversarial() -> Iterable[bytes]:
    """Mixtures of scripts, signs, spaces and the spellings of special tokens."""
    return [
        text.encode()
        for text in (*WRITTEN_TEXTS, *random_texts(4000, seed=14), *random_code_points(400, seed=15))
    ]


CORPORA: dict[str, Callable[[], Iterable[bytes]]] = {
    "moby": moby,
    "sotu": sotu,
    "mail": mail,
    "python": _files(".py", sysconfig.get_paths()["stdlib"]),
    "c": _files(".h", "/usr/include"),
    "c++": _files(".h", f"{_SITE_PACKAGES}/tensorflow/include/tensorflow"),
    "javascript": _files(".js", "/usr/lib/node_modules", _SITE_PACKAGES),
    "perl": _files(".pm", "/usr/share/perl"),
    "code points": code_points,
    "invalid utf-8": invalid,
    "long words": long_words,
    "spaces": spaces,
    "adversarial": adversarial,
}


def take(texts: Iterable[bytes], size: int | None) -> list[bytes]:
    """The first texts, until together they have more than `size` bytes."""
    taken, total = [], 0
    for text in texts:
        taken.append(text)
        total += len(text)
        if size is not None and total > size:
            break
    return taken


def batches(texts: Sequence[bytes]) -> list[list[bytes]]:
    """The texts in batches of about BATCH_BYTES."""
    ends = itertools.accumulate(map(len, texts))
    numbered = zip(texts, ends, strict=True)
    return [
        [text for text, _ in group]
        for _, group in itertools.groupby(numbered, lambda t: t[1] // BATCH_BYTES)
    ]


def tokenize_batches(tokenizer: Tokenizer, groups: Sequence[list[bytes]]) -> list[tf.RaggedTensor]:
    return [tokenizer.tokenize(tf.constant(group), parse_special=True) for group in groups]


def differences(tokenizer: Tokenizer, reference: tokenizers.Tokenizer, texts: Sequence[bytes]) -> list[str]:
    """The texts whose ids are not equal, as Python shows them."""
    different = []
    for group in batches(texts):
        readable = [text.decode("utf-8", errors="replace") for text in group]
        expected = [e.ids for e in reference.encode_batch_fast(readable, add_special_tokens=False)]
        received = tokenizer.tokenize(tf.constant(group), parse_special=True).to_list()
        for text, ids, expected_ids in zip(readable, received, expected, strict=True):
            if ids != expected_ids:
                different.append(ascii(text))
    return different
