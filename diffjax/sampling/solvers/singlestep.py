"""DPM-Solver and DPM-Solver++, single step, on the grid: blocks of grid steps whose inner stages are grid levels."""

from __future__ import annotations

import jax.numpy as jnp

from diffjax.core.types import Array, Level, Solver, Step, namespace
from diffjax.sampling.solvers.basic import divide, moving, pairs
from diffjax.sampling.solvers.multistep import (
    PREDICT,
    half_logsnr,
    history,
    interpolate,
    moments,
    one_of,
    remember,
    select,
)


def dpm_solver(
    order: int = 3, predict: str = "eps", solver_type: str = "midpoint", *, lower_order_final: bool = False
) -> Solver:
    """DPM-Solver-1, 2 and 3 and DPM-Solver++, single step, on the grid: one call a grid step, no schedule needed.

    Lu et al. 2022 (arXiv:2206.00927, Algorithms 1 and 2; arXiv:2211.01095, Algorithm 1) in the form of diffusers'
    DPMSolverSinglestepScheduler. A block is `order` grid steps: each goes from the start of the block to the next grid
    level, with all predictions made in the block so far. What the block reaches is of its order; the levels inside are
    its stages. With a fixed number of blocks' worth of steps the error falls as `n^-order`, n a multiple of `order`,
    as blocks of equal parts (smooth grids) become all alike; other n end with a shorter block of lower order.

    Steps from alpha = 0 are Euler steps before the first block; a step to sigma = 0 is one from where the sample is.

    Args:
      order: 1, 2 or 3, grid steps in a block.
      predict: "eps" (`dpmsolver`) or "x0" (`dpmsolver++`), the half that is interpolated.
      solver_type: "midpoint" or "heun": at order 2 the weight of the difference; at order 3 the slope alone from the
        last stage, or the quadratic through all three.
      lower_order_final: where n is a multiple of `order`, the last step is an Euler step, and the whole of order 2 at
        most.

    Raises:
      ValueError: for any other order, predict or solver_type.
    """
    one_of("order", order, (1, 2, 3))
    one_of("predict", predict, PREDICT)
    one_of("solver_type", solver_type, ("midpoint", "heun"))

    def init(x, levels):
        coef = _rows(levels, order, predict, solver_type, lower_order_final)
        return (x, jnp.zeros((order - 1, *x.shape), x.dtype)), coef

    def step(denoise, x, memory, at: Step):
        start, past = memory
        prediction = denoise(x, at.level)
        value, c = getattr(prediction, predict), at.coef
        start = jnp.where(c["starts"], x, start)
        out = c["x"] * start + c["new"] * value + jnp.tensordot(c["past"], past, 1)
        if "x0" in c:
            out = out + c["x0"] * prediction.x0
        return out, (start, remember(value, past)), prediction

    return Solver(init, step, order=min(order, 2) if lower_order_final else order, nfe=lambda n: n)


def dpmpp_2s() -> Solver:
    """DPM-Solver++(2S) on the grid, order 2, one call a step (Lu et al. 2022, arXiv:2211.01095, Algorithm 1).

    `dpm_solver(2, "x0")`: blocks of two grid steps, the inner call at the level between. `sample_dpmpp_2s_ancestral` of
    k-diffusion at eta = 0 is the same on a grid with its inner levels (geometric means of s) put in.
    """
    return dpm_solver(2, "x0")


def _rows(levels: Level, order: int, predict: str, solver_type: str, lower_order_final: bool) -> dict:
    """Coefficients of each step: from its block's start `starts` says whether that is here."""
    level, following = pairs(levels)
    xp = namespace(*levels)
    lam, finite = half_logsnr(levels)
    past = history(levels, max(order, 2), finite)
    # Blocks begin at the first finite level.
    offset = xp.where(levels.alpha[0] == 0, 1, 0)
    stage = (past.position - offset) % order
    last = past.position == past.total - 1
    single = ~(finite[1:] & finite[:-1]) | (last & lower_order_final & (past.total % order == 0))
    stage = xp.where(single | ~moving(levels), 0, stage)
    index = [past.index[:, j] for j in range(order)]  # of the predictions made j steps ago
    begin = index[0]
    for j in range(1, order):
        begin = xp.where(stage == j, index[j], begin)
    begin = xp.maximum(begin, 0)

    ends = finite[1:] & finite[begin]
    h = xp.where(ends & (lam[1:] > lam[begin]), lam[1:] - lam[begin], xp.where(ends, 1.0, xp.inf))
    scale = xp.where(ends, h, 1.0)
    start = Level(*(a[begin] for a in level))
    moment = _moments_between(start, following, h, predict, order)
    # Distinct nodes where the weights on them are not selected.
    nodes = [xp.where(stage > j, (lam[index[j]] - lam[begin]) / scale, 1.0 / (j + 1)) for j in range(order)]
    return _block_rows(start, following, stage, moment, nodes, predict, solver_type) | {"starts": stage == 0}


def _moments_between(start: Level, end: Level, h: Array, predict: str, count: int) -> list[Array]:
    """`moments` of steps [n] given by both their ends."""
    xp = namespace(*start)
    both = Level(*(xp.stack([a, b]) for a, b in zip(start, end, strict=True)))
    return [m[0] for m in moments(both, h[None], predict, count)]


def _block_rows(start, end, stage, moment, nodes, predict, solver_type) -> dict:
    """The coefficients of `x' = X x_start + W_0 m + sum_j W_j m_before` by stage; the oldest m is the block's first."""
    xp = namespace(*start)
    order = len(nodes)
    weights = [moment[:1]]
    zero = xp.zeros_like(moment[0])
    if order > 1:
        slope = moment[0] / 2 if solver_type == "midpoint" else moment[1]
        weights.append(interpolate([nodes[0], zero], [moment[0], slope]))
    if order > 2:
        if solver_type == "midpoint":
            first, oldest = interpolate([nodes[0], zero], moment[:2])
            weights.append([first, zero, oldest])
        else:
            weights.append(interpolate([nodes[0], nodes[1], zero], moment[:3]))
    weights = select(stage + 1, weights, order)
    if predict == "x0":
        return {"x": divide(end.sigma, start.sigma), "new": weights[:, 0], "past": weights[:, 1:]}
    none = start.alpha == 0
    return {
        "x": divide(end.alpha, start.alpha),
        "new": xp.where(none, end.sigma, weights[:, 0]),
        "x0": xp.where(none, end.alpha, 0.0),
        "past": weights[:, 1:],
    }
