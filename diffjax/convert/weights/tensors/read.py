"""Safetensors files, read: where each tensor lies, checked before memory is spent on any.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a header, little endian; the header,
a JSON object from names to `dtype`, `shape` and `data_offsets`; the tensors, row major, without gaps.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.tensors.dtypes import DTYPES, fitted
from diffjax.convert.weights.tensors.strict import parse, shown

# The largest header that the safetensors package reads.
LONGEST_HEADER = 100_000_000
MOST_AXES = 32
# Bytes read at a time: few enough to stay in a processor's cache while their axes are turned.
CHUNK = 1 << 17
# What people have where a safetensors file should be, by its first bytes.
OTHERS = {
    rb"version ": "a Git LFS pointer instead of the file: fetch it with `git lfs pull`",
    rb"PK\x03\x04": "a zip file, as PyTorch's pickles are, under another name; it is not opened",
    rb"\x80[\x02-\x05]": "a pickle under another name, which runs code of its own when it is read; it is not opened",
}


class Tensor(NamedTuple):
    """A tensor of a file: its type and shape, and where its first byte lies; `stamp` tells the file from another one
    that takes its place."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    stamp: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The part `index`, slices without steps, in memory; raises as `fill`."""
        out = np.empty([part.stop - part.start for part in bounds(index, self.shape)], self.dtype)
        self.fill(out, index)
        return out

    def fill(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Reads the part `index` into `out`, whose type and strides may be any; a chunk at a time is in memory besides.

        Args:
          out: of the shape of the part.
          index: slices without steps; the axes left out are whole.

        Raises:
          ValueError: for an array of another shape.
          TooLarge: for numbers that the type of `out` lacks.
          WeightsError: if the file is no longer the one whose header was read, or became shorter.
          OSError: if it cannot be read.
        """
        index = checked(out, index, self.shape)
        if out.size:
            with open(self.path, "rb", buffering=0) as file:
                if self.stamp not in (None, stamp_of(os.fstat(file.fileno()))):
                    raise WeightsError(f"{self.path}: was replaced while it was read; load it again")
                _fill(file, out, self, index)


def stamp_of(stat: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def checked(out: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """`bounds`, for an array that is to hold this part; raises `ValueError` for one of another shape."""
    ends = bounds(index, shape)
    wanted = tuple(part.stop - part.start for part in ends)
    if out.shape != wanted:
        raise ValueError(f"an array of shape {out.shape} for a part of shape {wanted}")
    return ends


def bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Slices without steps as `slice(start, stop)`, one for each axis of `shape`."""
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    ends = [part.indices(length)[:2] for part, length in zip(index, shape, strict=True)]
    return tuple(slice(start, max(start, stop)) for start, stop in ends)


def _fill(file, out, tensor, index):
    shape, part, row = tensor.shape, tensor, tensor.dtype.itemsize
    if shape:
        row *= math.prod(shape[1:])
        start, stop = index[0].start, index[0].stop
        part = tensor._replace(shape=(stop - start, *shape[1:]), offset=tensor.offset + start * row)
    rest = index[1:]
    if rest == bounds((), shape[1:]) and out.flags.c_contiguous and out.dtype == tensor.dtype:
        _read(file, out, part)
    elif part.nbytes <= CHUNK or part.shape in ((), (1,)):
        chunk = np.empty(part.shape, tensor.dtype)
        _read(file, chunk, part)
        out[...] = fitted(chunk[(slice(None), *rest) if shape else ()], out.dtype)
    else:
        # As many rows at a time as fit, or each row as a tensor of its own.
        many = CHUNK // row
        for i in range(0, len(out), many or 1):
            at = part.offset + i * row
            if many or not rest:
                count = min(many or 1, len(out) - i)
                some = part._replace(shape=(count, *shape[1:]), offset=at)
                _fill(file, out[i : i + count], some, (slice(0, count), *rest))
            else:
                _fill(file, out[i, ...], part._replace(shape=shape[1:], offset=at), rest)


def _read(file, out, tensor):
    """The bytes of a tensor into the contiguous array `out` of its type and size."""
    file.seek(tensor.offset)
    left = memoryview(out.reshape(-1).view(np.uint8))
    while left:
        count = file.readinto(left)
        if not count:
            raise WeightsError(f"{tensor.path}: became shorter while it was read; copy it again")
        left = left[count:]


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
        stat = os.fstat(file.fileno())
        size = stat.st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            other = next((what for magic, what in OTHERS.items() if re.match(magic, start)), "")
            other = other or ("text, no safetensors file" if re.fullmatch(rb"[\t\n\r -~]{8}", start) else "")
            told = other or f"cut off: a header of {length} bytes in a file of {size}; copy it again"
            raise WeightsError(f"{path}: {told}")
        if length > LONGEST_HEADER:
            raise WeightsError(f"{path}: a header of {length} bytes; the format allows {LONGEST_HEADER}")
        text = file.read(length)
    return parse_header(path, text, size, stamp_of(stat))


def parse_header(
    path: Path, text: bytes, size: int, stamp: tuple[int, ...] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """`read_header` of the file at `path` with `size` bytes, whose header is `text`."""
    try:
        header = parse(text)
    except ValueError as error:
        raise WeightsError(f"{path}: no safetensors file: its header is no JSON ({str(error)[:200]})") from None
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: no safetensors file: its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise WeightsError(f"{path}: the header's __metadata__ is no map from text to text")
    begin = 8 + len(text)
    tensors = {name: _tensor(path, name, entry, begin)._replace(stamp=stamp) for name, entry in header.items()}
    _check_layout(path, tensors, begin, size)
    return tensors, metadata


def _tensor(path, name, entry, begin):
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        raise _wrong(path, name, f"expected dtype, shape and data_offsets, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _wrong(path, name, f"unknown dtype {shown(dtype)}; known: {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MOST_AXES:
        raise _wrong(path, name, f"shape {shown(shape)}: expected at most {MOST_AXES} lengths")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _wrong(path, name, f"data_offsets {shown(offsets)}: expected a begin and an end")
    size, given = DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if math.prod(shape) * size != given:
        told = f"{shown(math.prod(shape) * size)} bytes, the header gives {given}"
        raise _wrong(path, name, f"{dtype} of shape {shape} takes {told}")
    if math.prod(filter(None, shape)) * size >= 2**63:
        raise _wrong(path, name, f"{dtype} of shape {shape}: without its zeros it would fit into no memory")
    return Tensor(path, DTYPES[dtype], tuple(shape), begin + offsets[0])


def _wrong(path, name, told):
    return WeightsError(f"{path}: tensor {shown(name)}: {told}")


def _naturals(values):
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(path, tensors, begin, size):
    """Raises `WeightsError` unless the tensors fill the file from `begin` to its end, one behind the other."""
    at = begin
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            what = "overlaps what lies before it" if tensor.offset < at else "has a gap before it"
            raise _wrong(path, name, f"{what}: byte {tensor.offset} instead of {at}")
        at += tensor.nbytes
    if at != size:
        what = "cut off" if at > size else "too long"
        raise WeightsError(f"{path}: {what}: its tensors end at byte {at}, the file at {size}; copy it again")
