"""Solvers of the probability-flow ODE and the reverse SDE, each one step as pure functions.

All of them follow from one identity. For any positive gauge m(alpha, sigma),

    d(x / m) = x0 d(alpha / m) + eps d(sigma / m),

with `x0` and `eps` the denoiser's two halves of `x` (docs/gauge.md). Written in ratios of levels, every first-order
update is finite from alpha = 0 to sigma = 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.types import Array, Level, Prediction, Solver, Step, namespace

GAUGES = {
    "alpha": lambda level: level.alpha,
    "sigma": lambda level: level.sigma,
    "sum": lambda level: level.alpha + level.sigma,
}


def _pairs(levels: Level) -> tuple[Level, Level]:
    """The levels where each step begins and where it ends, fields [n]."""
    return levels.at(slice(None, -1)), levels.at(slice(1, None))


def _divide(a: Array, b: Array) -> Array:
    """`a / b`, and 0 where `b` is 0; safe in gradients."""
    xp = namespace(a, b)
    return xp.where(b == 0, 0.0, a / xp.where(b == 0, 1.0, b))


def _to(level: Level, prediction: Prediction) -> Array:
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
        return _to(at.next, prediction), memory, prediction

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
        level, following = _pairs(levels)
        xp = namespace(*levels)
        # (s' / s)^2 in a form that is 0 at alpha = 0; s = sigma / alpha.
        ratio = (_divide(level.alpha * following.sigma, following.alpha * level.sigma)) ** 2
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
        level, following = _pairs(levels)
        m, m_next = GAUGES[gauge](level), GAUGES[gauge](following)
        ratio = _divide(m_next, m)
        coef = {"x": ratio, "x0": following.alpha - ratio * level.alpha, "eps": following.sigma - ratio * level.sigma}
        return (), coef | {"correct": (m > 0) & (following.sigma > 0)}

    def step(denoise, x, memory, at: Step):
        first = denoise(x, at.level)
        euler_step = _to(at.next, first)
        # The branch not taken must be finite as well, or its NaN reaches gradients under vmap.
        safe = Level(*(jnp.where(at.coef["correct"], b, a) for a, b in zip(at.level, at.next, strict=True)))

        def correct(_):
            second = denoise(euler_step, safe)
            x0, eps = (first.x0 + second.x0) / 2, (first.eps + second.eps) / 2
            return at.coef["x"] * x + at.coef["x0"] * x0 + at.coef["eps"] * eps

        return jax.lax.cond(at.coef["correct"], correct, lambda _: euler_step, None), memory, first

    return Solver(init, step, order=2, nfe=lambda n: 2 * n - 1)


def dpmpp_2m() -> Solver:
    """DPM-Solver++(2M), order 2 with one call a step (Lu et al. 2022, arXiv:2211.01095, Algorithm 2).

    Adams-Bashforth for x0 in log-SNR, exact for the linear part. The first step, and a step over which the log-SNR is
    infinite (from alpha = 0, or to sigma = 0), are first order: the ODE has no second difference there.
    """

    def init(x, levels):
        level, following = _pairs(levels)
        xp = namespace(*levels)
        ratio = _divide(following.sigma, level.sigma)
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


def churn(
    solver: Solver,
    schedule: Schedule,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> Solver:
    """Adds noise before each step of a single-step solver (Karras et al. 2022, arXiv:2206.00364, Algorithm 2).

    `s = sigma / alpha` grows to `s (1 + gamma)` with `gamma = min(s_churn / n, sqrt(2) - 1)` where `s_tmin <= s <=
    s_tmax`. The raised levels lie between grid points, so the schedule is needed. Defaults are those of the paper for
    ImageNet-64 (Table 5).

    Args:
      solver: without memory between steps: `euler()`, `heun("alpha")`.
      schedule: that the grid was made from.
      s_churn: total noise over all steps.
      s_tmin: smallest s at which noise is added.
      s_tmax: largest one.
      s_noise: standard deviation of the noise added.

    Raises:
      ValueError: at the start of sampling, for a solver with memory.
    """

    def raised(levels):
        level, following = _pairs(levels)
        xp = namespace(*levels)
        # Steps between equal levels are skipped, so they do not count.
        n = xp.sum((level.alpha != following.alpha) | (level.sigma != following.sigma))
        s = xp.where(level.alpha > 0, _divide(level.sigma, level.alpha), xp.inf)
        gamma = xp.where((s >= s_tmin) & (s <= s_tmax), xp.minimum(s_churn / xp.maximum(n, 1), 2**0.5 - 1), 0.0)
        finite = xp.where((s > 0) & xp.isfinite(s), s, 1.0)
        moved = schedule.at_logsnr(-2 * xp.log(finite * (1 + gamma)))
        hat = Level(*(xp.where(gamma > 0, a, b) for a, b in zip(moved, level, strict=True)))
        std = s_noise * finite * xp.sqrt(gamma * (2 + gamma))
        grown = hat.alpha / xp.where(level.alpha > 0, level.alpha, 1.0)
        return hat, {"x": xp.where(gamma > 0, grown, 1.0), "draw": hat.alpha * std}

    def init(x, levels):
        n = levels.t.shape[0] - 1
        xp = namespace(*levels)
        hat, coef = raised(levels)
        pairs = Level(*(xp.stack([a, b], axis=1) for a, b in zip(hat, _pairs(levels)[1], strict=True)))
        if xp is np:
            inner = [solver.init(x, pairs.at(i)) for i in range(n)]
            memory = inner[0][0]
            inner = jax.tree.map(lambda *rows: np.concatenate(rows), *(c for _, c in inner))
        else:
            memory = solver.init(x, pairs.at(0))[0]
            inner = jax.tree.map(lambda a: a[:, 0], jax.vmap(lambda pair: solver.init(x, pair)[1])(pairs))
        if jax.tree.leaves(memory):
            raise ValueError("churn wraps solvers without memory between steps, such as heun('alpha') or euler()")
        return memory, coef | {"hat": hat, "inner": inner}

    def step(denoise, x, memory, at: Step):
        x = at.coef["x"] * x + at.coef["draw"] * at.draw(0)
        inner = Step(at.index, at.coef["hat"], at.next, at.coef["inner"], lambda j: at.draw(j + 1))
        return solver.step(denoise, x, memory, inner)

    return Solver(init, step, order=solver.order, nfe=solver.nfe)


SOLVERS = {"ddim": ddim, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}
