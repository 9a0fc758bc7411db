"""DPM-Solver for the reverse SDE: exponential integrators in the log-SNR that draw noise.

With `r = s' / s`, `h = -log r` and `H = (1 + eta) h`, the reverse SDE of k-diffusion's eta and x0 held over the step is

    x' = (sigma' / sigma) r^eta x + alpha' (1 - exp(-H)) x0 + sigma' sqrt(1 - r^(2 eta)) noise,

finite from alpha = 0 to sigma = 0. Differences with earlier predictions raise the order of the deterministic part.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.types import Array, Level, Solver, Step, namespace
from diffjax.sampling.solvers.basic import divide, pairs, remaining
from diffjax.sampling.solvers.stochastic import check_amount, check_known, first_order, shrink

SOLVER_TYPES = ("midpoint", "heun")
CURVATURES = ("published", "exact", "diffusers")


def _lengths(levels: Level) -> tuple[Array, Array, Array]:
    """`h` of every step, and of the one and the two before it; 0 where infinite, skipped or absent."""
    xp = namespace(*levels)
    half = levels.logsnr / 2
    with np.errstate(invalid="ignore"):
        h = half[1:] - half[:-1]
    h = xp.where(xp.isfinite(h) & (h > 0), h, 0.0)
    before = xp.concatenate([xp.zeros_like(h[:1]), h[:-1]])
    return h, before, xp.concatenate([xp.zeros_like(h[:1]), before[:-1]])


def _safe(a: Array) -> Array:
    return namespace(a).where(a > 0, a, 1.0)


def _phi2(total: Array) -> Array:
    """`1 - (1 - exp(-H)) / H`, the weight of a linear term, without cancellation at small H."""
    xp = namespace(total)
    small = total < 1e-2
    large = xp.where(small, 1.0, total)
    series = total / 2 * (1 - total / 3 * (1 - total / 4 * (1 - total / 5)))
    return xp.where(small, series, 1 + xp.expm1(-large) / large)


def _slope(total: Array, solver_type: str) -> Array:
    """The weight of the linear term: of the midpoint rule, or exact ("heun")."""
    return -namespace(total).expm1(-total) / 2 if solver_type == "midpoint" else _phi2(total)


def _base(levels: Level, eta: float, s_noise: float) -> dict:
    level, following = pairs(levels)
    xp = namespace(*levels)
    r = shrink(level, following)
    std = s_noise * following.sigma * xp.sqrt(xp.maximum(1 - r ** (2 * eta), 0.0))
    return {
        "x": divide(following.sigma, level.sigma) * r**eta,
        "x0": following.alpha * (1 - r ** (1 + eta)),
        "draw": std,
    }


def _check(eta: float, s_noise: float, solver_type: str, lower_order_final: int, order: int) -> None:
    check_amount("eta", eta)
    check_amount("s_noise", s_noise)
    check_known("solver_type", solver_type, SOLVER_TYPES)
    check_known("lower_order_final", lower_order_final, tuple(range(order)))


def sde_dpmpp_2m(
    eta: float = 1.0, s_noise: float = 1.0, solver_type: str = "midpoint", *, lower_order_final: int = 0
) -> Solver:
    """SDE-DPM-Solver++(2M): one call a step; its deterministic part is of order 2.

    Lu et al. 2022 (arXiv:2211.01095, appendix), `sample_dpmpp_2m_sde` of k-diffusion and `sde-dpmsolver++` of diffusers
    (eta = 1). A step of infinite length in log-SNR (from alpha = 0, to sigma = 0), and the one after, are first order.

    Args:
      eta: noise; 0 is DPM-Solver++(2M), 1 the reverse SDE.
      s_noise: factor of the noise drawn.
      solver_type: "midpoint" or "heun", how x0 - x0_before enters.
      lower_order_final: how many of the last steps to take with the lowered orders 1, 2, ... (diffusers: 1 for
        `euler_at_final`, and for `lower_order_final` below 15 steps).

    Raises:
      ValueError: for a negative amount, or options other than these.
    """
    _check(eta, s_noise, solver_type, lower_order_final, 2)

    def init(x, levels):
        xp = namespace(*levels)
        h, before, _ = _lengths(levels)
        _, following = pairs(levels)
        use = (h > 0) & (before > 0) & (remaining(levels) > lower_order_final)
        total = (1 + eta) * h
        slope = xp.where(use, following.alpha * _slope(total, solver_type) * h / _safe(before), 0.0)
        return jnp.zeros_like(x), _base(levels, eta, s_noise) | {"slope": slope}

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        x0 = prediction.x0
        x = at.coef["x"] * x + at.coef["x0"] * x0 + at.coef["slope"] * (x0 - memory)
        return (x if eta == 0 else x + at.coef["draw"] * at.draw(0)), x0, prediction

    return Solver(init, step, order=2, nfe=lambda n: n)


def _curved(h, before, earlier, eta, curvature):
    """Weights of the three-node quadratic on D1_0 = x0 - x0_1 and D1_1 = x0_1 - x0_2, [n] each."""
    total = (1 + eta) * h
    r0, r1 = before / _safe(h), earlier / _safe(h)
    phi2 = _phi2(total)
    phi3 = phi2 / _safe(total) - 0.5
    second = {"published": -phi3, "exact": -2 * phi3, "diffusers": -phi2 / _safe(total) - 0.5}[curvature]
    # d1 = D0 + (D0 - D1) r0 / (r0 + r1), d2 = (D0 - D1) / (r0 + r1), with D0 = D1_0 / r0 and D1 = D1_1 / r1.
    mixed = (phi2 * r0 + second) / _safe(r0 + r1)
    return (phi2 + mixed) / _safe(r0), -mixed / _safe(r1)


def sde_dpmpp_3m(
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: str = "heun",
    *,
    curvature: str = "published",
    lower_order_final: int = 0,
) -> Solver:
    """SDE-DPM-Solver++(3M): one call a step, three predictions.

    `sample_dpmpp_3m_sde` of k-diffusion and `sde-dpmsolver++` with solver_order 3 of diffusers. The published weight of
    the second difference is half of what the quadratic needs, so the deterministic part is of order 2; diffusers' one
    does not vanish with the step, order 1. "exact" is the integral of the quadratic; its first two steps are of lower
    order, which leaves it at order 2 with a far smaller error.

    Args:
      eta: noise; 0 is DPM-Solver++(3M), 1 the reverse SDE.
      s_noise: factor of the noise drawn.
      solver_type: of the two-node steps: "heun" as in k-diffusion, "midpoint" as in diffusers' default.
      curvature: "published" (k-diffusion), "exact" or "diffusers".
      lower_order_final: how many of the last steps to take with the lowered orders 1, 2 (diffusers: 1 for
        `euler_at_final`, 2 for `lower_order_final` below 15 steps).

    Raises:
      ValueError: for a negative amount, or options other than these.
    """
    _check(eta, s_noise, solver_type, lower_order_final, 3)
    check_known("curvature", curvature, CURVATURES)

    def init(x, levels):
        xp = namespace(*levels)
        h, before, earlier = _lengths(levels)
        _, following = pairs(levels)
        left = remaining(levels)
        highest = xp.where(left <= lower_order_final, left, 3)
        two = (h > 0) & (before > 0) & (highest > 1)
        three = two & (earlier > 0) & (highest > 2)
        linear = _slope((1 + eta) * h, solver_type) * h / _safe(before)
        recent, older = _curved(h, before, earlier, eta, curvature)
        coef = {
            "recent": following.alpha * xp.where(three, recent, xp.where(two, linear, 0.0)),
            "older": following.alpha * xp.where(three, older, 0.0),
        }
        return (jnp.zeros_like(x), jnp.zeros_like(x)), _base(levels, eta, s_noise) | coef

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        x0, (x0_1, x0_2) = prediction.x0, memory
        x = at.coef["x"] * x + at.coef["x0"] * x0 + at.coef["recent"] * (x0 - x0_1) + at.coef["older"] * (x0_1 - x0_2)
        return (x if eta == 0 else x + at.coef["draw"] * at.draw(0)), (x0, x0_1), prediction

    order = {"published": 2, "exact": 2, "diffusers": 1}[curvature]
    return Solver(init, step, order=order, nfe=lambda n: n)


def sde_dpmpp(schedule: Schedule, eta: float = 1.0, s_noise: float = 1.0, *, fraction: float = 0.5) -> Solver:
    """DPM-Solver++ for the SDE, single step: two calls, at the start and at `fraction` of the step in log-SNR.

    `sample_dpmpp_sde` of k-diffusion and DPMSolverSDE of diffusers. Draw 0 is the noise of the whole step, draw 1 that
    up to the inner level. The step to sigma = 0, and one from alpha = 0, are one ancestral Euler step with one call.

    Args:
      schedule: that the grid was made from; the inner levels lie between grid points.
      eta: as in `euler_ancestral`.
      s_noise: factor of the noise drawn.
      fraction: of the step in log-SNR, `r` of k-diffusion, in (0, 1].

    Raises:
      ValueError: for a negative amount or a fraction outside (0, 1].
    """
    check_amount("eta", eta)
    check_amount("s_noise", s_noise)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: expected a number in (0, 1], got {fraction}")

    def init(x, levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        inner = inner_levels(schedule, levels, fraction)
        two = (level.alpha > 0) & (following.sigma > 0)
        return (), {"two": two, "inner": inner, "to_inner": first_order(level, inner, eta, s_noise)} | {
            "whole": first_order(level, following, eta, s_noise),
            "second": xp.where(two, 1 / (2 * fraction), 0.0),
        }

    def step(denoise, x, memory, at: Step):
        first = denoise(x, at.level)
        whole, to_inner = at.coef["whole"], at.coef["to_inner"]

        def again(_):
            y = to_inner["x"] * x + to_inner["x0"] * first.x0
            y = y if eta == 0 else y + to_inner["draw"] * at.draw(1)
            return first.x0 + at.coef["second"] * (denoise(y, at.coef["inner"]).x0 - first.x0)

        x0 = jax.lax.cond(at.coef["two"], again, lambda _: first.x0, None)
        x = whole["x"] * x + whole["x0"] * x0
        return (x if eta == 0 else x + whole["draw"] * at.draw(0)), memory, first

    return Solver(init, step, order=2, nfe=lambda n: 2 * n - 1)


def inner_levels(schedule: Schedule, levels: Level, fraction: float = 0.5) -> Level:
    """The levels at `fraction` of every step in log-SNR, fields [n]; the step's own start where that is infinite."""
    xp = namespace(*levels)
    level, following = pairs(levels)
    finite = (level.alpha > 0) & (following.sigma > 0)
    a, b = (xp.where(finite, end.logsnr, 0.0) for end in (level, following))
    inner = schedule.at_logsnr(a + fraction * (b - a))
    return Level(*(xp.where(finite, i, j) for i, j in zip(inner, level, strict=True)))


