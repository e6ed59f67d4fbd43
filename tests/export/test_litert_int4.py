"""Weights of 4 bits: how their scales are chosen and how they are rounded."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from reference.weights import randomize

from kerasllm import CausalLM, Llama, LlamaConfig
from kerasllm.export import calibration, export_litert, gptq, litert, litert_worker

RNG = np.random.default_rng(0)


def correlated(count, width):
    """Inputs of which some are large and most follow from others, as those of a trained model."""
    mixed = RNG.normal(size=(count, width)) @ (RNG.normal(size=(width, width)) / np.arange(1, width + 1))
    return (mixed * np.exp(RNG.normal(size=width))).astype("float32")


def grid(rows, width):
    """A matrix of 4 bits, and its scales."""
    scales = np.exp(RNG.normal(size=(rows, width // 32)) - 4).astype(ml_dtypes.bfloat16).astype("float32")
    integers = RNG.integers(-8, 8, (rows, width))
    return (integers * np.repeat(scales, 32, axis=1)).astype("float32"), scales


def error(matrix, rounded, inputs):
    return np.square(inputs @ (rounded - matrix).T).mean()


def nearest(matrix):
    scales = np.repeat(litert_worker.block_scales(matrix), 32, axis=1)
    return litert_worker.round_to_integers(matrix, scales) * scales


def test_a_matrix_of_4_bits_stays_what_it_is():
    """Blocks with few integers too, such as one that has nothing between 0 and 7 scales, and zeros."""
    matrix, scales = grid(64, 96)
    matrix[0, :32] = np.where(np.arange(32) % 2, 7, -3) * scales[0, 0]
    matrix[1, :32] = np.where(np.arange(32) == 5, -6, 0) * scales[1, 0]
    matrix[2] = 0
    np.testing.assert_array_equal(nearest(matrix), matrix)


def test_scales_lose_less_than_those_of_the_largest_weight():
    matrix = RNG.standard_t(5, size=(64, 128)).astype("float32")
    scales = litert_worker.block_scales(matrix)
    assert scales.shape == (64, 4)
    np.testing.assert_array_equal(scales, scales.astype(ml_dtypes.bfloat16).astype("float32"))
    largest = np.repeat(np.abs(matrix.reshape(64, 4, 32)).max(-1) / 7, 32, axis=1)
    by_largest = np.rint(matrix / largest) * largest
    losses = [np.square(rounded - matrix).sum() for rounded in (nearest(matrix), by_largest)]
    assert losses[0] < 0.85 * losses[1]


def test_important_columns_are_stored_more_exactly():
    matrix = RNG.standard_t(3, size=(200, 32)).astype("float32")
    importance = np.where(np.arange(32) < 4, 100.0, 1.0).astype("float32")
    errors = []
    for weights in (None, importance):
        scales = litert_worker.block_scales(matrix, weights)
        rounded = litert_worker.round_to_integers(matrix, scales) * scales
        errors.append(np.square(rounded - matrix)[:, :4].mean())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("columns_at_once", [24, 128])
def test_rounding_equals_the_definition(monkeypatch, columns_at_once):
    """Hassibi and Stork's optimal brain surgeon, with a new inverse for each column."""
    monkeypatch.setattr(gptq, "_COLUMNS_AT_ONCE", columns_at_once)
    matrix, inputs = RNG.normal(size=(5, 64)).astype("float32"), correlated(300, 64)
    gram = inputs.T @ inputs
    received = gptq.round_matrix(matrix, gram)

    energy = np.diag(gram).astype("float64")
    damped = gram + 0.01 * energy.mean() * np.eye(64)
    scales = np.repeat(litert_worker.block_scales(matrix, np.diag(damped)), 32, axis=1)
    wanted, left = matrix.astype("float64"), np.argsort(-energy)
    while len(left):
        first, inverse = left[0], np.linalg.inv(damped[np.ix_(left, left)])
        rounded = np.clip(np.rint(wanted[:, first] / scales[:, first]), -8, 7) * scales[:, first]
        correction = np.outer((wanted[:, first] - rounded) / inverse[0, 0], inverse[0])
        wanted[:, left] -= correction
        wanted[:, first] = rounded
        left = left[1:]
    # A number in the middle between two integers may go either way, and those after it with it.
    assert np.mean(np.isclose(received, wanted, atol=1e-6)) > 0.98
    assert error(matrix, received, inputs) < 1.02 * error(matrix, wanted, inputs)


