"""Classifier-free guidance and its kin: one batched call for the conditional and the unconditional prediction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import jax.numpy as jnp

from diffjax.core.heads import V
from diffjax.core.types import Array, Denoiser, Head, Level, Prediction, namespace
from diffjax.guidance.blend import Scale, call, dot, extrapolate, like, move, scale_at, split


def cfg(denoise_pair: Denoiser, scale: Scale) -> Denoiser:
    """Classifier-free guidance with one batched call (Ho and Salimans 2022, arXiv:2207.12598, Eq. 6).

    `cond + (scale - 1) (cond - uncond)` for both halves: scale 1 is the conditional prediction bit for bit, scale 0 the
    unconditional one. The paper's w is `scale - 1`. A negative prompt is a pair whose second half is the negative
    condition. `aux` is that of the conditional half.

    Args:
      denoise_pair: called with [2B, ...], the batch twice; its first half must be conditional, its second
        unconditional. Close over `concatenate([labels, null])` for that, or `join` two denoisers.
      scale: a number, an array [B], or a function of the level.

    Raises:
      ValueError: when called, for a scale of another shape or a pair that does not return [2B, ...].
    """

    def denoise(x, level):
        cond, uncond = split(call(denoise_pair, x, level, 2), 2)
        return extrapolate(cond, (scale_at("cfg", scale, x, level) - 1, uncond))

    return like(denoise, denoise_pair)


def compose(denoise_many: Denoiser, scales: Sequence[Scale]) -> Denoiser:
    """Several conditions at once: `null + sum_k w_k (cond_k - null)` (Liu et al. 2022, arXiv:2206.01714, section 5).

    The score of `p(x) prod_k (p(x | c_k) / p(x))^w_k` at each level: AND with positive weights (Eq. 11), NOT with
    negative ones (Eq. 13). With all weights 1 it is the exact conditional score if the conditions are independent given
    x and without it, and only then.

    Args:
      denoise_many: called with [(K + 1) B, ...]; the conditions in order, the null condition last.
      scales: K weights, each a number, an array [B] or a function of the level.

    Raises:
      ValueError: without a weight, or as `cfg`.
    """
    scales = tuple(scales)
    if not scales:
        raise ValueError("compose: expected one scale per condition, got none")

    def denoise(x, level):
        n = len(scales) + 1
        *conds, null = split(call(denoise_many, x, level, n), n)
        weights = (scale_at("compose", scale, x, level) for scale in scales)
        out = extrapolate(null, *((-w, cond) for w, cond in zip(weights, conds, strict=True)))
        return out._replace(aux=conds[0].aux)

    return like(denoise, denoise_many)


def negative(denoise_three: Denoiser, scale: Scale, away: Scale) -> Denoiser:
    """Three-way negative prompt: `null + scale (cond - null) - away (neg - null)` (arXiv:2206.01714, Eq. 13).

    Two-way negative prompts, where the negative condition takes the place of the null, are `cfg`.

    Args:
      denoise_three: called with [3B, ...]: condition, negative condition, null.
      scale: towards the condition, as in `cfg`.
      away: from the negative condition, >= 0; 0 is `cfg`.

    Raises:
      ValueError: as `compose`.
    """
    flipped = (lambda level: -away(level)) if callable(away) else -away
    return compose(denoise_three, (scale, flipped))


def cfg_pp(denoise_pair: Denoiser, lam: Scale) -> Denoiser:
    """CFG++: guided x0 with the unconditional eps (Chung et al. 2024, arXiv:2406.08070, Algorithm 2).

    `x0 = uncond.x0 + lam (cond.x0 - uncond.x0)`, `eps = uncond.eps`: the halves no longer add up to `x`, on purpose.
    Meant for solvers that put both halves together again, `euler` and `ddim`; there a step from s to s' equals `cfg` at
    the scale `lam / (1 - s' / s)` with `s = sigma / alpha`. Solvers that read x0 alone (DPM-Solver++) see `cfg` at the
    scale `lam` and those that read eps alone no guidance.

    Args:
      denoise_pair: as in `cfg`.
      lam: the paper's lambda, in [0, 1]; a number, an array [B], or a function of the level.

    Raises:
      ValueError: for a number outside [0, 1], or as `cfg`.
    """
    if isinstance(lam, Real) and not 0 <= lam <= 1:
        raise ValueError(f"cfg_pp: lambda interpolates from 0 to 1, got {lam}; CFG's scales above 1 belong to cfg")

    def denoise(x, level):
        cond, uncond = split(call(denoise_pair, x, level, 2), 2)
        x0 = uncond.x0 + scale_at("cfg_pp", lam, x, level) * (cond.x0 - uncond.x0)
        return Prediction(x0, uncond.eps, cond.aux)

    return like(denoise, denoise_pair)


def _spread(a: Array) -> Array:
    """Root of the sum of squares about the mean, per sample; its gradient is 0, not infinite, at zero spread."""
    centred = a - jnp.mean(a, axis=tuple(range(1, a.ndim)), keepdims=True)
    total = dot(centred, centred)
    return jnp.where(total > 0, jnp.sqrt(jnp.where(total > 0, total, 1.0)), 0.0)


def rescale(
    denoise_pair: Denoiser, guide: Callable[[Denoiser], Denoiser], phi: float = 0.7, *, head: Head = V
) -> Denoiser:
    """Gives a guided prediction the conditional one's spread (Lin et al. 2023, arXiv:2305.08891, Eq. 14 to 16).

    `guided * (phi std(cond) / std(guided) + 1 - phi)` with the standard deviation over all elements of a sample. The
    pair is called once for both. Which quantity is rescaled matters: the paper's networks predict v.

    Args:
      denoise_pair: as in `cfg`.
      guide: from the pair to the guided denoiser: `lambda pair: cfg(pair, 7.5)`.
      phi: 0 (off) to 1 (the paper recommends 0.7).
      head: the space to rescale in: what the network predicts.

    Raises:
      ValueError: unless 0 <= phi <= 1; when called, for samples of one element.
    """
    if not 0 <= phi <= 1:
        raise ValueError(f"rescale: expected phi from 0 (off) to 1, got {phi}")

    def denoise(x, level):
        if math.prod(x.shape[1:]) < 2:
            raise ValueError(f"rescale: a sample needs at least 2 elements to have a spread, got x of shape {x.shape}")
        both = call(denoise_pair, x, level, 2)
        cond, _ = split(both, 2)
        guided = guide(lambda x, level: both)(x, level)
        target = head.target(guided.x0, guided.eps, level)
        spread, wanted = _spread(target), _spread(head.target(cond.x0, cond.eps, level))
        factor = jnp.where(spread > 0, wanted / jnp.where(spread > 0, spread, 1.0), 1.0)
        return move(guided, (phi * (factor - 1) * target).astype(x.dtype), level, head)

    return like(denoise, denoise_pair, head)


def rising(scale: float, shape: str = "cosine", *, t_max: float = 1.0) -> Callable[[Level], Array]:
    """A guidance scale that grows from noise to data (Wang et al. 2024, arXiv:2404.13040), a function of the level.

    `1 + (scale - 1) f(t / t_max)` with `f = 1 + cos(pi u)` or `2 (1 - u)`: the mean of f over time is 1, so the mean
    scale is `scale`. Reads `level.t`, so it needs a schedule whose `t` runs uniformly up to `t_max` (VP, cosine, flow).

    Args:
      scale: the constant scale that it replaces.
      shape: "cosine" or "linear".
      t_max: the time of pure noise.

    Raises:
      ValueError: for another shape or a `t_max` that is not positive.
    """
    if shape not in ("cosine", "linear"):
        raise ValueError(f"rising: unknown shape {shape!r}; known: cosine, linear")
    if not t_max > 0:
        raise ValueError(f"rising: expected t_max > 0, got {t_max}")

    def at(level):
        u = level.t / t_max
        return 1 + (scale - 1) * (1 + namespace(u).cos(math.pi * u) if shape == "cosine" else 2 * (1 - u))

    return at
