"""Exports whose graphs put requests together."""

import threading

import numpy as np
import pytest
import tensorflow as tf
from reference.saved_models import PROMPTS, check_rows, inputs, random_requests
from reference.weights import randomize
from tensorflow.core.protobuf import saved_model_pb2

from kerasllm import Bert, BertConfig, TextEmbedder
from kerasllm.export import Batching

WAIT = 2_000_000


@pytest.fixture(scope="module")
def folder(random_lm, tmp_path_factory):
    base = tmp_path_factory.mktemp("batching")
    return random_lm.export(base / "1", batching=Batching(batch_timeout_micros=WAIT), max_batch_size=4)


def at_once(calls):
    """Runs functions in threads of their own; returns what they return, or their errors."""
    results = [None] * len(calls)

    def run(number, call):
        try:
            results[number] = call()
        except tf.errors.OpError as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_unlike_requests_are_put_together_and_stay_as_alone(folder, random_lm):
    generate = tf.saved_model.load(str(folder)).signatures["generate"]
    requests = list(random_requests(4, seed=11))

    def ask(request):
        values = dict(request)
        return generate(**inputs([values.pop("prompt")], **values))

    answers = at_once([lambda request=request: ask(request) for request in requests])
    counts = [int(answer["num_tokens"][0]) for answer in answers]
    # The outputs of a batch are as wide as its longest row.
    assert {answer["token_ids"].shape[1] for answer in answers} == {max(counts)} and min(counts) < max(
        counts
    )
    for request, answer in zip(requests, answers, strict=True):
        values = dict(request)
        most, stops = values.pop("max_new_tokens"), values.pop("stop")
        if not values["temperature"]:
            values = {name: values[name] for name in ("prompt", "repetition_penalty", "seed")}
        live = random_lm.generate_tokens(
            [values.pop("prompt")], most, logprobs=0, stop_strings=stops, **values
        )
        count = len(live[0].token_ids)
        for name, rest in (("token_ids", -1), ("logprobs", 0)):
            assert (answer[name].numpy()[:, count:] == rest).all()
            answer[name] = answer[name][:, :count]
        check_rows(answer, live)


def test_what_a_request_breaks_is_said(folder):
    signatures = tf.saved_model.load(str(folder)).signatures
    for feeds, message in (
        (inputs(["The"] * 5), "at most 4 rows. Received: 5 rows"),
        (inputs(["The"], stop=["a"] * 17), "at most 16 `stop` strings per row. Received: 17"),
        (inputs(["The"], top_p=3.0), "`top_p` must"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            signatures["generate"](**feeds)
    file = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    functions = file.meta_graphs[0].graph_def.library.function
    names = {
        node.attr["shared_name"].s
        for function in functions
        for node in function.node_def
        if node.op == "BatchFunction"
    }
    assert len(names) == 3  # serving_default, generate, score: a queue for each


def test_an_embedder_fills_batches_up(tokenizer, tmp_path):
    config = BertConfig(vocabulary_size=400, context_length=64, num_layers=1, num_heads=2, dim=32)
    embedder = TextEmbedder(randomize(Bert(config, None)), tokenizer)
    batching = Batching(batch_timeout_micros=1000, allowed_batch_sizes=(4, 8))
    served = tf.saved_model.load(str(embedder.export(tmp_path / "1", batching=batching, max_batch_size=8)))
    answers = at_once(
        [lambda text=text: served.signatures["embed"](text=tf.constant([text])) for text in PROMPTS]
    )
    vectors = np.concatenate([answer["embedding"].numpy() for answer in answers])
    np.testing.assert_allclose(vectors, embedder.encode(PROMPTS), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="must end with `max_batch_size`, 6. Received: .4, 8."):
        embedder.export(tmp_path / "2", batching=batching, max_batch_size=6)
    assert not (tmp_path / "2").exists()


@pytest.mark.parametrize(
    "settings", [{"batch_timeout_micros": -1}, {"num_batch_threads": 0}, {"allowed_batch_sizes": (4, 4)}]
)
def test_bad_numbers(settings):
    with pytest.raises(ValueError, match="Received"):
        Batching(**settings)