def test_rounding_changes_the_products_less_than_the_nearest_numbers():
    matrix, inputs = RNG.normal(size=(48, 160)).astype("float32"), correlated(2000, 160)
    rounded = gptq.round_matrix(matrix, inputs.T @ inputs)
    np.testing.assert_array_equal(nearest(rounded), rounded)  # of 4 bits
    assert error(matrix, rounded, inputs) < 0.5 * error(matrix, nearest(matrix), inputs)


def test_columns_that_are_always_zero_do_no_harm():
    matrix, inputs = RNG.normal(size=(8, 32)).astype("float32"), correlated(100, 32)
    inputs[:, 3] = 0
    rounded = gptq.round_matrix(matrix, inputs.T @ inputs)
    assert np.isfinite(rounded).all()
    np.testing.assert_array_equal(gptq.round_matrix(matrix, np.zeros((32, 32), "float32")), nearest(matrix))


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(vocabulary_size=400, context_length=32, num_layers=2, num_heads=4, num_kv_heads=2,
                         dim=32, intermediate_dim=64, tie_embeddings=True)  # fmt: skip
    return randomize(Llama(config))


def test_the_inputs_of_the_layers(llama):
    batches = [RNG.integers(0, 400, (1, 7)).astype("int32") for _ in range(2)]
    layers = gptq.layers_of_4_bits(llama)
    names = [layer.path.partition("/")[2] for layer in layers]
    assert len(layers) == 14 and not any("token" in name for name in names)
    grams = dict(zip(names, gptq.gram_matrices(llama, layers, batches), strict=True))
    block = llama.blocks[0]
    inputs = [block.attention_norm(llama.token_embedding(batch))[0] for batch in batches]
    wanted = sum(np.transpose(x) @ x for x in inputs)
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(grams[f"block_0/attention/{name}"], wanted, rtol=1e-4, atol=1e-4)
    assert grams["block_1/feed_forward/down"].shape == (64, 64)
    assert all(np.trace(gram) > 0 for gram in grams.values())
    assert not any("call" in vars(layer) for layer in layers)


def test_the_model_gets_its_weights_back(llama):
    before = [variable.numpy() for variable in llama.variables]
    logits, batch = llama(np.array([[1, 2, 3]])), np.arange(20, dtype="int32")[None]
    with pytest.raises(RuntimeError, match="planned"), gptq.rounded_weights(llama, [batch]):
        changed = {v.path.rpartition("/")[2] for v, old in zip(llama.variables, before, strict=True)
                   if not np.array_equal(v, old)}  # fmt: skip
        assert changed == {"kernel"}
        for layer in gptq.layers_of_4_bits(llama):
            kernel = np.transpose(layer.kernel)
            np.testing.assert_array_equal(nearest(kernel), kernel)
        raise RuntimeError("planned")
    np.testing.assert_array_equal(llama(np.array([[1, 2, 3]])), logits)


def test_a_model_writes_its_own_calibration(llama):
    batches = calibration.own_batches(llama, 128)
    assert [batch.shape for batch in batches] == [(1, 32)] * 4
    assert len({batch.tobytes() for batch in batches}) == 4
    # What follows is likely, though it is drawn.
    rows = np.concatenate(batches)
    scores = tf.nn.log_softmax(llama(rows)).numpy()[:, :-1]
    mean = np.take_along_axis(scores, rows[:, 1:, None], axis=-1).mean()
    assert mean > scores.mean() + 1


@pytest.mark.parametrize("calibration_texts", [(), ["The sun was warm and the sky was blue."]])
def test_an_export_converts_rounded_weights(llama, tokenizer, tmp_path, monkeypatch, calibration_texts):
    monkeypatch.setitem(litert._CALIBRATED, "int4", (*litert._CALIBRATED["int4"][:2], 64))
    before = [layer.kernel.numpy() for layer in gptq.layers_of_4_bits(llama)]

    def convert(model, signatures, file, quantize, verbose):
        for layer, kernel in zip(gptq.layers_of_4_bits(model), before, strict=True):
            rounded = np.transpose(layer.kernel)
            np.testing.assert_array_equal(nearest(rounded), rounded)
            assert not np.array_equal(rounded, kernel.T)
        raise RuntimeError("far enough")

    monkeypatch.setattr(litert, "convert", convert)
    settings = {"prefill_lengths": [1], "cache_length": 4, "calibration_texts": calibration_texts}
    with pytest.raises(RuntimeError, match="far enough"):
        export_litert(llama, tokenizer, tmp_path / "m.tflite", quantize="int4", **settings)
    for layer, kernel in zip(gptq.layers_of_4_bits(llama), before, strict=True):
        np.testing.assert_array_equal(layer.kernel, kernel)


