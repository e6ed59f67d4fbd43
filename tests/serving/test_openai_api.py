"""The running server, asked by OpenAI's own client and by hand."""

import base64
import concurrent.futures
import functools
import json
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

openai = pytest.importorskip("openai")

TIMEOUT = 60
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(llm_server):
    with openai.OpenAI(
        base_url=llm_server.url + "/v1", api_key="none", timeout=TIMEOUT, max_retries=0
    ) as client:
        yield client


@pytest.fixture
def post(llm_server):
    """Sends a request; returns status, headers and what is parsed of the body."""

    def send(path, body, url=llm_server.url, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                return response.status, response.headers, json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, json.loads(error.read())

    return send


def live(random_lm, prompt=PROMPT, count=8, **settings):
    return random_lm.generate_tokens(prompt, count, **settings)[0]


def number_of(server, name):
    with urllib.request.urlopen(server.url + "/metrics", timeout=TIMEOUT) as response:
        text = response.read().decode()
    return float(re.search(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)[1])


def test_models(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 64
    with pytest.raises(openai.NotFoundError, match="model `other` does not exist") as error:
        client.completions.create(model="other", prompt="a")
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_completions_are_the_models(client, random_lm):
    wanted = live(random_lm)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    ids = random_lm.tokenizer.encode(PROMPT)
    count = len(wanted.token_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), count)
    same = client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0, echo=True)
    assert same.choices[0].text == PROMPT + wanted.text
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted.text and len(chunks) > 2
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == wanted.finish_reason
    assert last.choices == [] and last.usage.total_tokens == len(ids) + count
    # The first request has read it all.
    assert last.usage.prompt_tokens_details.cached_tokens == len(ids) - 1
    assert {chunk.usage for chunk in chunks} == {None}


def test_several_prompts_and_choices(client, random_lm):
    prompts = [PROMPT, "The"]
    answer = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=6, temperature=1.0, seed=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    wanted = [
        live(random_lm, prompt, 6, temperature=1.0, seed=seed).text for prompt in prompts for seed in (5, 6)
    ]
    assert [choice.text for choice in answer.choices] == wanted and len(set(wanted)) == 4


def test_stop_strings_and_bias(client, random_lm):
    whole = live(random_lm, count=20).text
    stop = whole[5:8]
    for stream in (False, True):
        answer = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stop=[stop, "never"], stream=stream
        )
        choices = [part.choices[0] for part in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"
    first = live(random_lm).token_ids[0]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=1, temperature=0, logit_bias={first: -100}, logprobs=1
    )
    banned = live(random_lm, count=1, logit_bias={first: -1e4})
    assert answer.choices[0].text == banned.text != live(random_lm, count=1).text


def test_logprobs(client, random_lm):
    wanted = live(random_lm, count=5, logprobs=3)
    choice = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=3
    ).choices[0]
    np.testing.assert_allclose(choice.logprobs.token_logprobs, wanted.logprobs, atol=1e-4)
    names = [
        {random_lm.tokenizer.token_bytes(number).decode(errors="replace") for number in top}
        for top in wanted.top_logprobs
    ]
    assert [set(top) for top in choice.logprobs.top_logprobs] == names
    messages = [{"role": "user", "content": "Hi"}]
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, logprobs=True, top_logprobs=2, stream=stream
        )
        parts = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        content = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
        assert len(content) == 4 and all(len(entry.top_logprobs) == 2 for entry in content)
        assert content[0].logprob == max(top.logprob for top in content[0].top_logprobs)
        assert bytes(content[0].bytes).decode(errors="replace") == content[0].token


