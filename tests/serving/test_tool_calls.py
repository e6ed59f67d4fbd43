"""Calls of tools: found out from a template, written by force, and read in pieces."""

import json
import re

import numpy as np
import pytest
from kerasllm_serving.chat import ChatTemplate
from kerasllm_serving.constraints import ConstraintFactory
from kerasllm_serving.fields import ApiError, Fields
from kerasllm_serving.tool_calls import CallReader, find_call_form, read_tools

# As models of three makers write calls, each with what is peculiar to it.
TAGS = """
{%- if tools %}<|s|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|e|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|s|>user
<tool_response>
{{ m.content }}
</tool_response><|e|>
{% else %}<|s|>{{ m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{{ '\n' }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|e|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|s|>assistant
{% endif %}"""
BARE = """{% for m in messages %}{% set call = (m.tool_calls or [none])[0] %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception("one call") }}{% endif %}<|h|>assistant<|h|>

{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}<|e|>
{%- else %}<|h|>{{ m.role }}<|h|>

{% if tools and loop.first %}{% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}{% endif %}
{{- m.content | trim }}<|e|>{% endif %}{% endfor %}"""
LIST = """{% for m in messages %}
{%- if m.role == 'user' %}{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST] {{ m.content }}[/INST]
{%- elif m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("nine characters") }}{% endif %}
{{- {"name": call.function.name, "arguments": call.function.arguments, "id": call.id} | tojson }}
{%- if not loop.last %}, {% endif %}{% endfor %}]<|e|>
{%- else %} {{ m.content }}<|e|>{% endif %}{% endfor %}"""  # noqa: E501
SPECIAL = ["<|s|>", "<|e|>", "<|h|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOLS]", "[/TOOLS]"]
FUNCTIONS = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
        },
    },
    {"name": "now"},
]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
ONE = '{"name": "weather", "arguments": {"city": "Rome"}}'
TWO = '{"name": "now", "parameters": {}}'


def form_of(template):
    return find_call_form(ChatTemplate(template, {}, SPECIAL))


def read(template, text, size, names=("weather", "now")):
    reader = CallReader(form_of(template), names)
    content, calls = "", []
    parts = [text[begin : begin + size] for begin in range(0, len(text), size)]
    for number, part in enumerate(parts, 1):
        more, found = reader.push(part, is_last=number == len(parts))
        content, calls = content + more, calls + found
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


def test_forms():
    tags, bare, listed = map(form_of, (TAGS, BARE, LIST))
    assert (tags.before, tags.after) == ("<tool_call>\n", "\n</tool_call>")
    assert (tags.opening, tags.closing, tags.key) == ("<tool_call>", "</tool_call>", "arguments")
    assert tags.between == "\n</tool_call>\n<tool_call>\n"
    assert (bare.before, bare.after, bare.between, bare.key) == ("", "", None, "parameters")
    assert (listed.before, listed.after, listed.between) == ("[TOOL_CALLS][", "]", ", ")
    assert listed.is_list and listed.opening == listed.closing == "" and not tags.is_list
    thinking = TAGS.replace("{{ '\n' + m.content }}", "{{ '\n<think>\n' + m.content }}")
    assert thinking != TAGS
    assert form_of(thinking).before == "<tool_call>\n"
    for template, message in (
        ("{{ messages[0].content }}", "knows no tools"),
        ("{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}", "does not know"),
        ("{{ tools }}{{ raise_exception('no') }}", "refuses tools: .*no"),
    ):
        with pytest.raises(ValueError, match=message):
            form_of(template)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reading(size):
    rome, now = ("weather", {"city": "Rome"}), ("now", {})
    tagged = f"<tool_call>\n{ONE}\n</tool_call>"
    for template, text, wanted in (
        (TAGS, tagged, ("", [rome])),
        (TAGS, f"{tagged}\n<tool_call>\n{TWO}\n</tool_call>\n", ("", [rome, now])),
        (TAGS, f"Let me see.\n{tagged} Well.", ("Let me see.Well.", [rome])),
        (TAGS, f"<tool_call>{ONE}", ("", [rome])),
        (TAGS, "a <tool and </tool_call> é", ("a <tool and </tool_call> é", [])),
        (TAGS, f"<tool_call>\n{ONE[:-3]}", (f"<tool_call>\n{ONE[:-3]}", [])),
        (TAGS, tagged.replace("weather", "other"), (tagged.replace("weather", "other"), [])),
        (TAGS, ONE, (ONE, [])),
        (BARE, f"\n{TWO}\n", ("", [now])),
        (BARE, '{"answer": 3}', ('{"answer": 3}', [])),
        (BARE, f"It is {ONE}", (f"It is {ONE}", [])),
        (BARE, "{ no JSON", ("{ no JSON", [])),
        (LIST, f"[{ONE}, {TWO}]", ("", [rome, now])),
        (LIST, "[1, 2]", ("[1, 2]", [])),
        (LIST, "Oslo.", ("Oslo.", [])),
    ):
        assert read(template, text, size) == wanted, (text, size)


