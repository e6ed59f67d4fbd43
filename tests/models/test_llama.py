import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.checks import assert_close, check_config, check_gradients, check_layer, to_numpy
from reference.maths import llama
from reference.weights import arrays, normal, randomize
from safetensors.numpy import load_file

from kerasllm.models import Llama, LlamaConfig, find_head, find_model_class

GOLDEN = Path(__file__).parents[1] / "golden" / "llama"
CONFIG = LlamaConfig(
    vocabulary_size=19,
    context_length=12,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    dim=24,
    intermediate_dim=20,
    norm_epsilon=1e-3,
    rotary_wavelength=50.0,
)
IDS = np.random.default_rng(1).integers(0, 19, (2, 9)).astype("int32")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
CHANGES = {
    "llama": {},
    "llama 3": {
        "rotary_scaling": {**LLAMA3, "original_max_position_embeddings": 6},
        "tie_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"huggingface_type": "mistral", "sliding_window": 3, "head_dim": 6, "num_kv_heads": 1},
    "qwen 2": {
        "huggingface_type": "qwen2",
        "attention_bias": True,
        "attention_output_bias": False,
        "sliding_window": 2,
        "window_layers": (False, True),
    },
    "qwen 3": {"huggingface_type": "qwen3", "qk_norm": True, "head_dim": 8, "norm_epsilon": 0.1},
    "smollm 3": {
        "huggingface_type": "smollm3",
        "num_layers": 3,
        "rotary_layers": (True, False, True),
        "tie_embeddings": True,
    },
    "gemma 2": {
        "huggingface_type": "gemma2",
        "activation": "gelu_tanh",
        "norm_unit_offset": True,
        "norm_last": True,
        "scale_embeddings": True,
        "query_pre_attention_scalar": 10,
        "score_cap": 3.0,
        "logit_cap": 4.0,
        "tie_embeddings": True,
    },
    "gemma 3": {
        "huggingface_type": "gemma3_text",
        "num_layers": 3,
        "norm_unit_offset": True,
        "norm_last": True,
        "qk_norm": True,
        "scale_embeddings": True,
        "sliding_window": 3,
        "window_layers": (True, False, True),
        "local_rotary_wavelength": 9.0,
        "rotary_scaling": LINEAR,
    },
}
VARIANTS = pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)


def build(head="causal_lm", **changes):
    return randomize(Llama(dataclasses.replace(CONFIG, **changes), head=head, name="llama"))


