import dataclasses
import json
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.checks import assert_close, check_config, check_gradients, check_layer, to_numpy
from reference.maths import gpt2
from reference.weights import arrays, normal, randomize
from safetensors.numpy import load_file

from kerasllm.models import GPT2, GPT2Config

GOLDEN = Path(__file__).parents[1] / "golden" / "gpt2"
CONFIG = GPT2Config(
    vocabulary_size=19,
    context_length=9,
    num_layers=2,
    num_heads=2,
    dim=8,
    intermediate_dim=20,
    dropout=0.0,
    layer_norm_epsilon=1e-3,
)
IDS = np.random.default_rng(1).integers(0, 19, (2, 7)).astype("int32")
VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False},
        {"use_bias": False},
        {"intermediate_dim": None, "activation": "relu", "num_heads": 4, "num_layers": 1},
    ],
    ids=["tied", "untied", "no bias", "relu"],
)


def build(**changes):
    return randomize(GPT2(dataclasses.replace(CONFIG, **changes), name="gpt2"))


def expected(model, ids, bias=None):
    config = model.config
    return gpt2(
        arrays(model),
        ids,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        activation=config.activation,
        epsilon=config.layer_norm_epsilon,
        bias=bias,
    )


def used_cache(model, length):
    """A cache that an earlier sequence has left full of numbers."""
    return [tuple(normal(*part.shape, seed=9) for part in pair) for pair in model.make_cache(2, length)]


class TestNumerics:
    @VARIANTS
    def test_matches_numpy(self, changes):
        model = build(**changes)
        assert_close(model(IDS), expected(model, IDS))

    def test_padding_mask(self):
        model, mask = build(), np.array([[1] * 7, [1, 1, 1, 0, 1, 0, 0]])
        right = expected(model, IDS, bias=np.where(mask, 0.0, -np.inf)[:, None, None])
        assert_close(model(IDS, attention_mask=mask), right)

    def test_causal_to_the_last_bit(self):
        model, changed = build(), IDS.copy()
        changed[:, 4] = (changed[:, 4] + 1) % 19
        before, after = to_numpy(model(IDS)), to_numpy(model(changed))
        np.testing.assert_array_equal(before[:, :4], after[:, :4])
        assert (np.abs(before[:, 4:] - after[:, 4:]).max(-1) > 1e-3).all()

    def test_order_matters(self):
        model, swapped = build(num_layers=1), IDS.copy()
        swapped[:, [0, 1]] = swapped[:, [1, 0]]
        assert (swapped != IDS).any()
        assert np.abs(to_numpy(model(IDS)) - to_numpy(model(swapped)))[:, -1].max() > 1e-3

    def test_last_index_picks_one_place_per_row(self):
        model = build()
        whole = to_numpy(model(IDS))
        picked = model(IDS, last_index=np.array([2, 6]))
        assert_close(picked, whole[[0, 1], [2, 6]][:, None], tolerance=1e-6)

    def test_dropout_is_for_training_only(self):
        model = build(dropout=0.5)
        np.testing.assert_array_equal(to_numpy(model(IDS)), to_numpy(build()(IDS)))
        assert np.abs(to_numpy(model(IDS, training=True)) - to_numpy(model(IDS))).max() > 0.1


