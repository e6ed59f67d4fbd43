import os
import pathlib
import subprocess
import sys

import pytest

from kerasllm import files
from kerasllm.files import new_file, new_folder, replaced_folder, write_json, write_text


def test_new_file_replaces_at_the_end(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    with new_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_failed_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(KeyboardInterrupt), new_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "1") as temporary:
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folder_never_overwrites(tmp_path):
    (tmp_path / "1").mkdir()
    with pytest.raises(FileExistsError, match="never overwrites"), new_folder(tmp_path / "1"):
        pass


def test_a_killed_export_leaves_no_version_folder(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from files import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'saved_model.pb').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # The module alone: the whole of kerasllm takes seconds to import.
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(files.__file__)}
    command = [sys.executable, "-c", code, str(tmp_path / "1")]
    result = subprocess.run(command, env=environment, check=False)
    assert result.returncode == -9
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1 and left[0].startswith(".") and not left[0].isdecimal()
    with new_folder(tmp_path / "1") as folder:  # and does not stand in the way of the next
        (folder / "saved_model.pb").write_text("whole")
    assert (tmp_path / "1" / "saved_model.pb").read_text() == "whole"


# Replacing a folder


def is_ours(name):
    return name.endswith(".json")


def write_old(folder):
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "stale.json", "README.md", "sub/note.txt"):
        (folder / name).write_text("old")


def test_replaced_folder(tmp_path):
    folder = tmp_path / "model"
    write_old(folder)
    with replaced_folder(folder, is_ours) as new:
        (new / "config.json").write_text("new")
        assert (folder / "config.json").read_text() == "old"
    assert contents(folder) == {"README.md": "old", "config.json": "new", "sub/note.txt": "old"}
    assert list(tmp_path.iterdir()) == [folder]


def test_replaced_folder_that_was_not_there(tmp_path):
    with replaced_folder(tmp_path / "a" / "model", is_ours) as new:
        (new / "config.json").write_text("new")
    assert contents(tmp_path) == {"a/model/config.json": "new"}


def test_a_failed_replacement_leaves_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write_old(folder)
    before = contents(folder)
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder, is_ours) as new:
        (new / "config.json").write_text("new")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {f"model/{name}": text for name, text in before.items()}
    # And in the worst moment: while the folders change places.
    rename, calls = pathlib.Path.rename, []

    def failing(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk gone")
        return rename(self, target)

    monkeypatch.setattr(files.pathlib.Path, "rename", failing)
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: None)  # a system without renameat2
    with pytest.raises(OSError, match="disk gone"), replaced_folder(folder, is_ours) as new:
        (new / "config.json").write_text("new")
    assert contents(tmp_path) == {f"model/{name}": text for name, text in before.items()}


def test_replacing_without_renameat2(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda *args, **kwargs: None)
    test_replaced_folder(tmp_path)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_link_to_a_folder_stays(tmp_path):
    write_old(tmp_path / "real")
    (tmp_path / "model").symlink_to(tmp_path / "real")
    with replaced_folder(tmp_path / "model", is_ours) as new:
        (new / "config.json").write_text("new")
    assert (tmp_path / "model").is_symlink()
    assert contents(tmp_path / "real") == {"README.md": "old", "config.json": "new", "sub/note.txt": "old"}


@pytest.mark.parametrize("path", [".", "..", "../..", "/proc", "note.txt"])
def test_what_cannot_be_swapped_is_refused_before_writing(tmp_path, monkeypatch, path):
    write_old(tmp_path)
    monkeypatch.chdir(tmp_path / "sub")
    with (
        pytest.raises(ValueError, match=r"must (not )?be .*\. Received: /"),
        replaced_folder(path, is_ours),
    ):
        pytest.fail("was let in")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "config.json", "stale.json", "sub"]


def test_a_mounted_folder_of_the_same_disk(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    line = f"36 35 98:0 /x {tmp_path}/a\\040b rw,noatime - ext3 /dev/root rw\n"
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self, **arguments: line)
    with (
        pytest.raises(ValueError, match="must not be a mount point"),
        replaced_folder(tmp_path / "a b", is_ours),
    ):
        pytest.fail("was let in")


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with replaced_folder(tmp_path / "model", is_ours) as new:
        (new / "config.json").write_text("new")
    assert contents(tmp_path) == {"model/config.json": "new"}
