import json
import math
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.checks import assert_close, check_layer, to_numpy
from reference.maths import attention, causal, multi_head_attention
from reference.weights import arrays, normal, randomize

from kerasllm.layers import (
    CausalSelfAttention,
    MultiHeadAttention,
    SelfAttention,
    SimplifiedSelfAttention,
)
from kerasllm.layers.attention import (
    cache_length,
    causal_bias,
    dot_product_attention,
    swap_cache_layout,
)
from kerasllm.layers.xla import traced_for_xla

X = normal(2, 5, 12)
MEMORY = normal(2, 7, 10, seed=2)
# Without a rotation a bias on the keys adds the same to all scores of a query: the softmax drops it.
NO_GRADIENT = ("key/bias",)


def build(num_kv_heads=2, memory_width=None, **arguments):
    """Eight heads of width 4 over vectors of width 12: no two sizes are equal by chance."""
    arguments = {"head_dim": 4, "num_kv_heads": num_kv_heads, **arguments}
    layer = MultiHeadAttention(12, 8, **arguments)
    layer.build((None, None, 12), memory_width and (None, None, memory_width))
    return randomize(layer)


def expected(layer, x, memory=None, **arguments):
    config = layer.get_config()
    names = (
        "num_heads num_kv_heads rotary_scaling rotary_fraction sliding_window query_scale score_cap qk_norm"
    )
    own = {
        **{name: config[name] for name in names.split() if name in config},
        "is_causal": config.get("causal", False),
        "wavelength": config.get("rotary_wavelength"),
        "epsilon": config.get("norm_epsilon", 1e-6),
        "offset": 1.0 if config.get("norm_unit_offset") else 0.0,
    }
    return multi_head_attention(arrays(layer), x, memory, **{**own, **arguments})


# Arguments of the layer, each with a visible effect, and how the reference looks without all of them.
OPTIONS = {
    "window": {"sliding_window": 2},
    "window of one": {"sliding_window": 1},
    "linear": {"rotary_scaling": {"rope_type": "linear", "factor": 4.0}},
    "fraction": {"rotary_fraction": 0.5},
    "scale": {"query_scale": 1.0},
    "cap": {"score_cap": 1.5},
    "norms": {"qk_norm": True},
    "norms from one": {"qk_norm": True, "norm_epsilon": 0.3, "norm_unit_offset": True},
    "norms without scale": {"qk_norm": True, "query_scale": 1.0, "norm_epsilon": 0.3},
}
PLAIN = {
    "sliding_window": None,
    "rotary_scaling": None,
    "rotary_fraction": 1.0,
    "query_scale": 0.5,
    "score_cap": None,
    "qk_norm": False,
}
GROUPS = pytest.mark.parametrize("num_kv_heads", [8, 2, 1])


