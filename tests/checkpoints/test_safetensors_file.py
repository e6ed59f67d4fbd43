import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kerasllm.checkpoints.safetensors_file import (
    DTYPES,
    MAX_HEADER_BYTES,
    SafetensorsFile,
    write_safetensors,
)

RNG = np.random.default_rng(0)
TENSORS = {
    "matrix": RNG.normal(size=(5, 3)).astype("float32"),
    "half": RNG.normal(size=(2, 2, 2)).astype("float16"),
    "brain": RNG.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    "scalar": np.array(3.5),
    "none": np.zeros((0, 4), "float32"),
    "ids": np.arange(6),
}


def write(path, tensors):
    layout = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    write_safetensors(path, layout, tensors.__getitem__)


def file_with(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_the_package_reads_what_is_written(tmp_path):
    write(tmp_path / "x.safetensors", TENSORS)
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_what_the_package_writes_is_read(tmp_path):
    safetensors.numpy.save_file(TENSORS, tmp_path / "x.safetensors", metadata={"a": "b"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.shapes == {name: array.shape for name, array in TENSORS.items()}
        for name, array in TENSORS.items():
            assert file.read(name).dtype == array.dtype
            np.testing.assert_array_equal(file.read(name), array)
        np.testing.assert_array_equal(file.read("matrix", 1, 3), TENSORS["matrix"][1:3])
        np.testing.assert_array_equal(file.read("half", 1), TENSORS["half"][1:])


def test_every_dtype(tmp_path):
    for dtype in DTYPES.values():
        array = np.ones((2, 3), dtype)
        write(tmp_path / "x.safetensors", {"x": array})
        with SafetensorsFile(tmp_path / "x.safetensors") as file:
            assert file.read("x").dtype == dtype
            np.testing.assert_array_equal(file.read("x").astype("float32"), array.astype("float32"))


def test_a_tensor_other_than_announced(tmp_path):
    layout = {"x": (np.dtype("float32"), (2,))}
    with pytest.raises(ValueError, match=r"x must be float32 \(2,\). Received: float32 \(3,\)"):
        write_safetensors(tmp_path / "x", layout, lambda name: np.zeros(3, "float32"))


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"\0" * 7, "its tensors end at"),
        ({"a": entry()}, b"\0" * 9, "its tensors end at"),
        ({"a": entry(offsets=(4, 12))}, b"\0" * 12, "begins at 4, but what is before it ends at 0"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12, "'b' begins at 4"),
        ({"a": entry(offsets=(0, 4))}, b"\0" * 4, "has 4 bytes"),
        ({"a": entry(offsets=(8, 0))}, b"\0" * 8, "begins at 8"),
        ({"a": entry(shape=(2**62, 2**62, 2), offsets=(0, 8))}, b"\0" * 8, "has 8 bytes"),
        ({"a": entry(shape=(-2,))}, b"\0" * 8, "whole numbers"),
        ({"a": entry(shape=(True, 2))}, b"\0" * 8, "whole numbers"),
        ({"a": entry(shape=(1,) * 40)}, b"\0" * 8, "at most 32 axes"),
        ({"a": entry(offsets=(0, 8, 9))}, b"\0" * 8, "two offsets"),
        ({"a": entry(dtype="F128")}, b"\0" * 8, "the dtype of 'a' must be one of"),
        ({"a": {**entry(), "x": 1}}, b"\0" * 8, "must have dtype, shape and data_offsets"),
        ({"a": 3}, b"\0" * 8, "must have dtype, shape and data_offsets"),
        (b'{"a":1,"a":2}', b"", "Received twice: 'a'"),
        (b"[]", b"", "JSON object"),
        (b"{", b"", "JSON"),
        (b"\xff\xff", b"", "JSON"),
        (b"[" * 100_000, b"", "JSON"),
    ],
    ids=lambda value: None if isinstance(value, bytes | dict) else value[:30],
)
def test_hostile_headers(tmp_path, header, data, message):
    with pytest.raises(ValueError, match="damaged one.*" + message):
        SafetensorsFile(file_with(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("length", [10, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_absurd_header_length(tmp_path, length):
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match=f"the header has {length} bytes and the file 10"):
        SafetensorsFile(tmp_path / "x")


def test_every_truncation(tmp_path):
    write(tmp_path / "x", TENSORS)
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            SafetensorsFile(tmp_path / "x")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    write(tmp_path / "x", {"x": np.ones(100_000)})
    with SafetensorsFile(tmp_path / "x") as file:
        with (tmp_path / "x").open("r+b") as shorter:
            shorter.truncate(600_000)
        with pytest.raises(ValueError, match="became shorter"):
            file.read("x")


def test_fuzz(tmp_path):
    """Whatever the bytes, the reader gives arrays or a ValueError, and opens no more than the file."""
    write(tmp_path / "x", TENSORS)
    whole = np.frombuffer((tmp_path / "x").read_bytes(), "uint8")
    rng, accepted = np.random.default_rng(0), 0
    for _ in range(4000):
        bytes_ = whole.copy()
        # Most of the mutations in the header, or hardly anything but numbers would be hit.
        places = rng.integers(0, rng.choice([8, 400, len(whole)]), size=rng.integers(1, 4))
        bytes_[places] = rng.integers(0, 256, size=len(places))
        (tmp_path / "x").write_bytes(bytes_.tobytes())
        try:
            with SafetensorsFile(tmp_path / "x") as file:
                assert sum(file.read(name).nbytes for name in file.shapes) <= len(whole)
                accepted += 1
        except ValueError:
            pass
    assert 0 < accepted < 4000
