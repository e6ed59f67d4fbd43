"""What a model is measured against."""

from kerasllm.evaluation.ngram import ngram_log_probabilities, ngram_perplexity

__all__ = ["ngram_log_probabilities", "ngram_perplexity"]