class TestLadder:
    """The teaching ladder against NumPy and against values that PyTorch computed."""

    golden = json.loads(Path(__file__).parents[1].joinpath("golden/ladder.json").read_text())

    def numpy_of(self, layer, x):
        """The formula of `SelfAttention` and `CausalSelfAttention` for one row."""
        weights = arrays(layer)
        queries, keys, values = (
            x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"] for name in ("query", "key", "value")
        )
        hidden = causal(len(x)) if isinstance(layer, CausalSelfAttention) else np.zeros((len(x), len(x)))
        return attention(queries, keys, values, hidden, 1 / math.sqrt(layer.head_dim))

    def from_golden(self, layer, rung, *more):
        """Gives the layer the matrices of a rung and runs it on the inputs, as a batch of two copies."""
        inputs = np.array([self.golden["inputs"]] * 2, "float32")
        layer.build(inputs.shape)
        layer.set_weights([np.array(self.golden[rung][name]) for name in ("Wq", "Wk", "Wv", *more)])
        return layer(inputs)

    def test_simplified_matches_numpy(self):
        rows = [attention(x, x, x, np.zeros((5, 5)), 1.0) for x in X]
        assert_close(SimplifiedSelfAttention()(X), np.stack(rows))

    @pytest.mark.parametrize("cls", [SelfAttention, CausalSelfAttention])
    def test_trained_rungs_match_numpy(self, cls):
        layer = cls(4, use_bias=True)
        layer.build(X.shape)
        randomize(layer)
        assert_close(layer(X), np.stack([self.numpy_of(layer, x) for x in X]))
        assert_close(layer(X[0]), self.numpy_of(layer, X[0]))  # one sequence, no batch

    def test_simplified_matches_golden(self):
        inputs = np.array(self.golden["inputs"], "float32")
        assert_close(SimplifiedSelfAttention()(inputs), self.golden["simplified"]["context"])

    @pytest.mark.parametrize(
        "cls, rung",
        [(SelfAttention, "self_v1"), (SelfAttention, "self_v2"), (CausalSelfAttention, "causal")],
    )
    def test_trained_rungs_match_golden(self, cls, rung):
        context = np.array(self.golden[rung]["context"])
        assert_close(self.from_golden(cls(2), rung), np.broadcast_to(context, (2, 6, 2)))

    @pytest.mark.parametrize(
        "rung, matrices", [("self_v1", "self_v1"), ("self_v2", "self_v2"), ("causal_on_v2", "self_v2")]
    )
    def test_attention_weights_match_golden(self, rung, matrices):
        inputs = np.array(self.golden["inputs"], "float32")
        queries, keys, values = (inputs @ np.array(self.golden[matrices][n]) for n in ("Wq", "Wk", "Wv"))
        hidden = causal_bias(np.arange(6), 6) if rung == "causal_on_v2" else None
        _, weights = dot_product_attention(queries / math.sqrt(2), keys, values.T, hidden)
        assert_close(weights, np.array(self.golden[rung]["weights"]))

    def test_heads_side_by_side_match_golden(self):
        golden = self.golden["mha_wrapper"]
        inputs = np.array([self.golden["inputs"]] * 2, "float32")
        outputs = []
        for matrices in golden["heads"]:
            head = CausalSelfAttention(2)
            head.build(inputs.shape)
            head.set_weights([np.array(matrices[name]) for name in ("Wq", "Wk", "Wv")])
            outputs.append(to_numpy(head(inputs)))
        assert_close(np.concatenate(outputs, -1), np.array(golden["context"]))

    def test_multi_head_matches_golden(self):
        layer = MultiHeadAttention(2, 2, causal=True, use_bias=False, output_bias=True)
        assert_close(self.from_golden(layer, "mha", "Wo", "bo"), self.golden["mha"]["context"])

    def test_one_head_is_causal_attention(self):
        rung = CausalSelfAttention(4)
        rung.build(X.shape)
        randomize(rung)
        top = MultiHeadAttention(4, 1, causal=True, use_bias=False)
        top.build(X.shape)
        top.set_weights([*rung.get_weights(), np.eye(4)])
        assert_close(top(X), to_numpy(rung(X)), tolerance=1e-6)

    @pytest.mark.parametrize("cls", [SelfAttention, CausalSelfAttention])
    def test_generic(self, cls):
        layer = cls(4, use_bias=True)
        layer.build(X.shape)
        assert layer.compute_output_shape((2, None, 12)) == (2, None, 4)
        check_layer(randomize(layer), X, no_gradient=NO_GRADIENT)

    def test_generic_simplified(self):
        assert SimplifiedSelfAttention().compute_output_shape((2, None, 12)) == (2, None, 12)
        check_layer(SimplifiedSelfAttention(), X)

    def test_refuses_empty_heads(self):
        with pytest.raises(ValueError, match="`head_dim` must be at least 1. Received: head_dim=0"):
            SelfAttention(0)


