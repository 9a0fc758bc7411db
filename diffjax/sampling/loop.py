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


def check_grid(levels: Level, *, ascending: bool = False) -> tuple[Level, bool]:
    """The grid (float64 numpy if it is concrete) and whether a step of it may have to be skipped.

    Args:
      levels: fields [n + 1].
      ascending: whether the noise may grow along the grid.

    Raises:
      ValueError: if the shapes differ, there is no step, a value is not a number, or the noise grows along the grid.
    """
    if not isinstance(levels, Level):
        raise ValueError(
            f"levels: expected a Level, from a spacing such as karras(VP(), 20), got {type(levels).__name__}"
        )
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
    if not ascending and np.any(np.diff(noise) > 0):
        i = int(np.argmax(np.diff(noise) > 0))
        raise ValueError(
            f"levels: sigma / alpha must not grow along the grid, but it does from step {i} to {i + 1} "
            f"({levels.s[i]:.6g} to {levels.s[i + 1]:.6g}); grids run from noise to data. To go the other way, from "
            "data to noise, use encode(...) or an inverse(...) solver"
        )
    # Levels that differ in t alone hold the same state: a step between them is skipped.
    still = (np.diff(levels.alpha) == 0) & (np.diff(levels.sigma) == 0)
    return levels, bool(np.any(still))


def _is_level(a) -> bool:
    return isinstance(a, Level)


def _check_grids(levels, x, ascending: bool):
    """`check_grid` of every grid of a state: one for each component of `x`, all with the same number of steps."""
    if _is_level(levels) and not isinstance(x, (jax.Array, np.ndarray)):
        levels = jax.tree.map(lambda _: levels, x)
    if jax.tree.structure(levels, is_leaf=_is_level) != jax.tree.structure(x):
        given, state = jax.tree.structure(levels, is_leaf=_is_level), jax.tree.structure(x)
        raise ValueError(f"levels: expected one grid for each array of x, {state}; got {given}")
    checked = jax.tree.map(partial(check_grid, ascending=ascending), levels, is_leaf=_is_level)
    pairs = jax.tree.leaves(checked, is_leaf=lambda a: isinstance(a, tuple) and not _is_level(a))
    lengths = {len(grid.t) - 1 for grid, _ in pairs}
    if len(lengths) > 1:
        raise ValueError(
            f"levels: every component needs the same number of steps, got {sorted(lengths)}; pad the "
            "shorter grids with their last level"
        )
    grids = jax.tree.unflatten(jax.tree.structure(levels, is_leaf=_is_level), [grid for grid, _ in pairs])
    return grids, all(skips for _, skips in pairs), lengths.pop()


def _no_key(j: int) -> Array:
    raise ValueError("this solver draws noise: pass sample(..., key=...) or sample(..., noise=f)")


class _Options(NamedTuple):
    """What the step of a loop is compiled with."""

    solver: Solver
    denoise: Denoiser
    noise: Callable | None
    trace: Callable | None
    skips: bool
    check_finite: bool


def _take_step(options: _Options, key, carry, row):
    """One step of the loop: `(x, memory, bad), (index, level, next, coef) -> (x, memory, bad), traced`.

    `bad` is the first step that was not finite, or -1.
    """
    solver, denoise, noise, trace, skips, check_finite = options
    index, level, following, coef = row

    def draw(j):
        return _draw(key, index, j, carry[0])

    if noise is not None:
        draw = partial(noise, index)
    elif key is None:
        draw = _no_key

    def take(carry):
        x, memory, bad = carry
        x_next, memory, prediction = solver.step(
            partial(_call, denoise), x, memory, Step(index, level, following, coef, draw)
        )
        if check_finite:
            fine = [jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves((x_next, prediction))]
            bad = jnp.where((bad < 0) & ~jnp.stack(fine).all(), index, bad)
        info = StepInfo(index, level, following, x, x_next, prediction)
        return (x_next, memory, bad), None if trace is None else trace(info)

    if not skips:
        return take(carry)
    moves = [
        (a.alpha != b.alpha) | (a.sigma != b.sigma)
        for a, b in zip(*(jax.tree.leaves(at, is_leaf=_is_level) for at in (level, following)), strict=True)
    ]

    def skip(carry):
        x = carry[0]
        nothing = jax.tree.map(lambda _, a: Prediction(a, jnp.zeros_like(a)), level, x, is_leaf=_is_level)
        info = StepInfo(index, level, following, x, x, nothing)
        return carry, None if trace is None else trace(info)

    return jax.lax.cond(jnp.stack(moves).any(), take, skip, carry)


