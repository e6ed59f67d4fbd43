"""Text generation as a graph: prefill, a decode loop over a key-value cache, samplers."""

from kerasllm.generation.config import GenerationConfig
from kerasllm.generation.generate import TextGenerator

__all__ = ["GenerationConfig", "TextGenerator"]
