"""A tiny model for the engine, and settings that each change something."""

import pytest

VOCABULARY = 60


@pytest.fixture(scope="session")
def tiny():
    """A GPT with large random weights, whose next token depends on all that came before."""
    from reference.weights import randomize

    from kerasllm import GPT2, GPT2Config

    config = GPT2Config(vocabulary_size=VOCABULARY, context_length=48, num_layers=2, num_heads=2, dim=16)
    model = randomize(GPT2(config), seed=5)
    model.position_embedding.embeddings.assign(3 * model.position_embedding.embeddings)
    return model


@pytest.fixture(scope="session")
def engine(tiny):
    from kerasllm.generation import Engine

    return Engine(tiny, jit_compile=False)


@pytest.fixture(scope="session")
def forward(tiny):
    """The tiny model as a function from token ids `[batch, length]` to logits, without a cache."""
    import tensorflow as tf

    return tf.function(tiny, input_signature=[tf.TensorSpec([None, None], tf.int32)], autograph=False)
