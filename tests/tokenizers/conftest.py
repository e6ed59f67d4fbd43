"""Tokenizers of the three kinds, trained on a small corpus, and texts to try them on."""

import pytest
from reference.tokenizer_texts import (
    INVALID_BYTES,
    SPECIAL_TOKENS,
    WRITTEN_TEXTS,
    random_bytes,
    random_code_points,
    random_texts,
)

from kerasllm.tokenizers import Tokenizer, train_tokenizer

VOCABULARY_SIZES = {"word": 1000, "character": 600, "byte_bpe": 1500}


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [*WRITTEN_TEXTS, *random_texts(300, seed=1), *random_code_points(20, seed=2)] * 2


@pytest.fixture(scope="session")
def trained(corpus) -> dict[str, Tokenizer]:
    return {
        kind: train_tokenizer(kind, corpus, size, SPECIAL_TOKENS) for kind, size in VOCABULARY_SIZES.items()
    }


@pytest.fixture(params=list(VOCABULARY_SIZES))
def tokenizer(request, trained) -> Tokenizer:
    return trained[request.param]


@pytest.fixture(scope="session")
def adversarial() -> list[bytes]:
    """Texts and invalid bytes, mostly not in the corpus."""
    texts = [*WRITTEN_TEXTS, *random_texts(400, seed=3), *random_code_points(50, seed=4)]
    return [text.encode() for text in texts] + INVALID_BYTES + random_bytes(100, seed=5)
