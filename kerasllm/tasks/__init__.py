"""Tasks: a model, its tokenizer, and what one does with them."""

from kerasllm.tasks.causal_lm import CausalLM
from kerasllm.tasks.masked_lm import MaskedLM
from kerasllm.tasks.pipeline import load_task, pipeline
from kerasllm.tasks.seq2seq_lm import Seq2SeqLM
from kerasllm.tasks.sequence_classifier import SequenceClassifier
from kerasllm.tasks.text_embedder import TextEmbedder

__all__ = [
    "CausalLM",
    "MaskedLM",
    "Seq2SeqLM",
    "SequenceClassifier",
    "TextEmbedder",
    "load_task",
    "pipeline",
]
