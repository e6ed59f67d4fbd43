"""Reading GGUF files, the format of llama.cpp: metadata and tensors, many of them quantised.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every length and
place is checked against the file before it is used; the numbers are unpacked by the `gguf` package.
"""

import functools
import math
import os
import struct
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from kerasllm.checkpoints.tensors import TensorSource

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_AXES = 4
_MAX_NESTING = 4
# Metadata hold a vocabulary and its merges: a few megabytes; the largest have 262,144 tokens.
MAX_METADATA_BYTES = 1 << 28
MAX_NAME_BYTES = 1 << 16

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), 7: np.dtype("bool"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
# Tensors of these types are plain arrays; the others are blocks that `gguf` unpacks to float32.
_PLAIN = {
    gguf.GGMLQuantizationType.F16: np.dtype("<f2"),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    gguf.GGMLQuantizationType.F32: np.dtype("<f4"),
    gguf.GGMLQuantizationType.F64: np.dtype("<f8"),
}
_INTEGERS = {gguf.GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64")}


class GGUFFile(TensorSource):
    """The metadata and tensors of a GGUF file of version 2 or 3, little-endian.

    Args:
        path: The file.

    Attributes:
        metadata: Values by key: numbers, texts, NumPy arrays of numbers, lists of texts.

    Raises:
        ValueError: If the file is damaged: cut short, of another version, with absurd lengths, places
            outside the file or overlapping, unknown types, or names that come twice.
    """

    def __init__(self, path: str | os.PathLike):
        self.description = str(path)
        self._file = open(path, "rb")  # noqa: SIM115 – closed by close()
        self._size = os.fstat(self._file.fileno()).st_size
        self._place = 0  # where in the file the header has been read up to
        try:
            self.metadata, self._places = self._read_header()
        except (ValueError, OverflowError) as error:
            self.close()
            raise ValueError(f"Not a GGUF file, or a damaged one: {path} ({error})") from error
        self.shapes = {name: shape for name, (_, shape, _) in self._places.items()}

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        kind, shape, place = self._places[name]
        if len(shape) < 2 and kind not in _PLAIN:
            return self._unpack(kind, (1, *shape), place)[0][start:stop]
        stop = shape[0] if stop is None else stop
        row_bytes = _byte_count(kind, shape) // shape[0]
        return self._unpack(kind, (stop - start, *shape[1:]), place + start * row_bytes)

    def _unpack(self, kind: gguf.GGMLQuantizationType, shape: tuple[int, ...], place: int) -> np.ndarray:
        array = np.empty(_byte_count(kind, shape), "uint8")
        self._file.seek(place)
        if self._file.readinto(array) != array.nbytes:
            raise ValueError(f"The file became shorter while it was read: {self.description}")
        if kind in _PLAIN:
            return array.view(_PLAIN[kind]).reshape(shape)
        rows = array.reshape(math.prod(shape[:-1]), -1)
        # Damaged scales may overflow; the result shows it.
        with np.errstate(all="ignore"):
            return gguf.quants.dequantize(rows, kind).reshape(shape)

    # The header

    def _read_header(self) -> tuple[dict[str, Any], dict[str, tuple]]:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._integer("<I")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise ValueError("it is big-endian; only little-endian files can be read")
        if version not in VERSIONS:
            raise ValueError(f"its version must be one of {VERSIONS}, not {version}")
        tensor_count, key_count = self._integer("<Q"), self._integer("<Q")
        # A tensor takes 24 bytes at least, a key 13.
        self._check_fits(24 * tensor_count + 13 * key_count, "tensors and keys")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string(MAX_NAME_BYTES)
            if key in metadata:
                raise ValueError(f"the key {key!r} comes twice")
            metadata[key] = self._value(self._integer("<I"))
        entries = {}
        for _ in range(tensor_count):
            name, *entry = self._tensor_entry()
            if name in entries:
                raise ValueError(f"the tensor {name!r} comes twice")
            entries[name] = entry
        return metadata, self._find_places(entries, _alignment(metadata))

    def _tensor_entry(self) -> tuple[str, gguf.GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string(MAX_NAME_BYTES)
        axes = self._integer("<I")
        if not 1 <= axes <= _MAX_AXES:
            raise ValueError(f"{name!r} must have 1 to {_MAX_AXES} axes, not {axes}")
        # The fastest axis comes first, as in Fortran.
        shape = tuple(self._integer("<Q") for _ in range(axes))[::-1]
        number = self._integer("<I")
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{name!r} has an unknown type: {number}") from None
        if kind in _INTEGERS:
            raise ValueError(f"{name!r} must hold floats, not {kind.name}")
        if not _can_be_unpacked(kind):
            raise ValueError(f"{name!r} must be of a type that can be unpacked, not {kind.name}")
        if min(shape) < 1 or shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"{name!r} of type {kind.name} cannot have the shape {list(shape)}")
        return name, kind, shape, self._integer("<Q")

    def _find_places(self, entries: dict[str, list], alignment: int) -> dict[str, tuple]:
        """Returns the type, shape and place in the file of each tensor."""
        begin = -(-self._place // alignment) * alignment
        places, end, previous = {}, 0, None
        for name, (kind, shape, offset) in sorted(entries.items(), key=lambda item: item[1][2]):
            if offset % alignment:
                raise ValueError(f"{name!r} must begin at a multiple of {alignment}, not at {offset}")
            if offset < end:
                raise ValueError(f"{name!r} and {previous!r} overlap")
            end, previous = offset + _byte_count(kind, shape), name
            if begin + end > self._size:
                raise ValueError(f"{name!r} ends at {begin + end} and the file at {self._size}")
            places[name] = (kind, shape, begin + offset)
        return places

    def _value(self, kind: int, nesting: int = 0) -> Any:
        if kind == _STRING:
            return self._string(MAX_METADATA_BYTES)
        if kind in _NUMBERS:
            return np.frombuffer(self._take(_NUMBERS[kind].itemsize), _NUMBERS[kind])[0].item()
        if kind != _ARRAY or nesting == _MAX_NESTING:
            raise ValueError(f"a value has an unknown type ({kind}), or arrays are nested too deep")
        kind, count = self._integer("<I"), self._integer("<Q")
        if kind in _NUMBERS:
            return np.frombuffer(self._take(count * _NUMBERS[kind].itemsize), _NUMBERS[kind])
        self._check_fits(8 * count, "an array")
        return [self._value(kind, nesting + 1) for _ in range(count)]

    def _string(self, most_bytes: int) -> str:
        length = self._integer("<Q")
        if length > most_bytes:
            raise ValueError(f"a text has {length} bytes")
        return self._take(length).decode("utf-8")

    def _integer(self, layout: str) -> int:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _take(self, count: int) -> bytes:
        self._check_fits(count, "a value")
        self._place += count
        return self._file.read(count)

    def _check_fits(self, count: int, what: str) -> None:
        if count > min(self._size, MAX_METADATA_BYTES) - self._place:
            raise ValueError(f"{what} at {self._place} would take {count} bytes, more than there are")


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two, not {alignment!r}")
    return alignment


@functools.cache
def _can_be_unpacked(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether blocks of this type become numbers: one is tried, for the package has no list."""
    if kind in _PLAIN:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), "uint8"), kind)
    except NotImplementedError:
        return False
    return True


def _byte_count(kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes
