"""Safetensors files, written."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.tensors.dtypes import NAMES, TooLarge, fitted
from diffjax.convert.weights.tensors.strict import shown
from diffjax.files import replacing


class Source(NamedTuple):
    """A tensor to be written: `read()` gives the array when its turn comes, so that one is in memory at a time."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, leaf: Any, dtype: Any = None) -> Source:
        """An array of numpy or JAX, brought to the host when its turn comes; as `dtype` where that is given."""
        kept = np.dtype(leaf.dtype if dtype is None else dtype)
        return cls(kept, tuple(leaf.shape), lambda: fitted(np.asarray(leaf), kept))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def writing(path: str | os.PathLike, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> Iterator[None]:
    """A safetensors file that is written, and takes the place of `path` in one move when the block ends well.

    Its folder is made if absent; after an error, such as a full disk, `path` is what it was. Wide types come first, so
    that every tensor lies at a multiple of its type's size.

    Raises:
      WeightsError: for a type that the format does not have, an array that is not what its source says, or numbers
        that are too large for the type that they are cast to.
      OSError: disk full, folder read-only.
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, source in ordered:
            try:
                array = source.read()
            except TooLarge as error:
                raise WeightsError(f"{path}: tensor {shown(name)}: {error}") from None
            if (array.shape, array.dtype) != (source.shape, source.dtype):
                told = f"{array.dtype} {array.shape} instead of {source.dtype} {source.shape}"
                raise WeightsError(f"{path}: tensor {shown(name)}: {told}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        # A full disk is met here, before any file of the same folder is moved.
        file.flush()
        os.fsync(file.fileno())
        yield


def write(path: str | os.PathLike, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with `writing`."""
    with writing(path, tensors, metadata):
        pass
