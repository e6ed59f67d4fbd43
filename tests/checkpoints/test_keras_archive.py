"""A .keras file from a stranger: nothing runs, nothing is written elsewhere."""

import base64
import contextlib
import json
import marshal
import pathlib
import warnings
import zipfile

import pytest

from kerasllm import CausalLM


@pytest.fixture
def archive(causal_lm, tmp_path):
    """A function that saves a model as `.keras`, with its config changed and further files in it."""

    def make(change_config=lambda config: None, **files):
        path = tmp_path / "in" / "model.keras"
        causal_lm.save(path)
        with zipfile.ZipFile(path) as file:
            contents = {name: file.read(name) for name in file.namelist()}
        config = json.loads(contents["config.json"])
        change_config(config)
        contents |= {"config.json": json.dumps(config).encode(), **files}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in contents.items():
                file.writestr(name, content)
        return path

    return make


def test_zip_slip(archive, tmp_path, monkeypatch):
    (tmp_path / "cwd" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd" / "deep")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "cwd"))
    absolute = str(tmp_path / "evil-absolute.txt")
    names = ["../evil.txt", "assets/../../evil.txt", absolute, "assets/tokenizer/../../../../evil.txt"]
    for name in names:
        path = archive(**{name: b"evil"})
        with warnings.catch_warnings(), contextlib.suppress(ValueError):
            warnings.simplefilter("ignore")  # Keras says which names it skips
            CausalLM.load(path)
        assert not [found for found in tmp_path.rglob("*evil*") if found.is_file()], name
    assert not pathlib.Path("/evil.txt").exists()


def test_code_in_the_config(archive, tmp_path):
    flag = tmp_path / "flag"
    code = compile(f"open({str(flag)!r}, 'w').close()", "x", "exec")
    function = {
        "class_name": "__lambda__",
        "config": {"value": [base64.b64encode(marshal.dumps(code)).decode(), None, None]},
    }
    evil_layer = {
        "module": "keras.layers",
        "class_name": "Lambda",
        "config": {"name": "evil", "function": function},
        "registered_name": None,
    }
    call = {"module": "os", "class_name": "system", "config": f"touch {flag}", "registered_name": None}
    callable_ = {"module": "builtins", "class_name": "function", "config": "exec", "registered_name": None}
    for evil in (evil_layer, call, callable_):

        def change(config, evil=evil):
            config["config"]["model"] = evil

        with pytest.raises(ValueError):
            CausalLM.load(archive(change))
        assert not flag.exists()


def test_another_class(archive):
    def change(config):
        config.update(module="keras.layers", class_name="Dense", registered_name=None, config={"units": 2})

    with pytest.raises(ValueError):
        CausalLM.load(archive(change))