def test_chat_is_the_models(client, random_served, random_lm):
    import kerasllm

    tokenizer = kerasllm.Tokenizer.from_folder(random_served / "1" / "assets.extra")
    lm = kerasllm.CausalLM(random_lm.model, tokenizer, random_lm.generation_config)
    end = tokenizer.eos_token
    for text in ("Hi", f"{end}a:", end[:-1], end[1:] + " ", "\\udcfd"):
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
        wanted = lm.generate_tokens([ids], 6)[0]
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=6, temperature=0
        )
        assert answer.choices[0].message.content == wanted.text, text
        assert answer.usage.prompt_tokens == len(ids)
    stream = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=6, temperature=0, stream=True
        )
    )
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted.text
    assert stream[-1].choices[0].finish_reason == wanted.finish_reason


def test_tokenize_detokenize_and_generate(post, random_lm):
    ids = random_lm.tokenizer.encode(PROMPT)
    assert post("/tokenize", {"prompt": PROMPT})[2] == {
        "count": len(ids), "max_model_len": 64, "tokens": ids,
    }  # fmt: skip
    assert post("/detokenize", {"tokens": ids})[2] == {"prompt": PROMPT}
    assert post("/generate", {"text": PROMPT})[2] == {"generated_text": live(random_lm, count=12).text}


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Mia", "Tom"]}, "red": {"type": "boolean"}},
    "required": ["name", "red"],
    "additionalProperties": False,
}