def expected(model, ids, bias=None):
    config, layers = model.config, []
    for number in range(config.num_layers):
        windowed = config.sliding_window and (not config.window_layers or config.window_layers[number])
        local = windowed and config.local_rotary_wavelength
        rotary = not config.rotary_layers or config.rotary_layers[number]
        layers.append(
            {
                "sliding_window": config.sliding_window if windowed else None,
                "wavelength": (local or config.rotary_wavelength) if rotary else None,
                "rotary_scaling": None if local else config.rotary_scaling,
            }
        )
    scalar = config.query_pre_attention_scalar
    return llama(
        arrays(model),
        ids,
        layers=layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        activation=config.activation,
        epsilon=config.norm_epsilon,
        offset=config.norm_unit_offset,
        norm_last=config.norm_last,
        qk_norm=config.qk_norm,
        query_scale=None if scalar is None else 1 / math.sqrt(scalar),
        score_cap=config.score_cap,
        logit_cap=config.logit_cap,
        embedding_scale=math.sqrt(config.dim) if config.scale_embeddings else 1.0,
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
        model, mask = build(), np.array([[1] * 9, [1, 1, 1, 0, 1, 0, 0, 0, 0]])
        right = expected(model, IDS, bias=np.where(mask, 0.0, -np.inf)[:, None, None])
        assert_close(model(IDS, attention_mask=mask), right)

    def test_causal_to_the_last_bit(self):
        model, changed = build(), IDS.copy()
        changed[:, 4] = (changed[:, 4] + 1) % 19
        before, after = to_numpy(model(IDS)), to_numpy(model(changed))
        np.testing.assert_array_equal(before[:, :4], after[:, :4])
        assert (np.abs(before[:, 4:] - after[:, 4:]).max(-1) > 1e-3).all()

    def test_a_window_hides_what_is_too_far_to_the_last_bit(self):
        model, changed = build(num_layers=1, sliding_window=3), IDS.copy()
        changed[:, 0] = (changed[:, 0] + 1) % 19
        before, after = to_numpy(model(IDS)), to_numpy(model(changed))
        np.testing.assert_array_equal(before[:, 3:], after[:, 3:])
        assert (np.abs(before[:, :3] - after[:, :3]).max(-1) > 1e-3).all()

    def test_embeddings_are_scaled_in_their_own_precision(self):
        model = Llama(dataclasses.replace(CONFIG, scale_embeddings=True), dtype="mixed_bfloat16")
        vectors = model._embed(IDS, None, False)
        table = tf.gather(tf.cast(model.token_embedding.embeddings.value, "bfloat16"), IDS)
        right = table * tf.constant(math.sqrt(24), "bfloat16")
        np.testing.assert_array_equal(to_numpy(vectors), to_numpy(right))

    def test_dropout_is_for_training_only(self):
        model = build(attention_dropout=0.5)
        np.testing.assert_array_equal(to_numpy(model(IDS)), to_numpy(build()(IDS)))
        outputs = to_numpy(model(IDS, training=True))
        assert np.abs(outputs - to_numpy(model(IDS))).max() > 0.1
        assert {layer.rate for layer in model._flatten_layers() if "rate" in vars(layer)} == {0.0, 0.5}


class TestHeads:
    def test_hidden_states(self):
        model = build(tie_embeddings=True)
        bare = Llama(model.config, head=None, name="llama")
        bare.set_weights(model.get_weights())
        logits = to_numpy(bare(IDS)) @ to_numpy(model.token_embedding.embeddings).T
        assert_close(model(IDS), logits)

    def test_classifier_reads_the_last_token(self):
        model = build(head="classifier", labels=("a", "b", "c"))
        bare = Llama(model.config, head=None)
        bare.set_weights(model.get_weights()[:-1])
        mask = np.array([[1] * 9, [1] * 4 + [0] * 5])
        hidden = to_numpy(bare(IDS, attention_mask=mask))[[0, 1], [8, 3]]
        assert_close(model(IDS, attention_mask=mask), hidden @ to_numpy(model.classifier.kernel))


class TestCache:
    @VARIANTS
    def test_decoding_equals_the_whole(self, changes):
        model = build(**changes)
        right = to_numpy(model(IDS))
        logits, cache = model(IDS[:, :5], cache=used_cache(model, 11), cache_index=0)
        assert_close(logits, right[:, :5])
        logits, cache = model(IDS[:, 5:7], cache=cache, cache_index=tf.constant([5, 5]))
        assert_close(logits, right[:, 5:7])
        logits, cache = model(IDS[:, 7:], cache=cache, cache_index=tf.constant(7))
        assert_close(logits, right[:, 7:])

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_one_graph_serves_all_places(self, jit_compile):
        model = build(**CHANGES["gemma 3"])
        right = to_numpy(model(IDS))
        step = tf.function(model, jit_compile=jit_compile, autograph=False)
        cache = tf.nest.map_structure(tf.constant, used_cache(model, 11))
        for place in (0, 3, 6):
            new = tf.constant(IDS[:, place : place + 3])
            logits, cache = step(new, cache=cache, cache_index=tf.constant([place, place]))
            assert_close(logits, right[:, place : place + 3])
        assert step.experimental_get_tracing_count() == 1

    def test_rows_at_different_places(self):
        model, lengths = build(sliding_window=4), [3, 5]
        new = np.array([[4, 1, 9], [7, 7, 2]], "int32")
        _, cache = model(IDS, cache=used_cache(model, 11), cache_index=0)
        logits, _ = model(new, cache=cache, cache_index=np.array(lengths))
        for row, length in enumerate(lengths):
            whole = np.concatenate([IDS[row, :length], new[row]])[None]
            assert_close(logits[row : row + 1], expected(model, whole)[:, -3:])


class TestGeneric:
    def test_every_property(self):
        check_layer(build(num_layers=1, sliding_window=4), IDS)

    @VARIANTS
    def test_config_and_gradients(self, changes):
        model = build(**changes)
        check_config(model, IDS)
        check_gradients(model, IDS)
        assert LlamaConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config

    def test_smollm2_has_135_million_parameters(self):
        small = LlamaConfig(
            vocabulary_size=49152,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            dim=576,
            intermediate_dim=1536,
            tie_embeddings=True,
        )
        model = Llama(dataclasses.replace(small, num_layers=1, vocabulary_size=1))
        blocks = (small.num_layers - 1) * model.blocks[0].count_params()
        table = (small.vocabulary_size - 1) * small.dim
        assert model.count_params() + blocks + table == 134_515_008


class TestErrors:
    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"num_heads": 5}, "`num_heads` must divide `dim`.* Received: num_heads=5, dim=24"),
            ({"rotary_layers": (True,)}, "`rotary_layers` must say .* Received: 1 values, num_layers=2"),
            ({"window_layers": (True, False)}, "`window_layers` needs `sliding_window`"),
            ({"local_rotary_wavelength": 5.0}, "`local_rotary_wavelength` needs `sliding_window`"),
            (
                {"local_rotary_scaling": LINEAR, "sliding_window": 3},
                "`local_rotary_scaling` needs `local_rotary_wavelength`",
            ),
        ],
    )
    def test_fields_that_do_not_fit_together(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **{"head_dim": None, **changes})

    def test_bad_arguments_reach_the_layers_that_check_them(self):
        for changes, message in (
            ({"num_kv_heads": 4}, "`num_kv_heads` must divide `num_heads`"),
            ({"sliding_window": 0}, "`sliding_window` must be at least 1"),
            ({"rotary_scaling": {"rope_type": "longrope"}}, "`rope_type` of a rotary scaling must be one"),
        ):
            with pytest.raises(ValueError, match=message):
                build(**changes)


