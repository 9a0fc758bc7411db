"""Samplers of a few calls whose knots and coefficients are learned from the trajectories of a fine one.

The form is that of exponential Adams with a corrector: the flow of a Gaussian (mean m, variance v) exactly, and for
what it leaves, g, a linear multistep formula. With `q = sqrt(alpha^2 v + sigma^2)` and `s = sigma / alpha`,

    g = (sigma (x0 - m) - alpha v eps) / q,        d((x - alpha m) / q) = -g ds / (v + s^2).

A step adds the integral of its kernel `q' ds / (v + s^2)` times a weighted sum of the last g. The weights start as
means of Lagrange polynomials in asinh(s / scale) and move with the knots; what is learned is added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.oracle import Gaussian
from diffjax.core.schedules import Schedule
from diffjax.core.spacing import karras, s_range
from diffjax.core.types import Array, Denoiser, Level, Solver
from diffjax.sampling.loop import prior, sample
from diffjax.sampling.recommend import recommend
from diffjax.sampling.solvers.adams import BASES, adams, weights
from diffjax.sampling.steps import Steps, tabulated

TEACHER_CALLS = 128
# In units of the data's std: the noisiest knot that is tried, where the teacher's second and last calls are, where the
# mean is read off, the basis' scale, and the least std of a direction.
_FAR, _HIGH, _LOW, _MEAN_AT, _SCALE, _NARROW = 1000.0, 300.0, 0.01, 40.0, 0.1, 1e-3
# Ends closer than this share of the std count as equal: the floor under the logarithm of the loss.
_FLOOR = 1e-3
_CHUNK = 20


def _table(levels: Level, s, spectrum, scale: float, learned: dict, xp) -> dict:
    """Every coefficient of every step of a grid that repeats no level, rows [m, ...].

    Args:
      levels: the grid, fields [m + 1].
      s: its `sigma / alpha` with a finite start, [m + 1].
      spectrum: v in each direction, [...], positive.
      scale: of the basis.
      learned: "predict" [m, p] and "correct" [m, p'], added to the weights.
      xp: numpy or jax.numpy.
    """
    wide = lambda a: a.reshape(a.shape + (1,) * np.ndim(spectrum))
    m = len(s) - 1
    alpha, sigma = wide(levels.alpha), wide(levels.sigma)
    q = xp.sqrt(alpha**2 * spectrum + sigma**2)
    basis = lambda s: BASES["asinh"](s, scale, xp)

    def combine(name, ahead):
        """Of the last nodes of each step; for the corrector (ahead = 1) the first of them is the step's own end."""
        extra = learned[name][ahead:]
        node = np.arange(m - ahead) + ahead - np.arange(extra.shape[1])[:, None]
        start, end = levels.at(slice(0, m - ahead)), levels.at(slice(1, m - ahead + 1))
        out = weights(start, end, s[np.maximum(node, 0)], node >= 0, spectrum, basis)
        # Lagrange polynomials sum to one, so the sum over the nodes is the step itself.
        return out + out.sum(axis=1, keepdims=True) * wide(extra * (node >= 0).T)

    none = xp.zeros((1, learned["correct"].shape[1], *np.shape(spectrum)))
    return {
        "x0": sigma[:-1] / q[:-1],
        "eps": -alpha[:-1] * spectrum / q[:-1],
        "x": q[1:] / q[:-1],
        "predict": combine("predict", 0),
        "correct": xp.concatenate([none, combine("correct", 1)]) if m > 1 else none,
        "before": xp.concatenate([xp.ones_like(q[:1]), q[1:-1] / q[:-2]]),
        "alpha": xp.concatenate([levels.alpha[:1], levels.alpha[:-2]]),
        "first": xp.asarray(np.arange(m) == 0),
    }


class _Plan(NamedTuple):
    """What does not change during a fit: the ends of the grid, and the Gaussian."""

    schedule: Schedule
    first: Level
    far: float
    std: float
    stats: Gaussian
    jump: bool

    @property
    def spectrum(self):
        """Variances of the Gaussian, with a floor."""
        return np.maximum(self.stats.spectrum, (_NARROW * self.std) ** 2)

    def grid(self, gaps, xp) -> tuple[Level, Array]:
        """The grid whose steps in asinh(s / scale) are as the softmax of `gaps` [m], and its s with a finite start."""
        scale = _SCALE * self.std
        share = xp.exp(gaps - gaps.max())
        s = scale * xp.sinh(np.arcsinh(self.far / scale) * (1 - xp.cumsum(share / share.sum())[:-1]))
        inner, last = self.schedule.at_logsnr(-2 * xp.log(s)), self.schedule.at_logsnr(np.inf)
        wide = lambda a: xp.asarray(a, s.dtype).reshape(1)
        fields = zip(self.first, inner, last, strict=True)
        levels = Level(*(xp.concatenate([wide(a), b, wide(c)]) for a, b, c in fields))
        return levels, xp.concatenate([wide(self.far), s, wide(0.0)])

    def gaps(self, s) -> np.ndarray:
        """The inverse of `grid`: the argument whose grid has these s [m + 1]."""
        scale = _SCALE * self.std
        return np.log(-np.diff(np.arcsinh(np.minimum(s, self.far) / scale)) / np.arcsinh(self.far / scale))

    def table(self, learned: dict, xp) -> tuple[Level, dict]:
        """The grid [m + 1] and the coefficients of all its steps; with a jump, of all but the first."""
        levels, s = self.grid(learned["gaps"], xp)
        skip = slice(int(self.jump), None)
        return levels, _table(levels.at(skip), s[skip], self.spectrum, _SCALE * self.std, learned, xp)

    def run(self, learned: dict, denoise: Denoiser, x: Array) -> Array:
        """The ends of the sampler from x [N, ...]."""
        levels, table = self.table(learned, jnp)
        if self.jump:
            x, levels = self.stats.flow(x, levels.at(0), levels.at(1)), levels.at(slice(1, None))
        return sample(tabulated(table, self.stats), denoise, x, levels)

    def steps(self, learned: dict, before: float, after: float) -> Steps:
        """The result in float64."""
        learned = {name: np.asarray(a, np.float64) for name, a in learned.items()}
        levels, table = self.table(learned, np)
        if self.jump:  # the step of the jump has a row of its own, which is not read
            table = {name: np.concatenate([np.zeros_like(row[:1]), row]) for name, row in table.items()}
        return Steps(levels, table, self.stats, self.jump, before, after)


def _teach(denoise: Denoiser, schedule: Schedule, x: Array, teacher) -> Array:
    """The ends [N, ...] of the teacher's trajectories from x; the default is exponential Adams on a fine grid."""

    def run(x, levels, std):
        solver = adams(sigma_data=std, scale=_SCALE * std)
        return jax.jit(lambda x: sample(solver, denoise, x, levels))(x)

    first = schedule(np.asarray(schedule.t_max, np.float64))
    if teacher is None:
        lo, hi = s_range(schedule)
        std = float(jnp.std(run(x, karras(schedule, 24), 0.5)))
        low = min(_LOW * std, hi / 10)
        if first.s <= _HIGH * std:
            levels = karras(schedule, TEACHER_CALLS, s_min=low)
        else:
            body = karras(schedule, TEACHER_CALLS - 1, s_min=low, s_max=_HIGH * std)
            levels = Level(*(np.append(a, b) for a, b in zip(first, body, strict=True)))
        ends = run(x, levels, std) if std > 0 else x * jnp.nan
    else:
        solver, levels = teacher
        starts = np.asarray([levels.alpha[0], levels.sigma[0]], np.float64)
        if not np.allclose(starts, [first.alpha, first.sigma], atol=1e-6):
            raise ValueError(
                f"teacher: its grid must start at the schedule's t_max, alpha = {first.alpha:.6g} and sigma = "
                f"{first.sigma:.6g}; it starts at {starts[0]:.6g} and {starts[1]:.6g}"
            )
        ends = jax.jit(lambda x: sample(solver, denoise, x, levels))(x)
    if not bool(jnp.all(jnp.isfinite(ends))):
        raise FloatingPointError(
            "fit_steps: an end of the teacher is not finite; look at the denoiser or give a teacher"
        )
    return ends


def _moments(denoise: Denoiser, schedule: Schedule, x: Array, ends: Array) -> Gaussian:
    """The mean and scalar variance of the denoiser's data: the ends' variance, and its prediction amid much noise.

    The mean of a few ends is off by their std over sqrt(N). At s >> std the prediction is the mean and a small linear
    part, which is known and subtracted.
    """
    ends = np.asarray(ends, np.float64)
    crude = ends.mean(axis=0)
    variance = float(np.mean((ends - crude) ** 2)) * len(ends) / (len(ends) - 1)
    first = schedule(np.asarray(schedule.t_max, np.float64))
    level = schedule.at_logsnr(-2 * np.log(np.minimum(first.s, _MEAN_AT * np.sqrt(variance))))
    y = Gaussian(crude, variance).flow(x, first, level)
    slope = level.alpha * variance / (level.alpha**2 * variance + level.sigma**2)
    x0 = jax.jit(lambda y, *level: denoise(y, Level(*level)).x0)(y, *(jnp.asarray(field, y.dtype) for field in level))
    mean = np.mean(np.asarray(x0) - slope * np.asarray(y), axis=0, dtype=np.float64) / (1 - slope * level.alpha)
    return Gaussian(mean, variance)


def _plan(schedule: Schedule, nfe: int, stats: Gaussian, jump: bool) -> tuple[_Plan, np.ndarray]:
    """The plan, and s [m + 1] of the grid that the fit begins with, that of `recommend`."""
    std = stats.std
    one = Gaussian(0.0, std**2)
    first = schedule(np.asarray(schedule.t_max, np.float64))
    levels = recommend(schedule, nfe, stats=one)[1]
    jump = jump and len(levels.t) == nfe + 2
    if not jump and len(levels.t) != nfe + 1:
        fewer = recommend(schedule, nfe - 1, stats=one)[1] if nfe > 1 else karras(schedule, 1)
        levels = fewer if len(fewer.t) == nfe + 1 else karras(schedule, nfe)
    return _Plan(schedule, first, min(float(first.s), _FAR * std), std, stats, jump), levels.s


class _Fit(NamedTuple):
    """The state of the optimiser: the parameters, Adam's two moments of the gradient, and the iteration."""

    learned: dict
    mean: dict
    square: dict
    index: Array


def _adam(fit: _Fit, gradient: dict, rate) -> _Fit:
    """One step of Adam (Kingma and Ba 2015, arXiv:1412.6980, Algorithm 1) with beta 0.9 and 0.99."""
    mean = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * g, fit.mean, gradient)
    square = jax.tree.map(lambda a, g: 0.99 * a + 0.01 * g**2, fit.square, gradient)
    n = fit.index + 1
    step = lambda p, a, b: p - rate * (a / (1 - 0.9**n)) / (jnp.sqrt(b / (1 - 0.99**n)) + 1e-8)
    return _Fit(jax.tree.map(step, fit.learned, mean, square), mean, square, n)


