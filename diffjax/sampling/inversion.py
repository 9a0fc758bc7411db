"""Inversion: samplers run from data to noise and back, and the arc between two noises."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Denoiser, Level, Prediction, Solver, Step, expand
from diffjax.sampling.loop import sample
from diffjax.sampling.solvers.basic import euler, pairs


def _swap(level: Level) -> Level:
    return Level(level.t, level.sigma, level.alpha)


def _mirrored(denoise: Denoiser) -> Denoiser:
    """The denoiser with the roles of signal and noise exchanged."""

    def swapped(x, level):
        prediction = denoise(x, _swap(level))
        return prediction._replace(x0=prediction.eps, eps=prediction.x0)

    return swapped


def inverse(solver: Solver) -> Solver:
    """The solver for grids along which the noise grows, from data to noise; of the same order.

    A network is not called at sigma = 0: there `x0` is the state itself, and `eps` is that of the next level at
    `alpha' x0`, the convention of DDIM inversion. This first step is of order 1, so methods of order above 2 need a
    grid that ends at a finite sigma.

    The flow `dx = x0 d(alpha) + eps d(sigma)` stays the same when signal and noise exchange names, and noise that grows
    is then signal that does. Solvers with memory of earlier steps are run under these names, since their coefficients
    take the log-SNR to grow: `inverse(dpmpp_2m())` extrapolates eps. One with memory that also takes levels of its own
    from a schedule has no inverse here.
    """

    def init(x, levels):
        memory, coef = solver.init(x, levels)
        return solver.init(x, _swap(levels)) if jax.tree.leaves(memory) else (memory, coef)

    def step(denoise, x, memory, at: Step):
        def guarded(x, level):
            clean = level.sigma == 0
            lifted = Level(*(jnp.where(clean, b, a) for a, b in zip(level, at.next, strict=True)))
            alpha = jnp.where(clean, level.alpha, 1.0)
            prediction = denoise(jnp.where(clean, at.next.alpha / alpha, 1.0) * x, lifted)
            return prediction._replace(x0=jnp.where(clean, x / alpha, prediction.x0))

        if not jax.tree.leaves(memory):
            return solver.step(guarded, x, memory, at)
        swapped = at._replace(level=_swap(at.level), next=_swap(at.next))
        x, memory, prediction = solver.step(_mirrored(guarded), x, memory, swapped)
        return x, memory, prediction._replace(x0=prediction.eps, eps=prediction.x0)

    return solver._replace(init=init, step=step, ascending=True)


def ddim_inversion(iterations: int = 0) -> Solver:
    """Inverse of `euler()`, that is of deterministic DDIM, along a grid from data to noise.

    With 0 iterations, one call a step: both halves are those of the current, cleaner state (Dhariwal and Nichol 2021,
    arXiv:2105.05233, appendix F; Mokady et al. 2023, arXiv:2211.09794, Eq. 3), which inverts the flow to order 1. With
    more, that many calls solve `x = alpha x0(x') + sigma eps(x')` for the noisier x' by fixed-point iteration (Pan et
    al. 2023, arXiv:2309.04907, Eq. 6, without their acceleration) in the flow gauge: the inverse of the Euler step
    itself. It converges where the step in r is shorter than the inverse of the field's Lipschitz constant.

    Raises:
      ValueError: if `iterations` is negative.
    """
    if iterations < 0:
        raise ValueError(f"iterations: expected a whole number >= 0, got {iterations}")
    if iterations == 0:
        return inverse(euler())

    def init(x, levels):
        level, following = pairs(levels)
        ratio = (following.alpha + following.sigma) / (level.alpha + level.sigma)
        return (), {"x": ratio, "slope": following.sigma - ratio * level.sigma}

    def step(denoise, x, memory, at: Step):
        def again(_, carry):
            prediction = denoise(carry[0], at.next)
            moved = at.coef["x"] * x + at.coef["slope"] * (prediction.eps - prediction.x0)
            return moved, prediction.x0, prediction.eps

        start = (at.coef["x"] * x, jnp.zeros_like(x), jnp.zeros_like(x))
        out, x0, eps = jax.lax.fori_loop(0, iterations, again, start)
        return out, memory, Prediction(x0, eps)

    return Solver(init, step, order=1, nfe=lambda n: iterations * n, ascending=True)


def encode(solver: Solver, denoise: Denoiser, x0: Array, levels: Level) -> Array:
    """The state at `levels[0]` [B, ...] that `decode` carries to `x0`, up to the error of the solver.

    Samples along the grid reversed with `inverse(solver)`; a solver that is ascending already, such as
    `ddim_inversion(3)`, is taken as it is. `adaptive` from a clean level to a noisy one encodes to a tolerance.

    Args:
      solver: deterministic.
      denoise: any `(x, level) -> Prediction`.
      x0: the state at `levels[-1]` [B, ...].
      levels: the grid of `decode`, noise first.
    """
    if hasattr(denoise, "check") and not any(isinstance(field, jax.core.Tracer) for field in levels):
        denoise.check(levels.at(slice(None, -1)))
    solver = solver if solver.ascending else inverse(solver)
    return sample(solver, denoise, x0, levels.at(slice(None, None, -1)))


def decode(solver: Solver, denoise: Denoiser, x: Array, levels: Level) -> Array:
    """The state at `levels[-1]` [B, ...] of an `x` at `levels[0]`: `sample` without noise, the partner of `encode`."""
    return sample(solver, denoise, x, levels)


def slerp(a: Array, b: Array, t: Array) -> Array:
    """The point at fraction `t` on the arc from `a` to `b`, each sample of [B, ...] a vector; `t` is a scalar or [B].

    Between noises it keeps the norm that a Gaussian has in high dimension, where a straight line passes through its
    middle. Norms that differ are interpolated as in Shoemake's formula applied to the vectors themselves. Vectors
    that are parallel, opposite (no arc is singled out) or zero are interpolated linearly.

    Shoemake 1985, Animating rotation with quaternion curves, section 3.3.

    Raises:
      ValueError: if the shapes of `a` and `b` differ.
    """
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(f"slerp: expected two arrays of one shape, got {jnp.shape(a)} and {jnp.shape(b)}")
    t = expand(jnp.asarray(t, jnp.result_type(a, b, jnp.float32)), a)
    dot = lambda a, b: jnp.sum(a * b, axis=tuple(range(1, a.ndim)))
    norm = jnp.sqrt(dot(a, a) * dot(b, b))
    cosine = jnp.where(norm > 0, dot(a, b) / jnp.where(norm > 0, norm, 1.0), 1.0)
    straight = jnp.abs(cosine) > 1 - 4 * jnp.finfo(cosine.dtype).eps
    angle = expand(jnp.arccos(jnp.where(straight, 0.0, cosine)), a)
    arc = (jnp.sin((1 - t) * angle) * a + jnp.sin(t * angle) * b) / jnp.sin(angle)
    return jnp.where(expand(straight, a), (1 - t) * a + t * b, arc)
