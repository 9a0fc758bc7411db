"""Pseudo linear multistep solvers: Adams-Bashforth with the weights of equal steps, whatever the steps are.

The combined eps is carried along the line from one level to the next, which is the fourth-order method on a grid of
equal steps in `s = sigma / alpha`, and of second order on any other smooth grid, equal steps of the discrete time
included (Liu et al. 2022, arXiv:2202.09778, section 3.4 proves that order). `lms` and `deis` take their weights from
the grid's own nodes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.types import Array, Level, Prediction, Solver, Step, namespace
from diffjax.sampling.solvers.basic import to_level
from diffjax.sampling.solvers.multistep import history, one_of

# Adams-Bashforth of orders 1 to 4 (Liu et al. 2022, arXiv:2202.09778, Eq. 12 and its lower orders).
ADAMS = np.array([[24.0, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def _adams(past) -> Array:
    """Rows [n, 4] of `ADAMS` for the predictions that each step has."""
    count = namespace(past.count).clip(past.count, 1, 4) - 1
    return namespace(past.count).asarray(ADAMS)[count]


def _transfer(level: Level, following: Level, x: Array, eps: Array) -> Array:
    """PNDM's step from `level` along one `eps` [B, ...] (Liu et al. 2022, Eq. 11), needs alpha > 0."""
    ratio = following.alpha / jnp.where(level.alpha > 0, level.alpha, 1.0)
    return ratio * x + (following.sigma - level.sigma * ratio) * eps


def _value(predict: str, prediction: Prediction, level: Level) -> Array:
    """What the history holds: eps, or `v = alpha eps - sigma x0`."""
    return prediction.eps if predict == "eps" else level.alpha * prediction.eps - level.sigma * prediction.x0


def _eps(predict: str, value: Array, x: Array, level: Level) -> Array:
    return value if predict == "eps" else level.alpha * value + level.sigma * x


def ipndm() -> Solver:
    """iPNDM: Adams-Bashforth of order 4 for eps with the weights of equal steps, one call a step.

    Liu et al. 2022 (arXiv:2202.09778) without their starting procedure, in the form of Zhang and Chen 2023
    (arXiv:2204.13902, section 3.3) and diffusers' IPNDMScheduler: orders 1, 2, 3, then 4. Its grid has equal steps in
    the angle `atan2(sigma, alpha)`. Finite from alpha = 0 (an Euler step there) to sigma = 0.
    """

    def init(x, levels):
        past = history(levels, 4, levels.alpha >= 0)  # eps is finite everywhere, and so are these weights
        return jnp.zeros((3, *x.shape), x.dtype), {"eps": _adams(past), "euler": levels.alpha[:-1] == 0}

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        known = jnp.concatenate([prediction.eps[None], memory])
        moved = _transfer(at.level, at.next, x, jnp.tensordot(at.coef["eps"], known, 1))
        out = jnp.where(at.coef["euler"], to_level(at.next, prediction), moved)
        return out, known[:3], prediction

    return Solver(init, step, order=2, nfe=lambda n: n)


