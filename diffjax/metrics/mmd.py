"""Maximum mean discrepancy: unbiased squared MMD with a Gaussian kernel, and the kernel Inception distance."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffjax.metrics.arrays import pair, rows, squared_distances


def median_gamma(reference) -> float:
    """`1 / median(|x - y|^2)` over the distinct pairs of `reference [N, ...]`: the median heuristic for `mmd2`.

    Raises:
      ValueError: for fewer than two points, or if more than half of the pairs coincide.
    """
    x = rows(reference, "reference", least=2)
    median = np.median(squared_distances(x, x)[np.triu_indices(len(x), 1)])
    if median == 0:
        raise ValueError("more than half of the pairs of the reference coincide, the median distance is 0; give gamma")
    return float(1 / median)


def mmd2(samples, reference, gamma: float | None = None) -> float:
    """Unbiased squared MMD with kernel `exp(-gamma |x - y|^2)`; 0 in expectation for equal distributions, may be below.

    Source: Gretton et al. 2012, A Kernel Two-Sample Test, JMLR 13, eq. 3.

    Args:
      samples: `[N, ...]`, `N >= 2`.
      reference: `[M, ...]`, `M >= 2`.
      gamma: inverse squared width; None takes `median_gamma(reference)`.

    Raises:
      ValueError: for fewer than two points, unlike numbers of features, values that are not finite, or `gamma <= 0`.
    """
    a, b = pair(samples, reference, least=2)
    gamma = median_gamma(b) if gamma is None else gamma
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}; expected a number > 0, the inverse of a squared distance")
    return _unbiased(lambda x, y: np.exp(-gamma * squared_distances(x, y)), a, b)


def kid(samples, reference, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased MMD^2 over random subsets, with kernel `(x . y / D + 1)^3`.

    Unbiased at any number of samples, unlike the Frechet distance. Source: Binkowski et al. 2018, arXiv:1801.01401.

    Args:
      samples: `[N, ...]` features.
      reference: `[M, ...]` features.
      subsets: how many subsets to average over.
      subset_size: points per subset, drawn without replacement; at most the smaller set is used.
      seed: of the subsets.

    Raises:
      ValueError: for fewer than two points, unlike numbers of features, values that are not finite, or a count < 1.
    """
    a, b = pair(samples, reference, least=2)
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets={subsets}, subset_size={subset_size}; expected at least 1 and 2")
    size = min(subset_size, len(a), len(b))
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    rng = np.random.default_rng(seed)
    pick = lambda x: x[rng.choice(len(x), size, replace=False)]
    values = [_unbiased(kernel, pick(a), pick(b)) for _ in range(subsets)]
    return float(np.mean(values)), float(np.std(values))


def _unbiased(kernel: Callable, a: np.ndarray, b: np.ndarray) -> float:
    within = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return float(within(kernel(a, a)) + within(kernel(b, b)) - 2 * kernel(a, b).mean())
