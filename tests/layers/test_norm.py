import functools

import numpy as np
import pytest
from reference.checks import assert_close, check_layer, to_numpy
from reference.maths import layer_norm, rms_norm
from reference.weights import arrays, normal, randomize

from kerasllm.layers import LayerNorm, RMSNorm

# Away from mean 0 and variance 1, where both norms would do nothing.
X = 3.0 * normal(2, 5, 8) + 2.0
VARIANTS = [
    (LayerNorm, {}, layer_norm),
    (LayerNorm, {"use_bias": False}, layer_norm),
    (RMSNorm, {}, rms_norm),
    (RMSNorm, {"unit_offset": True}, functools.partial(rms_norm, offset=1.0)),
]


def build(cls, **arguments):
    layer = cls(**arguments)
    layer.build(X.shape)
    return randomize(layer)


@pytest.mark.parametrize("cls, arguments, reference", VARIANTS)
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_matches_numpy(cls, arguments, reference, epsilon):
    layer = build(cls, epsilon=epsilon, **arguments)
    assert set(arrays(layer)) == {"scale"} | ({"bias"} if cls is LayerNorm and layer.use_bias else set())
    assert_close(layer(X), reference(arrays(layer), X.astype("float64"), epsilon))


@pytest.mark.parametrize("cls, reference", [(LayerNorm, layer_norm), (RMSNorm, rms_norm)])
def test_default_epsilon(cls, reference):
    layer, small = build(cls), 1e-2 * X
    assert_close(layer(small), reference(arrays(layer), small.astype("float64"), 1e-5))


@pytest.mark.parametrize("cls, arguments, _", VARIANTS)
def test_generic(cls, arguments, _):
    layer = build(cls, epsilon=0.1, **arguments)
    assert layer.compute_output_shape((2, None, 8)) == (2, None, 8)
    check_layer(layer, X)


@pytest.mark.parametrize("arguments", [{}, {"unit_offset": True}])
def test_starts_with_a_gain_of_one(arguments):
    layer = RMSNorm(**arguments)
    assert_close(layer(X), X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-5))


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_half_precision_squares_do_not_overflow(cls):
    layer = cls(dtype="mixed_float16")
    outputs = to_numpy(layer(np.array([[300.0, -300.0, 600.0, -600.0]])))
    np.testing.assert_allclose(outputs, [[0.6325, -0.6325, 1.2649, -1.2649]], atol=2e-3)


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_refuses_an_epsilon_that_protects_from_nothing(cls):
    with pytest.raises(ValueError, match="`epsilon` must be positive. Received: epsilon=0"):
        cls(epsilon=0)
