"""Solvers that draw noise: the reverse SDE and everything with its marginals."""

from __future__ import annotations

import jax
import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.types import Level, Solver, Step, namespace
from diffjax.sampling.solvers import divide, pairs


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
        level, following = pairs(levels)
        xp = namespace(*levels)
        # Steps between equal levels are skipped, so they do not count.
        n = xp.sum((level.alpha != following.alpha) | (level.sigma != following.sigma))
        s = xp.where(level.alpha > 0, divide(level.sigma, level.alpha), xp.inf)
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
        ends = Level(*(xp.stack([a, b], axis=1) for a, b in zip(hat, pairs(levels)[1], strict=True)))
        if xp is np:
            inner = [solver.init(x, ends.at(i)) for i in range(n)]
            memory = inner[0][0]
            inner = jax.tree.map(lambda *rows: np.concatenate(rows), *(c for _, c in inner))
        else:
            memory = solver.init(x, ends.at(0))[0]
            inner = jax.tree.map(lambda a: a[:, 0], jax.vmap(lambda pair: solver.init(x, pair)[1])(ends))
        if jax.tree.leaves(memory):
            raise ValueError("churn wraps solvers without memory between steps, such as heun('alpha') or euler()")
        return memory, coef | {"hat": hat, "inner": inner}

    def step(denoise, x, memory, at: Step):
        x = at.coef["x"] * x + at.coef["draw"] * at.draw(0)
        inner = Step(at.index, at.coef["hat"], at.next, at.coef["inner"], lambda j: at.draw(j + 1))
        return solver.step(denoise, x, memory, inner)

    return Solver(init, step, order=solver.order, nfe=solver.nfe)
