"""Chats as prompts: Jinja templates, rendered as transformers does, and text that stays text."""

import atexit
import itertools
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kerasllm.tokenizers import chat_templates
from kerasllm.tokenizers.json_fields import LONGEST_TOKEN

_RENDERER = Path(__file__).with_name("chat_renderer.py")
SECONDS_PER_PROMPT = 10.0
MEGABYTES_PER_PROMPT = 512

# The end of a message that is to be continued is found by it, as in transformers.
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

BUILT_IN_TEMPLATES: dict[str, str] = {
    "alpaca": chat_templates.ALPACA,
    "chatml": chat_templates.CHATML,
    "gemma": chat_templates.GEMMA,
    "inst": chat_templates.INST,
    "llama2": chat_templates.LLAMA2,
    "llama3": chat_templates.LLAMA3,
    "zephyr": chat_templates.ZEPHYR,
}


class ChatTemplate:
    """A Jinja text that turns a chat into a prompt.

    Templates come with models, from outside. One runs in Jinja's sandbox, in a process of its own
    that all templates share, and that is ended if it takes too long or too much memory.

    Args:
        source: The Jinja text.
    """

    def __init__(self, source: str):
        self.source = source

    @classmethod
    def built_in_or_source(cls, name_or_source: str) -> "ChatTemplate":
        """The template of that name in BUILT_IN_TEMPLATES, or of that text."""
        if not isinstance(name_or_source, str):
            raise TypeError(f"`chat_template` must be a string. Received: {name_or_source!r}")
        return cls(BUILT_IN_TEMPLATES.get(name_or_source, name_or_source))

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tools: Sequence[dict[str, Any]] | None = None,
        documents: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Renders a chat.

        Args:
            messages: The messages: objects of JSON types, mostly with "role" and "content".
            add_generation_prompt: Whether the prompt ends with the beginning of an answer.
            continue_final_message: Whether the prompt ends within the last message, which the model
                then goes on with; a string says which of its entries, True means "content".
            tools: JSON schemas of functions the model may call.
            documents: Documents to answer from.
            **variables: Whatever else the template knows; `bos_token` and the like among them.

        Returns:
            The prompt.

        Raises:
            ValueError: If the template fails, refuses the chat, takes longer than 10 seconds or more
                than 512 MiB, or the arguments do not fit.
            TypeError: If something is not of a JSON type.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("Either `add_generation_prompt` or `continue_final_message`. Received: both")
        messages = [_with_reasoning(message) for message in _checked_messages(messages)]
        final_text = self._tag_final_message(messages, continue_final_message)
        values = {
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        prompt = _render(self.source, values)
        for name in ("tools", "documents"):
            if values[name] and not _depends_on(self.source, values, name, prompt):
                raise ValueError(f"`{name}` need a chat template that uses them. Received: one without")
        return prompt if final_text is None else _cut_at_tag(prompt, final_text)

    def _tag_final_message(self, messages: list[dict[str, Any]], continued: bool | str) -> str | None:
        """Puts the tag after the entry to be continued; returns its text, None for none."""
        if not continued:
            return None
        name = continued if isinstance(continued, str) else "content"
        content = messages[-1].get(name) if messages else None
        if content is None:
            raise ValueError(f"`continue_final_message` needs a last message with {name!r}. Received: none")
        names = [name]
        if name in _REASONING_FIELDS:
            names = [other for other in _REASONING_FIELDS if messages[-1].get(other) == content]
        if not any(other in self.source for other in names):
            raise ValueError(f"`continue_final_message` needs a template that uses {name!r}.")
        if isinstance(content, str):
            messages[-1] |= dict.fromkeys(names, content + _CONTINUE_TAG)
            return content
        parts = list(content) if isinstance(content, list | tuple) else []
        for i in reversed(range(len(parts))):
            if isinstance(parts[i], dict) and isinstance(parts[i].get("text"), str):
                text = parts[i]["text"]
                parts[i] = parts[i] | {"text": text + _CONTINUE_TAG}
                messages[-1] |= {name: parts}
                return text
        raise ValueError("`continue_final_message` needs a last message with text. Received: none")


def _depends_on(source: str, values: dict[str, Any], name: str, prompt: str) -> bool:
    try:
        return _render(source, {**values, name: None}) != prompt
    except ValueError:  # it cannot do without
        return True


class Shield:
    """Keeps the spellings of special tokens in a chat from becoming these tokens.

    A mark that no text can hold is put into each spelling, and at the ends of texts with a part of
    one. It goes through the template with the text, and goes away after the special tokens are found.

    Args:
        special_tokens: The spellings.

    Raises:
        ValueError: If one is longer than any token of a model is.
    """

    MARK = b"\xfd"  # Never in valid UTF-8.
    _TEXT_MARK = MARK.decode("utf-8", "surrogateescape")
    _ESCAPED_MARK = r"\udcfd"  # What Python and JSON make of it where they quote a text.
    _ROLE = re.compile(r"[\w .-]+")

    def __init__(self, special_tokens: Sequence[str]):
        longest = max(map(len, special_tokens), default=0)
        if longest > LONGEST_TOKEN:
            raise ValueError(
                f"A special token must have up to {LONGEST_TOKEN} characters, for a chat to be shielded. "
                f"Received: one of {longest}"
            )
        # A template may change the case of a text.
        any_token = "|".join(map(re.escape, [*special_tokens, self._ESCAPED_MARK]))
        self._begins_token = re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL | re.IGNORECASE)
        self._single = {token for token in special_tokens if len(token) == 1}
        lowered = [token.lower() for token in special_tokens]
        # Sorted, as all their beginnings and ends could fill the memory.
        self._sorted = sorted(lowered)
        self._sorted_reversed = sorted(token[::-1] for token in lowered)
        self._longest = max(map(len, lowered), default=0)

    def protect_messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """As `protect`; the roles, which templates build special tokens of, stay as they are."""
        protected = []
        for message in _checked_messages(messages):
            role = message.get("role")
            if role is not None and not (isinstance(role, str) and self._ROLE.fullmatch(role)):
                raise ValueError(f"A role must be a plain word. Received: role={role!r:.80}")
            shielded = self.protect(message)
            protected.append(shielded if role is None else shielded | {"role": role})
        return protected

    def protect(self, value: Any) -> Any:
        """Puts marks into all strings of a value of JSON types."""
        if isinstance(value, str):
            return self._protect_text(value)
        if isinstance(value, dict):
            return {self._broken(key): self.protect(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.protect(item) for item in value]
        return value

    def to_bytes(self, prompt: str) -> bytes:
        """UTF-8 with MARK where the marks are."""
        return prompt.replace(self._ESCAPED_MARK, self._TEXT_MARK).encode("utf-8", "surrogateescape")

    def _broken(self, text: str) -> str:
        if not isinstance(text, str):
            return text
        text.encode("utf-8")  # Fails for half a surrogate pair, which the mark is one of.
        if not self._single.isdisjoint(text):
            raise ValueError(
                "A special token of one character cannot be in a chat's text. Received: "
                f"{sorted(self._single & set(text))}"
            )
        return self._begins_token.sub(rf"\1{self._TEXT_MARK}", text)

    def _protect_text(self, text: str) -> str:
        broken = self._broken(text)
        lowered = text.lower()
        # What the template writes before or after the text must not complete a token with it.
        lengths = range(1, min(self._longest, len(lowered)) + 1)
        if any(_begins_one(lowered[length - 1 :: -1], self._sorted_reversed) for length in lengths):
            broken = self._TEXT_MARK + broken
        if any(_begins_one(lowered[-length:], self._sorted) for length in lengths):
            broken += self._TEXT_MARK
        return broken


def _begins_one(text: str, sorted_tokens: list[str]) -> bool:
    """Whether a token begins with the text, and goes on."""
    place = bisect_right(sorted_tokens, text)
    return place < len(sorted_tokens) and sorted_tokens[place].startswith(text)


def _checked_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    messages = list(messages)
    if not all(isinstance(message, dict) for message in messages):
        raise TypeError(f"`messages` must be a list of dictionaries. Received: {str(messages)[:200]}")
    return messages


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read."""
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _cut_at_tag(prompt: str, final_text: str) -> str:
    tag = _CONTINUE_TAG.strip()
    if tag not in prompt or final_text.strip() not in prompt:
        raise ValueError("`continue_final_message` needs a template that keeps the last message as it is.")
    place = prompt.rindex(tag)
    if prompt.startswith(_CONTINUE_TAG, place):
        return prompt[:place]
    return prompt[:place].rstrip()  # The template trims texts, so that the end was the tag's.


class _Renderer:
    """The process that renders templates.

    Attributes:
        owner: The process that started it.
        is_waiting: Whether it may still answer something that nobody waits for any more.
    """

    def __init__(self):
        self.owner = os.getpid()
        self.is_waiting = False
        self._numbers = itertools.count()
        self._process = subprocess.Popen(
            # Without the script's folder among the modules: its files have common names.
            [sys.executable, "-P", str(_RENDERER), str(MEGABYTES_PER_PROMPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # An interrupt at the terminal is for the program that asks.
        )
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)

    def ask(self, request: bytes) -> dict[str, str]:
        """Sends a line and returns what is answered; an exception if nothing is."""
        self.is_waiting = True
        number = b"%d" % next(self._numbers)
        answered, _, answer = self._exchange(number + b"\n" + request).partition(b" ")
        if answered != number:
            raise RuntimeError("the renderer answered another request")
        answer = json.loads(answer)
        self.is_waiting = False
        return answer

    def _exchange(self, request: bytes) -> bytes:
        deadline = time.monotonic() + SECONDS_PER_PROMPT
        stdin, stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        to_write = memoryview(request)
        answer = []
        with selectors.DefaultSelector() as selector:
            selector.register(stdin, selectors.EVENT_WRITE)
            selector.register(stdout, selectors.EVENT_READ)
            while not (answer and answer[-1].endswith(b"\n")):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                ready = {key.fd for key, _ in selector.select(left)}
                if stdin in ready:
                    to_write = to_write[os.write(stdin, to_write) :]
                    if not to_write:
                        selector.unregister(stdin)
                if stdout in ready:
                    answer.append(os.read(stdout, 1 << 20))
                    if not answer[-1]:
                        raise EOFError
        return b"".join(answer)

    def close(self) -> str:
        """Ends the process; returns what it complained of."""
        if self.owner != os.getpid():
            return ""
        self._process.kill()
        _, complaint = self._process.communicate()
        return complaint.decode(errors="replace").strip()[-500:]


_lock = threading.Lock()
_renderer: _Renderer | None = None


def _render(source: str, variables: dict[str, Any]) -> str:
    try:
        request = json.dumps({"template": source, "variables": variables}).encode() + b"\n"
    except RecursionError:
        raise ValueError("A chat must not be nested so deep.") from None
    global _renderer
    with _lock:
        if _renderer is not None and _renderer.is_waiting:
            _end_renderer()
        if _renderer is None or _renderer.owner != os.getpid():  # After a fork it is the parent's.
            _renderer = _Renderer()
        try:
            answer = _renderer.ask(request)
        except BaseException as error:
            # What it may still answer must not become the next chat's prompt.
            complaint = _end_renderer()
            if not isinstance(error, EOFError | OSError | RuntimeError | ValueError):
                raise
            reason = complaint or "it took too much memory"
            if isinstance(error, TimeoutError):
                reason = f"it took longer than {SECONDS_PER_PROMPT:.0f} seconds"
            if isinstance(error, RuntimeError):
                reason = str(error)
            raise ValueError(f"A chat template must render. Received: {reason}") from None
    if "error" in answer:
        raise ValueError(f"A chat template must render. Received: {answer['error']}")
    return answer["prompt"]


@atexit.register
def _end_renderer() -> str:
    """Ends the process, if there is one; returns what it complained of."""
    global _renderer
    renderer, _renderer = _renderer, None
    return "" if renderer is None else renderer.close()
