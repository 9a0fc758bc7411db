"""Editing given data: starting from a noised image, keeping a known part, going back and forth around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Denoiser, Level, Solver, Step, expand, namespace
from diffjax.sampling.loop import normal, sample
from diffjax.sampling.solvers.basic import divide, pairs
from diffjax.sampling.solvers.stochastic import paired


def start_from(levels: Level, strength: float) -> Level:
    """The last `int(strength * n)` steps of a grid of n: where an edit of that strength starts and what it runs.

    As in the image-to-image pipelines of diffusers; strength 1 is the whole grid.

    Raises:
      ValueError: unless 0 < strength <= 1, or if no step is left.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength: expected a number in (0, 1], 1 for the whole grid; got {strength}")
    n = len(levels.t) - 1
    steps = int(n * strength)
    if steps < 1:
        raise ValueError(f"strength: {strength} of {n} steps leaves none; give at least {1 / n:.3g}, or a longer grid")
    return levels.at(slice(n - steps, None))


def noised(x0: Array, level: Level, key: jax.Array) -> Array:
    """`alpha x0 + sigma noise` [B, ...], float32 or better: clean data as they look at a level.

    Args:
      x0: [B, ...].
      level: scalar fields or [B]; of a grid, `levels.at(0)`.
      key: one typed key, or one per sample; not the key given to `sample`.

    Raises:
      ValueError: for a whole grid in place of a level.
    """
    x0 = jnp.asarray(x0)
    x0 = x0.astype(jnp.promote_types(x0.dtype, jnp.float32))
    if jnp.shape(level.alpha) not in ((), x0.shape[:1]):
        raise ValueError(
            f"noised: expected one level (scalar fields) or one per sample {x0.shape[:1]}, got fields of shape "
            f"{jnp.shape(level.alpha)}; of a grid take levels.at(0)"
        )
    alpha, sigma = (expand(jnp.asarray(a, x0.dtype), x0) for a in (level.alpha, level.sigma))
    return alpha * x0 + sigma * normal(key, x0)


def sdedit(
    solver: Solver, denoise: Denoiser, x0: Array, levels: Level, key: jax.Array, *, strength: float = 0.8, **options
) -> Any:
    """SDEdit (Meng et al. 2022, arXiv:2108.01073, Algorithm 1 without a mask): noise some way up, sample back down.

    The low frequencies of x0 survive, the more of them the lower the strength. What comes back is that of `sample`.

    Args:
      solver: such as `dpmpp_2m()`.
      denoise: conditional on the wanted edit, or not.
      x0: the guide, [B, ...].
      levels: the whole grid; `start_from` cuts it.
      key: one typed key, or one per sample.
      strength: share of the steps that run, in (0, 1].
      options: of `sample`: `noise`, `trace`, `loop`, ...

    Raises:
      ValueError: as `start_from` and `sample`.
    """
    levels = start_from(levels, strength)
    split = jax.random.split if key.ndim == 0 else jax.vmap(jax.random.split, out_axes=1)
    key_start, key_steps = split(key)
    return sample(solver, denoise, noised(x0, levels.at(0), key_start), levels, key_steps, **options)


def _known(x0: Array, mask: Array, x: Array, name: str) -> tuple[Array, Array]:
    """The known data in x's dtype, and the mask.

    Raises:
      ValueError: if the mask is not boolean or one of the two does not broadcast against x.
    """
    mask = mask if isinstance(mask, jax.Array) else np.asarray(mask)
    if mask.dtype != bool:
        raise ValueError(
            f"{name}: the mask must be boolean, True where x0 is known; got {mask.dtype}; write mask > 0.5"
        )
    for what, shape in (("mask", mask.shape), ("x0", jnp.shape(x0))):
        try:
            fits = np.broadcast_shapes(shape, x.shape) == x.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"{name}: {what} of shape {shape} does not broadcast against x of shape {x.shape}")
    return jnp.asarray(x0, x.dtype), mask


def inpaint(solver: Solver, x0: Array, mask: Array, *, noise: Array | None = None) -> Solver:
    """Inpainting by replacement: after each step the known part becomes its own noised version at the new level.

    Song et al. 2021 (arXiv:2011.13456, appendix I.2), and Lugmayr et al. 2022 (arXiv:2201.09865, Eq. 8) without
    resampling. At sigma = 0 the known part is x0 exactly. The unknown part only learns of it through the denoiser, one
    level late, so that the two do not quite fit together, however many steps there are; `repaint` mends that at a
    price, see docs/inverse.md.

    Args:
      solver: any; one with memory carries predictions from before the replacement.
      x0: data [B, ...], or what broadcasts against them; read where the mask is True only.
      mask: boolean, True where x0 is known; broadcasts against x [B, ...].
      noise: unit noise of x0's shape for all steps, so that the known part moves along one straight path (as
        diffusers' inpainting pipelines do); default a fresh draw at each step.

    Raises:
      ValueError: in sampling, for a mask that is not boolean or shapes that do not fit.
    """

    def init(x, levels):
        _known(x0, mask, x, "inpaint")
        if noise is not None:
            _known(noise, mask, x, "inpaint(noise=...)")
        return solver.init(x, levels)

    def step(denoise, x, memory, at: Step):
        data, seen = _known(x0, mask, x, "inpaint")
        inner, drawn = at, noise
        if noise is None:
            inner, drawn = at._replace(draw=lambda j: at.draw(j + 1)), at.draw(0)
        x, memory, prediction = solver.step(denoise, x, memory, inner)
        # Selected first: what the mask hides may be anything, NaN included.
        shown = jnp.where(seen, at.next.alpha * jnp.where(seen, data, 0) + at.next.sigma * drawn, x)
        return shown, memory, prediction

    return solver._replace(init=init, step=step)