def _call(denoise, x, *levels):
    """`denoise(x, ...)`, refused if it is a network rather than a denoiser."""
    prediction = denoise(x, *levels)
    if isinstance(prediction, (jax.Array, np.ndarray)):
        raise TypeError(
            f"the denoiser returned an array {prediction.shape} where a Prediction(x0, eps) is needed; a network is to "
            "be wrapped: denoiser(f, head)"
        )
    return prediction


def _check_arguments(solver, denoise, key, loop: str) -> None:
    """Refuses what is not a solver, a denoiser, a typed key or a loop."""
    if not isinstance(solver, Solver):
        name = getattr(solver, "__name__", None)
        cure = f"call it, {name}()" if callable(solver) and name else "make one, such as heun()"
        raise TypeError(f"solver: expected a Solver, got {type(solver).__name__} {name or repr(solver)[:40]}; {cure}")
    if not callable(denoise):
        raise TypeError(f"denoise: expected a function (x, level) -> Prediction, got {type(denoise).__name__}")
    if key is not None and not jnp.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key):
        raise TypeError("key: expected a typed key, jax.random.key(seed) (not a number, not jax.random.PRNGKey)")
    if loop not in LOOPS:
        raise ValueError(f"loop: expected one of {', '.join(LOOPS)}, got {loop!r}")


def _fold(key, data):
    """`fold_in` for one key or an array of them."""
    return jax.random.fold_in(key, data) if key.ndim == 0 else jax.vmap(lambda k: jax.random.fold_in(k, data))(key)


def _draw(key, index, j, x):
    """Draw `j` of step `index`: unit noise for every floating array of the state, each from a key of its own."""
    key = _fold(_fold(key, index), j)
    if isinstance(x, jax.Array):
        return normal(key, x)
    leaves, structure = jax.tree.flatten(x)
    keys = [_fold(key, i) for i in range(len(leaves))]
    floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    return structure.unflatten([normal(k, a) if floating(a) else k for k, a in zip(keys, leaves, strict=True)])


_host_step = jax.jit(_take_step, static_argnums=0)


