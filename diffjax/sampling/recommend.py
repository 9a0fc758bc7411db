"""The best known solver and grid for a budget of network calls."""

from __future__ import annotations

import numpy as np

from diffjax.core.oracle import Gaussian
from diffjax.core.schedules import Schedule
from diffjax.core.spacing import karras, s_range
from diffjax.core.types import Level, Solver
from diffjax.sampling.solvers.adams import adams, jump

# Of images in [-1, 1] (Karras et al. 2022, arXiv:2206.00364, Table 1), when nothing is known of the data.
_STD = 0.5
# Where the knots begin, as multiples of the std, for budgets below the key: without statistics, with one variance
# (from 25 calls on the flow of one variance is too coarse a first step), and with a covariance.
_PLAIN = {7: 4, 12: 6, 25: 20, np.inf: 40}
_SCALAR = {7: 6, 10: 10, 15: 20, 25: 40}
_COVARIANCE = {7: 6, 12: 10, 25: 18, np.inf: 40}


def _std(stats: Gaussian) -> float:
    """The root of the mean variance over all dimensions."""
    values = stats.spectrum
    if stats.basis is None:
        return float(np.sqrt(np.mean(values)))
    size, kept = stats.basis.shape
    return float(np.sqrt((values.sum() + (size - kept) * values[-1]) / size))


def recommend(
    schedule: Schedule, nfe: int, *, stats: Gaussian | None = None, guidance: float | None = None
) -> tuple[Solver, Level]:
    """The best known `(solver, levels)` for `nfe` network calls: use as `sample(solver, denoise, x, levels)`.

    Exponential Adams of order 4 (3 below 7 calls) that takes out a Gaussian's flow, with the free corrector, on Karras
    knots. With `stats` the first step, from the schedule's noisiest level to 6 to 40 times the data's std, is the
    closed-form flow of that Gaussian (`jump`) and costs no call; the grid then has `nfe + 1` steps. From 25 calls on
    that takes a covariance: one variance is too coarse there, and the first step is a call. Without `stats` it is a
    call as well, the std is taken as 0.5 (data in [-1, 1]) and the mean as 0. docs/benchmark.md has the evidence,
    beside the samplers of diffusers and k-diffusion on the same denoisers.

    Args:
      schedule: any; the grid starts at its `t_max`, so the state is `prior(key, shape, levels)` or pure noise.
      nfe: network calls.
      stats: mean and covariance of the data, `Gaussian.fit(data)`; a scalar variance gives most of the gain.
      guidance: scale of classifier-free guidance, or None. Above 1 the order is 3 and the calls begin at 20 times the
        std: order 4 diverged below 20 calls at scale 3, and the flow of the guided data far out is not that of their
        Gaussian, so of `stats` only the std is used. Wrap the solver in `jump` to have it nevertheless.

    Returns:
      `(solver, levels)` with `solver.nfe(len(levels.t) - 1) == nfe`.

    Raises:
      ValueError: for fewer than one call.
    """
    if nfe < 1 or nfe != int(nfe):
        raise ValueError(f"nfe: expected a whole number of network calls >= 1, got {nfe}")
    nfe, std = int(nfe), _STD if stats is None else _std(stats)
    if guidance is not None and guidance > 1:
        stats, order, starts = None, 3, {np.inf: 20}
    else:
        order = 3 if nfe < 7 else 4
        scalar = stats is not None and stats.basis is None and stats.spectrum.ndim == 0
        starts = _PLAIN if stats is None else _SCALAR if scalar else _COVARIANCE
    free = stats is not None and nfe < max(starts)
    solver = adams(order, stats=stats, sigma_data=std, scale=0.06 * std)
    lo, hi = s_range(schedule)
    start = std * next((multiple for budget, multiple in starts.items() if nfe < budget), 40)
    knots = nfe if free else nfe - 1
    if start >= hi or knots < 1:
        return solver, karras(schedule, nfe)
    # Many calls can afford to look at finer structure.
    fine, rho = (0.02, 7.0) if nfe < 15 else (0.006, 10.0)
    body = karras(schedule, knots, rho, s_min=max(lo, fine * std), s_max=start)
    first = schedule(np.asarray(schedule.t_max, np.float64))
    levels = Level(*(np.append(a, b) for a, b in zip(first, body, strict=True)))
    return (jump(solver, stats) if free else solver), levels
