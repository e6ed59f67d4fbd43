"""Text generation as a graph: prefill, a decode loop over a key-value cache, samplers."""

from kerasllm.generation.config import GenerationConfig
from kerasllm.generation.generate import SIGNATURE, TextGenerator, batch_settings, check_vocabularies

__all__ = ["SIGNATURE", "GenerationConfig", "TextGenerator", "batch_settings", "check_vocabularies"]
