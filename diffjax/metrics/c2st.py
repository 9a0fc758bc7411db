"""Classifier two-sample test with the leave-one-out nearest neighbour as the classifier."""

from __future__ import annotations

import numpy as np

from diffjax.metrics.arrays import nearest, pair


def c2st(samples, reference) -> float:
    """Share of the pooled points whose nearest other point comes from their own set; 0.5 is ideal for sets of one size.

    1 if the sets lie apart; below 0.5 if samples sit closer to reference points than those to each other, as copies of
    the reference do. An exact tie counts one half. Source: Lopez-Paz and Oquab 2017, arXiv:1610.06545.

    Args:
      samples: `[N, ...]`, `N >= 2`.
      reference: `[M, ...]`, `M >= 2`; with `M` far from `N`, the ideal value is not 0.5.

    Raises:
      ValueError: for fewer than two points, unlike numbers of features, or values that are not finite.
    """
    a, b = pair(samples, reference, least=2)
    own = np.concatenate([nearest(a, a, same=True), nearest(b, b, same=True)])
    other = np.concatenate([nearest(a, b), nearest(b, a)])
    return float(np.mean((own < other) + 0.5 * (own == other)))
