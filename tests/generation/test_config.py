import dataclasses
import json
import math
import re
import warnings

import numpy as np
import pytest

from kerasllm import GenerationConfig
from kerasllm.generation.processors import settings_arrays


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(),
        GenerationConfig(temperature=0.7, top_k=5, seed=3, min_p=0.1, typical_p=0.9),
        GenerationConfig(logit_bias={3: 1.5}, suppress_tokens=[4, 5], stop_strings="x", stop_token_ids=7),
        GenerationConfig(num_beams=4, length_penalty=2.0, early_stopping="never", min_new_tokens=3),
        GenerationConfig(penalty_alpha=0.6, top_k=4),
        GenerationConfig(repetition_penalty=1.2, no_repeat_ngram_size=3, prompt_lookup_num_tokens=5),
    ],
    ids=str,
)
def test_round_trip_through_hugging_face(config):
    values = json.loads(json.dumps(config.to_huggingface(eos_id=2)))
    assert values.pop("eos_token_id") == 2
    assert values["do_sample"] == (config.temperature > 0)
    assert values["temperature"] > 0  # transformers refuses 0
    assert GenerationConfig.from_huggingface(values) == config


def test_files_of_transformers():
    read = GenerationConfig.from_huggingface
    assert read({"_from_model_config": True, "transformers_version": "5"}) == GenerationConfig()
    # Only what differs from its defaults is written there.
    assert read({"do_sample": True}) == GenerationConfig(temperature=1.0, top_k=50)
    sampled = read({"do_sample": True, "temperature": 0.6, "top_k": None, "num_beams": 1})
    assert sampled == GenerationConfig(temperature=0.6, top_k=50)
    assert read({"temperature": 0.6}).temperature == 0  # no do_sample: greedy


@pytest.mark.parametrize(
    ("values", "config"),
    [
        # meta-llama/Llama-2-7b-chat-hf
        (
            {"bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0,
             "temperature": 0.6, "top_p": 0.9},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": 2},
        ),
        # meta-llama/Llama-3.1-8B-Instruct: several end tokens
        (
            {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009],
             "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.42.3"},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": (128001, 128008, 128009)},
        ),
        # Qwen/Qwen2.5-0.5B-Instruct
        (
            {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True,
             "eos_token_id": [151645, 151643], "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8,
             "top_k": 20},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.1,
             "eos_token_id": (151645, 151643)},
        ),
        # Helsinki-NLP/opus-mt-en-de
        (
            {"bad_words_ids": [[58100]], "decoder_start_token_id": 58100, "eos_token_id": 0,
             "forced_eos_token_id": None, "max_length": 512, "num_beams": 6},
            {"suppress_tokens": (58100,), "num_beams": 6, "eos_token_id": 0},
        ),
    ],
)  # fmt: skip
def test_published_files(values, config):
    assert GenerationConfig.from_huggingface(values) == GenerationConfig(**config)


