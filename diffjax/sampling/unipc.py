"""UniPC: multistep prediction in half the log-SNR, and a correction of the last step that costs no call."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from diffjax.core.types import Solver, Step, namespace
from diffjax.sampling.multistep import (
    PREDICT,
    exponential_rows,
    exponential_steps,
    interpolate,
    one_of,
    remember,
    select,
)
from diffjax.sampling.solvers import pairs

VARIANTS = ("bh1", "bh2")


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
