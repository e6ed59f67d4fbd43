"""What the server sends is what OpenAI's own OpenAPI document says."""

import json
import urllib.error
import urllib.request

import pytest
import yaml
from reference.assets import asset

jsonschema = pytest.importorskip("jsonschema")

pytestmark = pytest.mark.reference

FUNCTION = {
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CHAT = {"messages": [{"role": "user", "content": "Sun?"}], "max_tokens": 20}
CALL = {
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 300,
}
RESPONSE = {"input": "Sun?", "max_output_tokens": 20}
RESPONSE_CALL = {
    "tools": [{"type": "function", "strict": True, **FUNCTION}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_output_tokens": 300,
}
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
# Path, body, and the schemas of an answer and of what is streamed; there is none of streamed completions.
CASES = [
    (
        "completions",
        {"prompt": "Sun", "logprobs": 1},
        "CreateCompletionResponse",
        None,
    ),
    *(
        (
            "chat/completions",
            CHAT | more,
            "CreateChatCompletionResponse",
            "CreateChatCompletionStreamResponse",
        )
        for more in ({}, LOGPROBS, CALL, {"n": 2})
    ),
    *(("responses", RESPONSE | more, "Response", "ResponseStreamEvent") for more in ({}, RESPONSE_CALL)),
]


@pytest.fixture(scope="module")
def check():
    """Raises if something is not what one of the document's schemas says."""
    text = asset("openai-api").read_text(encoding="utf-8")
    document = _with_null(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    assert document["openapi"].startswith("3.1")

    def check(name, value):
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(value))
        assert error is None, f"{name}: {error.json_path}: {error.message[:300]}"

    return check


def _with_null(value):
    """The document marks what may be null as OpenAPI 3.0 did, which JSON Schema knows nothing of."""
    if isinstance(value, list):
        return [_with_null(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _with_null(item) for key, item in value.items()}
    return {"anyOf": [value, {"type": "null"}]} if value.get("nullable") is True else value


def send(server, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"{server.url}/v1/{path}", data), timeout=200
    ) as answer:
        return answer.read().decode()


@pytest.mark.parametrize(("path", "body", "whole", "part"), CASES)
def test_answers(check, tools_server, path, body, whole, part):
    check(whole, json.loads(send(tools_server, path, body)))
    lines = send(tools_server, path, body | {"stream": True}).splitlines()
    parts = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert len(parts) > 2
    for text in parts:
        if part and text != "[DONE]":
            check(part, json.loads(text))


def test_models_and_errors(check, tools_server):
    check("ListModelsResponse", json.loads(send(tools_server, "models")))
    for path, body in (("completions", {}), ("chat/completions", {"model": "x"}), ("responses", {"n": 2})):
        with pytest.raises(urllib.error.HTTPError) as error:
            send(tools_server, path, body)
        with error.value:
            check("ErrorResponse", json.loads(error.value.read()))


def test_embeddings(check, embedder_server):
    check(
        "CreateEmbeddingResponse",
        json.loads(send(embedder_server, "embeddings", {"input": ["one", "two"]})),
    )
