"""Quantisation-aware training beside a plain model that has the rounded weights."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.weights import randomize

from kerasllm import GPT2, Bert, BertConfig, CausalLM, GPT2Config, Llama, LlamaConfig, MaskedLM
from kerasllm.export import gptq
from kerasllm.layers import TokenEmbedding
from kerasllm.tasks import causal_lm
from kerasllm.tokenizers import train_tokenizer

SIZES = {"vocabulary_size": 40, "context_length": 8, "num_layers": 1, "num_heads": 4, "dim": 32}
LLAMA = {**SIZES, "num_kv_heads": 2, "intermediate_dim": 64}
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 40, (6, 9)).astype("int32")
BATCH = (IDS[:, :-1], IDS[:, 1:], (RNG.random((6, 8)) < 0.8).astype("float32"))
BATCHES = tf.data.Dataset.from_tensors(BATCH)


def make_model(tie_embeddings=True, dtype=None, **changes):
    config = LlamaConfig(**{**LLAMA, "tie_embeddings": tie_embeddings, **changes})
    return CausalLM(randomize(Llama(config, dtype=dtype)))


def arrays(model):
    return {weight.path: weight.numpy() for weight in model.model.weights}


def change(model, before):
    """What an update did to the weights, by the paths below the model."""
    after = zip(model.model.weights, before, strict=True)
    return {weight.path.partition("/")[2]: weight.numpy() - old for weight, old in after}


@pytest.mark.parametrize(
    ("kind", "tie_embeddings", "dtype", "options"),
    [
        ("int4", True, None, {"jit_compile": True}),
        ("int4", False, None, {"remat": "cheap", "run_eagerly": True}),
        ("int8", True, None, {"microbatches": 2, "jit_compile": False}),
        ("int4", True, "mixed_bfloat16", {"remat": "blocks", "run_eagerly": True}),
        ("int8", False, "mixed_float16", {"run_eagerly": True}),
    ],
)
def test_an_update_is_that_of_the_rounded_model_on_the_exact_weights(kind, tie_embeddings, dtype, options):
    """The gradient is that of the model of rounded weights, of which the optimizer knows nothing."""
    model, plain = make_model(tie_embeddings, dtype), make_model(tie_embeddings, dtype)
    plain.compile(quantization_aware=kind, jit_compile=False)
    plain.round_weights()
    exact, rounded = ([w.numpy() for w in each.model.weights] for each in (model, plain))
    plain.compile(keras.optimizers.SGD(0.01), run_eagerly=True)
    model.compile(keras.optimizers.SGD(0.01), quantization_aware=kind, **options)
    losses = [each.fit(BATCHES, verbose=0).history["loss"][0] for each in (model, plain)]
    tolerance = 1e-5 if dtype is None else 2e-2
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    ours, theirs = change(model, exact), change(plain, rounded)
    for path, wanted in theirs.items():
        largest = np.abs(wanted).max()
        assert largest > 0, path
        np.testing.assert_allclose(
            ours[path], wanted, atol=max(2 * tolerance * largest, 1e-6), err_msg=path
        )


@pytest.fixture(scope="module", params=["int8", "int4"])
def fitted(request):
    """A model after an update; what it was evaluated at in training; its exact weights."""
    keras.utils.set_random_seed(0)
    model = CausalLM(randomize(GPT2(GPT2Config(**SIZES, dropout=0.0))))
    model.compile(keras.optimizers.SGD(0.01), quantization_aware=request.param, run_eagerly=True)
    model.fit(BATCHES, verbose=0)
    loss, exact = model.evaluate(BATCHES, verbose=0)["loss"], arrays(model)
    model.round_weights()
    return request.param, model, loss, exact


def test_what_is_rounded(fitted):
    """The matrices as the export rounds them, the token table, and nothing else."""
    kind, model, _, exact = fitted
    changed = {path for path, array in arrays(model).items() if not np.array_equal(array, exact[path])}
    layers = gptq.layers_of_4_bits(model.model)
    assert changed == {
        *(layer.kernel.path for layer in layers),
        model.model.token_embedding.embeddings.path,
    }
    assert gptq.is_of_4_bits(model.model) == (kind == "int4")
    of_8_bits = [model.model.token_embedding.embeddings.numpy()]
    of_8_bits += [layer.kernel.numpy().T for layer in layers] if kind == "int8" else []
    for rows in of_8_bits:
        steps = rows / (np.abs(rows).max(-1, keepdims=True) / 127)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)


def test_evaluate_is_of_the_rounded_weights(fitted):
    _, model, loss, exact = fitted
    assert model.evaluate(BATCHES, verbose=0)["loss"] == loss  # what is rounded stays what it is
    model.compile(run_eagerly=True)
    assert model.evaluate(BATCHES, verbose=0)["loss"] == pytest.approx(loss, rel=1e-6)
    for weight in model.model.weights:
        weight.assign(exact[weight.path])
    assert abs(model.evaluate(BATCHES, verbose=0)["loss"] - loss) > 1e-4
    with pytest.raises(ValueError, match="compiled with `quantization_aware`"):
        model.round_weights()


def test_a_matrix_with_a_unit_for_each_token_has_8_bits():
    """As the export, which takes it for a head."""
    model = make_model(intermediate_dim=40, tie_embeddings=False)
    with pytest.raises(ValueError, match="multiples of 32. Received: \\[40\\]"):
        model.compile(quantization_aware="int4")
    model = make_model(vocabulary_size=64)
    model.compile(quantization_aware="int4")
    exact = model.model.blocks[0].feed_forward.up.kernel.numpy()
    model.round_weights()
    rounded = model.model.blocks[0].feed_forward.up.kernel.numpy()
    assert np.abs(rounded - exact).max() < 1.01 * np.abs(exact).max() / 127 / 2
    assert gptq.is_of_4_bits(model.model)


def test_the_option_is_saved(tmp_path):
    model = make_model()
    model.compile(quantization_aware="int4", run_eagerly=True)
    model.fit(BATCHES, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = CausalLM.load(tmp_path / "model.keras")
    loss = model.evaluate(BATCHES, verbose=0)["loss"]
    assert loaded.evaluate(BATCHES, verbose=0)["loss"] == pytest.approx(loss, rel=1e-6)
    loaded.round_weights()
    assert gptq.is_of_4_bits(loaded.model)


def bert():
    return MaskedLM(Bert(BertConfig(**SIZES, intermediate_dim=64)))


def with_lora():
    model = make_model()
    model.model.blocks[0].attention.query.enable_lora(2)
    return model


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (make_model, "int2", "must be one of \\(None, 'int8', 'int4'\\). Received: 'int2'"),
        (bert, "int8", "Received: a Bert with head='masked_lm'"),
        (lambda: make_model(dtype="bfloat16"), "int4", "Received: weights of \\['bfloat16'\\]"),
        (lambda: make_model().with_dtype("int8"), "int8", "Received: weights of"),
        (lambda: make_model(dim=24), "int4", "multiples of 32. Received: \\[24\\]"),
        (with_lora, "int8", "LoRA exclude each other. Received: LoRA in 1 layers"),
    ],
)
def test_what_is_not_supported_is_refused(make, kind, message):
    with pytest.raises(ValueError, match=message):
        make().compile(quantization_aware=kind)


def test_all_layers_that_an_export_rounds_are_known():
    model = make_model(tie_embeddings=False).model
    tables = [layer for layer in model._flatten_layers() if isinstance(layer, TokenEmbedding)]
    matrices = {weight.path for weight in model.weights if len(weight.shape) == 2}
    assert matrices == {each.kernel.path for each in gptq.layers_of_4_bits(model)} | {
        each.embeddings.path for each in tables
    }


@pytest.mark.parametrize("dtype", [None, "mixed_bfloat16"])
def test_an_export_of_the_kind_that_was_trained_gets_the_rounded_weights(tmp_path, monkeypatch, dtype):
    """Also where it is made of a copy, as LiteRT wants float32; an export of another kind does not."""
    got = []
    write = lambda model, *_, **options: got.append((options, gptq.is_of_4_bits(model)))  # noqa: E731
    monkeypatch.setattr(causal_lm, "export_litert", write)
    model = make_model(dtype=dtype)
    model.tokenizer = train_tokenizer("character", ["some text"], 40)
    model.compile(quantization_aware="int4")
    exact = arrays(model)
    given = {} if dtype is None else {"dtype": "float32"}
    for kind in ("int4", "int8"):
        model.export(tmp_path / "m.tflite", quantize=kind, texts=(), **given)
    assert got == [({"quantize": "int4", "texts": ()}, True), ({"quantize": "int8", "texts": ()}, False)]
    for path, array in arrays(model).items():
        np.testing.assert_array_equal(array, exact[path])
