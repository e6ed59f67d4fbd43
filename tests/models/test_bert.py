import dataclasses
import json
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest
from reference.checks import assert_close, check_config, check_gradients, check_layer, to_numpy
from reference.maths import ACTIVATIONS, below, bert, dense, masked_token_scores
from reference.weights import arrays, randomize
from safetensors.numpy import load_file, save_file

from kerasllm.checkpoints import load_folder, save_folder
from kerasllm.models import Bert, BertConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "bert"
CONFIG = BertConfig(
    vocabulary_size=23,
    context_length=9,
    num_layers=2,
    num_heads=2,
    dim=8,
    intermediate_dim=20,
    layer_norm_epsilon=1e-3,
)
IDS = np.random.default_rng(1).integers(2, 23, (2, 7)).astype("int32")
TYPES = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 1]], "int32")
MASK = np.array([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
VARIANTS = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "activation": "relu"},
        {"padding_id": 1, "token_types": 1, "activation": "gelu_tanh", "head_activation": "gelu"},
        {"token_types": 0, "num_heads": 4, "num_layers": 1, "layer_norm_epsilon": 1e-12},
    ],
    ids=["bert", "untied", "counted positions", "no token types"],
)
MODEL_TYPES = sorted(BertConfig.dialects)


def build(head="masked_lm", **changes):
    return randomize(Bert(dataclasses.replace(CONFIG, **changes), head=head, name="bert"))


def hidden_states(model, ids, types=None, mask=None):
    config = model.config
    return bert(
        arrays(model),
        ids,
        types,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        activation=config.activation,
        epsilon=config.layer_norm_epsilon,
        padding_id=config.padding_id,
        bias=None if mask is None else np.where(mask, 0.0, -np.inf)[:, None, None],
    )


class TestNumerics:
    @VARIANTS
    def test_hidden_states_match_numpy(self, changes):
        model = build(head=None, **changes)
        ids = np.where(MASK, IDS, 1)
        assert_close(model(ids, attention_mask=MASK), hidden_states(model, ids, mask=MASK))

    @VARIANTS
    def test_masked_lm_matches_numpy(self, changes):
        model = build(**changes)
        expected = masked_token_scores(
            arrays(model),
            hidden_states(model, IDS),
            activation=model.config.head_activation or model.config.activation,
            epsilon=model.config.layer_norm_epsilon,
        )
        assert_close(model(IDS), expected)

    @pytest.mark.parametrize("activation", ["tanh", "relu"])
    def test_classifier_matches_numpy(self, activation):
        model = build("classifier", classifier_activation=activation, labels=("a", "b", "c"))
        weights, function = arrays(model), {"tanh": np.tanh, "relu": ACTIVATIONS["relu"]}[activation]
        first = hidden_states(model, IDS, TYPES)[:, 0]
        hidden = function(dense(below(weights, "classifier_dense"), first))
        expected = dense(below(weights, "classifier"), hidden)
        assert_close(model(IDS, token_type_ids=TYPES), expected)

    def test_token_types(self):
        model = build(head=None)
        assert_close(model(IDS, token_type_ids=TYPES), hidden_states(model, IDS, TYPES))
        np.testing.assert_array_equal(to_numpy(model(IDS)), to_numpy(model(IDS, token_type_ids=0 * TYPES)))

    @pytest.mark.parametrize("padding_id", [None, 1])
    def test_padding_on_the_right_changes_nothing(self, padding_id):
        model = build(head=None, padding_id=padding_id)
        padded = to_numpy(model(np.where(MASK, IDS, 1), attention_mask=MASK))
        assert_close(padded[1:, :4], to_numpy(model(IDS[1:, :4])), tolerance=1e-6)

    def test_counted_positions_pass_over_padding_on_the_left(self):
        model, mask = build(head=None, padding_id=1), MASK[:, ::-1]
        padded = to_numpy(model(np.where(mask, IDS, 1), attention_mask=mask))
        assert_close(padded[1:, 3:], to_numpy(model(IDS[1:, 3:])), tolerance=1e-6)

    def test_dropout_is_for_training_only(self):
        model, calm = build("classifier", dropout=0.5), build("classifier", dropout=0.0)
        np.testing.assert_array_equal(to_numpy(model(IDS)), to_numpy(calm(IDS)))
        assert np.abs(to_numpy(model(IDS, training=True)) - to_numpy(model(IDS))).max() > 0.1

    @pytest.mark.parametrize(
        "which",
        ["dropout", "attention_dropout", "attention_output_dropout", "classifier_dropout"],
    )
    def test_each_dropout_is_applied(self, which):
        off = {
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "attention_output_dropout": 0.0,
            "classifier_dropout": 0.0,
        }
        calm, model = build("classifier", **off), build("classifier", **{**off, which: 0.5})
        np.testing.assert_array_equal(to_numpy(calm(IDS, training=True)), to_numpy(calm(IDS)))
        assert np.abs(to_numpy(model(IDS, training=True)) - to_numpy(calm(IDS))).max() > 1e-3


