import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.checks import assert_close, check_layer, to_numpy
from reference.maths import block
from reference.weights import arrays, normal, randomize

from kerasllm.layers import DecoderBlock, EncoderBlock, GatedFeedForward, LayerNorm, RMSNorm

X = normal(2, 5, 12)
MEMORY = normal(2, 7, 10, seed=2)
MASK = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]])
MEMORY_MASK = np.array([[1, 1, 1, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1]])

GPT2_LIKE = {}
LLAMA_LIKE = {
    "norm": "rms",
    "gated": True,
    "activation": "silu",
    "use_bias": False,
    "head_dim": 6,
    "num_kv_heads": 2,
    "rotary_wavelength": 50.0,
}
BERT_LIKE = {"norm_first": False, "activation": "gelu", "norm_epsilon": 0.1}
WIDE_HEADS = {"norm": "rms", "norm_first": False, "head_dim": 5, "num_kv_heads": 1, "activation": "relu"}
QWEN_LIKE = {**LLAMA_LIKE, "attention_bias": True, "attention_output_bias": False, "qk_norm": True}
T5_LIKE = {"norm": "rms", "query_scale": 1.0, "head_dim": 5, "use_bias": False, "activation": "relu"}
GEMMA_LIKE = {
    **LLAMA_LIKE,
    "activation": "gelu_tanh",
    "norm_last": True,
    "norm_unit_offset": True,
    "qk_norm": True,
    "query_scale": 0.3,
    "score_cap": 2.0,
    "rotary_scaling": {"rope_type": "linear", "factor": 3.0},
    "norm_epsilon": 1e-2,
}
VARIANTS = pytest.mark.parametrize(
    "arguments",
    [GPT2_LIKE, LLAMA_LIKE, BERT_LIKE, WIDE_HEADS, QWEN_LIKE, T5_LIKE, GEMMA_LIKE],
    ids=["gpt2", "llama", "bert", "wide", "qwen", "t5", "gemma"],
)


def build(cls, **arguments):
    layer = cls(12, 4, 20, **arguments)
    if arguments.get("cross_attention"):
        layer.build((None, None, 12), (None, None, 10))
    else:
        layer.build((None, None, 12))
    return randomize(layer)


def hide(mask):
    return np.where(mask, 0.0, -np.inf)[:, None, None]


def expected(layer, x, memory=None, **more):
    names = "norm norm_first norm_last norm_unit_offset activation gated num_heads num_kv_heads".split()
    names += "query_scale score_cap sliding_window rotary_scaling rotary_fraction qk_norm".split()
    config = layer.get_config()
    return block(
        arrays(layer),
        x,
        memory,
        epsilon=config.get("norm_epsilon", 1e-5),
        wavelength=config.get("rotary_wavelength"),
        is_causal=isinstance(layer, DecoderBlock),
        **{name: config[name] for name in names if name in config},
        **more,
    )


@VARIANTS
class TestVariants:
    def test_encoder_matches_numpy(self, arguments):
        layer = build(EncoderBlock, **arguments)
        assert_close(layer(X), expected(layer, X))
        assert_close(layer(X, attention_mask=MASK), expected(layer, X, bias=hide(MASK)))

    def test_decoder_matches_numpy(self, arguments):
        layer = build(DecoderBlock, **arguments)
        assert_close(layer(X), expected(layer, X))
        assert_close(layer(X, attention_mask=MASK), expected(layer, X, bias=hide(MASK)))

    def test_decoder_with_memory_matches_numpy(self, arguments):
        layer = build(DecoderBlock, cross_attention=True, **arguments)
        masks = {"bias": hide(MASK), "memory_bias": hide(MEMORY_MASK)}
        assert_close(layer(X, MEMORY), expected(layer, X, MEMORY))
        outputs = layer(X, MEMORY, attention_mask=MASK, memory_mask=MEMORY_MASK)
        assert_close(outputs, expected(layer, X, MEMORY, **masks))

    def test_decoding_equals_the_whole(self, arguments):
        layer = build(DecoderBlock, cross_attention=True, **arguments)
        right = expected(layer, X, MEMORY, memory_bias=hide(MEMORY_MASK))
        memory = {"memory_cache": layer.memory_attention.memory_cache(MEMORY), "memory_mask": MEMORY_MASK}
        cache = layer.attention.make_cache(2, 6)
        outputs, cache = layer(X[:, :3], cache=cache, cache_index=0, **memory)
        assert_close(outputs, right[:, :3])
        for step, index in ((3, tf.constant(3)), (4, tf.constant([4, 4]))):
            outputs, cache = layer(X[:, step : step + 1], cache=cache, cache_index=index, **memory)
            assert_close(outputs, right[:, step : step + 1])

    def test_config_holds_every_argument(self, arguments):
        arguments = {**arguments, "dropout": 0.1, "initializer_range": 0.3, "output_initializer_range": 0.2}
        config = DecoderBlock.from_config(build(DecoderBlock, **arguments).get_config()).get_config()
        assert {name: config[name] for name in arguments} == arguments


