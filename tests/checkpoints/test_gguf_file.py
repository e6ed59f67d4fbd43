import struct

import gguf
import numpy as np
import pytest
from reference.gguf_files import write_gguf

from kerasllm.checkpoints.gguf_file import GGUFFile

RNG = np.random.default_rng(0)
METADATA = {
    "a.text": "größer",
    "a.flag": True,
    "a.number": 7,
    "a.float": 0.5,
    "a.texts": ["x", "", "äöü"],
    "a.numbers": [1, 2, 3],
}
TENSORS = {
    "matrix": RNG.normal(size=(3, 256)).astype("float32"),
    "vector": RNG.normal(size=5).astype("float32"),
    "cube": RNG.normal(size=(2, 3, 32)).astype("float32"),
}
# Those that the package can write; it reads the others (K-quants) from llama.cpp's files.
WRITABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]
READABLE = "Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ1_S IQ1_M".split()


@pytest.fixture
def path(tmp_path):
    return write_gguf(tmp_path / "x.gguf", METADATA, TENSORS, {"cube": "Q8_0"})


def test_metadata(path):
    with GGUFFile(path) as file:
        assert file.metadata["general.architecture"] == "llama"
        for key, value in METADATA.items():
            found = file.metadata[key]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == value


def test_tensors(path):
    with GGUFFile(path) as file:
        assert file.shapes == {name: array.shape for name, array in TENSORS.items()}
        np.testing.assert_array_equal(file.read("matrix"), TENSORS["matrix"])
        np.testing.assert_array_equal(file.read("matrix", 1, 2), TENSORS["matrix"][1:2])
        np.testing.assert_array_equal(file.read("vector"), TENSORS["vector"])
        np.testing.assert_array_equal(file.read("vector", 2), TENSORS["vector"][2:])
        np.testing.assert_allclose(file.read("cube"), TENSORS["cube"], atol=0.03)
        np.testing.assert_array_equal(file.read("cube", 1), file.read("cube")[1:])


@pytest.mark.parametrize("kind", WRITABLE)
def test_quantisations(tmp_path, kind):
    array = TENSORS["matrix"]
    with GGUFFile(write_gguf(tmp_path / "x.gguf", {}, {"x": array, "y": array}, {"x": kind})) as file:
        loaded = file.read("x")
        coarse = {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02, "TQ1_0": 2.5, "TQ2_0": 2.5}
        np.testing.assert_allclose(loaded.astype("float32"), array, atol=coarse.get(kind, 0.4))
        np.testing.assert_array_equal(file.read("x", 2), loaded[2:])
        np.testing.assert_array_equal(file.read("y"), array)