class TestGeneric:
    def test_every_property(self):
        check_layer(build(num_layers=1), IDS, no_gradient=["key/bias"])

    @pytest.mark.parametrize("head", Bert.heads)
    def test_config_and_gradients(self, head):
        model = build(head, padding_id=1, token_types=1, tie_embeddings=False)
        check_config(model, IDS)
        check_gradients(model, IDS, no_gradient=["key/bias"])

    @pytest.mark.parametrize("tied", [True, False])
    def test_tying_survives(self, tied, tmp_path):
        model = build(tie_embeddings=tied)
        model.save(tmp_path / "model.keras")
        copy = keras.models.load_model(tmp_path / "model.keras")
        assert isinstance(copy, Bert) and copy.config == model.config
        assert ("head/kernel" in copy.variables_by_path()) != tied
        np.testing.assert_array_equal(to_numpy(copy(IDS)), to_numpy(model(IDS)))

    def test_bert_base_has_110_million_parameters(self):
        base = BertConfig()
        small = dataclasses.replace(base, num_layers=1, vocabulary_size=1, context_length=1)
        model = Bert(small, head=None)
        blocks = (base.num_layers - 1) * model.blocks[0].count_params()
        tables = (base.vocabulary_size - 1 + base.context_length - 1) * base.dim
        pooler = base.dim * (base.dim + 1)
        assert model.count_params() + blocks + tables + pooler == 109_482_240


class TestErrors:
    def test_longer_than_the_context(self):
        with pytest.raises(ValueError, match="Received: 10 tokens, context_length=9"):
            build(padding_id=1)(np.zeros((1, 10), "int32"))

    def test_token_types_that_the_model_does_not_know(self):
        with pytest.raises(ValueError, match="the model knows no token types"):
            build(token_types=0)(IDS, token_type_ids=TYPES)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"token_types": -1}, "`token_types` must be at least 0. Received: token_types=-1"),
            ({"head_activation": "swish"}, "`head_activation` must be None or one of .*'swish'"),
            ({"classifier_activation": "gelu"}, "`classifier_activation` must be .*Received: 'gelu'"),
        ],
    )
    def test_bad_fields(self, changes, message):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes)


class TestHuggingFaceConfig:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    def test_there_and_back(self, model_type):
        config = BertConfig.from_huggingface({"model_type": model_type, "id2label": {"0": "x"}})
        assert BertConfig.from_huggingface(config.to_huggingface()) == config

    def test_roberta_base(self):
        values = {"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1}
        config = BertConfig.from_huggingface(values)
        assert (config.context_length, config.padding_id, config.drop_classifier_input) == (512, 1, True)
        assert config.to_huggingface()["max_position_embeddings"] == 514

    def test_distilbert(self):
        config = BertConfig.from_huggingface({"model_type": "distilbert", "n_heads": 3})
        assert (config.num_layers, config.num_heads, config.token_types) == (6, 3, 0)
        assert (config.classifier_activation, config.attention_output_dropout) == ("relu", 0.0)

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"model_type": "bert", "is_decoder": True}, "stands for is_decoder=False"),
            (
                {"model_type": "bert", "position_embedding_type": "relative_key"},
                "stands for position_embedding_type='absolute'. Received: .*='relative_key'",
            ),
            ({"model_type": "roberta", "pad_token_id": None}, "counts positions from `pad_token_id` on"),
            ({"model_type": "bert", "embedding_size": 5}, "must be known. .*embedding_size=5"),
        ],
    )
    def test_what_means_something_else(self, values, message):
        with pytest.raises(ValueError, match=message):
            BertConfig.from_huggingface(values)

    def test_what_a_spelling_has_no_name_for(self):
        config = dataclasses.replace(CONFIG, huggingface_type="distilbert", layer_norm_epsilon=1e-12)
        with pytest.raises(ValueError, match="stands for token_types=0. Received: token_types=2"):
            config.to_huggingface()


