"""Noise that belongs to one Brownian path, whatever the grid."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Level, namespace
from diffjax.sampling.loop import normal


def _fold(key, data):
    return jax.random.fold_in(key, data) if key.ndim == 0 else jax.vmap(lambda k: jax.random.fold_in(k, data))(key)


def _path(key: jax.Array, time: Array, x: Array, depth: int) -> Array:
    """The Brownian motion of `key` at a time in [0, 1], shape of `x`: Levy's midpoint construction, top down."""
    ends = (jnp.zeros(x.shape, x.dtype), normal(_fold(key, 2), x))

    def halve(level, carry):
        key, position, (left, right) = carry
        width = 0.5**level
        middle = (left + right) / 2 + jnp.sqrt(width / 4) * normal(_fold(key, 3), x)
        upper = position >= 0.5
        # The position within the half is exact in floating point, so every path takes the same turns.
        position = jnp.where(upper, 2 * position - 1, 2 * position)
        ends = (jnp.where(upper, middle, left), jnp.where(upper, right, middle))
        return _fold(key, upper.astype(jnp.int32)), position, ends

    key, position, (left, right) = jax.lax.fori_loop(0, depth, halve, (key, time, ends))
    bridge = jnp.sqrt(jnp.maximum(position * (1 - position), 0.0) * 0.5**depth)
    return left + position * (right - left) + bridge * normal(_fold(key, 4), x)


def brownian(
    key: jax.Array, x: Array, levels: Level, *, inner: Level | None = None, depth: int = 22
) -> Callable[[Array, int], Array]:
    """`f(i, j)` for `sample(..., noise=f)`: the unit noise of step i is the increment of one Brownian path over it.

    The path runs in `f = sigma / (alpha + sigma)`, the time of rectified flow, which is finite from pure noise to data
    and close to s = sigma / alpha where that is small (k-diffusion's BrownianTreeNoiseSampler runs in s). It depends on
    the key alone: one key draws the same path on grids of 10 and of 1000 steps, the noise of a coarse step is the
    weighted sum of that of the fine ones, and samples converge path by path as steps shrink. `euler_maruyama` steps by
    exactly these increments; solvers with another kernel agree with the path in the limit.

    A tree of `depth` levels is walked at both ends of the step, so a draw costs about `2 depth` normal draws and no
    memory. Increments over steps shorter than `2^-depth` are not resolved.

    Args:
      key: one typed key, or one per sample.
      x: of the shape and dtype of the state, [B, ...].
      levels: the grid that will be sampled.
      inner: for solvers with a second draw (`sde_dpmpp`): the levels where draw 1 ends, fields [n], such as
        `inner_levels(schedule, levels)`.
      depth: of the tree.

    Raises:
      ValueError: for a draw other than 0, or 1 with `inner`.
    """
    xp = namespace(*levels)
    dtype = jnp.asarray(x).dtype
    shape = jax.ShapeDtypeStruct(jnp.shape(x), dtype)

    def time(level):
        return jnp.asarray(level.sigma / (level.alpha + level.sigma), jnp.promote_types(dtype, jnp.float32))

    grid = time(levels)
    stops = [grid[1:]] if inner is None else [grid[1:], time(Level(*(xp.asarray(a) for a in inner)))]

    def draw(i, j):
        if j not in range(len(stops)):
            raise ValueError(
                f"brownian: draw {j} of a step has no end on the path; known: {list(range(len(stops)))}. For solvers "
                "with an inner level pass inner=inner_levels(schedule, levels)"
            )
        start, stop = grid[i], stops[j][i]
        increment = _path(key, start, shape, depth) - _path(key, stop, shape, depth)
        length = start - stop
        return increment / jnp.sqrt(jnp.where(length > 0, length, 1.0)).astype(dtype)

    return draw
