"""Texts that tell a nearly right tokenizer from a right one, and the reference tokenizer."""

import random

import tokenizers

from kerasllm.tokenizers import Tokenizer

# One is the beginning of another: the longest must win.
SPECIAL_TOKENS = ("<|endoftext|>", "<|user|>", "<|user|>!", "<|end|>")

ALPHABETS = (
    "abc ABC",
    "0123456789 ",
    "  \t\n\r",
    "'stremvld ",
    "\u00a0\u3000\u2003\u2028\u200b\ufeff ",
    "éèàüñçßİıſ",
    "日本語中文한국어",
    "\u0301\u0308\u200d\ufe0f\u0e31\u093f",
    "🙂👍🏽🇺🇸",
    "!?.,;:-_()[]’",
    "²½Ⅷ१٣𝟙",
    "\x00\x04\x1c\x1f\x7f\x85",
    *SPECIAL_TOKENS,
)


def random_texts(count: int, seed: int, longest: int = 60) -> list[str]:
    generator = random.Random(seed)
    texts = []
    for _ in range(count):
        alphabets = generator.sample(ALPHABETS, generator.randrange(1, 6))
        length = generator.randrange(1, longest)
        texts.append("".join(generator.choice(generator.choice(alphabets)) for _ in range(length)))
    return texts


def random_code_points(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    ranges = ((0, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0xE0000, 0x110000))
    return [
        "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(40))
        for _ in range(count)
    ]


WRITTEN_TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "\r\n",
    " \n",
    "\n ",
    "x \n\n  y",
    "a\r\nb\r\n\r\nc\rd",
    "\t\t x",
    "tab\tand   spaces  ",
    "  5 5  ",
    "\u00a0 x\u00a0\u00a0y \u3000\u3000日本",
    "\u2028x\u2029 y\u180ez\u1680",
    "\ufeffBOM",
    "\x00",
    "a\x00b\x00\x00 \x00",
    "".join(map(chr, range(32))),
    "".join(map(chr, range(127, 256))),
    "it's they're I'M don't 'tis ' s we'll've 'd'm",
    "'S 'T ''s 'ſ ’s \n's  'll",
    "snake_case CamelCase x1y2 3.14 1,000 e-mail@host.org",
    "def f(x):\n\treturn x ** 2  # square\n\n\n    pass",
    "e\u0301a\u0300\u0316 o\u0308 Z͑ͫ̓ͪ̂A̴̵̜̰͔L̠ͨͧͩ͘",
    "👩‍👩‍👧‍👦 🇺🇸🇬🇧 👍🏽 ❤️‍🔥",
    "日本語のテキスト、中文。한국어 ไทยภาษา ๑๒๓",
    "مرحبا ١٢٣ नमस्ते दुनिया १२३ Ελληνικά Русский",
    "½ ¼ ² ³ Ⅷ ① ㊿ 〇 𝟙𝟚 𝒜𝓑 𐐀𐐁 𠀀𠀁",
    "\ufffd\ufffe\uffff \U0010ffff\U0001ffff\U000e0041",
    "ﷺ ﬁ ŉ ẞ İ ı",
    "<unk> < unk> <unk><unk>",
    "<|user|>hi<|end|>\n",
    "<|user|><|user|>!<|user|>!!",
    "a<|endoftext|>b <|endoftext|> c",
    "  <|end|>  \n\n<|end|>\n\n",
    "<|user|",
    "<<|user|>>",
    "5<|end|>5 '<|end|>s",
    " " * 1000,
    " " * 100 + "x" + "\n" * 100,
    " \t\n\r" * 50 + "x",
]

INVALID_BYTES = [
    b"\xff",
    b"a\xffb\xfe\xfe",
    b"\xc3",
    b"\xc3(",
    b"a\xe2\x82b",
    b"\xf0\x9f\x99 x",
    b"\x80\x80",
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"\xf4\x90\x80\x80",
    b"\xe0\x80\xaf",
    b"\xf8\x88\x80\x80\x80",
    b"ok \xe9t\xe9 latin1",
    b"\xfe<|user|>\xfd",
    b"\xff<|user|>\xff",
    b"\xef\xbb\xbf mark \xef\xbb",
]


def random_bytes(count: int, seed: int) -> list[bytes]:
    generator = random.Random(seed)
    noise = [generator.randbytes(generator.randrange(1, 30)) for _ in range(count // 2)]
    damaged = []
    for _ in range(count // 2):
        text = bytearray(("日本🙂é x" * 3).encode())
        for _ in range(3):
            text[generator.randrange(len(text))] = generator.randrange(256)
        damaged.append(bytes(text))
    return noise + damaged


def reference_of(tokenizer: Tokenizer, parse_special: bool) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    reference.encode_special_tokens = not parse_special
    return reference
