import gc
import os
import pathlib
import subprocess
import sys
import weakref

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from reference.weights import randomize

from kerasllm import GPT2, GPT2Config
from kerasllm.checkpoints import weights
from kerasllm.checkpoints.lazy import WeightMemory, build_without_values
from kerasllm.checkpoints.tensors import TensorSource, row_ranges
from kerasllm.checkpoints.weights import load_model
from kerasllm.models import find_model_class

CONFIG = GPT2Config(vocabulary_size=30, context_length=8, num_layers=2, num_heads=2, dim=8)
IDS = np.arange(12).reshape(2, 6)


class Arrays(TensorSource):
    """Arrays in memory that count how often they are read."""

    def __init__(self, tensors):
        self.description = "arrays"
        self.tensors = dict(tensors)
        self.shapes = {name: array.shape for name, array in self.tensors.items()}
        self.reads = []

    def read(self, name, start=0, stop=None):
        self.reads.append(name)
        return self.tensors[name][start:stop].copy()

    def close(self):
        pass


def make(head="causal_lm", config=CONFIG):
    """A model, its config.json and its tensors."""
    model = randomize(GPT2(config, head=head))
    variables = model.variables_by_path()
    tensors = {
        name: np.ascontiguousarray(transform.to_tensor([variables[path].numpy() for path in paths]))
        for name, (paths, transform) in model.weight_map().items()
    }
    return model, model.huggingface_config(), tensors


@pytest.mark.parametrize("head", GPT2.heads)
def test_every_head(head):
    model, values, tensors = make(head)
    source = Arrays(tensors)
    loaded = load_model(values, source)
    assert loaded.head == head
    np.testing.assert_array_equal(loaded(IDS), model(IDS))
    assert sorted(source.reads) == sorted(tensors)  # each one once


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes(dtype, stored):
    model, values, tensors = make()
    stored = np.dtype(stored)
    loaded = load_model(values, Arrays({n: a.astype(stored) for n, a in tensors.items()}), dtype=dtype)
    variable_dtype = np.dtype("bfloat16" if dtype == "bfloat16" else "float32")
    for weight, exact in zip(loaded.weights, model.weights, strict=True):
        assert weight.dtype == variable_dtype.name
        expected = exact.numpy().astype(stored).astype(variable_dtype)
        np.testing.assert_array_equal(weight.numpy(), expected)


def test_large_tensors_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(weights, "_MAX_WHOLE", 50)
    monkeypatch.setattr(weights, "row_ranges", lambda shape: row_ranges(shape, max_elements=24))
    model, values, tensors = make()
    for dtype in ("float32", "bfloat16"):
        source = Arrays(tensors)
        loaded = load_model(values, source, dtype=dtype)
        assert source.reads.count("transformer.wte.weight") == 10  # 30 rows of 8 numbers, 3 at a time
        for weight, exact in zip(loaded.weights, model.weights, strict=True):
            np.testing.assert_array_equal(weight.numpy(), exact.numpy().astype(np.dtype(dtype)))


