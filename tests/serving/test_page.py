"""The page of the server in a real browser: Playwright drives the Chromium that is installed."""

import json
import math
import urllib.request

import pytest

pytestmark = pytest.mark.slow
PROMPT = "Once upon a time"
MILLISECONDS = 120_000
IS_DONE = "!document.querySelector('#send').disabled"


@pytest.fixture(params=[(1200, 800), (390, 844)], ids=["desk", "phone"])
def page(llm_server, browser, request):
    width, height = request.param
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(MILLISECONDS)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(llm_server.url)
    page.wait_for_function("document.querySelector('#model').options.length > 0")
    page.select_option("#mode", "text")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "8")
    yield page
    page.close()
    assert not errors


def complete(server):
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, "logprobs": 5}
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)["choices"][0]


def ask(page):
    """Sends the prompt by the keyboard; returns the answer's box."""
    page.fill("#text", PROMPT)
    page.press("#text", "Enter")
    page.wait_for_function(IS_DONE)
    return page.locator(".assistant > span").last


def test_answers_are_those_of_the_api(page, llm_server):
    assert ask(page).text_content() == complete(llm_server)["text"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_probabilities_of_tokens(page, llm_server):
    page.check("#logprobs")
    expected = complete(llm_server)["logprobs"]
    tokens = ask(page).locator(".token")
    assert tokens.all_text_contents() == expected["tokens"]
    tokens.nth(3).focus()
    others = page.locator("#token table").last.locator("tr")
    assert others.count() == len(expected["top_logprobs"][3])
    likeliest = math.exp(max(expected["top_logprobs"][3].values()))
    percent = others.first.locator("td").last.text_content()
    assert float(percent.removesuffix(" %")) == pytest.approx(100 * likeliest, abs=0.06)


def test_an_answer_is_stopped(page):
    page.fill("#text", PROMPT)
    page.evaluate("for (const name of ['#send', '#stop']) document.querySelector(name).click()")
    page.wait_for_function(IS_DONE)
    assert page.locator(".assistant > span").last.text_content() == ""
    assert page.locator(".error").count() == 0
    assert ask(page).text_content()


def test_the_card_and_the_numbers(page):
    page.locator("summary").click()
    assert "SHA-256 of the weights" in page.locator("#card table").first.inner_text()
    page.wait_for_function("document.querySelector('#metrics').textContent.includes('tokens made')")
