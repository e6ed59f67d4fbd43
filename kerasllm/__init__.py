"""Language models in Keras: load or train with model.fit, export once, generate everywhere."""

import importlib.util
import pkgutil
import sys
from typing import TYPE_CHECKING

from kerasllm.version import __version__

if TYPE_CHECKING:
    from kerasllm.generation import Completion, GenerationConfig
    from kerasllm.models import GPT2, T5, Bert, BertConfig, GPT2Config, Llama, LlamaConfig, T5Config
    from kerasllm.tasks import CausalLM, MaskedLM, Seq2SeqLM, SequenceClassifier, TextEmbedder, pipeline
    from kerasllm.tokenizers import Tokenizer, train_tokenizer

__all__ = [
    "GPT2",
    "T5",
    "Bert",
    "BertConfig",
    "CausalLM",
    "Completion",
    "GPT2Config",
    "GenerationConfig",
    "Llama",
    "LlamaConfig",
    "MaskedLM",
    "Seq2SeqLM",
    "SequenceClassifier",
    "T5Config",
    "TextEmbedder",
    "Tokenizer",
    "__version__",
    "pipeline",
    "train_tokenizer",
]


def _load() -> None:
    """Imports what the names above stand for, and with it Keras and TensorFlow."""
    for module in ("generation", "models", "tasks", "tokenizers"):
        found = vars(importlib.import_module(f"kerasllm.{module}"))
        globals().update({name: found[name] for name in __all__ if name in found})


def __getattr__(name: str) -> object:
    # At the first use, so that `kerasllm.litert` and the command's help start without TensorFlow.
    if name in __all__:
        _load()
        return globals()[name]
    if name.isidentifier() and not name.startswith("_") and importlib.util.find_spec(f"kerasllm.{name}"):
        return importlib.import_module(f"kerasllm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *(module.name for module in pkgutil.iter_modules(__path__))})


if "keras" in sys.modules:
    # `keras.models.load_model` then knows all layers. Where Keras comes later, a name must be used first.
    _load()