def test_beams_of_drawn_tokens_are_left_out():
    values = {"do_sample": True, "num_beams": 4, "temperature": 0.6, "penalty_alpha": 0.6}
    with pytest.warns(UserWarning, match="`num_beams` is left out. Received: do_sample=True, num_beams=4"):
        config = GenerationConfig.from_huggingface(values)
    assert config == GenerationConfig(temperature=0.6, top_k=50)
    with pytest.raises(ValueError, match="`num_beams` needs temperature=0"):
        dataclasses.replace(config, num_beams=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GenerationConfig.from_huggingface({**values, "do_sample": False, "penalty_alpha": None}) == (
            GenerationConfig(num_beams=4)
        )
        assert GenerationConfig.from_huggingface({**values, "num_beams": 1}) == config
    with pytest.raises(ValueError, match="`num_beams` must be"):
        GenerationConfig.from_huggingface({"do_sample": True, "num_beams": 0})


@pytest.mark.parametrize("name", ["guidance_scale", "num_beam_groups", "min_length", "watermarking_config"])
def test_what_is_not_offered_is_refused(name):
    with pytest.raises(ValueError, match=f"Received: {name}=3"):
        GenerationConfig.from_huggingface({name: 3})
    assert GenerationConfig.from_huggingface({name: None}) == GenerationConfig()


def test_words_of_several_tokens_are_refused():
    for name, value in (("bad_words_ids", [[1], [2, 3]]), ("sequence_bias", [[[2, 3], 1.0]])):
        with pytest.raises(ValueError, match=f"`{name}` .* must be .*single tokens"):
            GenerationConfig.from_huggingface({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("min_new_tokens", -1),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", "warm"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.1),
        ("typical_p", 0.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("no_repeat_ngram_size", -2),
        ("num_beams", 0),
        ("penalty_alpha", 1.5),
        ("prompt_lookup_num_tokens", -1),
        ("num_assistant_tokens", 0),
        ("seed", 2**31),
        ("seed", 0.5),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .* Received: {name}={re.escape(repr(value))}"):
        GenerationConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stopping": "maybe"}, '`early_stopping` must be True, False or "never"'),
        ({"stop_strings": ["a", ""]}, "`stop_strings` must not be empty"),
        ({"stop_strings": [3]}, "`stop_strings` must hold str"),
        ({"suppress_tokens": "abc"}, "`suppress_tokens` must hold int"),
        ({"stop_token_ids": [-3]}, "`stop_token_ids` must hold ids"),
        ({"eos_token_id": 1.5}, "`eos_token_id` must hold int"),
        ({"logit_bias": {3: math.nan}}, "`logit_bias` must map"),
        ({"logit_bias": [3]}, "`logit_bias` must map"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "`min_new_tokens` must be at most"),
        ({"num_beams": 2, "penalty_alpha": 0.5, "top_k": 4}, "exclude each other"),
        ({"num_beams": 2, "temperature": 1.0}, "`num_beams` needs temperature=0"),
        ({"num_beams": 2, "stop_strings": "a"}, "no `stop_strings`"),
        ({"penalty_alpha": 0.5}, "`penalty_alpha` needs `top_k`"),
    ],
)
def test_what_does_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**settings)


def test_end_ids():
    assert GenerationConfig().end_ids(4) == (4,)
    assert GenerationConfig().end_ids(None) == ()
    assert GenerationConfig(eos_token_id=[5, 6], stop_token_ids=[6, 7]).end_ids(4) == (5, 6, 7)
    assert GenerationConfig(eos_token_id=(), stop_token_ids=3).end_ids(4) == (3,)


def test_whole_numbers_of_any_kind():
    config = GenerationConfig(seed=np.int64(3), top_k=np.int32(4))
    assert (config.seed, config.top_k) == (3, 4) and type(config.seed) is int
    for ids in (np.int64(5), np.array(5)):
        assert GenerationConfig(eos_token_id=ids).eos_token_id == (5,)
    for ids in (np.array([5, 6], np.int32), [np.int64(5), 6], (np.int32(5), np.uint8(6))):
        config = GenerationConfig(eos_token_id=ids, stop_token_ids=ids, suppress_tokens=ids)
        assert config.eos_token_id == config.stop_token_ids == config.suppress_tokens == (5, 6)
        json.dumps(config.to_huggingface(None))
    for ids in (np.array([5.0]), [np.float32(5)], [True], np.array([True]), "ab", ["a"], [[5]]):
        with pytest.raises(ValueError, match="`eos_token_id` must hold int values"):
            GenerationConfig(eos_token_id=ids)
    for settings in ({"top_k": 2**40}, {"seed": 2**31}, {"num_beams": 1.5}):
        with pytest.raises(ValueError, match="must be an integer of 32 bits"):
            GenerationConfig(**settings)
    with pytest.raises(ValueError, match="`early_stopping` must be"):
        GenerationConfig(early_stopping=1)


def test_end_tokens_must_be_tokens_of_the_model():
    with pytest.raises(ValueError, match=r"must be tokens of the model, which are 60. Received: \[60\]"):
        settings_arrays([GenerationConfig()], [(7, 60)], 60)
