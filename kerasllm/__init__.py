"""Language models in Keras: train with model.fit, export once, generate everywhere."""

from kerasllm.generation import GenerationConfig
from kerasllm.models import GPT2, GPT2Config
from kerasllm.tasks import CausalLM
from kerasllm.tokenizers import Tokenizer, train_tokenizer
from kerasllm.version import __version__

__all__ = [
    "GPT2",
    "CausalLM",
    "GPT2Config",
    "GenerationConfig",
    "Tokenizer",
    "__version__",
    "train_tokenizer",
]