def _distance(x, ends, std):
    """The distance per coordinate over std, squared, [N]."""
    return jnp.mean(((x - ends) / std) ** 2, axis=tuple(range(1, x.ndim)))


def _updater(plan: _Plan, call: Callable, coefficients: bool, rate: float, iterations: int) -> Callable:
    """`(data, fit, indices [k, batch]) -> (fit, losses [k])`: k iterations as one program."""
    std = plan.std

    def loss(learned, x, ends, cond):
        end = plan.run(learned, call(cond), x)
        return 0.5 * jnp.mean(jnp.log(_distance(end, ends, std) + _FLOOR**2))

    def update(data, fit, index):
        value, gradient = jax.value_and_grad(loss)(fit.learned, *jax.tree.map(lambda a: a[index], data))
        if not coefficients:
            gradient = {name: g if name == "gaps" else jnp.zeros_like(g) for name, g in gradient.items()}
        return _adam(fit, gradient, rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(fit.index / iterations, 1)))), value

    return jax.jit(lambda data, fit, index: jax.lax.scan(lambda fit, i: update(data, fit, i), fit, index))


def _judge(plan: _Plan, call: Callable, data) -> Callable:
    """`learned -> (loss, median distance)` on starts that are not trained on."""

    @jax.jit
    def judge(learned):
        x, ends, cond = data
        distance = _distance(plan.run(learned, call(cond), x), ends, plan.std)
        return jnp.mean(jnp.log(distance + _FLOOR**2)), jnp.sqrt(jnp.median(distance))

    return judge


