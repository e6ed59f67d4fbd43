import dataclasses
import json
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.checks import assert_close, check_config, to_numpy
from reference.maths import t5
from reference.weights import arrays, normal, randomize
from safetensors.numpy import load_file

from kerasllm.models import T5, T5Config

GOLDEN = Path(__file__).parents[1] / "golden" / "t5"
CONFIG = T5Config(
    vocabulary_size=19,
    num_layers=2,
    num_heads=2,
    dim=8,
    head_dim=5,
    intermediate_dim=12,
    num_buckets=8,
    max_distance=6,
    norm_epsilon=1e-3,
)
SOURCE = np.random.default_rng(1).integers(1, 19, (2, 9)).astype("int32")
MASK = np.array([[1] * 9, [1, 1, 1, 1, 1, 0, 0, 0, 0]])
TARGET = np.random.default_rng(2).integers(1, 19, (2, 8)).astype("int32")
V1_1 = {"gated": True, "activation": "gelu_tanh", "tie_embeddings": False}
VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        {},
        V1_1,
        {"num_decoder_layers": 1, "num_heads": 3, "head_dim": 4, "num_buckets": 12, "max_distance": 8},
    ],
    ids=["1.0", "1.1", "unequal depths"],
)


def build(head="seq2seq", **changes):
    return randomize(
        T5(dataclasses.replace(CONFIG, **{"num_decoder_layers": None, **changes}), head=head, name="t5")
    )


def expected(model, source=SOURCE, target=TARGET, mask=MASK):
    config = model.config
    names = ("num_layers", "num_decoder_layers", "num_heads", "activation", "gated", "norm_epsilon")
    return t5(
        arrays(model),
        source,
        target,
        source_mask=mask,
        buckets=(config.num_buckets, config.max_distance),
        **{name: getattr(config, name) for name in names},
    )


def used_cache(model, length, rows=2):
    """A cache that an earlier sequence has left full of numbers."""
    return [tuple(normal(*part.shape, seed=9) for part in pair) for pair in model.make_cache(rows, length)]


class TestNumerics:
    @VARIANTS
    def test_matches_numpy(self, changes):
        model = build(**changes)
        memory, logits = expected(model)
        assert_close(model.encode(SOURCE, MASK), memory)
        assert_close(model(TARGET, source_ids=SOURCE, memory_mask=MASK), logits)

    def test_the_source_in_three_forms(self):
        model = build()
        whole = to_numpy(model(TARGET, source_ids=SOURCE, memory_mask=MASK))
        memory = model.encode(SOURCE, MASK)
        assert_close(model(TARGET, memory=memory, memory_mask=MASK), whole, 1e-6)
        memory_cache = model.make_memory_cache(memory)
        assert_close(model(TARGET, memory_cache=memory_cache, memory_mask=MASK), whole, 1e-6)

    def test_padding_changes_nothing(self):
        model = build(**V1_1)
        padded = to_numpy(model(TARGET, source_ids=np.where(MASK, SOURCE, 0), memory_mask=MASK))
        assert_close(padded[1:], to_numpy(model(TARGET[1:], source_ids=SOURCE[1:, :5])))
        target = np.concatenate([TARGET, np.zeros((2, 3), "int32")], axis=1)
        longer = to_numpy(model(target, source_ids=SOURCE, memory_mask=MASK))
        assert_close(longer[:, :8], to_numpy(model(TARGET, source_ids=SOURCE, memory_mask=MASK)))

    def test_mask_of_the_target(self):
        model, mask = build(), np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
        logits = to_numpy(model(TARGET, source_ids=SOURCE, attention_mask=mask))
        alone = to_numpy(model(TARGET[:1, 2:], source_ids=SOURCE[:1]))
        assert_close(logits[:1, 2:], alone)  # only distances matter
        assert np.abs(logits[0] - to_numpy(model(TARGET, source_ids=SOURCE))[0]).max() > 0.1

    def test_the_head_none_is_the_encoder(self):
        model = build(head=None)
        whole = build()
        for path, variable in model.variables_by_path().items():
            variable.assign(whole.variables_by_path()[path])
        assert_close(model(SOURCE, attention_mask=MASK), to_numpy(whole.encode(SOURCE, MASK)), 1e-6)
        assert not any(path.startswith("decoder") for path in model.variables_by_path())

    def test_last_index_picks_one_place_per_row(self):
        model = build()
        whole = to_numpy(model(TARGET, source_ids=SOURCE))
        picked = model(TARGET, source_ids=SOURCE, last_index=np.array([2, 6]))
        assert_close(picked, whole[[0, 1], [2, 6]][:, None], tolerance=1e-6)

    def test_shift_right(self):
        shifted = build(decoder_start_id=7).shift_right(TARGET)
        np.testing.assert_array_equal(shifted, np.concatenate([[[7], [7]], TARGET[:, :-1]], axis=1))

    def test_dropout_is_for_training_only(self):
        model, calm = build(dropout=0.5), build(dropout=0.0)
        inputs = {"source_ids": SOURCE, "memory_mask": MASK}
        np.testing.assert_array_equal(to_numpy(model(TARGET, **inputs)), to_numpy(calm(TARGET, **inputs)))
        trained = to_numpy(model(TARGET, **inputs, training=True))
        assert np.abs(trained - to_numpy(calm(TARGET, **inputs, training=True))).max() > 0.1


