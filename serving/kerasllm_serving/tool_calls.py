"""Calls of tools: how a model's chat template writes them, and how they are read in an answer.

No template says in words how its model writes a call. So it is asked to render a chat in which one was
made, and what stands there is what the model was trained to write: JSON with the name and the arguments,
alone (Llama 3), between tags (Hermes, Qwen) or in a list behind a token (Mistral).
"""

import dataclasses
import json
import os
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kerasllm_serving.chat import ChatTemplate
from kerasllm_serving.constraints import JSON_OPTIONS
from kerasllm_serving.engine import held_back
from kerasllm_serving.errors import ServingError
from kerasllm_serving.fields import ApiError, Fields

_QUESTION, _ANSWER = "kerasllmquestion", "kerasllmanswer"
_NAMES = ("kerasllmfirst", "kerasllmsecond")
_ARGUMENTS = {"kerasllmkey": "kerasllmvalue"}
_DECODER = json.JSONDecoder(strict=False)  # Models write line breaks into strings.
# Where each function's arguments are, beside its name.
_ARGUMENT_KEYS = ("arguments", "parameters")


@dataclasses.dataclass(frozen=True)
class CallForm:
    """How calls are written.

    Args:
        before: What stands before the first call.
        after: What stands behind the last one.
        between: What stands between two; None: there is only one.
        key: The name of the arguments in the JSON of a call.
        opening: The plain text by which a call is known; empty: there is none, or a special token, which
            no text has.
        closing: The plain text behind a call, or behind a list of calls.
        is_list: Whether the calls are the items of a list.
    """

    before: str
    after: str
    between: str | None
    key: str
    opening: str
    closing: str
    is_list: bool


def find_call_form(template: ChatTemplate) -> CallForm:
    """Finds out how a chat template writes calls.

    Args:
        template: The template.

    Returns:
        The form.

    Raises:
        ValueError: If it knows no tools, or writes calls in a way that is not known here.
    """
    question = {"role": "user", "content": _QUESTION}

    def render(*names: str, tools: Any = _PROBE_TOOLS) -> str:
        calls = [
            {
                "id": f"probe000{index}",
                "type": "function",
                "function": {"name": name, "arguments": _ARGUMENTS},
            }
            for index, name in enumerate(names)
        ]
        said = {"content": "", "tool_calls": calls} if calls else {"content": _ANSWER}
        rendered = template.render([question, {"role": "assistant", **said}], False, {"tools": tools})
        return rendered.decode("utf-8", "surrogateescape")

    try:
        plain = render()
        if plain == render(tools=None):
            raise ValueError("The model's chat template knows no tools.")
    except ServingError as error:
        raise ValueError(f"The model's chat template refuses tools: {error.message}") from error
    header, _, end = plain.rpartition(_QUESTION)[2].partition(_ANSWER)
    try:
        text = render(_NAMES[0]).rpartition(_QUESTION)[2]
    except ServingError as error:
        raise ValueError(f"The model's chat template takes no calls of tools: {error.message}") from error
    start, stop, key = _find_call(text, _NAMES[0])
    common = os.path.commonprefix([text[:start], header])
    if common != header:  # Two tags may begin alike.
        common = re.match(r"(?:.*[\s>\]])?", common, re.DOTALL)[0]
    before, after = text[len(common) : start], text[stop:].removesuffix(end)
    try:
        text = render(*_NAMES).rpartition(_QUESTION)[2]
        between = text[_find_call(text, _NAMES[0])[1] : _find_call(text, _NAMES[1])[0]]
    except (ServingError, ValueError):
        between = None
    opening, closing = before.strip(), after.strip()
    is_list = opening.endswith("[") and closing.startswith("]")
    if is_list:
        opening, closing = opening[:-1].strip(), closing[1:].strip()
    special = template.special_tokens
    return CallForm(
        before, after, between, key,
        opening="" if opening in special else opening,
        closing="" if closing in special else closing,
        is_list=is_list,
    )  # fmt: skip


_PROBE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A function.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": "A word."} for key in _ARGUMENTS},
                "required": list(_ARGUMENTS),
            },
        },
    }
    for name in _NAMES
]