class TestNumerics:
    @GROUPS
    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize("wavelength", [None, 50.0])
    def test_self_attention_matches_numpy(self, num_kv_heads, is_causal, wavelength):
        layer = build(num_kv_heads, causal=is_causal, rotary_wavelength=wavelength)
        assert_close(layer(X), expected(layer, X))

    @GROUPS
    def test_cross_attention_matches_numpy(self, num_kv_heads):
        layer = build(num_kv_heads, memory_width=10)
        assert_close(layer(X, MEMORY), expected(layer, X, MEMORY))

    @pytest.mark.parametrize("arguments", OPTIONS.values(), ids=OPTIONS)
    def test_options_match_numpy(self, arguments):
        layer = build(causal=True, rotary_wavelength=50.0, **arguments)
        assert_close(layer(X), expected(layer, X))
        assert np.abs(to_numpy(layer(X)) - expected(layer, X, **PLAIN)).max() > 1e-2

    def test_default_scale(self):
        layer = build()
        assert_close(layer(X), expected(layer, X, query_scale=0.5))

    def test_cross_attention_with_options(self):
        layer = build(memory_width=10, qk_norm=True, query_scale=2.0, score_cap=1.0)
        right = expected(layer, X, MEMORY)
        assert_close(layer(X, MEMORY), right)
        assert_close(layer(X, cache=layer.memory_cache(MEMORY)), right)

    @GROUPS
    @pytest.mark.parametrize("rows", [1, 2])
    def test_position_bias_matches_numpy(self, num_kv_heads, rows):
        layer, bias = build(num_kv_heads, causal=True), 3 * normal(rows, 8, 5, 5, seed=3)
        mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 1]])
        both = bias + np.where(mask, 0.0, -np.inf)[:, None, None]
        assert_close(layer(X, position_bias=bias), expected(layer, X, bias=bias))
        assert_close(layer(X, position_bias=bias, attention_mask=mask), expected(layer, X, bias=both))

    def test_separate_dropouts(self):
        plain = to_numpy(build()(X))
        outputs = to_numpy(build(dropout=0.5, attention_dropout=0.0)(X, training=True))
        assert 0.2 < (outputs == 0).mean() < 0.8
        np.testing.assert_allclose(outputs[outputs != 0], 2 * plain[outputs != 0], rtol=1e-5)
        outputs = to_numpy(build(dropout=0.0, attention_dropout=0.5)(X, training=True))
        assert (outputs != 0).all() and np.abs(outputs - plain).max() > 0.1

    @pytest.mark.parametrize(
        "use_bias, output_bias, biases", [(False, None, 0), (False, True, 1), (True, False, 3)]
    )
    def test_biases(self, use_bias, output_bias, biases):
        layer = build(use_bias=use_bias, output_bias=output_bias)
        assert sum(path.endswith("bias") for path in arrays(layer)) == biases
        assert_close(layer(X), expected(layer, X))

    def test_head_dim_from_dim(self):
        layer = MultiHeadAttention(12, 3)
        layer.build(X.shape)
        assert layer.head_dim == 4
        assert_close(randomize(layer)(X), expected(layer, X))

    def test_rotary_positions_per_row(self):
        layer = build(causal=True, rotary_wavelength=50.0)
        places = np.array([[0, 1, 2, 3, 4], [9, 10, 20, 7, 3]])
        assert_close(layer(X, positions=places), expected(layer, X, positions=places))
        # A shift of a whole row changes nothing: only distances count.
        assert_close(layer(X, positions=np.arange(5) + 30), to_numpy(layer(X)))

    def test_dropout_is_for_training_only(self):
        layer = build(dropout=0.5)
        np.testing.assert_array_equal(to_numpy(layer(X)), to_numpy(build()(X)))
        outputs = to_numpy(layer(X, training=True))
        kept = outputs != 0
        assert 0.2 < kept.mean() < 0.8
        # What is left is not just the scaled result: the attention weights were dropped too.
        assert np.abs(outputs - 2 * to_numpy(layer(X)))[kept].min() > 1e-6

    def test_starts_at_the_given_scales(self):
        layer = MultiHeadAttention(64, 4, initializer_range=0.3, output_initializer_range=0.1)
        layer.build((None, None, 64))
        for path, array in arrays(layer).items():
            if path.endswith("kernel"):
                np.testing.assert_allclose(array.std(), 0.1 if "output" in path else 0.3, rtol=0.05)