def plms(predict: str = "eps") -> Solver:
    """PLMS: Adams-Bashforth of order 4 with the weights of equal steps, after one Heun step; n + 1 calls for n steps.

    Rombach et al. 2022 (arXiv:2112.10752, released `plms.py`) after Liu et al. 2022 (arXiv:2202.09778); diffusers'
    PNDMScheduler with `skip_prk_steps`. The first step is a predictor and a corrector, so the second calls the network
    again where the first arrived; then come the weights of orders 2, 3 and 4. Order 2 (see the module).

    A step from alpha = 0 is an Euler step, outside the history. Memory is that of three predictions.

    Args:
      predict: "eps", or "v" to combine `alpha eps - sigma x0` as that scheduler does for networks that predict v.

    Raises:
      ValueError: for any other predict.
    """
    one_of("predict", predict, ("eps", "v"))

    def init(x, levels):
        usable = levels.alpha > 0
        past = history(levels, 4, usable)
        return jnp.zeros((3, *x.shape), x.dtype), {
            "weights": _adams(past),
            "euler": ~usable[:-1],
            "first": (past.count == 1) & (levels.sigma[1:] > 0),
        }

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        value = _value(predict, prediction, at.level)
        known = jnp.concatenate([value[None], memory])

        def along(mean):
            return _transfer(at.level, at.next, x, _eps(predict, mean, x, at.level))

        # Where the branch is not taken its level is this step's, so that nothing infinite reaches gradients.
        safe = Level(*(jnp.where(at.coef["first"], b, a) for a, b in zip(at.level, at.next, strict=True)))

        def heun(_):
            second = _value(predict, denoise(along(value), safe), safe)
            return along((value + second) / 2)

        adams = lambda _: along(jnp.tensordot(at.coef["weights"], known, 1))
        out = jax.lax.cond(at.coef["first"], heun, adams, None)
        return jnp.where(at.coef["euler"], to_level(at.next, prediction), out), known[:3], prediction

    return Solver(init, step, order=2, nfe=lambda n: n + 1)


def pndm(schedule: Schedule, predict: str = "eps") -> Solver:
    """PNDM: three pseudo Runge-Kutta steps of four calls, then Adams-Bashforth; n + 9 calls for n steps.

    Liu et al. 2022 (arXiv:2202.09778, Algorithm 2); diffusers' PNDMScheduler without `skip_prk_steps`. Middle stages
    are at the schedule's own time halfway between two grid points, and the weights are those of equal steps.
    Order 2, and 4 on equal steps in s (see the module). (The scheduler rounds half of an odd number of its steps.)

    A step from alpha = 0 is an Euler step, before the warm-up begins. Needs at least four steps from there.

    Args:
      schedule: that the grid was made from: called with times, and `time(logsnr)`.
      predict: "eps", or "v" to combine `alpha eps - sigma x0` as that scheduler does for networks that predict v.

    Raises:
      ValueError: for any other predict.
    """
    one_of("predict", predict, ("eps", "v"))

    def init(x, levels):
        usable = levels.alpha > 0
        past = history(levels, 4, usable)
        xp = namespace(*levels)
        inside = usable & (levels.sigma > 0)
        times = xp.where(inside, schedule.time(xp.where(inside, levels.logsnr, 0.0)), 0.0)
        first, last = times[:-1], xp.where(inside[1:], times[1:], times[:-1])
        return jnp.zeros((3, *x.shape), x.dtype), {
            "weights": _adams(past),
            "euler": ~usable[:-1],
            "middle": schedule((first + last) / 2),
            "warm": (past.count < 4) & usable[:-1] & (levels.sigma[1:] > 0),
        }

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        e1 = _value(predict, prediction, at.level)
        known = jnp.concatenate([e1[None], memory])
        warm = at.coef["warm"]
        half, end = (
            Level(*(jnp.where(warm, b, a) for a, b in zip(at.level, there, strict=True)))
            for there in (at.coef["middle"], at.next)
        )

        def to(there, mean):
            return _transfer(at.level, there, x, _eps(predict, mean, x, at.level))

        def runge_kutta(_):
            e2 = _value(predict, denoise(to(half, e1), half), half)
            e3 = _value(predict, denoise(to(half, e2), half), half)
            e4 = _value(predict, denoise(to(end, e3), end), end)
            return to(at.next, (e1 + 2 * e2 + 2 * e3 + e4) / 6)

        adams = lambda _: to(at.next, jnp.tensordot(at.coef["weights"], known, 1))
        out = jax.lax.cond(warm, runge_kutta, adams, None)
        return jnp.where(at.coef["euler"], to_level(at.next, prediction), out), known[:3], prediction

    return Solver(init, step, order=2, nfe=lambda n: n + 9)