def _find_call(text: str, name: str) -> tuple[int, int, str]:
    """Finds the JSON of a call: where it begins and ends, and the key of its arguments."""
    start = text.find("{")
    while start >= 0:
        try:
            value, stop = _DECODER.raw_decode(text, start)
        except ValueError:
            value = None
        if isinstance(value, dict) and value.get("name") == name:
            for key in _ARGUMENT_KEYS:
                if value.get(key) == _ARGUMENTS:
                    return start, stop, key
        start = text.find("{", start + 1)
    raise ValueError(
        "The model's chat template writes calls of tools in a way that this server does not know: not as "
        "JSON with `name` and `arguments` or `parameters`."
    )


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a tool.

    Args:
        name: The function.
        arguments: JSON.
        id: By which the client answers.
    """

    name: str
    arguments: str
    id: str

    def describe(self) -> dict[str, Any]:
        """OpenAI's object."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class CallReader:
    """Reads the calls in a text that comes in pieces.

    Args:
        form: How calls are written.
        names: The functions that there are; what calls another is text.
    """

    def __init__(self, form: CallForm, names: Sequence[str]) -> None:
        self._form = form
        self._names = set(names)
        self._held = ""  # What may be, or become, a call.
        self._is_call = False
        self._is_start = True
        self._is_behind_call = False

    def push(self, text: str, is_last: bool = False) -> tuple[str, list[Call]]:
        """Takes more of the text.

        Args:
            text: The new piece.
            is_last: Whether nothing follows.

        Returns:
            What is plain text, and the calls that are complete.
        """
        self._held += text
        content, calls = "", []
        while True:
            if not self._is_call:
                content += self._take_text()
            if not self._is_call:
                break
            found = self._take_calls(is_last)
            if found is None:
                break
            calls += found
        if is_last and not (self._is_behind_call and self._held.isspace()):
            content += self._held
        return content, calls

    def _take_text(self) -> str:
        """Takes what is before a call, if it is certain that it is."""
        opening = self._form.opening
        if self._is_behind_call:  # White space around calls is the template's.
            self._held = self._held.lstrip()
        if not opening:
            # Without a sign before it, a call is the whole answer.
            text = self._held.lstrip()
            self._is_call = self._is_start and text.startswith("[" if self._form.is_list else "{")
            if self._is_call or (self._is_start and not text):
                return ""
            taken, self._held, self._is_start = self._held, "", False
            return taken
        start = self._held.find(opening)
        self._is_call = start >= 0
        if start < 0:
            data = self._held.encode()
            start = len(data[: len(data) - held_back(data, [opening])].decode())
        taken = self._held[:start].rstrip()
        self._held = self._held[start if self._is_call else len(taken) :]
        self._is_behind_call &= not taken
        return taken

    def _take_calls(self, is_last: bool) -> list[Call] | None:
        """Takes calls from the beginning of what is held; None: they are not complete, or none."""
        form = self._form
        start = self._held.find("[" if form.is_list else "{", len(form.opening))
        if start < 0:
            return None
        try:
            value, stop = _DECODER.raw_decode(self._held, start)
        except ValueError:
            return None
        rest = self._held[stop:]
        if not is_last and form.closing and len(rest.lstrip()) < len(form.closing):
            return None
        calls = [self._read(item) for item in (value if form.is_list else [value])]
        if None in calls:
            # No call, so it is text; what comes behind may be one again.
            return None
        self._held = rest.lstrip().removeprefix(form.closing).lstrip()
        self._is_call = self._is_start = False
        self._is_behind_call = True
        return calls

    def _read(self, value: Any) -> Call | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = next((value[key] for key in _ARGUMENT_KEYS if key in value), {})
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        return Call(value["name"], arguments, _make_id())


