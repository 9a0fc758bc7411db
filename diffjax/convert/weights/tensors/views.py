"""Tensors made of parts of others, or of none, that are read as a `Tensor` of a file is: no more of them than asked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffjax.convert.weights.tensors import Tensor, bounds
from diffjax.convert.weights.tensors.read import checked


def rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    """The rows `start` to `stop` of a tensor, which lie in one piece of its file."""
    each = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
    return tensor._replace(shape=(stop - start, *tensor.shape[1:]), offset=tensor.offset + start * each)


class Joined(NamedTuple):
    """Tensors of one type below one another; with `turned` the transpose of that matrix."""

    parts: tuple[Tensor, ...]
    turned: bool = False

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])
        return shape[::-1] if self.turned else shape

    def part(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `Tensor.part`."""
        out = np.empty([part.stop - part.start for part in bounds(index, self.shape)], self.dtype)
        self.fill(out, index)
        return out

    def fill(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """As `Tensor.fill`."""
        index = checked(out, index, self.shape)
        if self.turned:
            out, index = out.T, index[::-1]
        start, stop, at = index[0].start, index[0].stop, 0
        for part in self.parts:
            first, last = max(start, at), min(stop, at + part.shape[0])
            if first < last:
                part.fill(out[first - start : last - start], (slice(first - at, last - at), *index[1:]))
            at += part.shape[0]


class Unit(NamedTuple):
    """The unit matrix of a type, which lies in no file; `path` is that of the file where it is missed."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, int]

    def part(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """As `Tensor.part`."""
        return np.eye(*self.shape, dtype=self.dtype)[bounds(index, self.shape)].copy()

    def fill(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """As `Tensor.fill`."""
        out[...] = self.part(checked(out, index, self.shape))
