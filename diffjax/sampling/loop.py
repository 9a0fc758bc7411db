"""The sampling loop: a solver, a denoiser and a grid in, samples out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Denoiser, Level, Prediction, Solver, Step

LOOPS = ("scan", "unroll", "host")


class StepInfo(NamedTuple):
    """What `trace` sees after each step.

    Attributes:
      index: the step, from 0.
      level: where the step began.
      next: where it ended.
      x: the state before it.
      x_next: the state after it.
      prediction: the solver's estimate of both halves of `x`.
    """

    index: Array | int
    level: Level
    next: Level
    x: Array
    x_next: Array
    prediction: Prediction


def normal(key: jax.Array, x: Array) -> Array:
    """Unit Gaussian noise of the shape and dtype of `x` [B, ...].

    `key` is one typed key, or a [B] array of keys: then each sample's noise depends on its own key alone and is bit for
    bit the same in any batch.

    Raises:
      ValueError: if an array of keys does not have one key per sample.
    """
    if key.ndim == 0:
        return jax.random.normal(key, x.shape, x.dtype)
    if key.shape != x.shape[:1]:
        raise ValueError(f"one key per sample: expected keys of shape {x.shape[:1]}, got {key.shape}")
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], x.dtype))(key)


def prior(key: jax.Array, shape: tuple[int, ...], levels: Level, *, mean: Array = 0.0, std: Array = 0.0) -> Array:
    """The state at `levels[0]`, `N(alpha mean, alpha^2 std^2 + sigma^2)`, shape [B, ...] float32.

    The default is the usual `N(0, sigma^2)`. The mean and std of the data make its first two moments exact where the
    grid starts at alpha > 0.

    Args:
      key: one typed key, or one per sample; not the key given to `sample`.
      shape: of the batch.
      levels: the grid that will be sampled.
      mean: of the data, broadcast against `shape`.
      std: of the data, likewise.
    """
    first = Level(*(jnp.asarray(field[0], jnp.result_type(float)) for field in levels))
    noise = normal(key, jax.ShapeDtypeStruct(shape, jnp.result_type(float)))
    return first.alpha * mean + jnp.sqrt((first.alpha * std) ** 2 + first.sigma**2) * noise


def check_grid(levels: Level) -> tuple[Level, bool]:
    """The grid (float64 numpy if it is concrete) and whether a step of it may have to be skipped.

    Raises:
      ValueError: if the shapes differ, there is no step, a value is not a number, or the noise grows along the grid.
    """
    shapes = {jnp.shape(field) for field in levels}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or shape[0] < 2:
        given = ", ".join(f"{name} {jnp.shape(field)}" for name, field in zip(levels._fields, levels, strict=True))
        raise ValueError(f"levels: a grid of n steps has fields of shape [n + 1], n >= 1; got {given}")
    if any(isinstance(field, jax.core.Tracer) for field in levels):
        return Level(*(jnp.asarray(field) for field in levels)), True
    levels = Level(*(np.asarray(field, np.float64) for field in levels))
    noise = np.arctan2(levels.sigma, levels.alpha)
    if np.any(np.isnan(noise)) or np.any(levels.alpha < 0) or np.any(levels.sigma < 0):
        raise ValueError("levels: alpha and sigma must be numbers >= 0")
    if np.any(np.diff(noise) > 0):
        i = int(np.argmax(np.diff(noise) > 0))
        raise ValueError(
            f"levels: sigma / alpha must not grow along the grid, but it does from step {i} to {i + 1} "
            f"({levels.s[i]:.6g} to {levels.s[i + 1]:.6g}); grids run from noise to data"
        )
    return levels, bool(np.any(np.diff(noise) == 0))


def _no_key(j: int) -> Array:
    raise ValueError("this solver draws noise: pass sample(..., key=...) or sample(..., noise=f)")


def _take_step(solver: Solver, denoise: Denoiser, noise, trace, skips: bool, key, carry, row):
    """One step of the loop: `(x, memory), (index, level, next, coef) -> (x, memory), traced`."""
    index, level, following, coef = row

    def draw(j):
        return normal(_fold(key, index, j), carry[0])

    if noise is not None:
        draw = partial(noise, index)
    elif key is None:
        draw = _no_key

    def take(carry):
        x, memory = carry
        x_next, memory, prediction = solver.step(denoise, x, memory, Step(index, level, following, coef, draw))
        info = StepInfo(index, level, following, x, x_next, prediction)
        return (x_next, memory), None if trace is None else trace(info)

    if not skips:
        return take(carry)
    still = (level.alpha == following.alpha) & (level.sigma == following.sigma)

    def skip(carry):
        x, _ = carry
        info = StepInfo(index, level, following, x, x, Prediction(x, jnp.zeros_like(x)))
        return carry, None if trace is None else trace(info)

    return jax.lax.cond(still, skip, take, carry)


def _fold(key, index, j):
    """The key of draw `j` of step `index`, for one key or an array of them."""
    if key.ndim == 0:
        return jax.random.fold_in(jax.random.fold_in(key, index), j)
    return jax.vmap(lambda k: jax.random.fold_in(jax.random.fold_in(k, index), j))(key)


_host_step = jax.jit(_take_step, static_argnums=(0, 1, 2, 3, 4))


def sample(
    solver: Solver,
    denoise: Denoiser,
    x: Array,
    levels: Level,
    key: jax.Array | None = None,
    *,
    noise: Callable[[Array, int], Array] | None = None,
    trace: Callable[[StepInfo], Any] | None = None,
    loop: str = "scan",
    progress: Callable[[Iterable], Iterable] = iter,
) -> Array | tuple[Array, Any]:
    """Carries `x` from `levels[0]` to `levels[-1]`; returns the state there, [B, ...], in x's dtype or float32.

    Jit it, vmap it, differentiate through it. Steps between two equal levels are skipped at run time, so a grid padded
    with its last level samples with fewer steps and without a new compilation.

    Args:
      solver: such as `heun()`.
      denoise: any `(x, level) -> Prediction`.
      x: the state at `levels[0]` [B, ...], for instance from `prior`.
      levels: fields [n + 1], noise first.
      key: for solvers that draw noise; one typed key, or a [B] array of keys: noise that does not depend on the batch.
      noise: `(index, j) -> [B, ...]`, unit noise for draw `j` of step `index`, in place of the key; traceable.
      trace: `StepInfo -> pytree`, stacked over the steps; keep it small, it is what a trajectory costs in memory. Of
        a skipped step it sees `x0 = x` and `eps = 0`.
      loop: "scan" (one `lax.scan`), "unroll" (n copies of the step in one program: much faster gradients of
        convolutions on CPU) or "host" (one jitted step called from Python; not inside jit). The results are the same.
      progress: wraps the iterable of steps of the host loop, such as `tqdm.tqdm`.

    Returns:
      The samples, or `(samples, traced)` if `trace` is given.

    Raises:
      ValueError: for a grid that is malformed or runs from data to noise, an unknown loop, noise without a key, or a
        grid on which the denoiser is undefined.
    """
    if loop not in LOOPS:
        raise ValueError(f"loop: expected one of {', '.join(LOOPS)}, got {loop!r}")
    levels, skips = check_grid(levels)
    n = levels.t.shape[0] - 1
    if isinstance(levels.t, np.ndarray) and hasattr(denoise, "check"):
        denoise.check(levels.at(slice(None, -1)))
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    memory, coef = solver.init(x, levels)
    cast = lambda a: jnp.asarray(a, x.dtype if jnp.issubdtype(jnp.result_type(a), jnp.floating) else None)
    rows = jax.tree.map(cast, (np.arange(n), levels.at(slice(None, -1)), levels.at(slice(1, None)), coef))

    if loop == "host":
        if isinstance(x, jax.core.Tracer):
            raise ValueError('loop="host" steps from Python and cannot run inside jit; use "scan" or "unroll"')
        step = partial(_host_step, solver, denoise, noise, trace, skips, key)
    else:
        step = partial(_take_step, solver, denoise, noise, trace, skips, key)
    if loop == "scan":
        (x, _), traced = jax.lax.scan(step, (x, memory), rows)
        return x if trace is None else (x, traced)
    carry, traced = (x, memory), []
    for i in progress(range(n)) if loop == "host" else range(n):
        carry, out = step(carry, jax.tree.map(lambda a, i=i: a[i], rows))
        traced.append(out)
    return carry[0] if trace is None else (carry[0], jax.tree.map(lambda *a: jnp.stack(a), *traced))
