import numpy as np
import pytest

from kerasllm.generation.text import TextStream, find_stop, may_stop_from


def read_slowly(text, stop_strings):
    """Reads character by character until a stop string is complete."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stop_strings, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end - len(stop)
    return None


STOPS = [("ab",), ("aab", "ba"), ("b", "ab"), ("abab", "bb", "c"), ()]


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_the_first_stop_string_counts(stops):
    rng = np.random.default_rng(0)
    for length in range(12):
        for _ in range(20):
            text = "".join(rng.choice(list("abc"), length))
            assert find_stop(text, stops) == read_slowly(text, stops), text


@pytest.mark.parametrize("stops", STOPS, ids=str)
def test_what_may_become_a_stop_string_waits(stops):
    rng = np.random.default_rng(1)
    for _ in range(200):
        text = "".join(rng.choice(list("abc"), rng.integers(0, 8)))
        if find_stop(text, stops) is not None:
            continue
        place = may_stop_from(text, stops)
        beginnings = {stop[:count] for stop in stops for count in range(1, len(stop))}
        waiting = [text[start:] for start in range(len(text)) if text[start:] in beginnings]
        assert text[place:] == max(waiting, key=len, default="")


@pytest.mark.parametrize(
    "stops", [(), ("the",), (" garden", "sea"), ("e s",), ("Ω",), ("\ufffd",)], ids=str
)
def test_pieces_make_the_text_before_the_stop_string(tokenizer, stops):
    text = "Mia went to the garden. The sea was Ωcold é🦊 today."
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer, stops)
    pieces = []
    for id in ids:
        pieces.append(stream.push(id))
        assert "\ufffd" not in pieces[-1]
        assert stream.text == "".join(pieces)
        if stream.stopped:
            break
    pieces.append(stream.finish())
    end = read_slowly(text, stops)
    assert "".join(pieces) == stream.text == text[:end]
    assert stream.stopped == (end is not None)
    assert stream.push(ids[0]) == "" or not stream.stopped


def test_half_a_character_at_the_end(tokenizer):
    ids = tokenizer.encode("a🦊")[:-1]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) == "a"
    assert stream.finish() == tokenizer.decode(ids)[1:] != ""
