import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from reference.saved_models import (
    CAUSAL_SIGNATURES,
    NUMBERS,
    PROMPTS,
    SETTINGS,
    check_rows,
    check_signatures,
    inputs,
    random_requests,
    read_graph,
)
from tensorflow.core.protobuf import saved_model_pb2

from kerasllm import GPT2, CausalLM, GenerationConfig, GPT2Config, Tokenizer, train_tokenizer
from kerasllm.generation import KNOBS


@pytest.fixture(scope="module")
def loaded(served):
    return tf.saved_model.load(str(served / "1"))


def test_serving_default_is_text_to_text(loaded, causal_lm):
    signature = loaded.signatures["serving_default"]
    assert signature.structured_input_signature[1]["prompt"].shape.as_list() == [None]
    outputs = signature(prompt=tf.constant(PROMPTS))
    assert set(outputs) == {"text"}
    assert [text.decode() for text in outputs["text"].numpy()] == causal_lm.generate(PROMPTS)


@pytest.mark.grappler
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_generate_equals_the_live_model(loaded, causal_lm, settings):
    live = causal_lm.generate_tokens(PROMPTS, 9, seed=3, logprobs=0, **settings)
    check_rows(loaded.signatures["generate"](**inputs(**settings)), live)


@pytest.fixture(params=["random_loaded", "compiled_loaded"])
def random_generate(request):
    """The signature `generate` of `random_lm`, plain and compiled by XLA."""
    return request.getfixturevalue(request.param).signatures["generate"]


def test_stop_strings_end_rows_as_in_python(random_generate, random_lm):
    """Stop strings over several tokens, within one, of which one ends another, and of half characters."""
    drawn = {"temperature": 1.4, "seed": 5}
    texts = random_lm.generate(PROMPTS, 24, **drawn)
    reasons = set()
    for stops in (
        [texts[0][4:7]],
        [texts[1][6:8], texts[2][9:10], "never"],
        [texts[2][3:9], texts[2][5:8]],
        ["\ufffd"],
        ["e", "\u00e9"],
    ):
        stops += ["never"] * (3 - len(stops))  # of one shape, for which XLA compiles once
        live = random_lm.generate_tokens(PROMPTS, 24, logprobs=0, stop_strings=stops, **drawn)
        check_rows(random_generate(**inputs(stop=stops, max_new_tokens=24, **drawn)), live)
        reasons |= {row.finish_reason for row in live}
    assert reasons == {"stop", "length"}


def test_a_list_of_stop_strings_ends_at_an_empty_one(random_loaded, random_lm):
    """So a server may fill up the rows of one request to the width of another's."""
    generate = random_loaded.signatures["generate"]
    text = random_lm.generate(PROMPTS[0], 12)
    feeds = inputs([PROMPTS[0]] * 3, max_new_tokens=12)
    feeds["stop"] = tf.constant([[text[3:5], "", ""], ["", text[3:5], text[3:5]], [text[3:5]] * 3])
    reasons = generate(**feeds)["finish_reason"].numpy().tolist()
    assert reasons == [b"stop", b"length", b"stop"]


def test_the_configuration_counts_in_serving_default(random_lm, tmp_path):
    """Stop strings, penalties and biases of the configuration; and a number of tokens that shrinks."""
    config = GenerationConfig(max_new_tokens=30, frequency_penalty=0.8, stop_strings=("t ",), seed=4)
    config = dataclasses.replace(config, temperature=0.9, logit_bias={7: 2.0}, min_new_tokens=3)
    task = CausalLM(random_lm.model, random_lm.tokenizer, config)
    prompts = [*PROMPTS, "z" * 60]
    live = task.generate(prompts)
    served = tf.saved_model.load(str(task.export(tmp_path / "1")))
    outputs = served.signatures["serving_default"](prompt=tf.constant(prompts))
    assert [text.decode() for text in outputs["text"].numpy()] == live
    # With its defaults the scalar form is the same, and gives the details.
    definition = saved_model_pb2.SavedModel.FromString((tmp_path / "1" / "saved_model.pb").read_bytes())
    scalar = definition.meta_graphs[0].signature_def["generate_scalar"]
    defaults = {name: tf.make_ndarray(value) for name, value in scalar.defaults.items()}
    assert set(defaults) == set(scalar.inputs) - {"prompt"} == {spec.name for spec in KNOBS}
    assert defaults["stop"].tolist() == [b"t "] and defaults["seed"] == 4
    outputs = served.signatures["generate_scalar"](
        prompt=tf.constant(prompts), **{name: tf.constant(value) for name, value in defaults.items()}
    )
    check_rows(outputs, task.generate_tokens(prompts, logprobs=0))