def repaint_levels(levels: Level, jump_length: int = 10, resamplings: int = 10) -> Level:
    """The grid of RePaint: down by `jump_length` levels, up again, `resamplings` times over, on the way to data.

    Lugmayr et al. 2022 (arXiv:2201.09865, appendix B, Figure 9 and the released schedule). With n levels above the
    last one, counted from the cleanest as 0, each of 0, j, 2 j, ... < n - j is left upwards `resamplings - 1` times.

    Args:
      levels: fields [n + 1], noise first.
      jump_length: levels that a jump goes back up; the paper's j.
      resamplings: times that each stretch is sampled; 1 returns the grid as it is. The paper's r.

    Raises:
      ValueError: for a number that is not whole or below 1.
    """
    index = _repaint_index(len(levels.t) - 1, *_jumps(jump_length, resamplings))
    return levels.at(index)


def _jumps(jump_length, resamplings):
    for name, value in (("jump_length", jump_length), ("resamplings", resamplings)):
        if not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
    return int(jump_length), int(resamplings)


def _repaint_index(n: int, jump_length: int, resamplings: int) -> np.ndarray:
    left = {j: resamplings - 1 for j in range(0, n - jump_length, jump_length)}
    t, times = n, []
    while t > 0:
        t -= 1
        times.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            times.extend(range(t + 1, t + jump_length + 1))
            t += jump_length
    return np.append(n - 1 - np.array(times, int), n)


def _repaint_calls(steps: int, jump_length: int, resamplings: int) -> int:
    """Steps downwards among `steps` of a grid of `repaint_levels`; further ones are its padding or go down too."""

    def length(n):
        return n + 2 * jump_length * (resamplings - 1) * len(range(0, n - jump_length, jump_length))

    n = max(n for n in range(steps + 1) if length(n) <= steps)
    return steps - (length(n) - n) // 2


def repaint(solver: Solver, x0: Array, mask: Array, *, jump_length: int = 10, resamplings: int = 10) -> Solver:
    """RePaint (Lugmayr et al. 2022, arXiv:2201.09865, Algorithm 1): inpainting that goes back and forth.

    Sample along `repaint_levels(levels, jump_length, resamplings)`. Where the noise grows x is noised, `q(x' | x)`,
    without a network call; elsewhere it is `inpaint(solver, x0, mask)` with fresh noise. Each return trip lets the
    unknown part answer to the known one.

        solver = repaint(ddim(1.0), x0, mask, jump_length=10, resamplings=5)
        sample(solver, denoise, x, repaint_levels(levels, 10, 5), key)

    `nfe(n)` counts for the n steps of that grid, and needs the two numbers for it.

    Args:
      solver: without memory between steps. The paper's is `ancestral_ddpm`.
      x0: data [B, ...], or what broadcasts against them; read where the mask is True only.
      mask: boolean, True where x0 is known; broadcasts against x [B, ...].
      jump_length: as given to `repaint_levels`.
      resamplings: likewise.

    Raises:
      ValueError: for numbers as `repaint_levels`; in sampling, for a mask that is not boolean, shapes that do not fit,
        or a solver with memory: what it remembers is not where the jump lands.
    """
    jumps = _jumps(jump_length, resamplings)

    def init(x, levels):
        _known(x0, mask, x, "repaint")
        if jax.tree.leaves(solver.init(x, levels.at(slice(0, 2)))[0]):
            raise ValueError(
                "repaint: needs a solver without memory between steps, such as ddim(1.0) or heun(): what a solver "
                "remembers is not where a jump lands"
            )
        start, end = pairs(levels)
        xp = namespace(*levels)
        grows = end.sigma * start.alpha > start.sigma * end.alpha
        # The inner solver is never run on a step that grows; there it gets coefficients for staying in place.
        stay = Level(*(xp.where(grows, a, b) for a, b in zip(start, end, strict=True)))
        memory, inner = paired(solver, x, start, stay)
        keep = xp.where(grows, divide(end.alpha, start.alpha), 1.0)
        draw = xp.sqrt(xp.where(grows, xp.maximum(end.sigma**2 - (keep * start.sigma) ** 2, 0.0), 0.0))
        return memory, {"inner": inner, "grows": grows, "keep": keep, "draw": draw}

    def step(denoise, x, memory, at: Step):
        def down(x):
            inner = inpaint(solver, x0, mask)
            return inner.step(denoise, x, memory, at._replace(coef=at.coef["inner"]))

        def up(x):
            _, _, prediction = jax.eval_shape(down, x)
            nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), prediction)
            return at.coef["keep"] * x + at.coef["draw"] * at.draw(0), memory, nothing._replace(x0=x)

        return jax.lax.cond(at.coef["grows"], up, down, x)

    nfe: Callable[[int], int] = lambda n: solver.nfe(_repaint_calls(n, *jumps))
    return Solver(init, step, order=solver.order, nfe=nfe, ascending=True)
