import keras
import numpy as np
import pytest
from reference.checks import assert_close, check_layer, to_numpy
from reference.maths import feed_forward, gated_feed_forward
from reference.weights import arrays, normal, randomize

from kerasllm.layers import FeedForward, GatedFeedForward

X = normal(2, 5, 8)
BOTH = pytest.mark.parametrize(
    "cls, reference", [(FeedForward, feed_forward), (GatedFeedForward, gated_feed_forward)]
)


def build(cls, *arguments, **named):
    layer = cls(*arguments, **named)
    layer.build(X.shape)
    return randomize(layer)


@BOTH
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_matches_numpy(cls, reference, activation, use_bias):
    layer = build(cls, 12, activation, use_bias=use_bias)
    matrices = {"up", "down"} | ({"gate"} if cls is GatedFeedForward else set())
    parts = {"kernel", "bias"} if use_bias else {"kernel"}
    assert set(arrays(layer)) == {f"{matrix}/{part}" for matrix in matrices for part in parts}
    assert_close(layer(X), reference(arrays(layer), X.astype("float64"), activation))


def test_defaults_are_those_of_the_docstrings():
    plain, gated = FeedForward(12), GatedFeedForward(12)
    assert (plain.activation, plain.use_bias) == ("gelu", True)
    assert (gated.activation, gated.use_bias) == ("silu", False)


def test_activations_are_all_different():
    outputs = [to_numpy(build(FeedForward, 12, a)(X)) for a in ("gelu", "gelu_tanh", "relu", "silu")]
    for number, one in enumerate(outputs):
        assert all(np.abs(one - other).max() > 1e-4 for other in outputs[:number])


@BOTH
def test_generic(cls, reference):
    layer = build(cls, 12, use_bias=True)
    assert layer.compute_output_shape((2, None, 8)) == (2, None, 8)
    check_layer(layer, X)


@BOTH
def test_dropout_is_for_training_only(cls, reference):
    layer = build(cls, 12, dropout=0.5)
    np.testing.assert_array_equal(to_numpy(layer(X)), to_numpy(build(cls, 12)(X)))
    dropped = to_numpy(layer(X, training=True)) == 0
    assert 0.2 < dropped.mean() < 0.8


@BOTH
def test_activation_dropout_is_inside(cls, reference):
    keras.utils.set_random_seed(0)  # all units of a row may be dropped, once in a few hundred times
    layer = build(cls, 12, activation_dropout=0.5)
    np.testing.assert_array_equal(to_numpy(layer(X)), to_numpy(build(cls, 12)(X)))
    outputs = to_numpy(layer(X, training=True))
    assert (outputs != 0).all() and np.abs(outputs - to_numpy(layer(X))).max() > 0.1


@BOTH
def test_starts_at_the_given_scales(cls, reference):
    layer = cls(64, initializer_range=0.3, output_initializer_range=0.1)
    layer.build((None, None, 64))
    for path, array in arrays(layer).items():
        if path.endswith("kernel"):
            np.testing.assert_allclose(array.std(), 0.1 if "down" in path else 0.3, rtol=0.05)


@BOTH
def test_refuses_bad_arguments(cls, reference):
    with pytest.raises(ValueError, match="`intermediate_dim` must be at least 1. Received: .*=0"):
        cls(0)
    with pytest.raises(ValueError, match="one of .'gelu', 'gelu_tanh', 'relu', 'silu'.. Received: 'gelo'"):
        cls(8, "gelo")
