import json
import re

import pytest

from kerasllm import CausalLM

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Mia", "Tom"]}, "red": {"type": "boolean"}},
    "required": ["name", "red"],
    "additionalProperties": False,
}
# Random weights at a temperature that makes nearly every token likely.
WILD = {"temperature": 5.0, "max_new_tokens": 50}


def fits(text):
    value = json.loads(text)
    return set(value) == {"name", "red"} and value["name"] in ("Mia", "Tom") and type(value["red"]) is bool


def test_each_row_keeps_to_its_own(random_lm):
    prompts = ["Once", "The box", "a", "b", "c"]
    constraints = [
        {"regex": "(ab|c){3,5}[0-9]"},
        None,
        {"json_schema": {"type": "object", **SCHEMA, "maxProperties": 2}},
        {"choices": ["yes", "no", 'per"haps']},
        {"grammar": 'start: "x" /[yz]/ "w"'},
    ]
    for seed in range(5):
        rows = random_lm.generate_tokens(prompts, constraints=constraints, seed=[seed] * 5, **WILD)
        assert re.fullmatch("(ab|c){3,5}[0-9]", rows[0].text)
        assert rows[3].text in ("yes", "no", 'per"haps')
        assert re.fullmatch("x[yz]w", rows[4].text)
        assert [rows[number].finish_reason for number in (0, 3, 4)] == ["stop"] * 3
        free = random_lm.generate_tokens(prompts[1], seed=seed, **WILD)[0]
        assert free == rows[1]
        if rows[2].finish_reason == "stop":
            assert fits(rows[2].text)


def test_a_cut_text_says_so(random_lm):
    row = random_lm.generate_tokens("a", 3, regex="x{9}[^x]*")[0]
    assert row.finish_reason == "length"
    row = random_lm.generate_tokens("a", 9, regex="x{3}")[0]
    assert (row.text, row.finish_reason) == ("xxx", "stop")


def test_with_other_settings(random_lm):
    texts = random_lm.generate("a", n=4, choices=["one", "two", "three"], stop_strings=["o"], **WILD)
    assert set(texts) <= {"", "tw", "three"}
    assert "".join(random_lm.generate("a", regex="[a-c]{5}", stream=True, **WILD)).isalpha()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "("}, "`regex` cannot be read"),
        ({"grammar": "start: start2"}, "`grammar` cannot be read"),
        ({"json_schema": {"type": "strange"}}, "`json_schema` cannot be read"),
        ({"json_schema": "{"}, "`json_schema` cannot be read"),
        ({"choices": []}, "`choices` must be several texts"),
        ({"choices": "yes"}, "`choices` must be several texts"),
        ({"regex": "a", "choices": ["b"]}, "At most one of .*Received: .*regex.*choices"),
        ({"constraints": [{"regex": "a"}] * 2}, "`constraints` must hold for each prompt"),
        ({"constraints": [{"what": "a"}]}, "kind of a constraint must be one of"),
        ({"regex": "a", "prompt_lookup_num_tokens": 3}, "tokens cannot be guessed"),
        ({"regex": "a", "suppress_tokens": list(range(399))}, "The constraint cannot be kept"),
        ({"regex": "a", "num_beams": 2}, "A beam search has .*'constraints'"),
    ],
)
def test_bad_constraints_are_refused(random_lm, settings, message):
    with pytest.raises(ValueError, match=message):
        random_lm.generate("a", max_new_tokens=3, **settings)


def test_needs_a_tokenizer(random_lm):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        CausalLM(random_lm.model).generate_tokens([1, 2], regex="a")


def test_without_llguidance(random_lm, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    lonely = CausalLM(random_lm.model, random_lm.tokenizer)
    with pytest.raises(ImportError, match=r"pip install 'kerasllm\[grammar\]'"):
        lonely.generate("a", regex="a")
