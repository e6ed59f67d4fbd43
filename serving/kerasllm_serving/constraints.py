"""Answers that keep to a JSON schema, a regular expression or a grammar, by llguidance.

llguidance (https://github.com/guidance-ai/llguidance) says after each token which tokens may come next. It
need not be installed where no request asks for such an answer.
"""

import json
import re
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from kerasllm_serving.errors import invalid_argument

# What an answer can be told to keep to.
STRUCTURES = ("json", "regex", "choice", "grammar")
# What is between the parts of JSON. A small model, left alone, may go on with spaces for ever.
JSON_OPTIONS = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,20}"}


class Constraint:
    """What one row may still say.

    Args:
        matcher: llguidance's state.
        vocabulary: Number of tokens.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._mask = np.zeros(-(-vocabulary // 32), np.int32)

    @property
    def may_end(self) -> bool:
        """Whether the text is whole as it is."""
        return self._matcher.is_accepting()

    @property
    def must_end(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def mask(self) -> np.ndarray:
        """Tells which tokens may come next.

        Returns:
            Int32 `[vocabulary / 32]`, rounded up, a bit for each token; written over by the next call.

        Raises:
            ServingError: INVALID_ARGUMENT if llguidance gives up.
        """
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        self._check()
        return self._mask

    def accept(self, token_id: int) -> None:
        """Takes the token that was chosen.

        Raises:
            ServingError: INVALID_ARGUMENT if it was not allowed: other settings left none that is.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def copy(self) -> "Constraint":
        """Returns another that stands where this one does."""
        return Constraint(self._matcher.deep_copy(), 32 * len(self._mask))

    def _check(self) -> None:
        if self._matcher.is_error():
            raise cannot_be_kept(self._matcher.get_error())


def cannot_be_kept(reason: str) -> Exception:
    """The error of a row that cannot go on, nor end."""
    reason = reason.partition("\n")[0]
    return invalid_argument(
        f"The structure of the answer cannot be kept, for other settings of the request forbid it: {reason}"
    )


class ConstraintFactory:
    """Makes constraints for one model; what they share is made with the first.

    Args:
        tokenizer_file: The `tokenizer.json`.
        vocabulary: Number of tokens of the model.
        end_ids: The tokens that end a text.
        token_texts: Gives the bytes of tokens.
    """

    def __init__(
        self,
        tokenizer_file: Path,
        vocabulary: int,
        end_ids: Sequence[int],
        token_texts: Callable[[Collection[int]], list[bytes]],
    ) -> None:
        self._file = tokenizer_file
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._token_texts = token_texts
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._special: dict[str, int] = {}

    def make(self, kind: str, value: Any) -> Constraint:
        """Makes a constraint.

        Args:
            kind: One of `STRUCTURES`. `"json"`: the answer is JSON that a schema, a dictionary or its
                text, allows. `"regex"`: all of it matches a regular expression in Rust's syntax.
                `"choice"`: it is one of several texts. `"grammar"`: it keeps to a grammar in Lark's syntax,
                as llguidance reads it, with a rule `start`.
            value: The schema, the expression, the list of texts or the grammar.

        Returns:
            The constraint, for one row.

        Raises:
            ValueError: If it cannot be read; the message goes on from the name of what was received.
            MissingLibrary: If llguidance is not installed.
        """
        library = _llguidance().LLMatcher
        if kind == "json":
            grammar = library.grammar_from_json_schema(
                json.dumps(read_schema(value)), overrides=JSON_OPTIONS
            )
        elif kind == "regex":
            grammar = library.grammar_from_regex(_read_text(value))
        elif kind == "choice":
            if not isinstance(value, list) or not value or not all(isinstance(c, str) and c for c in value):
                raise ValueError(f"must be a list of texts, none empty. Received: {value!r:.80}")
            grammar = library.grammar_from_lark("start: " + " | ".join(map(json.dumps, value)))
        else:
            grammar = library.grammar_from_lark(_read_text(value))
        matcher = library(self._shared(), grammar, log_level=0)
        if matcher.is_error():
            raise ValueError("cannot be read: " + matcher.get_error().partition("\n")[0])
        return Constraint(matcher, self._vocabulary)

    def literal(self, text: str) -> str:
        """Writes a text, with special tokens where it spells them, for a grammar in Lark's syntax.

        Raises:
            MissingLibrary: If llguidance is not installed.
        """
        self._shared()
        parts = re.split(f"({'|'.join(map(re.escape, self._special))})", text) if self._special else [text]
        return " ".join(
            f"<[{self._special[part]}]>" if part in self._special else json.dumps(part)
            for part in parts
            if part
        )

    def _shared(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                library = _llguidance()
                description = _Description(
                    self._file, self._token_texts(range(self._vocabulary)), self._end_ids[0]
                )
                self._special = description.special
                self._tokenizer = library.LLTokenizer(
                    library.TokenizerWrapper(description),
                    n_vocab=self._vocabulary,
                    eos_token=list(self._end_ids),
                )
            return self._tokenizer


class MissingLibrary(Exception):
    """llguidance is not installed; the message says how to install it."""


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingLibrary(
            "Answers of a given structure need the library llguidance on the server: pip install llguidance"
        ) from error
    return llguidance


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string. Received: {value!r:.80}")
    return value


def read_schema(value: Any) -> dict[str, Any]:
    """Reads a JSON schema, an object or its text; a ValueError if it is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"must be a JSON schema: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON schema. Received: {value!r:.80}")
    return value


class _Description:
    """A tokenizer as llguidance wants to know it."""

    bos_token_id = None

    def __init__(self, file: Path, tokens: list[bytes], eos_token_id: int) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: number for number, token in added.items() if token.special}
        self.special_token_ids = sorted(self.special.values())

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, add_special_tokens=False).ids
