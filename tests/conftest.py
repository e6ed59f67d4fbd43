"""Fixtures that several rooms use: a tiny trained model with its tokenizer."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest


@pytest.fixture(scope="session")
def stories():
    from kerasllm.data import generate_stories

    return generate_stories(200, seed=1)


@pytest.fixture(scope="session")
def tokenizer(stories):
    from kerasllm import train_tokenizer

    return train_tokenizer("byte_bpe", stories, vocabulary_size=400)


@pytest.fixture(scope="session")
def causal_lm(stories, tokenizer):
    """A small GPT, trained just enough to have opinions; tests must not change its weights."""
    from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config

    keras.utils.set_random_seed(0)
    config = GPT2Config(
        vocabulary_size=400, context_length=64, num_layers=2, num_heads=4, dim=32, dropout=0.0
    )
    model = CausalLM(GPT2(config), tokenizer, GenerationConfig(max_new_tokens=12))
    model.compile(keras.optimizers.Adam(1e-2))
    model.fit(stories[:100], batch_size=16, epochs=1, verbose=0)
    return model


@pytest.fixture(scope="session")
def served(causal_lm, tmp_path_factory):
    """The exported model: a folder with version 1."""
    base = tmp_path_factory.mktemp("served") / "gpt"
    causal_lm.export(base / "1")
    return base


@pytest.fixture(scope="session")
def tflite(causal_lm, tmp_path_factory):
    return causal_lm.export(
        tmp_path_factory.mktemp("litert") / "model.tflite", prefill_lengths=(4, 16), cache_length=48
    )
