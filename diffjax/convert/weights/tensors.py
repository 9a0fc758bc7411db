"""Safetensors files: where each tensor lies, checked before memory is spent on any, and how to write them.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a header, little endian; the header,
a JSON object from names to `dtype`, `shape` and `data_offsets`; the tensors, row major, without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.files import replacing

# The largest header that the safetensors package reads.
LONGEST_HEADER = 100_000_000
DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": jnp.dtype("bfloat16"),
    "F8_E4M3": jnp.dtype("float8_e4m3fn"), "F8_E5M2": jnp.dtype("float8_e5m2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("bool"),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor of a file: its type and shape, and where its first byte lies."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def open(self) -> np.ndarray:
        """The tensor, mapped: what is taken of it is read then."""
        if not self.nbytes:
            return np.zeros(self.shape, self.dtype)
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        return raw.view(self.dtype).reshape(self.shape)


def read_header(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata; nothing but the header is read.

    Raises:
      WeightsError: for what is no such file, whole: a header that is cut off, too long, no JSON, with a name twice;
        an unknown type; a shape that does not fit its bytes; tensors that overlap, leave gaps, or end elsewhere than
        the file.
      OSError: if it cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise WeightsError(f"{path}: cut off: a header of {length} bytes in a file of {size}; copy it again")
        if length > LONGEST_HEADER:
            raise WeightsError(f"{path}: a header of {length} bytes; the format allows {LONGEST_HEADER}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once)
    except _Twice as error:
        raise WeightsError(f"{path}: the header has the name {str(error)!r} twice") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: no safetensors file: its header is no JSON ({str(error)[:80]})") from None
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: no safetensors file: its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise WeightsError(f"{path}: the header's __metadata__ is no map from text to text")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(path, tensors, 8 + length, size)
    return tensors, metadata


class _Twice(Exception):
    """A name that a JSON object has twice."""


def _once(pairs):
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return out


def _tensor(path, name, entry, begin):
    where = f"{path}: tensor {name[:200]!r}"
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise WeightsError(f"{where}: expected dtype, shape and data_offsets, got {str(entry)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WeightsError(f"{where}: unknown dtype {str(dtype)[:40]!r}; known: {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > 32:
        raise WeightsError(f"{where}: shape {str(shape)[:80]}: expected at most 32 lengths")
    if not _naturals(offsets) or len(offsets) != 2:
        raise WeightsError(f"{where}: data_offsets {str(offsets)[:80]}: expected a begin and an end")
    wanted, given = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if wanted != given:
        told = f"{str(wanted)[:40]} bytes, the header gives {given}"
        raise WeightsError(f"{where}: {dtype} of shape {shape} takes {told}")
    return Tensor(path, DTYPES[dtype], tuple(shape), begin + offsets[0])


def _naturals(values):
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(path, tensors, begin, size):
    """Raises `WeightsError` unless the tensors fill the file from `begin` to its end, one behind the other."""
    at = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            what = "overlaps what lies before it" if tensor.offset < at else "has a gap before it"
            raise WeightsError(f"{path}: tensor {name[:200]!r} {what}: byte {tensor.offset} instead of {at}")
        at += tensor.nbytes
    if at != size:
        what = "cut off" if at > size else "too long"
        raise WeightsError(f"{path}: {what}: its tensors end at byte {at}, the file at {size}; copy it again")


class Source(NamedTuple):
    """A tensor to be written: `read()` gives the array when its turn comes, so that one is in memory at a time."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: str | os.PathLike, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file in one move: after an error, such as a full disk, `path` is what it was.

    Wide types come first, so that every tensor lies at a multiple of its type's size.

    Raises:
      WeightsError: for a type that the format does not have.
      OSError: disk full, folder gone or read-only.
    """
    unknown = {name: source.dtype for name, source in tensors.items() if source.dtype not in NAMES}
    if unknown:
        name, dtype = next(iter(unknown.items()))
        raise WeightsError(f"{path}: tensor {name!r} has type {dtype}, which safetensors does not have")
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, source in ordered:
        header[name] = dict(
            dtype=NAMES[source.dtype], shape=list(source.shape), data_offsets=[at, at + source.nbytes]
        )
        at += source.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, source in ordered:
            file.write(np.ascontiguousarray(source.read()).view(np.uint8).data)
