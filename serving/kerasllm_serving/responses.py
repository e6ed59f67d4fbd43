"""OpenAI's API of responses: a request as that of a chat, and the answer as items.

Nothing is stored, so a request holds the whole conversation.
"""

import itertools
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kerasllm_serving.engine import Piece, RowRequest
from kerasllm_serving.fields import ApiError, Fields
from kerasllm_serving.stream import Usage
from kerasllm_serving.tool_calls import Call, Tools

# Fields that ask for something this server does not do: the values that ask for nothing, and a way out.
_UNSUPPORTED: Mapping[str, tuple[tuple, str]] = {
    "previous_response_id": ((None,), "responses are not stored; send the whole conversation as `input`"),
    "conversation": ((None,), "conversations are not stored; send all of it as `input`"),
    "store": ((None, False), "responses are not stored; leave it out"),
    "background": ((None, False), "responses are not stored; leave it out"),
    "truncation": ((None, "disabled"), "what does not fit is refused; send less"),
    "include": ((None, []), "there is nothing to include"),
    "prompt": ((None,), "prompts are not stored; send `instructions` and `input`"),
    "reasoning": ((None, {}), "leave it out"),
    "top_logprobs": ((None, 0), "use /v1/chat/completions"),
    "max_tool_calls": ((None,), "this server has no tools of its own"),
    "n": ((None, 1), "a response has one text"),
}
# What the fields of a chat have another name for.
_OWN = ("input", "instructions", "text", "max_output_tokens", "metadata", "service_tier", "stream_options")
_TEXT_PARTS = ("input_text", "output_text", "text")


def as_chat(fields: Fields) -> Fields:
    """Turns the request of a response into that of a chat.

    Args:
        fields: The request.

    Returns:
        The fields of a chat.

    Raises:
        ApiError: If the request cannot be read, or asks for what there is not.
    """
    for name, (neutral, instead) in _UNSUPPORTED.items():
        if fields.get(name) not in neutral:
            raise ApiError(400, f"`{name}` is not supported: {instead}.", name, "unsupported_value")
    chat = fields.without(*_OWN, *_UNSUPPORTED)
    messages = _read_input(fields)
    if instructions := fields.string("instructions"):
        messages.insert(0, {"role": "system", "content": instructions})
    chat["messages"] = messages
    chat["max_completion_tokens"] = fields.integer("max_output_tokens", None, 1, 2**31 - 1)
    form = _text_format(fields)
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}
    chat["response_format"] = form
    return Fields(chat)


def _text_format(fields: Fields) -> dict[str, Any]:
    text = fields.get("text", {})
    form = (text.get("format") if isinstance(text, dict) else None) or {"type": "text"}
    if not isinstance(text, dict) or not isinstance(form, dict):
        fields.refuse("text", "an object whose `format` is an object")
    return form