class TestCache:
    @pytest.mark.parametrize(
        "make_index",
        [int, tf.constant, lambda step: tf.constant([step, step])],
        ids=["int", "scalar", "row"],
    )
    def test_decoding_equals_the_whole(self, make_index):
        model = build(num_decoder_layers=3)
        right = expected(model)[1]
        source = {
            "memory_cache": model.make_memory_cache(model.encode(SOURCE, MASK)),
            "memory_mask": MASK,
        }
        logits, cache = model(TARGET[:, :3], **source, cache=used_cache(model, 10), cache_index=0)
        assert_close(logits, right[:, :3])
        for step, count in ((3, 1), (4, 1), (5, 2), (7, 1)):
            tokens = TARGET[:, step : step + count]
            logits, cache = model(tokens, **source, cache=cache, cache_index=make_index(step))
            assert_close(logits, right[:, step : step + count])
        assert len(cache) == 3

    def test_rows_at_different_places(self):
        model, lengths, new = build(), [3, 5], np.array([[4], [7]], "int32")
        source = {"memory_cache": model.make_memory_cache(model.encode(SOURCE, MASK)), "memory_mask": MASK}
        _, cache = model(TARGET, **source, cache=used_cache(model, 10), cache_index=0)
        logits, _ = model(new, **source, cache=cache, cache_index=np.array(lengths))
        for row, length in enumerate(lengths):
            target = [[*TARGET[row, :length], *new[row]]]
            whole = expected(model, SOURCE[row : row + 1], target, MASK[row : row + 1])[1]
            assert_close(logits[row : row + 1], whole[:, -1:])

    @pytest.mark.parametrize("compiled", [False, True], ids=["graph", "XLA"])
    def test_loop_in_a_graph_equals_the_whole(self, compiled):
        model = build(**V1_1)

        @tf.function(jit_compile=compiled, autograph=False)
        def decode(source, mask, ids):
            memory_cache = model.make_memory_cache(model.encode(source, mask))

            def step(place, cache, logits):
                token = tf.gather(ids, place[None], axis=1)
                new, cache = model(
                    token, memory_cache=memory_cache, memory_mask=mask, cache=cache, cache_index=place
                )
                return place + 1, cache, tf.tensor_scatter_nd_update(logits, place[None, None], [new[:, 0]])

            start = tf.constant(0), model.make_cache(2, 8), tf.zeros((8, 2, 19))
            return tf.while_loop(lambda place, *_: place < 8, step, start)[2]

        logits = decode(tf.constant(SOURCE), tf.constant(MASK), tf.constant(TARGET))
        assert_close(tf.transpose(logits, (1, 0, 2)), expected(model)[1])

    def test_one_graph_for_every_shape(self):
        model, traces = build(), []

        @tf.function(
            input_signature=[tf.TensorSpec((None, None), "int32"), tf.TensorSpec((None, None), "int32")],
            autograph=False,
        )
        def call(source, target):
            traces.append(1)
            return model(target, source_ids=source)

        for rows, source_length, length in ((2, 9, 8), (1, 1, 1), (2, 3, 5)):
            source, target = SOURCE[:rows, :source_length], TARGET[:rows, :length]
            assert_close(call(source, target), to_numpy(model(target, source_ids=source)))
        assert len(traces) == 1


