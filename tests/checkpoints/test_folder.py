import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from keras import ops

from kerasllm import GPT2, CausalLM, GPT2Config
from kerasllm.checkpoints import folder as folder_module
from kerasllm.checkpoints import load_checkpoint, load_folder, save_folder

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
    loaded, tokenizer, generation, _ = load_folder(tmp_path)
    assert loaded.config == model.config
    assert tokenizer is None and generation == {}
    np.testing.assert_array_equal(loaded(IDS), model(IDS))
    assert (loaded.output_embedding is loaded.token_embedding) == model.config.tie_embeddings


def test_generation_settings_in_the_config_of_old_files(tmp_path):
    model = make_model()
    save_folder(tmp_path, model, None)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "do_sample": True,
        "temperature": 0.7,
        "max_length": 50,
        "eos_token_id": [3, 5],
        "top_k": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = CausalLM.from_pretrained(tmp_path).generation_config
    assert (settings.temperature, settings.eos_token_id) == (0.7, (3, 5))
    # The file of its own, where there is one, says all.
    (tmp_path / "generation_config.json").write_text("{}")
    settings = CausalLM.from_pretrained(tmp_path).generation_config
    assert (settings.temperature, settings.eos_token_id) == (0, None)


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
    model = load_folder(golden_gpt2).model
    golden = np.load(golden_gpt2 / "golden.npz")
    logits = ops.convert_to_numpy(model(golden["input_ids"], attention_mask=golden["attention_mask"]))
    seen = golden["attention_mask"].astype(bool)
    np.testing.assert_allclose(logits[seen], golden["logits"][seen], atol=1e-4)


def test_golden_checkpoint_survives_a_round_trip(golden_gpt2, tmp_path):
    model = load_folder(golden_gpt2).model
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
    loaded = load_folder(tmp_path, dtype="bfloat16").model
    assert {weight.dtype for weight in loaded.weights} == {"bfloat16"}
    np.testing.assert_allclose(np.asarray(loaded(IDS), "float32"), make_model()(IDS), atol=0.3)


def test_a_second_save_leaves_nothing_of_the_first(tmp_path, causal_lm):
    causal_lm.save_pretrained(tmp_path)
    save_folder(tmp_path, make_model(), None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


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


# Shards


def save_sharded(folder, size=2000, **changes):
    save_folder(folder, make_model(**changes), max_shard_size=size)
    return json.loads((folder / "model.safetensors.index.json").read_text())


def test_shards(tmp_path):
    index = save_sharded(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    sizes = []
    for path in shards:
        tensors = safetensors.numpy.load_file(path)
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        sizes.append(sum(array.nbytes for array in tensors.values()))
    assert len(shards) > 2 and max(sizes) <= 2000
    assert index["metadata"]["total_size"] == sum(sizes)
    np.testing.assert_array_equal(load_folder(tmp_path).model(IDS), make_model()(IDS))


def test_a_tensor_larger_than_a_shard(tmp_path):
    index = save_sharded(tmp_path, size=1)
    assert len(set(index["weight_map"].values())) == len(index["weight_map"]) == 4 + 2 * 12
    np.testing.assert_array_equal(load_folder(tmp_path).model(IDS), make_model()(IDS))


@pytest.mark.parametrize("size", [0, -1, "5TB", "GB", "1.5GB", None])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ValueError, match="`max_shard_size` must be"):
        save_folder(tmp_path / "x", make_model(), max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", ".x.safetensors",
                                  "x.bin", "..", "a\\b.safetensors", ""])  # fmt: skip
def test_an_index_must_stay_in_its_folder(tmp_path, file):
    index = save_sharded(tmp_path / "x")
    shutil.copy(next((tmp_path / "x").glob("*.safetensors")), tmp_path / "evil.safetensors")
    index["weight_map"]["transformer.wte.weight"] = file
    (tmp_path / "x" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="must name safetensors files in its own folder"):
        load_folder(tmp_path / "x")


def test_an_index_that_is_wrong(tmp_path):
    index = save_sharded(tmp_path)
    path, weight_map = tmp_path / "model.safetensors.index.json", index["weight_map"]
    first = weight_map["transformer.wte.weight"]
    last = weight_map["transformer.ln_f.bias"]
    without = {name: file for name, file in weight_map.items() if name != "transformer.wte.weight"}
    for changed, message in [
        ({**weight_map, "transformer.wte.weight": last}, "must be in the file that the index says"),
        (without, "must be in the file that the index says"),
        ({**weight_map, "extra": first}, "must be in the file that the index says"),
        ([], "`weight_map` must map tensors to files"),
        ({"a": ["x"]}, "`weight_map` must map tensors to files"),
        ({}, "must fill every layer"),
    ]:
        path.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(ValueError, match=message):
            load_folder(tmp_path)
    path.write_text(json.dumps(index))
    (tmp_path / first).unlink()
    with pytest.raises(FileNotFoundError, match=f"needs a file that is missing: .*{first}"):
        load_folder(tmp_path)


