"""OpenAI's API: completions, chats, embeddings and models, with vLLM's additions to it."""

import asyncio
import base64
import dataclasses
import functools
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np

from kerasllm_serving import responses
from kerasllm_serving.constraints import STRUCTURES, Constraint, MissingLibrary, read_schema
from kerasllm_serving.engine import Engine, Piece, RowRequest
from kerasllm_serving.errors import ServingError
from kerasllm_serving.fields import ApiError, Fields, from_serving_error
from kerasllm_serving.language_model import LanguageModel
from kerasllm_serving.stream import Form, Stream, Usage
from kerasllm_serving.telemetry import annotate
from kerasllm_serving.tool_calls import Call, CallReader, Tools, read_tools

_MOST_CHOICES = 128
_MOST_PROMPTS = 128
_MOST_STOP_STRINGS, _LONGEST_STOP_STRING = 16, 256  # of the exported graph
_MOST_ALTERNATIVES = 20
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's

# Fields that ask for something this server does not do, and the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple] = {
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "suffix": (None, ""),
    "guided_decoding_backend": (None, "auto", "guidance"),
    "use_beam_search": (None, False),
    "prompt_logprobs": (None,),
    "chat_template": (None,),
}


@dataclasses.dataclass
class Served:
    """A language model that is served.

    Args:
        model: The model.
        engine: What generates with it; None: it cannot.
    """

    model: LanguageModel
    engine: Engine | None


