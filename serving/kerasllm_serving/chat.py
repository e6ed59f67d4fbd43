"""Chats as prompts: the model's Jinja template, and text of users that never becomes a special token."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from kerasllm_serving.errors import invalid_argument

# A byte that no UTF-8 text has, as Python writes it into a text. Where it stands inside of a special
# token's spelling, the exported `encode_chat` reads plain text, and takes the mark out.
MARK = b"\xfd".decode("utf-8", "surrogateescape")
_ESCAPED_MARK = r"\udcfd"  # What Python and JSON make of it where they quote a text.
_ROLE = re.compile(r"[\w .-]{1,64}")
_LONGEST_PROMPT = 16 * 2**20  # characters


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks an assistant's words for training; the text stays as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class ChatTemplate:
    """Turns messages into the text that `encode_chat` reads.

    The template comes with the model, so it is trusted as much as the graph is; it runs in Jinja's
    sandbox all the same. The messages come from anybody.

    Args:
        source: The Jinja text.
        variables: What the template knows besides, such as `eos_token`.
        special_tokens: Spellings of special tokens.

    Attributes:
        special_tokens: The same, without an empty one.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], special_tokens: Sequence[str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._variables = dict(variables)
        self.special_tokens = [token for token in special_tokens if token]
        self._lowered = [token.lower() for token in self.special_tokens]
        # The mark's own spelling must not be in a text either. A template may change the case of a text.
        spellings = "|".join(map(re.escape, [*self.special_tokens, _ESCAPED_MARK]))
        self._begins_token = re.compile(f"(?=(?:{spellings}))(.)", re.DOTALL | re.IGNORECASE)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> bytes:
        """Renders a chat.

        Args:
            messages: The messages, of JSON types.
            add_generation_prompt: Whether the prompt ends with the beginning of an answer.
            variables: What else the client tells the template, of JSON types.

        Returns:
            The prompt, UTF-8 with marks in it.

        Raises:
            ServingError: INVALID_ARGUMENT if the template refuses the chat.
        """
        protected = []
        for message in messages:
            role = message.get("role")
            if not (isinstance(role, str) and _ROLE.fullmatch(role)):
                raise invalid_argument(f"A message's role must be a plain word. Received: {role!r:.80}")
            # Templates build special tokens of the roles.
            protected.append(self._protect(message) | {"role": role})
        try:
            parts, length = [], 0
            for part in self._template.generate(
                {
                    "tools": None,
                    "documents": None,
                    **{key: self._protect(value) for key, value in variables.items()},
                    **self._variables,
                    "messages": protected,
                    "add_generation_prompt": add_generation_prompt,
                }
            ):
                length += len(part)
                if length > _LONGEST_PROMPT:
                    raise invalid_argument(f"A prompt must have up to {_LONGEST_PROMPT} characters.")
                parts.append(part)
        except jinja2.TemplateError as error:
            raise invalid_argument(f"The model's chat template refuses the messages: {error}") from error
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise invalid_argument(
                f"The model's chat template does not take these messages: {type(error).__name__}: {error}"
            ) from error
        text = "".join(parts).replace(_ESCAPED_MARK, MARK)
        return text.encode("utf-8", "surrogateescape")

    def _protect(self, value: Any) -> Any:
        """Puts marks into the special tokens' spellings in all strings."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, Mapping):
            return {self._break(key): self._protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._protect(item) for item in value]
        return value

    def _break(self, text: str) -> str:
        try:
            text.encode("utf-8")  # Fails for half of a surrogate pair, which the mark is one of.
        except UnicodeEncodeError as error:
            raise invalid_argument(
                "Text must be valid Unicode. Received: half of a surrogate pair"
            ) from error
        for token in self.special_tokens:
            if len(token) == 1 and token in text:
                raise invalid_argument(f"A chat cannot hold a special token of one character: {token!r}")
        return self._begins_token.sub(rf"\1{MARK}", text)

    def _protect_text(self, text: str) -> str:
        broken, lowered = self._break(text), text.lower()
        # What the template writes before or after the text must not complete a token with it.
        if any(lowered.startswith(token[cut:]) for token in self._lowered for cut in range(1, len(token))):
            broken = MARK + broken
        if any(lowered.endswith(token[:cut]) for token in self._lowered for cut in range(1, len(token))):
            broken += MARK
        return broken


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter of the name escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
