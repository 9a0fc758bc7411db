"""Metrics of nearest neighbours: copying, precision and recall, density and coverage."""

from __future__ import annotations

import numpy as np

from diffjax.metrics.arrays import blocks, nearest, pair


def closer_to_train(samples, train, heldout) -> float:
    """Share of the samples nearer to the training set than to the held-out set; M / (M + L) is ideal, 1 is copying.

    Both sets must be of one distribution; a tie counts one half. Of M + L images of it the nearest to a new one is as
    likely to be any, so with sets of one size a half is ideal. Source: Meehan et al. 2020,
    arXiv:2004.05675, whose test this share is the unnormalised form of.

    Args:
      samples: `[N, ...]`.
      train: `[M, ...]`.
      heldout: `[L, ...]`.

    Raises:
      ValueError: for empty sets, unlike numbers of features, or values that are not finite.
    """
    points, near = pair(samples, train, names=("samples", "train"))
    _, far = pair(samples, heldout, names=("samples", "heldout"))
    to_train, to_heldout = nearest(points, near), nearest(points, far)
    return float(np.mean((to_train < to_heldout) + 0.5 * (to_train == to_heldout)))


def precision_recall(samples, reference, k: int = 3) -> tuple[float, float]:
    """Improved precision (samples inside the reference's manifold) and recall (reference inside the samples').

    A set's manifold is the union of balls about its points, each reaching to the point's `k`-th neighbour in the set.
    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1.

    Args:
      samples: `[N, ...]`.
      reference: `[M, ...]`.
      k: which neighbour sets the radius.

    Raises:
      ValueError: for `k` too large for either set, unlike numbers of features, or values that are not finite.
    """
    a, b = _checked(samples, reference, k)
    precision = _inside(a, b, nearest(b, b, k, same=True)) > 0
    recall = _inside(b, a, nearest(a, a, k, same=True)) > 0
    return float(precision.mean()), float(recall.mean())


def density_coverage(samples, reference, k: int = 5) -> tuple[float, float]:
    """Density (mean number of reference balls around a sample, over `k`) and coverage (share of balls with a sample).

    Density is 1 in expectation for equal distributions and may exceed 1; coverage is at most 1. Outliers of the samples
    do not raise either. Source: Naeem et al. 2020, arXiv:2002.09797, eqs. 3 and 4.

    Args:
      samples: `[N, ...]`.
      reference: `[M, ...]`.
      k: which neighbour sets the radius.

    Raises:
      ValueError: for `k` too large for the reference, unlike numbers of features, or values that are not finite.
    """
    a, b = _checked(samples, reference, k)
    radii = nearest(b, b, k, same=True)
    return float(_inside(a, b, radii).mean() / k), float((nearest(b, a) <= radii).mean())


def _checked(samples, reference, k: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = pair(samples, reference)
    least = min(len(a), len(b))
    if not 1 <= k < least:
        raise ValueError(f"k={k} with {len(a)} samples and {len(b)} reference points; expected 1 .. {least - 1}")
    return a, b


def _inside(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """`[N]`: in how many of the balls (squared `radii [M]`) each point lies."""
    return np.concatenate([(distances <= radii).sum(1) for _, distances in blocks(points, centres)])
