"""Reading boxes of leaves out of a checkpoint, each block checked against its checksum."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore

from diffjax.train.checkpoint import meta as metas
from diffjax.train.checkpoint.blocks import checksum
from diffjax.train.checkpoint.errors import Damaged

_THREADS = 4


class Box(NamedTuple):
    """A part of a leaf: the index of its first element, and its extent."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    box: Box
    file: Path
    offset: int
    crc32: str


def read_leaves(folder: Path, meta: dict, wanted: Mapping[str, Sequence[Box]]) -> Iterator[tuple[str, dict]]:
    """`(leaf, {box: array})` for the wanted boxes, leaf by leaf in the order of `wanted`, as host arrays.

    Reads the blocks that overlap with the boxes and no others (in format 1, whole leaves).

    Raises:
      Damaged: on a block that is missing, cut or changed; names the leaf.
    """
    if meta["format"] == 1:
        found = read_format_1(folder, {name: meta["leaves"][name] for name in wanted})
        for name, array in found.items():
            yield name, {box: array[_slices(box, Box((0,) * array.ndim, array.shape))] for box in wanted[name]}
        return
    table = _table(folder, meta)
    dtypes = {name: np.dtype(meta["leaves"][name]["dtype"]) for name in wanted}
    read = lambda name: {box: _read_box(name, table.get(name, []), box, dtypes[name]) for box in wanted[name]}
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from zip(wanted, pool.map(read, wanted), strict=True)


def whole(entry: dict) -> Box:
    """The box that is all of a leaf, from its entry `{"shape": ...}`."""
    return Box((0,) * len(entry["shape"]), tuple(entry["shape"]))


def _table(folder: Path, meta: dict) -> dict[str, list[_Stored]]:
    table: dict[str, list[_Stored]] = {}
    for process in range(meta["processes"]):
        content = metas.unseal(folder, f"{metas.STATE}/blocks-{process}.json")
        file = folder / metas.STATE / f"blocks-{process}.bin"
        for leaf, blocks in content["blocks"].items():
            stored = (_Stored(Box(tuple(start), tuple(shape)), file, at, crc) for start, shape, at, crc in blocks)
            table.setdefault(leaf, []).extend(stored)
    return table


def _read_box(name: str, stored: list[_Stored], box: Box, dtype: np.dtype) -> np.ndarray:
    out, filled = np.empty(box.shape, dtype), 0
    for block in stored:
        common = _overlap(block.box, box)
        if common is None:
            continue
        data = _read_block(name, block, dtype)
        if common == box == block.box:
            return data
        out[_slices(common, box)] = data[_slices(common, block.box)]
        filled += math.prod(common.shape)
    if filled != out.size:
        raise Damaged(f"leaf {name!r}: {filled} of the {out.size} numbers wanted of it are there")
    return out


def _read_block(name: str, block: _Stored, dtype: np.dtype) -> np.ndarray:
    count = math.prod(block.box.shape) * dtype.itemsize
    try:
        data = np.fromfile(block.file, np.uint8, count, offset=block.offset)
    except OSError as error:
        raise Damaged(f"leaf {name!r} cannot be read: {type(error).__name__}: {error}") from error
    if len(data) != count:
        raise Damaged(f"leaf {name!r} cannot be read: {block.file.name} is cut short")
    if checksum(data) != block.crc32:
        raise Damaged(f"leaf {name!r} does not match its checksum")
    return data.view(dtype).reshape(block.box.shape)


def _overlap(a: Box, b: Box) -> Box | None:
    """The box that two boxes have in common; None if there is none. Boxes of no elements overlap with themselves."""
    start = tuple(map(max, a.start, b.start))
    ends = (min(s + n, t + m) for s, n, t, m in zip(a.start, a.shape, b.start, b.shape, strict=True))
    shape = tuple(e - s for e, s in zip(ends, start, strict=True))
    return Box(start, shape) if a == b or all(n > 0 for n in shape) else None


def _slices(inner: Box, outer: Box) -> tuple[slice, ...]:
    begins = (s - o for s, o in zip(inner.start, outer.start, strict=True))
    return tuple(slice(begin, begin + n) for begin, n in zip(begins, inner.shape, strict=True))


def read_format_1(folder: Path, table: Mapping[str, dict]) -> dict[str, np.ndarray]:
    """The leaves of `table` from Orbax's own array format, each checked against the checksum of the whole leaf.

    Orbax's own reader names no leaf when a file is damaged, and abandons the other reads in flight, each of which then
    prints a traceback; so the arrays are read from its store directly.
    """
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder / metas.STATE}/"}}
    context = tensorstore.Context()
    spec = lambda name: {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}}
    opened = {name: tensorstore.open(spec(name), read=True, context=context) for name in table}
    reads: dict[str, Any] = {}
    found: dict[str, np.ndarray] = {}
    for name, array in opened.items():
        with _reading(name):
            reads[name] = array.result().read()
    for name, entry in table.items():
        with _reading(name):
            found[name] = reads[name].result()
        data = found[name]
        crc = checksum(np.ascontiguousarray(data).reshape(-1).view(np.uint8))
        if {"shape": list(data.shape), "dtype": data.dtype.name, "crc32": crc} != entry:
            raise Damaged(f"leaf {name!r} does not match its checksum")
    return found


@contextlib.contextmanager
def _reading(name: str):
    try:
        yield
    except ValueError as error:
        # TensorStore reports every failure of a read as ValueError.
        raise Damaged(f"leaf {name!r} cannot be read: {' '.join(str(error).split())[:300]}") from error


def boxes(leaf: Any) -> list[Box]:
    """The distinct boxes of a leaf that the devices of this process hold; all of it without a sharding."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or isinstance(leaf, np.ndarray | np.generic):
        return [Box((0,) * len(leaf.shape), tuple(leaf.shape))]
    held = sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
    return list(dict.fromkeys(box_of(index, leaf.shape) for index in held))


def box_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    """The box that a tuple of slices means for a leaf of some shape."""
    ranges = [axis.indices(n) for axis, n in zip(index, shape, strict=True)]
    return Box(tuple(r[0] for r in ranges), tuple(r[1] - r[0] for r in ranges))


def place(found: Mapping[Box, np.ndarray], like: Any) -> jax.Array | np.ndarray:
    """The leaf where `like` is: in host memory for a numpy array, at its sharding, or on the default device.

    Raises:
      ValueError: for a 64-bit leaf that would be cast, because `jax_enable_x64` is off.
    """
    first = next(iter(found.values()))
    if isinstance(like, np.ndarray | np.generic):
        return first
    if jax.dtypes.canonicalize_dtype(first.dtype) != first.dtype:
        raise ValueError(
            f"a leaf is {first.dtype}; set jax_enable_x64, or restore into numpy arrays, to read it uncast"
        )
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jax.numpy.array(first)
    shape = tuple(like.shape)
    return jax.make_array_from_callback(shape, sharding, lambda index: found[box_of(index, shape)])