def sde_dpm_2m(solver_type: str = "midpoint", *, order: int = 2, lower_order_final: int = 0) -> Solver:
    """SDE-DPM-Solver(2M), the form that predicts the noise: one call a step; its deterministic part is of order 2.

    `sde-dpmsolver` of diffusers with solver_order 1 or 2 (Lu et al. 2022, arXiv:2211.01095, appendix). Undefined at
    alpha = 0; the step to sigma = 0 returns x0, where the published formula is not finite.

    Args:
      solver_type: "midpoint" or "heun".
      order: 1 or 2.
      lower_order_final: 1 to take the last step with order 1.

    Raises:
      ValueError: for other options; at the start of sampling, for a concrete grid from alpha = 0.
    """
    _check(1.0, 1.0, solver_type, lower_order_final, 2)
    check_known("order", order, (1, 2))

    def init(x, levels):
        xp = namespace(*levels)
        if xp is np and np.any(levels.alpha == 0):
            raise ValueError(
                "sde_dpm_2m predicts noise and is undefined at alpha = 0; use sde_dpmpp_2m, or a finite s_max"
            )
        level, following = pairs(levels)
        h, before, _ = _lengths(levels)
        # sigma' (e^h - 1) and sigma' sqrt(e^(2 h) - 1) as ratios.
        grown = divide(following.alpha, level.alpha) * level.sigma
        gap, clean = grown - following.sigma, following.sigma == 0
        slope = gap if solver_type == "midpoint" else 2 * (gap / _safe(h) - following.sigma)
        use = (h > 0) & (before > 0) & (remaining(levels) > lower_order_final) & (order > 1)
        return jnp.zeros_like(x), {
            "x": xp.where(clean, 0.0, divide(following.alpha, level.alpha)),
            "x0": xp.where(clean, following.alpha, 0.0),
            "eps": xp.where(clean, 0.0, -2 * gap),
            "slope": xp.where(use, -slope * h / _safe(before), 0.0),
            "draw": xp.where(clean, 0.0, xp.sqrt(xp.maximum(grown**2 - following.sigma**2, 0.0))),
        }

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        eps, coef = prediction.eps, at.coef
        x = coef["x"] * x + coef["x0"] * prediction.x0 + coef["eps"] * eps + coef["slope"] * (eps - memory)
        return x + coef["draw"] * at.draw(0), eps, prediction

    return Solver(init, step, order=order, nfe=lambda n: n)
