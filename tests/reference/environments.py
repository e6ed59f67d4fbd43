"""Virtual environments that tests make from the package index."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

import pytest

# That of the tests' own environment, whatever `sys.executable` is set to later: to make another pip for
# each environment takes seconds.
_PIP = (sys.executable, "-m", "pip")


def make_environment(folder: str | os.PathLike, packages: Sequence[str]) -> str:
    """Makes an environment that has these packages and nothing else, and returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = str(pathlib.Path(folder, "bin", "python"))
    install(python, packages)
    return python


def install(python: str, packages: Sequence[str]) -> None:
    """Installs packages for a Python; skips the test where there is no index."""
    # Few of the modules are imported: they are compiled then.
    flags = ["--quiet", "--no-compile", "--disable-pip-version-check"]
    command = [*_PIP, "--python", python, "install", *flags, *packages]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode and "No matching distribution" in result.stderr:
        pytest.skip(f"needs the package index to install {packages}")
    assert result.returncode == 0, result.stderr[-4000:]
