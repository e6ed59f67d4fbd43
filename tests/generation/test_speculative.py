import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from reference import generation as reference
from reference.weights import randomize

from kerasllm import GPT2, GenerationConfig
from kerasllm.generation import Row
from kerasllm.generation.decoding import DecodeState
from kerasllm.generation.speculative import look_up

VOCABULARY = 60
END_IDS = (7,)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [8], [1, 2, 3, 1, 2, 3, 1, 2]]
SETTINGS = [
    {},
    {"temperature": 1.0, "seed": 1},
    {
        "temperature": 0.8,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "min_new_tokens": 3,
    },
]


def rows_of(settings, **kwargs):
    return [
        Row(prompt, GenerationConfig(**settings, **kwargs, max_new_tokens=4 + 9 * number), END_IDS)
        for number, prompt in enumerate(PROMPTS)
    ]


def run(engine, rows, **kwargs):
    """The new tokens, and how often the model was called."""
    batch, calls = engine.start(rows, **kwargs), 0
    while batch.active.any():
        batch.advance(1)
        calls += 1
    return [batch.new_ids(number) for number in range(len(rows))], calls


@pytest.fixture(scope="module")
def draft(tiny):
    """A model that mostly agrees."""
    model = GPT2(tiny.config)
    rng = np.random.default_rng(0)
    for own, other in zip(model.weights, tiny.weights, strict=True):
        own.assign(other + 0.04 * rng.standard_normal(other.shape))
    return model


@pytest.mark.parametrize(
    "settings",
    [*SETTINGS[:2], pytest.param(SETTINGS[2], marks=pytest.mark.slow)],
    ids=["greedy", "drawn", "all"],
)
def test_guesses_change_nothing(engine, draft, settings):
    wanted, calls = run(engine, rows_of(settings))
    guessed, fewer = run(engine, rows_of(settings, num_assistant_tokens=3), draft=draft)
    assert guessed == wanted and fewer < calls


def test_looked_up_guesses_change_nothing(engine):
    for settings in SETTINGS[:2]:
        wanted, calls = run(engine, rows_of(settings))
        looked_up, as_many = run(engine, rows_of(settings, prompt_lookup_num_tokens=3))
        assert looked_up == wanted and as_many <= calls
    # A text that repeats itself: what follows is found in it.
    bias = {token: -50.0 for token in range(60) if token not in (1, 2, 3)}
    wanted, calls = run(engine, rows_of({"logit_bias": bias}))
    looked_up, fewer = run(engine, rows_of({"logit_bias": bias}, prompt_lookup_num_tokens=3))
    assert looked_up == wanted and fewer < calls


def test_every_guess_of_the_same_model_holds(engine, tiny):
    wanted, calls = run(engine, rows_of(SETTINGS[1]))
    guessed, fewest = run(engine, rows_of(SETTINGS[1], num_assistant_tokens=3), draft=tiny)
    assert guessed == wanted and fewest <= -(-calls // 4) + 1


def test_compiled_by_xla(engine, tiny, draft):
    from kerasllm.generation import Engine

    rows = rows_of(SETTINGS[1], num_assistant_tokens=3)
    compiled = Engine(tiny, jit_compile=True)
    assert run(compiled, rows, draft=draft)[0] == run(engine, rows)[0]


def test_at_the_end_of_the_context(engine, draft):
    for new_tokens in (40, 37):  # no room for guesses; room for exactly as many as there are
        config = GenerationConfig(max_new_tokens=new_tokens, num_assistant_tokens=3)
        rows = [Row([4] * 8, config), Row([3], GenerationConfig(max_new_tokens=2, num_assistant_tokens=3))]
        assert run(engine, rows, draft=draft)[0] == run(engine, rows)[0]


def test_a_draft_of_another_size(engine, tiny):
    """A shorter context, and a vocabulary that is filled up otherwise."""
    rows = rows_of(SETTINGS[1], num_assistant_tokens=3)
    wanted = run(engine, rows)[0]
    for vocabulary, context in ((VOCABULARY, 12), (VOCABULARY + 9, 48), (VOCABULARY - 20, 48)):
        config = dataclasses.replace(tiny.config, vocabulary_size=vocabulary, context_length=context)
        assert run(engine, rows, draft=randomize(GPT2(config)))[0] == wanted


def test_draws_keep_the_distribution(engine, forward, draft):
    """Chi-square over the second token, which is guessed, against the exact probabilities."""
    count, prompt = 3000, [3, 1, 4]
    config = {"temperature": 1.3, "top_k": 6, "max_new_tokens": 2, "num_assistant_tokens": 3}
    exact = GenerationConfig(**config)
    first = reference.filter(np.asarray(forward(np.array([prompt])))[0, -1].astype("float64"), exact)
    pairs = {}
    for token in np.flatnonzero(first):
        logits = np.asarray(forward(np.array([[*prompt, token]])))[0, -1].astype("float64")
        second = reference.filter(logits, exact)
        pairs |= {
            (int(token), int(other)): first[token] * second[other] for other in np.flatnonzero(second)
        }
    rows = [Row(prompt, GenerationConfig(**config, seed=seed)) for seed in range(count)]
    drawn, calls = run(engine, rows, draft=draft)
    assert calls == 1
    observed = {pair: 0 for pair in pairs}
    for pair in drawn:
        observed[tuple(pair)] += 1
    # Cells with fewer than five expected are counted together.
    cells = [(observed[pair], count * share) for pair, share in pairs.items() if count * share >= 5]
    rest = count - sum(seen for seen, _ in cells), count - sum(wanted for _, wanted in cells)
    cells += [rest] if rest[1] >= 5 else []
    chi_square = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    freedom = len(cells) - 1
    assert freedom > 10
    # Five standard deviations of the chi-square distribution.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_look_up():
    sequences = tf.constant([[1, 2, 3, 4, 1, 2, 3, 0, 0, 0], [5, 6, 7, 6, 8, 6, 0, 0, 0, 0], [9] * 10])
    lengths = tf.constant([7, 6, 1])
    state = DecodeState(sequences, lengths, lengths, lengths > 0, ())
    guesses = look_up(state, 3).numpy()
    assert guesses[0].tolist() == [4, 1, 2]  # after the longest n-gram
    assert guesses[1].tolist() == [8, 6, 0]  # after the latest of the equally long ones
