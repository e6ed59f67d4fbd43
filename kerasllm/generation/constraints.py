"""Texts that keep to a JSON schema, a regular expression or a grammar, by llguidance.

llguidance (https://github.com/guidance-ai/llguidance) says after each token which tokens may come next.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kerasllm.tokenizers import Tokenizer

_KINDS = ("json_schema", "regex", "grammar", "choices")


class ConstraintFactory:
    """Makes constraints for one tokenizer.

    Args:
        tokenizer: The tokenizer.
        end_ids: The tokens that end a text; at least one.
        vocabulary_size: Number of tokens of the model.

    Raises:
        ImportError: If llguidance is not installed.
        ValueError: If there is no end token.
    """

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int], vocabulary_size: int):
        try:
            import llguidance
        except ImportError as error:
            raise ImportError(
                "Constrained generation needs llguidance: pip install 'kerasllm[grammar]'"
            ) from error
        if not end_ids:
            raise ValueError("A constraint needs a token that ends the text. Received: none.")
        self._matcher = llguidance.LLMatcher
        description = _TokenizerDescription(tokenizer, end_ids[0])
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(description), n_vocab=vocabulary_size, eos_token=list(end_ids)
        )

    def make(self, kind: str, value: Any) -> "Constraint":
        """Makes a constraint.

        Args:
            kind: `"json_schema"`: the text is a JSON value that a schema, a dictionary or its text,
                allows. `"regex"`: all of the text matches a regular expression in Rust's syntax.
                `"grammar"`: a grammar in Lark's syntax, as llguidance reads it, with a rule `start`.
                `"choices"`: one of several texts.
            value: The schema, expression, grammar or list of texts.

        Returns:
            A constraint for one row.

        Raises:
            ValueError: If it cannot be read.
        """
        if kind not in _KINDS:
            raise ValueError(f"The kind of a constraint must be one of {_KINDS}. Received: {kind!r}")
        grammar = getattr(self, f"_read_{kind}")(value)
        matcher = self._matcher(self._tokenizer, grammar)
        if matcher.is_error():
            raise ValueError(f"`{kind}` cannot be read: {matcher.get_error()}. Received: {value!r}")
        return Constraint(matcher)

    def _read_json_schema(self, schema: Mapping | str) -> str:
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            return self._matcher.grammar_from_json_schema(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`json_schema` cannot be read: {error}. Received: {schema!r}") from error

    def _read_regex(self, expression: str) -> str:
        return self._matcher.grammar_from_regex(expression)

    def _read_grammar(self, grammar: str) -> str:
        return self._matcher.grammar_from_lark(grammar)

    def _read_choices(self, choices: Sequence[str]) -> str:
        if isinstance(choices, str) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"`choices` must be several texts, none empty. Received: {choices!r}")
        return self._matcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, choices)))


class Constraint:
    """What one row may still say.

    Args:
        matcher: llguidance's state.
    """

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def fill(self, bits: np.ndarray) -> None:
        """Writes which tokens may come next.

        Args:
            bits: Int32 `[vocabulary / 32]`, contiguous, as `RowSettings.allowed` has it.
        """
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()

    def accept(self, token_id: int) -> bool:
        """Takes the token that was chosen.

        Returns:
            Whether nothing may follow but the end.

        Raises:
            ValueError: If the token was not allowed: other settings left none that is.
        """
        self._matcher.consume_token(token_id)
        self._check()
        return self._matcher.is_stopped()

    def check_end(self) -> None:
        """Raises a ValueError if a text may not end here: other settings left no token to go on with."""
        if not self._matcher.is_accepting():
            raise ValueError(
                "The constraint cannot be kept: other settings, such as suppressed tokens, forbid all "
                "tokens that it allows."
            )

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"The constraint cannot be kept: {self._matcher.get_error()}")


def allowed_tokens(
    constraints: Sequence[Constraint | None], active: np.ndarray, vocabulary_size: int
) -> np.ndarray:
    """Collects which tokens may come next in each row.

    Args:
        constraints: A constraint for each row, or None: each token may come.
        active: Booleans `[rows]`: for the others it does not matter.
        vocabulary_size: Number of tokens.

    Returns:
        Int32 `[rows, vocabulary / 32]`, rounded up.
    """
    bits = np.full((len(constraints), -(-vocabulary_size // 32)), -1, np.int32)
    for row, constraint in enumerate(constraints):
        if constraint is not None and active[row]:
            constraint.fill(bits[row])
    return bits


class _TokenizerDescription:
    """The tokenizer as llguidance wants to know it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_id: int):
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        ids = range(tokenizer.vocabulary_size)
        self.tokens = [tokenizer.token_bytes(id) for id in ids]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return self._tokenizer.encode(text)
