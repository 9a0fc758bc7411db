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
from diffjax.sampling.solvers.stability import warn_if_unstable

GAUGES = {
    "alpha": lambda level: level.alpha,
    "sigma": lambda level: level.sigma,
    "sum": lambda level: level.alpha + level.sigma,
}


def pairs(levels: Level) -> tuple[Level, Level]:
    """The levels where each step begins and where it ends, fields [n]."""
    return levels.at(slice(None, -1)), levels.at(slice(1, None))


def moving(levels: Level) -> Array:
    """Which steps have a length, [n] bool: `sample` skips those between equal levels, so they count for nothing."""
    level, following = pairs(levels)
    return (level.alpha != following.alpha) | (level.sigma != following.sigma)


def remaining(levels: Level) -> Array:
    """How many steps are left that move, this one included, [n]: 1 on the last."""
    xp = namespace(*levels)
    return xp.cumsum(xp.where(moving(levels), 1, 0)[::-1])[::-1]


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

    Few steps down to small sigma make it unstable; where a concrete grid does, `init` warns (see `stability`).

    Args:
      gauge: "alpha", "sigma" or "sum".

    Raises:
      ValueError: for any other gauge.
    """
    _known_gauge(gauge)

    nfe = lambda n: 2 * n - 1

    def rows(levels):
        level, following = pairs(levels)
        m, m_next = GAUGES[gauge](level), GAUGES[gauge](following)
        ratio = divide(m_next, m)
        coef = {"x": ratio, "x0": following.alpha - ratio * level.alpha, "eps": following.sigma - ratio * level.sigma}
        return coef | {"correct": (m > 0) & (following.sigma > 0)}

    def init(x, levels):
        if namespace(*levels) is np:
            two = lambda grid: rows(grid) | {"inner": pairs(grid)[1], "first": 0.5, "second": 0.5}
            warn_if_unstable(f"heun({gauge!r})", levels, two, nfe)
        return (), rows(levels)

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

    return Solver(init, step, order=2, nfe=nfe)


# The variable in which a gauge's right-hand side is integrated, d(alpha / m) and d(sigma / m) in units of it, and the
# log-SNR at one of its values.
_LINES = {
    "alpha": (lambda level: divide(level.sigma, level.alpha), (0.0, 1.0), lambda xp, s: -2 * xp.log(s)),
    "sigma": (lambda level: divide(level.alpha, level.sigma), (1.0, 0.0), lambda xp, r: 2 * xp.log(r)),
    "sum": (
        lambda level: level.sigma / (level.alpha + level.sigma),
        (-1.0, 1.0),
        lambda xp, u: 2 * (xp.log1p(-u) - xp.log(u)),
    ),
}


def _levels_between(schedule: Schedule, levels: Level, gauge: str, node: float) -> tuple[Level, Array, Array]:
    """Levels [n] at a fraction of each step in the gauge's variable, the step [n] in it, and where that is defined.

    Where it is not (the gauge is 0 at an end of the step, or the step has no length) the levels are those at its start.
    """
    level, following = pairs(levels)
    xp = namespace(*levels)
    variable, _, logsnr = _LINES[gauge]
    start, end = variable(level), variable(following)
    defined = (GAUGES[gauge](level) > 0) & (GAUGES[gauge](following) > 0) & (start != end)
    at = xp.where(defined, start + node * (end - start), 0.5)
    between = schedule.at_logsnr(logsnr(xp, at))
    between = Level(*(xp.where(defined, a, b) for a, b in zip(between, level, strict=True)))
    return between, xp.where(defined, end - start, 0.0), defined


def _slope(gauge: str, prediction: Prediction) -> Array:
    """The derivative of `x / m` by the gauge's variable."""
    x0, eps = _LINES[gauge][1]
    return x0 * prediction.x0 + eps * prediction.eps


def _known_gauge(gauge: str) -> None:
    if gauge not in GAUGES:
        raise ValueError(f"unknown gauge {gauge!r}; known: {', '.join(GAUGES)}")


def midpoint(schedule: Schedule, gauge: str = "sum") -> Solver:
    """The explicit midpoint rule in a gauge, order 2, two calls a step.

    The default, "sum", is the midpoint rule on the flow ODE (Lipman et al. 2023, arXiv:2210.02747, section 6), "alpha"
    the one of Karras et al. 2022 (arXiv:2206.00364, Appendix D.2 with alpha = 1/2). No call is made at the end of a
    step, so a step to sigma = 0 is like any other. A step on which the gauge vanishes at an end is an Euler step. On
    Gaussian data its leading error cancels, and it converges with order 3 there.

    Args:
      schedule: that the grid was made from; only `at_logsnr` is called.
      gauge: "alpha", "sigma" or "sum".

    Raises:
      ValueError: for any other gauge.
    """
    _known_gauge(gauge)

    def init(x, levels):
        middle, width, defined = _levels_between(schedule, levels, gauge, 0.5)
        return (), {"middle": middle, "width": width, "defined": defined}

    def step(denoise, x, memory, at: Step):
        first = denoise(x, at.level)
        c = at.coef

        def second(_):
            halfway = denoise(to_level(c["middle"], first), c["middle"])
            m, m_next = GAUGES[gauge](at.level), GAUGES[gauge](at.next)
            return m_next / m * x + m_next * c["width"] * _slope(gauge, halfway)

        return jax.lax.cond(c["defined"], second, lambda _: to_level(at.next, first), None), memory, first

    return Solver(init, step, order=2, nfe=lambda n: 2 * n)


