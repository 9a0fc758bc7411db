"""Multistep solvers of the probability-flow ODE: one call a step, the last few predictions in memory."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Solver, Step, namespace
from diffjax.sampling.solvers import divide, pairs


def dpmpp_2m() -> Solver:
    """DPM-Solver++(2M), order 2 with one call a step (Lu et al. 2022, arXiv:2211.01095, Algorithm 2).

    Adams-Bashforth for x0 in log-SNR, exact for the linear part. The first step, and a step over which the log-SNR is
    infinite (from alpha = 0, or to sigma = 0), are first order: the ODE has no second difference there.
    """

    def init(x, levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        ratio = divide(following.sigma, level.sigma)
        half_logsnr = levels.logsnr / 2
        with np.errstate(invalid="ignore"):
            h = half_logsnr[1:] - half_logsnr[:-1]
        finite = xp.isfinite(h) & (h > 0)
        h = xp.where(finite, h, 0.0)
        before = xp.concatenate([xp.zeros_like(h[:1]), h[:-1]])
        # A zero h marks a step without a usable history or without a finite length: both get no second difference.
        extrapolate = xp.where(before > 0, h / (2 * xp.where(before > 0, before, 1.0)), 0.0)
        return jnp.zeros_like(x), {"x": ratio, "x0": following.alpha - ratio * level.alpha, "extrapolate": extrapolate}

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        x0 = prediction.x0 + at.coef["extrapolate"] * (prediction.x0 - memory)
        return at.coef["x"] * x + at.coef["x0"] * x0, prediction.x0, prediction

    return Solver(init, step, order=2, nfe=lambda n: n)