# Other dtypes, other files


def test_saving_half_precision(tmp_path):
    save_folder(tmp_path / "a", make_model())
    half = load_folder(tmp_path / "a", dtype="bfloat16").model
    save_folder(tmp_path / "b", half)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = safetensors.numpy.load_file(tmp_path / "b" / "model.safetensors")
    assert {str(array.dtype) for array in tensors.values()} == {"bfloat16"}
    again = load_folder(tmp_path / "b", dtype="bfloat16").model
    for weight, same in zip(again.weights, half.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), same.numpy())


def test_a_save_replaces_shards_and_keeps_the_rest(tmp_path):
    save_sharded(tmp_path)
    (tmp_path / ".git").mkdir()
    for name in ("README.md", ".git/HEAD", "pytorch_model.bin", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    save_folder(tmp_path, make_model(), more_files={"modules.json": {"a": 1}, "1_Pooling/config.json": {}})
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert names == [
        ".git/HEAD", "1_Pooling/config.json", "README.md",
        "config.json", "model.safetensors", "modules.json",
    ]  # fmt: skip
    assert (tmp_path / "README.md").read_text() == "README.md"


def test_the_working_directory_is_refused_before_the_weights_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder_module, "write_safetensors", lambda *arguments: pytest.fail("written"))
    with pytest.raises(
        ValueError, match=f"must not be the current working directory.*Received: {tmp_path}"
    ):
        save_folder(".", make_model())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["config", "weights", "tokenizer"])
def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, causal_lm, monkeypatch, moment):
    causal_lm.save_pretrained(tmp_path / "x")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "config":
        monkeypatch.setattr(folder_module, "write_json", interrupt)
    elif moment == "tokenizer":
        monkeypatch.setattr(type(causal_lm.tokenizer), "save", interrupt)
    else:
        monkeypatch.setattr(folder_module, "write_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_folder(tmp_path / "x", make_model(), causal_lm.tokenizer)
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_killed_save_leaves_the_old_checkpoint(tmp_path):
    save_folder(tmp_path / "x", make_model())
    code = (
        "import os, signal, sys\n"
        "from kerasllm.checkpoints import folder, load_folder, save_folder\n"
        "write = folder.write_safetensors\n"
        "def killed(path, *args):\n"
        "    write(path, *args)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "model = load_folder(sys.argv[1]).model\n"
        "for weight in model.weights:\n"
        "    weight.assign(weight + 1)\n"
        "folder.write_safetensors = killed\n"
        "save_folder(sys.argv[1], model)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False)
    assert result.returncode == -9
    np.testing.assert_array_equal(load_folder(tmp_path / "x").model(IDS), make_model()(IDS))
    save_folder(tmp_path / "x", make_model())  # what is left does not stand in the way


# What is refused


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "model.pkl"])
def test_pickled_weights_are_refused(damaged, name, tmp_path):
    folder, _, _ = damaged
    flag = tmp_path / "flag"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {flag}",)

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil()))
    for source in (folder, folder / name):
        with pytest.raises(ValueError, match=f"a pickle may run any code.*save_pretrained.*{name}"):
            load_checkpoint(source)
    assert not flag.exists()


def test_code_of_a_checkpoint_is_not_run(damaged, tmp_path):
    folder, change_config, _ = damaged
    flag = tmp_path / "flag"
    (folder / "modeling_evil.py").write_text(f"open({str(flag)!r}, 'w')\nclass Evil: pass\n")
    change_config(auto_map={"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    np.testing.assert_array_equal(load_checkpoint(folder).model(IDS), make_model()(IDS))
    change_config(model_type="evil")
    with pytest.raises(ValueError, match="`model_type` must be one of"):
        load_checkpoint(folder)
    assert not flag.exists()


@pytest.mark.parametrize("text", ['{"model_type": "gpt2", "model_type": "bert"}', "\xff", "[" * 10**5, "3"])
def test_configs_that_are_no_objects(damaged, text):
    folder, _, _ = damaged
    (folder / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="It must be"):
        load_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 10**12}, {"vocab_size": 10**15}, {"n_layer": "2"}, {"n_embd": 8.5}, {"n_embd": None},
        {"vocab_size": -1}, {"n_head": 0}, {"n_positions": [1]}, {"architectures": ["Evil"]},
        {"architectures": 3}, {"model_type": ["gpt2"]}, {"layer_norm_epsilon": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_hostile_configs(damaged, changes):
    folder, change_config, _ = damaged
    change_config(**changes)
    with pytest.raises(ValueError):
        load_folder(folder)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "model.txt").write_text("x")
    with pytest.raises(ValueError, match="must be a folder or a .gguf file"):
        load_checkpoint(tmp_path / "model.txt")
    with pytest.raises(FileNotFoundError, match="No file: .*config.json"):
        load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="`revision` is for the hub"):
        load_checkpoint(tmp_path, revision="main")