def _read_input(fields: Fields) -> list[dict[str, Any]]:
    """The items of a request as messages."""
    items = fields.get("input")
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        fields.refuse("input", "a string or a list of items")
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item.get("type", "message")
        if kind == "message":
            # No chat template knows the role by its new name.
            role = "system" if item.get("role") == "developer" else item.get("role")
            messages.append({"role": role, "content": _read_content(item.get("content"))})
        elif kind == "function_call":
            # The calls of one answer are one message, with the text before them.
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            content = _read_content(item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        else:
            raise ApiError(400, f"Items of type `{kind}` are not supported by this server.", "input")
    return messages


def _read_content(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, "The content of an item must be a string or a list of parts.", "input")
    for part in content:
        is_text = isinstance(part, dict) and part.get("type") in _TEXT_PARTS
        if not (is_text and isinstance(part.get("text"), str)):
            raise ApiError(400, "Only parts of text are supported in an item.", "input")
    return "".join(part["text"] for part in content)


class ResponseForm:
    """What a response looks like; see `stream.Form`.

    Args:
        fields: The request.
        model: The model's name.
        row: What is generated.
        tools: The tools that may be called.
    """

    has_named_events = True

    def __init__(self, fields: Fields, model: str, row: RowRequest, tools: Tools | None) -> None:
        self._response = {
            "id": _make_id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": fields.string("instructions"),
            "max_output_tokens": fields.get("max_output_tokens"),
            "max_tool_calls": None,
            "metadata": fields.get("metadata", {}),
            "model": model,
            "output": [],
            "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": row.temperature,
            "text": {"format": _text_format(fields)},
            "tool_choice": fields.get("tool_choice", "auto"),
            "tools": [
                {"description": None, "parameters": None, "strict": None, **tool}
                for tool in fields.get("tools", [])
            ],
            "top_logprobs": 0,
            "top_p": row.top_p,
            "truncation": "disabled",
        } | ({"user": fields.get("user")} if fields.get("user") else {})
        self._reader = tools.reader() if tools else None
        self._numbers = itertools.count()
        self._message: dict[str, Any] | None = None  # The one that is being written.
        self._reason: str | None = None

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The response."""
        for piece in pieces:
            list(self.events(piece))
        list(self.end(usage))
        return self._response

    def start(self) -> Iterator[dict[str, Any]]:
        """That there is a response."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=dict(self._response))

    def events(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """More of a message, and calls of functions."""
        self._reason = piece.finish_reason
        content, calls = piece.text, []
        if self._reader:
            content, calls = self._reader.push(piece.text, is_last=piece.finish_reason is not None)
        if content:
            yield from self._write(content)
        for call in calls:
            yield from self._finish_message("completed")
            yield from self._call(call)

    def end(self, usage: Usage) -> Iterator[dict[str, Any]]:
        """The response as a whole."""
        status = "incomplete" if self._reason == "length" else "completed"
        if not self._response["output"]:
            yield from self._write("")
        yield from self._finish_message(status)
        if status == "incomplete":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._response |= {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "usage": {
                "input_tokens": usage.read,
                "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
                "output_tokens": usage.made,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.read + usage.made,
            },
        }
        yield self._event(f"response.{status}", response=self._response)

    def error(self, error: ApiError) -> dict[str, Any]:
        """That the response has failed."""
        problem = {"code": "server_error", "message": error.message}
        return self._event(
            "response.failed", response=self._response | {"status": "failed", "error": problem}
        )

    # Items. Each is written where it is in the response, whose last state the events show.

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(self._numbers), **values}

    def _add(self, item: dict[str, Any]) -> Iterator[dict[str, Any]]:
        self._response["output"].append(item)
        index = len(self._response["output"]) - 1
        yield self._event("response.output_item.added", output_index=index, item=_copy(item))

    def _finish(self, item: dict[str, Any], status: str) -> Iterator[dict[str, Any]]:
        item["status"] = status
        index = len(self._response["output"]) - 1
        yield self._event("response.output_item.done", output_index=index, item=_copy(item))

    def _of_text(self, kind: str, **values: Any) -> dict[str, Any]:
        """An event of the message's only part."""
        index = len(self._response["output"]) - 1
        where = {"item_id": self._message["id"], "output_index": index, "content_index": 0}
        return self._event(kind, **where, **values)

    def _write(self, text: str) -> Iterator[dict[str, Any]]:
        if self._message is None:
            self._message = {
                "id": _make_id("msg"), "type": "message", "role": "assistant", "status": "in_progress",
                "content": [],
            }  # fmt: skip
            yield from self._add(self._message)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self._message["content"].append(part)
            yield self._of_text("response.content_part.added", part=dict(part))
        self._message["content"][0]["text"] += text
        if text:
            yield self._of_text("response.output_text.delta", delta=text, logprobs=[])

    def _finish_message(self, status: str) -> Iterator[dict[str, Any]]:
        if self._message is None:
            return
        part = self._message["content"][0]
        yield self._of_text("response.output_text.done", text=part["text"], logprobs=[])
        yield self._of_text("response.content_part.done", part=dict(part))
        yield from self._finish(self._message, status)
        self._message = None

    def _call(self, call: Call) -> Iterator[dict[str, Any]]:
        item = {
            "id": _make_id("fc"), "type": "function_call", "status": "in_progress", "call_id": call.id,
            "name": call.name, "arguments": "",
        }  # fmt: skip
        yield from self._add(item)
        where = {"item_id": item["id"], "output_index": len(self._response["output"]) - 1}
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **where, delta=call.arguments)
        item["arguments"] = call.arguments
        yield self._event(f"{kind}.done", **where, name=call.name, arguments=call.arguments)
        yield from self._finish(item, "completed")


def _make_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _copy(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: [dict(part) for part in value] if key == "content" else value for key, value in item.items()
    }