def golden_model():
    """A random Llama that transformers wrote, read through the weight table."""
    settings = json.loads((GOLDEN / "config.json").read_text())
    model = find_model_class(settings)(LlamaConfig.from_huggingface(settings), head=find_head(settings))
    tensors, variables = load_file(GOLDEN / "model.safetensors"), model.variables_by_path()
    for name, (paths, transform) in model.weight_map().items():
        for path, array in zip(paths, transform.to_variables(tensors[name]), strict=True):
            variables[path].assign(array)
    return model


class TestGolden:
    def test_logits_and_loss(self):
        model, golden = golden_model(), np.load(GOLDEN / "golden.npz")
        mask = golden["attention_mask"]
        logits = to_numpy(model(golden["input_ids"], attention_mask=mask))
        np.testing.assert_allclose(logits[mask == 1], golden["logits"][mask == 1], atol=1e-4)
        labels = golden["labels"][:, 1:]
        losses = keras.ops.sparse_categorical_crossentropy(
            np.maximum(labels, 0), logits[:, :-1], from_logits=True
        )
        np.testing.assert_allclose(to_numpy(losses)[labels >= 0].mean(), golden["loss"], rtol=1e-5)

    def test_names_are_those_of_the_checkpoint(self):
        assert set(golden_model().weight_map()) == set(load_file(GOLDEN / "model.safetensors"))


class TestWeightMap:
    @VARIANTS
    def test_covers_every_variable_once(self, changes):
        for head in Llama.heads:
            model = build(head, **changes)
            covered = Counter(path for paths, _ in model.weight_map().values() for path in paths)
            assert covered == Counter(model.variables_by_path().keys())


