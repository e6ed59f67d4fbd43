"""Which room may import which, and that the lists of rooms and packages are true."""

import ast
import configparser
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]

# A room is a module or folder directly below kerasllm/. Rooms that may import everything below them
# and are imported by the command only: tasks, quickstart.
ALLOWED = {
    "version": set(),
    "files": set(),
    "layers": set(),
    "tokenizers": {"files"},
    "models": {"layers"},
    "data": {"tokenizers"},
    "evaluation": set(),
    "config": {"models"},
    "checkpoints": {"models", "tokenizers", "files"},
    "generation": {"layers", "models", "tokenizers"},
    "training": {"layers", "models", "data", "tokenizers", "config", "files", "version"},
    "export": {"layers", "models", "generation", "tokenizers", "files", "litert", "version"},
    "tasks": {
        "checkpoints", "config", "data", "evaluation", "export", "files", "generation", "layers", "models",
        "tokenizers", "training", "version",
    },
    "launch": set(),
    "litert": set(),
    "litertlm": {"litert"},
    "terminal": set(),
    "doctor": set(),
    "quickstart": {"config", "litert", "models", "tasks", "tokenizers"},
}  # fmt: skip


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms():
    for path in (ROOT / "kerasllm").iterdir():
        if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__"):
            yield path.name.removesuffix(".py")


def test_rooms_import_only_what_is_below_them():
    for path in (ROOT / "kerasllm").rglob("*.py"):
        room = path.relative_to(ROOT / "kerasllm").parts[0].removesuffix(".py")
        allowed = ALLOWED.get(room)  # cli and __init__ may import everything
        for name in imports(path):
            top, _, rest = name.partition(".")
            # What runs a `.tflite` is the server's, and there is one of it.
            is_shared = room == "litert" and name.startswith("kerasllm_serving.litert.")
            assert is_shared or top not in ("serving", "kerasllm_serving", "tools", "tests"), (
                f"{path} imports {name}"
            )
            if top == "kerasllm" and allowed is not None:
                target = rest.partition(".")[0]
                assert target in allowed | {room}, f"{path}: {room} may not import {target}"


def test_every_room_is_listed():
    assert set(rooms()) - {"__init__", "cli"} == set(ALLOWED)


def test_serving_runs_without_kerasllm():
    for path in (ROOT / "serving").rglob("*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & {"kerasllm", "keras"}, path


def test_nothing_imports_tools():
    for folder in ("kerasllm", "serving", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "tools" not in {name.partition(".")[0] for name in imports(path)}, path


def test_setup_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {"kerasllm_serving"} | {
        ".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "kerasllm").rglob("__init__.py")
    }
    assert listed == found


def test_readme_tree_is_true():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```\n(kerasllm/\n.*?)```", readme, re.DOTALL)[1]
    top, named = None, set()
    for line in tree.splitlines():
        if not line.startswith(" "):
            top = line.split()[0].rstrip("/")
            assert (ROOT / top).exists(), f"the README's tree names {top}"
        elif line.startswith("  ") and not line.startswith("   "):
            for name in re.split(r"\s{2,}", line.strip())[0].split():
                assert (ROOT / top / name).exists(), f"the README's tree names {top}/{name}"
                named.add((top, name.rstrip("/").removesuffix(".py")))
    assert {("kerasllm", room) for room in rooms()} - named == {("kerasllm", "__init__")}
