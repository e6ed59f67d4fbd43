import pytest

from kerasllm import GenerationConfig


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(temperature=0.7, top_k=5, seed=3)])
def test_round_trip_through_hugging_face(config):
    values = config.to_huggingface(eos_id=2)
    assert values["eos_token_id"] == 2
    assert values["do_sample"] == (config.temperature > 0)
    assert values["temperature"] > 0  # transformers refuses 0
    assert GenerationConfig.from_huggingface(values) == config


def test_files_of_transformers():
    read = GenerationConfig.from_huggingface
    assert (
        read({"_from_model_config": True, "eos_token_id": 2, "transformers_version": "5"})
        == GenerationConfig()
    )
    # Only what differs from its defaults is written there.
    assert read({"do_sample": True}) == GenerationConfig(temperature=1.0, top_k=50)
    sampled = read({"do_sample": True, "temperature": 0.6, "top_k": None, "num_beams": 1})
    assert sampled == GenerationConfig(temperature=0.6, top_k=50)
    assert read({"temperature": 0.6}).temperature == 0  # no do_sample: greedy


@pytest.mark.parametrize("name", ["repetition_penalty", "num_beams", "max_length", "watermarking_config"])
def test_what_is_not_offered_is_refused(name):
    with pytest.raises(ValueError, match=f"Received: {name}=3"):
        GenerationConfig.from_huggingface({name: 3})


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_k", -1), ("top_p", 0.0)]
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .* Received: {name}={value}"):
        GenerationConfig(**{name: value})