# Settings of a config.json that another version of transformers or another tool wrote, and the fields that
# they stand for.
OLDER = [
    ("llama", {"rope_theta": 500.0}, {"rotary_wavelength": 500.0}),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rotary_scaling": LINEAR}),
    (
        "llama",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 99}, "rope_theta": 5e5},
        {
            "rotary_scaling": {**LLAMA3, "original_max_position_embeddings": 99},
            "rotary_wavelength": 5e5,
        },
    ),
    (
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 7.0}, "max_position_embeddings": 64},
        {
            "rotary_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
            "rotary_wavelength": 7.0,
        },
    ),
    ("llama", {"rope_scaling": {"rope_type": "default"}}, {"rotary_scaling": None}),
    ("llama", {"num_key_value_heads": None, "head_dim": None}, {"num_kv_heads": 4, "head_dim": 6}),
    ("mistral", {}, {"sliding_window": 4096, "window_layers": None, "num_kv_heads": 8}),
    ("mistral", {"sliding_window": None}, {"sliding_window": None}),
    ("qwen2", {}, {"sliding_window": None, "attention_bias": True, "attention_output_bias": False}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 9}, {"sliding_window": None}),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"sliding_window": 9, "window_layers": (False, True, True)},
    ),
    ("qwen3", {}, {"head_dim": 128, "qk_norm": True}),
    ("smollm3", {}, {"rotary_layers": None, "rotary_wavelength": 2e6, "tie_embeddings": True}),
    ("smollm3", {"no_rope_layer_interval": 2}, {"rotary_layers": (True, False, True)}),
    ("smollm3", {"no_rope_layers": [0, 1, 1, 0]}, {"rotary_layers": (False, True, True)}),
    (
        "smollm3",
        {"no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 5},
        {"rotary_layers": (False, True, True), "window_layers": (True, False, False)},
    ),
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None}, {"activation": "gelu_tanh"}),
    ("gemma", {}, {"norm_unit_offset": True, "scale_embeddings": True, "head_dim": 256}),
    (
        "gemma2",
        {"hidden_act": "gelu_pytorch_tanh"},
        {"window_layers": (True, False, True), "score_cap": 50.0, "logit_cap": 30.0, "norm_last": True},
    ),
    ("gemma2", {"attn_logit_softcapping": None}, {"score_cap": None, "query_pre_attention_scalar": 256}),
    (
        "gemma3_text",
        {"rope_theta": 7e5, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rotary_wavelength": 7e5,
            "rotary_scaling": LINEAR,
            "local_rotary_wavelength": 1e4,
            "local_rotary_scaling": None,
            "window_layers": None,  # three layers of a pattern of six, so all
        },
    ),
    (
        "gemma3_text",
        {"sliding_window_pattern": 2, "rope_local_base_freq": 30.0},
        {"window_layers": (True, False, True), "local_rotary_wavelength": 30.0, "logit_cap": None},
    ),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": LINEAR}},
        {"rotary_wavelength": 5.0, "local_rotary_scaling": LINEAR, "local_rotary_wavelength": 1e4},
    ),
]
SIZES = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 24}


class TestHuggingFace:
    @VARIANTS
    def test_round_trip(self, changes):
        config = dataclasses.replace(CONFIG, labels=("a", "b", "c"), **changes)
        written = json.loads(json.dumps(config.to_huggingface()))
        assert written["model_type"] == config.huggingface_type
        assert LlamaConfig.from_huggingface(written) == config

    @pytest.mark.parametrize("model_type, settings, fields", OLDER, ids=str)
    def test_reads_every_spelling(self, model_type, settings, fields):
        config = LlamaConfig.from_huggingface({"model_type": model_type, **SIZES, **settings})
        assert {name: getattr(config, name) for name in fields} == fields
        assert LlamaConfig.from_huggingface(config.to_huggingface()) == config

    @pytest.mark.parametrize(
        "model_type, settings, message",
        [
            ("llama", {"sliding_window": 5}, "must be known.*sliding_window=5"),
            ("llama", {"quantization_config": {"bits": 4}}, "must be known.*quantization_config"),
            ("mistral", {"layer_types": ["full_attention"]}, "must be known.*layer_types"),
            ("gemma", {"use_bidirectional_attention": True}, "must be known"),
            ("gemma2", {"layer_types": ["chunked"] * 3}, "`layer_types` must be of .*'chunked'"),
            (
                "gemma3_text",
                {"attn_logit_softcapping": 5.0},
                "attn_logit_softcapping=None. Received: .*5.0",
            ),
            ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "called sliding_attention and full"),
        ],
    )
    def test_refuses_what_it_does_not_compute(self, model_type, settings, message):
        with pytest.raises(ValueError, match=message):
            LlamaConfig.from_huggingface({"model_type": model_type, **SIZES, **settings})

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"sliding_window": 4}, "'llama' of Hugging Face stands for sliding_window=None"),
            ({"qk_norm": True}, "stands for qk_norm=False. Received: qk_norm=True"),
            ({"huggingface_type": "qwen3"}, "'qwen3' of Hugging Face stands for qk_norm=True"),
            ({"huggingface_type": "qwen2"}, "stands for attention_bias=True"),
        ],
    )
    def test_refuses_to_write_what_the_model_type_has_no_name_for(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes).to_huggingface()

    @pytest.mark.parametrize("model_type, name", [("gemma", "hidden_act"), ("gemma2", "hidden_activation")])
    def test_gemma_calls_its_activation_so(self, model_type, name):
        config = LlamaConfig.from_huggingface({"model_type": model_type, **SIZES})
        assert config.to_huggingface()[name] == "gelu_pytorch_tanh"

    def test_a_dynamic_scaling_begins_behind_the_context(self):
        scaling = {"rope_type": "dynamic", "factor": 4.0}
        model = build(rotary_scaling=scaling)
        np.testing.assert_array_equal(to_numpy(model(IDS)), to_numpy(build()(IDS)))
        assert model.config.to_huggingface()["rope_parameters"] == {**scaling, "rope_theta": 50.0}


