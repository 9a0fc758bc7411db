"""Classifier-free guidance, where it applies, and clipping: functions from a denoiser to a denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Denoiser, Level, Prediction, expand


def _like(denoise: Denoiser, *sources: Denoiser) -> Denoiser:
    """`denoise` with a `check` that runs the checks of all its sources."""
    checks = [source.check for source in sources if hasattr(source, "check")]

    def check(levels):
        for each in checks:
            each(levels)

    denoise.check = check
    return denoise


def cfg(denoise_pair: Denoiser, scale: float | Array | Callable[[Level], Array]) -> Denoiser:
    """Classifier-free guidance with one batched call (Ho and Salimans 2022, arXiv:2207.12598, Eq. 6).

    `cond + (scale - 1) (cond - uncond)` for both halves: scale 1 is the conditional prediction bit for bit, scale 0 the
    unconditional one. The paper's w is `scale - 1`.

    Args:
      denoise_pair: called with [2B, ...], the batch twice; its first half must be conditional, its second
        unconditional. Close over `concatenate([labels, null])` for that.
      scale: a number, an array [B], or a function of the level.
    """

    def denoise(x, level):
        twice = Level(*(jnp.concatenate([a, a]) if jnp.ndim(a) else a for a in level))
        both = denoise_pair(jnp.concatenate([x, x]), twice)
        w = expand(jnp.asarray(scale(level) if callable(scale) else scale, x.dtype), x)

        def guide(half):
            cond, uncond = jnp.split(half, 2)
            return cond + (w - 1) * (cond - uncond)

        return Prediction(guide(both.x0), guide(both.eps))

    return _like(denoise, denoise_pair)


def interval(guided: Denoiser, plain: Denoiser, s_lo: float, s_hi: float) -> Denoiser:
    """`guided` where `s_lo < sigma / alpha <= s_hi`, else `plain` (Kynkaanniemi et al. 2024, arXiv:2404.07724, Eq. 4).

    A run-time branch: outside the interval only `plain` is computed. Needs one level for the whole batch.

    Raises:
      ValueError: unless `0 <= s_lo < s_hi`, or if the level differs from sample to sample.
    """
    if not 0 <= s_lo < s_hi:
        raise ValueError(f"interval: expected 0 <= s_lo < s_hi, got {s_lo} and {s_hi}")

    def denoise(x, level):
        if jnp.ndim(level.sigma):
            raise ValueError("interval guidance needs one level for the batch (scalar fields), got one per sample")
        inside = level.sigma > s_lo * level.alpha
        if s_hi < math.inf:  # inf * alpha is not a number at alpha = 0
            inside &= level.sigma <= s_hi * level.alpha
        halves = lambda f: lambda x: tuple(f(x, level)[:2])
        return Prediction(*jax.lax.cond(inside, halves(guided), halves(plain), x))

    return _like(denoise, guided, plain)


def clip_x0(denoise: Denoiser, lo: float = -1.0, hi: float = 1.0, *, keep_eps: bool = False) -> Denoiser:
    """Clips the prediction of x0 to [lo, hi] (Ho et al. 2020, arXiv:2006.11239, released code).

    `eps` is recomputed so that both halves still add up to `x`, or with `keep_eps` left as the network gave it
    (diffusers' `clip_sample` without `use_clipped_model_output`).

    Raises:
      ValueError: unless lo < hi.
    """
    if not lo < hi:
        raise ValueError(f"clip_x0: expected lo < hi, got {lo} and {hi}")

    def clipped(x, level):
        prediction = denoise(x, level)
        x0 = jnp.clip(prediction.x0, lo, hi)
        if keep_eps:
            return prediction._replace(x0=x0)
        eps = (x - expand(level.alpha, x) * x0) / expand(level.sigma, x)
        return prediction._replace(x0=x0, eps=eps)

    return _like(clipped, denoise)