class OpenAiApi:
    """Answers requests; knows nothing of sockets.

    Args:
        find: Gives the model of a name, of None the only one, which stays while it is held; raises a
            KeyError if there is none.
        executor: Threads for what takes the processor: templates and tokenizers.
        timeout: Seconds after which a generation is ended.
    """

    def __init__(
        self,
        find: Callable[[str | None], AbstractContextManager[Served]],
        executor: Executor,
        timeout: float | None,
    ) -> None:
        self._find = find
        self._executor = executor
        self._timeout = timeout

    async def _run(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        call = functools.partial(function, *arguments, **options)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        except ServingError as error:
            raise from_serving_error(error) from error

    def _served(self, fields: Fields, held: ExitStack) -> Served:
        name = fields.string("model")
        try:
            served = held.enter_context(self._find(name))
        except KeyError:
            raise ApiError(404, f"The model `{name}` does not exist.", "model", "model_not_found") from None
        annotate({"gen_ai.request.model": served.model.name})
        return served

    def _generating(self, fields: Fields, held: ExitStack) -> tuple[LanguageModel, Engine]:
        served = self._served(fields, held)
        if served.engine is None:
            what = "does not write text" if not served.model.can_generate else "was exported without slots"
            raise ApiError(
                400,
                f"The model `{served.model.name}` {what}, so this endpoint cannot answer. "
                "Export it with `kerasllm export MODEL PATH --slots 8`.",
                "model",
                "unsupported_model",
            )
        for name, neutral in _UNSUPPORTED.items():
            if fields.get(name) not in neutral:
                raise ApiError(400, f"`{name}` is not supported by this server.", name, "unsupported_value")
        return served.model, served.engine

    # Endpoints. Each returns a JSON object or a stream, from a model that is held until `held` is closed.

    async def completions(self, body: bytes, held: ExitStack) -> "dict[str, Any] | Stream":
        """POST /v1/completions."""
        fields = Fields(body)
        model, engine = self._generating(fields, held)
        prompts = await self._read_prompts(fields, model)
        echo = fields.boolean("echo")
        wanted = fields.integer("logprobs", None, 0, _MOST_ALTERNATIVES)
        if echo and wanted is not None:
            raise ApiError(400, "`echo` with `logprobs` is not supported by this server.", "logprobs")
        n = fields.integer("n", 1, 1, _MOST_CHOICES)
        if fields.integer("best_of", n, 1, _MOST_CHOICES) != n:
            fields.refuse("best_of", f"as large as `n`, {n}")
        most = fields.integer("max_tokens", _DEFAULT_COMPLETION_TOKENS, 1, engine.model.length)
        constraint = await self._read_constraint(fields, model)
        rows = [
            row
            for _, ids in prompts
            for row in _read_rows(fields, model, ids, most, n, wanted or 0, constraint)
        ]
        form = _CompletionForm(model, fields, [prompt if echo else "" for prompt, _ in prompts], n, wanted)
        return await self._generate(fields, engine, rows, form, sum(len(ids) for _, ids in prompts))

    async def chat_completions(self, body: bytes, held: ExitStack) -> "dict[str, Any] | Stream":
        """POST /v1/chat/completions."""
        fields = Fields(body)
        model, engine = self._generating(fields, held)
        wanted = None
        if fields.boolean("logprobs"):
            wanted = fields.integer("top_logprobs", 0, 0, _MOST_ALTERNATIVES)
        elif fields.get("top_logprobs"):
            fields.refuse("top_logprobs", "left out where `logprobs` is not true")
        rows, tools = await self._read_chat(fields, model, engine, wanted or 0)
        form = _ChatForm(model, fields, wanted, tools)
        return await self._generate(fields, engine, rows, form, len(rows[0].token_ids))

    async def responses(self, body: bytes, held: ExitStack) -> "dict[str, Any] | Stream":
        """POST /v1/responses."""
        fields = Fields(body)
        chat = responses.as_chat(fields)
        model, engine = self._generating(chat, held)
        rows, tools = await self._read_chat(chat, model, engine, 0)
        form = responses.ResponseForm(fields, model.name, rows[0], tools)
        return await self._generate(fields, engine, rows, form, len(rows[0].token_ids))

    async def _read_chat(
        self, fields: Fields, model: LanguageModel, engine: Engine, alternatives: int
    ) -> tuple[list[RowRequest], Tools | None]:
        """The rows of a chat, all of one prompt, and the tools that may be called."""
        tools = await self._read_tools(fields, model)
        ids = await self._encode_chat(fields, model, tools)
        room = engine.model.length - len(ids)
        if room < 1:
            raise ApiError(
                400,
                f"This model's maximum context length is {engine.model.length} tokens. Received: messages "
                f"of {len(ids)} tokens.",
                "messages",
                "context_length_exceeded",
            )
        most = fields.integer("max_tokens", None, 1, engine.model.length)
        most = fields.integer("max_completion_tokens", most, 1, engine.model.length)
        if most is None:
            most = min(room, int(model.generation_config.get("max_new_tokens") or room))
        n = fields.integer("n", 1, 1, _MOST_CHOICES)
        constraint = await self._read_constraint(fields, model, tools)
        return _read_rows(fields, model, ids, most, n, alternatives, constraint), tools

    async def embeddings(self, body: bytes, held: ExitStack) -> dict[str, Any]:
        """POST /v1/embeddings."""
        fields = Fields(body)
        model = self._served(fields, held).model
        if not model.can_embed:
            raise ApiError(400, f"The model `{model.name}` does not embed texts.", "model")
        texts = fields.get("input")
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
            fields.refuse("input", "a string or a list of strings, none of them empty")
        form = fields.string("encoding_format", "float")
        if form not in ("float", "base64"):
            fields.refuse("encoding_format", '"float" or "base64"')
        vectors = (await self._run(model.embed, texts)).astype("<f4")
        if fields.integer("dimensions", vectors.shape[1], 1, 2**31) != vectors.shape[1]:
            fields.refuse("dimensions", f"left out, or {vectors.shape[1]}")
        count = await self._run(model.count_tokens, texts)
        data = []
        for index, vector in enumerate(vectors):
            value = base64.b64encode(vector.tobytes()).decode() if form == "base64" else vector.tolist()
            data.append({"object": "embedding", "index": index, "embedding": value})
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": model.name, "usage": usage}

    async def tokenize(self, body: bytes, held: ExitStack) -> dict[str, Any]:
        """POST /tokenize: `prompt`, or `messages`, to ids."""
        fields = Fields(body)
        served = self._served(fields, held)
        if fields.get("messages") is not None:
            model, _ = self._generating(fields, held)
            ids = await self._encode_chat(fields, model, await self._read_tools(fields, model))
        else:
            if not served.model.can_tokenize:
                raise ApiError(
                    400, f"The model `{served.model.name}` has no signature `tokenize`.", "model"
                )
            prompt = fields.string("prompt")
            if prompt is None:
                fields.refuse("prompt", "a string")
            ids = await self._run(served.model.tokenize, prompt)
        longest = served.engine.model.length if served.engine else None
        return {"count": len(ids), "max_model_len": longest, "tokens": ids}

    async def detokenize(self, body: bytes, held: ExitStack) -> dict[str, Any]:
        """POST /detokenize: `tokens` to text."""
        fields = Fields(body)
        model = self._served(fields, held).model
        if not model.can_tokenize:
            raise ApiError(400, f"The model `{model.name}` has no signature `detokenize`.", "model")
        ids = fields.get("tokens")
        if not _are_token_ids(ids):
            fields.refuse("tokens", "a list of token ids")
        return {"prompt": await self._run(model.detokenize, ids)}

    async def generate(self, body: bytes, held: ExitStack) -> dict[str, Any]:
        """POST /generate: `text` to `generated_text`, as the model's own configuration says."""
        fields = Fields(body)
        served = self._served(fields, held)
        model, engine = served.model, served.engine
        text = fields.string("text")
        if text is None:
            fields.refuse("text", "a string")
        if not model.can_generate:
            raise ApiError(400, f"The model `{model.name}` does not write text.", "model")
        if engine is None:
            outputs = await self._run(
                model.servable.call, "serving_default", {"prompt": np.array([text.encode()], object)}
            )
            return {"generated_text": outputs["text"][0].decode()}
        ids = await self._run(model.tokenize, text)
        room = max(engine.model.length - len(ids), 1)
        default = min(room, int(model.generation_config.get("max_new_tokens") or room))
        most = fields.integer("max_new_tokens", default, 1, engine.model.length)
        rows = _read_rows(fields, model, ids, most, 1, 0)
        result = await self._generate(
            fields, engine, rows, _CompletionForm(model, fields, [""], 1, None), len(ids)
        )
        if isinstance(result, Stream):
            result.close()
            fields.refuse("stream", "left out here; /v1/completions streams")
        return {"generated_text": result["choices"][0]["text"]}

    # Reading

    async def _read_prompts(self, fields: Fields, model: LanguageModel) -> list[tuple[str, list[int]]]:
        """The prompts, as texts for `echo`, and their ids."""
        prompt = fields.get("prompt")
        if isinstance(prompt, str) or _are_token_ids(prompt):
            prompt = [prompt]
        if not isinstance(prompt, list) or not 1 <= len(prompt) <= _MOST_PROMPTS:
            fields.refuse(
                "prompt", f"a string, a list of token ids, or a list of up to {_MOST_PROMPTS} such"
            )
        found = []
        for each in prompt:
            if isinstance(each, str):
                found.append((each, await self._run(model.tokenize, each)))
            elif _are_token_ids(each):
                text = await self._run(model.detokenize, each) if fields.boolean("echo") else ""
                found.append((text, each))
            else:
                fields.refuse("prompt", "made of strings, or of lists of token ids")
            if not found[-1][1]:
                raise ApiError(400, "A prompt must hold at least one token.", "prompt")
        return found

    async def _read_tools(self, fields: Fields, model: LanguageModel) -> Tools | None:
        _check_template(model)
        return await self._run(read_tools, fields, lambda: model.call_form)

    async def _encode_chat(self, fields: Fields, model: LanguageModel, tools: Tools | None) -> list[int]:
        messages = fields.get("messages")
        if not isinstance(messages, list) or not messages:
            fields.refuse("messages", "a list with at least one message")
        messages = [_read_message(fields, message) for message in messages]
        options = fields.get("chat_template_kwargs", {})
        if not isinstance(options, dict) or {"messages", "add_generation_prompt"} & options.keys():
            fields.refuse("chat_template_kwargs", "an object of what the chat template knows")
        return await self._run(
            model.encode_chat,
            messages,
            add_generation_prompt=fields.boolean("add_generation_prompt", True),
            variables=options | ({"tools": tools.described} if tools else {}),
        )

    async def _read_constraint(
        self, fields: Fields, model: LanguageModel, tools: Tools | None = None
    ) -> Constraint | None:
        """What the answer has to keep to."""
        asked = _read_structures(fields)
        if tools and tools.must_call:
            asked.append(("tool_choice", "tools", None))
        if not asked:
            return None
        if len(asked) > 1:
            names = ", ".join(f"`{name}`" for name, _, _ in asked)
            raise ApiError(400, f"An answer may have one structure. Received: {names}", asked[1][0])
        name, kind, value = asked[0]
        factory = model.constraints
        if factory is None:
            raise ApiError(
                400,
                f"`{name}` needs a SavedModel whose texts a token ends. The model `{model.name}` is none.",
                name,
            )
        if fields.get("ignore_eos") or fields.get("min_tokens"):
            raise ApiError(
                400, f"`{name}` says where the answer ends, so `ignore_eos` and `min_tokens` cannot.", name
            )

        def make() -> Constraint:
            if kind == "tools":
                return factory.make("grammar", tools.grammar(factory.literal))
            if kind == "json" and tools:  # An answer that the schema allows, or a call.
                return factory.make("grammar", tools.grammar(factory.literal, read_schema(value)))
            return factory.make(kind, value)

        try:
            return await self._run(make)
        except MissingLibrary as error:
            raise ApiError(400, f"`{name}`: {error}", name, "unsupported_value") from error
        except ValueError as error:
            raise ApiError(400, f"`{name}` {error}", name) from error

    # Generating

    async def _generate(
        self, fields: Fields, engine: Engine, rows: list[RowRequest], form: Form, prompt_tokens: int
    ) -> "dict[str, Any] | Stream":
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        stream = Stream(engine, rows, form, prompt_tokens, deadline)
        if fields.boolean("stream"):
            return stream
        return await stream.collect()


class _Form:
    """What answers look like, but for what completions and chats have each of their own."""

    prefix = object = chunk_object = ""
    has_named_events = False

    def __init__(self, model: LanguageModel, fields: Fields) -> None:
        options = fields.get("stream_options", {})
        if not isinstance(options, dict):
            fields.refuse("stream_options", "an object")
        if options and not fields.boolean("stream"):
            fields.refuse("stream_options", "left out where `stream` is not true")
        self._has_usage = options.get("include_usage") is True
        self._begun: set[int] = set()
        self._model = model
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.object,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": f"{model.name}-{model.servable.version}",
        }

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        choices = [self.choice(piece) for piece in pieces]
        return self._head | {"choices": choices, "usage": _usage(usage)}

    def start(self) -> list[dict[str, Any]]:
        return []

    def events(self, piece: Piece) -> list[dict[str, Any]]:
        choices = self.delta(piece)
        if piece.row not in self._begun:
            self._begun.add(piece.row)
            choices = self.begin(piece.row) + choices
        return [self._chunk([choice]) for choice in choices]

    def end(self, usage: Usage) -> list[dict[str, Any]]:
        return [self._chunk([]) | {"usage": _usage(usage)}] if self._has_usage else []

    def error(self, error: ApiError) -> dict[str, Any]:
        return error.body

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._has_usage else {}
        return self._head | {"object": self.chunk_object, "choices": choices} | usage

    def _tokens(self, piece: Piece) -> dict[int, bytes]:
        """The bytes of all tokens that a piece names."""
        ids = {*piece.token_ids, *(number for pairs in piece.alternatives for number, _ in pairs)}
        return dict(zip(ids, self._model.slots.token_texts(list(ids)), strict=True))


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.read,
        "completion_tokens": usage.made,
        "total_tokens": usage.read + usage.made,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }


