import pytest

from kerasllm import GenerationConfig


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(temperature=0.7, top_k=5, seed=3)])
def test_round_trip_through_hugging_face(config):
    values = config.to_huggingface(eos_id=2)
    assert values["eos_token_id"] == 2
    assert values["do_sample"] == (config.temperature > 0)
    assert values["temperature"] > 0  # transformers refuses 0
    assert GenerationConfig.from_huggingface(values) == config


def test_foreign_file_keeps_defaults():
    config = GenerationConfig.from_huggingface({"max_length": 20, "temperature": 0.6, "top_k": None})
    assert config == GenerationConfig()


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0)]
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .* Received: {name}={value}"):
        GenerationConfig(**{name: value})