class TestWeights:
    @pytest.mark.parametrize("model_type", MODEL_TYPES)
    @pytest.mark.parametrize("head", Bert.heads)
    def test_every_weight_has_a_tensor(self, model_type, head):
        config = BertConfig.from_huggingface({"model_type": model_type})
        small = {"vocabulary_size": 7, "dim": 8, "num_heads": 2, "intermediate_dim": 3, "num_layers": 2}
        model = Bert(dataclasses.replace(config, context_length=4, **small), head)
        filled = Counter(path for paths, _ in model.weight_map().values() for path in paths)
        assert filled == Counter(model.variables_by_path().keys())

    def test_older_names_and_what_is_not_read(self):
        names = [
            "bert.embeddings.LayerNorm.gamma",
            "bert.encoder.layer.1.output.LayerNorm.beta",
            "bert.embeddings.position_ids",
            "bert.pooler.dense.weight",
            "cls.predictions.decoder.weight",
            "cls.seq_relationship.bias",
        ]
        assert build().checkpoint_names(names) == {
            "bert.embeddings.LayerNorm.gamma": "bert.embeddings.LayerNorm.weight",
            "bert.encoder.layer.1.output.LayerNorm.beta": "bert.encoder.layer.1.output.LayerNorm.bias",
        }

    def test_the_pooler_is_the_classifiers(self):
        bare = ["pooler.dense.weight", "embeddings.LayerNorm.bias"]
        assert build(head=None).checkpoint_names(bare) == {bare[1]: bare[1]}
        assert build("classifier").checkpoint_names(bare) == {name: f"bert.{name}" for name in bare}
        roberta = build("classifier", huggingface_type="roberta", padding_id=1)
        assert roberta.checkpoint_names(["roberta.pooler.dense.weight", "pooler.dense.bias"]) == {}

    @pytest.mark.parametrize("with_pooler", [False, True])
    def test_a_classifier_grows_on_a_masked_lm(self, with_pooler, tmp_path):
        trained = build()
        save_folder(tmp_path, trained)
        if with_pooler:  # as in the files that BERT came in
            tensors = load_file(tmp_path / "model.safetensors")
            tensors["bert.pooler.dense.weight"] = np.full((8, 8), 0.25, "float32")
            tensors["bert.pooler.dense.bias"] = np.full(8, 0.5, "float32")
            save_file(tensors, tmp_path / "model.safetensors")
        with pytest.warns(UserWarning, match="has no head 'classifier': that head is new"):
            model = load_folder(tmp_path, head="classifier").model
        weights, body = arrays(model), arrays(trained)
        np.testing.assert_array_equal(
            weights["block_1/attention/key/kernel"], body["block_1/attention/key/kernel"]
        )
        assert (weights["classifier_dense/bias"] == 0.5).all() == with_pooler
        assert (weights["classifier_dense/kernel"] == 0.25).all() == with_pooler
        assert 0 < weights["classifier/kernel"].std() < 0.1

    def test_golden_checkpoint_of_transformers(self):
        golden = np.load(GOLDEN / "golden.npz")
        model = Bert(BertConfig.from_huggingface(json.loads((GOLDEN / "config.json").read_text())))
        tensors, variables = load_file(GOLDEN / "model.safetensors"), model.variables_by_path()
        names = model.checkpoint_names(tensors)
        assert set(names) == set(tensors) and set(names.values()) == set(model.weight_map())
        for name, own_name in names.items():
            paths, transform = model.weight_map()[own_name]
            arrays = transform.to_variables(tensors[name])
            variables[paths[0]].assign(arrays[0])
            np.testing.assert_array_equal(transform.to_tensor(arrays), tensors[name])
        mask = golden["attention_mask"]
        logits = to_numpy(
            model(golden["input_ids"], attention_mask=mask, token_type_ids=golden["token_type_ids"])
        )
        np.testing.assert_allclose(logits[mask == 1], golden["logits"][mask == 1], atol=1e-5)
        counted = golden["labels"] != -100
        scores = logits[counted] - np.log(np.exp(logits[counted]).sum(-1, keepdims=True))
        picked = np.take_along_axis(scores, golden["labels"][counted][:, None], -1)
        np.testing.assert_allclose(-picked.mean(), golden["loss"], atol=1e-5)


