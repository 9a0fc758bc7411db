"""Whether a two-stage explicit solver is stable on a grid: its exact gain on Gaussian data, in closed form."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from diffjax.core.types import Level

# Variances of the data's directions, in units in which the whole has about 1; two thousandths of its width is thin.
VARIANCES = np.geomspace(1e-6, 1.0, 49)
TOLERATED = 3.0
_MOST_STEPS = 512


def gain(levels: Level, coef: dict) -> np.ndarray:
    """How many times too large the std of data of each of `VARIANCES` comes out, [49].

    Each step of `heun` and `dpm2` multiplies x, on centred Gaussian data, by a number; the exact flow multiplies it by
    the ratio of the stds. On other data it is the least that happens along directions of that variance.

    Args:
      levels: a numpy grid [n + 1].
      coef: of the solver on it: "x", "x0", "eps", the weights "first" and "second" of the two calls, the level "inner"
        of the second, and "correct" where it is made.
    """

    def halves(level):
        total = level.alpha[:, None] ** 2 * VARIANCES + level.sigma[:, None] ** 2
        safe = np.where(total > 0, total, 1.0)
        return level.alpha[:, None] * VARIANCES / safe, level.sigma[:, None] / safe, total

    column = lambda a: np.asarray(a)[:, None]
    level, following = levels.at(slice(None, -1)), levels.at(slice(1, None))
    x0, eps, start = halves(level)
    to = lambda there: column(there.alpha) * x0 + column(there.sigma) * eps
    inner_x0, inner_eps, _ = halves(coef["inner"])
    reached = to(coef["inner"])
    first, second = coef["first"], coef["second"]
    mean_x0, mean_eps = first * x0 + second * inner_x0 * reached, first * eps + second * inner_eps * reached
    two = column(coef["x"]) + column(coef["x0"]) * mean_x0 + column(coef["eps"]) * mean_eps
    factors = np.where(column(coef["correct"]), two, to(following))
    end = following.alpha[-1] ** 2 * VARIANCES + following.sigma[-1] ** 2
    with np.errstate(over="ignore"):
        return np.abs(np.prod(factors, axis=0)) * np.sqrt(start[0] / end)


def _resampled(levels: Level, n: int) -> Level:
    """The grid's spacing with n steps: its levels above sigma = 0 interpolated in `(sigma / alpha)^(1/7)`."""
    inside = (levels.alpha > 0) & (levels.sigma > 0)
    s = (levels.sigma[inside] / levels.alpha[inside]) ** (1 / 7)
    m = n + 1 - int(np.sum(~inside))
    s = np.interp(np.linspace(0, len(s) - 1, m), np.arange(len(s)), s) ** 7
    alpha, sigma = 1 / np.hypot(1, s), s / np.hypot(1, s)
    if levels.alpha[0] == 0:
        alpha, sigma = np.append(0.0, alpha), np.append(levels.sigma[0], sigma)
    if levels.sigma[-1] == 0:
        alpha, sigma = np.append(alpha, levels.alpha[-1]), np.append(sigma, 0.0)
    return Level(np.zeros_like(alpha), alpha, sigma)


def warn_if_unstable(name: str, levels: Level, rows: Callable[[Level], dict], nfe: Callable[[int], int]) -> None:
    """Warns, on a numpy grid, if the std of some direction would come out more than `TOLERATED` times too large.

    The number of steps it proposes is for this grid interpolated. Single steps and grids along which noise grows are
    not judged.

    Args:
      name: of the solver.
      levels: fields [n + 1].
      rows: the solver's `coef` for a grid; see `gain`.
      nfe: its number of calls for n steps.
    """
    moves = (np.diff(levels.alpha) != 0) | (np.diff(levels.sigma) != 0)
    grid = levels.at(np.append(True, moves))
    n = len(grid.t) - 1
    if n < 2 or np.any(np.diff(np.arctan2(grid.sigma, grid.alpha)) > 0):
        return
    gains = gain(grid, rows(grid))
    if (worst := float(np.max(gains))) <= TOLERATED:
        return
    stable = lambda m: np.max(gain(again := _resampled(grid, m), rows(again))) <= TOLERATED
    few, enough = n, _MOST_STEPS
    remedy = "use"
    if stable(enough):
        while enough - few > 1:
            middle = (few + enough) // 2
            few, enough = (few, middle) if stable(middle) else (middle, enough)
        remedy = f"use about {enough} steps of this spacing or more ({nfe(enough)} calls), or"
    warnings.warn(
        f"{name} is unstable on this grid of {n} steps: along directions of variance "
        f"{VARIANCES[int(np.argmax(gains))]:.2g} the samples' std would be {worst:.2g} times that of the data; "
        f"{remedy} dpmpp_2m or unipc, which stay stable with few steps",
        RuntimeWarning,
        stacklevel=4,
    )
