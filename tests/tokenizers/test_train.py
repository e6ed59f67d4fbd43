"""Training: what is learnt, that it is the same every time, and what is refused."""

import subprocess
import sys

import pytest
from reference.tokenizer_texts import SPECIAL_TOKENS, random_texts

from kerasllm.tokenizers import ByteBPETokenizer, train_tokenizer

KINDS = ("word", "character", "byte_bpe")
TEXTS = ["the cat sat", "the cat, the hat", "a cat"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind):
    texts = random_texts(200, seed=10)
    first = train_tokenizer(kind, texts, 600, SPECIAL_TOKENS).to_json()
    again = train_tokenizer(kind, iter(texts), 600, SPECIAL_TOKENS).to_json()
    assert first == again


def test_training_is_the_same_in_another_process():
    code = (
        "import sys\n"
        "from kerasllm.tokenizers import train_tokenizer\n"
        "assert 'tensorflow_text' not in sys.modules\n"
        f"for kind in {KINDS}: print(ascii(train_tokenizer(kind, {TEXTS}).to_json()))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.splitlines() == [ascii(train_tokenizer(k, TEXTS).to_json()) for k in KINDS]


def test_word_keeps_the_most_frequent_words():
    tokenizer = train_tokenizer("word", TEXTS, 5)
    assert [tokenizer.id_to_token(i) for i in range(5)] == [
        "<|endoftext|>",
        "<unk>",
        " cat",
        "the",
        " hat",
    ]
    assert tokenizer.encode("the dog") == [3, 1]
    everything = train_tokenizer("word", TEXTS)
    assert everything.decode(everything.encode(TEXTS)) == TEXTS


def test_character_ids_are_sorted_by_code_point():
    tokenizer = train_tokenizer("character", ["b🙂é a\nbbb"], special_tokens=["<s>"])
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.vocabulary_size)]
    assert tokens == ["<s>", "<unk>", "\n", " ", "a", "b", "é", "🙂"]
    assert tokenizer.encode("abz") == [4, 5, 1]
    smaller = train_tokenizer("character", ["caaabbc"], 4)
    assert smaller.encode("abc") == [2, 3, 1]  # The two most frequent ones.


def test_byte_bpe_has_every_byte():
    tokenizer = train_tokenizer("byte_bpe", TEXTS, 256 + 2, ["<s>", "</s>"])
    assert isinstance(tokenizer, ByteBPETokenizer)
    assert tokenizer.vocabulary_size == 258
    assert tokenizer.tokenize(["".join(map(chr, range(256)))]).row_lengths() == 128 + 2 * 128
    larger = train_tokenizer("byte_bpe", TEXTS, 260)
    assert larger.vocabulary_size == 260
    assert larger.tokenize(["cat"]).row_lengths() < 3
    assert train_tokenizer("byte_bpe", random_texts(500, seed=11)).vocabulary_size == 2048


def test_unk_may_be_placed_by_the_caller():
    tokenizer = train_tokenizer("word", TEXTS, special_tokens=["<unk>", "<s>"])
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1}
    assert tokenizer.unk_id == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_special_tokens(kind):
    tokenizer = train_tokenizer(kind, TEXTS, special_tokens=())
    assert tokenizer.special_tokens == ({} if kind == "byte_bpe" else {"<unk>": 0})
    assert tokenizer.eos_token is None
    ids = tokenizer.tokenize(TEXTS, parse_special=True)
    assert tokenizer.decode(ids) == TEXTS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_refused(kind, texts):
    with pytest.raises(ValueError, match="at least one character"):
        train_tokenizer(kind, texts)


@pytest.mark.parametrize(
    ("kind", "size", "least"),
    [("byte_bpe", 256, 257), ("byte_bpe", 0, 257), ("word", 2, 3), ("character", -1, 3)],
)
def test_small_vocabularies_are_refused(kind, size, least):
    with pytest.raises(ValueError, match=f"at least {least} .* vocabulary_size={size}"):
        train_tokenizer(kind, TEXTS, size)
    assert train_tokenizer(kind, TEXTS, least).vocabulary_size == least


def test_other_input_is_refused():
    with pytest.raises(ValueError, match="`kind` must be one of .* kind='bpe'"):
        train_tokenizer("bpe", TEXTS)
    with pytest.raises(TypeError, match="one str"):
        train_tokenizer("word", "one text")
    for texts in ([b"bytes"], ["a", 3], [["a", "b"]]):
        with pytest.raises(TypeError, match="`texts` must hold strings"):
            train_tokenizer("word", texts)
    with pytest.raises(UnicodeEncodeError):
        train_tokenizer("word", ["\ud800"])
    with pytest.raises(TypeError, match="`special_tokens` must be a sequence"):
        train_tokenizer("word", TEXTS, special_tokens="<s>")
    for special_tokens in ([""], ["<s>", "<s>"]):
        with pytest.raises(ValueError, match="`special_tokens`"):
            train_tokenizer("word", TEXTS, special_tokens=special_tokens)
    with pytest.raises(TypeError, match="`vocabulary_size` must be an integer"):
        train_tokenizer("word", TEXTS, 10.0)


def test_errors_while_reading_the_texts_are_passed_on():
    def texts():
        yield "a"
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        train_tokenizer("byte_bpe", texts())
