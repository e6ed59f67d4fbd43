"""Decoding equals `tokenizers`, whole and token by token, for every decoder in use."""

import json
import random

import pytest
import tensorflow as tf
import tokenizers
from reference.tokenizer_kinds import train_byte_level
from tokenizers import decoders

from kerasllm.tokenizers import StreamingDecoder, Tokenizer

METASPACE = [decoders.Metaspace(prepend_scheme=scheme) for scheme in ("always", "first", "never")]
LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "none": None,
    "bytes": decoders.ByteLevel(),
    "fuse": decoders.Fuse(),
    "metaspace always": METASPACE[0],
    "metaspace first": METASPACE[1],
    "metaspace never": METASPACE[2],
    "word pieces": decoders.WordPiece(cleanup=True),
    "word pieces as they are": decoders.WordPiece(prefix="##", cleanup=False),
    "llama": decoders.Sequence([*LLAMA, decoders.Strip(" ", 1, 0)]),
    "llama, three spaces": decoders.Sequence([*LLAMA, decoders.Strip(" ", 3, 0)]),
    "gemma": decoders.Sequence(LLAMA),
    "strip of tokens": decoders.Sequence([decoders.Strip("▁", 1, 0), decoders.Fuse()]),
    "byte fallback": decoders.ByteFallback(),
}
TOKENS = [
    *(
        "▁",
        "▁▁",
        "▁a",
        "a",
        "b",
        "é",
        "日",
        " ",
        "  x",
        "##a",
        "##",
        "##▁",
        " n't",
        ".",
        " .",
        "do",
        " do not",
        "'",
        "!",
    ),
    *("<0x", "<0xZZ>", "<0x+1>", "<0x 1>", "▁a▁▁", "Ġa", "Ã", "©", "ðŁ", "ĻĤ", "Â", "ï¿½", "\ue000"),
    *(
        f"<0x{byte:02X}>"
        for byte in [*range(0x20, 0x7F, 16), *range(0x80, 0x100, 3), 0xF0, 0x9F, 0x99, 0x82]
    ),
    "<0xc3>",
]
SPECIAL_TOKENS = ["<s>", "</s>", "▁special"]


def tokenizer_with(decoder) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    reference = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>"))
    tokens = ["<unk>", *dict.fromkeys(TOKENS)]
    config = json.loads(reference.to_str())
    config["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    config["added_tokens"] = [
        dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        | {"id": len(tokens) + i, "content": content, "special": i < 2}
        for i, content in enumerate(SPECIAL_TOKENS)
    ]
    word_level = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    config["pre_tokenizer"] = word_level
    reference = tokenizers.Tokenizer.from_str(json.dumps(config))
    if decoder is not None:
        reference.decoder = decoder
    return Tokenizer.from_json(reference.to_str()), reference


