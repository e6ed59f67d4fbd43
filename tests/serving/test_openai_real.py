"""OpenAI's API over the real SmolLM2-135M-Instruct, from its GGUF file."""

import concurrent.futures
import json

import pytest
from reference.assets import asset

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.slow

# Each part is bounded, so that any text that it allows fits into the room that there is.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 20},
                "number": {"type": "integer", "minimum": 0, "maximum": 999},
            },
            "required": ["street"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "colours", "address"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(start_server, tmp_path_factory):
    from kerasllm import CausalLM

    base = tmp_path_factory.mktemp("smollm2")
    CausalLM.from_pretrained(asset("smollm2")).export(base / "1", slots=4, slot_length=1024)
    flags = (f"--model_base_path={base}", "--model_name=smollm2", "--max_queue=100")
    server = start_server(*flags, warms_up=True)
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", timeout=600, max_retries=0) as client:
        yield client


def test_drawn_answers_fit_a_schema(client):
    """Twenty seeds at temperature 1, four rows at a time."""
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    messages = [{"role": "user", "content": "Invent a person who lives in Rome. Answer in JSON."}]

    def ask(seed, **more):
        choices = client.chat.completions.create(
            model="smollm2", messages=messages, temperature=1.0, seed=seed, max_tokens=400, **more
        ).choices
        return choices[0].message.content, choices[0].finish_reason

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: ask(seed, response_format=form), range(20)))
    people = []
    for text, reason in answers:
        assert reason == "stop", text
        people.append(json.loads(text))
        person = people[-1]
        assert set(person) == set(SCHEMA["required"]) and 1 <= len(person["name"]) <= 20
        assert type(person["age"]) is int and 0 <= person["age"] <= 150
        assert set(person["colours"]) <= {"red", "green", "blue"} and len(person["colours"]) <= 3
        assert set(person["address"]) <= {"street", "number"} and len(person["address"]["street"]) <= 20
    assert len({person["name"] for person in people}) > 5


def test_a_template_without_tools(client):
    tools = [{"type": "function", "function": {"name": "now"}}]
    with pytest.raises(openai.BadRequestError, match="chat template knows no tools"):
        client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "a"}], tools=tools
        )