class _CompletionForm(_Form):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: LanguageModel, fields: Fields, echoes: Sequence[str], n: int, wanted: int | None
    ) -> None:
        super().__init__(model, fields)
        self._echoes = echoes
        self._n = n
        self._wanted = wanted
        self._offsets: dict[int, int] = {}

    def begin(self, row: int) -> list[dict[str, Any]]:
        echo = self._echoes[row // self._n]
        return [self._choice(row, echo, None, None)] if echo else []

    def delta(self, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.finish_reason or self._wanted is not None):
            return []
        return [self._choice(piece.row, piece.text, self._logprobs(piece), piece.finish_reason)]

    def choice(self, piece: Piece) -> dict[str, Any]:
        text = self._echoes[piece.row // self._n] + piece.text
        return self._choice(piece.row, text, self._logprobs(piece), piece.finish_reason)

    def _choice(self, row: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": row, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._wanted is None:
            return None
        names = {number: text.decode(errors="replace") for number, text in self._tokens(piece).items()}
        tokens = [names[number] for number in piece.token_ids]
        offsets, offset = [], self._offsets.get(piece.row, 0)
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._offsets[piece.row] = offset
        top = []
        for number, logprob, pairs in zip(piece.token_ids, piece.logprobs, piece.alternatives, strict=True):
            top.append({names[other]: value for other, value in pairs} | {names[number]: logprob})
        return {
            "tokens": tokens,
            "token_logprobs": piece.logprobs,
            "top_logprobs": top if self._wanted else None,
            "text_offset": offsets,
        }


class _ChatForm(_Form):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: LanguageModel, fields: Fields, wanted: int | None, tools: Tools | None
    ) -> None:
        super().__init__(model, fields)
        self._wanted = wanted
        self._tools = tools
        self._readers: dict[int, CallReader] = {}
        self._counts: dict[int, int] = {}

    def begin(self, row: int) -> list[dict[str, Any]]:
        return [self._delta(row, {"role": "assistant", "content": ""}, None, None)]

    def delta(self, piece: Piece) -> list[dict[str, Any]]:
        deltas, logprobs = [], self._logprobs(piece)
        content, calls = self._read(piece)
        if content or (logprobs and logprobs["content"]):
            deltas.append(self._delta(piece.row, {"content": content}, logprobs, None))
        count = self._counts.get(piece.row, 0)
        for index, call in enumerate(calls, count):
            deltas.append(
                self._delta(piece.row, {"tool_calls": [{"index": index} | call.describe()]}, None, None)
            )
        self._counts[piece.row] = count + len(calls)
        if piece.finish_reason:
            reason = _reason(piece, self._counts[piece.row])
            deltas.append(self._delta(piece.row, {}, None, reason))
        return deltas

    def _read(self, piece: Piece) -> tuple[str, list[Call]]:
        """What is plain text, and what are calls."""
        if self._tools is None:
            return piece.text, []
        reader = self._readers.setdefault(piece.row, self._tools.reader())
        return reader.push(piece.text, is_last=piece.finish_reason is not None)

    def choice(self, piece: Piece) -> dict[str, Any]:
        content, calls = self._read(piece)
        message = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": [call.describe() for call in calls]}
        return {
            "index": piece.row,
            "message": message,
            "logprobs": self._logprobs(piece),
            "finish_reason": _reason(piece, len(calls)),
        }

    def _delta(self, row: int, delta: dict, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": row, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._wanted is None:
            return None
        names = self._tokens(piece)

        def entry(number, logprob):
            text = names[number]
            return {"token": text.decode(errors="replace"), "logprob": logprob, "bytes": list(text)}

        content = [
            entry(number, logprob) | {"top_logprobs": [entry(*pair) for pair in pairs]}
            for number, logprob, pairs in zip(
                piece.token_ids, piece.logprobs, piece.alternatives, strict=True
            )
        ]
        return {"content": content, "refusal": None}


def _check_template(model: LanguageModel) -> None:
    if model.chat_template is None:
        raise ApiError(400, f"The model `{model.name}` has no chat template; use /v1/completions.", "model")


def _reason(piece: Piece, calls: int) -> str:
    return "tool_calls" if calls and piece.finish_reason == "stop" else piece.finish_reason


def _read_structures(fields: Fields) -> list[tuple[str, str, Any]]:
    """What an answer has to keep to: field, and kind and value as `ConstraintFactory.make` takes them."""
    found = []
    form = fields.get("response_format", {"type": "text"})
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "json_object":
        found.append(("response_format", "json", {"type": "object"}))
    elif kind == "json_schema":
        described = form.get("json_schema")
        if not isinstance(described, dict) or "schema" not in described:
            fields.refuse("response_format", "an object whose `json_schema` is an object with `schema`")
        found.append(("response_format", "json", described["schema"]))
    elif kind != "text":
        fields.refuse("response_format", "an object of type `text`, `json_object` or `json_schema`")
    wanted = fields.get("structured_outputs", {})
    if not isinstance(wanted, dict) or not wanted.keys() <= {*STRUCTURES, "json_object"}:
        fields.refuse("structured_outputs", f"an object with one of {', '.join(STRUCTURES)}")
    wanted = {key: value for key, value in wanted.items() if value not in (None, False)}
    if wanted.pop("json_object", None):
        found.append(("structured_outputs", "json", {"type": "object"}))
    found += [("structured_outputs", key, value) for key, value in wanted.items()]
    for key in STRUCTURES:
        if (value := fields.get(f"guided_{key}")) is not None:
            found.append((f"guided_{key}", key, value))
    return found


def _read_rows(
    fields: Fields,
    model: LanguageModel,
    ids: list[int],
    most: int,
    n: int,
    alternatives: int,
    constraint: Constraint | None = None,
) -> list[RowRequest]:
    """The rows of one prompt, which differ in their seeds."""
    default = model.generation_config
    is_drawn = default.get("do_sample", True)
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > _MOST_STOP_STRINGS or not all(map(_is_stop, stop)):
        fields.refuse(
            "stop",
            f"a string, or a list of up to {_MOST_STOP_STRINGS}, of 1 to {_LONGEST_STOP_STRING} bytes each",
        )
    not_negative, penalty = "a number that is not negative", "a number from -2 to 2"
    least = fields.integer("min_tokens", 0, 0, most)
    if fields.boolean("ignore_eos"):
        least = most
    seed = fields.integer("seed", None, -(2**63), 2**64 - 1)
    if seed is None:
        seed = int.from_bytes(os.urandom(4)) if is_drawn or fields.get("temperature") else 0
    row = RowRequest(
        token_ids=ids,
        max_new_tokens=most,
        min_new_tokens=least,
        temperature=fields.number(
            "temperature",
            float(default.get("temperature") or 1.0) if is_drawn else 0.0,
            lambda v: v >= 0,
            not_negative,
        ),
        top_k=max(0, fields.integer("top_k", int(default.get("top_k") or 0), -1, 2**31 - 1)),
        top_p=fields.number(
            "top_p", float(default.get("top_p") or 1.0), lambda v: 0 < v <= 1, "above 0 and at most 1"
        ),
        min_p=fields.number(
            "min_p", float(default.get("min_p") or 0.0), lambda v: 0 <= v <= 1, "a number from 0 to 1"
        ),
        repetition_penalty=fields.number(
            "repetition_penalty",
            float(default.get("repetition_penalty") or 1.0),
            lambda v: v > 0,
            "a number above 0",
        ),
        presence_penalty=fields.number("presence_penalty", 0.0, lambda v: -2 <= v <= 2, penalty),
        frequency_penalty=fields.number("frequency_penalty", 0.0, lambda v: -2 <= v <= 2, penalty),
        stop=stop,
        logit_bias=_read_logit_bias(fields),
        alternatives=alternatives,
    )
    return [
        dataclasses.replace(row, seed=_as_int32(seed + number), constraint=constraint and constraint.copy())
        for number in range(n)
    ]


def _as_int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def _is_stop(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return 1 <= len(value.encode()) <= _LONGEST_STOP_STRING
    except UnicodeEncodeError:
        return False


def _read_logit_bias(fields: Fields) -> dict[int, float]:
    rule = "an object of token ids and numbers from -100 to 100"
    bias = fields.get("logit_bias", {})
    if not isinstance(bias, dict):
        fields.refuse("logit_bias", rule)
    found = {}
    for key, value in bias.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and is_number and abs(value) <= 100):
            fields.refuse("logit_bias", rule)
        # OpenAI: -100 and 100 ban a token and choose it.
        found[int(key)] = float(value) * (1e4 if abs(value) == 100 else 1)
    return found


def _are_token_ids(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**31 for number in value
    )


def _read_message(fields: Fields, message: Any) -> dict[str, Any]:
    """A message with its text as one string."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        fields.refuse("messages", "a list of objects with `role` and `content`")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not (is_text and isinstance(part.get("text"), str)):
                raise ApiError(400, "Only parts of type `text` are supported in a message.", "messages")
        content = "".join(part["text"] for part in content)
    if content is None and message["role"] == "assistant":
        content = ""
    if not isinstance(content, str):
        raise ApiError(400, "A message's `content` must be a string or a list of parts.", "messages")
    read = {key: value for key, value in message.items() if value is not None} | {"content": content}
    if message.get("tool_calls"):
        read["tool_calls"] = [_read_call(fields, call) for call in message["tool_calls"]]
    return read


def _read_call(fields: Fields, call: Any) -> dict[str, Any]:
    """A call of an earlier answer, with its arguments as an object, which templates write as JSON."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        fields.refuse("messages", "with `tool_calls` of objects with `id`, `type` and `function`")
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError) as error:
        raise ApiError(400, f"The `arguments` of a call must be JSON: {error}", "messages") from error
    described = {"name": function["name"], "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": described}
