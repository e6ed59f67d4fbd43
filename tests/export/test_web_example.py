"""The example's page in a real browser: LiteRT.js runs exported models as Python does."""

import functools
import http.server
import json
import pathlib
import shutil
import subprocess
import threading

import numpy as np
import pytest
from reference.weights import randomize
from reference.word_piece import make_word_piece

from kerasllm.models import Bert, BertConfig
from kerasllm.tasks import TextEmbedder

pytestmark = pytest.mark.slow
EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "web"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site(tflite, tmp_path_factory):
    """The example's folder with what npm installs and two models; its address."""
    if shutil.which("npm") is None or subprocess.run(["npm", "ping"], capture_output=True).returncode:
        pytest.skip("needs npm and its registry")
    folder = tmp_path_factory.mktemp("site") / "web"
    shutil.copytree(EXAMPLE, folder)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=folder, check=True)
    shutil.copytree(tflite.parent, folder / "model")
    embedder().export(folder / "embedder" / "model.tflite", lengths=(6, 16))
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


@functools.cache
def embedder():
    config = BertConfig(
        vocabulary_size=26, context_length=16, num_layers=2, num_heads=2, dim=8, intermediate_dim=12
    )
    return TextEmbedder(randomize(Bert(config, head=None)), make_word_piece(), pooling="mean")


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.set_default_timeout(60_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert not errors


def run(page, text):
    """Types a text and sends it; returns what the page then says and shows."""
    page.fill("#text", text)
    page.click("button")
    page.wait_for_function("document.querySelector('#status').textContent !== 'Computing …'")
    return page.text_content("#status"), page.text_content("#output")


def is_ready(page):
    page.wait_for_function("!document.querySelector('button').disabled")


@pytest.mark.parametrize("prompt", ["Once", "The little girl went to the park with her dog and", "a b c"])
def test_a_text_goes_on_as_in_python(page, site, random_lm, prompt):
    page.goto(site)
    is_ready(page)
    assert run(page, prompt) == ("Ready", random_lm.generate(prompt, 12))
    assert run(page, prompt[:4]) == ("Ready", random_lm.generate(prompt[:4], 12))  # the cache is a new one


def test_tokens_up_to_the_end_of_the_cache(page, site, random_lm):
    page.goto(site)
    find = """async ([text, count]) => {
        const model = await (await import("./model.js")).loadModel("model");
        const found = [];
        for await (const id of model.generate(model.tokenizer.encode(text).ids, count)) found.push(id);
        return found;
    }"""
    text = "#$%&*+=@^~" * 4 + "#$%"  # a token each: after two prefills of 16 there is no room for a third
    assert len(random_lm.tokenizer.encode(text)) == 43
    assert page.evaluate(find, [text, 99]) == random_lm.generate_tokens(text, 3)[0].token_ids


def test_vectors_are_python_s(page, site):
    page.goto(site + "?model=embedder")
    is_ready(page)
    texts = ["bird", "the cat sat on the mat."]  # one for each signature
    for text, wanted in zip(texts, embedder().encode(texts), strict=True):
        status, shown = run(page, text)
        assert status == "Ready"
        np.testing.assert_allclose(json.loads(shown)["embedding"], wanted, atol=1e-5)
    status, _ = run(page, "cat " * 20)
    assert status == "A text must be of 1 to 16 tokens. Received: 22 tokens"
    assert run(page, "bird")[0] == "Ready"


def test_a_missing_model_is_named(page, site):
    page.goto(site + "?model=nowhere")
    page.wait_for_function("document.querySelector('#status').textContent.includes('nowhere')")
    assert page.is_disabled("button")
