"""Exponential Adams multistep: the linear part of the flow exactly, the rest by polynomials of any order up to 4.

Take out the flow of a Gaussian with mean m and variance v. With `q = sqrt(alpha^2 v + sigma^2)` and

    g = (sigma (x0 - m) - alpha v eps) / q,        Y = (x - alpha m) / q,        s = sigma / alpha,

the probability flow is `dY / ds = -g / (v + s^2)`, with nothing left out. If the data are that Gaussian, g is 0 and
every step is exact. v = 0 makes g the prediction of x0 (DPM-Solver++), v = sigma_data^2 EDM's network output, v = inf
eps. A solver interpolates g through its last values by a polynomial in a basis variable b(s); its weights are integrals
of Lagrange polynomials on the actual nodes, so a formula of p points has order p on any grid.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.oracle import Gaussian
from diffjax.core.types import Array, Level, Prediction, Solver, Step, namespace
from diffjax.sampling.solvers.basic import divide, moving, pairs

# Past this the prediction of x0 no longer changes in float32: the data's own std is lost in the noise. It stands for
# s = inf as an interpolation node.
_FAR = 1e4
_GAUSS = (lambda x, w: ((x + 1) / 2, w / 2))(*np.polynomial.legendre.leggauss(16))

BASES = {
    "asinh": lambda s, scale, xp: xp.arcsinh(s / scale),
    "half": lambda s, scale, xp: 0.5 * xp.log(s**2 + scale**2),
    "log": lambda s, scale, xp: xp.log(xp.maximum(s, 1e-12)),
}


class Compact(NamedTuple):
    """A grid whose steps of length zero come last.

    Attributes:
      level: the grid, fields [n + 1].
      place: where each step of the original went, [n] integers.
      moves: which steps have a length, [n].
    """

    level: Level
    place: Array
    moves: Array


def compact(levels: Level) -> Compact:
    """The grid with its moving steps first, so that "the step before" is the one before that moved."""
    xp = namespace(*levels)
    moves = moving(levels)
    order = xp.argsort(~moves, stable=True)
    starts = Level(*(xp.where(moves[order], field[:-1][order], field[-1]) for field in levels))
    level = Level(*(xp.concatenate([a, b[-1:]]) for a, b in zip(starts, levels, strict=True)))
    return Compact(level, xp.maximum(xp.cumsum(moves) - 1, 0), moves)


def _ratio(level: Level):
    """`s`, with `_FAR` in place of infinity."""
    xp = namespace(*level)
    far = level.sigma >= _FAR * level.alpha
    return xp.where(far, _FAR, level.sigma / xp.where(far, 1.0, level.alpha))


def _path(start: Level, end: Level, variance, xp):
    """The kernel of a step: its integral `[n, ...]`, and s on the way, a function of u from 0 (the end) to 1.

    The kernel `q_end ds / (v + s^2)` is constant in theta = arctan(s / sqrt(v)), and for v = 0 in 1 / s, so Gauss
    points are laid out in these. Written so that v = 0, s = 0 at the end and s = inf at the start are no special cases.
    """
    wide = lambda a: a.reshape(a.shape + (1,) * np.ndim(variance))
    rise = wide(start.sigma * end.alpha - end.sigma * start.alpha)
    s1 = wide(divide(end.sigma, end.alpha))
    if variance is None:  # eps: the kernel is alpha ds
        span = divide(rise, wide(start.alpha))
        return -span, lambda u: s1 + u * divide(span, wide(end.alpha))
    root = np.sqrt(variance)
    safe = np.where(root > 0, root, 1.0)
    angle = xp.arctan2(root * rise, wide(start.alpha * end.alpha) * variance + wide(start.sigma * end.sigma))
    share = divide(rise, wide(start.sigma * end.alpha))
    kernel = wide(end.alpha) * xp.where(root > 0, xp.sqrt(variance + s1**2) / safe * angle, share)

    def s(u):
        tangent = xp.tan(u * angle)
        below = 1 - xp.where(root > 0, s1 * tangent / safe, u * share)
        return xp.clip((s1 + root * tangent) / xp.where(below > 0, below, 1e-30), 0.0, _FAR)

    return kernel, s


def weights(start: Level, end: Level, nodes, valid, variance, basis) -> Array:
    """The weight [n, p, ...] of each node in each step: the kernel times its Lagrange polynomial in `basis(s)`.

    Args:
      start: fields [n], where the steps begin.
      end: fields [n], where they end.
      nodes: [p, n], s of the values that are interpolated.
      valid: [p, n], which of them exist.
      variance: [...] float64, v in each direction; None for eps.
      basis: function of s.
    """
    xp = namespace(start.alpha, end.alpha)
    wide = lambda a: a.reshape(a.shape + (1,) * np.ndim(variance))
    kernel, s = _path(start, end, variance, xp)
    at, count = basis(nodes), len(nodes)

    def polynomials(u):
        b = basis(s(u))
        values = []
        for j in range(count):
            value = wide(xp.where(valid[j], 1.0, 0.0)) * xp.ones_like(b)
            for k in set(range(count)) - {j}:
                both = valid[j] & valid[k] & (at[j] != at[k])
                ratio = (b - wide(at[k])) / wide(xp.where(both, at[j] - at[k], 1.0))
                value = value * xp.where(wide(both), ratio, 1.0)
            values.append(value)
        return xp.stack(values, axis=1)

    points, shares = _GAUSS
    if xp is np:  # one point at a time: diagonal statistics of images are large
        total = sum(share * polynomials(point) for point, share in zip(points, shares, strict=True))
    else:
        total = jnp.tensordot(jnp.asarray(shares), jax.vmap(polynomials)(jnp.asarray(points)), axes=1)
    return kernel[:, None] * total


def _table(levels: Level, order: int, correct: int, variance, basis, *, open_end: bool) -> dict:
    """Every coefficient of every step, rows [n, ...].

    Args:
      levels: the grid.
      order: nodes of the predictor.
      correct: nodes of the corrector, 0 for none.
      variance: v in each direction; None for eps.
      basis: function of s.
      open_end: whether the basis is infinite at s = 0; a step that ends there has one node.
    """
    grid, place, moves = compact(levels)
    xp = namespace(*grid)
    start, end = pairs(grid)
    n, most = len(place), max(order, correct)
    index = np.arange(n)
    back = np.maximum(index - np.arange(most)[:, None], 0)
    exists = np.arange(most)[:, None] <= index
    predicts = (end.sigma > 0) | (np.arange(order)[:, None] == 0) | (not open_end)
    s = _ratio(start)[back]
    wide = lambda a: a.reshape(a.shape + (1,) * np.ndim(variance))
    if variance is None:
        q = lambda level: level.alpha
        to_x0, to_eps = xp.zeros_like(start.alpha), xp.ones_like(start.alpha)
    else:
        q = lambda level: xp.sqrt(wide(level.alpha) ** 2 * variance + wide(level.sigma) ** 2)
        to_x0, to_eps = divide(wide(start.sigma), q(start)), -divide(wide(start.alpha) * variance, q(start))
    rows = {
        "x0": to_x0,
        "eps": to_eps,
        "x": divide(q(end), q(start)),
        "g": weights(start, end, s[:order], exists[:order] & predicts, variance, basis),
    }
    if correct:
        before = Level(*(field[np.maximum(index - 1, 0)] for field in start))
        rows["again"] = weights(before, start, s[:correct], exists[:correct], variance, basis)
        rows["before"] = divide(q(start), q(before))
        rows["alpha"] = before.alpha
        rows["correct"] = xp.asarray(index > 0)
    return {name: row[place] for name, row in rows.items()}


def adams(
    order: int = 4,
    predict: str = "v",
    *,
    sigma_data: float = 0.5,
    stats: Gaussian | None = None,
    corrector: bool = True,
    basis: str = "asinh",
    scale: float = 0.05,
) -> Solver:
    """Exponential Adams of a true order 1 to 4, with one call a step.

    `predict` says which linear part is exact: "x0" with "log" and no corrector is DPM-Solver++ (Lu et al. 2022,
    arXiv:2211.01095) with the true weights of non-uniform steps, "eps" DEIS (Zhang and Chen 2022, arXiv:2204.13902) in
    the variable s, and "v" the network output of EDM (Karras et al. 2022, arXiv:2206.00364, Eq. 7), whose linear part
    is the flow of a Gaussian. The corrector redoes the last step with the new prediction inside and costs no call (Zhao
    et al. 2023, UniPC, arXiv:2302.04867, Algorithm 1): `order - 1` points predict, `order` correct. The first steps
    have fewer points: their error is of second order (third with the corrector), times how much the prediction changes
    there, so start where it hardly does, at large s.

    Args:
      order: of convergence, 1 to 4.
      predict: "x0", "v" or "eps".
      sigma_data: std of the data for "v"; EDM's default.
      stats: mean and covariance of the data in place of `sigma_data`, of zero mean; for "v".
      corrector: whether to use it; order 1 has none.
      basis: the polynomial's variable: "asinh" of s / scale, "half" `log(s^2 + scale^2) / 2`, or "log" of s, in which
        the step to sigma = 0 is first order.
      scale: of the basis, about the std of the finest structure of the data.

    Raises:
      ValueError: for another order, prediction or basis, statistics for another prediction than "v", or, at the start
        of sampling, "eps" on a grid from alpha = 0.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order: expected 1, 2, 3 or 4, got {order!r}")
    if predict not in ("x0", "v", "eps"):
        raise ValueError(f"predict: expected 'x0', 'v' or 'eps', got {predict!r}")
    if basis not in BASES:
        raise ValueError(f"unknown basis {basis!r}; known: {', '.join(BASES)}")
    if stats is not None and predict != "v":
        raise ValueError(f"stats belong to predict='v'; predict={predict!r} has no Gaussian to take out")
    if not (sigma_data > 0 and scale > 0):
        raise ValueError(f"sigma_data and scale must be positive, got {sigma_data} and {scale}")
    if stats is None:
        variance = {"x0": np.zeros(()), "v": np.asarray(sigma_data**2), "eps": None}[predict]
        mean, operate = 0.0, jnp.multiply
    else:
        variance, mean, operate = stats.spectrum, stats.mean, stats.operate
    corrector = corrector and order > 1
    predicts, corrects = (order - 1, order) if corrector else (order, 0)

    def init(x, levels):
        if stats is not None:
            stats.check(x.shape[1:])
        if predict == "eps" and isinstance(levels.alpha, np.ndarray) and np.any(levels.alpha == 0):
            raise ValueError("adams with predict='eps' divides by alpha; start the grid at alpha > 0, or use 'v'")
        xp = namespace(*levels)
        rows = _table(
            levels, predicts, corrects, variance, lambda s: BASES[basis](s, scale, xp), open_end=basis == "log"
        )
        history = jnp.zeros((order - 1, *x.shape), x.dtype)
        return (x, history), rows

    def step(denoise, x, memory, at: Step):
        before, history = memory
        prediction = denoise(x, at.level)
        row, center = at.coef, jnp.asarray(mean, x.dtype)
        g = operate(row["x0"], prediction.x0 - center) + operate(row["eps"], prediction.eps)
        points = jnp.concatenate([g[None], history])
        combine = lambda table: sum(operate(table[j], points[j]) for j in range(len(table)))
        if corrector:
            again = at.level.alpha * center + operate(row["before"], before - row["alpha"] * center)
            x = jnp.where(row["correct"], again + combine(row["again"]), x)
        following = at.next.alpha * center + operate(row["x"], x - at.level.alpha * center) + combine(row["g"])
        return following, (x, points[:-1] if len(history) else history), prediction

    return Solver(init, step, order=order, nfe=lambda n: n)