class TestGeneric:
    def test_encoder(self):
        check_layer(build(EncoderBlock, **BERT_LIKE), X, no_gradient=["attention/key/bias"])

    def test_decoder_with_memory(self):
        check_layer(
            build(DecoderBlock, cross_attention=True), X, MEMORY, no_gradient=["attention/key/bias"]
        )

    def test_decoder(self):
        check_layer(build(DecoderBlock, sliding_window=3, **GEMMA_LIKE), X)

    @pytest.mark.parametrize("cls", [EncoderBlock, DecoderBlock])
    def test_position_bias_reaches_the_self_attention(self, cls):
        layer, bias = build(cls, **T5_LIKE), 2 * normal(1, 4, 5, 5, seed=3)
        assert_close(layer(X, position_bias=bias), expected(layer, X, bias=bias))

    def test_sliding_window_reaches_the_self_attention(self):
        layer = build(DecoderBlock, sliding_window=2, cross_attention=True, **LLAMA_LIKE)
        assert_close(layer(X, MEMORY), expected(layer, X, MEMORY))

    def test_decoder_is_causal_to_the_last_bit(self):
        layer, changed = build(DecoderBlock, **LLAMA_LIKE), X.copy()
        changed[:, 3] += normal(12, seed=7)
        before, after = to_numpy(layer(X)), to_numpy(layer(changed))
        np.testing.assert_array_equal(before[:, :3], after[:, :3])
        assert (np.abs(before[:, 3:] - after[:, 3:]).max(-1) > 1e-3).all()

    def test_encoder_sees_what_follows(self):
        layer, changed = build(EncoderBlock), X.copy()
        changed[:, 4] += normal(12, seed=7)
        assert (np.abs(to_numpy(layer(X)) - to_numpy(layer(changed))).max(-1) > 1e-3).all()

    def test_rotary_positions_reach_the_attention(self):
        places = np.array([[0, 1, 2, 3, 4], [9, 10, 20, 7, 3]])
        for cls in (EncoderBlock, DecoderBlock):
            layer = build(cls, **LLAMA_LIKE)
            assert_close(layer(X, positions=places), expected(layer, X, positions=places))

    @pytest.mark.parametrize("cls", [EncoderBlock, DecoderBlock])
    def test_dropout_is_for_training_only(self, cls):
        layer, plain = build(cls, dropout=0.5), build(cls)
        np.testing.assert_array_equal(to_numpy(layer(X)), to_numpy(plain(X)))
        outputs = to_numpy(layer(X, training=True))
        # Both branches were dropped at some place: there the input went through unchanged.
        assert 0.1 < np.isclose(outputs, X).mean() < 0.5

    def test_separate_dropouts(self):
        def dropped(**rates):
            layer = build(EncoderBlock, norm="rms", **rates)
            sublayers = (layer.attention.output_dropout, layer.attention.weight_dropout)
            sublayers += (layer.feed_forward.output_dropout_layer, layer.feed_forward.hidden_dropout_layer)
            return [sublayer.rate for sublayer in sublayers]

        assert dropped(dropout=0.5) == [0.5, 0.5, 0.5, 0.0]
        rates = {"attention_output_dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3}
        assert dropped(**rates) == [0.1, 0.2, 0.0, 0.3]
        assert dropped(dropout=0.5, **rates) == [0.1, 0.2, 0.5, 0.3]

    def test_parts_are_as_asked_for(self):
        llama = build(DecoderBlock, **LLAMA_LIKE)
        assert isinstance(llama.feed_forward, GatedFeedForward)
        assert isinstance(llama.attention_norm, RMSNorm)
        assert not any(path.endswith("bias") for path in arrays(llama))
        gpt2 = build(DecoderBlock)
        assert isinstance(gpt2.attention_norm, LayerNorm)
        assert {path for path in arrays(gpt2) if "norm" in path} == {
            f"{name}_norm/{part}" for name in ("attention", "feed_forward") for part in ("scale", "bias")
        }

    def test_starts_at_the_given_scales(self):
        layer = DecoderBlock(64, 4, 64, initializer_range=0.3, output_initializer_range=0.1)
        layer.build((None, None, 64))
        for path, array in arrays(layer).items():
            if path.endswith("kernel"):
                right = 0.1 if "output" in path or "down" in path else 0.3
                np.testing.assert_allclose(array.std(), right, rtol=0.05)


class TestErrors:
    def test_unknown_norm(self):
        with pytest.raises(ValueError, match="""`norm` must be "layer" or "rms". Received: 'batch'"""):
            DecoderBlock(12, 4, 20, norm="batch")

    def test_norms_that_do_not_fit_together(self):
        with pytest.raises(ValueError, match="`norm_last` needs `norm_first`. Received: norm_first=False"):
            DecoderBlock(12, 4, 20, norm_last=True, norm_first=False)
        with pytest.raises(ValueError, match="""`norm_unit_offset` needs .* "rms". Received: 'layer'"""):
            DecoderBlock(12, 4, 20, norm_unit_offset=True)

    def test_encoder_has_no_window(self):
        with pytest.raises(ValueError, match="needs `causal` to be True. Received: sliding_window=3"):
            EncoderBlock(12, 4, 20, sliding_window=3)

    def test_encoder_has_no_memory(self):
        with pytest.raises(ValueError, match="`cross_attention` must be False"):
            EncoderBlock(12, 4, 20, cross_attention=True)

    def test_unknown_argument(self):
        with pytest.raises((TypeError, ValueError), match="num_key_value_heads"):
            DecoderBlock(12, 4, 20, num_key_value_heads=2)

    def test_a_memory_if_and_only_if_it_is_used(self):
        with pytest.raises(ValueError, match="cross_attention=False, memory given: True"):
            build(DecoderBlock)(X, MEMORY)
        with pytest.raises(ValueError, match="cross_attention=True, memory given: False"):
            build(DecoderBlock, cross_attention=True)(X)

    def test_symbolic_inputs_build_the_block(self):
        layer = DecoderBlock(12, 4, 20, cross_attention=True)
        assert layer(keras.Input((None, 12)), keras.Input((None, 10))).shape == (None, None, 12)
        assert arrays(layer)["memory_attention/key/kernel"].shape == (10, 12)
