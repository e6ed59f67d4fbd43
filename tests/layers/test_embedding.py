import keras
import numpy as np
import pytest
from reference.checks import assert_close, check_layer
from reference.weights import arrays, normal, randomize

from kerasllm.layers import TokenEmbedding
from kerasllm.layers.xla import traced_for_xla

IDS = np.random.default_rng(0).integers(0, 11, (2, 5)).astype("int32")


def build():
    layer = TokenEmbedding(11, 6)
    layer.build()
    return randomize(layer)


def test_looks_up_rows_of_the_table():
    layer = build()
    assert_close(layer(IDS), arrays(layer)["embeddings"][IDS], tolerance=0)


def test_reverse_scores_against_the_same_table():
    layer, x = build(), normal(2, 5, 6)
    right = np.einsum("btd,vd->btv", x, arrays(layer)["embeddings"])
    assert_close(layer(x, reverse=True), right)
    with traced_for_xla():
        assert_close(layer(x, reverse=True), right)
    assert len(layer.weights) == 1


def test_half_precision_logits_have_the_compute_dtype():
    layer = TokenEmbedding(11, 6, dtype="mixed_bfloat16")
    assert layer(layer(IDS), reverse=True).dtype == "bfloat16"


def test_takes_symbolic_inputs():
    layer = build()
    assert layer(keras.Input((None,), dtype="int32")).shape == (None, None, 6)
    assert layer(keras.Input((None, 6)), reverse=True).shape == (None, None, 11)


def test_generic():
    check_layer(build(), IDS)


def test_starts_at_the_given_scale():
    layer = TokenEmbedding(500, 20, initializer_range=0.3)
    layer.build()
    np.testing.assert_allclose(np.std(layer.embeddings), 0.3, rtol=0.05)


@pytest.mark.parametrize("arguments, name", [((0, 6), "vocabulary_size=0"), ((11, -1), "dim=-1")])
def test_refuses_empty_tables(arguments, name):
    with pytest.raises(ValueError, match=f"must be at least 1. Received: {name}"):
        TokenEmbedding(*arguments)