def stored_weights(path):
    """The quantised matrices of a file, in float32 and in any order."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes()))
    content = lambda tensor: np.asarray(model.buffers[tensor.buffer].data, "uint8")  # noqa: E731
    found = {}
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.type == schema.TensorType.INT4:
                packed = content(tensor)
                integers = np.stack([packed & 15, packed >> 4], -1).reshape(tensor.shape).astype("int8")
                integers -= 16 * (integers > 7)
                scales = content(graph.tensors[tensor.quantization.details.scales]).view("float16")
                scales = np.repeat(scales.astype("float32").reshape(tensor.shape[0], -1), 32, axis=1)
            elif tensor.type == schema.TensorType.INT8:
                integers = content(tensor).view("int8").reshape(tensor.shape)
                scales = np.asarray(tensor.quantization.scale, "float32")[:, None]
            else:
                continue
            found[tensor.buffer] = integers * scales
    return list(found.values())


def test_the_file_holds_the_matrix_of_4_bits(tmp_path):
    """What the quantiser writes is, number for number, the matrix that comes in."""
    matrix, _ = grid(48, 64)
    module = tf.Module()
    module.matrix = tf.Variable(matrix.T)
    multiply = tf.function(lambda x: {"y": x @ module.matrix}).get_concrete_function(
        tf.TensorSpec([1, 64], tf.float32)
    )
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures={"multiply": multiply})
    path = tmp_path / "m.tflite"
    path.write_bytes(litert_worker.convert(str(tmp_path / "saved"), ["multiply"]))
    litert_worker.quantize(str(path), "int4", rows=400)
    (stored,) = stored_weights(path)
    np.testing.assert_array_equal(stored, matrix)


def test_an_export_stores_the_weights_that_were_trained(llama, tokenizer, tmp_path, monkeypatch):
    """Number for number, and nothing is calibrated; afterwards the model has its exact ones."""
    monkeypatch.setattr(litert, "own_batches", None)
    task = CausalLM(llama, tokenizer)
    task.compile(quantization_aware="int4")
    before = [weight.numpy() for weight in llama.weights]
    settings = {"prefill_lengths": [1], "cache_length": 4, "texts": (), "verbose": False}
    task.export(tmp_path / "m.tflite", quantize="int4", **settings)
    for weight, exact in zip(llama.weights, before, strict=True):
        np.testing.assert_array_equal(weight, exact)
    stored = stored_weights(tmp_path / "m.tflite")
    try:
        task.round_weights()
        wanted = [layer.kernel.numpy().T for layer in gptq.layers_of_4_bits(llama)]
        wanted.append(llama.token_embedding.embeddings.numpy())
    finally:
        for weight, exact in zip(llama.weights, before, strict=True):
            weight.assign(exact)
    assert len(stored) == len(wanted) == 15
    for matrix in wanted:
        assert any(np.array_equal(matrix, each) for each in stored), matrix.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"quantize": "fp16", "calibration_texts": ["a"]},
            "are for quantize='int8' or 'int4'. Received: quantize='fp16'",
        ),
        ({"quantize": "int4", "calibration_texts": [""]}, "must hold tokens"),
    ],
)
def test_bad_calibration_is_refused(random_lm, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_litert(random_lm.model, random_lm.tokenizer, tmp_path / "m.tflite", **arguments)


def test_widths_that_are_no_blocks_are_refused(tokenizer, tmp_path):
    config = LlamaConfig(vocabulary_size=400, context_length=8, num_layers=1, num_heads=2, num_kv_heads=2,
                         dim=24, intermediate_dim=64)  # fmt: skip
    with pytest.raises(ValueError, match="multiples of 32. Received: \\[24\\]"):
        export_litert(Llama(config), tokenizer, tmp_path / "m.tflite", quantize="int4")
