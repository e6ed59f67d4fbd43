"""The real SmolLM2-135M-Instruct, from its GGUF file."""

import json

import numpy as np
import pytest
from reference.assets import asset
from reference.prompts import PROMPTS

from kerasllm import CausalLM

pytestmark = pytest.mark.slow

# Each part is bounded, so that any text that it allows fits into a few dozen tokens.
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12, "pattern": "^[A-Za-z ]{1,12}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def smollm2():
    return CausalLM.from_pretrained(asset("smollm2"))


@pytest.mark.reference
def test_greedy_tokens_equal_transformers(smollm2):
    """Of the file as transformers itself reads it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers needs it for GGUF files")
    file = asset("smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    rows = smollm2.generate_tokens(PROMPTS, 64, min_new_tokens=64)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        ids = torch.tensor([smollm2.tokenizer.encode(prompt)])
        wanted = model.generate(ids, do_sample=False, max_new_tokens=64, min_new_tokens=64)[0]
        assert row.token_ids == wanted[ids.shape[1] :].tolist(), prompt


def test_a_hundred_samples_keep_to_a_schema(smollm2):
    messages = [{"role": "user", "content": "Invent a person. Answer as JSON."}]
    prompt = smollm2.tokenizer.encode_chat(messages, add_generation_prompt=True)
    for first in range(0, 100, 20):
        rows = smollm2.generate_tokens(
            [prompt] * 20, 120, seed=list(range(first, first + 20)), temperature=1.0, json_schema=SCHEMA
        )
        for row in rows:
            value = json.loads(row.text)
            assert row.finish_reason == "stop"
            assert set(value) == {"name", "age", "colours"} and 0 <= value["age"] <= 150
            assert 1 <= len(value["name"]) <= 12 and set(value["colours"]) <= {"red", "green", "blue"}


def test_rows_do_not_depend_on_their_neighbours(smollm2):
    settings = {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 7}
    together = smollm2.generate_tokens(PROMPTS[:5], 24, logprobs=0, **settings)
    for prompt, row in zip(PROMPTS, together, strict=False):
        (alone,) = smollm2.generate_tokens(prompt, 24, logprobs=0, **settings)
        assert alone.token_ids == row.token_ids
        np.testing.assert_allclose(alone.logprobs, row.logprobs, atol=1e-3)