class TestOrder:
    def test_causal_to_the_last_bit(self):
        layer, changed = build(causal=True, rotary_wavelength=50.0), X.copy()
        changed[:, 3] += 1.0
        before, after = to_numpy(layer(X)), to_numpy(layer(changed))
        np.testing.assert_array_equal(before[:, :3], after[:, :3])
        assert (np.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-3).all()

    def test_bidirectional_sees_what_follows(self):
        layer, changed = build(), X.copy()
        changed[:, 4] += 1.0
        assert (np.abs(to_numpy(layer(X)) - to_numpy(layer(changed))).max(-1) > 1e-3).all()

    def test_only_a_rotation_sees_the_order(self):
        swapped = X[:, [1, 0, 2, 3, 4]]
        plain, rotary = build(causal=True), build(causal=True, rotary_wavelength=50.0)
        assert_close(plain(swapped)[:, 2:], to_numpy(plain(X))[:, 2:])
        assert np.abs(to_numpy(rotary(swapped))[:, 2:] - to_numpy(rotary(X))[:, 2:]).max() > 1e-2


# What may be seen, for two rows, eight heads, five queries and five keys; no query is left without a key.
VISIBLE = np.random.default_rng(3).random((2, 8, 5, 5)) < 0.6
VISIBLE[..., 0] = True
MASKS = {
    "keys": VISIBLE[:, 0, 0],
    "queries": VISIBLE[:, 0],
    "one head": VISIBLE[:, :1],
    "all heads": VISIBLE,
    "all heads, one query": VISIBLE[:, :, :1],
    "one row": VISIBLE[:1, :1],
}


class TestMask:
    @pytest.mark.parametrize("name", MASKS)
    @pytest.mark.parametrize("num_kv_heads, is_causal", [(8, True), (2, True), (2, False)])
    def test_matches_numpy(self, name, num_kv_heads, is_causal):
        layer, mask = build(num_kv_heads, causal=is_causal, rotary_wavelength=50.0), MASKS[name]
        axes = {2: (1, 2), 3: (1,), 4: ()}[mask.ndim]
        visible = np.expand_dims(mask, axes)
        right = expected(layer, X, bias=np.where(visible, 0.0, -np.inf))
        assert np.abs(right - expected(layer, X)).max() > 1e-2
        assert_close(layer(X, attention_mask=tf.constant(mask)), right)
        assert_close(layer(X, attention_mask=tf.constant(mask, "int64")), right)

        slopes = normal(*mask.shape)
        added = expected(layer, X, bias=np.expand_dims(slopes, axes))
        assert_close(layer(X, attention_mask=slopes), added)

    def test_infinite_floats_are_a_mask_even_where_they_hide_everything(self):
        mask = np.array([[-np.inf] * 5, [-np.inf, -np.inf, 0, 0, 0]], "float32")
        for policy in ("float32", "mixed_float16"):
            layer = build(dtype=policy)
            outputs = to_numpy(layer(X, attention_mask=mask))
            right = to_numpy(layer(X, attention_mask=(mask == 0).astype("int32")))
            assert np.isfinite(outputs).all()
            np.testing.assert_array_equal(outputs[1], right[1])

    def test_cross_attention_mask(self):
        layer, visible = build(memory_width=10), np.array([[1] * 7, [1, 1, 1, 1, 0, 1, 0]])
        right = expected(layer, X, MEMORY, bias=np.where(visible, 0.0, -np.inf)[:, None, None])
        assert_close(layer(X, MEMORY, attention_mask=visible), right)
        outputs = layer(X, cache=layer.memory_cache(MEMORY), attention_mask=visible)
        assert_close(outputs, right)

    def test_hidden_keys_do_not_count_to_the_last_bit(self):
        layer, changed = build(), X.copy()
        changed[:, 3] += 10.0
        mask = np.array([[1, 1, 1, 0, 1]] * 2)
        before, after = (to_numpy(layer(x, attention_mask=mask)) for x in (X, changed))
        np.testing.assert_array_equal(before[:, [0, 1, 2, 4]], after[:, [0, 1, 2, 4]])

    @pytest.mark.parametrize("shape", [(5,), (1, 1, 1, 5, 5)])
    def test_refuses_other_ranks(self, shape):
        with pytest.raises(ValueError, match=r"must be \[batch, keys\].*Received: shape="):
            build()(X, attention_mask=np.ones(shape))