def test_structured_outputs(client, random_lm):
    """The texts that the task makes under the same constraint, plain and streamed; neighbours as alone."""
    expression, wild = "(ab|c){3,5}[0-9]", {"temperature": 3.0, "seed": 4}
    wanted = live(random_lm, count=20, regex=expression, **wild)
    create = functools.partial(
        client.completions.create, model="tiny", prompt=PROMPT, max_tokens=20, **wild
    )
    answer = create(extra_body={"structured_outputs": {"regex": expression}}, logprobs=1)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (wanted.text, "stop") and re.fullmatch(
        expression, wanted.text
    )
    assert len(choice.logprobs.tokens) == len(wanted.token_ids)
    chunks = list(create(extra_body={"guided_regex": expression}, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == wanted.text
    assert chunks[-1].choices[0].finish_reason == "stop"
    # The very last token that there is room for ends the text: nothing was cut.
    choice = create(extra_body={"guided_regex": "x{3}"}, max_tokens=3).choices[0]
    assert (choice.text, choice.finish_reason) == ("xxx", "stop")
    choice = create(extra_body={"guided_regex": "x{9}"}, max_tokens=3).choices[0]
    assert (choice.text, choice.finish_reason) == ("xxx", "length")
    choice = create(extra_body={"guided_choice": ["one", "two"]}, stop=["o"]).choices[0]
    assert (choice.text, choice.finish_reason) in [("", "stop"), ("tw", "stop")]
    texts = [choice.text for choice in create(extra_body={"guided_choice": ["yes", 'n"é']}, n=6).choices]
    assert set(texts) == {"yes", 'n"é'}
    assert re.fullmatch(
        "x[yz]w", create(extra_body={"guided_grammar": 'start: "x" /[yz]/ "w"'}).choices[0].text
    )
    free = live(random_lm, count=20, **wild)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        alone = pool.submit(create)
        bound = pool.submit(create, extra_body={"guided_json": json.dumps(SCHEMA)}, max_tokens=50)
        assert alone.result().choices[0].text == free.text
        assert json.loads(bound.result().choices[0].text)["name"] in ("Mia", "Tom")


def test_response_format(client):
    form = {"type": "json_schema", "json_schema": {"name": "box", "schema": SCHEMA, "strict": True}}
    messages = [{"role": "user", "content": "Hi"}]
    create = functools.partial(client.chat.completions.create, model="tiny", messages=messages)
    answer = create(response_format=form, temperature=1.0, seed=1, n=6, max_tokens=50)
    values = [
        json.loads(choice.message.content) for choice in answer.choices if choice.finish_reason == "stop"
    ]
    assert len(values) > 2  # the context is short
    assert all(set(value) == {"name", "red"} and type(value["red"]) is bool for value in values)
    text = (
        create(response_format={"type": "json_object"}, temperature=1.0, seed=1).choices[0].message.content
    )
    assert text.lstrip().startswith("{")
    assert create(response_format={"type": "text"}, max_tokens=2).choices[0].message.content


def test_without_llguidance(random_served, monkeypatch):
    from kerasllm_serving.constraints import ConstraintFactory, MissingLibrary

    monkeypatch.setitem(sys.modules, "llguidance", None)
    factory = ConstraintFactory(random_served / "1" / "assets.extra" / "tokenizer.json", 400, [0], list)
    with pytest.raises(MissingLibrary, match="pip install llguidance"):
        factory.make("regex", "a")


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        ("completions", b"{", "must be JSON", None),
        ("completions", b"[]", "must be a JSON object", None),
        ("completions", b"[" * 100_000, "must be JSON", None),
        ("completions", b'{"prompt": "a", "temperature": NaN}', "must be JSON", None),
        ("completions", {"temperature": 0}, "`prompt` must be", "prompt"),
        ("completions", {"prompt": ""}, "at least one token", "prompt"),
        ("completions", {"prompt": [400]}, "Token ids must be from 0 to 399", None),
        ("completions", {"prompt": [-1]}, "made of strings", "prompt"),
        ("completions", {"prompt": "a", "temperature": -1}, "`temperature` must be", "temperature"),
        ("completions", {"prompt": "a", "temperature": 10**400}, "`temperature` must be", "temperature"),
        ("completions", {"prompt": "a", "top_p": 0}, "`top_p` must be", "top_p"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "`max_tokens` must be", "max_tokens"),
        ("completions", {"prompt": "a", "max_tokens": 64}, "maximum context length", None),
        ("completions", {"prompt": "a", "n": True}, "`n` must be", "n"),
        ("completions", {"prompt": "a", "stop": ["x", ""]}, "`stop` must be", "stop"),
        ("completions", {"prompt": "a", "stop": "\ud800"}, "`stop` must be", "stop"),
        ("completions", {"prompt": "\ud800"}, "valid Unicode", None),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, "`logit_bias` must be", "logit_bias"),
        ("completions", {"prompt": "a", "best_of": 2}, "`best_of` must be", "best_of"),
        ("completions", {"prompt": "a", "stream": 1}, "`stream` must be", "stream"),
        ("chat/completions", {"messages": []}, "`messages` must be", "messages"),
        ("chat/completions", {"messages": [{"role": "<x>", "content": "a"}]}, "plain word", None),
        ("chat/completions", {"messages": [{"role": "user"}]}, "`content` must be", "messages"),
        (
            "chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "tools": [{"type": "function", "function": {"name": "a"}}],
            },
            "chat template knows no tools",
            "tools",
        ),
        ("completions", {"prompt": "a", "response_format": {"type": "xml"}}, "of type `text`",
         "response_format"),
        ("completions", {"prompt": "a", "response_format": {"type": "json_schema"}}, "with `schema`",
         "response_format"),
        ("completions", {"prompt": "a", "guided_regex": "("}, "`guided_regex` cannot be read",
         "guided_regex"),
        ("completions", {"prompt": "a", "guided_choice": []}, "`guided_choice` must be a list",
         "guided_choice"),
        ("completions", {"prompt": "a", "guided_json": "{"}, "`guided_json` must be a JSON schema",
         "guided_json"),
        ("completions", {"prompt": "a", "guided_json": {"type": "odd"}}, "`guided_json` cannot be read",
         "guided_json"),
        ("completions", {"prompt": "a", "structured_outputs": {"xml": 1}}, "with one of json",
         "structured_outputs"),
        ("completions", {"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, "one structure",
         "guided_choice"),
        ("completions", {"prompt": "a", "guided_regex": "a", "min_tokens": 2}, "where the answer ends",
         "guided_regex"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a " * 99}]}, "maximum", "messages"),
        ("embeddings", {"input": "a"}, "does not embed texts", "model"),
    ],
)  # fmt: skip
def test_bad_requests(post, path, body, message, param):
    status, _, answer = post(f"/v1/{path}", body)
    assert status == 400, answer
    error = answer["error"]
    assert message in error["message"] and error["param"] == param
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


