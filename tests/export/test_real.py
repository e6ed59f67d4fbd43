"""Real models are exported, and answer as they do live."""

import pytest

from kerasllm import CausalLM, TextEmbedder
from kerasllm.data.assets import asset_path
from kerasllm.export import release

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
