"""The text of a row while its tokens come."""

from collections.abc import Sequence

from kerasllm.tokenizers import StreamingDecoder, Tokenizer


def find_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Finds where a text ends that is read character by character until a stop string is complete.

    Args:
        text: The text.
        stop_strings: The stop strings.

    Returns:
        The place at which the stop string begins; None if there is none. Of those that are complete
        first, the longest counts.
    """
    places = [(text.find(stop), len(stop)) for stop in stop_strings]
    found = [(place + length, place) for place, length in places if place >= 0]
    return min(found)[1] if found else None


def may_stop_from(text: str, stop_strings: Sequence[str]) -> int:
    """Finds the place from which a text may still turn into a stop string.

    Args:
        text: The text, without a whole stop string.
        stop_strings: The stop strings.

    Returns:
        The place; the text's length if no end of the text begins a stop string.
    """
    longest = max(map(len, stop_strings), default=0)
    for place in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[place:]) for stop in stop_strings):
            return place
    return len(text)


class TextStream:
    """Decodes token by token, gives out only what is final, and ends before a stop string.

    Args:
        tokenizer: The tokenizer.
        stop_strings: The text ends before the first of these.
        after: The ids that the text goes on from; empty: it begins.

    Attributes:
        text: What has been given out.
        stopped: Whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), after: Sequence[int] = ()):
        self._decoder = StreamingDecoder(tokenizer, after=after)
        self._stop_strings = stop_strings
        self._waiting = ""  # what may yet turn into a stop string
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Takes the next token.

        Returns:
            The text that is now final besides: no half characters, and nothing that may turn into a
            stop string.
        """
        return self._emit(self._decoder.add(token_id), is_end=False)

    def finish(self) -> str:
        """Takes note that no token comes any more.

        Returns:
            The rest of the text.
        """
        return self._emit(self._decoder.finish(), is_end=True)

    def _emit(self, text: str, is_end: bool) -> str:
        if self.stopped:
            return ""
        text = self._waiting + text
        end = find_stop(text, self._stop_strings)
        self.stopped = end is not None
        if end is None:
            end = len(text) if is_end else may_stop_from(text, self._stop_strings)
        self._waiting = text[end:]
        self.text += text[:end]
        return text[:end]