def _descend(advance, judge, learned: dict, index, chunks: Iterable) -> tuple[dict, float, float]:
    """The parameters that judge best among the chunks' ends, and the median distances before and after.

    Raises:
      FloatingPointError: if a loss is not finite.
    """
    zeros = jax.tree.map(jnp.zeros_like, learned)
    fit, best, (score, before) = _Fit(learned, zeros, zeros, jnp.zeros((), int)), learned, judge(learned)
    after = before
    for begin in chunks:
        fit, losses = advance(fit, jnp.asarray(index[begin : begin + _CHUNK]))
        fine = np.isfinite(np.asarray(losses))
        if not fine.all():
            at = int(np.argmin(fine))
            raise FloatingPointError(
                f"fit_steps: the loss is {losses[at]} at iteration {begin + at}; lower learning_rate, or look at the "
                "gradient of the denoiser"
            )
        now, median = judge(fit.learned)
        if now < score:
            score, after, best = now, median, fit.learned
    return best, float(before), float(after)


def _check(nfe, x, iterations, learning_rate, held_out, batch, cond) -> None:
    """Raises for arguments of `fit_steps` that are out of range."""
    if isinstance(nfe, bool) or nfe < 1 or nfe != int(nfe):
        raise ValueError(f"nfe: expected a whole number of network calls >= 1, got {nfe}")
    if iterations < 1 or not learning_rate > 0:
        raise ValueError(f"expected iterations >= 1 and learning_rate > 0, got {iterations} and {learning_rate}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share between 0 and 1, got {held_out}")
    if x.ndim < 2 or len(x) < 8:
        raise ValueError(f"x: expected starts [N, ...] with N >= 8 (100 are a good number), got shape {x.shape}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected a number >= 1, got {batch}")
    for leaf in jax.tree.leaves(cond):
        if jnp.shape(leaf)[:1] != x.shape[:1]:
            raise ValueError(f"cond: expected one row per start, {len(x)}, got shape {jnp.shape(leaf)}")