# Of each model type at least three unlike configurations: changes to `PARITY_SIZES`.
PARITY_SIZES = {
    "vocab_size": 41,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SHORT_LLAMA3 = {**LLAMA3, "original_max_position_embeddings": 16}
FULL, SLIDING = "full_attention", "sliding_attention"
PARITY = [
    ("llama", {"rms_norm_eps": 1e-2}),
    ("llama", {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": SHORT_LLAMA3}),
    ("llama", {"head_dim": 10, "num_key_value_heads": 6, "hidden_act": "gelu", "rope_parameters": YARN}),
    (
        "llama",
        {"mlp_bias": True, "num_key_value_heads": 1, "rope_parameters": {**LINEAR, "rope_theta": 90.0}},
    ),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None, "head_dim": 8, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 17, "tie_word_embeddings": True, "rope_parameters": YARN}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": [SLIDING, FULL, SLIDING],
            "rope_parameters": {**YARN, "rope_theta": 300.0},
            "tie_word_embeddings": True,
        },
    ),
    ("qwen3", {"head_dim": 8}),
    ("qwen3", {"head_dim": 4, "attention_bias": True, "num_key_value_heads": 6}),
    (
        "qwen3",
        {
            "head_dim": 6,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 0,
            "rope_parameters": LINEAR,
            "rms_norm_eps": 0.1,
        },
    ),
    ("smollm3", {"num_hidden_layers": 5}),
    (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 5, "mlp_bias": True},
    ),
    ("smollm3", {"attention_bias": True, "tie_word_embeddings": False, "rope_parameters": SHORT_LLAMA3}),
    ("gemma", {"head_dim": 8}),
    ("gemma", {"head_dim": 4, "attention_bias": True, "hidden_act": "gelu", "num_key_value_heads": 1}),
    ("gemma", {"head_dim": 6, "rms_norm_eps": 0.1, "rope_parameters": {**LINEAR, "rope_theta": 50.0}}),
    (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    (
        "gemma2",
        {
            "head_dim": 4,
            "sliding_window": 9,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": [FULL, SLIDING, FULL],
        },
    ),
    ("gemma2", {"head_dim": 6, "attention_bias": True, "num_key_value_heads": 6, "rope_parameters": YARN}),
    ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING]}),
    (
        "gemma3_text",
        {
            "head_dim": 6,
            "sliding_window": 7,
            "layer_types": [FULL, SLIDING, FULL],
            "rope_parameters": {
                FULL: {**LINEAR, "rope_theta": 500.0},
                SLIDING: {"rope_type": "default", "rope_theta": 20.0},
            },
            "query_pre_attn_scalar": 10,
        },
    ),
    (
        "gemma3_text",
        {
            "head_dim": 4,
            "num_hidden_layers": 7,
            "sliding_window": 5,
            "final_logit_softcapping": 4.0,
            "attention_bias": True,
        },
    ),
]
HEADS = {"causal_lm": "CausalLM", "classifier": "SequenceClassification", None: ""}


