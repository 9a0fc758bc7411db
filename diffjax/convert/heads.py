"""What a network trained with diffusers returns, in the coordinates of each family of its schedulers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from diffjax.core.heads import EPS
from diffjax.core.types import Array, Head, Level, Prediction, expand, namespace

Limit = Callable[[Array], Array] | None


def _unit(level: Level) -> Array:
    return namespace(level.alpha).ones_like(level.alpha)


def unit_input(level: Level) -> Array:
    """`1 / sqrt(alpha^2 + sigma^2)`: `scale_model_input` of the schedulers whose state is `x0 + sigma eps`."""
    return 1 / namespace(level.alpha).sqrt(level.alpha**2 + level.sigma**2)


def _anywhere(levels: Level) -> None:
    """Defined on every grid."""


def _needs_noise(levels: Level) -> None:
    if np.any(np.asarray(levels.sigma) == 0):
        raise ValueError(
            "prediction_type='sample' gives no noise at sigma = 0, where this scheduler calls the network; "
            "diffusers returns NaN there. Use epsilon or v_prediction, or set_alpha_to_one=False"
        )


def limit(c: SimpleNamespace) -> Limit:
    """What is done to x0: dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3), clipping or None.

    Thresholding comes first, as in diffusers: with it on, `clip_sample` is not looked at.
    """
    if getattr(c, "thresholding", False):
        return lambda x0: _threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
    if getattr(c, "clip_sample", False):
        return lambda x0: jnp.clip(x0, -c.clip_sample_range, c.clip_sample_range)
    return None


def _threshold(x0: Array, ratio: float, most: float) -> Array:
    """Clips each sample to its own quantile `s` of |x0|, between 1 and `most`, and divides by it."""
    s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), ratio, axis=1)
    s = expand(jnp.minimum(jnp.maximum(s, 1.0), most).astype(x0.dtype), x0)
    return jnp.clip(x0, -s, s) / s


def _epsilon(out, x, a, s):
    return (x - s * out) / a, out


def _sample(out, x, a, s):
    return out, (x - a * out) / s


def _velocity(out, x, a, s):
    return a * x - s * out, s * x + a * out


def _karras_velocity(out, x, a, s):
    # The network's v is that of the variance-preserving sample x / sqrt(1 + sigma^2).
    norm = a**2 + s**2
    q = jnp.sqrt(norm)
    return out * (-s / q) + a * x / norm, s * x / norm + a * out / q


def _flow(out, x, a, s):
    x0 = x - s * out
    return x0, (x - a * x0) / s


def _flow_on_vp(out, x, a, s):
    # On a variance-preserving grid diffusers reads a velocity with sigma / alpha in place of sigma.
    x0 = x - s / a * out
    return x0, (x - a * x0) / (s / a)


def _straight(out, x, a, s):
    return x - s * out, x + a * out


def _to_data(out, x, a, s):
    return x + s * out, x - a * out


SPLITS = {
    "epsilon": _epsilon,
    "sample": _sample,
    "original_sample": _sample,
    "v_prediction": _velocity,
    "flow_prediction": _flow,
    "flow_on_vp": _flow_on_vp,
    "karras_velocity": _karras_velocity,
    "straight": _straight,
    "to_data": _to_data,
}

_TARGETS = {
    "epsilon": lambda x0, eps, a, s: eps,
    "sample": lambda x0, eps, a, s: x0,
    "original_sample": lambda x0, eps, a, s: x0,
    "v_prediction": lambda x0, eps, a, s: a * eps - s * x0,
    "flow_prediction": lambda x0, eps, a, s: eps - x0,
    "flow_on_vp": lambda x0, eps, a, s: (a * x0 + s * eps - x0) * a / s,
    "karras_velocity": lambda x0, eps, a, s: (a * eps - s * x0) / jnp.sqrt(a**2 + s**2),
    "straight": lambda x0, eps, a, s: eps - x0,
    "to_data": lambda x0, eps, a, s: x0 - eps,
}


def network(
    kind: str,
    *,
    change: Limit = None,
    keep_eps: bool = False,
    scale_in: Callable[[Level], Array] = _unit,
    needs_eps: bool = True,
    finite: bool = False,
    through: str | None = None,
) -> Head:
    """The head of a `prediction_type`.

    Args:
      kind: a key of `SPLITS`.
      change: applied to x0, see `limit`.
      keep_eps: leaves eps as the network gave it where x0 is changed; else eps is what adds up to x.
      scale_in: factor of x at the network's input.
      needs_eps: whether the scheduler uses eps, and grids with sigma = 0 are refused where it cannot be had.
      finite: whether alpha = 0 is no obstacle: `change` makes even an infinite x0 finite, or no step begins there.
      through: "x0" or "eps", the half that the other is computed from whatever the network returns. On flow grids a
        v-prediction's own halves do not add up to x.
    """
    split_halves, target = SPLITS[kind], _TARGETS[kind]

    def split(out, x, level):
        a, s = expand(level.alpha, x), expand(level.sigma, x)
        x0, eps = split_halves(out, x, a, s)
        if through == "eps" and change is not None:
            x0 = (x - s * eps) / a
        if change is None and through != "x0":
            return Prediction(x0, eps)
        x0 = x0 if change is None else change(x0)
        return Prediction(x0, eps if keep_eps else (x - a * x0) / (s / a if kind == "flow_on_vp" else s))

    checks = {"epsilon": _anywhere if finite else EPS.check, "sample": _needs_noise if needs_eps else _anywhere}
    return Head(
        lambda x0, eps, level: target(x0, eps, expand(level.alpha, x0), expand(level.sigma, x0)),
        split,
        scale_in,
        checks.get(kind, _anywhere),
    )


def clips(c: SimpleNamespace) -> bool:
    """Whether `limit(c)` clips, which makes an infinite x0 finite."""
    return getattr(c, "clip_sample", False) and not getattr(c, "thresholding", False)


def karras_network(c: SimpleNamespace, *, change: Limit = None) -> Head:
    """The head of schedulers whose state is `x0 + sigma eps` and whose network sees it at unit variance."""
    kind = "karras_velocity" if c.prediction_type == "v_prediction" else c.prediction_type
    return network(kind, change=change, scale_in=unit_input)


def edm_network(c: SimpleNamespace, *, change: Limit = None) -> Head:
    """EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, Table 1); `v_prediction` is its negative."""
    d, sign = c.sigma_data, -1.0 if c.prediction_type == "v_prediction" else 1.0
    return skipping(
        lambda s: d**2 / (s**2 + d**2),
        lambda s: sign * s * d / (s**2 + d**2) ** 0.5,
        d,
        change,
    )


def skipping(c_skip: Callable, c_out: Callable, d: float, change: Limit = None) -> Head:
    """The head `x0 = c_skip(sigma) x + c_out(sigma) out` at alpha = 1, input over `sqrt(sigma^2 + d^2)`."""

    def split(out, x, level):
        s = expand(level.sigma, x)
        x0 = c_skip(s) * x + c_out(s) * out
        x0 = x0 if change is None else change(x0)
        return Prediction(x0, (x - x0) / s)

    def target(x0, eps, level):
        s = expand(level.sigma, x0)
        return (x0 - c_skip(s) * (x0 + s * eps)) / c_out(s)

    return Head(target, split, lambda level: 1 / (level.sigma**2 + d**2) ** 0.5, _anywhere)
