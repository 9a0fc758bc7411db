"""Solvers whose coefficients are given: diffusers' schedulers as tables with one row a step.

A scheduler of diffusers is not a function of one grid: DDIM may end a step at another time step than the next one
begins at, and coefficients are rounded to float32. So the importer computes every coefficient as the scheduler does and
these solvers apply them. All are linear in the state, the predictions and the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Level, Solver, Step

Rows = dict[str, Any]


def check_rows(n: int, levels: Level) -> None:
    """Raises ValueError unless the grid has the n steps of the table."""
    if jnp.shape(levels.t)[0] != n + 1:
        raise ValueError(
            f"this solver is the table of a scheduler with {n} steps and fits the levels that came with it; got a grid "
            f"of {jnp.shape(levels.t)[0] - 1}. Call diffjax.convert.scheduler again for another number of steps"
        )


def check_finite(rows: Any, what: str) -> Any:
    """`rows` unless some coefficient is not finite: then diffusers would return NaN or infinity as well.

    Raises:
      ValueError: which step, and what to change.
    """
    for path, a in jax.tree_util.tree_leaves_with_path(rows):
        bad = ~np.isfinite(np.asarray(a, np.float64))
        if bad.any():
            step = int(np.argwhere(bad)[0][0])
            raise ValueError(
                f"{what}: the coefficient {jax.tree_util.keystr(path)} of step {step} is not a finite number: "
                "diffusers gives NaN here. Use another n, final_sigmas_type, solver_type or a lower order"
            )
    return rows


def _steps_of(rows: Rows) -> int:
    return len(jax.tree.leaves(rows)[0])


def _push(values: tuple, value) -> tuple:
    return (value, *values[:-1]) if values else ()


def _weighted(coef, *terms):
    """`sum_k coef[name_k] value_k` over the terms whose coefficient the table has; None if it has none."""
    total = None
    for name, value in terms:
        if name in coef:
            part = coef[name] * (value() if callable(value) else value)
            total = part if total is None else total + part
    return total


def linear(rows: Rows, *, order: int, half: str = "x0", std: Callable | None = None) -> Solver:
    """One call a step: `x' = x x + x0 x0 + eps eps + slope (x - x0) / sigma + sum_j past_j m_(i - 1 - j) + draw noise`.

    m is the `half`. The slope is eps but for its rounding, which from a large sigma is all that is left of x0.

    Args:
      rows: any of `x`, `x0`, `eps`, `slope`, `draw` [n] and `past` [n, k].
      order: of convergence.
      half: which half of the predictions `past` weights.
      std: `(rows, prediction) -> standard deviation` of the noise in place of `draw`.
    """
    depth = rows["past"].shape[1] if "past" in rows else 0

    def init(x, levels):
        check_rows(_steps_of(rows), levels)
        return tuple(jnp.zeros_like(x) for _ in range(depth)), rows

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        c = at.coef
        noise = (lambda: at.draw(0)) if std is None else None
        slope = ("slope", lambda: (x - prediction.x0) / at.level.sigma)
        out = _weighted(c, ("x", x), ("x0", prediction.x0), ("eps", prediction.eps), slope)
        out = out + sum(c["past"][j] * value for j, value in enumerate(memory))
        if noise is not None and "draw" in c:
            out = out + c["draw"] * noise()
        if std is not None:
            out = out + std(c, prediction) * at.draw(0)
        return out, _push(memory, getattr(prediction, half)), prediction

    return Solver(init, step, order=order, nfe=lambda n: n)


def two_stage(middle: Rows, inner: Level, last: Rows, single: np.ndarray, *, order: int) -> Solver:
    """Two calls a step, one where `single` says so.

    `y = x x + x0 x0 + eps eps + draw noise` with the rows `middle` is where the second call is made, at the level
    `inner`; then `x' = x x + x0 x0 + eps eps + x0_2 x0_2 + gap_2 (y - x0_2) + draw noise` with the rows `last`. Its row
    `again` is the weight of y's own noise. A single step ends at y.
    """
    rows = {"middle": middle, "last": last, "inner": inner, "both": ~np.asarray(single)}

    def init(x, levels):
        check_rows(len(single), levels)
        return (), rows

    def step(denoise, x, memory, at: Step):
        first = denoise(x, at.level)
        c = at.coef
        halves = (("x", x), ("x0", first.x0), ("eps", first.eps))
        y = _weighted(c["middle"], *halves, ("draw", lambda: at.draw(0)))

        def finish(_):
            second = denoise(y, c["inner"])
            more = (("x0_2", second.x0), ("gap_2", y - second.x0), ("again", lambda: at.draw(0)))
            return _weighted(c["last"], *halves, *more, ("draw", lambda: at.draw(int("draw" in c["middle"]))))

        return jax.lax.cond(c["both"], finish, lambda _: y, None), memory, first

    return Solver(init, step, order=order, nfe=lambda n: 2 * n - 1)


def corrected(rows: Rows, *, order: int, half: str = "x0") -> Solver:
    """A predictor with a corrector that costs no call, one call a step.

    The prediction m of this step first corrects its start, `x_c = fix.x x + fix.last x_last + fix.new m + sum_j
    fix.past_j m_j + fix.draw noise_last`, then `x' = x x_c + new m + sum_j past_j m_j + draw noise`. `x_last` is the
    corrected state where the last step began.
    """
    depth = max(rows["past"].shape[1], rows["fix"]["past"].shape[1])
    noisy = "draw" in rows

    def init(x, levels):
        check_rows(_steps_of(rows), levels)
        zero = jnp.zeros_like(x)
        return (zero, (zero,) * depth, zero if noisy else ()), rows

    def step(denoise, x, memory, at: Step):
        last, past, last_noise = memory
        prediction = denoise(x, at.level)
        m, c, fix = getattr(prediction, half), at.coef, at.coef["fix"]
        x = fix["x"] * x + fix["last"] * last + fix["new"] * m
        x = x + sum(fix["past"][j] * past[j] for j in range(fix["past"].shape[0]))
        if noisy:
            x = x + fix["draw"] * last_noise
            last_noise = at.draw(0)
        out = c["x"] * x + c["new"] * m + sum(c["past"][j] * past[j] for j in range(c["past"].shape[0]))
        out = out + c["draw"] * last_noise if noisy else out
        return out, (x, _push(past, m), last_noise), prediction

    return Solver(init, step, order=order, nfe=lambda n: n)


def anchored(rows: Rows, *, order: int, half: str = "x0") -> Solver:
    """One call a step, each step from the state where its group began: `x' = x x_a + new m + sum_j past_j m_j + z`.

    `z` is `draw noise`. The anchor `x_a` is set to the state where the row `start` is true.
    """
    depth = rows["past"].shape[1]

    def init(x, levels):
        check_rows(_steps_of(rows), levels)
        return (x, tuple(jnp.zeros_like(x) for _ in range(depth))), rows

    def step(denoise, x, memory, at: Step):
        anchor, past = memory
        prediction = denoise(x, at.level)
        m, c = getattr(prediction, half), at.coef
        anchor = jnp.where(c["start"], x, anchor)
        out = c["x"] * anchor + c["new"] * m + sum(c["past"][j] * past[j] for j in range(depth))
        if "draw" in c:
            out = out + c["draw"] * at.draw(0)
        return out, (anchor, _push(past, m)), prediction

    return Solver(init, step, order=order, nfe=lambda n: n)
