"""CFG-Zero*: an optimal scale for the unconditional velocity, and first steps that stand still."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffjax.core.heads import FLOW
from diffjax.core.types import Denoiser, Head, Prediction, Solver
from diffjax.guidance.blend import Scale, call, dot, like, move, scale_at, split


def cfg_zero(denoise_pair: Denoiser, scale: Scale, *, head: Head = FLOW) -> Denoiser:
    """CFG with the optimised scale s* of CFG-Zero* (Fan et al. 2025, arXiv:2503.18886, section 4.1).

    `s u + scale (c - s u)` with `s = <c, u> / <u, u>` over a sample, c and u the conditional and unconditional
    velocities: the multiple of u nearest to c. Scale 1 is the conditional prediction bit for bit. The other half of the
    method is `zero_init`.

    Args:
      denoise_pair: as in `cfg`.
      scale: a number, an array [B], or a function of the level.
      head: the space of the projection; the paper's is the velocity of flow matching.

    Raises:
      ValueError: when called, as `cfg`.
    """

    def denoise(x, level):
        cond, uncond = split(call(denoise_pair, x, level, 2), 2)
        c, u = (head.target(p.x0, p.eps, level) for p in (cond, uncond))
        length = dot(u, u)
        s = jnp.where(length > 0, dot(c, u) / jnp.where(length > 0, length, 1.0), 0.0)
        w = scale_at("cfg_zero", scale, x, level)
        return move(cond, ((w - 1) * (c - s * u)).astype(x.dtype), level, head)

    return like(denoise, denoise_pair, head)


def zero_init(solver: Solver, steps: int = 1, *, head: Head = FLOW) -> Solver:
    """The solver with a zero network output in its first steps (Fan et al. 2025, arXiv:2503.18886, section 4.2).

    A flow then stands still there; the network is not called. The paper zeroes the first 4 % of the steps. Multistep
    solvers remember the zero as any other output.

    Args:
      solver: any.
      steps: how many, >= 0.
      head: what is zero; the paper's is the velocity of flow matching.

    Raises:
      ValueError: unless `steps` is a whole number >= 0.
    """
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"zero_init: expected a whole number of steps >= 0, got {steps!r}")

    def step(denoise, x, memory, at):
        def held(x, level):
            shapes = jax.eval_shape(lambda x: denoise(x, level), x)

            def still():
                zero = head.split(jnp.zeros_like(x), x, level)
                aux = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes.aux)
                return Prediction(zero.x0.astype(shapes.x0.dtype), zero.eps.astype(shapes.eps.dtype), aux)

            return jax.lax.cond(at.index < steps, still, lambda: denoise(x, level))

        return solver.step(held, x, memory, at)

    return solver._replace(step=step, nfe=lambda n: solver.nfe(n - steps) if n > steps else 0)