def jump(solver: Solver, stats: Gaussian) -> Solver:
    """Takes the first step of the grid as the flow of a Gaussian, in closed form and without a call; then `solver`.

    Far above the data's own std the probability flow of any data is that of one Gaussian with its mean and covariance.
    So a grid that begins `[s_max, s_1, ...]` with `s_1` about 5 to 40 times the std spends no calls on the way there.
    Under guidance the flow is another one: give the statistics of the guided class, or leave the jump out.

    Args:
      solver: for all steps but the first.
      stats: of the data; a scalar variance is enough, `Gaussian.fit(data)`.
    """

    def init(x, levels):
        stats.check(x.shape[1:])
        grid = compact(levels)
        xp = namespace(*levels)
        first = (grid.place == 0) & grid.moves
        landing = grid.level.at(1)
        # For the inner solver the first step has no length, so that it has no history to offer.
        taken = xp.concatenate([xp.zeros(1, int), xp.cumsum(grid.moves)])  # steps taken before each level
        collapsed = Level(*(xp.where(taken == 0, b, a) for a, b in zip(levels, landing, strict=True)))
        memory, inner = solver.init(x, collapsed)
        return memory, {"first": first, "inner": inner}

    def step(denoise, x, memory, at: Step):
        def far(_):
            return stats.flow(x, at.level, at.next), memory, Prediction(*stats.denoise(x, at.level)[:2])

        def near(_):
            x_next, after, prediction = solver.step(denoise, x, memory, at._replace(coef=at.coef["inner"]))
            return x_next, after, Prediction(prediction.x0, prediction.eps)

        return jax.lax.cond(at.coef["first"], far, near, None)

    return Solver(init, step, order=solver.order, nfe=lambda n: solver.nfe(max(n - 1, 1)) if n > 1 else 0)
