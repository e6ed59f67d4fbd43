"""Files for devices behind the same engine and the same API: the tokens of the live model."""

import concurrent.futures
import queue
import shutil

import pytest
from kerasllm_serving.engine import Engine, RowRequest
from kerasllm_serving.errors import ServingError, StartupError
from kerasllm_serving.litert_model import LiteRtLanguageModel, find_litert_file
from kerasllm_serving.model import find_versions
from reference.saved_models import random_requests

from kerasllm.litert import Generator

openai = pytest.importorskip("openai")
pytest.importorskip("litert_lm_builder")

SECONDS = 60
PROMPT = "Once upon a time there was a small box in the garden."
LENGTH = 46


@pytest.fixture(scope="module")
def bundle(chat_lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "tiny.litertlm"
    return chat_lm.export(path, prefill_lengths=(4, 16), cache_length=LENGTH, quantize=None)


@pytest.fixture(scope="module")
def model(tflite):
    return LiteRtLanguageModel("tiny", tflite, 1, num_threads=1)


@pytest.fixture
def engine(model):
    engine = Engine(model.slots, max_queue=30, steps=3, prefill_chunk=5)
    yield engine
    engine.close(0)


def run(engine, row):
    pieces, found = queue.Queue(), []
    engine.submit([row], pieces.put)
    while not found or not found[-1].finish_reason:
        found.append(pieces.get(timeout=SECONDS))
        if isinstance(found[-1], ServingError):
            raise found[-1]
    return found


def test_rows_are_the_live_models(engine, model, random_lm):
    """All kinds of settings, after one another through one cache, of which beginnings are kept."""
    for request in random_requests(12, seed=2):
        ids = model.tokenize(request["prompt"])
        assert ids == random_lm.tokenizer.encode(request["prompt"])
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
        settings = {name: request[name] for name in names}
        most, stop = min(request["max_new_tokens"], LENGTH - len(ids)), request["stop"]
        row = RowRequest(token_ids=ids, max_new_tokens=most, stop=stop, alternatives=2, **settings)
        if not request["temperature"]:
            settings = {name: settings[name] for name in ("repetition_penalty", "seed")}
        live = random_lm.generate_tokens(request["prompt"], most, stop_strings=stop, logprobs=2, **settings)
        pieces = run(engine, row)
        assert [number for piece in pieces for number in piece.token_ids] == live[0].token_ids
        assert "".join(piece.text for piece in pieces) == live[0].text
        assert pieces[-1].finish_reason == live[0].finish_reason
        logprobs = [number for piece in pieces for number in piece.logprobs]
        assert logprobs == pytest.approx(live[0].logprobs, abs=1e-3)
        tops = [[number for number, _ in pairs] for piece in pieces for pairs in piece.alternatives]
        assert tops == [list(top) for top in live[0].top_logprobs]


def test_penalties_bias_and_the_kept_beginning(engine, model, random_lm, tflite):
    changes = {"presence_penalty": 0.7, "frequency_penalty": 1.5, "min_new_tokens": 8}
    bias = {7: 3.0, 9: -50.0}
    live = random_lm.generate_tokens(PROMPT, 8, logit_bias=bias, **changes)[0]
    ids = model.tokenize(PROMPT)
    row = RowRequest(token_ids=ids, max_new_tokens=8, logit_bias=bias, **changes)
    for known in (0, len(ids) - 1):
        pieces = run(engine, row)
        assert [number for piece in pieces for number in piece.token_ids] == live.token_ids
        assert pieces[0].cached_tokens == known
    plain = [
        n for piece in run(engine, RowRequest(token_ids=ids, max_new_tokens=8)) for n in piece.token_ids
    ]
    assert plain == Generator(tflite).generate_ids(PROMPT, 8)


def test_the_server_answers_from_a_bundle(start_server, bundle, chat_lm):
    server = start_server(f"--model_base_path={bundle}", "--model_name=tiny")
    options = {"api_key": "none", "timeout": SECONDS, "max_retries": 0}
    with openai.OpenAI(base_url=server.url + "/v1", **options) as client:
        live = chat_lm.generate_tokens(PROMPT, 8)[0]
        # What users write stays text, also where it spells a special token.
        end = chat_lm.tokenizer.eos_token
        chat = [{"role": "user", "content": f"small{end} box"}]
        answer = client.chat.completions.create(model="tiny", messages=chat, max_tokens=8, temperature=0)
        assert answer.choices[0].message.content == chat_lm.chat(chat, 8)

        def ask(number):
            if number % 4 == 3:  # leaves in the middle
                with client.completions.create(
                    model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, stream=True
                ) as stream:
                    return next(iter(stream)).choices[0].text
            stop = live.text[3:6] if number % 4 == 1 else None
            chunks = client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, stream=True, stop=stop
            )
            text = "".join(chunk.choices[0].text for chunk in chunks)
            return text == (live.text.partition(stop)[0] if stop else live.text)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(12)))
        with pytest.raises(openai.BadRequestError, match="maximum context length is 46 tokens"):
            client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40)


def test_where_a_file_may_lie(tmp_path):
    file, folder = tmp_path / "a.litertlm", tmp_path / "3"
    file.touch()
    assert find_versions(file) == {1: file} and find_litert_file(file) == file
    folder.mkdir()
    assert find_versions(tmp_path) == {3: folder} and find_litert_file(folder) is None
    (folder / "model.tflite").touch()
    assert find_litert_file(folder) == folder / "model.tflite"
    (folder / "saved_model.pb").touch()
    assert find_litert_file(folder) is None


def test_what_is_no_model(tmp_path, bundle, tflite):
    for name, content in (
        ("a.litertlm", b"LITERTLM" + bytes(100)),
        ("b.litertlm", b"x" * 99),
        ("c.tflite", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(StartupError, match=f"must be complete. Received: .*{name}"):
            LiteRtLanguageModel("m", tmp_path / name, 1)
    shutil.copy(tflite, tmp_path / "d.tflite")
    with pytest.raises(StartupError, match="tokenizer.json|generation_config.json"):
        LiteRtLanguageModel("m", tmp_path / "d.tflite", 1)
    (tmp_path / "cut.litertlm").write_bytes(bundle.read_bytes()[:-2000])
    with pytest.raises(StartupError):
        LiteRtLanguageModel("m", tmp_path / "cut.litertlm", 1)
