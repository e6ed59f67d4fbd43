"""Calls of tools and the API of responses, over OpenAI's own client."""

import functools
import itertools
import json

import pytest
from pydantic import TypeAdapter

openai = pytest.importorskip("openai")
from openai.types.responses import Response, ResponseStreamEvent  # noqa: E402

WEATHER = {
    "name": "weather",
    "description": "What it is like outside.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, NOW)]
QUESTION = {"role": "user", "content": "Sun?"}
ANSWER = {
    "type": "json_schema",
    "json_schema": {
        "name": "answer",
        "schema": {
            "type": "object",
            "properties": {"sunny": {"type": "boolean"}},
            "required": ["sunny"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(tools_server):
    url = tools_server.url + "/v1"
    with openai.OpenAI(base_url=url, api_key="none", timeout=200, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def create(client):
    return functools.partial(
        client.chat.completions.create, model="tools", messages=[QUESTION], tools=TOOLS, seed=1
    )


def described(calls):
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def test_enforced_calls(create):
    """One of the tools, or the one that is named; plain and streamed, the same."""
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, names in (("required", {"weather", "now"}), (named, {"weather"})):
        for seed in range(2):
            answer = create(tool_choice=choice, temperature=1.0, seed=seed, parallel_tool_calls=False)
            (choice_made,) = answer.choices
            assert choice_made.finish_reason == "tool_calls" and choice_made.message.content is None
            ((name, arguments),) = described(choice_made.message.tool_calls)
            assert name in names and arguments.get("city", "Rome") in ("Rome", "Oslo")
            chunks = list(
                create(
                    tool_choice=choice, temperature=1.0, seed=seed, parallel_tool_calls=False, stream=True
                )
            )
            parts = [part for chunk in chunks for part in chunk.choices[0].delta.tool_calls or []]
            assert [part.index for part in parts] == [0] and described(parts) == [(name, arguments)]
            assert parts[0].id and parts[0].type == "function"
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
            assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_or_an_answer(create, tools_lm):
    """Where a schema is asked for and tools need not be called, the model chooses between the two."""
    (opens,) = tools_lm.tokenizer.encode("<")
    for bias, is_call in ((100, True), (-100, False)):
        settings = {"logit_bias": {opens: bias}, "parallel_tool_calls": False}
        message = create(response_format=ANSWER, **settings).choices[0].message
        if is_call:
            assert message.content is None and described(message.tool_calls)
        else:
            assert type(json.loads(message.content)["sunny"]) is bool and not message.tool_calls


def test_tools_and_their_answers_are_in_the_prompt(client, create, tools_lm):
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "rain"}]},
    ]
    answer = create(messages=messages, max_tokens=4, temperature=0)
    objects = [
        *messages[:1],
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "content": "rain"},
    ]
    functions = [{"description": "", **function} for function in (WEATHER, NOW)]
    functions = [{key: f[key] for key in ("name", "description", "parameters")} for f in functions]
    ids = tools_lm.tokenizer.encode_chat(
        objects,
        add_generation_prompt=True,
        tools=[{"type": "function", "function": function} for function in functions],
    )
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content == tools_lm.generate_tokens([ids], 4)[0].text
    none = create(messages=messages, max_tokens=4, tool_choice="none")
    assert none.usage.prompt_tokens < len(ids) - 100
    with pytest.raises(openai.BadRequestError, match="`arguments` of a call must be JSON"):
        call = {**call, "function": {"name": "now", "arguments": "{"}}
        create(messages=[QUESTION, {"role": "assistant", "tool_calls": [call]}])
    with pytest.raises(
        openai.BadRequestError, match="one structure. Received: `response_format`, `tool_choice"
    ):
        create(tool_choice="required", response_format=ANSWER)


def respond(client, **values):
    """A response, plain and streamed, whose objects have to be what OpenAI's package says."""
    values = {"model": "tools", "max_output_tokens": 60, "extra_body": {"seed": 3}, **values}
    raw = client.responses.with_raw_response.create(**values).text
    plain = Response.model_validate_json(raw, strict=True)
    events = TypeAdapter(ResponseStreamEvent)
    streamed, name = [], ""
    with client.responses.with_streaming_response.create(**values, stream=True) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                streamed.append(events.validate_json(line.removeprefix("data: "), strict=True))
                assert name == f"event: {streamed[-1].type}"
            name = line or name
    assert [event.sequence_number for event in streamed] == list(range(len(streamed)))
    last = streamed[-1].response
    ids = {"id", "call_id", "created_at", "completed_at", "cached_tokens"}
    assert _without(last.model_dump(), ids) == _without(plain.model_dump(), ids)
    return plain, streamed


def _without(value, keys):
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


def names_of(events):
    return [name for name, _ in itertools.groupby(event.type.removeprefix("response.") for event in events)]


def test_a_response_is_the_chat_s_answer(client):
    plain, events = respond(client, input="Sun?", instructions="Be brief.", temperature=1.0)
    messages = [{"role": "system", "content": "Be brief."}, QUESTION]
    chat = client.chat.completions.create(
        model="tools", messages=messages, max_tokens=60, temperature=1.0, seed=3
    )
    assert plain.output_text == chat.choices[0].message.content
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == plain.output_text
    usage = (plain.usage.input_tokens, plain.usage.output_tokens)
    assert usage == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    is_cut = chat.choices[0].finish_reason == "length"
    assert (
        is_cut and plain.status == "incomplete" and plain.incomplete_details.reason == "max_output_tokens"
    )
    assert names_of(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Sun?"}]},
    ]
    same, _ = respond(client, input=items, temperature=1.0)
    assert same.output_text == plain.output_text


def test_calls_in_responses(client):
    tools = [{"type": "function", "strict": True, **WEATHER}, {"type": "function", **NOW}]
    values = {"tools": tools, "parallel_tool_calls": False, "max_output_tokens": 300}
    plain, events = respond(
        client, input="Sun?", tool_choice={"type": "function", "name": "weather"}, **values
    )
    (call,) = plain.output
    assert (call.type, call.name, plain.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    assert names_of(events) == [
        "created", "in_progress", "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done", "completed",
    ]  # fmt: skip
    items = [
        {"role": "user", "content": "Sun?"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    form = {"type": "json_schema", **ANSWER["json_schema"]}
    answer, _ = respond(client, input=items, text={"format": form}, max_output_tokens=300)
    assert type(json.loads(answer.output_text)["sunny"]) is bool and answer.status == "completed"
    messages = [
        QUESTION,
        {"role": "assistant", "tool_calls": [{"type": "function", "id": "a", "function": {
            "name": "weather", "arguments": call.arguments}}]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]  # fmt: skip
    chat = client.chat.completions.create(
        model="tools", messages=messages, seed=3, response_format=ANSWER, max_tokens=300
    )
    assert chat.choices[0].message.content == answer.output_text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"previous_response_id": "resp_1"}, "`previous_response_id` is not supported: responses are not"),
        ({"store": True}, "`store` is not supported"),
        ({"background": True}, "`background` is not supported"),
        ({"input": []}, "`input` must be a string or a list of items"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "type `item_reference` are not supported"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "Only parts of text"),
        ({"text": {"format": {"type": "grammar"}}}, "must be an object of type `text`, `json_object`"),
        ({"max_output_tokens": 0}, "`max_output_tokens` must be"),
    ],
)
def test_bad_responses(client, values, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.responses.create(**{"model": "tools", "input": "a", **values})
