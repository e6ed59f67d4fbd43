import json
import os
import subprocess
import sys

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from reference.tokenizer_kinds import train_byte_level

from kerasllm import GenerationConfig
from kerasllm.checkpoints import kerashub, load_checkpoint

IDS = np.array([[3, 1, 4, 1, 5, 2]])
SETTINGS = {
    "vocabulary_size": 7,
    "num_layers": 1,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
    "max_sequence_length": 12,
}
_BLOCK = "transformer_decoder"
SHAPES = {
    "layer_normalization/vars/0": (8,),
    "layer_normalization/vars/1": (8,),
    "position_embedding/vars/0": (12, 8),
    "reversible_embedding/vars/0": (7, 8),
    **{
        f"{_BLOCK}/_self_attention_layer/{name}_dense/vars/{number}": (8, 2, 4)[number:]
        for name in ("query", "key", "value")
        for number in (0, 1)
    },
    f"{_BLOCK}/_self_attention_layer/output_dense/vars/0": (2, 4, 8),
    f"{_BLOCK}/_self_attention_layer/output_dense/vars/1": (8,),
    f"{_BLOCK}/_feedforward_intermediate_dense/vars/0": (8, 16),
    f"{_BLOCK}/_feedforward_intermediate_dense/vars/1": (16,),
    f"{_BLOCK}/_feedforward_output_dense/vars/0": (16, 8),
    f"{_BLOCK}/_feedforward_output_dense/vars/1": (8,),
    **{
        f"{_BLOCK}/{name}/vars/{number}": (8,)
        for name in ("_self_attention_layer_norm", "_feedforward_layer_norm")
        for number in (0, 1)
    },
}


@pytest.fixture
def preset(tmp_path):
    """A GPT-2 preset as KerasHub writes it."""
    config = {"class_name": "GPT2Backbone", "registered_name": "keras_hub>GPT2Backbone", "config": SETTINGS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        for name, shape in SHAPES.items():
            file[f"layers/{name}"] = rng.normal(size=shape).astype("float32")
        file.create_group("vars")
    return tmp_path


def test_layouts(preset):
    model, tokenizer, generation, _ = load_checkpoint(preset)
    assert tokenizer is None and generation == {}
    weights = model.variables_by_path()
    with h5py.File(preset / "model.weights.h5") as file:
        attention = file[f"layers/{_BLOCK}/_self_attention_layer"]
        np.testing.assert_array_equal(
            weights["block_0/attention/key/kernel"], attention["key_dense/vars/0"][()].reshape(8, 8)
        )
        np.testing.assert_array_equal(
            weights["block_0/attention/output/kernel"], attention["output_dense/vars/0"][()].reshape(8, 8)
        )
        np.testing.assert_array_equal(
            weights["token_embedding/embeddings"], file["layers/reversible_embedding/vars/0"]
        )
    assert model.config.context_length == 12


def test_tokenizer(preset):
    assets = preset / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5, "c": 6}
    (assets / "vocabulary.json").write_text(json.dumps(vocabulary))
    (assets / "merges.txt").write_text("a b\nĠ a")
    tokenizer = load_checkpoint(preset).tokenizer
    assert tokenizer.encode("ab abc") == [3, 4, 3, 6]
    assert tokenizer.eos_id == 0


def test_tokenizer_of_llama3(tmp_path):
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    text = "Hello there, it's 1234567!  naïve\n\n I'LL <|eot_id|>"
    reference = train_byte_level("llama3", [text] * 3, 300, special)
    content = json.loads(reference.to_str())
    content["model"]["ignore_merges"] = True
    reference = tokenizers.Tokenizer.from_str(json.dumps(content))
    assets = tmp_path / "assets" / "tokenizer"
    assets.mkdir(parents=True)
    (assets / "vocabulary.json").write_text(json.dumps(reference.get_vocab()))
    (assets / "merges.txt").write_text("\n".join(" ".join(pair) for pair in content["model"]["merges"]))
    backbone = kerashub._BACKBONES["Llama3Backbone"]
    tokenizer, generation = kerashub._read_tokenizer(tmp_path, backbone)
    assert tokenizer.bos_id == reference.token_to_id("<|begin_of_text|>")
    assert tokenizer.eos_id == reference.token_to_id("<|end_of_text|>")
    assert tokenizer.encode(text, parse_special=True) == reference.encode(text).ids
    begun = tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode("Hello").ids
    assert begun == [tokenizer.bos_id, *reference.encode("Hello").ids]
    # An instruct model ends its turn with the one, a base model its text with the other.
    ends = GenerationConfig.from_huggingface(generation).end_ids(tokenizer.eos_id)
    assert ends == tuple(map(reference.token_to_id, ("<|end_of_text|>", "<|eot_id|>")))
    (assets / "vocabulary.json").write_text(json.dumps({"a": 0, "b": "1"}))
    with pytest.raises(ValueError, match="must number its tokens from 0"):
        kerashub._read_tokenizer(tmp_path, backbone)


