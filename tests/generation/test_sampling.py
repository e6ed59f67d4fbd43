import numpy as np
import tensorflow as tf

from kerasllm.generation.sampling import choose_tokens, uniform_numbers

LOGITS = np.random.default_rng(0).normal(size=(5, 12)).astype("float32") * 2


def reference(logits, uniform, temperature, top_k, top_p):
    """One row in float64, written as the definition says."""
    if temperature == 0:
        return int(np.argmax(logits))
    scaled = logits.astype("float64") / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    probabilities = np.exp(scaled[order] - scaled[order].max())
    probabilities /= probabilities.sum()
    kept = 1
    while kept < len(order) and probabilities[:kept].sum() < top_p:
        kept += 1
    probabilities = probabilities[:kept] / probabilities[:kept].sum()
    place = int(np.searchsorted(np.cumsum(probabilities), uniform, side="right"))
    return int(order[min(place, kept - 1)])


def choose(logits, uniform, temperature, top_k, top_p):
    to = tf.convert_to_tensor
    return choose_tokens(
        to(logits), to(uniform, tf.float32), to(temperature, tf.float32), to(top_k), to(top_p, tf.float32)
    ).numpy()


def test_rows_match_the_reference_whatever_their_neighbours_do():
    rng = np.random.default_rng(1)
    for _ in range(40):
        uniform = rng.random(5).astype("float32")
        temperature = rng.choice([0.0, 0.3, 1.0, 2.5], 5).astype("float32")
        top_k = rng.choice([0, 1, 3, 12, 50], 5).astype("int32")
        top_p = rng.choice([0.1, 0.5, 0.9, 1.0], 5).astype("float32")
        got = choose(LOGITS, uniform, temperature, top_k, top_p)
        for row in range(5):
            wanted = reference(LOGITS[row], uniform[row], temperature[row], top_k[row], top_p[row])
            assert got[row] == wanted


def test_draws_follow_the_probabilities():
    count = 4000
    uniform = uniform_numbers(tf.constant([3]), tf.constant(count)).numpy()[0]
    logits = np.tile(LOGITS[:1], (count, 1))
    ones = np.ones(count, "float32")
    drawn = choose(logits, uniform, ones, np.zeros(count, "int32"), ones)
    wanted = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=12) / count, wanted, atol=0.03)


def test_numbers_depend_on_the_row_s_seed_alone():
    many = uniform_numbers(tf.constant([5, 6, 5]), tf.constant(9)).numpy()
    one = uniform_numbers(tf.constant([6]), tf.constant(4)).numpy()
    np.testing.assert_array_equal(many[0], many[2])
    np.testing.assert_array_equal(many[1, :4], one[0])
    assert not np.array_equal(many[0], many[1])
    assert ((many >= 0) & (many < 1)).all()