def test_what_was_read_in_pieces_is_not_copied_whenever_it_is_used(monkeypatch):
    monkeypatch.setattr(weights, "_MAX_WHOLE", 50)
    _, values, tensors = make()
    variable = load_model(values, Arrays(tensors)).token_embedding.embeddings.value
    reads = [np.from_dlpack(variable.read_value()) for _ in range(2)]
    assert np.shares_memory(*reads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_lie_where_they_were_read_to(dtype, monkeypatch):
    """A copy would lie in small pages, and for a while take the memory twice."""
    _, values, tensors = make()
    empty, mappings, places = WeightMemory.empty, [], []

    def seen(memory):
        array = empty(memory)
        mappings.append(weakref.ref(array.base))
        places.append(array.ctypes.data)
        return array

    monkeypatch.setattr(WeightMemory, "empty", seen)
    model = load_model(values, Arrays(tensors), dtype=dtype)
    assert sorted(map(address, model.weights)) == sorted(places)
    freed = places.index(address(model.weights[0]))
    model.weights[0].assign(np.zeros(model.weights[0].shape))
    gc.collect()
    assert [number for number, mapping in enumerate(mappings) if mapping() is None] == [freed]


def address(variable):
    tensor = tf.convert_to_tensor(variable.value)
    tensor = tf.bitcast(tensor, "uint16") if tensor.dtype == "bfloat16" else tensor
    return np.asarray(memoryview(tensor)).ctypes.data


def test_new_values_of_one_weight_leave_the_others_alone():
    expected, values, tensors = make()
    model = load_model(values, Arrays(tensors))
    first = model.weights[0]
    first.assign_add(np.ones(first.shape))
    np.testing.assert_array_equal(first, tensors["transformer.wte.weight"] + 1)
    for weight, other in zip(model.weights[1:], expected.weights[1:], strict=True):
        np.testing.assert_array_equal(weight, other)
    again = load_model(values, Arrays(tensors))
    np.testing.assert_array_equal(again(IDS), expected(IDS))


@pytest.mark.reference
def test_on_the_jax_backend():
    folder = pathlib.Path(__file__).parents[1] / "golden" / "gpt2"
    code = f"""
import numpy as np
from kerasllm.checkpoints import load_folder, weights
weights._MAX_WHOLE = 50  # the others are read in pieces
golden = np.load({str(folder / "golden.npz")!r})
model = load_folder({str(folder)!r}).model
logits = model(golden["input_ids"], attention_mask=golden["attention_mask"])
seen = golden["attention_mask"].astype(bool)
np.testing.assert_allclose(np.asarray(logits)[seen], golden["logits"][seen], atol=1e-4)
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_row_ranges():
    assert list(row_ranges((5, 3), 6)) == [(0, 2), (2, 4), (4, 5)]
    assert list(row_ranges((2, 100), 6)) == [(0, 1), (1, 2)]
    assert list(row_ranges((0, 3), 6)) == []
    assert list(row_ranges((4, 0), 6)) == [(0, 4)]


def test_the_loaded_model_trains_and_drops_out():
    _, values, tensors = make()
    model = load_model(values, Arrays(tensors))
    assert np.abs(model(IDS, training=True) - model(IDS)).max() > 0.01
    optimizer = keras.optimizers.SGD()
    optimizer.build(model.trainable_variables)
    optimizer.apply([keras.ops.ones_like(weight) for weight in model.trainable_variables])
    np.testing.assert_allclose(
        model.position_embedding.embeddings, tensors["transformer.wpe.weight"] - 0.01, atol=1e-6
    )


def test_a_failed_build_leaves_nothing_behind():
    """Keras keeps a list of variables without a value, and would give them one after some later scope."""
    called = []

    def initialize(shape, dtype=None):
        called.append(shape)
        return keras.ops.zeros(shape, dtype)

    def build():
        keras.layers.Dense(2, kernel_initializer=initialize).build((None, 2))
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        build_without_values(build)
    with keras.StatelessScope():
        pass
    assert called == []


@pytest.mark.parametrize(("patience", "is_shown"), [(0.0, True), (1000.0, False)])
def test_progress_bar_of_long_loads_in_a_terminal(monkeypatch, capsys, patience, is_shown):
    monkeypatch.setattr(weights, "_PATIENCE", patience)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, values, tensors = make()
    load_model(values, Arrays(tensors))
    captured = capsys.readouterr()
    assert ("loading" in captured.err) == is_shown and captured.out == ""


# Heads


def test_checkpoint_of_a_bare_body_and_of_another_head():
    model, values, tensors = make(None)
    loaded = load_model(values, Arrays(tensors), head="causal_lm")  # tied: nothing is missing
    np.testing.assert_array_equal(loaded.token_embedding.embeddings, tensors["wte.weight"])
    with pytest.warns(UserWarning, match=r"\['GPT2Model'\] and has no head 'classifier'.* must be trained"):
        loaded = load_model(values, Arrays(tensors), head="classifier")
    np.testing.assert_array_equal(loaded.token_embedding.embeddings, tensors["wte.weight"])
    assert 0 < np.std(loaded.classifier.kernel) < 0.1
    _, values, tensors = make("classifier")
    assert load_model(values, Arrays(tensors), head=None).head is None


def test_a_head_that_the_checkpoint_should_have():
    _, values, tensors = make("classifier")
    del tensors["score.weight"]
    with pytest.raises(ValueError, match=r"Missing: \['score.weight'\]"):
        load_model(values, Arrays(tensors))


# Repeated tensors


def test_tied_head_in_the_file():
    model, values, tensors = make()
    equal = Arrays({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    np.testing.assert_array_equal(load_model(values, equal)(IDS), model(IDS))
    other = tensors["transformer.wte.weight"].copy()
    other[-1, -1] += 1e-3
    with pytest.raises(ValueError, match=r"config.json ties lm_head.weight .* must equal"):
        load_model(values, Arrays({**tensors, "lm_head.weight": other}))
    with pytest.raises(ValueError, match=r"config.json ties lm_head.weight .* must equal"):
        load_model(values, Arrays({**tensors, "lm_head.weight": other[:-1]}))


def test_the_same_tensor_under_two_names():
    model, values, tensors = make()
    twice = {**tensors, "wpe.weight": tensors["transformer.wpe.weight"]}
    np.testing.assert_array_equal(load_model(values, Arrays(twice))(IDS), model(IDS))
    twice["wpe.weight"] = twice["wpe.weight"] + 1
    with pytest.raises(ValueError, match="wpe.weight stand for the same weights and must be equal"):
        load_model(values, Arrays(twice))


def test_buffers_are_left_out():
    model, values, tensors = make()
    masks = {f"transformer.h.{n}.attn.bias": np.tri(8, dtype="bool") for n in range(2)}
    np.testing.assert_array_equal(load_model(values, Arrays(tensors | masks))(IDS), model(IDS))


# What does not fit


def test_integers_are_no_weights():
    _, values, tensors = make()
    for dtype in ("int8", "int64", ml_dtypes.float8_e4m3fn):
        changed = {**tensors, "transformer.wpe.weight": tensors["transformer.wpe.weight"].astype(dtype)}
        with pytest.raises(ValueError, match="Weights must be floats of 16, 32 or 64 bits"):
            load_model(values, Arrays(changed))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.wpe.weight", (9, 8)),
        ("transformer.wpe.weight", (64,)),
        ("transformer.h.1.attn.c_attn.weight", (8, 25)),
        ("transformer.h.1.attn.c_attn.weight", (8, 27)),
        ("transformer.h.1.attn.c_attn.bias", ()),
        ("transformer.ln_f.weight", (8, 1)),
    ],
)
def test_wrong_shapes_are_found_before_anything_is_read(name, shape):
    _, values, tensors = make()
    source = Arrays({**tensors, name: np.zeros(shape, "float32")})
    with pytest.raises(ValueError, match=f"{name} must fill .* of shape"):
        load_model(values, source)
    assert source.reads == []


def test_absurd_sizes_take_no_memory():
    """A config that asks for terabytes, or for millions of layers, fails at once."""
    _, values, tensors = make()
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer"):
        with pytest.raises(ValueError, match="must fill|every layer"):
            load_model({**values, name: 10**12}, Arrays(tensors))


def test_names_with_layer_in_them_that_count_none():
    values = {
        "model_type": "qwen2",
        "vocab_size": 20,
        "max_position_embeddings": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_size": 8,
        "intermediate_size": 12,
        "rms_norm_eps": 1e-6,
        "max_window_layers": 28,
    }
    family = find_model_class(values)
    model = randomize(family(family.config_class.from_huggingface(values)))
    variables = model.variables_by_path()
    tensors = {
        name: np.ascontiguousarray(transform.to_tensor([variables[path].numpy() for path in paths]))
        for name, (paths, transform) in model.weight_map().items()
    }
    assert len(tensors) < 28
    np.testing.assert_array_equal(load_model(values, Arrays(tensors))(IDS), model(IDS))
    with pytest.raises(ValueError, match="num_hidden_layers must fit"):
        load_model({**values, "num_hidden_layers": 28}, Arrays(tensors))


def test_long_lists_of_names_are_cut():
    _, values, tensors = make()
    more = {f"extra.{n}": np.zeros(1, "float32") for n in range(5000)}
    with pytest.raises(ValueError, match="and 4990 more") as caught:
        load_model(values, Arrays(tensors | more))
    assert len(str(caught.value)) < 1000
