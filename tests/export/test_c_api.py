"""The exported folder runs from TensorFlow's C API, in a program in which there is no Python."""

import pathlib
import shutil
import subprocess

import pytest
import tensorflow as tf

SOURCE = pathlib.Path(__file__).with_name("generate.c")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = pathlib.Path(tf.sysconfig.get_lib())
    program = tmp_path_factory.mktemp("c") / "generate"
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-isystem", tf.sysconfig.get_include()]
    command += [str(SOURCE), "-o", str(program), f"-Wl,-rpath,{library}"]
    found = [sorted(library.glob(f"libtensorflow_{name}.so*")) for name in ("cc", "framework")]
    assert all(found), f"no libraries of TensorFlow in {library}"
    command += [str(files[0]) for files in found]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return program


def run(program, *arguments):
    return subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, check=False, timeout=280
    )


def test_text_is_that_of_the_live_model(program, served, causal_lm):
    linked = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=False).stdout
    assert "libpython" not in linked
    for prompt in ("Once upon a time", "Mia sah é 🦊"):
        result = run(program, served / "1", "serving_default", "prompt", "text", prompt)
        assert result.returncode == 0, result.stderr.decode()
        assert result.stdout.decode() == causal_lm.generate(prompt)


def test_what_is_not_there_is_named(program, served):
    result = run(program, served / "1", "serving_default", "prompt", "no_such_output", "a")
    assert result.returncode == 1 and b"the folder has no: no_such_output" in result.stderr
    result = run(program, served / "2", "serving_default", "prompt", "text", "a")
    assert result.returncode == 1 and b"Could not find SavedModel" in result.stderr