def test_the_queue_is_counted_in_rows(llm_server, post):
    """Three slots and a queue of four hold seven rows, in whatever requests they come."""
    deadline = time.monotonic() + TIMEOUT
    while number_of(llm_server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.01)
    for rows, status in ((7, 200), (8, 429)):
        assert post("/v1/completions", {"prompt": "The", "max_tokens": 1, "n": rows})[0] == status
        assert post("/v1/completions", {"prompt": rows * ["The"], "max_tokens": 1})[0] == status


def test_overload_is_refused(llm_server, post):
    """Slots and queue are full: who comes is told when to ask again."""
    results = []
    refused = number_of(llm_server, "kerasllm:refused_total")

    def ask():
        body = {"prompt": "The", "max_tokens": 50, "ignore_eos": True, "n": 2}
        results.append(post("/v1/completions", body))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [status for status, _, _ in results]
    assert set(statuses) == {200, 429}, statuses
    for status, headers, answer in results:
        if status == 429:
            assert headers["Retry-After"] == "1" and answer["error"]["type"] == "rate_limit_error"
        else:
            assert answer["usage"]["completion_tokens"] == 100
    assert number_of(llm_server, "kerasllm:refused_total") - refused == statuses.count(429)


def test_whoever_goes_frees_the_slots(llm_server, post):
    made = number_of(llm_server, "vllm:generation_tokens_total")
    body = {"prompt": "The", "max_tokens": 60, "ignore_eos": True, "stream": True}
    address = ("127.0.0.1", llm_server.rest_port)
    for stream in (True, False):
        for _ in range(5):
            with socket.create_connection(address) as connection:
                data = json.dumps(body | {"stream": stream}).encode()
                head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n"
                connection.sendall(head.encode() + data)
                if stream:
                    assert connection.recv(20).startswith(b"HTTP/1.1 200")
                else:
                    time.sleep(0.01)
    deadline = time.monotonic() + TIMEOUT
    while number_of(llm_server, "vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert number_of(llm_server, "vllm:num_requests_running") == 0
    # All of them to the end would have been ten times 60.
    assert number_of(llm_server, "vllm:generation_tokens_total") - made < 450
    assert post("/v1/completions", {"prompt": "The"})[0] == 200


def test_pages_of_the_server(llm_server, post):
    assert post("/v1/completions", {"prompt": PROMPT, "max_tokens": 1})[0] == 200
    for path, kind, part in (
        ("/", "text/html; charset=utf-8", b"v1/chat/completions"),
        ("/health", "application/json", b"ok"),
        (
            "/metrics",
            "text/plain; version=0.0.4; charset=utf-8",
            b"vllm:time_to_first_token_seconds_bucket",
        ),
        ("/cards/tiny", "text/plain; charset=utf-8", b"SHA-256 of the weights"),
    ):
        with urllib.request.urlopen(llm_server.url + path, timeout=TIMEOUT) as response:
            assert response.headers["Content-Type"] == kind
            assert part in response.read()
    status, _, answer = post("/v1/models/tiny:predict", {"instances": [PROMPT]})
    assert status == 200 and isinstance(answer["predictions"][0], str)
    for path, code in (("/v1/completions", 405), ("/cards/nobody", 404), ("/cards/..%2fREADME.md", 404)):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(llm_server.url + path, timeout=TIMEOUT)
        with error.value:
            assert error.value.code == code


def test_methods(llm_server):
    """Fixed paths take those that fit, and say which."""
    pages = ("/", "/health", "/ready", "/metrics", "/v1/models")
    for path, method, status, allowed in (
        ("/cards/tiny", "HEAD", 200, None),
        ("/health", "HEAD", 200, None),
        *((path, "POST", 405, "GET, HEAD") for path in pages),
        *(("/cards/tiny", method, 405, "GET, HEAD") for method in ("POST", "PUT", "DELETE", "OPTIONS")),
        *((path, "GET", 405, "POST") for path in ("/v1/responses", "/tokenize", "/generate")),
    ):
        request = urllib.request.Request(llm_server.url + path, method=method)
        try:
            answer = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            assert (answer.status, answer.headers["Allow"]) == (status, allowed), (path, method)
            assert method != "HEAD" or answer.read() == b""


def test_keys_limits_and_logs(start_server, served, tmp_path, post):
    """A folder without slots: what works says so, and what does not, too."""
    keys = tmp_path / "keys"
    keys.write_text("# for the tests\nsecret one\n")
    server = start_server(
        f"--model_base_path={served}",
        "--model_name=gpt",
        f"--api_keys_file={keys}",
        "--max_body_bytes=1000",
        "--access_log=true",
        "--rest_api_enable_cors_support=true",
    )
    good = {"Authorization": "Bearer secret one", "X-Request-Id": "mine-1"}
    body = {"text": "Once"}
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic secret one"}):
        for path in ("/generate", "/v1/models/gpt:predict", "/metrics"):
            status, _, answer = post(path, body, server.url, headers)
            assert status == 401 and "API key" in str(answer["error"])
    status, headers, answer = post("/generate", body, server.url, good)
    assert status == 200 and answer["generated_text"]
    assert headers["X-Request-Id"] == "mine-1" and headers["Access-Control-Allow-Origin"] == "*"
    status, _, answer = post("/v1/completions", {"prompt": "a"}, server.url, good)
    assert status == 400 and "exported without slots" in answer["error"]["message"]
    status, _, answer = post("/generate", {"text": "x" * 1000}, server.url, good)
    assert status == 413 and "up to 1000 bytes" in answer["error"]["message"]
    with urllib.request.urlopen(server.url + "/health", timeout=TIMEOUT) as response:
        assert response.status == 200
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    entry = next(line for line in lines if line["id"] == "mine-1")
    assert entry["path"] == "/generate" and entry["status"] == 200 and entry["bytes_in"] == 16
    assert "Once" not in server.log.read_text() and "secret" not in server.log.read_text()


def test_sigterm_loses_nothing(start_server, random_served, post):
    server = start_server(f"--model_base_path={random_served}", "--model_name=tiny")
    results = []

    def ask():
        body = {"prompt": "The", "max_tokens": 55, "ignore_eos": True}
        results.append(post("/v1/completions", body, server.url))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT
    while number_of(server, "vllm:num_requests_waiting") < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert [(status, answer["usage"]["completion_tokens"]) for status, _, answer in results] == [
        (200, 55)
    ] * 8
    assert server.process.wait(60) == 0


def test_embeddings(embedder_server, post):
    url = embedder_server.url
    with openai.OpenAI(base_url=url + "/v1", api_key="none", timeout=TIMEOUT) as client:
        texts = ["A cat.", "Mia found a box"]
        plain = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
        packed = client.embeddings.create(model="embedder", input=texts)  # base64, which the client unpacks
    vectors = np.array([entry.embedding for entry in plain.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose([entry.embedding for entry in packed.data], vectors, atol=1e-6)
    assert plain.usage.prompt_tokens > len(texts)
    status, _, answer = post("/v1/embeddings", {"input": "a", "encoding_format": "base64"}, url)
    assert status == 200 and len(base64.b64decode(answer["data"][0]["embedding"])) == 4 * vectors.shape[1]
    status, _, answer = post("/v1/completions", {"prompt": "a"}, url)
    assert status == 400 and "does not write text" in answer["error"]["message"]
