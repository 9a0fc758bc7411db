"""What a solver does to a Gaussian, exactly: its moments and KL divergence without Monte Carlo."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.oracle import Gaussian
from diffjax.core.types import Array, Level, Solver
from diffjax.sampling.loop import sample


class Moments(NamedTuple):
    """The Gaussian that a solver returns, on the eigenvectors of the data's covariance.

    Attributes:
      mean: [D].
      std: [D].
    """

    mean: Array
    std: Array


def _on_axes(gaussian: Gaussian) -> Gaussian:
    """The Gaussian in the coordinates of its covariance's eigenvectors."""
    if gaussian.mean.ndim != 1:
        raise ValueError(f"expected a Gaussian of flat data with a mean [D], got one of shape {gaussian.mean.shape}")
    cov = np.asarray(gaussian.operate(gaussian.spectrum, np.eye(len(gaussian.mean))))
    variances, basis = np.linalg.eigh(cov)
    return Gaussian(gaussian.mean @ basis, np.diag(np.maximum(variances, 0.0)))


def _count_draws(solver: Solver, denoise, levels: Level, d: int) -> int:
    """How many draws a step asks for: one more than the largest index."""
    seen = [-1]

    def recorded(i, j):
        seen.append(j)
        return jnp.zeros((1, d))

    jax.eval_shape(lambda x: sample(solver, denoise, x, levels, noise=recorded), jnp.zeros((1, d)))
    return max(seen) + 1


def gaussian_moments(
    solver: Solver, gaussian: Gaussian, levels: Level, *, exact_start: bool = False, draws: int | None = None
) -> Moments:
    """The exact mean and std of what `solver` samples with the exact denoiser of a Gaussian.

    The whole sampler is then an affine map of the start and of every unit draw; its responses to each are measured in
    one batch of `n * draws + 2` runs. Enable float64 for divergences below 1e-6.

    Args:
      solver: any whose coefficients do not depend on x and are the same for all entries of x: not
        `predictor_corrector`, whose step size is a norm.
      gaussian: the data.
      levels: a concrete grid.
      exact_start: whether the start is exact, `N(alpha mean, alpha^2 cov + sigma^2)`, or `N(0, sigma^2)` as from
        `prior`; the error of the prior is then a part of the result.
      draws: how many a step takes; counted if None, which needs draws with Python indices.
    """
    data = _on_axes(gaussian)
    n, d = levels.t.shape[0] - 1, len(data.mean)
    draws = _count_draws(solver, data.denoise, levels, d) if draws is None else draws
    rows = jnp.arange(2 + n * draws)

    def noise(i, j):
        return jnp.broadcast_to((rows == 2 + i * draws + j)[:, None], (len(rows), d)).astype(jnp.result_type(float))

    # Row 0 starts from 0 without noise, row 1 from 1, the others from 0 with one unit draw each.
    start = jnp.broadcast_to((rows == 1)[:, None], (len(rows), d)).astype(jnp.result_type(float))
    out = sample(solver, data.denoise, start, levels, noise=noise)
    offset, gain, responses = out[0], out[1] - out[0], out[2:] - out[0]
    alpha, sigma = levels.alpha[0], levels.sigma[0]
    spread = alpha**2 * np.diag(data.cov) if exact_start else 0.0
    mean = offset + gain * alpha * data.mean if exact_start else offset
    return Moments(mean, jnp.sqrt(gain**2 * (spread + sigma**2) + jnp.sum(responses**2, axis=0)))


def gaussian_kl(solver: Solver, gaussian: Gaussian, levels: Level, **options) -> Array:
    """KL divergence per dimension in nats, of what `solver` samples from the Gaussian data: exact, [].

    Arguments and options as in `gaussian_moments`. The covariance must be positive definite.
    """
    mean, std = gaussian_moments(solver, gaussian, levels, **options)
    data = _on_axes(gaussian)
    variance = np.diag(data.cov)
    ratio = std**2 / variance
    return jnp.mean((ratio - 1 - jnp.log(ratio) + (mean - data.mean) ** 2 / variance) / 2)
