"""Shared by the tests of the solvers: exact flows to measure orders on, and the fit."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))
# Two overlapping modes: the flow is not linear in x, so conditions that bind only for non-linear fields count.
MIXTURE = dj.Mixture([1.0, 2.0], [[1.0, 0.0], [-0.6, 0.5]], [[[0.5, 0.1], [0.1, 0.4]], [[0.3, 0.0], [0.0, 0.6]]])
TARGETS = {"gaussian": GAUSSIAN, "mixture": MIXTURE}
FLOWS = {"gaussian": jax.jit(GAUSSIAN.flow), "mixture": jax.jit(partial(MIXTURE.flow, rtol=1e-12))}


def padded(grid, n):
    """The grid with its last level repeated until it has n steps, as jax arrays."""
    return dj.Level(*(jnp.asarray(np.pad(field, (0, n + 1 - len(field)), mode="edge")) for field in grid))


def smooth_grid(schedule, n, s_min=0.1, s_max=10.0):
    """Levels uniform in log-SNR between finite ends, from the schedule's own formula at those times.

    Smooth in the variable of every solver, so the fitted order is the solver's own.
    """
    return dj.custom(schedule, schedule.time(dj.logsnr(schedule, n, s_min=s_min, s_max=s_max).logsnr))


@lru_cache
def end_point(target, s_start, s_end):
    """Where the exact flow of x / alpha ends; the same ODE for every schedule, so it is integrated once."""
    d = 3 if target == "gaussian" else 2
    start, end = (dj.Level(np.zeros(()), np.ones(()), np.array(s)) for s in (s_start, s_end))
    y = np.random.default_rng(0).normal(size=(16, d)) * np.hypot(1, s_start)
    return np.asarray(FLOWS[target](y, start, end))


def fit_order(make, schedules, *, target="gaussian", steps=(32, 64, 128), grid=smooth_grid, noise=None):
    """`{schedule's name: (slope, errors)}` of `make(schedule) -> Solver` against the exact flow; needs float64.

    One compilation per solver that does not depend on the schedule: grids are arguments, shorter ones padded.
    """
    truth, d = TARGETS[target], 3 if target == "gaussian" else 2
    x = np.random.default_rng(0).normal(size=(16, d))
    out, runs = {}, {}
    for name, schedule in schedules.items():
        solver = make(schedule)
        run = runs.setdefault(
            solver, jax.jit(lambda x, levels, s=solver: dj.sample(s, truth.denoise, x, levels, noise=noise))
        )
        errors = []
        for n in steps:
            levels = grid(schedule, n)
            start = x * np.hypot(levels.alpha[0], levels.sigma[0])
            exact = levels.alpha[-1] * end_point(target, round(levels.s[0], 9), round(levels.s[-1], 9))
            errors.append(np.sqrt(np.mean((run(start, padded(levels, steps[-1])) - exact) ** 2)))
        out[name] = (-np.polyfit(np.log(steps), np.log(errors), 1)[0], errors)
    return out


@pytest.fixture
def order_fit():
    """The function `fit_order`; use with the fixture `x64`."""
    return fit_order
