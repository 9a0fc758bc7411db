"""PNDM and PLMS as diffusers runs them (Liu et al. 2022, arXiv:2202.09778)."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.convert.grids import F, alphas_cumprod, check_steps, spaced, vp_level
from diffjax.convert.heads import network
from diffjax.convert.tables import check_rows
from diffjax.core.types import Level, Prediction, Solver, Step

_ADAMS = np.array(
    [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
)


def _transfer(c: SimpleNamespace, bar: np.ndarray, start: np.ndarray, end: np.ndarray) -> dict:
    """Weights of x and of the network's output for moves between time steps (arXiv:2202.09778, Eq. 11)."""
    final = F(1.0) if c.set_alpha_to_one else bar[0]
    a = bar[start]
    ap = np.where(end >= 0, bar[np.maximum(end, 0)], final).astype(F)
    grow = np.sqrt(ap / a)
    move = -(ap - a) / (a * np.sqrt(1 - ap) + np.sqrt(a * (1 - a) * ap))
    if c.prediction_type == "v_prediction":
        return {"x": grow + move * np.sqrt(1 - a), "out": move * np.sqrt(a)}
    return {"x": grow, "out": move}


def _levels_at(bar: np.ndarray, steps: np.ndarray) -> Level:
    return Level(steps.astype(np.float64), *(np.sqrt(a.astype(np.float64)) for a in (bar[steps], 1 - bar[steps])))


def pndm(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Pseudo linear multistep, begun by Runge-Kutta steps or, with `skip_prk_steps`, by one step of two calls.

    diffusers' `step` is called n + 1 times (n + 9 with Runge-Kutta); here are n steps, each ending where
    a whole one does.
    """
    bar = alphas_cumprod(c)
    steps = spaced(c, n, whole=True)
    check_steps(steps, n, len(bar))
    if not c.skip_prk_steps and n < 4:
        raise ValueError(f"PNDMScheduler: n={n}; with skip_prk_steps=False it needs n >= 4")
    ratio, kutta = c.num_train_timesteps // n, not c.skip_prk_steps
    following = np.append(steps[1:], 0)
    index = np.arange(n)
    begins = index < 3 if kutta else (index == 0) & (n > 1)
    start = steps if kutta else np.where(begins, following + ratio, steps)
    middle = np.where(begins, following + ratio // 2, 0)
    check_steps(np.concatenate([start, middle]), 2 * n, len(bar))
    rows = {
        "begins": begins,
        "adams": _ADAMS[np.full(n, 3) if kutta else np.minimum(index, 3)],
        "whole": _transfer(c, bar, start, np.where(begins, following, steps - ratio)),
        "kick": _transfer(c, bar, steps, steps - (ratio // 2 if kutta else ratio)),
        "next": _levels_at(bar, following),
    }
    if kutta:
        rows |= {"half": _transfer(c, bar, steps, middle), "middle": _levels_at(bar, middle)}
    levels = vp_level(steps, bar[steps], 1.0 if c.set_alpha_to_one else bar[0])
    begin = _runge_kutta if kutta else _two_calls
    return _solver(rows, c.prediction_type, begin, 9 if kutta else 1), levels, network(c.prediction_type)


def _output(kind: str, prediction: Prediction, level: Level):
    """What the network returned: its outputs are combined before they are read as eps."""
    if kind == "v_prediction":
        return level.alpha * prediction.eps - level.sigma * prediction.x0
    return prediction.eps


def _move(c: dict, x, out):
    return c["x"] * x + c["out"] * out


def _two_calls(call, x, first, c):
    second = call(_move(c["kick"], x, first), c["next"])
    return _move(c["whole"], x, (first + second) / 2)


def _runge_kutta(call, x, first, c):
    second = call(_move(c["kick"], x, first), c["middle"])
    third = call(_move(c["half"], x, second), c["middle"])
    fourth = call(_move(c["whole"], x, third), c["next"])
    return _move(c["whole"], x, first / 6 + second / 3 + third / 3 + fourth / 6)


def _solver(rows: dict, kind: str, begin, extra: int) -> Solver:
    n = len(rows["begins"])

    def init(x, levels):
        check_rows(n, levels)
        return (jnp.zeros_like(x),) * 3, rows

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        out, c = _output(kind, prediction, at.level), at.coef
        call = lambda y, level: _output(kind, denoise(y, level), level)

        def multistep(x):
            return _move(c["whole"], x, sum(c["adams"][j] * m for j, m in enumerate((out, *memory))))

        x = jax.lax.cond(c["begins"], lambda x: begin(call, x, out, c), multistep, x)
        return x, (out, *memory[:2]), prediction

    return Solver(init, step, order=2, nfe=lambda n: n + extra)
