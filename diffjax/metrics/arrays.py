"""Checks and pairwise distances that the metrics share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

BLOCK = 1 << 24  # Entries of a block of distances: 128 MiB in float64.


def rows(x, name: str, least: int = 1) -> np.ndarray:
    """`x [N, ...]` as `[N, D] float64`, one row per sample.

    Raises:
      ValueError: if there are fewer than `least` samples, no features, or a value is not finite.
    """
    x = np.asarray(x, np.float64)
    if x.ndim < 2 or len(x) < least or x[0].size == 0:
        raise ValueError(f"{name} of shape {x.shape}; expected [N, ...] with N >= {least} and at least one feature")
    x = x.reshape(len(x), -1)
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        raise ValueError(f"{name}: {int(bad.sum())} of {len(x)} samples hold NaN or infinity; drop them first")
    return x


def pair(a, b, least: int = 1, names: tuple[str, str] = ("samples", "reference")) -> tuple[np.ndarray, np.ndarray]:
    """Both sets as rows, see `rows`.

    Raises:
      ValueError: also if their numbers of features differ.
    """
    a, b = rows(a, names[0], least), rows(b, names[1], least)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{names[0]} have {a.shape[1]} features and {names[1]} {b.shape[1]}; expected as many")
    return a, b


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`[n, m]` squared Euclidean distances between the rows of `a [n, D]` and `b [m, D]`.

    By one matrix product, so that 2048 features are affordable; exact for integers and dyadic fractions such as pixels.
    """
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None]
    return np.maximum(squares - 2 * (a @ b.T), 0)  # Rounding can turn the distance of equal rows negative.


def blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of the rows of `a` with their squared distances to all of `b`, in pieces of about `BLOCK` entries."""
    size = max(1, BLOCK // len(b))
    for start in range(0, len(a), size):
        part = slice(start, min(start + size, len(a)))
        yield part, squared_distances(a[part], b)


def nearest(a: np.ndarray, b: np.ndarray, k: int = 1, *, same: bool = False) -> np.ndarray:
    """`[n]` squared distance of each row of `a` to its `k`-th nearest row of `b`; `same` leaves out row `i` itself."""
    out = np.empty(len(a))
    for part, distances in blocks(a, b):
        if same:
            distances[np.arange(part.stop - part.start), np.arange(part.start, part.stop)] = np.inf
        out[part] = np.partition(distances, k - 1, axis=1)[:, k - 1]
    return out
