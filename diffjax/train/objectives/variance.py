"""The hybrid loss of iDDPM: the network's second output, a variance between two bounds, learns from the bound alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Level, Prediction
from diffjax.core.variance import bin_nll, learned_log_variance, log_variances, step_kl


class LearnedRange(NamedTuple):
    """`learned_range(weight, steps, bins)`: a variance between the two bounds of a reverse step, for each pixel.

    Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 15 and 16. Sample with `ancestral_ddpm(variance="learned_range")`.

    Attributes:
      weight: of the bound, which is in bits per dimension, in the loss.
      steps: of the reverse process over the schedule's range of times; a table has as many as entries.
      bins: values that a pixel can take, equally spaced from -1 to 1; 256 for photographs, 17 for digits.
    """

    weight: float = 0.001
    steps: int = 1000
    bins: int = 256


def check(variance: LearnedRange, schedule: Any) -> None:
    """Raises `ValueError` for settings out of range, or a schedule whose steps are not equal steps of its time."""
    from diffjax.core import EDM, Table

    if not (0 <= variance.weight < math.inf and variance.steps >= 2 and variance.bins >= 2):
        raise ValueError(f"{variance}: expected 0 <= weight < inf, steps >= 2, bins >= 2")
    if isinstance(schedule, EDM):
        raise ValueError("a learned variance needs equal steps of time, such as those of 'squared_cosine()', not edm")
    if isinstance(schedule, Table) and variance.steps != len(schedule.alphas_cumprod):
        raise ValueError(
            f"a table of {len(schedule.alphas_cumprod)} entries has as many steps, got steps={variance.steps}"
        )


def bound(variance: LearnedRange, schedule: Any, prediction: Prediction, x0: Array, t: Array) -> Array:
    """The term of time t times the number of steps, [B] in bits per dimension: the whole bound, for uniform times.

    A KL for each step, the negative log-likelihood of the bin of x0 for the last one. The mean is held fixed: the
    gradient is that of the variance alone (arXiv:2102.09672, section 3.1).
    """
    from diffjax.core import Table

    span = schedule.t_max - schedule.t_min
    dt = 1.0 if isinstance(schedule, Table) else span / variance.steps
    ends = schedule(jnp.maximum(t - dt, schedule.t_min))
    last = (t - dt < schedule.t_min) | (ends.sigma == 0)
    # The last step has beta_tilde = 0: its lower bound is that of the step before, as in the paper's code, which is
    # also the pair of levels that keeps the branch not taken finite.
    level = _cast(schedule(jnp.where(last, t + dt, t)), x0)
    following = _cast(schedule(jnp.where(last, t, t - dt)), x0)
    beta, tilde = log_variances(level, following)
    high = jnp.where(last, 2 * jnp.log(following.sigma), beta)
    log_variance = learned_log_variance(prediction.aux.astype(x0.dtype), tilde, high)
    fixed = jax.tree.map(jax.lax.stop_gradient, prediction)
    kl = step_kl(fixed, x0, log_variance, level, following)
    nll = bin_nll(fixed.x0, x0, log_variance, variance.bins)
    return variance.steps / math.log(2) * jnp.where(last, nll, kl)


def _cast(level: Level, x: Array) -> Level:
    return Level(*(jnp.asarray(field, jnp.promote_types(x.dtype, jnp.float32)) for field in level))


VARIANCES = {"learned_range": LearnedRange}
