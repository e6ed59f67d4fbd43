"""Tasks: a model, its tokenizer, and what one does with them."""

from kerasllm.tasks.causal_lm import CausalLM

__all__ = ["CausalLM"]
