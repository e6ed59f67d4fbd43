import numpy as np
import pytest
import tensorflow as tf

from kerasllm.training import loss, next_token_loss
from kerasllm.training.loss import chunked_token_loss, chunked_token_sums, token_sums


def test_matches_numpy():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 7)) * 3
    labels = rng.integers(0, 7, (2, 5))
    weights = np.array([[1, 1, 1, 0, 0], [1, 0.5, 0, 0, 1]])
    log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_softmax, labels[..., None], -1)[..., 0]
    total, count = next_token_loss(logits.astype("float32"), labels, weights)
    np.testing.assert_allclose(total, (losses * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(count, weights.sum())


def test_half_precision_logits_are_summed_in_float32():
    logits = np.zeros((1, 4000, 2), "float16")
    total, count = next_token_loss(logits, np.zeros((1, 4000), int), np.ones((1, 4000)))
    np.testing.assert_allclose(total / count, np.log(2), rtol=1e-5)


def test_options_match_numpy():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 5, 7)) * 3
    labels = rng.integers(0, 7, (2, 5))
    weights = rng.random((2, 5))
    normalizers = np.log(np.exp(logits).sum(-1))
    losses = normalizers - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    target = np.full((2, 5, 7), 0.2 / 7)
    np.put_along_axis(target, labels[..., None], 0.8 + 0.2 / 7, axis=-1)
    objectives = (target * (normalizers[..., None] - logits)).sum(-1) + 0.01 * normalizers**2
    sums = token_sums(tf.constant(logits), labels, weights, label_smoothing=0.2, z_loss=0.01)
    np.testing.assert_allclose(sums.objective, (objectives * weights).sum(), rtol=1e-12)
    np.testing.assert_allclose(sums.loss, (losses * weights).sum(), rtol=1e-12)
    np.testing.assert_allclose(sums.correct, ((logits.argmax(-1) == labels) * weights).sum(), rtol=1e-12)
    np.testing.assert_allclose(sums.weight, weights.sum(), rtol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("known_shape", [True, False])
@pytest.mark.parametrize("tokens", [0, 5, 64, 200])
def test_chunks_equal_the_whole(monkeypatch, compiled, known_shape, tokens):
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 64 * 11)
    rng = np.random.default_rng(2)
    hidden, labels = rng.normal(size=(1, tokens, 4)), rng.integers(0, 11, (1, tokens)).astype("int32")
    weights = rng.random((1, tokens))
    table, bias, unused = (tf.Variable(rng.normal(size=shape)) for shape in ((11, 4), (11,), (3,)))

    def score(hidden):
        return tf.matmul(hidden, table, transpose_b=True) + bias

    def chunked(hidden, labels, weights):
        return chunked_token_loss(
            hidden, labels, weights, score, [unused, table, bias], tf.constant(0.5), 11, 0.1, 0.01
        )

    length = tokens if known_shape else None
    specs = [tf.TensorSpec([1, length, 4], "float64"), tf.TensorSpec([1, length], "int32")]
    specs.append(tf.TensorSpec([1, length], "float64"))
    function = tf.function(chunked, input_signature=specs, jit_compile=compiled)
    sums, to_hidden, to_variables = function(hidden, labels, weights)
    hidden = tf.constant(hidden)
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        wanted = token_sums(score(hidden), labels, weights, 0.1, 0.01)
        target = 0.5 * wanted.objective
    for got, want in zip(sums, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)
    for got, want in zip(
        [to_hidden, *to_variables[1:]], tape.gradient(target, [hidden, table, bias]), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-14)
    assert to_variables[0] is None


@pytest.mark.parametrize("tokens", [5, 200])
def test_few_tokens_are_not_filled_up_to_a_whole_chunk(monkeypatch, tokens):
    """Also where their number is not known before: what fills a chunk up costs as much as tokens do."""
    monkeypatch.setattr(loss, "_CHUNK_LOGITS", 64 * 11)
    table, scored = tf.Variable(tf.ones([4, 11])), tf.Variable(0)

    def score(hidden):
        scored.assign_add(tf.shape(hidden)[0])
        return tf.matmul(hidden, table)

    @tf.function(input_signature=[tf.TensorSpec([1, None, 4]), tf.TensorSpec([1, None], tf.int32)])
    def both(hidden, labels):
        weights = tf.ones_like(labels, tf.float32)
        chunked_token_loss(hidden, labels, weights, score, [table], 1.0, 11)
        return chunked_token_sums(hidden, labels, weights, score, 11).weight

    assert both(np.ones([1, tokens, 4], "float32"), np.zeros([1, tokens], "int32")) == tokens
    assert 2 * tokens <= scored.numpy() < 2 * (tokens + 4)  # 200 are four chunks of at most 64