class TestGeneric:
    @VARIANTS
    def test_every_weight_moves_the_output(self, changes):
        model = build(dropout=0.0, **changes)
        with tf.GradientTape() as tape:
            logits = model(TARGET, source_ids=SOURCE, memory_mask=MASK)
            loss = tf.reduce_sum(logits * normal(*logits.shape, seed=3))
        gradients = tape.gradient(loss, [weight.value for weight in model.trainable_weights])
        for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
            assert np.abs(tf.convert_to_tensor(gradient)).max() > 1e-4, weight.path
        assert len(model.trainable_weights) == len(model.weights)

    def test_config(self):
        check_config(build(head=None), SOURCE)

    @pytest.mark.parametrize("changes", [{}, V1_1], ids=["tied", "untied"])
    def test_saving(self, changes, tmp_path):
        model = build(**changes)
        model.save(tmp_path / "model.keras")
        copy = keras.models.load_model(tmp_path / "model.keras")
        assert isinstance(copy, T5) and copy.config == model.config
        assert ("head/kernel" in copy.variables_by_path()) == bool(changes)
        inputs = {"source_ids": SOURCE, "memory_mask": MASK}
        np.testing.assert_array_equal(to_numpy(copy(TARGET, **inputs)), to_numpy(model(TARGET, **inputs)))

    def test_half_precision(self):
        model = build()
        half = T5.from_config({**model.get_config(), "dtype": "mixed_bfloat16"})
        half.set_weights(model.get_weights())
        logits = half(TARGET, source_ids=SOURCE, memory_mask=MASK)
        assert logits.dtype == "bfloat16" and {weight.dtype for weight in half.weights} == {"float32"}
        assert_close(logits, to_numpy(model(TARGET, source_ids=SOURCE, memory_mask=MASK)), tolerance=0.1)

    def test_t5_small_has_61_million_parameters(self):
        small = T5Config()
        model = T5(dataclasses.replace(small, num_layers=1, num_decoder_layers=1, vocabulary_size=1))
        blocks = 5 * (model.encoder_blocks[0].count_params() + model.decoder_blocks[0].count_params())
        table = (small.vocabulary_size - 1) * small.dim
        assert model.count_params() + blocks + table == 60_506_624

    def test_starts_at_the_scales_of_the_paper(self):
        weights = arrays(T5(dataclasses.replace(CONFIG, dim=64, head_dim=16, intermediate_dim=256)))
        for path, scale in {
            "encoder_block_0/attention/query": (64 * 16) ** -0.5,
            "decoder_block_1/memory_attention/query": (64 * 16) ** -0.5,
            "decoder_block_1/attention/key": 64**-0.5,
            "encoder_block_1/attention/output": (2 * 16) ** -0.5,
            "decoder_block_0/feed_forward/up": 64**-0.5,
            "decoder_block_0/feed_forward/down": 256**-0.5,
        }.items():
            np.testing.assert_allclose(weights[f"{path}/kernel"].std(), scale, rtol=0.1, err_msg=path)
        np.testing.assert_allclose(weights["token_embedding/embeddings"].std(), 1.0, rtol=0.1)


class TestErrors:
    def test_the_source_is_given_once(self):
        model = build()
        with pytest.raises(ValueError, match=r"must be given once, by one of .*Received: \[\]"):
            model(TARGET)
        memory = model.encode(SOURCE)
        with pytest.raises(ValueError, match=r"Received: \['source_ids', 'memory'\]"):
            model(TARGET, source_ids=SOURCE, memory=memory)

    def test_the_encoder_alone_has_no_target(self):
        with pytest.raises(ValueError, match=r"the encoder alone .*Received: \['source_ids'\]"):
            build(head=None)(TARGET, source_ids=SOURCE)

    def test_longer_than_the_context(self):
        model = build(context_length=8)
        with pytest.raises(ValueError, match="Received: 9 tokens, context_length=8"):
            model.encode(SOURCE)
        with pytest.raises(ValueError, match="Received: 9 tokens, context_length=8"):
            model(SOURCE, source_ids=TARGET)

    def test_cache_and_index_go_together(self):
        model = build()
        with pytest.raises(ValueError, match="together. Received: cache given: True, cache_index=None"):
            model(TARGET, source_ids=SOURCE, cache=model.make_cache(2, 8))

    def test_no_decoder_layers(self):
        with pytest.raises(ValueError, match="`num_decoder_layers` must be at least 1. Received: .*=0"):
            dataclasses.replace(CONFIG, num_decoder_layers=0)


