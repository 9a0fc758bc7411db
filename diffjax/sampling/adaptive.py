"""The probability-flow ODE as a field that any ODE library takes, and adaptive Runge-Kutta steps along it.

In the flow gauge m = alpha + sigma, with `r = sigma / m` in [0, 1] and `z = x / m`, the flow of every schedule is

    dz / dr = eps - x0                                                      (docs/gauge.md, Eq. 2)

whose right-hand side is finite from pure noise (r = 1) to clean data (r = 0). No other variable has both ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.types import Array, Denoiser, Level, expand


class Stats(NamedTuple):
    """What an adaptive run did. The fields other than `calls` are [B], or scalars for one common step size.

    Attributes:
      calls: int32, network calls, each of the whole batch.
      accepted: int32, steps taken.
      rejected: int32, steps tried and thrown away.
      step: size of the last step taken, in r.
      finished: whether the end was reached; False where `max_steps` was not enough.
    """

    calls: Array
    accepted: Array
    rejected: Array
    step: Array
    finished: Array


class Tableau(NamedTuple):
    """An explicit embedded Runge-Kutta pair whose last stage is the first of the next step (FSAL).

    Attributes:
      nodes: where the stages are, in [0, 1].
      rows: weights of the slopes before stage 1, 2, ...; the last row gives the solution.
      error: weights of the slopes in the estimate of the local error.
      order: of the solution; the local error estimate is of this order in the step size as well.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    error: tuple[float, ...]
    order: int


