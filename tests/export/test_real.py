"""Real models are exported, and answer as they do live."""

import pytest
from reference.prompts import PROMPTS

from kerasllm import CausalLM, TextEmbedder
from kerasllm.data.assets import asset_path
from kerasllm.export import release
from kerasllm.export.litert import compare_litert
from kerasllm.litert import Generator
from kerasllm.litertlm import generate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("task", "asset", "options"),
    [
        (TextEmbedder, "minilm", {}),
        (CausalLM, "smollm2", {}),
        (CausalLM, "smollm2", {"jit_compile": True}),
    ],
    ids=str,
)
def test_every_signature(task, asset, options, tmp_path):
    lines = []
    model = task.from_pretrained(asset_path(asset), dtype="float32")
    release(model, tmp_path / "1", verify=True, report=lines.append, **options)
    assert "warm-up requests" in lines[0] and "DIFFERS" not in lines[0], lines[0]


@pytest.fixture(scope="module")
def smollm2():
    return CausalLM.from_pretrained(asset_path("smollm2"))


def test_devices_write_the_tokens_of_the_live_model(smollm2, tmp_path):
    sizes = {"prefill_lengths": (8, 32), "cache_length": 128, "quantize": None, "texts": ()}
    generator = Generator(smollm2.export(tmp_path / "lite" / "m.tflite", short_lengths=(48,), **sizes))
    bundle = smollm2.export(tmp_path / "m.litertlm", **sizes)
    for prompt, live in zip(PROMPTS, smollm2.generate_tokens(PROMPTS, 64), strict=True):
        assert generator.generate_ids(prompt, 64) == live.token_ids, prompt
        assert "".join(generate(bundle, prompt, 64, raw=True, greedy=True)) == live.text, prompt


def test_int8_of_a_real_model_is_good(smollm2, tmp_path):
    path = smollm2.export(
        tmp_path / "m.tflite", quantize="int8", prefill_lengths=(8,), cache_length=512, texts=()
    )
    book = asset_path("moby").read_text(encoding="utf-8")
    middle = len(book) // 2
    texts = [book[begin : begin + 4000] for begin in range(middle, middle + 40_000, 4000)]
    report = compare_litert(smollm2.model, smollm2.tokenizer, path, texts, 512, most_tokens=2000)
    assert report["tokens"] == 2000
    assert report["divergence"] < 0.03 and report["top1_agreement"] > 0.9