class TestHuggingFaceConfig:
    @pytest.mark.parametrize(
        "values, fields",
        [
            ({}, ("relu", False, True)),
            ({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, ("gelu_tanh", True, False)),
            ({"feed_forward_proj": "gated-silu"}, ("silu", True, True)),
            ({"feed_forward_proj": "gelu"}, ("gelu", False, True)),
            ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, ("gelu", True, True)),
            # As transformers 5 writes a v1.1.
            ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, ("relu", False, False)),
            ({"model_type": "mt5", "tie_word_embeddings": True}, ("gelu_tanh", True, False)),
        ],
        ids=str,
    )
    def test_there_and_back(self, values, fields):
        config = T5Config.from_huggingface({"model_type": "t5", "num_layers": 3, **values})
        assert (config.activation, config.gated, config.tie_embeddings) == fields
        assert config.num_decoder_layers == 3
        assert T5Config.from_huggingface(config.to_huggingface()) == config

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"is_decoder": True}, "stands for is_decoder=False"),
            ({"feed_forward_proj": "swish-gelu"}, "`feed_forward_proj` must be such as .*'swish-gelu'"),
            ({"feed_forward_proj": "gated-gated-gelu"}, "Received: 'gated-gated-gelu'"),
            ({"alibi": True}, "must be known. .*alibi=True"),
        ],
    )
    def test_what_means_something_else(self, values, message):
        with pytest.raises(ValueError, match=message):
            T5Config.from_huggingface({"model_type": "t5", **values})


class TestWeights:
    @VARIANTS
    @pytest.mark.parametrize("head", T5.heads)
    def test_every_weight_has_a_tensor(self, changes, head):
        model = build(head, **changes)
        filled = Counter(path for paths, _ in model.weight_map().values() for path in paths)
        assert filled == Counter(model.variables_by_path().keys())

    def test_copies_and_other_heads(self):
        names = [
            "encoder.embed_tokens.weight",
            "decoder.block.1.layer.2.layer_norm.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
            "lm_head.weight",
        ]
        found = {names[0]: "shared.weight"}
        assert build(head=None).checkpoint_names(names) == found
        assert build().checkpoint_names(names) == {**found, names[1]: names[1]}
        assert build(**V1_1).checkpoint_names(names[3:]) == {names[3]: names[3]}

    def test_golden_checkpoint_of_transformers(self):
        golden = np.load(GOLDEN / "golden.npz")
        model = T5(T5Config.from_huggingface(json.loads((GOLDEN / "config.json").read_text())))
        tensors, variables = load_file(GOLDEN / "model.safetensors"), model.variables_by_path()
        assert set(model.weight_map()) == set(tensors)
        for name, (paths, transform) in model.weight_map().items():
            parts = transform.to_variables(tensors[name])
            variables[paths[0]].assign(parts[0])
            np.testing.assert_array_equal(transform.to_tensor(parts), tensors[name])
        inputs = {"source_ids": golden["input_ids"], "memory_mask": golden["attention_mask"]}
        labels = golden["labels"]
        counted = labels != -100
        logits = to_numpy(model(model.shift_right(np.where(counted, labels, 0)), **inputs))
        np.testing.assert_allclose(logits, golden["logits"], atol=1e-5)
        scores = logits[counted] - np.log(np.exp(logits[counted]).sum(-1, keepdims=True))
        picked = np.take_along_axis(scores, labels[counted][:, None], -1)
        np.testing.assert_allclose(-picked.mean(), golden["loss"], atol=1e-5)