METHODS = {
    # Dormand and Prince 1980, J. Comp. Appl. Math. 6, Table 2: RK5(4)7M.
    "rk45": Tableau(
        (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
        5,
    ),
    # Bogacki and Shampine 1989, Appl. Math. Lett. 2.
    "rk23": Tableau(
        (0, 1 / 2, 3 / 4, 1),
        ((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (-5 / 72, 1 / 12, 1 / 9, -1 / 8),
        3,
    ),
}


def flow_time(level: Level) -> Array:
    """`r = sigma / (alpha + sigma)`, shape of the level's fields: 0 for clean data, 1 for pure noise."""
    return level.sigma / (level.alpha + level.sigma)


def to_flow(x: Array, level: Level) -> Array:
    """The state `z = x / (alpha + sigma)` [B, ...] of `probability_flow` for an `x` at a level."""
    return x / expand(level.alpha + level.sigma, x)


def from_flow(z: Array, level: Level) -> Array:
    """The sample `x = (alpha + sigma) z` [B, ...] at a level: the inverse of `to_flow`."""
    return z * expand(level.alpha + level.sigma, z)


def least_s(schedule: Schedule, dtype: Any) -> float:
    """The smallest `sigma / alpha` at which a network is called by default.

    The schedule's own at `t_min` if that is not 0, else the square root of the dtype's precision: there, the error of
    a first-order step to sigma = 0, which is of order s^2, has sunk into the rounding.
    """
    own = float(np.asarray(schedule(schedule.t_min).s))
    return own if own > 0 else float(jnp.finfo(dtype).eps) ** 0.5


def _at(schedule: Schedule, r: Array) -> Level:
    return schedule.at_logsnr(2 * (jnp.log1p(-r) - jnp.log(r)))


def probability_flow(
    denoise: Denoiser, schedule: Schedule, *, s_min: float | None = None
) -> Callable[[Array, Array, Any], Array]:
    """The field `(r, z [B, ...], args=None) -> dz / dr` [B, ...] of the probability-flow ODE in the flow gauge.

    The signature is that of diffrax's `ODETerm`, scipy's `solve_ivp` after flattening, and `odeint` with its arguments
    swapped. `r` is a scalar or [B]; integrate from `flow_time(start)` to `flow_time(end)`.

    No network is called at sigma = 0, where its noise is not defined. Below `s_min` the field is that of `s_min`: its
    limit at r = 0 is finite, so this costs an error of order `s_min` times the length of the last step.

    Args:
      denoise: any `(x, level) -> Prediction`.
      schedule: gives the network its time and `x` its scale.
      s_min: smallest `sigma / alpha` at which `denoise` is called; default that of `least_s`.

    Song et al. 2021, arXiv:2011.13456, Eq. 13, with the time of Lipman et al. 2023, arXiv:2210.02747.
    """

    def field(r, z, args=None):
        s = least_s(schedule, z.dtype) if s_min is None else s_min
        level = _at(schedule, jnp.maximum(jnp.asarray(r, z.dtype), s / (1 + s)))
        prediction = denoise(from_flow(z, level), level)
        return prediction.eps - prediction.x0

    return field


def _combine(y, step, weights, slopes):
    """`y + step * sum(weights * slopes)` for pytrees; `step` is a scalar or [B]."""

    def leaf(y, *slopes):
        return y + expand(step, y) * sum(w * k for w, k in zip(weights, slopes, strict=False) if w)

    return jax.tree.map(leaf, y, *slopes)


def rk_step(field: Callable, tableau: Tableau, r: Array, y: Any, step: Array, *, slope: Any) -> tuple[Any, Any, Any]:
    """One Runge-Kutta step: the state after it, the slope there and the estimate of the local error, pytrees like `y`.

    Args:
      field: `(r, y) -> dy / dr`.
      tableau: one of `METHODS`.
      r: scalar or [B].
      y: pytree of [B, ...].
      step: shape of `r`, negative towards the data.
      slope: `field(r, y)`, from the step before.
    """
    slopes, stage = [slope], y
    for node, row in zip(tableau.nodes[1:], tableau.rows, strict=True):
        stage = _combine(y, step, row, slopes)
        slopes.append(field(r + node * step, stage))
    error = _combine(jax.tree.map(jnp.zeros_like, y), step, tableau.error, slopes)
    return stage, slopes[-1], error


def _norm(error, scale, shape):
    """The largest over the leaves of the RMS of `error / scale`: [B], or its largest over the batch for shape []."""
    rms = lambda e, s: jnp.sqrt(jnp.mean((e / s) ** 2, axis=tuple(range(1, e.ndim))))
    each = jax.tree.reduce(jnp.maximum, jax.tree.map(rms, error, scale))
    return each if shape else jnp.max(each)


def _first_step(field, order, r, y, span, *, slope, tolerance):
    """A first step size with a local error near the tolerance (Hairer et al. 1993, section II.4), shape of `r`."""
    rtol, atol = tolerance
    scale = jax.tree.map(lambda y: atol + rtol * jnp.abs(y), y)
    size_y, size_slope = _norm(y, scale, r.shape), _norm(slope, scale, r.shape)
    tiny = (size_y < 1e-5) | (size_slope < 1e-5)
    trial = jnp.where(tiny, 1e-6, 0.01 * size_y / jnp.where(tiny, 1.0, size_slope))
    trial = jnp.minimum(trial, jnp.abs(span))
    moved = field(r + jnp.sign(span) * trial, _combine(y, jnp.sign(span) * trial, (1.0,), [slope]))
    change = _norm(jax.tree.map(jnp.subtract, moved, slope), scale, r.shape) / jnp.where(trial > 0, trial, 1.0)
    largest = jnp.maximum(size_slope, change)
    guess = jnp.where(largest > 1e-15, (0.01 / jnp.maximum(largest, 1e-15)) ** (1 / order), 1e-3 * trial)
    return jnp.minimum(jnp.minimum(100 * trial, guess), jnp.abs(span))


class _Loop(NamedTuple):
    r: Array
    y: Any
    slope: Any
    size: Array  # of the next step
    error: Array  # of the last step taken, over the tolerance
    retry: Array  # whether the step before was rejected
    stats: Stats
    tries: Array


def _control(error, before, retry, order):
    """Factors of the step size after an accepted and a rejected step: PI control (Gustafsson 1991; Hairer and Wanner
    1996, section IV.2), which takes fewer rejections than control by the last error alone."""
    bad = ~jnp.isfinite(error)
    error = jnp.where(bad, 1.0, jnp.maximum(error, 1e-10))
    grow = 0.9 * error ** (-0.7 / order) * before ** (0.4 / order)
    grow = jnp.clip(grow, 0.2, jnp.where(retry, 1.0, 10.0))
    shrink = jnp.where(bad, 0.2, jnp.clip(0.9 * error ** (-1 / order), 0.2, 1.0))
    return grow, shrink


def _attempt(field, tableau, end, tolerance, state: _Loop) -> _Loop:
    """Tries one step of every sample that has not arrived."""
    rtol, atol = tolerance
    active = state.r != end
    remaining = jnp.abs(end - state.r)
    last = state.size >= remaining
    size = jnp.where(active, jnp.minimum(state.size, remaining), 0.0)
    step = jnp.sign(end - state.r) * size
    y, slope, error = rk_step(field, tableau, state.r, state.y, step, slope=state.slope)
    scale = jax.tree.map(lambda a, b: atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)), state.y, y)
    error = _norm(error, scale, state.r.shape)

    ok = active & (error <= 1)  # not a number is a rejection
    grow, shrink = _control(error, state.error, state.retry, tableau.order)
    keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(expand(ok, a), a, b), new, old)
    stats = Stats(
        state.stats.calls + len(tableau.rows),
        state.stats.accepted + ok,
        state.stats.rejected + (active & ~ok),
        jnp.where(ok, size, state.stats.step),
        state.stats.finished,
    )
    return _Loop(
        r=jnp.where(ok, jnp.where(last, end, state.r + step), state.r),
        y=keep(y, state.y),
        slope=keep(slope, state.slope),
        size=jnp.where(active, size * jnp.where(ok, grow, shrink), state.size),
        error=jnp.where(ok, jnp.maximum(error, 1e-4), state.error),
        retry=jnp.where(active, ~ok, state.retry),
        stats=stats,
        tries=state.tries + 1,
    )