@pytest.mark.parametrize("kind", READABLE)
def test_blocks_are_unpacked_where_they_lie(tmp_path, kind):
    """Random blocks: each row of the file is unpacked on its own, with the right length."""
    kind = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, size=(4, 256 // block * block_bytes), dtype="uint8")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("before", np.ones(3, "float32"))
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert file.shapes["x"] == (4, 256)
        expected = gguf.quants.dequantize(raw, kind)
        np.testing.assert_array_equal(file.read("x"), expected)
        np.testing.assert_array_equal(file.read("x", 1, 3), expected[1:3])


# Files by hand


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def number_key(name, value=7):
    return text(name) + struct.pack("<II", 4, value)


def tensor(name="x", shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf_bytes(keys=(), tensors=(), data=b"\0" * 64, version=3, magic=b"GGUF", counts=None):
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = magic + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join((*keys, *tensors))
    return header + b"\0" * (-len(header) % 32) + data


def nested(depth):
    """A key whose value is an array in an array …"""
    return text("deep") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


def test_a_file_by_hand_of_each_version(tmp_path):
    for version in (2, 3):
        data = np.arange(4, dtype="float32").tobytes()
        (tmp_path / "x").write_bytes(gguf_bytes([number_key("a"), nested(2)], [tensor()], data, version))
        with GGUFFile(tmp_path / "x") as file:
            assert file.metadata == {"a": 7, "deep": [[file.metadata["deep"][0][0]]]}
            np.testing.assert_array_equal(file.read("x"), [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "would take 4 bytes"),
        (gguf_bytes(magic=b"GGML"), "does not begin with GGUF"),
        (gguf_bytes(version=1), "version must be one of"),
        (gguf_bytes(version=0x03000000), "big-endian"),
        (gguf_bytes(counts=(2**63, 0)), "tensors and keys"),
        (gguf_bytes(counts=(0, 2**40)), "tensors and keys"),
        (gguf_bytes([number_key("a"), number_key("a")]), "the key 'a' comes twice"),
        (gguf_bytes([text("a") + struct.pack("<I", 13)]), r"unknown type \(13\)"),
        (gguf_bytes([text("a") + struct.pack("<IIQ", 9, 4, 2**62)]), "more than there are"),
        (gguf_bytes([text("a") + struct.pack("<IIQ", 9, 8, 2**62)]), "an array"),
        (gguf_bytes([text("a") + struct.pack("<IQ", 8, 2**60)]), "a text has"),
        (gguf_bytes([struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1)]), "utf-8"),
        (gguf_bytes([nested(1000)]), "nested too deep"),
        (gguf_bytes([number_key("general.alignment", 3)]), "power of two, not 3"),
        (gguf_bytes([number_key("general.alignment", 0)]), "power of two, not 0"),
        (gguf_bytes([], [tensor(), tensor(offset=32)]), "the tensor 'x' comes twice"),
        (gguf_bytes([], [tensor(shape=())]), "1 to 4 axes, not 0"),
        (gguf_bytes([], [tensor(shape=(1,) * 5)]), "1 to 4 axes, not 5"),
        (gguf_bytes([], [tensor(kind=999)]), "unknown type: 999"),
        (gguf_bytes([], [tensor(kind=26)]), "must hold floats, not I32"),
        (gguf_bytes([], [tensor(shape=(32,), kind=9)]), "can be unpacked, not Q8_1"),
        (gguf_bytes([], [tensor(shape=(256,), kind=15)]), "can be unpacked, not Q8_K"),
        (gguf_bytes([], [tensor(shape=(31,), kind=8)]), "Q8_0 cannot have the shape"),
        (gguf_bytes([], [tensor(shape=(4, 0))]), "cannot have the shape"),
        (gguf_bytes([], [tensor(shape=(2**32, 2**32, 2))]), "and the file at"),
        (gguf_bytes([], [tensor(offset=2**63)]), "and the file at"),
        (gguf_bytes([], [tensor(offset=64)]), "and the file at"),
        (gguf_bytes([], [tensor(offset=4)]), "multiple of 32, not at 4"),
        (gguf_bytes([], [tensor(shape=(9,)), tensor("y", offset=32)]), "'y' and 'x' overlap"),
    ],
)
def test_hostile_files(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="damaged one.*" + message):
        GGUFFile(tmp_path / "x")


def test_every_truncation(path):
    whole = path.read_bytes()
    for length in [
        *range(600),
        *range(600, len(whole) - 31, 37),
    ]:  # the last tensor is padded by 31 at most
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged"):
            GGUFFile(path)


def test_fuzz(path):
    """Whatever the bytes, the reader gives arrays or a ValueError."""
    whole = np.frombuffer(path.read_bytes(), "uint8")
    rng, accepted = np.random.default_rng(0), 0
    for _ in range(3000):
        bytes_ = whole.copy()
        places = rng.integers(0, rng.choice([24, 600, len(whole)]), size=rng.integers(1, 4))
        bytes_[places] = rng.integers(0, 256, size=len(places))
        path.write_bytes(bytes_.tobytes())
        try:
            with GGUFFile(path) as file:
                for name in file.shapes:
                    file.read(name)
                accepted += 1
        except ValueError:
            pass
    assert 0 < accepted < 3000
