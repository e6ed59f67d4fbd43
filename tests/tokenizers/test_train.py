"""Training: what is learnt, that it is the same every time, and what is refused."""

import hashlib
import subprocess
import sys

import pytest
from reference.tokenizer_texts import SPECIAL_TOKENS, random_texts

from kerasllm.tokenizers import (
    ByteBPETokenizer,
    Tokenizer,
    UnigramTokenizer,
    WordPieceTokenizer,
    train_tokenizer,
)

KINDS = ("word", "character", "byte_bpe")
TEXTS = ["the cat sat", "the cat, the hat", "a cat"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind):
    texts = random_texts(200, seed=10)
    first = train_tokenizer(kind, texts, 600, SPECIAL_TOKENS).to_json()
    again = train_tokenizer(kind, iter(texts), 600, SPECIAL_TOKENS).to_json()
    assert first == again


def test_training_is_the_same_in_another_process(stories):
    code = (
        "import hashlib, sys\n"
        "from kerasllm.data import generate_stories\n"
        "from kerasllm.tokenizers import train_tokenizer\n"
        "assert 'tensorflow_text' not in sys.modules\n"
        f"for kind in {KINDS}: print(ascii(train_tokenizer(kind, {TEXTS}).to_json()))\n"
        "for kind in ('wordpiece', 'sentencepiece'):\n"
        "    text = train_tokenizer(kind, generate_stories(200, seed=1), 700).to_json()\n"
        "    print(hashlib.sha256(text.encode()).hexdigest())"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [ascii(train_tokenizer(kind, TEXTS).to_json()) for kind in KINDS]
    for kind in ("wordpiece", "sentencepiece"):
        text = train_tokenizer(kind, stories, 700).to_json()
        here.append(hashlib.sha256(text.encode()).hexdigest())
    assert output.stdout.splitlines() == here


def test_wordpiece_is_berts(stories):
    tokenizer = train_tokenizer("wordpiece", stories, 700)
    assert isinstance(tokenizer, WordPieceTokenizer) and tokenizer.vocabulary_size == 700
    assert list(tokenizer.special_tokens) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (0, 1, 4)
    ids = tokenizer.encode("Once upon a TIME.", add_special_tokens=True)
    assert [tokenizer.id_to_token(id) for id in ids] == [
        "[CLS]", "once", "upon", "a", "time", ".", "[SEP]",
    ]  # fmt: skip
    assert not any(1 in ids for ids in tokenizer.encode(stories))
    rare = train_tokenizer("wordpiece", ["ab ab ab ab c"], 8)  # no room for the rarest character
    assert [rare.id_to_token(id) for id in range(5, rare.vocabulary_size)] == ["##b", "a", "b"]
    assert rare.encode("ab c") == [6, 5, 1]


def test_sentencepiece_is_t5s(stories):
    tokenizer = train_tokenizer("sentencepiece", stories, 700)
    assert isinstance(tokenizer, UnigramTokenizer) and 600 < tokenizer.vocabulary_size <= 700
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    sentinels = [tokenizer.token_to_id(f"<extra_id_{number}>") for number in range(100)]
    assert sentinels == list(reversed(range(tokenizer.vocabulary_size - 100, tokenizer.vocabulary_size)))
    ids = tokenizer.encode("Once upon a time", add_special_tokens=True)
    assert ids[-1] == 1 and tokenizer.decode(ids) == "Once upon a time"
    assert tokenizer.encode("<extra_id_3>", parse_special=True) == [sentinels[3]]
    long = " ".join(stories)  # in one line
    assert train_tokenizer("sentencepiece", [long], 700).vocabulary_size > 600


@pytest.mark.parametrize("kind", ["wordpiece", "sentencepiece"])
def test_kinds_with_tokens_of_their_own_refuse_others(kind, tmp_path, stories):
    with pytest.raises(ValueError, match=f"kind='{kind}' has special tokens of its own"):
        train_tokenizer(kind, TEXTS, 500, ["<s>"])
    with pytest.raises(ValueError, match="must be at least"):
        train_tokenizer(kind, TEXTS, 5)
    with pytest.raises(ValueError):
        train_tokenizer(kind, [""], 500)
    tokenizer = train_tokenizer(kind, stories, 400)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.from_folder(tmp_path)
    text = "A little dog, and a cat."
    assert loaded.encode(text, add_special_tokens=True) == tokenizer.encode(text, add_special_tokens=True)
    assert (loaded.pad_id, loaded.mask_id, loaded.eos_id) == (
        tokenizer.pad_id,
        tokenizer.mask_id,
        tokenizer.eos_id,
    )


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