class TestCache:
    @pytest.mark.parametrize(
        "make_index",
        [int, tf.constant, lambda step: tf.constant([step, step])],
        ids=["int", "scalar", "row"],
    )
    def test_decoding_equals_the_whole(self, make_index):
        model = build()
        right = expected(model, IDS)
        logits, cache = model(IDS[:, :3], cache=used_cache(model, 8), cache_index=0)
        assert_close(logits, right[:, :3])
        for step in range(3, 7):
            logits, cache = model(IDS[:, step : step + 1], cache=cache, cache_index=make_index(step))
            assert_close(logits, right[:, step : step + 1])
        assert len(cache) == 2

    def test_rows_at_different_places(self):
        model, lengths, new = build(), [3, 5], np.array([[4], [7]], "int32")
        logits, cache = model(
            IDS, cache=used_cache(model, 8), cache_index=0, last_index=np.array(lengths) - 1
        )
        assert_close(logits, expected(model, IDS)[[0, 1], [2, 4]][:, None])
        logits, _ = model(new, cache=cache, cache_index=np.array(lengths))
        for row, length in enumerate(lengths):
            whole = [[*IDS[row, :length], *new[row]]]
            assert_close(logits[row : row + 1], expected(model, whole)[:, -1:])

    def test_mask_hides_columns_of_the_cache(self):
        model, mask = build(), np.array([[1, 1, 0, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1, 1, 1]])
        right = expected(model, IDS, bias=np.where(mask[:, :7], 0.0, -np.inf)[:, None, None])
        _, cache = model(IDS[:, :6], cache=used_cache(model, 8), cache_index=0, attention_mask=mask)
        logits, _ = model(IDS[:, 6:], cache=cache, cache_index=6, attention_mask=mask)
        assert_close(logits, right[:, 6:])

    def test_compiled_loop_equals_the_whole(self):
        model = build()

        @tf.function(jit_compile=True, autograph=False)
        def decode(ids):
            def step(place, cache, logits):
                token = tf.gather(ids, place[None], axis=1)
                new, cache = model(token, cache=cache, cache_index=place)
                return place + 1, cache, tf.tensor_scatter_nd_update(logits, place[None, None], [new[:, 0]])

            start = tf.constant(0), model.make_cache(2, 7), tf.zeros((7, 2, 19))
            return tf.while_loop(lambda place, *_: place < 7, step, start)[2]

        assert_close(tf.transpose(decode(tf.constant(IDS)), (1, 0, 2)), expected(model, IDS))


class TestGeneric:
    def test_every_property(self):
        check_layer(build(num_layers=1), IDS, no_gradient=["key/bias"])

    @VARIANTS
    def test_config_and_gradients(self, changes):
        model = build(**changes)
        check_config(model, IDS)
        check_gradients(model, IDS, no_gradient=["key/bias"])

    @pytest.mark.parametrize("tied", [True, False])
    def test_tying_survives(self, tied, tmp_path):
        model = build(tie_embeddings=tied)
        model.save(tmp_path / "model.keras")
        for reload in (
            lambda: GPT2.from_config(model.get_config()),
            lambda: keras.models.load_model(tmp_path / "model.keras"),
        ):
            copy = reload()
            assert isinstance(copy, GPT2) and copy.config == model.config
            assert (copy.output_embedding.embeddings is copy.token_embedding.embeddings) == tied
            assert [w.path for w in copy.weights] == [w.path for w in model.weights]
            assert copy.count_params() == model.count_params()
        np.testing.assert_array_equal(to_numpy(copy(IDS)), to_numpy(model(IDS)))
        # Only a tied table moves the logits as the output head too, and the reference knows of one head.
        copy.token_embedding.embeddings.assign(0.5 * normal(19, 8, seed=4))
        assert_close(copy(IDS), expected(copy, IDS))

    def test_the_head_adds_no_weights_when_tied(self):
        tied, untied = build(), build(tie_embeddings=False)
        assert untied.count_params() - tied.count_params() == 19 * 8
        assert len(untied.weights) - len(tied.weights) == 1

    def test_gpt2_small_has_124_million_parameters(self):
        small = GPT2Config()
        model = GPT2(dataclasses.replace(small, num_layers=1, vocabulary_size=1, context_length=1))
        blocks = (small.num_layers - 1) * model.blocks[0].count_params()
        tables = (small.vocabulary_size - 1 + small.context_length - 1) * small.dim
        assert model.count_params() + blocks + tables == 124_439_808

    def test_starts_small_where_the_residual_stream_is_written(self):
        weights = arrays(GPT2(dataclasses.replace(CONFIG, dim=64, initializer_range=0.1)))
        np.testing.assert_allclose(weights["block_1/attention/output/kernel"].std(), 0.05, rtol=0.1)
        np.testing.assert_allclose(weights["block_1/feed_forward/down/kernel"].std(), 0.05, rtol=0.1)
        np.testing.assert_allclose(weights["block_1/attention/query/kernel"].std(), 0.1, rtol=0.1)
        np.testing.assert_allclose(weights["token_embedding/embeddings"].std(), 0.1, rtol=0.1)


