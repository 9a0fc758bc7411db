"""Adaptive projected guidance, and a running average of the guidance over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import jax.numpy as jnp

from diffjax.core.heads import X0
from diffjax.core.types import Denoiser, Head, Solver
from diffjax.guidance.blend import Scale, call, dot, like, move, scale_at, split


def apg(denoise_pair: Denoiser, scale: Scale, *, eta: float = 0.0, norm: float = math.inf, head: Head = X0) -> Denoiser:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv:2410.02416, section 4 and Algorithm 1).

    The update `cond - uncond` is shortened to the length `norm`, its part along `cond` is multiplied by `eta`, and
    `scale - 1` times the result is added to `cond`. `eta=1, norm=inf` is `cfg`; scale 1 is the conditional prediction
    bit for bit. Momentum, the third part of the method, is `momentum`.

    Args:
      denoise_pair: as in `cfg`.
      scale: a number, an array [B], or a function of the level.
      eta: weight of the part parallel to the conditional prediction, which oversaturates.
      norm: largest length of the update over a whole sample, the paper's r.
      head: the space of lengths and angles; the paper's is x0.

    Raises:
      ValueError: for a norm that is not positive or an eta that is not finite; when called, as `cfg`.
    """
    if not norm > 0:
        raise ValueError(f"apg: norm is the largest length of the update, > 0 or inf for none; got {norm}")
    if isinstance(eta, Real) and not math.isfinite(eta):
        raise ValueError(f"apg: expected a finite eta, 0 (orthogonal part only) to 1 (all of it), got {eta}")

    def denoise(x, level):
        cond, uncond = split(call(denoise_pair, x, level, 2), 2)
        c = head.target(cond.x0, cond.eps, level)
        update = c - head.target(uncond.x0, uncond.eps, level)
        if norm < math.inf:
            square = dot(update, update)
            long = square > norm**2
            update = update * jnp.where(long, norm / jnp.sqrt(jnp.where(long, square, 1.0)), 1.0)
        length = dot(c, c)
        parallel = jnp.where(length > 0, dot(update, c) / jnp.where(length > 0, length, 1.0), 0.0) * c
        w = scale_at("apg", scale, x, level)
        return move(cond, (w - 1) * (update - (1 - eta) * parallel).astype(x.dtype), level, head)

    return like(denoise, denoise_pair, head)


def momentum(solver: Solver, guide: Callable[[Denoiser], Denoiser], beta: float = -0.5) -> Solver:
    """A solver whose guidance is a running sum over the steps (Sadat et al. 2024, arXiv:2410.02416, section 4).

    The difference d of the pair's two predictions of x0 becomes `d + beta previous`, kept in the solver's memory,
    before `guide` reads the pair. The pair itself is the denoiser to sample with:
    `sample(momentum(heun(), lambda pair: apg(pair, 7.5, norm=2.5)), pair, x, levels)`. beta < 0, as in the paper,
    pushes away from where the last steps were pushed.

    The average moves once a step, at the solver's first call; later calls of the same step add the same `previous`, so
    that a second-order correction sees the function that it corrects. (The released code moves it at each call, which
    is the same for solvers with one call a step.) That first call must not sit inside a `lax.cond` or a loop of the
    solver; put other wrappers that branch, such as `zero_init`, around this one.

    Args:
      solver: any.
      guide: from the pair to a guided denoiser, as for `rescale`.
      beta: weight of the past, -1 < beta < 1; 0 is none.

    Raises:
      ValueError: unless -1 < beta < 1.
    """
    if not -1 < beta < 1:
        raise ValueError(f"momentum: the sum over past steps needs -1 < beta < 1 to stay bounded, got {beta}")

    def init(x, levels):
        memory, coef = solver.init(x, levels)
        return (memory, jnp.zeros_like(x)), coef

    def step(denoise_pair, x, memory, at):
        inner, previous = memory
        sums = []

        def averaged(twice, level):
            both = denoise_pair(twice, level)
            cond, uncond = jnp.split(both.x0, 2)
            sums.append(cond - uncond + beta * previous)
            return move(both, jnp.concatenate([jnp.zeros_like(cond), cond - uncond - sums[-1]]), level)

        x, inner, prediction = solver.step(guide(averaged), x, inner, at)
        return x, (inner, sums[0] if sums else previous), prediction

    return solver._replace(init=init, step=step)