def random_rows(vocabulary_size: int, seed: int, count: int = 600) -> list[list[int]]:
    generator = random.Random(seed)
    bytes_from = len(TOKENS) - 80
    rows = [
        [generator.randrange(vocabulary_size + 3) for _ in range(generator.randrange(9))]
        for _ in range(count)
    ]
    rows += [
        [generator.randrange(bytes_from, vocabulary_size) for _ in range(6)] for _ in range(count // 2)
    ]
    return rows


@pytest.mark.parametrize("name", DECODERS)
def test_whole_and_streamed(name):
    tokenizer, reference = tokenizer_with(DECODERS[name])
    rows = random_rows(tokenizer.vocabulary_size, seed=1)
    # Characters of several byte tokens, which random ids hardly hit.
    emoji = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    rows += [emoji, emoji[:3], [*emoji, *emoji[:2], 1], [1, *emoji, 5, *emoji], [*emoji[1:], *emoji]]
    letters = [tokenizer.token_to_id(token) for token in ("ðŁ", "ĻĤ", "Ã", "©")]
    rows += [letters, letters[:3], letters[1:], [*letters, *letters]]
    # Spaces at the beginning, in tokens of their own.
    space, two_spaces, word = map(tokenizer.token_to_id, ("▁", "▁▁", "▁a"))
    rows += [[space, space, space, word], [two_spaces, two_spaces], [space, word], [word, space]]
    for skip_special_tokens in (True, False):
        expected = reference.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        assert tokenizer.decode(rows, skip_special_tokens) == expected
        for row, whole in zip(rows[::3] + rows[-13:], expected[::3] + expected[-13:], strict=True):
            decoder = StreamingDecoder(tokenizer, skip_special_tokens)
            given_out = ""
            for length, token_id in enumerate(row, start=1):
                given_out += decoder.add(token_id)
                if length % 2 == 0:  # What it would be if the text ended here.
                    other = StreamingDecoder(tokenizer, skip_special_tokens)
                    so_far = "".join(map(other.add, row[:length]))
                    assert so_far == given_out
                    assert so_far + other.finish() == reference.decode(
                        row[:length], skip_special_tokens=skip_special_tokens
                    )
            assert given_out + decoder.finish() == whole


@pytest.mark.parametrize("name", DECODERS)
def test_ids_that_come_after_others(name):
    """Their text is the rest of the text of all, which keeps the space between the two."""
    tokenizer, reference = tokenizer_with(DECODERS[name])
    special, mark, word, letter = map(tokenizer.token_to_id, ("<s>", "▁", "▁a", "a"))
    before = [[], [special], [word], [special, letter], [99_999, special], [-1, letter, special]]
    rows = [[word, letter], [special, word], [mark, mark, word], [letter], []]
    before, rows = [b for b in before for _ in rows], rows * len(before)
    expected = []
    for first, row in zip(before, rows, strict=True):
        first = [i for i in first if 0 <= i < tokenizer.vocabulary_size]
        texts = reference.decode_batch([first, first + row])
        assert texts[1].startswith(texts[0])
        expected.append(texts[1][len(texts[0]) :])
    assert tokenizer.decode(rows, after=before) == expected
    assert tokenizer.decode(rows[-4], after=tuple(before[-4])) == expected[-4]
    padded = tf.ragged.constant(before, tf.int32).to_tensor(-1)
    detokenized = tokenizer.detokenize(tf.ragged.constant(rows, tf.int32), after=padded).numpy()
    assert [text.decode() for text in detokenized] == expected
    for first, row, text in zip(before, rows, expected, strict=True):
        decoder = StreamingDecoder(tokenizer, after=first)
        assert "".join(map(decoder.add, row)) + decoder.finish() == text


def test_bytes_do_not_join_those_of_the_ids_before():
    reference = train_byte_level("gpt2", ["é"], 257)
    tokenizer = Tokenizer.from_json(reference.to_str())
    first, second = (
        next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([b])) for b in "é".encode()
    )
    assert tokenizer.decode([second], after=[first]) == tokenizer.decode([second]) == "\ufffd"


def test_ids_before_must_fit():
    tokenizer, _ = tokenizer_with(None)
    with pytest.raises(
        ValueError, match="`after` must have a list for each of `ids`. Received: 1 lists, 2"
    ):
        tokenizer.decode([[1], [2]], after=[[1]])
    with pytest.raises(TypeError, match="`after` must hold integers"):
        tokenizer.decode([[1]], after=[[0.5]])


