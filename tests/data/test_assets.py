"""Where fetched assets are looked for, and the real texts if they are there."""

import hashlib

import pytest

from kerasllm.data.assets import ASSETS, asset_path
from kerasllm.data.sources import read_documents


def test_asset_is_found_in_the_cache_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KERASLLM_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run tools/fetch_assets moby"):
        asset_path("moby")
    (tmp_path / "moby").mkdir()
    (tmp_path / "moby" / "moby.txt").write_text("Call me Ishmael.")
    assert asset_path("moby") == tmp_path / "moby" / "moby.txt"
    (tmp_path / "minilm").mkdir()
    assert asset_path("minilm") == tmp_path / "minilm"


def test_cache_is_in_the_home_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("KERASLLM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/.cache/kerasllm/moby/moby.txt"):
        asset_path("moby")


def test_unknown_asset_is_refused():
    with pytest.raises(ValueError, match="name='whale'"):
        asset_path("whale")


def test_moby_dick_is_the_published_text():
    try:
        path = asset_path("moby")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    (text,) = read_documents(path)
    assert (len(text), len(set(text))) == (1_208_726, 89)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    assert digest == "53370c4c03a7f8cac1d3b2a57bc7da0b999c77a724a80f28136818bab539a5e6"


def test_spam_is_labelled_text():
    try:
        path = asset_path("spam")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(read_documents(path)) == 6_046


def test_every_asset_has_a_path_in_its_own_folder():
    assert all(path.split("/")[0] == name for name, path in ASSETS.items())
