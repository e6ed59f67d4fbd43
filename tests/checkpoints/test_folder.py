import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from keras import ops

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.checkpoints import load_folder, save_folder

IDS = np.arange(12).reshape(2, 6)


def make_model(**changes):
    config = GPT2Config(
        **{"vocabulary_size": 30, "context_length": 8, "num_layers": 2, "num_heads": 2, "dim": 8, **changes}
    )
    model, rng = GPT2(config), np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(0.5 * rng.normal(size=weight.shape))
    return model


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False}, {"use_bias": False, "activation": "gelu"}, {"intermediate_dim": 20}],
    ids=str,
)
def test_round_trip(tmp_path, changes):
    model = make_model(**changes)
    save_folder(tmp_path, model, None)
    loaded, tokenizer, generation = load_folder(tmp_path)
    assert loaded.config == model.config
    assert tokenizer is None and generation == {}
    np.testing.assert_array_equal(loaded(IDS), model(IDS))
    assert (loaded.output_embedding is loaded.token_embedding) == model.config.tie_embeddings


def test_layout_is_that_of_transformers(tmp_path):
    """The names, shapes and settings that transformers 5 writes for a GPT-2."""
    save_folder(tmp_path, make_model(), None)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert tensors["transformer.h.1.attn.c_attn.weight"].shape == (8, 24)
    assert tensors["transformer.h.0.mlp.c_proj.bias"].shape == (8,)
    assert len(tensors) == 4 + 2 * 12
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert (config["n_embd"], config["activation_function"]) == (8, "gelu_new")


def test_golden_checkpoint_of_transformers(golden_gpt2):
    model, _, _ = load_folder(golden_gpt2)
    golden = np.load(golden_gpt2 / "golden.npz")
    logits = ops.convert_to_numpy(model(golden["input_ids"], attention_mask=golden["attention_mask"]))
    seen = golden["attention_mask"].astype(bool)
    np.testing.assert_allclose(logits[seen], golden["logits"][seen], atol=1e-4)


def test_golden_checkpoint_survives_a_round_trip(golden_gpt2, tmp_path):
    model, _, _ = load_folder(golden_gpt2)
    save_folder(tmp_path, model, None)
    before = safetensors.numpy.load_file(golden_gpt2 / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])
    written = json.loads((golden_gpt2 / "config.json").read_text())
    again = json.loads((tmp_path / "config.json").read_text())
    same = ["activation_function", "layer_norm_epsilon", "n_embd", "n_head", "n_inner", "n_layer"]
    assert {name: again[name] for name in same} == {name: written[name] for name in same}


@pytest.fixture
def golden_gpt2(pytestconfig):
    return pytestconfig.rootpath / "tests" / "golden" / "gpt2"


@pytest.fixture
def damaged(tmp_path):
    """A folder to damage: damaged(function) → load_folder fails."""
    save_folder(tmp_path, make_model(), None)

    def change_config(**values):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def change_tensors(change):
        path = tmp_path / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path)

    return tmp_path, change_config, change_tensors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt9"}, "gpt9"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=False. Received"),
        ({"sliding_window": 5}, "sliding_window=5"),
        ({"attn_pdrop": 0.5}, "must be equal, for GPT2Config has one `dropout`"),
        ({"activation_function": "tanh"}, "tanh"),
        ({"n_layer": 3}, "Missing"),
        ({"n_embd": 10}, r"must fill .* of shape"),
    ],
)
def test_config_that_does_not_fit(damaged, values, message):
    folder, change_config, _ = damaged
    change_config(**values)
    with pytest.raises(ValueError, match=message):
        load_folder(folder)


def test_missing_and_left_over_tensors(damaged):
    folder, _, change_tensors = damaged
    change_tensors(lambda tensors: tensors.update(extra=tensors.pop("transformer.wpe.weight")))
    with pytest.raises(ValueError, match=r"Missing: \['transformer.wpe.weight'\]. Left over: \['extra'\]"):
        load_folder(folder)


def test_tensor_that_is_only_left_over(damaged):
    folder, _, change_tensors = damaged
    change_tensors(lambda tensors: tensors.update(extra=np.zeros(3, "float32")))
    with pytest.raises(ValueError, match=r"Missing: \[\]. Left over: \['extra'\]"):
        load_folder(folder)


def test_damaged_files(damaged):
    folder, _, _ = damaged
    whole = (folder / "model.safetensors").read_bytes()
    for part in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 100):
        (folder / "model.safetensors").write_bytes(part)
        with pytest.raises(ValueError, match="damaged"):
            load_folder(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        load_folder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="JSON object"):
        load_folder(folder)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_folder(folder)


def test_loading_in_half_precision(tmp_path):
    save_folder(tmp_path, make_model(), None)
    loaded, _, _ = load_folder(tmp_path, dtype="bfloat16")
    assert {weight.dtype for weight in loaded.weights} == {"bfloat16"}
    np.testing.assert_allclose(np.asarray(loaded(IDS), "float32"), make_model()(IDS), atol=0.3)


def test_a_second_save_leaves_nothing_of_the_first(tmp_path, causal_lm):
    causal_lm.save_pretrained(tmp_path)
    save_folder(tmp_path, make_model(), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_end_tokens_must_agree(tmp_path, causal_lm):
    causal_lm.save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 7}))
    with pytest.raises(ValueError, match="end token of generation_config.json .*Received: 7 and 0"):
        CausalLM.from_pretrained(tmp_path)


def test_causal_lm_folder(tmp_path, causal_lm):
    causal_lm.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    loaded = CausalLM.load(tmp_path)
    assert loaded.generation_config == causal_lm.generation_config
    assert loaded.generate("Once") == causal_lm.generate("Once")