def integrate(
    field: Callable,
    y: Any,
    start: Array,
    end: Array,
    *,
    method: str = "rk45",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 1000,
) -> tuple[Any, Any, Array, Stats]:
    """Solves `dy / dr = field(r, y)` by adaptive steps; returns the last state, its slope, the r reached and `Stats`.

    A `lax.while_loop`: jit it, vmap it, differentiate it forwards; it has no reverse-mode gradient.

    Args:
      field: `(r, y) -> dy / dr`, with `r` of the shape of `start`.
      y: pytree of arrays [B, ...].
      start: [B] for a step size of each sample, [] for a common one.
      end: likewise, above or below `start`.
      method: "rk45" (six calls a step) or "rk23" (three).
      rtol: tolerance of the local error relative to the state, RMS over a sample, the largest over the leaves of `y`.
      atol: its absolute part.
      max_steps: most steps tried.
    """
    tableau = METHODS[method]
    slope = field(start, y)
    tolerance = (rtol, atol)
    size = _first_step(field, tableau.order, start, y, end - start, slope=slope, tolerance=tolerance)
    count = jnp.zeros(start.shape, jnp.int32)
    stats = Stats(jnp.int32(2), count, count, jnp.zeros_like(size), count == 0)
    state = _Loop(start, y, slope, size, jnp.ones_like(size), count != 0, stats, jnp.int32(0))
    state = jax.lax.while_loop(
        lambda s: jnp.any(s.r != end) & (s.tries < max_steps),
        lambda s: _attempt(field, tableau, end, tolerance, s),
        state,
    )
    return state.y, state.slope, state.r, state.stats._replace(finished=state.r == end)