CONFIGURATIONS = [
    ("T5", {}),
    ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 5}),
    ("T5", {"feed_forward_proj": "gated-silu", "num_decoder_layers": 3, "num_layers": 1}),
    ("T5", {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
    ("MT5", {"num_decoder_layers": 1}),
]


@pytest.mark.reference
class TestTransformers:
    """Equal to transformers on random weights."""

    @staticmethod
    def build_both(kind, changes, architecture="ForConditionalGeneration"):
        transformers = pytest.importorskip("transformers")
        import torch
        from reference.parity import load_into, randomize_torch

        sizes = {"d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
        distances = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
        config = getattr(transformers, f"{kind}Config")(
            **{"vocab_size": 50, "decoder_start_token_id": 0, **sizes, **distances, **changes}
        )
        theirs = getattr(transformers, kind + architecture)(config)
        settings = config.to_dict()
        if kind == "MT5" or changes.get("tie_word_embeddings") is False:
            # The head of a file, for transformers 5 ties every new one.
            theirs.lm_head.weight = torch.nn.Parameter(torch.zeros(50, 24))
        randomize_torch(theirs)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.endswith(".q.weight"):  # the scores are not scaled, and 0.5 makes them enormous
                    parameter *= 0.3
        head = "seq2seq" if architecture == "ForConditionalGeneration" else None
        ours = T5(T5Config.from_huggingface(settings), head)
        return theirs, load_into(ours, theirs.state_dict())

    @staticmethod
    def inputs():
        """A source far beyond the greatest distance, padded in one row, and a target with labels."""
        rng = np.random.default_rng(3)
        source, labels = rng.integers(2, 50, (3, 150)), rng.integers(2, 50, (3, 33))
        mask = np.ones((3, 150), "int32")
        mask[1, 97:], source[1, 97:] = 0, 0
        labels[2, 20:] = -100
        return source, mask, labels

    @pytest.mark.parametrize("kind, changes", CONFIGURATIONS, ids=str)
    def test_logits_loss_and_cached_decoding(self, kind, changes):
        import torch

        theirs, ours = self.build_both(kind, changes)
        source, mask, labels = self.inputs()
        with torch.no_grad():
            result = theirs(torch.tensor(source), torch.tensor(mask), labels=torch.tensor(labels))
        counted = labels != -100
        target = ours.shift_right(np.where(counted, labels, 0))
        memory = ours.encode(source, mask)
        wanted = result.encoder_last_hidden_state.numpy()[mask == 1]
        np.testing.assert_allclose(to_numpy(memory)[mask == 1], wanted, rtol=0, atol=1e-4)
        logits = to_numpy(ours(target, source_ids=source, memory_mask=mask))
        np.testing.assert_allclose(logits, result.logits.numpy(), rtol=0, atol=1e-4)
        losses = keras.losses.sparse_categorical_crossentropy(
            labels[counted], logits[counted], from_logits=True
        )
        np.testing.assert_allclose(float(np.mean(losses)), result.loss.item(), atol=1e-5)

        alone = to_numpy(ours(target[1:2], source_ids=source[1:2, :97]))
        assert_close(logits[1:2], alone)
        inputs = {"memory_cache": ours.make_memory_cache(memory), "memory_mask": mask}
        start, cache = ours(target[:, :30], **inputs, cache=used_cache(ours, 40, rows=3), cache_index=0)
        steps = [to_numpy(start)]
        for place in range(30, 33):
            step, cache = ours(target[:, place : place + 1], **inputs, cache=cache, cache_index=place)
            steps.append(to_numpy(step))
        assert_close(np.concatenate(steps, axis=1), logits)

    def test_encoder_alone(self):
        import torch

        theirs, ours = self.build_both("T5", {}, "EncoderModel")
        source, mask, _ = self.inputs()
        with torch.no_grad():
            wanted = theirs(torch.tensor(source), torch.tensor(mask)).last_hidden_state.numpy()
        actual = to_numpy(ours(source, attention_mask=mask))
        np.testing.assert_allclose(actual[mask == 1], wanted[mask == 1], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("kind, changes", CONFIGURATIONS, ids=str)
    def test_transformers_loads_what_we_save(self, kind, changes, tmp_path):
        import torch
        import transformers

        from kerasllm.checkpoints import load_folder, save_folder

        theirs, ours = self.build_both(kind, changes)
        save_folder(tmp_path, ours, None)
        loaded, report = transformers.AutoModelForSeq2SeqLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert type(loaded) is type(theirs)
        assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        source, mask, labels = map(torch.tensor, self.inputs())
        with torch.no_grad():
            before, after = (model(source, mask, labels=labels).logits for model in (theirs, loaded))
        np.testing.assert_allclose(after.numpy(), before.numpy(), atol=1e-6)
        again = load_folder(tmp_path).model
        assert again.config == ours.config
        # What transformers writes says of itself whether the head is tied.
        loaded.save_pretrained(tmp_path / "theirs")
        back = load_folder(tmp_path / "theirs").model
        assert back.config.tie_embeddings == ours.config.tie_embeddings
        ids = source.numpy()[:, :20]
        for model in (again, back):
            assert_close(model(ids, source_ids=ids), to_numpy(ours(ids, source_ids=ids)), 1e-6)
