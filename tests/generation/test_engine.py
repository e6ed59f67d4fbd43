"""The engine against the definition: one row at a time, no cache, NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from reference import generation as reference
from reference.weights import randomize

from kerasllm import GenerationConfig
from kerasllm.generation import Engine, Row
from kerasllm.generation.padding import bucket, buckets
from kerasllm.generation.sampling import uniform_numbers
from kerasllm.models import Llama, LlamaConfig

END_IDS = (7, 11)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3], [1, 2, 3, 1, 2, 3, 1, 2]]
SETTINGS = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.7, "top_k": 5, "seed": -7},
    {"temperature": 1.5, "top_p": 0.7, "seed": 2**31 - 1},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 1.2, "typical_p": 0.5},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 4.0},
    {"frequency_penalty": 2.0},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "temperature": 1.0},
    {"logit_bias": {5: 6.0}, "suppress_tokens": [9, 10]},
    {"min_new_tokens": 12},
    {"max_new_tokens": 3},
]


def rows_of(settings, prompts=PROMPTS):
    """Each setting on some prompt."""
    return [
        Row(prompts[number % len(prompts)], GenerationConfig(**{"max_new_tokens": 14, **one}), END_IDS)
        for number, one in enumerate(settings)
    ]


def generate(engine, rows, steps=100, **kwargs):
    batch = engine.start(rows, **kwargs)
    while batch.active.any():
        batch.advance(steps)
    return [batch.new_ids(number) for number in range(len(rows))]


def expected(model, row):
    uniform = uniform_numbers(tf.constant([row.config.seed]), tf.constant(20), tf.constant([row.copy]))
    return reference.generate(model, row.prompt, row.config, row.end_ids, uniform.numpy()[0])


@pytest.fixture(scope="module")
def wanted(forward):
    return [expected(forward, row) for row in rows_of(SETTINGS)]


@pytest.mark.parametrize("steps", [1, 5, 100])
def test_each_setting_in_one_ragged_batch(engine, wanted, steps):
    rows = rows_of(SETTINGS)
    assert generate(engine, rows, steps) == wanted
    lengths = {len(ids) for ids in wanted}
    assert 14 in lengths and len(lengths) > 2  # some end early, some do not
    assert len({tuple(ids) for ids in wanted}) > 10


def test_rows_alone(engine, wanted):
    """In batches of one to four rows, with other neighbours and in other buckets."""
    rows = rows_of(SETTINGS)
    for number, row in enumerate(rows):
        neighbours = [Row([1] * number, GenerationConfig(temperature=2.0, max_new_tokens=20))] * (
            number % 4
        )
        assert generate(engine, [*neighbours, row])[-1] == wanted[number], SETTINGS[number]


def test_only_what_is_used_is_in_the_graph(engine):
    """The plain settings make another graph than the rare ones, with the same result."""
    plain, rare = rows_of([{}]), rows_of([{}, {"repetition_penalty": 1.2}])
    assert generate(engine, plain)[0] == generate(engine, rare)[0]
    before = len(engine._functions)
    generate(engine, rows_of([{"temperature": 0.3}] * 5, [[2] * 20]))
    generate(engine, rows_of([{"top_k": 3, "min_p": 0.3}] * 9, [[2] * 3]))
    assert len(engine._functions) == before >= 2  # other sizes and values need no other graph


def test_compiled_by_xla(tiny, wanted):
    engine = Engine(tiny, jit_compile=True)
    assert generate(engine, rows_of(SETTINGS)) == wanted


def test_shared_heads_and_windows_compiled_by_xla():
    """There the cache has another layout, which `tiny` with its equal heads does not put to the test."""
    config = LlamaConfig(
        vocabulary_size=60, context_length=48, num_layers=2, num_heads=8, num_kv_heads=2, dim=24,
        head_dim=6, intermediate_dim=16, qk_norm=True, score_cap=5.0, sliding_window=5,
        window_layers=(True, False),
    )  # fmt: skip
    model = randomize(Llama(config), seed=3)
    rows = rows_of([{}, {"temperature": 1.0, "seed": 1}])
    forward = tf.function(model, input_signature=[tf.TensorSpec([None, None], tf.int32)], autograph=False)
    assert generate(Engine(model, jit_compile=True), rows) == [expected(forward, row) for row in rows]


def test_copies_draw_unlike_tokens(engine, forward):
    config = GenerationConfig(temperature=1.0, max_new_tokens=12, seed=3)
    rows = [Row([5, 6], config, END_IDS, copy) for copy in range(3)]
    texts = generate(engine, rows)
    assert texts == [expected(forward, row) for row in rows]
    assert len(set(map(tuple, texts))) == 3


def test_log_probabilities_are_the_model_s_own(engine, forward):
    """Whatever the settings do to the scores, and whatever the neighbours are."""
    rows = rows_of([{}, {"temperature": 3.0, "repetition_penalty": 2.0, "top_k": 9, "seed": 4}])
    count = 3
    batch = engine.start(rows, num_log_probabilities=count)
    batch.advance(100)
    for number, row in enumerate(rows):
        ids = batch.new_ids(number)
        logits = np.asarray(forward(np.array([[*row.prompt, *ids]])))[0, len(row.prompt) - 1 : -1]
        values = np.log(np.stack([reference.softmax(place.astype("float64")) for place in logits]))
        chosen, top_ids, top = batch.log_probabilities(number)
        np.testing.assert_allclose(chosen, values[np.arange(len(ids)), ids], atol=1e-4)
        order = np.argsort(-values, axis=1, kind="stable")[:, :count]
        np.testing.assert_array_equal(top_ids, order)
        np.testing.assert_allclose(top, np.take_along_axis(values, order, axis=1), atol=1e-4)


def test_a_stopped_row_ends_and_the_others_do_not(engine, wanted):
    rows = rows_of(SETTINGS)
    batch = engine.start(rows)
    batch.advance(3)
    before = batch.new_ids(0)
    batch.stop(0)
    batch.advance(100)
    assert batch.new_ids(0) == before and len(before) < len(wanted[0])
    assert [batch.new_ids(number) for number in range(1, len(rows))] == wanted[1:]


def test_fills_the_context(engine, forward):
    """Rows that come to the very end of the context, beside rows that do not."""
    rows = [Row([4] * 8, GenerationConfig(max_new_tokens=40)), Row([3], GenerationConfig(max_new_tokens=2))]
    assert generate(engine, rows) == [
        reference.generate(forward, row.prompt, row.config, row.end_ids) for row in rows
    ]


def test_buckets():
    sizes = [bucket(size, 64, 1000) for size in (1, 64, 65, 96, 97, 128, 129, 192, 193, 600, 800)]
    assert sizes == [64, 64, 96, 96, 128, 128, 192, 192, 256, 768, 1000]
    assert [bucket(size) for size in (1, 2, 3, 4, 5, 6, 7)] == [1, 2, 3, 4, 6, 6, 8]
    assert buckets(64, 200) == [64, 96, 128, 192, 200] and buckets(64, 50) == [50]


@pytest.mark.parametrize(
    ("prompt", "config", "message"),
    [
        ([], {}, "at least one token"),
        ([1] * 48, {}, "shorter than the context of 48 tokens. Received: a prompt of 48"),
        ([1] * 9, {"max_new_tokens": 40}, "fit into the context of 48.*a prompt of 9.*max_new_tokens=40"),
        ([60], {"max_new_tokens": 2}, "from 0 to 59. Received: 60 to 60"),
        ([-1, 3], {"max_new_tokens": 2}, "from 0 to 59. Received: -1 to 3"),
    ],
)
def test_bad_rows_are_refused(engine, prompt, config, message):
    with pytest.raises(ValueError, match=message):
        engine.start(
            [Row([1], GenerationConfig(max_new_tokens=2)), Row(prompt, GenerationConfig(**config))]
        )
    with pytest.raises(ValueError, match="at least one prompt"):
        engine.start([])