def used_cache(layer, length):
    """A cache that an earlier sequence has left full of numbers."""
    return tuple(normal(*part.shape, seed=9) for part in layer.make_cache(2, length))


INDEX_FORMS = {
    "int": lambda step: step,
    "scalar": lambda step: tf.constant(step),
    "row": lambda step: tf.constant([step, step]),
}


class TestCache:
    LENGTH = 9

    @GROUPS
    @pytest.mark.parametrize("form", INDEX_FORMS)
    def test_decoding_equals_the_whole(self, form, num_kv_heads):
        layer = build(num_kv_heads, causal=True, rotary_wavelength=50.0)
        right = expected(layer, X)
        outputs, cache = layer(X[:, :3], cache=used_cache(layer, self.LENGTH), cache_index=0)
        assert_close(outputs, right[:, :3])
        for step in (3, 4):
            index = INDEX_FORMS[form](step)
            outputs, cache = layer(X[:, step : step + 1], cache=cache, cache_index=index)
            assert_close(outputs, right[:, step : step + 1])
            assert [part.shape for part in cache] == [(2, num_kv_heads, 9, 4), (2, num_kv_heads, 4, 9)]

    @pytest.mark.parametrize("form", INDEX_FORMS)
    def test_traced_for_xla(self, form):
        """The layer with the other cache layout; `test_compiled_by_xla` has the compiled model."""
        layer = build(causal=True, rotary_wavelength=50.0, sliding_window=3)
        right, cache = expected(layer, X), swap_cache_layout(used_cache(layer, self.LENGTH))
        with traced_for_xla():
            assert cache_length(cache) == self.LENGTH
            for step in range(5):
                index = INDEX_FORMS[form](step)
                outputs, cache = layer(X[:, step : step + 1], cache=cache, cache_index=index)
                assert_close(outputs, right[:, step : step + 1])
        assert cache_length(swap_cache_layout(cache)) == self.LENGTH

    @pytest.mark.parametrize("arguments", [{}, {"sliding_window": 5}, {"score_cap": 0.5}])
    @pytest.mark.parametrize("block", [8, 256])
    def test_caches_in_blocks_or_whole(self, block, arguments, monkeypatch):
        """Rows at places of their own, a cache that is no multiple of the block, and a row behind."""
        monkeypatch.setattr("kerasllm.layers.attention._BLOCK", block)
        layer = build(causal=True, rotary_wavelength=50.0, **arguments)
        x = normal(3, 22, 12, seed=3)
        right = expected(layer, x)
        _, cache = layer(x, cache=layer.make_cache(3, 22), cache_index=0)
        cache = swap_cache_layout(cache)

        @tf.function(jit_compile=True, autograph=False)
        def decode(tokens, cache, places):
            with traced_for_xla():
                return layer(tokens, cache=cache, cache_index=places)

        for places in ([0, 21], [7, 8], [15, 13], [21, 14], [3, 3], [11, 12]):
            tokens = np.stack([x[row, place] for row, place in enumerate(places)])[:, None]
            outputs, after = decode(tf.constant(tokens), cache, tf.constant(places))
            wanted = np.stack([right[row, place] for row, place in enumerate(places)])[:, None]
            assert_close(outputs, wanted)
            for new, old in zip(after, cache, strict=True):
                np.testing.assert_array_equal(to_numpy(new)[2], to_numpy(old)[2])

    @pytest.mark.parametrize("form", ["int", "scalar"])
    def test_several_tokens_in_the_middle(self, form):
        layer = build(causal=True, rotary_wavelength=50.0)
        _, cache = layer(X[:, :2], cache=used_cache(layer, self.LENGTH), cache_index=0)
        outputs, _ = layer(X[:, 2:], cache=cache, cache_index=INDEX_FORMS[form](2))
        assert_close(outputs, expected(layer, X)[:, 2:])

    @pytest.mark.parametrize("form", INDEX_FORMS)
    def test_writes_its_own_columns_only(self, form):
        layer = build(causal=True, rotary_wavelength=50.0)
        before = used_cache(layer, self.LENGTH)
        _, after = layer(X[:, :1], cache=before, cache_index=INDEX_FORMS[form](4))
        for old, new, axis in zip(before, map(to_numpy, after), (2, 3), strict=True):
            others = np.arange(self.LENGTH) != 4
            np.testing.assert_array_equal(np.compress(others, new, axis), np.compress(others, old, axis))
            assert (np.take(new, 4, axis) != np.take(old, 4, axis)).all()

    def test_the_cache_holds_rotated_keys_and_transposed_values(self):
        layer, places = build(rotary_wavelength=50.0, causal=True), np.arange(5)
        _, (keys, values) = layer(X, cache=layer.make_cache(2, 5), cache_index=0)
        plain = to_numpy(layer.key(X)).reshape(2, 5, 2, 4)
        assert_close(keys, to_numpy(layer.rotary(plain, places)).transpose(0, 2, 1, 3))
        assert_close(values, to_numpy(layer.value(X)).reshape(2, 5, 2, 4).transpose(0, 2, 3, 1))

    def test_rows_at_different_columns(self):
        layer = build(causal=True, rotary_wavelength=50.0)
        _, cache = layer(X, cache=used_cache(layer, self.LENGTH), cache_index=0)
        # Row 0 has three tokens and goes on at column 3; row 1 has five and goes on at column 5.
        lengths, new = [3, 5], normal(2, 1, 12, seed=5)
        outputs, cache = layer(new, cache=cache, cache_index=np.array(lengths))
        for row, length in enumerate(lengths):
            whole = np.concatenate([X[row : row + 1, :length], new[row : row + 1]], axis=1)
            assert_close(outputs[row : row + 1], expected(layer, whole)[:, -1:])

    @pytest.mark.parametrize("mode", ["eager", "graph", "XLA", "traced for XLA"])
    def test_several_tokens_per_row(self, mode):
        layer = build(causal=True, rotary_wavelength=50.0, sliding_window=4)

        def call(x, cache, cache_index):
            if mode != "traced for XLA":
                return layer(x, cache=cache, cache_index=cache_index)
            with traced_for_xla():
                outputs, cache = layer(x, cache=swap_cache_layout(cache), cache_index=cache_index)
            return outputs, swap_cache_layout(cache)

        if mode != "eager":
            call = tf.function(call, jit_compile=mode != "graph", autograph=False)
        _, cache = layer(X, cache=used_cache(layer, self.LENGTH), cache_index=0)
        before = [to_numpy(part) for part in cache]
        lengths, new = [2, 5], normal(2, 3, 12, seed=5)
        outputs, cache = call(tf.constant(new), cache=cache, cache_index=tf.constant(lengths))
        for row, length in enumerate(lengths):
            whole = np.concatenate([X[row : row + 1, :length], new[row : row + 1]], axis=1)
            assert_close(outputs[row : row + 1], expected(layer, whole)[:, -3:])
            others = np.delete(np.arange(self.LENGTH), np.arange(length, length + 3))
            for part, old, axis in zip(cache, before, (1, 2), strict=True):
                after = to_numpy(part)[row]
                np.testing.assert_array_equal(after.take(others, axis), old[row].take(others, axis))

    @pytest.mark.parametrize("arguments", OPTIONS.values(), ids=OPTIONS)
    def test_options_with_a_cache(self, arguments):
        layer = build(causal=True, rotary_wavelength=50.0, **arguments)
        right = expected(layer, X)
        _, cache = layer(X[:, :2], cache=used_cache(layer, self.LENGTH), cache_index=0)
        outputs, cache = layer(X[:, 2:4], cache=cache, cache_index=tf.constant(2))
        assert_close(outputs, right[:, 2:4])
        outputs, _ = layer(X[:, 4:], cache=cache, cache_index=tf.constant([4, 4]))
        assert_close(outputs, right[:, 4:])

    def test_position_bias_with_a_cache(self):
        layer, bias = build(causal=True), 3 * normal(2, 8, 5, 9, seed=3)
        right = expected(layer, X, bias=bias[..., :5])
        cache = used_cache(layer, self.LENGTH)
        _, cache = layer(X[:, :4], cache=cache, cache_index=0, position_bias=bias[:, :, :4])
        outputs, _ = layer(X[:, 4:], cache=cache, cache_index=4, position_bias=bias[:, :, 4:])
        assert_close(outputs, right[:, 4:])

    @pytest.mark.parametrize("num_kv_heads", [8, 2])
    def test_left_padding(self, num_kv_heads):
        layer = build(num_kv_heads, causal=True, rotary_wavelength=50.0)
        padded = np.concatenate([np.full((2, 2, 12), 7.0, "float32"), X], axis=1)
        mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1, 1]] * 2)
        places = np.maximum(np.arange(7) - 2, 0)
        right = expected(layer, X)
        outputs, cache = layer(
            padded[:, :6],
            cache=used_cache(layer, self.LENGTH),
            cache_index=0,
            attention_mask=mask,
            positions=places[:6],
        )
        assert_close(outputs[:, 2:], right[:, :4])
        outputs, _ = layer(
            padded[:, 6:], cache=cache, cache_index=6, attention_mask=mask, positions=places[6:]
        )
        assert_close(outputs, right[:, 4:])

    @pytest.mark.parametrize("form", ["scalar", "row"])
    def test_one_compiled_step_serves_all_columns(self, form):
        layer = build(causal=True, rotary_wavelength=50.0)
        step = tf.function(layer, jit_compile=True, autograph=False)
        cache = tuple(map(tf.constant, used_cache(layer, self.LENGTH)))
        for place in range(5):
            index = INDEX_FORMS[form](place)
            outputs, cache = step(tf.constant(X[:, place : place + 1]), cache=cache, cache_index=index)
            assert_close(outputs, expected(layer, X)[:, place : place + 1])
        assert step.experimental_get_tracing_count() == 1

    def test_memory_cache_is_the_memory_projected_once(self):
        layer = build(memory_width=10)
        cache = layer.memory_cache(MEMORY)
        assert_close(layer(X, cache=cache), expected(layer, X, MEMORY))
        one_by_one = [to_numpy(layer(X[:, i : i + 1], cache=cache)) for i in range(5)]
        assert_close(np.concatenate(one_by_one, 1), expected(layer, X, MEMORY))

    def test_cache_has_the_compute_dtype(self):
        layer = build(dtype="mixed_bfloat16")
        cache = layer.make_cache(2, 4)
        assert [part.dtype for part in cache] == ["bfloat16", "bfloat16"]
        _, cache = layer(X[:, :1], cache=cache, cache_index=0)
        assert [part.dtype for part in cache] == ["bfloat16", "bfloat16"]