def _report(bad, levels):
    """Raises if a step of the loop was not finite; runs on the host."""
    if bad >= 0:
        at = "; ".join(
            f"t = {level.t[bad]:.6g}, alpha = {level.alpha[bad]:.6g}, sigma = {level.sigma[bad]:.6g}"
            for level in jax.tree.leaves(levels, is_leaf=_is_level)
        )
        raise FloatingPointError(
            f"the sampler met a value that is not finite, first at step {int(bad)} (from 0), where {at}; look at the "
            "network there, or use more steps, less guidance or another solver"
        )


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
    check_finite: bool = False,
) -> Array | tuple[Array, Any]:
    """Carries `x` from `levels[0]` to `levels[-1]`; returns the state there, [B, ...], in x's dtype or float32.

    Jit it, vmap it, differentiate through it. Steps between two equal levels are skipped at run time, so a grid padded
    with its last level samples with fewer steps and without a new compilation.

    Args:
      solver: such as `heun()`.
      denoise: any `(x, level) -> Prediction`.
      x: the state at `levels[0]` [B, ...], for instance from `prior`. A pytree of arrays for a `product` solver.
      levels: fields [n + 1], noise first. One grid for each array of `x`, or one for all.
      key: for solvers that draw noise; one typed key, or a [B] array of keys: noise that does not depend on the batch.
      noise: `(index, j) -> [B, ...]`, unit noise for draw `j` of step `index`, in place of the key; traceable.
      trace: `StepInfo -> pytree`, stacked over the steps; keep it small, it is what a trajectory costs in memory. Of
        a skipped step it sees `x0 = x` and `eps = 0`.
      loop: "scan" (one `lax.scan`), "unroll" (n copies of the step in one program: much faster gradients of
        convolutions on CPU) or "host" (one jitted step called from Python; not inside jit). The results are the same.
      progress: wraps the iterable of steps of the host loop, such as `tqdm.tqdm`.
      check_finite: reports the first step at which a prediction or the state was infinite or not a number, once at the
        end of the loop (host loop: at once); jitted programs raise it as a `JaxRuntimeError` with the same text.

    Returns:
      The samples, or `(samples, traced)` if `trace` is given.

    Raises:
      ValueError: for a grid that is malformed or runs from data to noise, an unknown loop, noise without a key, or a
        grid on which the denoiser is undefined (concrete grids only: a traced one cannot be looked at).
      TypeError: for something that is no solver, a network in place of a denoiser, or a key that is not typed.
      FloatingPointError: with `check_finite`.
    """
    _check_arguments(solver, denoise, key, loop)
    x = jax.tree.map(_at_least_float32, x)
    levels, skips, n = _check_grids(levels, x, solver.ascending)
    at = lambda index: jax.tree.map(lambda level: level.at(index), levels, is_leaf=_is_level)
    if hasattr(denoise, "check") and all(isinstance(a, np.ndarray) for a in jax.tree.leaves(levels)):
        # Networks are called where a step begins, or ends on the way up, and never at sigma = 0.
        called = slice(None) if solver.ascending else slice(None, -1)
        noisy = lambda level: level.at(called).at(level.sigma[called] > 0)
        denoise.check(jax.tree.map(noisy, levels, is_leaf=_is_level))
    memory, coef = solver.init(x, levels)
    dtype = jnp.result_type(
        jnp.float32, *(a.dtype for a in jax.tree.leaves(x) if jnp.issubdtype(a.dtype, jnp.floating))
    )
    cast = lambda a: jnp.asarray(a, dtype if jnp.issubdtype(jnp.result_type(a), jnp.floating) else None)
    rows = jax.tree.map(cast, (np.arange(n), at(slice(None, -1)), at(slice(1, None)), coef))
    carry = (x, memory, jnp.asarray(-1) if check_finite else None)
    options = _Options(solver, denoise, noise, trace, skips, check_finite)

    if loop == "host":
        if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(x)):
            raise ValueError('loop="host" steps from Python and cannot run inside jit; use "scan" or "unroll"')
        step = partial(_host_step, options, key)
    else:
        step = partial(_take_step, options, key)
    if loop == "scan":
        carry, traced = jax.lax.scan(step, carry, rows)
    else:
        traced = []
        for i in progress(range(n)) if loop == "host" else range(n):
            carry, out = step(carry, jax.tree.map(lambda a, i=i: a[i], rows))
            traced.append(out)
            if check_finite and loop == "host":
                _report(np.asarray(carry[2]), levels)
        traced = jax.tree.map(lambda *a: jnp.stack(a), *traced)
    x, _, bad = carry
    if check_finite and loop != "host":
        jax.debug.callback(_report, bad, levels)
    return x if trace is None else (x, traced)


def _at_least_float32(a) -> jax.Array:
    """`a` as a jax array, half precision raised to float32, integers (tokens) as they are."""
    a = jnp.asarray(a)
    return a.astype(jnp.promote_types(a.dtype, jnp.float32)) if jnp.issubdtype(a.dtype, jnp.floating) else a
