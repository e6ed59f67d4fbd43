import dataclasses
import json

import numpy as np
import pytest

from kerasllm.models import GPT2, MODELS, GPT2Config, ModelConfig, find_head, find_model_class
from kerasllm.models.base import SAME, SPLIT_IN_THREE


class TestConfig:
    def test_dictionary_and_back(self):
        config = ModelConfig(vocabulary_size=11, context_length=7)
        assert config.to_dict().items() >= {"vocabulary_size": 11, "context_length": 7}.items()
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert json.loads(json.dumps(config.to_dict())) == config.to_dict()

    def test_unknown_keys(self):
        with pytest.raises(ValueError, match=r"fields .*'dim'.*Received: \['hidden', 'n_embd'\]"):
            GPT2Config.from_dict({"n_embd": 8, "hidden": 3, "dim": 8})

    def test_missing_keys(self):
        with pytest.raises(ValueError, match=r"Missing: \['context_length'\]"):
            ModelConfig.from_dict({"vocabulary_size": 11})

    def test_hugging_face_and_back(self):
        config = GPT2Config(vocabulary_size=11, activation="gelu_tanh", tie_embeddings=False)
        values = config.to_huggingface()
        assert (values["vocab_size"], values["activation_function"]) == (11, "gelu_new")
        assert GPT2Config.from_huggingface(values) == config
        # Left out there as here: the defaults of both are GPT-2 small.
        assert GPT2Config.from_huggingface({"model_type": "gpt2", "n_layer": 3}) == GPT2Config(num_layers=3)

    @pytest.mark.parametrize(
        "values, message",
        [
            ({"scale_attn_weights": False}, "stands for scale_attn_weights=True. Received: .*=False"),
            ({"rope_theta": 10000.0}, "must be known.* Received for GPT2Config: rope_theta=10000.0"),
            ({"model_type": "gpt3"}, r"must be one of \['gpt2'\]. Received: 'gpt3'"),
            ({"n_embd": 8, "resid_pdrop": 0.2}, r"\['attn_pdrop', .*\] must be equal"),
            ({"id2label": {"0": "a", "2": "b"}}, "`id2label` must map the numbers from 0 on"),
            ({"id2label": ["a"]}, "`id2label` must map the numbers from 0 on"),
        ],
    )
    def test_hugging_face_configs_that_mean_something_else(self, values, message):
        with pytest.raises(ValueError, match=message):
            GPT2Config.from_huggingface({"model_type": "gpt2", "attn_pdrop": 0.1, **values})

    def test_a_feature_that_is_off_needs_no_name(self):
        values = {"model_type": "gpt2", "new_feature": False, "other": None}
        assert GPT2Config.from_huggingface(values) == GPT2Config()

    def test_names_of_old_files(self):
        """As GPT-2's published larger sizes and exports of transformers 2 to 4 have them."""
        values = {
            "model_type": "gpt2", "n_special": 0, "predict_special_tokens": True, "output_past": True,
            "torchscript": True, "do_sample": True, "max_length": 50,
        }  # fmt: skip
        assert GPT2Config.from_huggingface(values) == GPT2Config()

    def test_labels(self):
        values = {"model_type": "gpt2", "id2label": {"1": "ham", "0": "spam"}}
        config = GPT2Config.from_huggingface(values)
        assert config.labels == ("spam", "ham")
        assert config.to_huggingface()["label2id"] == {"spam": 0, "ham": 1}

    def test_what_the_spelling_has_no_name_for(self):
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Config(GPT2Config):
            new_field: int = 3

        with pytest.raises(ValueError, match="stands for new_field=3. Received: new_field=4"):
            Config(new_field=4).to_huggingface()

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            ModelConfig(vocabulary_size=11, context_length=7).context_length = 8


@pytest.mark.parametrize("model_type", MODELS)
def test_families_are_consistent(model_type):
    family = MODELS[model_type]
    config_class, dialect = family.config_class, family.config_class.dialects[model_type]
    fields = {field.name for field in dataclasses.fields(config_class)}
    assert {*dialect.names.values(), *dialect.defaults} <= fields
    assert set(dialect.architectures) == set(family.heads)
    assert set(dialect.head_weights) <= set(family.heads)
    assert config_class.__name__ == f"{family.__name__}Config"
    assert find_model_class({"model_type": model_type}) is family
    for head, architecture in dialect.architectures.items():
        assert find_head({"model_type": model_type, "architectures": [architecture]}) == head


def test_unknown_families_and_heads():
    with pytest.raises(ValueError, match="`model_type` must be one of .*Received: 'mamba'"):
        find_model_class({"model_type": "mamba"})
    with pytest.raises(ValueError, match="`architectures` of a gpt2 must be one of .*Received"):
        find_head({"model_type": "gpt2", "architectures": ["GPT2DoubleHeadsModel"]})
    with pytest.raises(ValueError, match="`head` of a GPT2 must be one of .*Received: 'seq2seq'"):
        GPT2(GPT2Config(num_layers=1, dim=12, vocabulary_size=5), head="seq2seq")


class TestCheckpointNames:
    config = GPT2Config(num_layers=1, dim=12, vocabulary_size=5, tie_embeddings=False)
    body = ["transformer.wte.weight", "transformer.h.0.ln_1.bias"]

    def test_bare_body_and_buffers(self):
        names = ["wte.weight", "h.0.attn.bias", "h.0.attn.masked_bias", "h.0.attn.c_attn.bias"]
        assert GPT2(self.config).checkpoint_names(names) == {
            "wte.weight": "transformer.wte.weight",
            "h.0.attn.c_attn.bias": "transformer.h.0.attn.c_attn.bias",
        }
        assert GPT2(self.config, head=None).checkpoint_names(names[:1]) == {"wte.weight": "wte.weight"}

    def test_other_heads_are_left_out_and_unknown_names_stay(self):
        names = [*self.body, "lm_head.weight", "score.weight", "what.is.this"]
        found = GPT2(self.config, head="classifier").checkpoint_names(names)
        assert found == {name: name for name in [*self.body, "score.weight", "what.is.this"]}
        found = GPT2(self.config, head=None).checkpoint_names(names)
        assert found == {
            **{name: name.removeprefix("transformer.") for name in self.body},
            "what.is.this": "what.is.this",
        }

    @pytest.mark.parametrize("head", GPT2.heads)
    def test_every_weight_has_a_tensor(self, head):
        model = GPT2(self.config, head=head)
        filled = [path for paths, _ in model.weight_map().values() for path in paths]
        assert sorted(filled) == sorted(model.variables_by_path())
        assert model.head_tensors() <= set(model.weight_map())


class TestTransforms:
    def test_same(self):
        tensor = np.arange(6.0).reshape(2, 3)
        assert SAME.to_tensor(SAME.to_variables(tensor)) is tensor

    @pytest.mark.parametrize("shape", [(2, 6), (6,)])
    def test_split_in_three(self, shape):
        tensor = np.arange(np.prod(shape)).reshape(shape)
        query, key, value = SPLIT_IN_THREE.to_variables(tensor)
        assert [part[..., 0].ravel()[0] for part in (query, key, value)] == [0, 2, 4]
        assert query.shape == key.shape == value.shape == (*shape[:-1], 2)
        np.testing.assert_array_equal(SPLIT_IN_THREE.to_tensor([query, key, value]), tensor)