def test_streaming_bytes_holds_back_three_at_most():
    reference = train_byte_level("gpt2", ["é日🙂"], 257)
    tokenizer = Tokenizer.from_json(reference.to_str())
    generator = random.Random(0)
    by_byte = {tokenizer.token_bytes(i): i for i in range(256)}
    for _ in range(300):
        content = "".join(generator.choices("aé日🙂 ", k=8)).encode()
        content = bytearray(content)
        for _ in range(generator.randrange(3)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        ids = [by_byte[bytes([byte])] for byte in content]
        decoder = StreamingDecoder(tokenizer)
        given_out = ""
        for length, token_id in enumerate(ids, start=1):
            given_out += decoder.add(token_id)
            now = reference.decode(ids[:length])
            assert now.startswith(given_out)
            # The rest is one unfinished character.
            assert len(bytes(content[:length]).decode(errors="replace")) - len(given_out) <= 1
        assert given_out + decoder.finish() == reference.decode(ids)


def test_a_streaming_decoder_begins_anew_after_the_end():
    tokenizer, _ = tokenizer_with(DECODERS["llama"])
    word = tokenizer.token_to_id("▁a")
    decoder = StreamingDecoder(tokenizer)
    for _ in range(2):
        assert decoder.add(word) + decoder.add(word) + decoder.finish() == "a a"


def test_dense_ids_of_any_type():
    tokenizer, reference = tokenizer_with(DECODERS["llama"])
    ids = tf.constant([[3, 4, -1], [-1, 3, 10_000]], tf.int16)
    expected = [reference.decode([3, 4]), reference.decode([3])]
    assert [text.decode() for text in tokenizer.detokenize(ids).numpy()] == expected


REFUSED = {
    "unknown": {"type": "CTC"},
    "order": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
    "bytes later": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteLevel"}]},
    "replace the whole": {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}],
    },
    "expression": {"type": "Replace", "pattern": {"Regex": "(a+)+"}, "content": ""},
    "strip at the end": {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}],
    },
    "huge": {"type": "Strip", "content": " ", "start": 10**12, "stop": 0},
    "two characters": {"type": "Metaspace", "replacement": "ab"},
    "number": {"type": "Replace", "pattern": 5, "content": "b"},
    "text": "ByteLevel",
    "no type": {},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_unsupported_is_refused(name):
    _, reference = tokenizer_with(None)
    config = json.loads(reference.to_str()) | {"decoder": REFUSED[name]}
    with pytest.raises(ValueError, match="must be|must take"):
        Tokenizer.from_json(json.dumps(config))


def streamed_in_graph(tokenizer, rows, after):
    """What the graph gives out with each token of each row, and at the end."""
    decoder = tokenizer.decoder
    push = tf.function(decoder.push, autograph=False)
    state = decoder.start_stream(tf.ragged.constant(after, tf.int32, ragged_rank=1))
    pieces = []
    for place in range(max(map(len, rows))):
        ids = tf.constant([row[place] if place < len(row) else 0 for row in rows])
        state, texts = push(state, ids, tf.constant([place < len(row) for row in rows]))
        pieces.append(texts.numpy())
    pieces.append(decoder.end_stream(state).numpy())
    return [[piece.decode() for piece in row] for row in zip(*pieces, strict=True)]


@pytest.mark.parametrize("name", DECODERS)
def test_streamed_in_a_graph_as_in_python(name):
    tokenizer, _ = tokenizer_with(DECODERS[name])
    rows = random_rows(tokenizer.vocabulary_size, seed=2, count=200)
    rows += [[tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]]
    rows += [[*rows[-1][:3], 5, *rows[-1][1:]], list(map(tokenizer.token_to_id, ("▁", "▁▁", "▁a")))]
    rows += [list(map(tokenizer.token_to_id, ("ðŁ", "ðŁ", "ĻĤ", "Ã", "▁", "Ã", "©", "ðŁ")))]
    after = [[] if number % 2 else [number % 7] for number in range(len(rows))]
    for row, begin, pieces in zip(rows, after, streamed_in_graph(tokenizer, rows, after), strict=True):
        stream = StreamingDecoder(tokenizer, after=begin)
        assert pieces[: len(row)] == [stream.add(token_id) for token_id in row]
        assert set(pieces[len(row) : -1]) <= {""}
        assert pieces[-1] == stream.finish()


def test_random_bytes_streamed_in_a_graph():
    """Every way in which a character may be cut, broken or too long."""
    tokenizer = Tokenizer.from_json(train_byte_level("gpt2", ["a"], 257).to_str())
    generator = random.Random(3)
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF]
    edges += [0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    of_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocabulary_size)}
    rows = [[of_byte[bytes([generator.choice(edges)])] for _ in range(8)] for _ in range(1500)]
    pieces_of_rows = streamed_in_graph(tokenizer, rows, [[]] * len(rows))
    for row, pieces in zip(rows, pieces_of_rows, strict=True):
        stream = StreamingDecoder(tokenizer)
        assert pieces == [*map(stream.add, row), stream.finish()]