CONFIGURATIONS = [
    ("Bert", {}),
    ("Bert", {"hidden_act": "relu", "tie_word_embeddings": False, "type_vocab_size": 3}),
    ("Bert", {"hidden_act": "gelu_new", "num_attention_heads": 6, "num_hidden_layers": 3}),
    ("Roberta", {"type_vocab_size": 1}),
    ("Roberta", {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
    ("Roberta", {"pad_token_id": 3, "tie_word_embeddings": False, "num_hidden_layers": 3}),
    ("XLMRoberta", {"type_vocab_size": 1}),
    ("XLMRoberta", {"hidden_act": "gelu_new", "num_attention_heads": 1}),
    ("XLMRoberta", {"layer_norm_eps": 1e-5, "tie_word_embeddings": False}),
    ("DistilBert", {}),
    ("DistilBert", {"activation": "relu", "n_heads": 6}),
    ("DistilBert", {"n_layers": 1, "hidden_dim": 11, "seq_classif_dropout": 0.3}),
]
HEADS = {"masked_lm": "ForMaskedLM", "classifier": "ForSequenceClassification", None: "Model"}


@pytest.mark.reference
class TestTransformers:
    """Equal to transformers on random weights."""

    @staticmethod
    def build_both(kind, changes, head):
        transformers = pytest.importorskip("transformers")
        from reference.parity import load_into, randomize_torch

        config_class = getattr(transformers, f"{kind}Config")
        names = "hidden_size num_hidden_layers num_attention_heads intermediate_size"
        if kind == "DistilBert":
            names = "dim n_layers n_heads hidden_dim"
        sizes = dict(zip(names.split(), (24, 2, 4, 40), strict=True))
        config = config_class(
            **{"vocab_size": 50, "max_position_embeddings": 16, "num_labels": 3, **sizes, **changes}
        )
        theirs = randomize_torch(getattr(transformers, kind + HEADS[head])(config))
        ours = Bert(BertConfig.from_huggingface(config.to_dict()), head)
        return theirs, load_into(ours, theirs.state_dict())

    @staticmethod
    def inputs(config):
        """Ids with padding on the right and, in one row, a padding token in the middle."""
        rng = np.random.default_rng(3)
        padding_id = config.padding_id or 0
        ids, mask = rng.integers(4, 50, (3, 9)), np.ones((3, 9), "int32")
        ids[1, 6:], mask[1, 6:], ids[2, 2] = padding_id, 0, padding_id
        inputs = {"attention_mask": mask}
        if config.token_types > 1:
            inputs["token_type_ids"] = rng.integers(0, config.token_types, (3, 9))
        return ids, inputs

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("kind, changes", CONFIGURATIONS, ids=str)
    def test_scores_and_padding(self, kind, changes, head):
        import torch

        theirs, ours = self.build_both(kind, changes, head)
        ids, inputs = self.inputs(ours.config)
        tensors = {name: torch.tensor(array) for name, array in inputs.items()}
        with torch.no_grad():
            result = theirs(torch.tensor(ids), **tensors)
        expected = (result.last_hidden_state if head is None else result.logits).numpy()
        actual = to_numpy(ours(ids, **inputs))
        counted = np.ones(3, bool) if head == "classifier" else inputs["attention_mask"] == 1
        np.testing.assert_allclose(actual[counted], expected[counted], rtol=0, atol=1e-4)
        assert np.abs(expected).max() > 1
        alone = to_numpy(ours(ids[1:2, :6], **{name: array[1:2, :6] for name, array in inputs.items()}))
        padded = actual[1:2] if head == "classifier" else actual[1:2, :6]
        assert_close(padded, alone)

    @pytest.mark.parametrize("head", HEADS)
    @pytest.mark.parametrize("kind, changes", CONFIGURATIONS[::2], ids=str)
    def test_transformers_loads_what_we_save(self, kind, changes, head, tmp_path):
        import torch
        import transformers

        theirs, ours = self.build_both(kind, changes, head)
        save_folder(tmp_path, ours, None)
        auto = {
            "masked_lm": transformers.AutoModelForMaskedLM,
            "classifier": transformers.AutoModelForSequenceClassification,
            None: transformers.AutoModel,
        }[head]
        loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is type(theirs)
        # The pooler has no reader; in an untied head transformers has a second bias, which it never uses.
        unread = ("pooler.dense", "cls.predictions.bias", "lm_head.bias")
        assert not [n for n in report["missing_keys"] if not any(part in n for part in unread)]
        assert not report["unexpected_keys"] and not report["mismatched_keys"]
        ids, inputs = self.inputs(ours.config)
        tensors = {name: torch.tensor(array) for name, array in inputs.items()}
        with torch.no_grad():
            before, after = (model(torch.tensor(ids), **tensors)[0] for model in (theirs, loaded))
        np.testing.assert_allclose(after.numpy(), before.numpy(), atol=1e-6)
        again = load_folder(tmp_path).model
        assert again.config == ours.config and again.head == ours.head
        np.testing.assert_array_equal(to_numpy(again(ids, **inputs)), to_numpy(ours(ids, **inputs)))
