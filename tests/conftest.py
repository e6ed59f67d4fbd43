"""What makes the tests quick, and fixtures of several rooms: a tiny trained model with its tokenizer."""

import gc
import os
import shutil

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest
import tensorflow as tf

# Tracing makes many objects that stay, and little garbage.
gc.set_threshold(50_000, 10, 10)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Graphs that run a few times are not worth Grappler's work, except where it is what a test is about.

    Processes that tests start, the server above all, have it as users do.
    """
    is_wanted = any(item.get_closest_marker(name) for name in ("grappler", "slow"))
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not is_wanted})


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
def random_lm(tokenizer):
    """A GPT with large random weights: each token and each position changes what comes next."""
    from reference.weights import randomize

    from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config

    config = GPT2Config(vocabulary_size=400, context_length=64, num_layers=2, num_heads=4, dim=32)
    model = randomize(GPT2(config))
    positions = model.position_embedding.embeddings  # or a tied head would go on repeating one token
    positions.assign(4 * positions)
    return CausalLM(model, tokenizer, GenerationConfig(max_new_tokens=12))


@pytest.fixture(scope="session")
def chat_lm(random_lm):
    """`random_lm` with a chat template."""
    from kerasllm import CausalLM, Tokenizer

    template = (  # a short one, for the context is
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    settings = {"chat_template": template, "eos_token": random_lm.tokenizer.eos_token}
    tokenizer = Tokenizer.from_json(random_lm.tokenizer.to_json(), settings=settings)
    return CausalLM(random_lm.model, tokenizer, random_lm.generation_config)


@pytest.fixture(scope="session")
def random_served(chat_lm, tmp_path_factory):
    """`random_lm` as a SavedModel that has everything: a chat template, and slots."""
    base = tmp_path_factory.mktemp("served") / "random"
    chat_lm.export(base / "1", slots=3)
    return base


@pytest.fixture(scope="session")
def random_loaded(random_served):
    import tensorflow as tf

    return tf.saved_model.load(str(random_served / "1"))


@pytest.fixture(scope="session")
def compiled_served(random_lm, tmp_path_factory):
    """`random_lm` as a SavedModel whose decoding XLA compiles, that of the slots too, in small blocks."""
    base = tmp_path_factory.mktemp("served") / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kerasllm.layers.attention._BLOCK", 24)
        random_lm.export(base / "1", slots=9, jit_compile=True)
    return base


@pytest.fixture(scope="session")
def compiled_loaded(compiled_served):
    import tensorflow as tf

    return tf.saved_model.load(str(compiled_served / "1"))


@pytest.fixture(scope="session")
def tflite(random_lm, tmp_path_factory):
    """`random_lm` as a LiteRT model whose cache is not a multiple of its prefill lengths."""
    path = tmp_path_factory.mktemp("litert") / "model.tflite"
    return random_lm.export(path, prefill_lengths=(4, 16), cache_length=46, decode_lengths=(24,))


@pytest.fixture(scope="module")  # while it is open, no other event loop can be
def browser():
    """The Chromium that is installed, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
