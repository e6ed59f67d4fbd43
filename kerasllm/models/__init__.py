"""Model families: one file each with its configuration, model and weight table."""

from kerasllm.models.base import LanguageModel, ModelConfig
from kerasllm.models.gpt2 import GPT2, GPT2Config

# The only registry: a Hugging Face `model_type` to the family that loads it.
MODELS: dict[str, type[LanguageModel]] = {"gpt2": GPT2}

__all__ = ["GPT2", "MODELS", "GPT2Config", "LanguageModel", "ModelConfig"]
