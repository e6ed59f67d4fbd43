import numpy as np

from kerasllm.training import next_token_loss


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