@pytest.mark.reference
@pytest.mark.parametrize("model_type, changes", PARITY, ids=str)
class TestTransformers:
    """Equal to transformers on random weights, on texts longer than windows and unscaled rotations."""

    IDS = np.random.default_rng(5).integers(1, 41, (3, 40))
    MASK = (np.arange(40) < [[40], [23], [31]]).astype("int64")

    @staticmethod
    def build_theirs(config, head):
        import transformers

        auto = getattr(transformers, f"AutoModelFor{HEADS[head]}" if head else "AutoModel")
        return auto.from_config(config, attn_implementation="eager").eval()

    def build_both(self, model_type, changes, head="causal_lm"):
        transformers = pytest.importorskip("transformers")
        from reference.parity import load_into, randomize_torch

        config = transformers.AutoConfig.for_model(model_type, **{**PARITY_SIZES, **changes})
        # Larger weights make scores so steep that float32 itself is no longer good to 1e-4.
        theirs = randomize_torch(self.build_theirs(config, head), scale=0.25)
        settings = json.loads(config.to_json_string(use_diff=False))
        ours = Llama(LlamaConfig.from_huggingface(settings), head=head)
        return theirs, load_into(ours, theirs.state_dict())

    def test_logits_loss_and_decoding(self, model_type, changes):
        import torch

        theirs, ours = self.build_both(model_type, changes)
        labels = np.where(self.MASK, self.IDS, -100)
        with torch.no_grad():
            result = theirs(
                torch.tensor(self.IDS),
                attention_mask=torch.tensor(self.MASK),
                labels=torch.tensor(labels),
            )
        right, counted = result.logits.numpy(), self.MASK == 1
        assert np.abs(right).max() > 1
        logits = to_numpy(ours(self.IDS, attention_mask=self.MASK))
        np.testing.assert_allclose(logits[counted], right[counted], rtol=0, atol=1e-4)
        losses = keras.ops.sparse_categorical_crossentropy(
            self.IDS[:, 1:], logits[:, :-1], from_logits=True
        )
        loss = to_numpy(losses)[self.MASK[:, 1:] == 1].mean()
        np.testing.assert_allclose(loss, result.loss.item(), rtol=1e-5)

        for jit_compile in (False, True):  # a column per row, several new tokens
            decode = tf.function(ours, jit_compile=jit_compile, autograph=False)
            cache = ours.make_cache(3, 48)
            for place in range(0, 40, 8):
                ids, index = tf.constant(self.IDS[:, place : place + 8]), tf.constant([place] * 3)
                logits, cache = decode(ids, cache=cache, cache_index=index)
                seen, part = counted[:, place : place + 8], right[:, place : place + 8]
                # Either is up to 6e-5 from float64, and by which of its sums depends on the processor.
                np.testing.assert_allclose(to_numpy(logits)[seen], part[seen], rtol=1e-4, atol=1e-4)

    def test_other_heads(self, model_type, changes):
        import torch

        ids = np.where(self.MASK, self.IDS, 0)
        for head in ("classifier", None):
            theirs, ours = self.build_both(model_type, changes, head)
            with torch.no_grad():
                result = theirs(torch.tensor(ids), attention_mask=torch.tensor(self.MASK))
            actual = to_numpy(ours(ids, attention_mask=self.MASK))
            if head is None:
                right = result.last_hidden_state.numpy()[self.MASK == 1]
                np.testing.assert_allclose(actual[self.MASK == 1], right, rtol=0, atol=1e-4)
            else:
                np.testing.assert_allclose(actual, result.logits.numpy(), rtol=0, atol=1e-4)

    def test_transformers_reads_the_config_that_we_write(self, model_type, changes, tmp_path):
        import torch
        import transformers

        for head in HEADS:
            theirs, ours = self.build_both(model_type, changes, head)
            written = {"pad_token_id": 0, **ours.huggingface_config()}
            (tmp_path / "config.json").write_text(json.dumps(written))
            config = transformers.AutoConfig.from_pretrained(tmp_path)
            assert config.architectures == [type(theirs).__name__]
            again = self.build_theirs(config, head)
            again.load_state_dict(theirs.state_dict())
            with torch.no_grad():
                right, actual = (model(torch.tensor(self.IDS[:1]))[0] for model in (theirs, again))
            torch.testing.assert_close(actual, right, rtol=0, atol=0)
            assert LlamaConfig.from_huggingface(config.to_dict()) == ours.config
