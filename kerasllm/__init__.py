"""Language models in Keras: load or train with model.fit, export once, generate everywhere."""

from kerasllm.generation import Completion, GenerationConfig
from kerasllm.models import GPT2, T5, Bert, BertConfig, GPT2Config, Llama, LlamaConfig, T5Config
from kerasllm.tasks import CausalLM, MaskedLM, Seq2SeqLM, SequenceClassifier, TextEmbedder, pipeline
from kerasllm.tokenizers import Tokenizer, train_tokenizer
from kerasllm.version import __version__

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
