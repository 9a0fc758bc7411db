"""Averages of the parameters over the course of training.

Every average is a pair of pure functions; `update` runs inside the jitted training step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Ema(NamedTuple):
    """A running average of the parameters.

    Attributes:
      init: `(params) -> average`: a copy, at least float32, in buffers of its own (so both can be donated).
      update: `(average, params, step) -> average`. `step`, a Python or traced integer, is the number of optimiser steps
        that led to `params`: 1 after the first. Keeps structure, shapes and dtypes of `average`.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, jax.Array | int], Any]


def decay(rate: float, warmup: bool = True) -> Ema:
    """The exponential average `average <- b average + (1 - b) params`, starting from the initial parameters.

    With `warmup`, `b = min(rate, (1 + step) / (10 + step))`, so that a short run forgets its start; else `b = rate`.

    Args:
      rate: weight of the old average in one step, in `[0, 1)`: `0.9999` averages over about 10000 steps.
      warmup: whether `b` grows with the step.

    Raises:
      ValueError: if `rate` is not in `[0, 1)`.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"ema rate {rate!r}: expected 0 <= rate < 1, such as 0.999")

    def weight(step):
        step = jnp.asarray(step, jnp.float32)
        return jnp.maximum(1 - rate, 9 / (10 + step)) if warmup else jnp.float32(1 - rate)

    return _average(weight)


def power(std: float) -> Ema:
    """The power-function average: the parameters at time tau of training have weight proportional to `tau ** gamma`.

    Its width is a fixed fraction of the training so far, and the initial parameters have no weight. The old average
    keeps the weight `(1 - 1/step) ** (gamma + 1)`, so that step i weighs exactly
    `(i ** (gamma + 1) - (i - 1) ** (gamma + 1)) / step ** (gamma + 1)`.

    Karras et al. 2024, arXiv:2312.02696, section 3.1.

    Args:
      std: standard deviation of the averaging profile relative to the length of training; 0.05 and 0.10 are usual.

    Raises:
      ValueError: as `gamma_of`.
    """
    exponent = gamma_of(std) + 1

    def weight(step):
        # The first step takes the parameters whole: log1p(-1) is -inf, expm1(-inf) is -1.
        step = jnp.maximum(jnp.asarray(step, jnp.float32), 1)
        return -jnp.expm1(exponent * jnp.log1p(-1 / step))

    return _average(weight)


def gamma_of(std: float) -> float:
    """The exponent gamma of the power-function average of relative width `std` (arXiv:2312.02696, Algorithm 2).

    Solves `std = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))` on the branch `gamma >= 0`.

    Raises:
      ValueError: if `std` is not in `(0, 1/sqrt(12)]`; the upper end is the plain mean over all steps, gamma = 0.
    """
    if not 0 < std <= 12**-0.5:
        raise ValueError(f"ema std {std!r}: expected 0 < std <= {12**-0.5:.4f}, such as 0.05 or 0.1")
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return float(max(0.0, roots.real.max()))


def std_of(gamma: float) -> float:
    """The standard deviation, relative to the length of training, of the power-function average with exponent `gamma`.

    That of the density `(gamma + 1) tau ** gamma` on `[0, 1]`; Karras et al. 2024, arXiv:2312.02696, appendix C.
    """
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def _average(weight: Callable) -> Ema:
    """The average `average + weight(step) * (params - average)`: constant parameters stay to the bit."""

    def init(params):
        return jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32), copy=True), params)

    def update(average, params, step):
        w = weight(step)

        def leaf(a, p):
            wide = jnp.promote_types(a.dtype, jnp.float32)
            return (a.astype(wide) + w.astype(wide) * (p.astype(wide) - a.astype(wide))).astype(a.dtype)

        return jax.tree.map(leaf, average, params)

    return Ema(init, update)


EMAS = {"decay": decay, "power": power}