def dpm2(schedule: Schedule, r: float = 0.5) -> Solver:
    """DPM-Solver-2 in the gauge alpha with a call inside each step, order 2; two calls a step, one to sigma = 0.

    `sample_dpm_2` of k-diffusion and diffusers' KDPM2DiscreteScheduler at r = 1/2: the slope at the geometric mean of
    the two `s = sigma / alpha` (Lu et al. 2022, arXiv:2206.00927, Algorithm 4 with the step taken in s; Karras et al.
    2022, arXiv:2206.00364, Appendix D.2). Steps from alpha = 0 and to sigma = 0 are Euler steps.
    Few steps down to small sigma make it unstable; where a concrete grid does, `init` warns (see `stability`).

    Args:
      schedule: that the grid was made from; only `at_logsnr` is called.
      r: where the inner call is, as a fraction of the step in log s; the slope used is `(1 - 1 / 2r)` times that at the
        start and `1 / 2r` times the inner one.

    Raises:
      ValueError: unless 0 < r <= 1.
    """
    if not 0 < r <= 1:
        raise ValueError(f"r: expected a number in (0, 1], got {r}")

    nfe = lambda n: 2 * n - 1

    def rows(levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        inner = (level.alpha > 0) & (level.sigma > 0) & (following.sigma > 0)
        finite = (levels.alpha > 0) & (levels.sigma > 0)
        safe = lambda a: xp.where(finite, a, 1.0)
        lam = xp.log(safe(levels.alpha)) - xp.log(safe(levels.sigma))
        between = schedule.at_logsnr(2 * (lam[:-1] + r * (lam[1:] - lam[:-1])))
        between = Level(*(xp.where(inner, a, b) for a, b in zip(between, level, strict=True)))
        ratio = divide(following.alpha, level.alpha)
        return {"inner": between, "x": ratio, "eps": following.sigma - ratio * level.sigma, "correct": inner}

    def init(x, levels):
        if namespace(*levels) is np:
            weights = {"first": 1 - 1 / (2 * r), "second": 1 / (2 * r)}
            two = lambda grid: rows(grid) | weights | {"x0": np.zeros(len(grid.t) - 1)}
            warn_if_unstable(f"dpm2(r={r})", levels, two, nfe)
        return (), rows(levels)

    def step(denoise, x, memory, at: Step):
        first = denoise(x, at.level)
        c = at.coef

        def correct(_):
            second = denoise(to_level(c["inner"], first), c["inner"])
            return c["x"] * x + c["eps"] * (first.eps + (second.eps - first.eps) / (2 * r))

        return jax.lax.cond(c["correct"], correct, lambda _: to_level(at.next, first), None), memory, first

    return Solver(init, step, order=2, nfe=nfe)


def rk4(schedule: Schedule, gauge: str = "sum") -> Solver:
    """The classical Runge-Kutta method in a gauge, order 4; four calls a step, three on the step to sigma = 0.

    "sum" is RK4 on the flow ODE, finite from alpha = 0 to sigma = 0. Since no network is called at sigma = 0, a step
    that ends there takes Ralston's third-order rule, whose calls are all inside (Ralston 1962, doi:10.1090/S0025-5718-
    1962-0150954-0); its error of h^4, made once, keeps the order. Where the gauge vanishes at an end of a step ("alpha"
    from alpha = 0, "sigma" to sigma = 0) that step is an Euler step.

    Args:
      schedule: that the grid was made from; only `at_logsnr` is called.
      gauge: "alpha", "sigma" or "sum".

    Raises:
      ValueError: for any other gauge.
    """
    _known_gauge(gauge)

    def init(x, levels):
        xp = namespace(*levels)
        middle, width, defined = _levels_between(schedule, levels, gauge, 0.5)
        late = _levels_between(schedule, levels, gauge, 0.75)[0]
        inside = levels.sigma[1:] > 0
        third = Level(*(xp.where(inside, a, b) for a, b in zip(middle, late, strict=True)))
        # A level for the fourth call that is safe where it is not made.
        fourth = Level(*(xp.where(inside & defined, a, b) for a, b in zip(pairs(levels)[1], middle, strict=True)))
        classical, ralston = xp.asarray([1.0, 2.0, 2.0, 1.0]) / 6, xp.asarray([2.0, 3.0, 4.0, 0.0]) / 9
        return (), {
            "levels": (middle, third, fourth),
            "node": xp.where(inside, 0.5, 0.75),
            "weights": xp.where(inside[:, None], classical, ralston),
            "width": width,
            "defined": defined,
            "inside": inside,
        }

    def step(denoise, x, memory, at: Step):
        first = denoise(x, at.level)
        c = at.coef
        m = GAUGES[gauge]

        def stages(_):
            y = x / m(at.level)
            middle, third, fourth = c["levels"]
            k1 = _slope(gauge, first)
            k2 = _slope(gauge, denoise(m(middle) * (y + c["width"] / 2 * k1), middle))
            k3 = _slope(gauge, denoise(m(third) * (y + c["width"] * c["node"] * k2), third))
            last = lambda _: _slope(gauge, denoise(m(fourth) * (y + c["width"] * k3), fourth))
            k4 = jax.lax.cond(c["inside"], last, lambda _: jnp.zeros_like(k3), None)
            mean = sum(w * k for w, k in zip(c["weights"], (k1, k2, k3, k4), strict=True))
            return m(at.next) * (y + c["width"] * mean)

        return jax.lax.cond(c["defined"], stages, lambda _: to_level(at.next, first), None), memory, first

    return Solver(init, step, order=4, nfe=lambda n: 4 * n - 1)
