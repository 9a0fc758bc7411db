"""Frechet distance between two sets of features, each taken for a Gaussian (FID when the features are Inception's)."""

from __future__ import annotations

import numpy as np

from diffjax.metrics.arrays import pair, rows


def moments(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[D]` and unbiased covariance `[D, D]` of `features [N, ...]`, float64.

    Raises:
      ValueError: for fewer than two samples or values that are not finite.
    """
    x = rows(features, "features", least=2)
    return x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1])


def frechet_gaussian(mean_a, cov_a, mean_b, cov_b) -> float:
    """`|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))`: squared 2-Wasserstein distance of Gaussians.

    The trace of the root is the sum of the roots of the eigenvalues of `cov_a^(1/2) cov_b cov_a^(1/2)`, which is
    symmetric: singular covariances need no added diagonal, and no complex numbers arise. Source: Heusel et al. 2017,
    arXiv:1706.08500, eq. 6.

    Args:
      mean_a: `[D]`.
      cov_a: `[D, D]`, symmetric and positive semi-definite.
      mean_b: `[D]`.
      cov_b: `[D, D]`.

    Raises:
      ValueError: if the shapes disagree.
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(v, np.float64) for v in (mean_a, cov_a, mean_b, cov_b))
    d = mean_a.size
    if not mean_a.shape == mean_b.shape == (d,) or not cov_a.shape == cov_b.shape == (d, d):
        shapes = [v.shape for v in (mean_a, cov_a, mean_b, cov_b)]
        raise ValueError(f"mean_a, cov_a, mean_b, cov_b of shapes {shapes}; expected [D], [D, D], [D], [D, D]")
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(np.maximum(product, 0)).sum()
    return float(((mean_a - mean_b) ** 2).sum() + trace)


def frechet_distance(samples, reference) -> float:
    """`frechet_gaussian` of the moments of two sets of features, `[N, ...]` and `[M, ...]`; symmetric, 0 at best.

    It has a positive bias of order `1 / N`: compare only at equal `N`, beside the distance of two halves of real data.

    Raises:
      ValueError: for fewer than two samples, unlike numbers of features, or values that are not finite.
    """
    a, b = pair(samples, reference, least=2)
    return frechet_gaussian(*moments(a), *moments(b))