class TestGeneric:
    def test_self_attention(self):
        check_layer(build(8), X, no_gradient=NO_GRADIENT)

    def test_self_attention_with_options(self):
        layer = build(
            causal=True,
            rotary_wavelength=50.0,
            rotary_scaling={"rope_type": "linear", "factor": 2.0},
            rotary_fraction=0.5,
            sliding_window=3,
            score_cap=4.0,
            qk_norm=True,
        )
        check_layer(layer, X)

    def test_cross_attention(self):
        check_layer(build(1, memory_width=10), X, MEMORY, no_gradient=NO_GRADIENT)

    def test_every_argument_is_in_the_config(self):
        arguments = {
            "num_kv_heads": 1,
            "head_dim": 8,
            "query_scale": 0.7,
            "score_cap": 20.0,
            "causal": True,
            "sliding_window": 3,
            "rotary_wavelength": 30.0,
            "rotary_scaling": {"rope_type": "linear", "factor": 2.0},
            "rotary_fraction": 0.5,
            "qk_norm": True,
            "norm_epsilon": 1e-3,
            "norm_unit_offset": True,
            "use_bias": False,
            "output_bias": True,
            "dropout": 0.1,
            "attention_dropout": 0.2,
            "initializer_range": 0.3,
            "output_initializer_range": 0.2,
        }
        config = MultiHeadAttention(12, 2, **arguments).get_config()
        assert {name: config[name] for name in arguments} == arguments
        copy = MultiHeadAttention.from_config(config)
        assert {name: getattr(copy, name) for name in arguments} == arguments


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ((0, 2), "`dim` must be at least 1. Received: dim=0"),
            ((8, 0), "`num_heads` must be at least 1. Received: num_heads=0"),
            ((8, 2, 0), "`num_kv_heads` must be at least 1. Received: num_kv_heads=0"),
            ((8, 4, 3), "`num_kv_heads` must divide `num_heads`. Received: num_kv_heads=3, num_heads=4"),
            ((8, 3), "`num_heads` must divide `dim`, or .* Received: num_heads=3, dim=8"),
            ((8, 2, None, 0), "`head_dim` must be at least 1. Received: head_dim=0"),
        ],
    )
    def test_sizes(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MultiHeadAttention(*arguments)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"rotary_wavelength": 50.0}, "`head_dim` must be a positive even .*head_dim=3"),
            ({"rotary_fraction": 0.5}, "need a `rotary_wavelength`.*rotary_fraction=0.5"),
            ({"rotary_scaling": {}}, "need a `rotary_wavelength`.*rotary_scaling={}"),
            ({"sliding_window": 0, "causal": True}, "`sliding_window` must be at least 1 .*window=0"),
            ({"sliding_window": 2}, "`sliding_window` .* needs `causal` to be True.*causal=False"),
            ({"query_scale": 0.0}, "`query_scale` must be positive or None. Received: query_scale=0.0"),
            ({"score_cap": -1.0}, "`score_cap` must be positive or None. Received: score_cap=-1.0"),
        ],
    )
    def test_options(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MultiHeadAttention(6, 2, **arguments)

    @pytest.mark.parametrize("arguments", [{"causal": True}, {"rotary_wavelength": 50.0}])
    def test_memory_has_no_order(self, arguments):
        layer = build(**arguments)
        for call in (
            lambda: layer(X, X),
            lambda: layer(X, cache=layer.make_cache(2, 5)),
            lambda: layer.memory_cache(X),
        ):
            with pytest.raises(ValueError, match="`causal` must be False and `rotary_wavelength` None"):
                call()

    def test_memory_and_cache_exclude_each_other(self):
        layer = build(memory_width=10)
        with pytest.raises(ValueError, match="`memory` and `cache` exclude each other"):
            layer(X, MEMORY, cache=layer.memory_cache(MEMORY))

    def test_an_index_needs_a_cache(self):
        with pytest.raises(ValueError, match="`cache_index` needs a `cache`.*Received: cache=None"):
            build()(X, cache_index=0)

    @pytest.mark.parametrize("index", [-1, 6])
    def test_columns_outside_the_cache(self, index):
        layer = build(causal=True)
        with pytest.raises(ValueError, match=f"inside the cache. .*index={index}.*length=6"):
            layer(X[:, :1], cache=layer.make_cache(2, 6), cache_index=index)

    def test_symbolic_inputs(self):
        assert build()(keras.Input((None, 12))).shape == (None, None, 12)