def check_method(method: str, rtol: float, atol: float, max_steps: int) -> None:
    """Raises ValueError for an unknown method, tolerances that are negative or both 0, or no steps."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    traced = any(isinstance(tolerance, jax.core.Tracer) for tolerance in (rtol, atol))
    if not traced and not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"expected rtol >= 0 and atol >= 0, not both 0; got rtol={rtol}, atol={atol}")
    if max_steps < 1:
        raise ValueError(f"max_steps: expected a whole number >= 1, got {max_steps}")


def _ends(denoise, x, start, end, per_sample):
    """The two levels as arrays of x's dtype, [B] or []; runs the denoiser's own check on them if they are concrete."""
    for name, level in (("start", start), ("end", end)):
        shapes = {jnp.shape(field) for field in level}
        allowed = {(), x.shape[:1]} if per_sample else {()}
        if len(shapes) > 1 or not shapes <= allowed:
            raise ValueError(
                f"adaptive: the fields of {name} must all be one of {sorted(allowed, key=len)} (one level for the "
                f"batch{', or one per sample' if per_sample else ''}), got {sorted(shapes, key=len)}"
            )
    concrete = not any(isinstance(field, jax.core.Tracer) for level in (start, end) for field in level)
    if concrete and hasattr(denoise, "check"):
        for level in (start, end):
            denoise.check(Level(*(np.atleast_1d(np.asarray(field, np.float64)) for field in level)))
    shape = x.shape[:1] if per_sample else ()
    # The ratio is taken before the cast, in float64 for levels from the host.
    times = [jnp.broadcast_to(jnp.asarray(flow_time(level), x.dtype), shape) for level in (start, end)]
    levels = [Level(*(jnp.broadcast_to(jnp.asarray(f, x.dtype), shape) for f in level)) for level in (start, end)]
    return *levels, *times


def adaptive(
    denoise: Denoiser,
    schedule: Schedule,
    x: Array,
    start: Level,
    end: Level,
    *,
    method: str = "rk45",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    per_sample: bool = True,
    max_steps: int = 1000,
    s_min: float | None = None,
) -> tuple[Array, Stats]:
    """Carries `x` along the probability flow from `start` to `end` with adaptive steps; returns `(x [B, ...], Stats)`.

    Runge-Kutta 4(5) or 2(3) in the flow gauge under PI step control, in one `lax.while_loop`. Works from alpha = 0 and
    to sigma = 0, and in the other direction, which encodes data as noise. Jit it; it has no reverse-mode gradient.

    At sigma = 0 there is no noise for a network to estimate, so none is called there. The stretch between sigma = 0 and
    `s_min` is one Euler step with the slope at `s_min`: downwards this returns the network's last x0. Its error is of
    order `s_min^2` and is not controlled by the tolerances.

    Where `max_steps` was not enough, `Stats.finished` is False and the sample is at the level it had reached.

    Args:
      denoise: any `(x, level) -> Prediction`; it sees levels with fields [B] if `per_sample`.
      schedule: gives the levels between the two ends.
      x: the state at `start` [B, ...].
      start: fields [], or [B] if `per_sample`.
      end: likewise.
      method: "rk45", six calls a step, or "rk23", three: for tolerances above 1e-3.
      rtol: tolerance of the local error relative to `x / (alpha + sigma)`, as RMS over a sample.
      atol: its absolute part.
      per_sample: each sample has its own time and steps, and its result does not depend on the batch; those that
        have arrived idle. Otherwise all take the steps that the worst one needs, and the network sees scalar levels.
      max_steps: most steps tried.
      s_min: smallest `sigma / alpha` of a call next to sigma = 0; default that of `least_s`. Give the one that the
        network was trained to.

    Raises:
      ValueError: for an unknown method, tolerances or levels that do not fit, or ends on which the denoiser is
        undefined.

    Song et al. 2021, arXiv:2011.13456, appendix D.4, who integrate x over t and stop at a positive t.
    """
    check_method(method, rtol, atol, max_steps)
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    start, end, begin, stop = _ends(denoise, x, start, end, per_sample)
    s = least_s(schedule, x.dtype) if s_min is None else s_min
    floor = jnp.asarray(s / (1 + s), x.dtype)
    field = probability_flow(denoise, schedule, s_min=s)

    def lift(z):
        return jnp.where(expand(begin == 0, z), z + floor * field(jnp.full_like(begin, floor), z), z)

    z, lifted = to_flow(x, start), jnp.any(begin == 0)
    z = jax.lax.cond(lifted, lift, lambda z: z, z)
    lowest = lambda r: jnp.where(r == 0, floor, r)
    controls = {"method": method, "rtol": rtol, "atol": atol, "max_steps": max_steps}
    z, slope, reached, stats = integrate(field, z, lowest(begin), lowest(stop), **controls)
    z = jnp.where(expand(stats.finished & (stop == 0), z), z - floor * slope, z)

    at = _at(schedule, jnp.maximum(reached, floor))
    size = jnp.where(stats.finished, end.alpha + end.sigma, at.alpha + at.sigma)
    out = jnp.where(expand(begin == stop, x), x, z * expand(size, z))
    return out, stats._replace(calls=stats.calls + lifted)
