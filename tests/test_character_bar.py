"""A character-level GPT on Moby Dick reaches the loss that nanoGPT's configuration reaches."""

import math
import pathlib

import pytest
from reference.assets import asset

from kerasllm.config import load_run_config
from kerasllm.tasks.train import train

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "gpt_1m_characters.yaml"
# 4 layers, 4 heads, width 128, block 64, batch 12, 1,000 steps of AdamW, in PyTorch 2.13.
NANOGPT_VALIDATION_LOSS = 2.0258


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_reaches_the_published_loss():
    result = train(load_run_config(CONFIG, [f"data.paths=[{asset('moby')}]"]))
    assert result.model.model.count_params() == pytest.approx(807_168, rel=0.001)  # and two special tokens
    assert math.log(result.perplexity) <= NANOGPT_VALIDATION_LOSS + 0.02
