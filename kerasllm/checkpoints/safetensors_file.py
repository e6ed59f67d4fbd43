"""Reading and writing safetensors files tensor by tensor.

The format (https://huggingface.co/docs/safetensors): the length of a header as 8 bytes, the header as
JSON (name to dtype, shape and place), then the numbers. The `safetensors` package writes a file only
from all of its tensors at once and has no bfloat16 for NumPy in its older versions; here one tensor is in
memory at a time.
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from kerasllm.checkpoints.tensors import TensorSource, parse_json_object

DTYPES = {
    "BOOL": np.dtype("bool"),
    "U8": np.dtype("uint8"),
    "I8": np.dtype("int8"),
    "U16": np.dtype("uint16"),
    "I16": np.dtype("int16"),
    "U32": np.dtype("uint32"),
    "I32": np.dtype("int32"),
    "U64": np.dtype("uint64"),
    "I64": np.dtype("int64"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The limit of the `safetensors` package.
MAX_HEADER_BYTES = 100_000_000


class SafetensorsFile(TensorSource):
    """The tensors of one safetensors file.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is damaged: cut short, a header that is too long or no JSON, an unknown
            dtype, a shape that does not fit the bytes, tensors that overlap or leave gaps.
    """

    def __init__(self, path: str | os.PathLike):
        self.description = str(path)
        self._file = open(path, "rb")  # noqa: SIM115 – closed by close()
        try:
            self._places = self._read_header()
        except ValueError as error:
            self.close()
            raise ValueError(f"Not a safetensors file, or a damaged one: {path} ({error})") from error
        self.shapes = {name: shape for name, (_, shape, _) in self._places.items()}

    def close(self) -> None:
        self._file.close()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        dtype, shape, offset = self._places[name]
        if shape:
            stop = shape[0] if stop is None else stop
            shape = (stop - start, *shape[1:])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
        array = np.empty(shape, dtype)
        self._file.seek(offset)
        # Read, not mapped: pages of a mapped file would count as memory of the process.
        if self._file.readinto(array.reshape(-1).view("uint8")) != array.nbytes:
            raise ValueError(f"The file became shorter while it was read: {self.description}")
        return array

    def _read_header(self) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
        """Returns the dtype, shape and place in the file of each tensor."""
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"the header has {length} bytes and the file {size}")
        header = parse_json_object(self._file.read(length), "the header")
        header.pop("__metadata__", None)
        entries = {name: _parse_entry(name, entry) for name, entry in header.items()}
        places = {}
        end = 0
        for name, (dtype, shape, (begin, stop)) in sorted(entries.items(), key=lambda item: item[1][2]):
            if begin != end:
                raise ValueError(f"{name!r} begins at {begin}, but what is before it ends at {end}")
            if stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name!r} of {dtype} {list(shape)} has {stop - begin} bytes")
            places[name] = (dtype, shape, 8 + length + begin)
            end = stop
        if 8 + length + end != size:
            raise ValueError(f"its tensors end at {8 + length + end} and the file at {size}")
        return places


def _parse_entry(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """Checks one entry of the header: the dtype, the shape, begin and end."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"the dtype of {name!r} must be one of {sorted(DTYPES)}, not {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"the shape and offsets of {name!r} must be whole numbers")
    if len(shape) > 32 or len(offsets) != 2:
        raise ValueError(f"{name!r} must have at most 32 axes and two offsets")
    return DTYPES[dtype], tuple(shape), tuple(offsets)


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file; one tensor at a time is in memory.

    Args:
        path: The file to write.
        tensors: The dtype and shape of each tensor by its name.
        read: From a name to the tensor.

    Raises:
        ValueError: If a tensor has another dtype or shape than announced.
    """
    # transformers reads a file only if it says which framework it was made for.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with pathlib.Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in tensors.items():
            array = np.asarray(read(name), order="C")
            if (array.dtype, array.shape) != (dtype, shape):
                raise ValueError(f"{name} must be {dtype} {shape}. Received: {array.dtype} {array.shape}")
            file.write(array.reshape(-1).view("uint8").data)
        file.flush()
        os.fsync(file.fileno())
