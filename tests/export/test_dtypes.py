"""Exports in other precisions than float32."""

import dataclasses
import functools
import json
import os

import numpy as np
import pytest
import tensorflow as tf
from reference.saved_models import PROMPTS, check_rows, inputs
from reference.weights import randomize
from tensorflow.core.protobuf import saved_model_pb2

from kerasllm import Bert, BertConfig, CausalLM, GenerationConfig, Llama, LlamaConfig, TextEmbedder
from kerasllm.export.extra import MANIFEST
from kerasllm.export.verify import format_checks, verify_export
from kerasllm.layers import TokenEmbedding

WIDTHS = {"bfloat16": 2, "float16": 2, "int8": 1}
# The slow tier: float16 goes the ways of the other two, stored narrow as int8 is, and cast as bfloat16 is.
FLOAT16 = pytest.param("float16", marks=pytest.mark.slow)
SIZES = {"vocabulary_size": 400, "context_length": 64, "num_layers": 2, "num_heads": 4, "dim": 64}


@pytest.fixture(scope="module")
def llama(tokenizer):
    config = LlamaConfig(**SIZES, num_kv_heads=2, intermediate_dim=96, tie_embeddings=True)
    return CausalLM(randomize(Llama(config)), tokenizer, GenerationConfig(max_new_tokens=8))


@pytest.fixture(scope="module")
def export(llama, tmp_path_factory):
    """Exports once in each precision."""
    base = tmp_path_factory.mktemp("dtypes")
    return functools.cache(lambda dtype: llama.export(base / dtype / "1", dtype=dtype))


def rounded(model, dtype):
    """A float32 model with the weights that a precision leaves, computed in NumPy."""
    copy = type(model).from_config(model.get_config())
    for target, source in zip(copy.variables, model.variables, strict=True):
        weight = np.array(source)
        if dtype == "float16":
            weight = weight.astype("float16")
        elif source.name in ("kernel", "embeddings"):
            axis = 0 if source.name == "kernel" else 1  # a scale for each output, or for each row
            scale = np.abs(weight).max(axis, keepdims=True) / 127
            weight = np.round(weight / scale) * scale
        target.assign(weight.astype("float32"))
    return copy


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_products_with_narrow_weights_are_those_of_float32(llama, dtype, tied):
    model = randomize(Llama(dataclasses.replace(llama.model.config, tie_embeddings=tied)))
    token_ids = np.random.default_rng(0).integers(0, 400, (3, 20))
    live = CausalLM(model).with_dtype(dtype)
    assert {variable.dtype for variable in live.model.variables} == (
        {"float16"} if dtype == "float16" else {"int8", "float32"}
    )
    expected = np.asarray(rounded(model, dtype)(token_ids))
    np.testing.assert_allclose(np.asarray(live(token_ids)), expected, atol=2e-4 * np.abs(expected).max())
    assert np.abs(expected - np.asarray(model(token_ids))).max() > 1e-3  # other weights than before


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", FLOAT16])
def test_an_export_answers_as_the_live_model_of_its_precision(llama, export, dtype):
    folder, width = export(dtype), WIDTHS[dtype]
    live = llama.with_dtype(dtype)
    served = tf.saved_model.load(str(folder)).signatures["generate"]
    for settings in ({}, {"temperature": 1.2, "seed": 7}):
        outputs = served(**inputs(max_new_tokens=9, **settings))
        rows = live.generate_tokens(PROMPTS, 9, logprobs=0, **{"seed": 3, **settings})
        if dtype == "bfloat16":  # sums of few digits, in another order
            ids = outputs["token_ids"].numpy().tolist()
            assert [row.token_ids for row in rows] == [
                row[:count] for row, count in zip(ids, outputs["num_tokens"].numpy(), strict=True)
            ]
        else:
            check_rows(outputs, rows)
    matrices = sum(np.prod(v.shape) for v in llama.model.variables if len(v.shape) == 2)
    data = sum(file.stat().st_size for file in (folder / "variables").glob("*.data-*"))
    assert data < 1.15 * width * matrices  # norms and scales are the rest
    manifest = json.loads((folder / "assets.extra" / MANIFEST).read_text())
    assert data >= sum(manifest["weight_bytes"].values()) > 0
    assert manifest["weight_bytes"][dtype] >= width * matrices


