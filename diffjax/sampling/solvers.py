"""Solvers of the probability-flow ODE and the reverse SDE, each one step as pure functions.

All of them follow from one identity. For any positive gauge m(alpha, sigma),

    d(x / m) = x0 d(alpha / m) + eps d(sigma / m),

with `x0` and `eps` the denoiser's two halves of `x` (docs/gauge.md). Written in ratios of levels, every first-order
update is finite from alpha = 0 to sigma = 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Level, Prediction, Solver, Step, namespace

GAUGES = {
    "alpha": lambda level: level.alpha,
    "sigma": lambda level: level.sigma,
    "sum": lambda level: level.alpha + level.sigma,
}


def pairs(levels: Level) -> tuple[Level, Level]:
    """The levels where each step begins and where it ends, fields [n]."""
    return levels.at(slice(None, -1)), levels.at(slice(1, None))


def divide(a: Array, b: Array) -> Array:
    """`a / b`, and 0 where `b` is 0; safe in gradients."""
    xp = namespace(a, b)
    return xp.where(b == 0, 0.0, a / xp.where(b == 0, 1.0, b))


def to_level(level: Level, prediction: Prediction) -> Array:
    """The noisy sample at `level` that has these two halves: the exact flow if neither changed, so one Euler step."""
    return level.alpha * prediction.x0 + level.sigma * prediction.eps


def euler() -> Solver:
    """Euler's method, order 1: `x' = alpha' x0 + sigma' eps`, the same step in every gauge.

    It is DDIM with eta = 0 (Song et al. 2021, arXiv:2010.02502), Euler of Karras et al. 2022 (arXiv:2206.00364), Euler
    of the flow ODE (Liu et al. 2022, arXiv:2209.03003) and DPM-Solver-1 (Lu et al. 2022, arXiv:2206.00927).
    """

    def init(x, levels):
        return (), ()

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        return to_level(at.next, prediction), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n)


def ddim(eta: float = 0.0) -> Solver:
    """DDIM (Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16) for any alpha and sigma, order 1.

    Args:
      eta: share of the noise of the reverse process that is drawn anew: 0 is deterministic, 1 has the mean and the
        variance of the DDPM posterior q(x' | x, x0) (Ho et al. 2020, arXiv:2006.11239, Eq. 6 and 7).

    Raises:
      ValueError: unless 0 <= eta <= 1; more noise than that does not fit into the marginals.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number from 0 (deterministic) to 1 (DDPM), got {eta}")
    if eta == 0:
        return euler()

    def init(x, levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        # (s' / s)^2 in a form that is 0 at alpha = 0; s = sigma / alpha.
        ratio = (divide(level.alpha * following.sigma, following.alpha * level.sigma)) ** 2
        std = eta * following.sigma * xp.sqrt(xp.maximum(1 - ratio, 0.0))
        return (), {"eps": xp.sqrt(xp.maximum(following.sigma**2 - std**2, 0.0)), "draw": std}

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        mean = at.next.alpha * prediction.x0 + at.coef["eps"] * prediction.eps
        return mean + at.coef["draw"] * at.draw(0), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n)


def heun(gauge: str = "sum") -> Solver:
    """Heun's method (explicit trapezoid) in a gauge, order 2; two calls a step, one on the step to sigma = 0.

    The gauge decides which straight lines are integrated exactly: "alpha" is Karras et al. 2022 (arXiv:2206.00364,
    Algorithm 1), "sum" (alpha + sigma) is Heun on the flow ODE and the only one finite at both ends. A step whose gauge
    vanishes at its start, or that ends at sigma = 0, is an Euler step, as in the paper.

    Args:
      gauge: "alpha", "sigma" or "sum".

    Raises:
      ValueError: for any other gauge.
    """
    if gauge not in GAUGES:
        raise ValueError(f"unknown gauge {gauge!r}; known: {', '.join(GAUGES)}")

    def init(x, levels):
        level, following = pairs(levels)
        m, m_next = GAUGES[gauge](level), GAUGES[gauge](following)
        ratio = divide(m_next, m)
        coef = {"x": ratio, "x0": following.alpha - ratio * level.alpha, "eps": following.sigma - ratio * level.sigma}
        return (), coef | {"correct": (m > 0) & (following.sigma > 0)}

    def step(denoise, x, memory, at: Step):
        first = denoise(x, at.level)
        euler_step = to_level(at.next, first)
        # The branch not taken must be finite as well, or its NaN reaches gradients under vmap.
        safe = Level(*(jnp.where(at.coef["correct"], b, a) for a, b in zip(at.level, at.next, strict=True)))

        def correct(_):
            second = denoise(euler_step, safe)
            x0, eps = (first.x0 + second.x0) / 2, (first.eps + second.eps) / 2
            return at.coef["x"] * x + at.coef["x0"] * x0 + at.coef["eps"] * eps

        return jax.lax.cond(at.coef["correct"], correct, lambda _: euler_step, None), memory, first

    return Solver(init, step, order=2, nfe=lambda n: 2 * n - 1)
