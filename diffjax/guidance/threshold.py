"""Predictions of x0 kept in the data's range."""

from __future__ import annotations

import math

import jax.numpy as jnp

from diffjax.core.types import Denoiser, expand
from diffjax.guidance.blend import like, move


def clip_x0(denoise: Denoiser, lo: float = -1.0, hi: float = 1.0, *, keep_eps: bool = False) -> Denoiser:
    """Clips the prediction of x0 to [lo, hi] (Ho et al. 2020, arXiv:2006.11239, released code).

    `eps` changes so that both halves add up to the same `x`, or with `keep_eps` is left as the network gave it
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
        return move(prediction, x0 - prediction.x0, level)._replace(x0=x0)

    return like(clipped, denoise)


def dynamic_threshold(
    denoise: Denoiser, p: float = 0.995, *, limit: float = 1.0, s_max: float = math.inf, keep_eps: bool = False
) -> Denoiser:
    """Dynamic thresholding of x0, per sample (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

    With s the p-quantile of |x0|, but at least `limit`: x0 is clipped to [-s, s] and divided by `s / limit`. A sample
    inside the range comes back unchanged, one outside fills [-limit, limit]. `eps` as in `clip_x0`.

    Args:
      denoise: usually guided strongly.
      p: quantile of |x0| that is let through, in (0, 1]; 1 only scales, nothing saturates.
      limit: the data's range is [-limit, limit].
      s_max: largest s; `limit` makes it static clipping (diffusers' `sample_max_value`, whose default does that).
      keep_eps: leave eps as the network gave it.

    Raises:
      ValueError: for p outside (0, 1], or unless 0 < limit <= s_max.
    """
    if not 0 < p <= 1:
        raise ValueError(f"dynamic_threshold: p is a quantile in (0, 1], such as 0.995, got {p}")
    if not 0 < limit <= s_max:
        raise ValueError(f"dynamic_threshold: expected 0 < limit <= s_max, got limit {limit} and s_max {s_max}")

    def thresholded(x, level):
        prediction = denoise(x, level)
        wide = prediction.x0.astype(jnp.promote_types(prediction.x0.dtype, jnp.float32))
        s = jnp.quantile(jnp.abs(wide).reshape(len(wide), -1), p, axis=1)
        s = expand(jnp.clip(s, limit, s_max), wide)
        x0 = (jnp.clip(wide, -s, s) * (limit / s)).astype(prediction.x0.dtype)
        if keep_eps:
            return prediction._replace(x0=x0)
        return move(prediction, x0 - prediction.x0, level)._replace(x0=x0)

    return like(thresholded, denoise)
