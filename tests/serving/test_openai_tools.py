"""Calls of tools and the API of responses, over OpenAI's own client."""

import functools
import json

import pytest

openai = pytest.importorskip("openai")

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
    with openai.OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0) as client:
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