def fit_steps(
    denoise: Denoiser,
    nfe: int,
    schedule: Schedule,
    x: Array | tuple[jax.Array, tuple[int, ...]],
    *,
    stats: Gaussian | None = None,
    jump: bool = True,
    coefficients: bool = True,
    order: int = 3,
    cond: Any = None,
    teacher: tuple[Solver, Level] | None = None,
    iterations: int = 400,
    learning_rate: float = 0.03,
    held_out: float = 0.25,
    batch: int | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Steps:
    """A sampler of `nfe` calls for this denoiser: knots and coefficients learned from a fine sampler's trajectories.

    About 100 starts and 400 iterations of Adam on the geometric mean of the distances to the teacher's ends, through
    the whole sampler: gradients pass the network, so an iteration costs about 3 nfe calls on the batch, and memory as
    much. The geometric mean leaves out the few trajectories that end in another mode, which no fit at few calls
    prevents. Learned grids are in Watson et al. 2022 (arXiv:2202.05830) and LD3 (Tong et al. 2024, arXiv:2405.15506);
    here coefficients of the multistep formula and its corrector are learned with them, from the Lagrange weights on.

    Args:
      denoise: whatever will be sampled, guidance included; `(x, level)`, or `(x, level, cond)` if `cond` is given.
      nfe: network calls.
      schedule: the grid starts at its `t_max` and ends at sigma = 0.
      x: starts [N, ...] at `t_max`, or `(key, shape [N, ...])` to draw them from `N(0, sigma^2)`.
      stats: mean and covariance of the data; default the scalar variance of the teacher's ends and the denoiser's mean.
      jump: whether the first step may be the flow of that Gaussian, without a call. Left out where the data's std is
        not small beside `t_max`'s s. Under strong guidance compare with `jump=False`.
      coefficients: whether they are learned, or the knots alone.
      order: how many predictions the predictor uses; the corrector uses one more.
      cond: pytree of arrays [N, ...], such as labels: each start's own.
      teacher: `(solver, levels)` in place of exponential Adams with 128 calls.
      iterations: of Adam; the rate falls to 0 over them as a cosine.
      learning_rate: of Adam at first.
      held_out: share of the starts that are not trained on; they choose the iteration and give `before` and `after`.
      batch: starts per iteration; default all that are trained on.
      progress: wraps the iterable of chunks of 20 iterations, such as `tqdm.tqdm`.

    Raises:
      ValueError: for arguments out of range, or a teacher that starts elsewhere.
      FloatingPointError: if the teacher or the loss is not finite, with the iteration.
    """
    first = schedule(np.asarray(schedule.t_max, np.float64))
    if isinstance(x, tuple):
        key, shape = x
        x = prior(key, tuple(shape), Level(*(np.asarray(field)[None] for field in first)))
    x = jnp.asarray(x, jnp.result_type(float))
    _check(nfe, x, iterations, learning_rate, held_out, batch, cond)
    if order < 1 or order != int(order):
        raise ValueError(f"order: expected a whole number >= 1, got {order}")
    call = lambda cond: denoise if cond is None else lambda x, level: denoise(x, level, cond)

    ends = _teach(call(cond), schedule, x, teacher)
    if stats is None:
        stats = _moments(call(cond), schedule, x, ends)
    plan, s = _plan(schedule, int(nfe), stats, jump)
    learned = {
        "gaps": jnp.asarray(plan.gaps(s), x.dtype),
        "predict": jnp.zeros((nfe, order), x.dtype),
        "correct": jnp.zeros((nfe, order + 1), x.dtype),
    }
    kept = len(x) - max(int(held_out * len(x)), 1)
    split = lambda part: jax.tree.map(lambda a: jnp.asarray(a)[part], (x, ends, cond))
    judge = _judge(plan, call, split(slice(kept, None)))
    advance = _updater(plan, call, coefficients, learning_rate, iterations)
    batch = min(batch or kept, kept)
    index = (np.arange(iterations + _CHUNK)[:, None] * batch + np.arange(batch)) % kept
    chunks = progress(range(0, iterations, _CHUNK))
    found = _descend(partial(advance, split(slice(None, kept))), judge, learned, index, chunks)
    return plan.steps(*found)
