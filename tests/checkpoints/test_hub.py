"""Ids of the hub, with what an earlier download left in the cache: there is no network in the tests."""

import shutil

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from reference.weights import randomize

from kerasllm import GPT2, GPT2Config
from kerasllm.checkpoints import hub, load_checkpoint, save_folder

IDS = np.arange(6)[None]


@pytest.fixture(scope="module")
def model():
    return randomize(
        GPT2(GPT2Config(vocabulary_size=30, context_length=8, num_layers=1, num_heads=2, dim=8))
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that puts a folder into the cache as a revision of a repository."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(name, folder, revision="main", commit="0" * 40):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)

    return add


def test_cached_repository(cache, model, tmp_path):
    cache("owner/name", save_folder(tmp_path / "main", model))
    other = randomize(GPT2(model.config), seed=1)
    cache("owner/name", save_folder(tmp_path / "other", other), revision="v2", commit="1" * 40)
    np.testing.assert_array_equal(load_checkpoint("owner/name").model(IDS), model(IDS))
    np.testing.assert_array_equal(load_checkpoint("hf://owner/name").model(IDS), model(IDS))
    np.testing.assert_array_equal(load_checkpoint("owner/name", revision="v2").model(IDS), other(IDS))
    with pytest.raises(FileNotFoundError, match="'owner/name' .* in revision 'v3'"):
        load_checkpoint("owner/name", revision="v3")


def test_repository_that_is_not_in_the_cache(cache):
    with pytest.raises(FileNotFoundError, match="'owner/other' is no file or folder here"):
        load_checkpoint("owner/other")
    with pytest.raises(FileNotFoundError, match="'owner/other/x.gguf' is no file or folder here"):
        load_checkpoint("owner/other/x.gguf")


def test_repository_with_pickled_weights_only(cache, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")
    cache("owner/name", tmp_path / "x")
    with pytest.raises(ValueError, match="'owner/name' has no safetensors on the hub.*a pickle may run"):
        load_checkpoint("owner/name")


@pytest.mark.parametrize(
    "name",
    [
        "nothing", "./nothing", "/no/such/folder", "a/../b", "../b", "a/b/c", "a/b/../c.gguf", "a/ b",
        "a//b", "", "a/b.gguf/x", "https://example.com/a", "a\\b/c", "a/b\0",
    ],
)  # fmt: skip
def test_neither_path_nor_id(name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="must be a folder, a .gguf file, or an id of the hub"):
        hub.download(name)


def test_neither_code_nor_pickles_are_fetched():
    files = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt",
        "1_Pooling/config.json", "merges.txt",
        "pytorch_model.bin", "modeling_x.py", "model.pt", "onnx/model.onnx", "onnx/model.safetensors",
        "original/consolidated.00.pth", "consolidated.safetensors", "tf_model.h5", "README.md", "x.gguf",
    ]  # fmt: skip
    assert list(filter_repo_objects(files, allow_patterns=hub._WANTED)) == files[:9]


def test_kaggle_without_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kagglehub", None)
    with pytest.raises(ImportError, match=r"pip install 'kerasllm\[kerashub\]'"):
        load_checkpoint("kaggle://keras/gpt2/keras/gpt2_base_en")
