"""What makes the tests quick, and fixtures of several rooms: a tiny trained model with its tokenizer."""

import fcntl
import gc
import os
import shutil

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest
import tensorflow as tf

# Tracing makes many objects that stay, and little garbage.
gc.set_threshold(200_000, 10, 20)

# Processes take whole files. Those that take long are begun first, so that no process is left alone with
# one at the end: what waits for the package index, then by room.
_LONG_FIRST = ("training", "serving", "export", "tests", "tasks", "generation")


def pytest_collection_modifyitems(items):
    def place(item):
        room = item.path.parent.name
        number = _LONG_FIRST.index(room) if room in _LONG_FIRST else len(_LONG_FIRST)
        return (item.get_closest_marker("clean_env") is None, number)

    items.sort(key=place)


def pytest_collection_finish():
    gc.freeze()  # what has been imported stays


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Graphs that run a few times are not worth Grappler's work, except where it is what a test is about.

    Processes that tests start have it as users do.
    """
    is_wanted = any(item.get_closest_marker(name) for name in ("grappler", "slow"))
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not is_wanted})


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """Writes what all processes of the tests share: the first that asks does, the others wait.

    Only for what is the same in each of them, as exports of random weights are.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def make(name, write):
        path = base / "shared" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with (base / f"{name.replace('/', '-')}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                write(path)
        return path

    return make


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
def random_served(chat_lm, make_once):
    """`random_lm` as a SavedModel that has everything: a chat template, and slots."""
    return make_once("random/1", lambda path: chat_lm.export(path, slots=3)).parent


@pytest.fixture(scope="session")
def random_loaded(random_served):
    import tensorflow as tf

    return tf.saved_model.load(str(random_served / "1"))


@pytest.fixture(scope="session")
def compiled_served(random_lm, make_once):
    """`random_lm` as a SavedModel whose decoding XLA compiles, that of the slots too, in small blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kerasllm.layers.attention._BLOCK", 24)
        path = make_once("compiled/1", lambda path: random_lm.export(path, slots=9, jit_compile=True))
    return path.parent


@pytest.fixture(scope="session")
def compiled_loaded(compiled_served):
    import tensorflow as tf

    return tf.saved_model.load(str(compiled_served / "1"))


@pytest.fixture(scope="session")
def tflite(random_lm, make_once):
    """`random_lm` as a LiteRT model whose cache is not a multiple of its prefill lengths."""
    sizes = {"prefill_lengths": (4, 16), "cache_length": 46, "short_lengths": (24,)}
    return make_once("litert/model.tflite", lambda path: random_lm.export(path, **sizes))


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