def test_ids_differ():
    reader = CallReader(form_of(LIST), ["now"])
    _, calls = reader.push(f"[{TWO}, {TWO}]", is_last=True)
    assert len({call.id for call in calls}) == 2 and all(re.fullmatch(r"\w{9}", call.id) for call in calls)


def fields(**values):
    return Fields(json.dumps(values).encode())


@pytest.mark.parametrize("template", [TAGS, BARE])
def test_enforced_calls_are_read(template, random_served, random_lm):
    """Whatever is drawn of what the grammar allows is one call or several, which the reader finds."""
    ends = [random_lm.tokenizer.special_tokens[random_lm.tokenizer.eos_token]]
    texts = [random_lm.tokenizer.token_bytes(number) for number in range(400)]
    file = random_served / "1" / "assets.extra" / "tokenizer.json"
    factory = ConstraintFactory(file, 400, ends, lambda ids: [texts[number] for number in ids])
    assert factory.literal('a"\n<|endoftext|>b') == r'"a\"\n" <[0]> "b"'
    assert factory.literal("") == "" and ends == [0]
    rng = np.random.default_rng(0)
    found = set()
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        tools = read_tools(fields(tools=TOOLS, tool_choice=choice), lambda: form_of(template))
        first = factory.make("grammar", tools.grammar(factory.literal))
        for _ in range(8):
            constraint, ids = first.copy(), []
            while not constraint.must_end and len(ids) < 200:
                bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[:400]
                bits[ends] = 0
                allowed = np.flatnonzero(bits)
                if not len(allowed) or constraint.may_end and rng.random() < 0.5:
                    break
                ids.append(int(rng.choice(allowed)))
                constraint.accept(ids[-1])
            if constraint.may_end:
                text = b"".join(texts[number] for number in ids).decode()
                content, calls = read(template, text, 5)
                assert not content and calls, text
                assert all(args["city"] in ("Rome", "Oslo") for name, args in calls if name == "weather")
                found |= {(str(choice)[:8], name, len(calls) > 1) for name, _ in calls}
    assert {"weather", "now"} <= {name for _, name, _ in found}
    assert {name for kind, name, _ in found if kind != "required"} == {"weather"}
    assert any(several for *_, several in found) == (template == TAGS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tools": 3}, "`tools` must be a list"),
        ({"tools": [{"type": "web_search"}]}, "of type `function`"),
        ({"tools": [{"type": "function", "function": {}}]}, "with a `name`"),
        ({"tools": TOOLS * 2}, "different names"),
        ({"tools": [{"type": "function", "name": "a", "parameters": 3}]}, "a JSON schema"),
        ({"tool_choice": "required"}, "where there are no `tools`"),
        ({"tools": TOOLS, "tool_choice": "any"}, "`none`, `auto`, `required`"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "weather, now"),
    ],
)
def test_bad_tools(values, message):
    with pytest.raises(ApiError, match=message):
        read_tools(fields(**values), lambda: form_of(TAGS))


def test_tools_that_may_not_be_called():
    assert read_tools(fields(tools=TOOLS, tool_choice="none"), None) is None
    assert read_tools(fields(tools=[]), None) is None and read_tools(fields(), None) is None
    named = {"type": "function", "name": "now"}
    tools = read_tools(fields(tools=TOOLS, tool_choice=named), lambda: form_of(TAGS))
    assert [function["name"] for function in tools.must_call] == ["now"] and not tools.is_parallel
