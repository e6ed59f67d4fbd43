"""Activations that are made fit for 8 bits, without a change of what the model gives."""

import numpy as np
import pytest
from reference.weights import randomize, widen_columns

from kerasllm import GPT2, GPT2Config, Llama, LlamaConfig
from kerasllm.export import calibration, smooth
from kerasllm.export.smooth import smoothed
from kerasllm.layers import DecoderBlock

RNG = np.random.default_rng(0)
BATCHES = [RNG.integers(0, 300, (1, 24)).astype("int32") for _ in range(3)]
SIZES = {"vocabulary_size": 300, "context_length": 32, "num_layers": 2, "num_heads": 6, "dim": 48}


def llama(**settings):
    settings |= {"num_kv_heads": 2, "head_dim": 16, "intermediate_dim": 80, "tie_embeddings": True}
    return randomize(Llama(LlamaConfig(**SIZES, **settings)))


MODELS = {
    "GPT-2": lambda: randomize(GPT2(GPT2Config(**SIZES))),
    "Llama": llama,
    "Qwen": lambda: llama(attention_bias=True, qk_norm=True),
    "Gemma": lambda: llama(norm_unit_offset=True, norm_last=True, activation="gelu_tanh"),
}


def inputs_of(model, layers):
    """What layers get while the model reads the batches."""
    seen = [[] for _ in layers]
    calibration.see_inputs(model, layers, [found.append for found in seen], BATCHES)
    return [np.concatenate(found) for found in seen]


@pytest.mark.parametrize("name", MODELS)
def test_the_model_stays_the_same_to_the_bit(name):
    model = MODELS[name]()
    widen_columns(model)
    before, logits = [variable.numpy() for variable in model.variables], model(BATCHES[0]).numpy()
    with smoothed(model, BATCHES):
        changed = {
            variable.path.partition("/")[2]
            for variable, old in zip(model.variables, before, strict=True)
            if not np.array_equal(variable, old)
        }
        received = model(BATCHES[0]).numpy()
    if name == "Gemma":  # 1 + scale is rounded
        np.testing.assert_allclose(received, logits, rtol=1e-4, atol=1e-4)
    else:
        np.testing.assert_array_equal(received, logits)
    wide = ["feed_forward/up"] if name == "GPT-2" else ["feed_forward/gate", "feed_forward/up"]
    wanted = {f"attention/{part}/kernel" for part in ("query", "key", "value", "output")}
    wanted |= {f"{part}/kernel" for part in wide} | {"attention_norm/scale", "feed_forward_norm/scale"}
    if name == "GPT-2":
        wanted |= {"attention_norm/bias", "feed_forward_norm/bias", "attention/value/bias"}
    else:
        wanted |= {"feed_forward/down/kernel"} | ({"attention/value/bias"} if name == "Qwen" else set())
    assert changed == {f"block_{number}/{part}" for number in range(2) for part in wanted}
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, old)


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_wide_columns_become_narrow(name):
    model = MODELS[name]()
    widen_columns(model)
    layers = [link.matrices[0] for link in smooth._links(model)]

    def spread():
        return np.array([np.abs(x).max() / np.median(np.abs(x).max(0)) for x in inputs_of(model, layers)])

    before = spread()
    with smoothed(model, BATCHES):
        after = spread()
    # Half of the factor goes to the weights.
    assert (before > 20).all() and (after < before / 5).all()


def test_factors_are_those_of_the_paper():
    model = MODELS["Llama"]()
    link = [link for link in smooth._links(model) if link.copies == 3][0]
    inputs = np.exp(RNG.normal(size=96)).astype("float32")
    weights = np.abs(link.matrices[0].kernel.numpy()).max(1)
    received = smooth._factors(link, inputs)
    # Three heads of queries read each of the two heads of values.
    groups = [
        [48 * head + 16 * copy + column for copy in range(3)] for head in range(2) for column in range(16)
    ]
    wanted = np.array([np.sqrt(inputs[group].max() / weights[group].max()) for group in groups])
    wanted /= np.exp(np.log(wanted).mean())
    np.testing.assert_array_equal(np.log2(received), np.rint(np.log2(received)))
    assert (np.abs(np.log2(received / wanted)) < 0.501).all()


def test_norms_behind_the_sum_stay():
    """What they give is also the residual stream."""
    block = DecoderBlock(8, 2, 16, norm_first=False)
    block.build((None, None, 8))
    assert [link.source for link in smooth._links(block)] == [block.attention.value]


def test_a_column_that_is_never_used_does_no_harm():
    model = MODELS["Llama"]()
    norm = model.blocks[0].attention_norm
    norm.scale.assign(np.where(np.arange(48) == 5, 0, norm.scale))
    logits = model(BATCHES[0]).numpy()
    with smoothed(model, BATCHES):
        np.testing.assert_array_equal(model(BATCHES[0]), logits)
        assert np.abs(model.blocks[0].attention.query.kernel).max() < 2**11


def test_weights_come_back_after_a_failure():
    model = MODELS["Llama"]()
    before = [variable.numpy() for variable in model.variables]
    with pytest.raises(RuntimeError, match="planned"), smoothed(model, BATCHES):
        raise RuntimeError("planned")
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, old)
