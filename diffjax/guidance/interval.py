"""Guidance in a range of noise levels only."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Denoiser, Level


def _check(name: str, s_lo: float, s_hi: float) -> None:
    if not 0 <= s_lo < s_hi:
        raise ValueError(f"{name}: expected 0 <= s_lo < s_hi, got {s_lo} and {s_hi}")


def _inside(level: Level, s_lo: float, s_hi: float) -> Array:
    inside = level.sigma > s_lo * level.alpha
    if s_hi < math.inf:  # inf * alpha is not a number at alpha = 0
        inside &= level.sigma <= s_hi * level.alpha
    return inside


def interval(guided: Denoiser, plain: Denoiser, s_lo: float, s_hi: float) -> Denoiser:
    """`guided` where `s_lo < sigma / alpha <= s_hi`, else `plain` (Kynkaanniemi et al. 2024, arXiv:2404.07724, Eq. 4).

    Outside the interval only `plain` is computed: a run-time branch under jit and in `lax.scan`, none at all where the
    level is concrete. Needs one level for the whole batch. `split_interval` has no branch in the program.

    Raises:
      ValueError: unless `0 <= s_lo < s_hi`, or if the level differs from sample to sample.
    """
    _check("interval", s_lo, s_hi)

    def denoise(x, level):
        if jnp.ndim(level.sigma):
            raise ValueError("interval guidance needs one level for the batch (scalar fields), got one per sample")
        inside = _inside(level, s_lo, s_hi)
        if not isinstance(inside, jax.core.Tracer):
            return (guided if inside else plain)(x, level)
        return jax.lax.cond(inside, lambda x: guided(x, level), lambda x: plain(x, level), x)

    def check(levels):
        # Each is called where the interval says, so it has to be defined there only.
        inside = _inside(levels, s_lo, s_hi)
        for each, where in ((guided, inside), (plain, ~inside)):
            if hasattr(each, "check") and np.any(where):
                each.check(levels.at(where))

    denoise.check = check
    return denoise


def split_interval(levels: Level, s_lo: float, s_hi: float) -> list[tuple[bool, Level]]:
    """The grid cut where a step enters or leaves the interval: `[(inside, levels of these steps), ...]`, noise first.

    Neighbours share a level. Sample the pieces one after the other, each with its own denoiser, and no program holds a
    branch or the network that it does not use. A step belongs to where it begins. Solvers with memory start afresh on
    each piece, at order 1; those with a call at the end of the step make it with the denoiser of its beginning.

    Raises:
      ValueError: unless `0 <= s_lo < s_hi`, or for a grid that is traced.
    """
    _check("split_interval", s_lo, s_hi)
    if any(isinstance(field, jax.core.Tracer) for field in levels):
        raise ValueError("split_interval cuts a concrete grid, got a traced one; make it outside jit, or use interval")
    levels = Level(*(np.asarray(field, np.float64) for field in levels))
    inside = _inside(levels.at(slice(None, -1)), s_lo, s_hi)
    cuts = [0, *(np.flatnonzero(np.diff(inside)) + 1), len(inside)]
    return [(bool(inside[a]), levels.at(slice(a, b + 1))) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
