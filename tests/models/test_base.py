import dataclasses

import numpy as np
import pytest

from kerasllm.models import MODELS, GPT2Config, ModelConfig
from kerasllm.models.base import SAME, SPLIT_IN_THREE


class TestConfig:
    def test_dictionary_and_back(self):
        config = ModelConfig(vocabulary_size=11, context_length=7)
        assert config.to_dict() == {"vocabulary_size": 11, "context_length": 7}
        assert ModelConfig.from_dict(config.to_dict()) == config

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
            ({"rope_theta": 10000.0}, "must be known. Received for GPT2Config: rope_theta=10000.0"),
        ],
    )
    def test_hugging_face_configs_that_mean_something_else(self, values, message):
        with pytest.raises(ValueError, match=message):
            GPT2Config.from_huggingface(values)

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            ModelConfig(vocabulary_size=11, context_length=7).context_length = 8


@pytest.mark.parametrize("model_type", MODELS)
def test_families_are_consistent(model_type):
    config_class = MODELS[model_type].config_class
    fields = {field.name for field in dataclasses.fields(config_class)}
    names = config_class.huggingface_names
    assert set(names.values()) == fields  # every field is written, and read back
    assert config_class.__name__ == f"{MODELS[model_type].__name__}Config"


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
