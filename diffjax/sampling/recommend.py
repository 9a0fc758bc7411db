"""The best known solver and grid for a budget of network calls."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffjax.core.oracle import Gaussian
from diffjax.core.schedules import Schedule
from diffjax.core.spacing import karras, s_range
from diffjax.core.types import Level, Solver
from diffjax.sampling.solvers.adams import adams, jump

# Of images in [-1, 1] (Karras et al. 2022, arXiv:2206.00364, Table 1), when nothing is known of the data.
_STD = 0.5


class _Rule(NamedTuple):
    """What is used below a budget: order of `adams`, its corrector, and the knots' ends in units of the data's std."""

    below: float
    order: int
    corrector: bool
    start: float
    end: float
    rho: float = 7.0


# Each the best found on five exact targets and a trained network, in one table for what is known of the data: nothing,
# one variance (from 25 calls on its flow is too coarse a first step), or a covariance. Few calls want a solver that
# does not look back far and a last call well above the finest structure.
_PLAIN = (
    _Rule(7, 3, False, 4, 0.08),
    _Rule(10, 3, True, 6, 0.04),
    _Rule(12, 4, True, 6, 0.02),
    _Rule(15, 4, True, 20, 0.02),
    _Rule(25, 4, True, 20, 0.006, 10.0),
    _Rule(np.inf, 4, True, 80, 0.006, 10.0),
)
_SCALAR = (
    _Rule(7, 2, False, 6, 0.08),
    _Rule(10, 4, True, 10, 0.02),
    _Rule(15, 4, True, 20, 0.02),
    _Rule(25, 4, True, 40, 0.006, 10.0),
)
_COVARIANCE = (
    _Rule(7, 2, False, 6, 0.08),
    _Rule(12, 4, True, 10, 0.02),
    _Rule(15, 4, True, 18, 0.02),
    _Rule(25, 4, True, 18, 0.006, 10.0),
    _Rule(np.inf, 4, True, 40, 0.006, 10.0),
)
_GUIDED = (_Rule(15, 3, True, 20, 0.02), _Rule(np.inf, 3, True, 20, 0.006, 10.0))


def recommend(
    schedule: Schedule, nfe: int, *, stats: Gaussian | None = None, guidance: float | None = None
) -> tuple[Solver, Level]:
    """The best known `(solver, levels)` for `nfe` network calls: use as `sample(solver, denoise, x, levels)`.

    Exponential Adams that takes out a Gaussian's flow, of order 4 with its free corrector (lower below 10 calls), on
    Karras knots. With `stats` the first step, from the schedule's noisiest level to 6 to 40 times the data's std, is
    the closed-form flow of that Gaussian (`jump`) and costs no call; the grid then has `nfe + 1` steps
    (unless the schedule itself starts below that). From 25 calls
    on that takes a covariance: one variance is too coarse there, and the first step is a call. Without `stats` it is a
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
      ValueError: for fewer than one call, something that is no schedule, or statistics that cannot be these data's.
    """
    if nfe < 1 or nfe != int(nfe):
        raise ValueError(f"nfe: expected a whole number of network calls >= 1, got {nfe}")
    if isinstance(schedule, type) or not hasattr(schedule, "at_logsnr"):
        raise ValueError(f"schedule: expected a schedule such as VP() or EDM(), got {schedule!r}")
    if stats is not None and not (isinstance(stats, Gaussian) and stats.std > 0):
        given = "a Gaussian without variance" if isinstance(stats, Gaussian) else type(stats).__name__
        raise ValueError(f"stats: expected a Gaussian with a positive variance, Gaussian.fit(data), got {given}")
    nfe, std = int(nfe), _STD if stats is None else stats.std
    if guidance is not None and guidance > 1:
        stats, rules = None, _GUIDED
    elif stats is None:
        rules = _PLAIN
    else:
        rules = _SCALAR if stats.basis is None and stats.spectrum.ndim == 0 else _COVARIANCE
    free = stats is not None and nfe < rules[-1].below
    rule = next(rule for rule in rules + _PLAIN if nfe < rule.below)
    solver = adams(rule.order, stats=stats, sigma_data=std, corrector=rule.corrector, scale=0.06 * std)
    lo, hi = s_range(schedule)
    start, knots = rule.start * std, nfe if free else nfe - 1
    if start >= hi or knots < 1:
        return solver, karras(schedule, nfe, rule.rho, s_min=max(lo, min(rule.end * std, hi / 2)))
    if start <= lo:
        raise ValueError(
            f"stats: the data's std, {std:.3g}, is so far below the schedule's smallest sigma / alpha, {lo:.3g}, that "
            "there is nothing to sample; scale the data to a std of about 0.5, or take a schedule that reaches lower"
        )
    body = karras(schedule, knots, rule.rho, s_min=max(lo, rule.end * std), s_max=start)
    first = schedule(np.asarray(schedule.t_max, np.float64))
    levels = Level(*(np.append(a, b) for a, b in zip(first, body, strict=True)))
    return (jump(solver, stats) if free else solver), levels