def test_weights_are_widened_where_they_are_used(llama, export):
    """Not once before the loop, where wide copies of all would stay, and not all at the same time."""
    file = export("int8") / "saved_model.pb"
    library = saved_model_pb2.SavedModel.FromString(file.read_bytes()).meta_graphs[0].graph_def.library
    widened = [
        [node for node in function.node_def if node.op == "Cast" and node.attr["SrcT"].type == tf.int8]
        for function in library.function
        if "while_body" in function.signature.name
    ]
    matrices = sum(variable.dtype == "int8" for variable in llama.with_dtype("int8").model.variables)
    in_a_step = max(widened, key=len)
    assert len(in_a_step) >= matrices
    reads = {
        node.name: node
        for function in library.function
        for node in function.node_def
        if function.signature.name.count("while_body")
    }
    for node in in_a_step:
        sources = [reads[name.split(":")[0]] for name in node.input if not name.startswith("^")]
        waits = [name for each in (node, *sources) for name in each.input if name.startswith("^")]
        # A lookup gathers rows before it converts them.
        assert waits or sources[0].op not in ("ReadVariableOp", "Identity"), node.name


def test_outputs_are_float32_but_for_caches(export):
    """TensorFlow Serving's REST has no bfloat16."""
    signatures = tf.saved_model.load(str(export("bfloat16"))).signatures
    kinds = {
        (name, output): tensor.dtype
        for name, signature in signatures.items()
        for output, tensor in signature.structured_outputs.items()
        if tensor.dtype.is_floating
    }
    assert {name for (_, name), dtype in kinds.items() if dtype == tf.bfloat16} == {
        f"kv_cache_{kind}_{layer}" for kind in "kv" for layer in range(2)
    }
    assert ("prefill", "logits") in kinds


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_an_embedder_in_fewer_bits(tokenizer, dtype, tmp_path):
    config = BertConfig(**SIZES, intermediate_dim=96)
    embedder = TextEmbedder(randomize(Bert(config, None)), tokenizer, pooling="mean", max_length=24)
    live = embedder.with_dtype(dtype)
    assert (live.pooling, live.max_length) == ("mean", 24)
    served = tf.saved_model.load(str(embedder.export(tmp_path / "1", dtype=dtype))).signatures["embed"]
    outputs = served(text=tf.constant(PROMPTS))
    assert outputs["embedding"].dtype == tf.float32
    expected = live.encode(PROMPTS)
    tolerance = 0.02 if dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(outputs["embedding"], expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.slow
def test_verification_knows_the_precision(llama, tmp_path):
    live = llama.with_dtype("bfloat16")
    checks = verify_export(live.export(tmp_path / "1"), live)
    assert not any(check.problem for check in checks), format_checks(checks)


def test_what_cannot_be(llama, tmp_path):
    with pytest.raises(ValueError, match="`dtype` must be one of .* Received: 'int3'"):
        llama.export(tmp_path / "1", dtype="int3")
    narrow = llama.with_dtype("int8")
    with pytest.raises(ValueError, match="8 bits have no other precision. Received: dtype='float32'"):
        narrow.with_dtype("float32")
    with pytest.raises(ValueError, match="lacks: .*embeddings_scale"):
        narrow.save_pretrained(tmp_path / "checkpoint")
    with pytest.warns(UserWarning, match="mode=int4"):
        Bert(BertConfig(**SIZES), None).quantize(
            "int4", filters=lambda layer: isinstance(layer, TokenEmbedding)
        )
    assert os.listdir(tmp_path) == []
    assert {variable.dtype for variable in llama.model.variables} == {"float32"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_more_than_two_gigabytes(tokenizer, tmp_path):
    """More than one protocol buffer may hold."""
    sizes = {"num_layers": 9, "num_heads": 16, "dim": 2048, "intermediate_dim": 8192}
    model = CausalLM(Llama(LlamaConfig(**{**SIZES, **sizes})), tokenizer)
    folder = model.export(tmp_path / "1")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > 2.2 * 2**30
    live = model.generate_tokens(PROMPTS[:1], 4, logprobs=0)
    del model
    served = tf.saved_model.load(str(folder)).signatures["generate"]
    check_rows(served(**inputs(PROMPTS[:1], max_new_tokens=4)), live)
