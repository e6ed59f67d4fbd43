import numpy as np
import pytest
import tensorflow as tf
from reference import generation as reference

from kerasllm import GenerationConfig
from kerasllm.generation.processors import RowSettings, process_scores, settings_arrays
from kerasllm.generation.sampling import FORBIDDEN

VOCABULARY, LENGTH, END_IDS = 9, 24, (2, 5)
SETTINGS = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.4},
    {"presence_penalty": -1.0, "frequency_penalty": -0.3},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 30, "max_new_tokens": 40},
    {"logit_bias": {0: 3.0, 4: -2.5}},
    {"suppress_tokens": (1, 5)},
    {"min_new_tokens": 6},
    {
        "logit_bias": {3: 1.0, 7: float("-inf")},
        "repetition_penalty": 1.3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 9,
        "suppress_tokens": 8,
    },
]
CONFIGS = [GenerationConfig(**settings) for settings in SETTINGS]


def texts(seed):
    """A text for each setting, of unlike lengths, with what stands behind it."""
    rng = np.random.default_rng(seed)
    count = len(SETTINGS)
    logits = rng.normal(size=(count, VOCABULARY)).astype("float32") * 2
    sequences = rng.integers(0, VOCABULARY, (count, LENGTH)).astype("int32")
    lengths = rng.integers(1, LENGTH + 1, count).astype("int32")
    return logits, sequences, lengths, rng.integers(1, lengths + 1).astype("int32")


def process(logits, sequences, lengths, prompt_lengths, configs):
    arrays = settings_arrays(configs, [END_IDS] * len(configs), VOCABULARY)
    settings = RowSettings(*(None if a is None else tf.constant(a) for a in arrays))
    return process_scores(logits, *map(tf.constant, (sequences, lengths, prompt_lengths)), settings).numpy()


@pytest.mark.parametrize("seed", range(6))
def test_rows_match_the_reference_whatever_their_neighbours_do(seed):
    logits, sequences, lengths, prompts = texts(seed)
    order = np.random.default_rng(seed).permutation(len(CONFIGS))
    scores = process(logits, sequences, lengths, prompts, [CONFIGS[place] for place in order])
    for row, place in enumerate(order):
        text = sequences[row, : lengths[row]]
        wanted = reference.process(logits[row], text, prompts[row], CONFIGS[place], END_IDS)
        got = np.where(scores[row] <= FORBIDDEN, -np.inf, scores[row])
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6, err_msg=str(SETTINGS[place]))


def test_rare_settings_are_left_out_where_nobody_uses_them():
    plain = [GenerationConfig(), GenerationConfig(temperature=1.0, top_k=4, top_p=0.5)]
    arrays = settings_arrays(plain, [(1,), (2, 3)], VOCABULARY)
    assert arrays.end_ids.tolist() == [[1, -1], [2, 3]]
    assert arrays.logit_bias is None and arrays.repetition_penalty is None
    for settings in SETTINGS[1:]:
        rare = settings_arrays([GenerationConfig(**settings)], [()], VOCABULARY)
        assert rare.logit_bias.shape == (1, VOCABULARY)


def test_tokens_must_exist():
    for settings in ({"logit_bias": {VOCABULARY: 1.0}}, {"suppress_tokens": [3, VOCABULARY + 1]}):
        with pytest.raises(
            ValueError, match=rf"tokens of the model, which are {VOCABULARY}.*\[{VOCABULARY}|10"
        ):
            settings_arrays([GenerationConfig(**settings)], [()], VOCABULARY)


def test_a_token_must_be_left():
    config = GenerationConfig(suppress_tokens=range(VOCABULARY))
    with pytest.raises(ValueError, match="`suppress_tokens` must leave a token"):
        settings_arrays([config], [()], VOCABULARY)


def test_allowed_tokens():
    vocabulary = 70  # three numbers of 32 bits
    allowed = np.random.default_rng(0).random((2, vocabulary)) < 0.5
    allowed[:, [31, 32, 63, 64, 69]] = [[True], [False]]
    bits = np.zeros((2, 96), "uint8")
    bits[:, :vocabulary] = allowed
    words = np.packbits(bits, axis=1, bitorder="little").view("<i4")
    arrays = settings_arrays([GenerationConfig()] * 2, [()] * 2, vocabulary)._replace(allowed=words)
    settings = RowSettings(*(None if a is None else tf.constant(a) for a in arrays))
    ones = tf.ones([2], tf.int32)
    scores = process_scores(tf.zeros([2, vocabulary]), ones[:, None], ones, ones, settings).numpy()
    np.testing.assert_array_equal(scores == 0, allowed)
    np.testing.assert_array_equal(scores == FORBIDDEN, ~allowed)


@pytest.mark.reference
def test_equals_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    processors = transformers.generation.logits_process

    def theirs(config, prompt_length):
        if config.logit_bias:
            bias = {(token,): number for token, number in config.logit_bias.items()}
            yield processors.SequenceBiasLogitsProcessor(bias)
        if config.repetition_penalty != 1:
            yield processors.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
        if config.no_repeat_ngram_size:
            yield processors.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size)
        if config.min_new_tokens:
            yield processors.MinNewTokensLengthLogitsProcessor(
                prompt_length, config.min_new_tokens, list(END_IDS)
            )
        if config.suppress_tokens:
            yield processors.SuppressTokensLogitsProcessor(list(config.suppress_tokens))

    compared = 0
    for seed in range(3):
        logits, sequences, lengths, prompts = texts(seed)
        scores = process(logits, sequences, lengths, prompts, CONFIGS)
        for row, config in enumerate(CONFIGS):
            if config.presence_penalty or config.frequency_penalty:
                continue  # not in transformers
            text = torch.tensor(sequences[row : row + 1, : lengths[row]]).long()
            wanted = torch.tensor(logits[row : row + 1])
            for processor in theirs(config, int(prompts[row])):
                wanted = processor(text, wanted)
            got = np.where(scores[row] <= FORBIDDEN, -np.inf, scores[row])
            np.testing.assert_allclose(got, wanted[0].numpy(), rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared > 20


@pytest.mark.reference
def test_filters_equal_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    warpers = transformers.generation.logits_process
    from kerasllm.generation.sampling import filter_scores

    scores = np.random.default_rng(0).normal(size=(30, 500)).astype("float32") * 3
    cases = (
        ("top_k", 17, warpers.TopKLogitsWarper(17)),
        ("top_p", 0.8, warpers.TopPLogitsWarper(0.8)),
        ("min_p", 0.03, warpers.MinPLogitsWarper(0.03)),
        ("typical_p", 0.7, warpers.TypicalLogitsWarper(0.7)),
    )
    for name, value, warper in cases:
        kept = filter_scores(tf.constant(scores), **{name: tf.fill([30], value)}).numpy() > FORBIDDEN
        wanted = warper(None, torch.tensor(scores)).numpy() > -np.inf
        np.testing.assert_array_equal(kept, wanted, err_msg=name)
        assert 1 < kept.sum(axis=1).mean() < 400
