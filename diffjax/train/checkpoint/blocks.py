"""Format 2: each process writes the blocks of the arrays that it holds, and a checksum for each block.

A block is a box of one leaf: a shard of which this process holds replica 0, cut along its first axis into pieces of at
most `PIECE` bytes. `blocks-<process>.bin` holds the blocks one after the other, in C order; `blocks-<process>.json`,
sealed, says what lies where. So nothing crosses between processes, neither in a save nor in a restore, and what is
read can be checked without reading all.

Orbax's own array writer is not used for three reasons: it does not verify what it reads; its checksums could only be
had by a second copy of every array; and on CPU it keeps views of the arrays until they are written, so that the next
step cannot reuse their memory and asks the system for a whole state's worth of fresh pages in the middle of a step.
Orbax's `CheckpointManager` still does what it is good at: threads, barriers, the final rename, what to keep.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffjax.train.checkpoint import meta

PIECE = 32 << 20
_ALIGN = 64
_THREADS = 4


class Block(NamedTuple):
    """A box of a leaf and where it lies in the file of its process.

    Attributes:
      leaf: its name.
      start: index of its first element in the leaf.
      shape: its extent.
      offset: byte of the file at which it starts.
    """

    leaf: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int


class Staged(NamedTuple):
    """What a process will write: blocks, and their bytes in memory that no step touches."""

    blocks: list[Block]
    data: list[np.ndarray]


class _Piece(NamedTuple):
    """A block, the shard and its rows that it is a copy of, and whether a later step may overwrite those."""

    block: Block
    data: Any
    rows: slice
    nbytes: int
    volatile: bool


class Staging:
    """Host memory for the copy of a state, kept from save to save.

    Fresh pages cost more than the copy itself (0.3 GB/s against 10 GB/s on a virtual machine), so they are asked for
    once, in a thread, as early as `reserve` is called.
    """

    def __init__(self):
        self._memory = np.empty(0, np.uint8)
        self._filling: threading.Thread | None = None

    def reserve(self, leaves: Mapping[str, Any]) -> None:
        """Starts to make room for the blocks of these leaves; returns at once."""
        self._grow(_room(_plan(leaves)))
        self._filling = threading.Thread(target=_touch, args=(self._memory,), daemon=True)
        self._filling.start()

    def copy(self, leaves: Mapping[str, Any]) -> Staged:
        """A copy of this process's blocks; what was copied before is overwritten.

        Raises:
          ValueError: for a leaf that is not a plain array.
        """
        pieces = _plan(leaves)
        for piece in pieces:
            if isinstance(piece.data, jax.Array) and not piece.volatile:
                piece.data.copy_to_host_async()
        self._grow(_room(pieces))
        held, used = [], 0
        for piece in pieces:
            held.append(self._memory[used : used + piece.nbytes] if piece.volatile else None)
            used += _padded(piece.nbytes) if piece.volatile else 0
        with ThreadPoolExecutor(_THREADS) as pool:
            return Staged([piece.block for piece in pieces], list(pool.map(_fetch, pieces, held)))

    def _grow(self, size: int) -> None:
        if self._filling is not None:
            self._filling.join()
            self._filling = None
        if len(self._memory) < size:
            area = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                area.madvise(mmap.MADV_HUGEPAGE)
            self._memory = np.frombuffer(area, np.uint8)


def write(folder: Path, staged: Staged, process: int, processes: int) -> None:
    """Writes the blocks of one process and their checksums, and waits until the disk has them.

    Raises:
      OSError: disk full, folder gone or read-only.
    """
    path = folder / f"blocks-{process}.bin"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            sums = list(pool.map(lambda block, data: _put(file, block, data), staged.blocks, staged.data))
        os.fsync(file)
    finally:
        os.close(file)
    table: dict[str, list] = {}
    for block, crc in zip(staged.blocks, sums, strict=True):
        table.setdefault(block.leaf, []).append([list(block.start), list(block.shape), block.offset, crc])
    content = {"process": process, "processes": processes, "blocks": table}
    with open(folder / f"blocks-{process}.json", "w", encoding="utf-8") as index:
        json.dump(meta.seal(content), index)
        index.flush()
        os.fsync(index.fileno())


def checksum(data: np.ndarray) -> str:
    """CRC-32 of a uint8 array, as 8 hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def _shards(name: str, leaf: Any) -> list[tuple[str, tuple[int, ...], Any]]:
    """`(name, start, data)` of the parts of a leaf that are this process's to write."""
    plain = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not plain or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise ValueError(f"cannot save leaf {name!r}: {type(leaf).__name__} is not a plain array; store one instead")
    if not isinstance(leaf, jax.Array):
        return [(name, (0,) * leaf.ndim, np.asarray(leaf))] if jax.process_index() == 0 else []
    return [
        (name, tuple(axis.indices(n)[0] for axis, n in zip(shard.index, leaf.shape, strict=True)), shard.data)
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _plan(leaves: Mapping[str, Any]) -> list[_Piece]:
    """The blocks that this process writes, with where their values are."""
    pieces, offset = [], 0
    for name, start, data in (shard for key, leaf in leaves.items() for shard in _shards(key, leaf)):
        volatile = isinstance(data, np.ndarray) or next(iter(data.devices())).platform == "cpu"
        for rows in _rows(data):
            shape = (rows.stop - rows.start, *data.shape[1:]) if data.ndim else ()
            begin = (start[0] + rows.start, *start[1:]) if data.ndim else ()
            nbytes = math.prod(shape) * data.dtype.itemsize
            pieces.append(_Piece(Block(name, begin, shape, offset), data, rows, nbytes, volatile))
            offset += _padded(nbytes)
    return pieces


def _rows(data: Any) -> list[slice]:
    """Ranges of the first axis of at most `PIECE` bytes, at least a row each."""
    if not data.ndim or not data.size:
        return [slice(0, data.shape[0] if data.ndim else 1)]
    count = max(PIECE * data.shape[0] // (data.size * data.dtype.itemsize), 1)
    return [slice(i, min(i + count, data.shape[0])) for i in range(0, data.shape[0], count)]


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _room(pieces: list[_Piece]) -> int:
    return sum(_padded(piece.nbytes) for piece in pieces if piece.volatile)


def _fetch(piece: _Piece, held: np.ndarray | None) -> np.ndarray:
    """The bytes of a piece, in `held` if what they are read from will change."""
    part = np.asarray(piece.data)
    part = part[piece.rows] if part.ndim else part
    if held is None:
        return np.ascontiguousarray(part).reshape(-1).view(np.uint8)
    if part.size:
        np.copyto(held.view(part.dtype).reshape(part.shape), part)
    return held


def _put(file: int, block: Block, data: np.ndarray) -> str:
    done, view = 0, memoryview(data)
    while done < len(view):
        done += os.pwrite(file, view[done:], block.offset + done)
    return checksum(data)


def _touch(memory: np.ndarray) -> None:
    for start in range(0, len(memory), PIECE):
        memory[start : start + PIECE] = 0
