"""Linear multistep solvers of the probability-flow ODE: one call a step, the last few predictions in memory.

With `w` the distance in half the log-SNR from the start of a step of length `h`, the flow is, exactly,

    x' = (sigma' / sigma) x + alpha' int_0^h e^(w - h) x0(w) dw                      predict="x0"
    x' = (alpha' / alpha) x - sigma (alpha' / alpha) int_0^h e^(-w) eps(w) dw        predict="eps"

and a method replaces the prediction by a polynomial in `w` through its last values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Level, Solver, Step, namespace
from diffjax.sampling.solvers.basic import divide, moving, pairs

PREDICT = ("x0", "eps")
VARIANTS = ("bh1", "bh2")


class History(NamedTuple):
    """Which past predictions each step of a grid has. Steps between equal levels are skipped: they leave none.

    Attributes:
      index: [n, width], the step at which prediction j (0: this step's own) was made.
      count: [n], how many of them exist.
      position: [n], the number of steps taken before this one.
      total: [], the number of steps that move.
    """

    index: Array
    count: Array
    position: Array
    total: Array


def history(levels: Level, width: int, usable: Array) -> History:
    """The `History` of a grid for methods that look at `width` predictions.

    Args:
      levels: fields [n + 1].
      width: the most predictions that a step combines, its own included.
      usable: [n + 1] whether the method's variable is finite at a level; one that is not ends the history.
    """
    xp = namespace(*levels)
    moves = moving(levels)
    steps = xp.arange(moves.shape[0])
    latest = xp.where(moves, steps, -1)
    latest = np.maximum.accumulate(latest) if xp is np else jax.lax.cummax(latest)
    before = xp.concatenate([xp.full_like(steps[:1], -1), latest[:-1]])
    index = [steps]
    for _ in range(width - 1):
        index.append(xp.where(index[-1] >= 0, before[index[-1]], -1))
    index = xp.stack(index, axis=1)
    count = xp.sum(xp.cumprod((index >= 0) & usable[index], axis=1), axis=1)
    return History(index, count, xp.cumsum(moves) - moves, xp.sum(moves))


def half_logsnr(levels: Level) -> tuple[Array, Array]:
    """`log(alpha / sigma)` [n + 1], 0 where it is infinite, and whether it is finite."""
    xp = namespace(*levels)
    finite = (levels.alpha > 0) & (levels.sigma > 0)
    safe = lambda a: xp.where(finite, a, 1.0)
    return xp.log(safe(levels.alpha)) - xp.log(safe(levels.sigma)), finite


def _series(c: list[float], a: Array) -> Array:
    """`sum_j c_j a^j`."""
    out = c[-1]
    for each in reversed(c[:-1]):
        out = out * a + each
    return out


def moments(levels: Level, h: Array, predict: str, count: int) -> list[Array]:
    """`int (w / h)^k dW` [n] for k < count, `dW` the measure that weights the prediction over each step.

    Where `h` is infinite the variable is not scaled: `int w^k dW`, finite for predict="eps" only. The sum of a method's
    weights is the first, `alpha' - alpha sigma' / sigma` or `sigma' - sigma alpha' / alpha`.
    """
    level, following = pairs(levels)
    xp = namespace(*levels)
    finite = xp.isfinite(h)
    long = xp.where(finite & (h > 1), h, 1.0)
    short = xp.where(h > 1, 1.0, h)
    if predict == "x0":
        out = [following.alpha - level.alpha * divide(following.sigma, level.sigma)]
        closed = -xp.expm1(-long) / long
        for k in range(1, count):
            closed = (1 - k * closed) / long
            series = _series([math.factorial(k) / math.factorial(j + k + 1) for j in range(18)], -short)
            out.append(following.alpha * xp.where(h > 1, long * closed, short * series))
        return out
    q = level.sigma * divide(following.alpha, level.alpha)
    out = [following.sigma - q]
    closed = -xp.expm1(-long) / long
    for k in range(1, count):
        closed = (k * closed - xp.exp(-long)) / long
        series = _series([1 / (math.factorial(j) * (j + k + 1)) for j in range(18)], -short)
        scaled = xp.where(h > 1, long * closed, short * series)
        out.append(-q * xp.where(finite, scaled, math.factorial(k)))
    return out


def interpolate(nodes: list[Array], moment: list[Array]) -> list[Array]:
    """Weights of the values at `nodes` that integrate the polynomial through them: `sum_j W_j w_j^k = moment_k`."""
    weights = []
    for j, node in enumerate(nodes):
        c = [1.0]  # of the Lagrange polynomial, lowest power first
        for k, other in enumerate(nodes):
            if k != j:
                c = [(a - other * b) / (node - other) for a, b in zip([0.0, *c], [*c, 0.0], strict=True)]
        weights.append(sum(a * b for a, b in zip(c, moment, strict=False)))
    return weights


def select(orders: Array, weights: list[list[Array]], width: int) -> Array:
    """Rows [n, width] of `weights[p - 1]` where `orders` is p, zeros behind them."""
    xp = namespace(orders, *weights[-1])
    out = xp.zeros((orders.shape[0], width))
    for p, columns in enumerate(weights, start=1):
        padding = [xp.zeros_like(columns[0])] * (width - p)
        out = xp.where((orders == p)[:, None], xp.stack([*columns, *padding], axis=1), out)
    return out


def remember(value: Array, past: Array) -> Array:
    """The memory [k, B, ...] with `value` in front and the oldest dropped; empty if k is 0."""
    return jnp.concatenate([value[None], past[:-1]]) if past.shape[0] else past


def exponential_rows(levels: Level, predict: str, weights: Array) -> dict:
    """The coefficients of a step `x' = X x + W_0 m + sum_j W_j m_before`, m the predicted half.

    A step from alpha = 0 is an Euler step, which needs both halves.
    """
    level, following = pairs(levels)
    xp = namespace(*levels)
    if predict == "x0":
        return {"x": divide(following.sigma, level.sigma), "new": weights[:, 0], "past": weights[:, 1:]}
    none = level.alpha == 0
    return {
        "x": divide(following.alpha, level.alpha),
        "new": xp.where(none, following.sigma, weights[:, 0]),
        "x0": xp.where(none, following.alpha, 0.0),
        "past": weights[:, 1:],
    }


def _linear(rows: Callable[[Level], dict], predict: str, width: int, order: int) -> Solver:
    """The solver whose steps are linear in x and the last `width` predictions, with the coefficients `rows(levels)`."""

    def init(x, levels):
        return jnp.zeros((width - 1, *x.shape), x.dtype), rows(levels)

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        value, c = getattr(prediction, predict), at.coef
        out = c["x"] * x + c["new"] * value + jnp.tensordot(c["past"], memory, 1)
        if "x0" in c:
            out = out + c["x0"] * prediction.x0
        return out, remember(value, memory), prediction

    return Solver(init, step, order=order, nfe=lambda n: n)


def one_of(name: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, known))}, got {value!r}")


class Steps(NamedTuple):
    """What the exponential methods know of each step.

    Attributes:
      h: [n] its length in half the log-SNR, infinite from alpha = 0 and to sigma = 0.
      nodes: [n] each, where past predictions were made, in lengths of the step from its start.
      moment: [n] each, see `moments`.
      count: [n], how many predictions it may combine, 1 at least.
      past: the `History`.
    """

    h: Array
    nodes: list[Array]
    moment: list[Array]
    count: Array
    past: History


def exponential_steps(levels: Level, predict: str, width: int, *, extra: int = 0, infinite: bool = False) -> Steps:
    """The `Steps` of a grid for methods of `width` predictions, with `extra` moments beyond theirs.

    `infinite` lets a step to sigma = 0 combine as many predictions as any other.
    """
    xp = namespace(*levels)
    lam, finite = half_logsnr(levels)
    past = history(levels, max(width, 2), finite)
    ends = finite[1:] & finite[:-1]
    h = xp.where(ends, lam[1:] - lam[:-1], xp.inf)
    h = xp.where(h > 0, h, 1.0)  # a step of no length is skipped
    scale = xp.where(ends, h, 1.0)
    # Where there is no history any nodes do that differ from the others: their weights are not selected.
    nodes = [xp.zeros_like(h)]
    for j in range(1, width):
        nodes.append(xp.where(past.count > j, (lam[past.index[:, j]] - lam[:-1]) / scale, 1.0 + j))
    count = past.count if infinite else xp.where(ends, past.count, 1)
    return Steps(h, nodes, moments(levels, h, predict, width + extra), xp.maximum(count, 1), past)


def _lower(steps: Steps, order: int, lower_order_final: bool, euler_at_final: bool) -> Array:
    """Order of each step [n] with diffusers' rule for the end of short runs."""
    xp = namespace(steps.h)
    left = steps.past.total - steps.past.position
    orders = xp.minimum(steps.count, order)
    if lower_order_final:
        orders = xp.where(steps.past.total < 15, xp.minimum(orders, left), orders)
    if euler_at_final:
        orders = xp.where(left == 1, 1, orders)
    return xp.maximum(orders, 1)


def dpm_multistep(
    order: int = 2,
    predict: str = "x0",
    solver_type: str = "midpoint",
    *,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> Solver:
    """DPM-Solver and DPM-Solver++, multistep, as published: one call a step.

    Lu et al. 2022 (arXiv:2211.01095, Algorithm 2; arXiv:2206.00927) and diffusers' DPMSolverMultistepScheduler, whose
    option names these are. The first steps, a step from alpha = 0 and a step to sigma = 0 have the order that their
    history allows; the last is then the prediction of x0.

    Its third order converges with order 2: the published coefficient of the second difference is half of what the
    quadratic needs (`dpmpp_3m` has the whole).

    Args:
      order: 1, 2 or 3, how many predictions a step combines.
      predict: "x0" (`dpmsolver++`) or "eps" (`dpmsolver`), the half that is interpolated.
      solver_type: "midpoint" or "heun", the weight of the difference where two predictions are combined.
      lower_order_final: on grids of fewer than 15 steps, order 2 at most on the last step but one and 1 on the last.
      euler_at_final: order 1 on the last step of any grid.

    Raises:
      ValueError: for any other order, predict or solver_type.
    """
    one_of("order", order, (1, 2, 3))
    one_of("predict", predict, PREDICT)
    one_of("solver_type", solver_type, ("midpoint", "heun"))

    def rows(levels):
        steps = exponential_steps(levels, predict, order)
        first, *rest = steps.moment
        weights = [[first]]
        if order > 1:
            weights.append(interpolate(steps.nodes[:2], [first, first / 2 if solver_type == "midpoint" else rest[0]]))
        if order > 2:
            weights.append(interpolate(steps.nodes, [first, rest[0], rest[1] / 2]))
            # The published step is that of the quadratic with half of its second moment.
        orders = _lower(steps, order, lower_order_final, euler_at_final)
        return exponential_rows(levels, predict, select(orders, weights, order))

    return _linear(rows, predict, order, min(order, 2))


def dpmpp_2m() -> Solver:
    """DPM-Solver++(2M), order 2 with one call a step (Lu et al. 2022, arXiv:2211.01095, Algorithm 2).

    Adams-Bashforth for x0 in log-SNR, exact for the linear part. The first step, and a step over which the log-SNR is
    infinite (from alpha = 0, or to sigma = 0), are first order: the ODE has no second difference there.
    """
    return dpm_multistep(2, lower_order_final=False)


def dpmpp_3m() -> Solver:
    """Third-order multistep exponential integrator for x0 in log-SNR, one call a step, order 3.

    What DPM-Solver++(3M) sets out to be (Lu et al. 2022, arXiv:2211.01095, and the 3M SDE of k-diffusion at eta = 0).
    Two things are missing there, and each alone holds it at order 2: the weight of the second difference is half of
    `int w^2`, and the first step, an Euler step, leaves an error of h^2. Here the weight is whole, and when the second
    prediction is known the first step is redone with it, which costs no call. `dpm_multistep(3)` is the published
    formula. A step to sigma = 0 returns the prediction of x0.
    """

    def rows(levels):
        steps = exponential_steps(levels, "x0", 3)
        weights = [interpolate(steps.nodes[:p], steps.moment[:p]) for p in (1, 2, 3)]
        coef = exponential_rows(levels, "x0", select(steps.count, weights, 3))
        return _redo_first(coef, steps)

    return _linear(rows, "x0", 3, 3)


def _redo_first(coef: dict, steps: Steps) -> dict:
    """`coef` with the first step redone by the trapezoid once its end is known: on the second step's weights.

    The first step used `T_0 m_0`; linear from m_0 to m_1 it is `T_0 m_0 + T_1 (m_1 - m_0)`.
    """
    xp = namespace(*coef.values())
    before = xp.maximum(steps.past.index[:, 1], 0)
    second = (steps.past.index[:, 1] >= 0) & (steps.past.position == 1) & (steps.count > 1)
    gain = xp.where(second, coef["x"] * steps.moment[1][before], 0.0)
    past = coef["past"]
    return coef | {
        "new": coef["new"] + gain,
        "past": xp.concatenate([past[:, :1] - gain[:, None], past[:, 1:]], axis=1),
    }


def deis(order: int = 3, *, lower_order_final: bool = True) -> Solver:
    """DEIS in log(sigma / alpha), one call a step (Zhang and Chen 2023, arXiv:2204.13902, Eq. 15 and Table 1, rho AB).

    Interpolates eps by a polynomial in the log of s; diffusers' DEISMultistepScheduler ("logrho"). The integrals stay
    finite on a step to sigma = 0, which keeps its order where the scheduler has to stop short of it. A step from
    alpha = 0 is an Euler step.

    The Euler step at the start leaves an error of h^2, so the whole converges with order 2 at most.

    Args:
      order: 1, 2 or 3, how many predictions a step combines.
      lower_order_final: on grids of fewer than 15 steps, order 2 at most on the last step but one and 1 on the last.

    Raises:
      ValueError: for any other order.
    """
    one_of("order", order, (1, 2, 3))

    def rows(levels):
        steps = exponential_steps(levels, "eps", order, infinite=True)
        weights = [interpolate(steps.nodes[:p], steps.moment[:p]) for p in range(1, order + 1)]
        return exponential_rows(levels, "eps", select(_lower(steps, order, lower_order_final, False), weights, order))

    return _linear(rows, "eps", order, min(order, 2))


def lms(order: int = 4) -> Solver:
    """Linear multistep (Adams-Bashforth) for eps in `s = sigma / alpha` on the grid's own nodes, one call a step.

     `sample_lms` of k-diffusion and diffusers' LMSDiscreteScheduler, with exact integrals of the polynomials.
    Finite to sigma = 0, where it keeps its order; a step from alpha = 0 is an Euler step.

     As published it starts with an Euler step, whose error of h^2 is all that a finer grid is left with in the end, so
     the declared order is 2 at most.

     Args:
       order: 1 to 4, how many predictions a step combines.

     Raises:
       ValueError: for any other order.
    """
    one_of("order", order, (1, 2, 3, 4))

    def rows(levels):
        xp = namespace(*levels)
        finite = levels.alpha > 0
        s = divide(levels.sigma, levels.alpha)
        past = history(levels, order, finite)
        d = xp.where(finite[:-1] & (s[1:] != s[:-1]), s[1:] - s[:-1], -1.0)
        nodes = [xp.zeros_like(d)]
        for j in range(1, order):
            nodes.append(xp.where(past.count > j, (s[past.index[:, j]] - s[:-1]) / d, 1.0 + j))
        moment = [levels.alpha[1:] * d / (k + 1) for k in range(order)]
        weights = [interpolate(nodes[:p], moment[:p]) for p in range(1, order + 1)]
        return exponential_rows(levels, "eps", select(xp.clip(past.count, 1, order), weights, order))

    return _linear(rows, "eps", order, min(order, 2))


def unipc(
    order: int = 2,
    variant: str = "bh2",
    predict: str = "x0",
    *,
    lower_order_final: bool = True,
    disable_corrector: Sequence[int] = (),
) -> Solver:
    """UniPC (Zhao et al. 2023, arXiv:2302.04867, Algorithms 5 to 8), one call a step.

    UniP-p predicts; the call at the predicted point then serves twice, to correct that point (UniC-p, order p + 1) and
    to predict from it. Arithmetic and options are those of diffusers' UniPCMultistepScheduler. The function B(h) of the
    two variants drops out wherever the paper's equations are solved; it remains in the two places where the weight is
    set to one half, the second-order predictor and the first-order corrector.

    On a step to sigma = 0 (and from alpha = 0) the order is 1 and the result the prediction of x0. In that limit the
    published code multiplies the B of "bh1", infinite there, by the empty sum and returns NaN.

    With `lower_order_final` the last step is an Euler step and the whole converges with order 2; without it and with
    the corrector on every step, with `order + 1`, and 3 at most: the first step leaves an error of h^3.

    Args:
      order: 1, 2 or 3, the order of the predictor.
      variant: "bh1" (B = h) or "bh2" (B = e^h - 1).
      predict: "x0" or "eps", the half that is interpolated (`predict_x0`).
      lower_order_final: order at most the number of steps left, on grids of any length.
      disable_corrector: steps whose result is not corrected, by their position in the run.

    Raises:
      ValueError: for any other order, variant or predict, or a step that is not a whole number >= 0.
    """
    one_of("order", order, (1, 2, 3))
    one_of("variant", variant, VARIANTS)
    one_of("predict", predict, PREDICT)
    if any(not isinstance(i, int) or i < 0 for i in disable_corrector):
        raise ValueError(f"disable_corrector: expected positions of steps >= 0, got {disable_corrector!r}")

    def init(x, levels):
        coef = _rows(levels, order, variant, predict, lower_order_final, tuple(disable_corrector))
        return (x, jnp.zeros((order, *x.shape), x.dtype)), coef

    def step(denoise, x, memory, at: Step):
        before, past = memory
        prediction = denoise(x, at.level)
        value, c = getattr(prediction, predict), at.coef
        mended = c["c_x"] * before + c["c_new"] * value + jnp.tensordot(c["c_past"], past, 1)
        x = jnp.where(c["correct"], mended, x)
        out = c["x"] * x + c["new"] * value + jnp.tensordot(c["past"], past[: order - 1], 1)
        if "x0" in c:
            out = out + c["x0"] * prediction.x0
        return out, (x, remember(value, past)), prediction

    reached = min(order + 1, 2 if lower_order_final or len(disable_corrector) else 3)
    return Solver(init, step, order=reached, nfe=lambda n: n)


def _rows(levels, order, variant, predict, lower_order_final, disable_corrector):
    """Coefficients of the predictor of each step and, under `c_`, of the corrector of the step before it."""
    following = pairs(levels)[1]
    xp = namespace(*levels)
    steps = exponential_steps(levels, predict, order, extra=1)
    nodes, moment = steps.nodes, steps.moment
    sign = following.alpha if predict == "x0" else -following.sigma
    half = moment[0] / 2 if variant == "bh2" else sign * xp.where(xp.isfinite(steps.h), steps.h, 0.0) / 2
    orders = xp.minimum(steps.count, order)
    if lower_order_final:
        orders = xp.maximum(xp.minimum(orders, steps.past.total - steps.past.position), 1)

    second = [moment[0], half]
    predictors = [moment[:1], interpolate(nodes[:2], second), interpolate(nodes, moment[:3])][:order]
    coef = exponential_rows(levels, predict, select(orders, predictors, order))

    end = xp.ones_like(steps.h)
    correctors = [interpolate([end, *nodes[:p]], second if p == 1 else moment[: p + 1]) for p in range(1, order + 1)]
    mended = exponential_rows(levels, predict, select(orders + 1, [moment[:1], *correctors], order + 1))
    before = xp.maximum(steps.past.index[:, 1], 0)
    enabled = xp.isfinite(steps.h)
    for i in disable_corrector:
        enabled = enabled & (steps.past.position != i)
    coef["correct"] = (steps.past.index[:, 1] >= 0) & enabled[before]
    return coef | {"c_" + name: mended[name][before] for name in ("x", "new", "past")}