def change_config(preset, **changes):
    config = json.loads((preset / "config.json").read_text())
    (preset / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_name": "Lambda", "module": "keras.layers"}, "must be one of .*'Lambda'"),
        ({"class_name": ["x"]}, "must be one of"),
        ({"config": 3}, "must be one of"),
        ({"config": {}}, "lacks a setting of GPT2Backbone"),
        ({"config": {**SETTINGS, "num_layers": 10**12}}, "every layer"),
        ({"config": {**SETTINGS, "num_layers": "1"}}, "every layer"),
        ({"config": {**SETTINGS, "num_heads": 3}}, "must divide"),
        ({"config": {**SETTINGS, "max_sequence_length": 13}}, "must fill"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_hostile_configs(preset, changes, message):
    change_config(preset, **changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(preset)


def test_missing_and_left_over_weights(preset):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        file["layers/extra/vars/0"] = np.zeros(3, "float32")
        del file["layers/position_embedding/vars/0"]
    with pytest.raises(ValueError, match=r"Missing: .*wpe.*Left over: \['extra/vars/0'\]"):
        load_checkpoint(preset)
    (preset / "model.weights.h5").unlink()
    with pytest.raises(FileNotFoundError, match="model.weights.h5"):
        load_checkpoint(preset)


def test_damaged_files(preset):
    whole = (preset / "model.weights.h5").read_bytes()
    for content in (b"", b"\x89HDF", whole[:1000], whole[: len(whole) // 2], b"x" * 5000):
        (preset / "model.weights.h5").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            load_checkpoint(preset)


@pytest.mark.parametrize("kind", ["external", "soft", "virtual", "raw", "empty", "compressed"])
def test_weights_must_be_in_the_file(preset, kind):
    """A dataset may point to another file, or unpack to far more than the file has."""
    (preset / "secret").write_bytes(b"s" * 4 * 96)
    with h5py.File(preset / "secret.h5", "w") as file:
        file["x"] = np.zeros((12, 8), "float32")
    with h5py.File(preset / "model.weights.h5", "a") as file:
        parent = file["layers/position_embedding/vars"]
        del parent["0"]
        if kind == "external":
            parent["0"] = h5py.ExternalLink(str(preset / "secret.h5"), "x")
        elif kind == "soft":
            parent["0"] = h5py.SoftLink("/layers/reversible_embedding/vars/0")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((12, 8), "float32")
            layout[:] = h5py.VirtualSource(str(preset / "secret.h5"), "x", (12, 8))
            parent.create_virtual_dataset("0", layout)
        elif kind == "raw":
            external = [(str(preset / "secret"), 0, h5py.h5f.UNLIMITED)]
            parent.create_dataset("0", (12, 8), "float32", external=external)
        elif kind == "empty":
            parent.create_dataset("0", (2**40, 8), "float32", chunks=(1024, 8))
        else:
            parent.create_dataset("0", data=np.zeros((12, 8), "float32"), compression="gzip")
    with pytest.raises(ValueError, match="must have no links|must hold all numbers"):
        load_checkpoint(preset)


def test_bfloat16_as_keras_writes_it(preset):
    embedding = keras.layers.Embedding(7, 8, dtype="bfloat16")
    model = keras.Sequential([embedding])
    model.build((None, 1))
    model.save_weights(preset / "half.weights.h5")
    with (
        h5py.File(preset / "half.weights.h5") as file,
        h5py.File(preset / "model.weights.h5", "a") as whole,
    ):
        parent = whole["layers/reversible_embedding/vars"]
        del parent["0"]
        file.copy("layers/embedding/vars/0", parent, "0")
        assert parent["0"].dtype == "V2"
    weights = load_checkpoint(preset, dtype="bfloat16").model.variables_by_path()
    loaded = weights["token_embedding/embeddings"].numpy()
    assert loaded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(loaded, embedding.embeddings.numpy())


@pytest.mark.parametrize(
    ("array", "name"),
    [
        (np.zeros((12, 8), "V2"), None),
        (np.zeros((12, 8), "V1"), "float8_e4m3fn"),
        (np.full((12, 8), b"x"), None),
    ],
)
def test_weights_must_be_numbers(preset, array, name):
    with h5py.File(preset / "model.weights.h5", "a") as file:
        parent = file["layers/position_embedding/vars"]
        del parent["0"]
        parent["0"] = array
        if name is not None:
            parent["0"].attrs["dtype"] = name
    with pytest.raises(
        ValueError, match=f"must hold numbers.*position_embedding/vars/0.*{name or array.dtype}"
    ):
        load_checkpoint(preset)


@pytest.mark.parametrize("kind", ["dataset", "tree", "cycle"])
def test_weights_under_two_names(preset, kind):
    """Hard links, walked path by path, would make a small file a tree of millions of groups."""
    with h5py.File(preset / "model.weights.h5", "a") as file:
        group = file["layers"]
        if kind == "dataset":
            group["twin"] = file["layers/position_embedding/vars/0"]
        elif kind == "cycle":
            group["twin"] = group
        else:
            for _ in range(8):
                child = group.create_group("0")
                for number in range(1, 20):
                    group[str(number)] = child
                group = child
    with pytest.raises(ValueError, match="must hold every group and dataset once"):
        load_checkpoint(preset)


# Against KerasHub itself

_WRITE_PRESETS = """
import sys
import keras, keras_hub, numpy as np

sizes = dict(vocabulary_size=20, hidden_dim=16, intermediate_dim=24)
llama = dict(**sizes, num_layers=3, num_query_heads=4, num_key_value_heads=2, rope_max_wavelength=500.0)
models = keras_hub.models
ids = np.array([[3, 1, 4, 1, 5, 2]])
mask = np.ones_like(ids)


def gelu_approximate(x):
    return keras.activations.gelu(x, approximate=True)


presets = {
    "gpt2": models.GPT2Backbone(**sizes, num_layers=3, num_heads=4, max_sequence_length=12),
    "llama": models.LlamaBackbone(**llama),
    "llama3": models.Llama3Backbone(
        **llama, tie_word_embeddings=True, rope_frequency_adjustment_factor=8.0, rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0, rope_pretraining_sequence_length=16,
    ),
    "bert": models.BertBackbone(**sizes, num_layers=3, num_heads=4, max_sequence_length=12),
    "t5": models.T5Backbone(**sizes, num_layers=2, num_heads=4, use_gated_activation=False),
    "t5_gated": models.T5Backbone(
        **sizes, num_layers=2, num_heads=4, key_value_dim=6, tie_embedding_weights=False,
        activation=keras_hub.src.utils.keras_utils.gelu_approximate,
    ),
}
for name, backbone in presets.items():
    rng = np.random.default_rng(0)
    for weight in backbone.weights:
        noise = rng.standard_normal(weight.shape)
        is_gain = weight.name in ("scale", "gamma") or "norm" in weight.path and weight.name == "weight"
        weight.assign(1 + 0.3 * noise if is_gain else 0.5 * noise)
    if name == "bert":
        output = backbone(dict(token_ids=ids, segment_ids=0 * ids, padding_mask=mask))["sequence_output"]
    elif name.startswith("t5"):
        output = backbone(dict(
            encoder_token_ids=ids, encoder_padding_mask=mask,
            decoder_token_ids=ids[:, :4], decoder_padding_mask=mask[:, :4],
        ))["decoder_sequence_output"]
        if name == "t5":
            output = output * 16**-0.5
        output = backbone.token_embedding(output, reverse=True)
    else:
        output = backbone(dict(token_ids=ids, padding_mask=mask))
        output = backbone.token_embedding(output, reverse=True)
    backbone.save_to_preset(f"{sys.argv[1]}/{name}")
    np.save(f"{sys.argv[1]}/{name}/expected.npy", keras.ops.convert_to_numpy(output))
"""


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    pytest.importorskip("keras_hub", reason="needs pip install 'kerasllm[kerashub]'")
    folder = tmp_path_factory.mktemp("presets")
    command = [sys.executable, "-c", _WRITE_PRESETS, str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "KERAS_BACKEND": "tensorflow"})
    return folder


@pytest.mark.reference
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3", "bert", "t5", "t5_gated"])
def test_same_outputs_as_kerashub(presets, name):
    model = load_checkpoint(presets / name).model
    expected = np.load(presets / name / "expected.npy")
    if name.startswith("t5"):
        memory = model.encode(IDS, np.ones_like(IDS))
        caches = {"memory_cache": model.make_memory_cache(memory), "memory_mask": np.ones_like(IDS)}
        output = model(IDS[:, :4], **caches)
    else:
        output = model(IDS)
    np.testing.assert_allclose(output, expected, atol=1e-4)
