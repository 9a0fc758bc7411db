"""A learned log-variance of the loss, one number per noise level."""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Level

# Log-SNR at which the features stop moving: it is infinite at the ends of most schedules.
RANGE = 30.0


class Uncertainty(NamedTuple):
    """A learned function of the noise level.

    Attributes:
      init: `(key) -> params`, all zero.
      apply: `(params, level) -> u [B]`.
    """

    init: Callable
    apply: Callable[[dict, Level], Array]


def uncertainty(features: int) -> Uncertainty:
    """`u(level)`, linear in `features` Fourier features of `c_noise = -logsnr / 8` (EDM's `log(sigma) / 4`).

    Karras et al. 2024, arXiv:2312.02696, section 2.2, appendix B.2. It departs from the paper in that frequencies and
    phases are fixed, the quantiles of their distributions, so that they are no state of a run; and in plain weights
    that start at zero, so that training starts with the loss as it is.
    """
    rank = np.arange(features)
    frequency = np.float32([2 * np.pi * NormalDist().inv_cdf(p) for p in (rank + 0.5) / features])
    phase = 2 * np.pi * ((rank * (5**0.5 - 1) / 2) % 1)

    def init(key):
        return {"weight": jnp.zeros(features), "bias": jnp.zeros(())}

    def apply(params, level):
        c_noise = -jnp.clip(level.logsnr, -RANGE, RANGE) / 8
        waves = np.sqrt(2 / features) * jnp.cos(c_noise[:, None] * frequency + phase)
        return waves @ params["weight"] + params["bias"]

    return Uncertainty(init, apply)


def weighed(losses: Array, u: Array) -> Array:
    """`losses / exp(u) + u`, [B]: lowest where u is the log of the expected loss (arXiv:2312.02696, Eq. 14)."""
    return losses * jnp.exp(-u) + u
