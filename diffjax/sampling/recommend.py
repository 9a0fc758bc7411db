"""The best known solver and grid for a budget of network calls."""

from __future__ import annotations

import numpy as np

from diffjax.core.oracle import Gaussian
from diffjax.core.schedules import Schedule
from diffjax.core.spacing import karras, s_range
from diffjax.core.types import Level, Solver
from diffjax.sampling.adams import adams, jump

# Where the last call is made, and the scale below which the grid's basis is linear, in units of the data's std.
_S_MIN, _SCALE = 0.02, 0.1
# EDM's std of image data in [-1, 1] (Karras et al. 2022, arXiv:2206.00364, Table 1), when nothing is known of the data.
_STD = 0.5


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
    knots. With `stats` the first step, from the schedule's noisiest level to 6, 10, 20 or 40 times the data's std
    (below 7, 10, 15 calls, and above), is the closed-form flow of that Gaussian and costs no call; the grid then has
    `nfe + 1` steps. Without, the std is taken as 0.5 (data in [-1, 1]), the mean as 0, and the first step is one call.
    docs/benchmark.md has the evidence, beside the samplers of diffusers and k-diffusion on the same denoisers.

    Args:
      schedule: any; the grid starts at its `t_max`, so the state is `prior(key, shape, levels)` or pure noise.
      nfe: network calls.
      stats: mean and covariance of the data, `Gaussian.fit(data)`; a scalar variance gives most of the gain. Under
        guidance they must be those of the guided class.
      guidance: scale of classifier-free guidance, or None. Guided flows are stiffer: above scale 2 the order is 3, and
        below 20 calls 2.

    Returns:
      `(solver, levels)` with `solver.nfe(len(levels.t) - 1) == nfe`.

    Raises:
      ValueError: for fewer than one call.
    """
    if nfe < 1 or nfe != int(nfe):
        raise ValueError(f"nfe: expected a whole number of network calls >= 1, got {nfe}")
    std = _STD if stats is None else _std(stats)
    order = 3 if nfe < 7 else 4
    solver = adams(order, stats=stats, sigma_data=std, scale=_SCALE * std)
    lo, hi = s_range(schedule)
    start = std * (6 if nfe < 7 else 10 if nfe < 10 else 20 if nfe < 15 else 40)
    # The first interval is free with statistics and costs a call without.
    knots = nfe if stats is not None else nfe - 1
    if start >= hi or knots < 1:
        return solver, karras(schedule, nfe)
    body = karras(schedule, knots, s_min=max(lo, min(_S_MIN * std, start / 2)), s_max=start)
    first = schedule(np.asarray(schedule.t_max, np.float64))
    levels = Level(*(np.append(a, b) for a, b in zip(first, body, strict=True)))
    return (solver if stats is None else jump(solver, stats)), levels