def test_no_special_token_in_the_text(stories, tmp_path):
    """A model that says nothing but special tokens says nothing."""
    tokenizer = train_tokenizer("byte_bpe", stories[:9], 300, special_tokens=("<|endoftext|>", "<|tool|>"))
    config = GPT2Config(vocabulary_size=300, context_length=64, num_layers=1, num_heads=2, dim=8)
    model = CausalLM(GPT2(config), tokenizer, GenerationConfig(max_new_tokens=3))
    model.model.final_norm.scale.assign([0.0] * 8)
    model.model.final_norm.bias.assign([1.0] * 8)  # the same state everywhere, so the same scores
    table = np.zeros((300, 8), "float32")
    table[tokenizer.token_to_id("<|tool|>")] = 1
    model.model.token_embedding.embeddings.assign(table)
    served = tf.saved_model.load(str(model.export(tmp_path / "1"))).signatures
    outputs = served["generate"](**inputs(PROMPTS[:1], max_new_tokens=3))
    assert outputs["token_ids"].numpy().tolist() == [[tokenizer.token_to_id("<|tool|>")] * 3]
    assert outputs["text"].numpy().tolist() == [b""]
    assert served["serving_default"](prompt=tf.constant(["a"]))["text"].numpy().tolist() == [b""]
    # And one that ends at once.
    model.model.token_embedding.embeddings.assign(np.roll(table, tokenizer.eos_id - 1, axis=0))
    assert model.generate_tokens("a")[0].token_ids == []


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("x " * 300, {}, "shorter than the context of 64 tokens. Received: a prompt of"),
        ("x" * 10_000, {}, "`prompt` must be of at most .* bytes. Received: a text of 10000 bytes"),
        ("", {}, "at least one token"),
        (b"a\xff", {}, "`prompt` must be UTF-8"),
        ("a", {"max_new_tokens": 64}, "must fit into the context of 64 tokens"),
        ("a", {"max_new_tokens": 2**31 - 1}, "must fit into the context of 64 tokens"),
        ("a", {"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
        ("a", {"temperature": -1.0}, "`temperature` must be at least 0"),
        ("a", {"temperature": math.nan}, "`temperature` must be at least 0"),
        ("a", {"temperature": math.inf}, "`temperature` must be at least 0 and finite"),
        ("a", {"top_k": -1}, "`top_k` must be at least 0"),
        ("a", {"top_p": 0.0}, "`top_p` must be above 0"),
        ("a", {"top_p": math.nan}, "`top_p` must be above 0"),
        ("a", {"min_p": 1.5}, "`min_p` must be at least 0 and at most 1"),
        ("a", {"min_p": math.nan}, "`min_p` must be at least 0 and at most 1"),
        ("a", {"repetition_penalty": 0.0}, "`repetition_penalty` must be above 0 and finite"),
        ("a", {"repetition_penalty": math.inf}, "`repetition_penalty` must be above 0 and finite"),
        ("a", {"stop": ["x"] * 17}, "at most 16 `stop` strings per row. Received: 17"),
        ("a", {"stop": ["x" * 257]}, "`stop` must be of at most 256 bytes. Received: a text of 257"),
    ],
)
def test_bad_input_is_an_invalid_argument(loaded, prompt, settings, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        loaded.signatures["generate"](**inputs([prompt], **settings))


def test_settings_must_be_one_per_prompt(loaded):
    generate = loaded.signatures["generate"]
    for name in (spec.name for spec in KNOBS):
        values = inputs()
        with pytest.raises(
            tf.errors.InvalidArgumentError, match=f"`{name}` must have one value per `prompt`"
        ):
            generate(**{**values, name: values[name][:1]})
    with pytest.raises(
        tf.errors.InvalidArgumentError, match="one value per `prompt`. Received: 3 values, 1"
    ):
        generate(**{**inputs(), "prompt": tf.constant(["a"])})
    with pytest.raises(tf.errors.InvalidArgumentError, match="at least one `prompt`"):
        generate(**{name: value[:0] for name, value in inputs().items()})


def test_limits_of_the_export(causal_lm, tmp_path):
    limits = {"max_batch_size": 2, "max_prompt_tokens": 5, "max_new_tokens": 7}
    path = causal_lm.export(tmp_path / "1", **limits)
    manifest = json.loads((path / "assets.extra" / "kerasllm_manifest.json").read_text())
    assert manifest["limits"] == limits
    signatures = tf.saved_model.load(str(path)).signatures
    generate = signatures["generate"]
    assert generate(**inputs(["a", "b"], max_new_tokens=7))["num_tokens"].numpy().max() <= 7
    for feeds, message in (
        (inputs(["a"] * 3), "at most 2 rows. Received: 3"),
        (inputs(["z" * 6], max_new_tokens=1), "of at most 5 tokens. Received: a prompt of 6"),
        (inputs(["a"], max_new_tokens=8), "`max_new_tokens` must be at most 7. Received: "),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            generate(**feeds)
    # The configuration's 12 new tokens are not what a caller asked for.
    assert signatures["serving_default"](prompt=tf.constant(["a"]))["text"].shape == [1]
    with pytest.raises(ValueError, match="`max_batch_size` must be at least 1"):
        causal_lm.export(tmp_path / "2", max_batch_size=0)


def test_shapes_that_no_python_client_could_send(served):
    """TensorFlow Serving feeds what it gets, whatever shape a signature declares."""
    feeds = {name: value.numpy() for name, value in inputs(stop=["x"]).items()}
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        meta = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(served / "1"))
        signature = meta.signature_def["generate"]
        session._extend_graph()

        def output(info):
            return session.graph.get_tensor_by_name(info.name)._as_tf_output()

        def run(feeds):  # without Python's check of the shapes
            values = {output(signature.inputs[name]): np.asarray(value) for name, value in feeds.items()}
            fetches = [output(signature.outputs["text"])]
            return session._call_tf_sessionrun(None, values, fetches, [], None)[0]

        assert len(run(feeds)) == 3
        wrong = {
            "prompt": np.array([PROMPTS], object),
            "stop": np.array(["a", "b", "c"], object),
            "temperature": np.float32(0),
            "seed": np.zeros([3, 2], "int32"),
        }
        for name, value in wrong.items():
            with pytest.raises(tf.errors.InvalidArgumentError, match=f"{name}.*not compatible"):
                run({**feeds, name: value})


def as_feeds(requests):
    """As a server puts requests together: lists of stop strings are filled up behind an empty one."""
    feeds = {
        name: tf.constant([r[name] for r in requests], NUMBERS.get(name)) for name in [*SETTINGS, "prompt"]
    }
    width = max(len(request["stop"]) for request in requests) + 1
    padded = [r["stop"] + [""] + ["t"] * (width - 1 - len(r["stop"])) for r in requests]
    return {**feeds, "stop": tf.constant(padded)}


@pytest.mark.parametrize("count", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_rows_do_not_depend_on_their_neighbours(random_generate, count):
    """Requests in random batches; each row equals the same request alone."""
    generate = random_generate
    requests = list(random_requests(count, seed=count))
    rng = random.Random(1)
    while requests:
        batch, requests = requests[: (size := rng.randint(2, 12))], requests[size:]
        together = {name: value.numpy() for name, value in generate(**as_feeds(batch)).items()}
        for row, request in enumerate(batch):
            alone = {name: value.numpy()[0] for name, value in generate(**as_feeds([request])).items()}
            number = alone["num_tokens"]
            for name in ("text", "num_tokens", "finish_reason"):
                assert together[name][row] == alone[name], (name, request)
            assert together["token_ids"][row, :number].tolist() == alone["token_ids"].tolist()
            assert set(together["token_ids"][row, number:].tolist()) <= {-1}
            np.testing.assert_allclose(together["logprobs"][row, :number], alone["logprobs"], atol=1e-4)


def test_score(random_loaded, random_lm):
    score = random_loaded.signatures["score"]
    tokenizer = random_lm.tokenizer
    pairs = [
        ("Once upon a", " time"),
        ("The ", "garden was green"),
        ("a", "b"),
        ("", "The sun"),
        ("M", "ia"),
    ]
    best = random_lm.generate_tokens("Mia", 3)[0]
    pairs.append(("Mia", best.text))
    prompts, continuations = zip(*pairs, strict=True)
    outputs = score(prompt=tf.constant(prompts), continuation=tf.constant(continuations))
    outputs = {name: value.numpy() for name, value in outputs.items()}
    for row, (prompt, continuation) in enumerate(pairs):
        whole = tokenizer.encode(prompt + continuation)
        count = len(whole) - len(tokenizer.encode(prompt.rstrip()))
        whole = whole if prompt else [tokenizer.eos_id, *whole]
        logits = np.asarray(random_lm(np.array([whole[:-1]])))[0, -count:].astype("float64")
        values = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = values[np.arange(count), whole[-count:]]
        assert outputs["num_tokens"][row] == count
        assert outputs["token_ids"][row, :count].tolist() == whole[-count:]
        np.testing.assert_allclose(outputs["logprobs"][row, :count], expected, rtol=1e-5, atol=1e-5)
        assert outputs["logprob"][row] == pytest.approx(expected.sum(), rel=1e-5, abs=1e-5)
        assert outputs["is_greedy"][row] == (values.argmax(-1) == whole[-count:]).all()
    assert outputs["is_greedy"].any() == (tokenizer.encode("Mia" + best.text)[-3:] == best.token_ids)
    for prompt, continuation, message in (
        ("a", "", "must add at least one token"),
        ("z" * 40, "z" * 26, "must fit into the context of 64 tokens. Received: 66"),
        ("a", b"\xff", "`continuation` must be UTF-8"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            score(prompt=tf.constant([prompt]), continuation=tf.constant([continuation]))


def test_tokenize_and_detokenize(random_loaded, random_lm):
    signatures = random_loaded.signatures
    outputs = signatures["tokenize"](text=tf.constant(PROMPTS))
    rows = random_lm.tokenizer.encode(PROMPTS)
    assert outputs["num_tokens"].numpy().tolist() == [len(row) for row in rows]
    assert outputs["token_ids"].numpy().tolist()[2] == rows[2]
    # What a server pads with is no part of the text.
    ids = tf.where(outputs["token_ids"] < 0, outputs["token_ids"][0, 0], outputs["token_ids"])
    texts = signatures["detokenize"](token_ids=ids, num_tokens=outputs["num_tokens"])["text"]
    assert [text.decode() for text in texts.numpy()] == PROMPTS


def test_prefill_and_decode(random_loaded, random_lm):
    """A caller that keeps the cache itself comes to the same tokens."""
    signatures = random_loaded.signatures
    rows = random_lm.tokenizer.encode(PROMPTS)
    counts = tf.constant([len(row) for row in rows])
    ids = tf.ragged.constant(rows, tf.int32).to_tensor(rows[0][0])  # as a server pads
    outputs = signatures["prefill"](token_ids=ids, num_tokens=counts, max_new_tokens=tf.constant([5, 5, 5]))
    tokens = []
    for step in range(5):
        token = tf.argmax(outputs.pop("logits"), axis=-1, output_type=tf.int32)
        tokens.append(token.numpy())
        if step < 4:
            outputs = signatures["decode"](token_id=token, index=counts + step, **outputs)
    live = [row.token_ids for row in random_lm.generate_tokens(PROMPTS, 5)]
    assert np.stack(tokens, axis=1).tolist() == live
    step = signatures["decode"]
    for feeds, message in (
        ({"token_id": tf.constant([400, 0, 0]), "index": counts}, "from 0 to 399. Received: 0 to 400"),
        ({"token_id": counts, "index": tf.constant([1, 2, 64])}, "`index` must be a place in the cache"),
        ({"token_id": counts[:1], "index": counts[:1]}, "must have one value per `token_id`"),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError, match=message):
            step(**feeds, **outputs)
    with pytest.raises(tf.errors.InvalidArgumentError, match="`num_tokens` must be from 1 to"):
        signatures["prefill"](token_ids=ids, num_tokens=counts + 90, max_new_tokens=counts)


def test_every_signature_has_names_and_rows(random_served, compiled_served):
    """And only ops that a stock TensorFlow Serving has."""
    check_signatures(random_served / "1", CAUSAL_SIGNATURES)
    without_chat = CAUSAL_SIGNATURES - {"chat"}
    check_signatures(compiled_served / "1", without_chat, xla_ops={"XlaDynamicUpdateSlice"})


def test_assets_extra(served, causal_lm):
    extra = served / "1" / "assets.extra"
    assert Tokenizer.from_folder(extra).to_json() == causal_lm.tokenizer.to_json()
    manifest = json.loads((extra / "kerasllm_manifest.json").read_text())
    assert manifest["signatures"] == sorted(CAUSAL_SIGNATURES - {"chat"})
    assert "has no chat template" in manifest["omitted_signatures"]["chat"]
    assert manifest["limits"] == {"max_batch_size": 256, "max_prompt_tokens": 64, "max_new_tokens": 64}
    assert manifest["model_config"] == causal_lm.model.config.to_dict()
    generation = json.loads((extra / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == causal_lm.generation_config.max_new_tokens


def test_weights_are_stored_once(served, causal_lm):
    stored = sum(path.stat().st_size for path in (served / "1" / "variables").iterdir())
    assert stored < 1.2 * 4 * causal_lm.count_params() + 20_000


def test_never_overwrites(served, causal_lm):
    before = sorted(path.stat().st_mtime_ns for path in (served / "1").rglob("*"))
    with pytest.raises(FileExistsError, match="never overwrites"):
        causal_lm.export(served / "1")
    assert sorted(path.stat().st_mtime_ns for path in (served / "1").rglob("*")) == before


def test_interrupted_export_leaves_no_version_folder(causal_lm, tmp_path):
    """Kills exports at several moments; a numbered folder must be whole or not there."""
    causal_lm.save_pretrained(tmp_path / "model")
    code = (
        "import sys; from kerasllm import CausalLM; model = CausalLM.load(sys.argv[1]); "
        "print('loaded', flush=True); model.export(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model"), str(tmp_path / "served" / "1")]
    export = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert export.stdout.readline() == "loaded\n"
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("served/.*/*")):  # until it has begun to write
        assert export.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(export.pid, signal.SIGKILL)
    export.wait()
    names = [path.name for path in (tmp_path / "served").iterdir()]
    assert names and not any(name.isdecimal() for name in names)
    with_tokenizer = causal_lm.export(tmp_path / "served" / "1")
    assert (with_tokenizer / "saved_model.pb").is_file()


@pytest.mark.grappler
def test_xla_compiles_in_a_session(compiled_served, random_lm):
    """As TensorFlow Serving runs it; stop strings, drawn tokens, three rows."""
    settings = {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "seed": 5}
    feeds = inputs(stop=["e"], max_new_tokens=24, **settings)
    with tf.compat.v1.Session(graph=tf.Graph()) as session:
        loader = tf.compat.v1.saved_model.loader
        signature = loader.load(session, ["serve"], str(compiled_served / "1")).signature_def["generate"]
        outputs = session.run(
            {name: info.name for name, info in signature.outputs.items()},
            {signature.inputs[name].name: value.numpy() for name, value in feeds.items()},
        )
    live = random_lm.generate_tokens(PROMPTS, 24, logprobs=0, stop_strings=["e"], **settings)
    check_rows({name: tf.constant(value) for name, value in outputs.items()}, live)


def test_what_xla_compiles(random_served, compiled_loaded):
    """Nothing in a stock folder; the loops of the signatures and of the slots where it was asked for."""

    def compiled(graph_def):
        functions = graph_def.library.function
        return {f.signature.name for f in functions if f.attr["_XlaMustCompile"].b}

    assert not compiled(read_graph(random_served / "1").graph_def)
    generate = compiled_loaded.signatures["generate"]
    assert len(compiled(generate.graph.as_graph_def())) == 1
    step = compiled_loaded.slots.step.concrete_functions[0]
    assert len(compiled(step.graph.as_graph_def())) == 4  # one row, four, eight and all nine
