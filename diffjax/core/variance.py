"""The variational bound of one reverse step whose variance the network predicts."""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from diffjax.core.types import Array, Level, Prediction, expand


def log_variances(level: Level, following: Level) -> tuple[Array, Array]:
    """`(log beta, log beta_tilde)` of a step: the variance of the forward step, and of its posterior given x0.

    Nichol and Dhariwal 2021, arXiv:2102.09672, section 3.1; for any alpha and sigma, `beta = sigma^2 (1 - r^2)` and
    `beta_tilde = sigma'^2 (1 - r^2)` with `r = (sigma' / alpha') / (sigma / alpha)`. `-inf` at `sigma' = 0` for the
    second.
    """
    # 1 - r^2 with r a ratio of products, so that alpha = 0 and sigma' = 0 are exact: r = 0.
    change = jnp.log1p(-((level.alpha * following.sigma / (following.alpha * level.sigma)) ** 2))
    return 2 * jnp.log(level.sigma) + change, 2 * jnp.log(following.sigma) + change


def learned_log_variance(aux: Array, low: Array, high: Array) -> Array:
    """`v high + (1 - v) low` with `v = (aux + 1) / 2` (arXiv:2102.09672, Eq. 15); bounds [B], aux [B, ...]."""
    v = (aux + 1) / 2
    return v * expand(high, aux) + (1 - v) * expand(low, aux)


def step_kl(prediction: Prediction, x0: Array, log_variance: Array, level: Level, following: Level) -> Array:
    """KL(q(x' | x, x0) || p(x' | x)) of each sample, [B]: nats, the mean over dimensions; needs `sigma' > 0`.

    q is the posterior of the forward process, p has its mean at the predicted x0 and the variance
    `exp(log_variance)`. Ho et al. 2020, arXiv:2006.11239, Eq. 6 to 8.

    Args:
      prediction: its x0 is the network's.
      x0: clean data [B, ...].
      log_variance: [B, ...].
      level: of x, fields [B].
      following: of x'.
    """
    r = level.alpha * following.sigma / (following.alpha * level.sigma)
    tilde = expand(log_variances(level, following)[1], x0)
    distance = expand(following.alpha * (1 - r**2), x0) * (x0 - prediction.x0)
    nats = 0.5 * (log_variance - tilde + jnp.expm1(tilde - log_variance) + distance**2 * jnp.exp(-log_variance))
    return jnp.mean(nats, axis=tuple(range(1, x0.ndim)))


def bin_nll(mean: Array, x0: Array, log_variance: Array, bins: int, lo: float = -1.0, hi: float = 1.0) -> Array:
    """-log of the mass of `N(mean, exp(log_variance))` in the bin of x0, [B]: nats, the mean over dimensions.

    For data with `bins` values equally spaced from `lo` to `hi`; the outer bins reach to infinity (Ho et al. 2020,
    arXiv:2006.11239, Eq. 13).
    """
    half, scale = (hi - lo) / (bins - 1) / 2, jnp.exp(-0.5 * log_variance)
    # Ends at 1e4 standard deviations and not at infinity, whose gradient would be NaN.
    left = jnp.where(x0 < lo + half, -1e4, (x0 - half - mean) * scale)
    right = jnp.where(x0 > hi - half, 1e4, (x0 + half - mean) * scale)
    # Reflected so that both are in the lower tail, where the logarithm of the CDF keeps its digits.
    flip = left + right > 0
    a, b = jnp.where(flip, -right, left), jnp.where(flip, -left, right)
    below = jnp.minimum(log_ndtr(a) - log_ndtr(b), -1e-6)
    return -jnp.mean(log_ndtr(b) + jnp.log(-jnp.expm1(below)), axis=tuple(range(1, x0.ndim)))