class TestErrors:
    def test_longer_than_the_context(self):
        with pytest.raises(ValueError, match="Received: 10 tokens, context_length=9"):
            build()(np.zeros((1, 10), "int32"))
        model = build()
        with pytest.raises(ValueError, match="Received: 10 tokens, context_length=9"):
            model(IDS[:, :1], cache=model.make_cache(2, 20), cache_index=9)

    def test_cache_and_index_go_together(self):
        model = build()
        with pytest.raises(ValueError, match="together. Received: cache given: True, cache_index=None"):
            model(IDS, cache=model.make_cache(2, 8))
        with pytest.raises(ValueError, match="together. Received: cache given: False, cache_index=3"):
            model(IDS, cache_index=3)

    def test_no_layers(self):
        with pytest.raises(ValueError, match="`num_layers` must be at least 1. Received: num_layers=0"):
            dataclasses.replace(CONFIG, num_layers=0)

    def test_unknown_key_in_a_saved_config(self):
        config = build().get_config()
        config["config"]["rope_theta"] = 10000.0
        with pytest.raises(ValueError, match=r"GPT2Config has the fields .*Received: \['rope_theta'\]"):
            GPT2.from_config(config)

    def test_bad_arguments_reach_the_layers_that_check_them(self):
        with pytest.raises(ValueError, match="`num_heads` must divide `dim`.*num_heads=3, dim=8"):
            build(num_heads=3)
        with pytest.raises(ValueError, match="`activation` must be one of .*Received: 'swish'"):
            build(activation="swish")


class TestWeightMap:
    @VARIANTS
    def test_covers_every_variable_once(self, changes):
        model = build(**changes)
        covered = Counter(path for paths, _ in model.weight_map().values() for path in paths)
        assert covered == Counter(model.variables_by_path().keys())
        assert len(covered) == len(model.weights)

    def test_names_are_those_of_the_checkpoint(self):
        assert set(golden_model().weight_map()) == set(load_file(GOLDEN / "model.safetensors"))
        untied = build(tie_embeddings=False)
        assert "lm_head.weight" in untied.weight_map() and "lm_head.weight" not in build().weight_map()

    def test_both_directions(self):
        model = golden_model()
        variables = model.variables_by_path()
        tensors = load_file(GOLDEN / "model.safetensors")
        for name, (paths, transform) in model.weight_map().items():
            back = transform.to_tensor([variables[path].numpy() for path in paths])
            np.testing.assert_array_equal(back, tensors[name])


def golden_model():
    """A random GPT-2 that transformers wrote, read through the weight table."""
    settings = json.loads((GOLDEN / "config.json").read_text())
    model = GPT2(GPT2Config.from_huggingface(settings))
    tensors, variables = load_file(GOLDEN / "model.safetensors"), model.variables_by_path()
    for name, (paths, transform) in model.weight_map().items():
        for path, array in zip(paths, transform.to_variables(tensors[name]), strict=True):
            variables[path].assign(array)
    return model


class TestTransformers:
    def test_logits_and_loss(self):
        model, golden = golden_model(), np.load(GOLDEN / "golden.npz")
        mask = golden["attention_mask"]
        logits = to_numpy(model(golden["input_ids"], attention_mask=mask))
        np.testing.assert_allclose(logits[mask == 1], golden["logits"][mask == 1], atol=1e-4)

        # The loss is the mean over the tokens that have a label, each predicted from the one before.
        labels = golden["labels"][:, 1:]
        losses = keras.ops.sparse_categorical_crossentropy(
            np.maximum(labels, 0), logits[:, :-1], from_logits=True
        )
        loss = to_numpy(losses)[labels >= 0].mean()
        np.testing.assert_allclose(loss, golden["loss"], rtol=1e-5)