def _make_id() -> str:
    # Mistral's templates want nine such characters.
    return "".join(random.choices(string.ascii_letters + string.digits, k=9))


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Args:
        form: How calls of them are written.
        functions: OpenAI's objects with `name`, `description` and `parameters`.
        must_call: Those of which at least one has to be called; empty: there need be no call.
        is_parallel: Whether there may be several calls.
    """

    form: CallForm
    functions: Sequence[Mapping[str, Any]]
    must_call: Sequence[Mapping[str, Any]] = ()
    is_parallel: bool = True

    @property
    def described(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [{"type": "function", "function": dict(function)} for function in self.functions]

    def grammar(self, literal: Callable[[str], str], answer: Mapping[str, Any] | None = None) -> str:
        """Makes the grammar of an answer that calls tools.

        Args:
            literal: Writes a text for a grammar, see `ConstraintFactory.literal`.
            answer: The JSON schema of an answer that calls none. None: there must be a call.

        Returns:
            The grammar, in llguidance's Lark.
        """
        form, functions = self.form, self.must_call or self.functions
        more = f"({literal(form.between)} call)*" if self.is_parallel and form.between is not None else ""
        rules = [
            "start: calls" + ("" if answer is None else " | answer"),
            f"calls: {literal(form.before)} call {more} {literal(form.after)}",
            "call: " + " | ".join(f"call_{number}" for number in range(len(functions))),
        ]
        for number, function in enumerate(functions):
            parameters = dict(function["parameters"])
            # References in a schema begin at its root.
            shared = {key: parameters.pop(key) for key in ("$defs", "definitions") if key in parameters}
            schema = {
                **shared,
                "x-guidance": JSON_OPTIONS,
                "type": "object",
                "properties": {"name": {"const": function["name"]}, form.key: parameters},
                "required": ["name", form.key],
                "additionalProperties": False,
            }
            rules.append(f"call_{number}: %json {json.dumps(schema)}")
        if answer is not None:
            rules.append(f"answer: %json {json.dumps({**answer, 'x-guidance': JSON_OPTIONS})}")
        return "\n".join(rules)

    def reader(self) -> CallReader:
        """Returns what reads the calls in one answer."""
        return CallReader(self.form, [function["name"] for function in self.functions])


def read_tools(fields: Fields, form: Callable[[], CallForm]) -> Tools | None:
    """Reads `tools`, `tool_choice` and `parallel_tool_calls`.

    Args:
        fields: The request; a tool is an object with `type` and `function`, or, in the API of responses,
            one with `type` and what else would be in `function`.
        form: Gives the model's form of calls; a ValueError if it has none.

    Returns:
        The tools; None: there are none, or none may be called.

    Raises:
        ApiError: If they cannot be read, or the model knows no tools.
    """
    tools = fields.get("tools", [])
    if not isinstance(tools, list):
        fields.refuse("tools", "a list")
    functions = [_read_function(fields, tool) for tool in tools]
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        fields.refuse("tools", "functions of different names")
    choice = fields.get("tool_choice", "auto" if tools else "none")
    is_parallel = fields.boolean("parallel_tool_calls", True)
    if choice == "none":
        return None
    if not functions:
        if choice == "auto":
            return None
        fields.refuse("tool_choice", "left out where there are no `tools`")
    must_call: list = []
    if choice == "required":
        must_call = functions
    elif isinstance(choice, dict) and choice.get("type") == "function":
        named = choice.get("function", choice)
        must_call = [f for f in functions if isinstance(named, dict) and f["name"] == named.get("name")]
        if not must_call:
            fields.refuse("tool_choice", f"one of the tools, which are {', '.join(names)}")
    elif choice != "auto":
        fields.refuse("tool_choice", "`none`, `auto`, `required` or an object that names a function")
    try:
        return Tools(form(), functions, must_call, is_parallel and not isinstance(choice, dict))
    except ValueError as error:
        raise ApiError(400, f"`tools` cannot be used: {error}", "tools", "unsupported_value") from error


def _read_function(fields: Fields, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        fields.refuse("tools", "a list of objects of type `function`; this server has no tools of its own")
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        fields.refuse("tools", "functions with a `name`")
    parameters = function.get("parameters")
    if not isinstance(parameters, dict | None):
        fields.refuse("tools", "functions whose `parameters` are a JSON schema")
    return {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": parameters or {"type": "object", "properties": {}},
    }
