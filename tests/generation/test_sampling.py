import numpy as np
import pytest
import tensorflow as tf
from reference import generation as reference

from kerasllm import GenerationConfig
from kerasllm.generation.sampling import FORBIDDEN, choose_tokens, draw, keep_first, uniform_numbers

VOCABULARY = 600  # more than two blocks of `draw`
SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.2},
    {"temperature": 3.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 2.0, "top_p": 0.7},
    {"temperature": 2.0, "min_p": 0.3},
    {"temperature": 2.0, "min_p": 1.0},
    {"temperature": 2.0, "typical_p": 0.3},
    {"temperature": 0.5, "typical_p": 0.9},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9},
]
CONFIGS = [GenerationConfig(**settings) for settings in SETTINGS]


def choose(scores, uniform, configs):
    def column(name):
        default = getattr(GenerationConfig, name)
        dtype = tf.float32 if isinstance(default, float) else tf.int32
        return tf.constant([getattr(config, name) for config in configs], dtype)

    names = ("temperature", "top_k", "top_p", "min_p", "typical_p")
    to = tf.convert_to_tensor
    return choose_tokens(to(scores, tf.float32), to(uniform, tf.float32), *map(column, names)).numpy()


def scores_of(rng, rows):
    """Scores of which many are equal, some are forbidden and the largest is unique."""
    scores = np.round(rng.normal(size=(rows, VOCABULARY)) * 2, 1).astype("float32")
    scores[:, rng.integers(0, VOCABULARY, 20)] = FORBIDDEN
    return scores


def test_rows_match_the_reference_whatever_their_neighbours_do():
    rng = np.random.default_rng(1)
    for _ in range(10):
        scores, uniform = scores_of(rng, len(CONFIGS)), rng.random(len(CONFIGS)).astype("float32")
        order = rng.permutation(len(CONFIGS))
        got = choose(scores, uniform, [CONFIGS[place] for place in order])
        for row, place in enumerate(order):
            wanted = np.where(scores[row] == FORBIDDEN, -np.inf, scores[row].astype("float64"))
            assert got[row] == reference.choose(wanted, CONFIGS[place], uniform[row]), SETTINGS[place]


@pytest.mark.parametrize("jit_compile", [False, True])
def test_keep_first_is_exact(jit_compile):
    """Ties are broken by the lower id, and the last token kept is the one that reaches the amount."""
    rng = np.random.default_rng(2)
    keys = rng.integers(-3, 4, (40, 77)) * rng.choice([1, 1e-30, 1e30], (40, 1))
    keys = keys.astype("float32")
    weights = rng.integers(0, 5, (40, 77)).astype("float32")  # sums are exact
    amount = np.concatenate([rng.uniform(0.1, 200, 38), [1e-9, 1e9]]).astype("float32")
    amount[::2] = np.ceil(amount[::2])
    kept = tf.function(keep_first, jit_compile=jit_compile, autograph=False)(keys, weights, amount).numpy()
    for row in range(40):
        wanted = reference.first_to_reach(keys[row], weights[row], amount[row])
        # Tokens without weight right behind the last one may stay or go.
        np.testing.assert_array_equal(kept[row] & (weights[row] > 0), wanted & (weights[row] > 0))


def test_a_number_of_tokens_is_kept_exactly():
    keys = tf.zeros([3, 1000])
    kept = keep_first(keys, tf.ones_like(keys), tf.constant([1.0, 7.0, 1000.0])).numpy()
    assert kept.sum(axis=1).tolist() == [1, 7, 1000]
    assert kept[1, :7].all()


def test_draws_follow_the_probabilities():
    count = 6000
    uniform = uniform_numbers(tf.constant([3]), tf.constant(count))[0]
    scores = np.random.default_rng(0).normal(size=12).astype("float32") * 2
    scores -= scores.max()
    drawn = draw(tf.tile(scores[None], [count, 1]), uniform).numpy()
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=12) / count, reference.softmax(scores), atol=0.02
    )


def test_draws_at_the_ends_of_the_range():
    scores = np.full((2, 1000), FORBIDDEN, "float32")
    scores[:, [300, 400, 990]] = 0
    ends = tf.constant([0.0, np.nextafter(np.float32(1), np.float32(0))])
    assert draw(tf.constant(scores), ends).numpy().tolist() == [300, 990]


def test_all_forbidden_gives_some_token():
    config = CONFIGS[-1]
    assert 0 <= choose(np.full((1, 50), FORBIDDEN, "float32"), [0.5], [config])[0] < 50


def test_numbers_depend_on_the_row_s_seed_and_copy_alone():
    many = uniform_numbers(tf.constant([5, 6, 5]), tf.constant(9)).numpy()
    one = uniform_numbers(tf.constant([6]), tf.constant(4)).numpy()
    np.testing.assert_array_equal(many[0], many[2])
    np.testing.assert_array_equal(many[1, :4], one[0])
    assert not np.array_equal(many[0], many[1])
    assert ((many >= 0) & (many < 1)).all()
    copies = uniform_numbers(tf.constant([5, 5]), tf.constant(9), tf.constant([0, 1])).numpy()
    np.testing.assert_array_equal(copies[0], many[0])
    assert not np.array_equal(copies[0], copies[1])
