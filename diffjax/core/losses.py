"""The training loss of a denoiser, its weights, and the samplers of training times."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.heads import EPS
from diffjax.core.schedules import Schedule, rate
from diffjax.core.types import Array, Head, Level, Prediction, expand

Weight = Callable[[Level], Array]
TimeSampler = Callable[[jax.Array, int], Array]


def add_noise(x0: Array, eps: Array, level: Level) -> Array:
    """`x = alpha x0 + sigma eps`, shape of `x0` (Ho et al. 2020, arXiv:2006.11239, Eq. 4)."""
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps


def loss(
    f: Callable[[Array, Array], Array],
    head: Head,
    x0: Array,
    level: Level,
    *,
    key: jax.Array | None = None,
    eps: Array | None = None,
    weight: Weight | None = None,
    space: Head | None = None,
    predict: bool = False,
) -> Array | tuple[Array, Prediction]:
    """Denoising loss of each sample, [B] in at least float32: the mean over its elements of a squared error.

    Without `weight` the error is that of the head's own target: the simple loss of DDPM for EPS, flow matching for
    FLOW, EDM's weighted loss for edm. With `weight` it is the error of eps, the space in which the papers state their
    weights. `space` overrides both: an X0 network with a FLOW loss is `head=X0, space=FLOW`.

    Args:
      f: `(x [B, ...], t [B]) -> out [B, ...]`, any network with its parameters and conditions closed over.
      head: what `out` means.
      x0: clean data [B, ...].
      level: fields [B], one noise level per sample.
      key: draws the noise; or give the noise itself as
      eps: unit Gaussian [B, ...].
      weight: `Level -> [B]`, factor of the squared error.
      space: the head in whose target the error is measured.
      predict: whether `(loss, Prediction)` comes back, with the network's second output, if it has one, in `aux`.

    Raises:
      ValueError: if neither or both of `key` and `eps` are given, or the shapes do not fit.
    """
    if (key is None) == (eps is None):
        raise ValueError("loss: give either key (to draw the noise) or eps (the noise itself)")
    if jnp.shape(level.alpha) != x0.shape[:1]:
        raise ValueError(f"loss: level fields must be [B] = {x0.shape[:1]}, got {jnp.shape(level.alpha)}")
    dtype = jnp.promote_types(x0.dtype, jnp.float32)
    x0 = x0.astype(dtype)
    level = Level(*(jnp.asarray(a, dtype) for a in level))
    eps = jax.random.normal(key, x0.shape, dtype) if eps is None else eps.astype(dtype)
    space = space or (head if weight is None else EPS)
    x = add_noise(x0, eps, level)
    out = f(x * expand(head.scale_in(level), x), level.t)
    out, aux = out if isinstance(out, tuple) else (out, ())
    out = out.astype(dtype)
    if out.shape != x.shape:
        raise ValueError(f"the network returned shape {out.shape} for x of shape {x.shape}; they must be equal")
    prediction = head.split(out, x, level) if predict or space is not head else None
    if space is not head:
        out = space.target(prediction.x0, prediction.eps, level)
    error = jnp.mean((out - space.target(x0, eps, level)) ** 2, axis=tuple(range(1, x.ndim)))
    error = error if weight is None else weight(level) * error
    return (error, prediction._replace(aux=aux)) if predict else error


# Weights. Each returns `Level -> [B]`, the factor of the squared error of eps.


def simple() -> Weight:
    """1 for every level (Ho et al. 2020, arXiv:2006.11239, Eq. 14)."""
    return lambda level: jnp.ones_like(level.alpha)


def min_snr(gamma: float = 5.0) -> Weight:
    """`min(SNR, gamma) / SNR` (Hang et al. 2023, arXiv:2303.09556, section 3.4), written without a division by SNR."""
    return lambda level: jnp.minimum(1.0, gamma * level.s**2)


def p2(k: float = 1.0, gamma: float = 1.0) -> Weight:
    """`1 / (k + SNR) ** gamma` (Choi et al. 2022, arXiv:2204.00227, Eq. 8 over the simple loss)."""
    return lambda level: (k + (level.alpha / level.sigma) ** 2) ** -gamma


def edm_weight(sigma_data: float = 0.5) -> Weight:
    """EDM's `lambda(sigma) = (s^2 + d^2) / (s d)^2` of the x0 error (arXiv:2206.00364, Table 1), restated for eps.

    It grows without bound towards alpha = 0; there use the edm head without weight, which is the same loss.
    """
    return lambda level: 1 + (level.s / sigma_data) ** 2


def elbo(schedule: Schedule) -> Weight:
    """`-1/2 d logsnr / dt`: with uniform `t` the mean of the loss times its dimension is the continuous VLB in nats.

    Kingma et al. 2021 (arXiv:2107.00630, Eq. 17); the likelihood weighting of Song et al. 2021 (arXiv:2101.09258).
    """
    return lambda level: 0.5 * rate(schedule, level.logsnr)


def sigmoid(schedule: Schedule, bias: float = 2.0) -> Weight:
    """`sigmoid(bias - logsnr)` of the ELBO (Kingma and Gao 2023, arXiv:2303.00848, appendix D); SiD2 has bias -3."""
    return lambda level: jax.nn.sigmoid(bias - level.logsnr) * 0.5 * rate(schedule, level.logsnr)


def truncated_snr(least: float = 1.0) -> Weight:
    """`max(SNR, least)` of the x0 error (Salimans and Ho 2022, arXiv:2202.00512, section 4), restated for eps."""
    return lambda level: jnp.maximum(1.0, least * level.s**2)


def debiased() -> Weight:
    """`1 / sqrt(SNR)` (Yu et al. 2023, arXiv:2310.08442, Eq. 12): high noise weighs more; unbounded at alpha = 0."""
    return lambda level: level.s


WEIGHTS = {
    "simple": simple,
    "min_snr": min_snr,
    "truncated_snr": truncated_snr,
    "debiased": debiased,
    "p2": p2,
    "edm": edm_weight,
    "elbo": elbo,
    "likelihood": elbo,
    "sigmoid": sigmoid,
}


# Time samplers. Each returns `(key, n) -> t [n] float32`, arguments for a schedule.


def _increasing(lo: float, hi: float) -> None:
    if not lo < hi:
        raise ValueError(f"times: expected lo < hi, got lo={lo!r}, hi={hi!r}")


def _normal_parameters(mean: float, std: float) -> None:
    if not all(isinstance(value, (int, float)) and abs(value) < float("inf") for value in (mean, std)) or std <= 0:
        raise ValueError(f"times: expected a finite mean and a positive std, got mean={mean!r}, std={std!r}")


def uniform_times(lo: float = 0.0, hi: float = 1.0) -> TimeSampler:
    """Independent uniform times in (lo, hi]; `lo`, where there is no noise, is never drawn."""
    _increasing(lo, hi)
    return lambda key, n: hi - (hi - lo) * jax.random.uniform(key, (n,))


def stratified_times(lo: float = 0.0, hi: float = 1.0) -> TimeSampler:
    """One shared offset and `n` equal strata: each time uniform, their mean of low variance.

    Kingma et al. 2021 (arXiv:2107.00630, appendix I.1).
    """
    _increasing(lo, hi)
    return lambda key, n: hi - (hi - lo) * ((jax.random.uniform(key) + jnp.arange(n) / n) % 1)


def antithetic_times(lo: float = 0.0, hi: float = 1.0) -> TimeSampler:
    """Uniform times in pairs `(t, lo + hi - t)`."""
    _increasing(lo, hi)

    def times(key, n):
        half = jax.random.uniform(key, ((n + 1) // 2,))
        return hi - (hi - lo) * jnp.concatenate([half, jnp.maximum(1 - half, 0)])[:n]

    return times


def logit_normal_times(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """`sigmoid(N(mean, std^2))` in (0, 1) (Esser et al. 2024, arXiv:2403.03206, Eq. 19)."""
    _normal_parameters(mean, std)
    return lambda key, n: jax.nn.sigmoid(mean + std * jax.random.normal(key, (n,)))


def lognormal_times(mean: float = -1.2, std: float = 1.2) -> TimeSampler:
    """`exp(N(mean, std^2))`, EDM's sigma (Karras et al. 2022, arXiv:2206.00364, Table 1), for the `EDM` schedule."""
    _normal_parameters(mean, std)
    return lambda key, n: jnp.exp(mean + std * jax.random.normal(key, (n,)))


def mode_times(scale: float = 1.29) -> TimeSampler:
    """`1 - u - scale (cos^2(pi u / 2) - 1 + u)` of a uniform u: the middle favoured, with heavy tails, or not.

    Esser et al. 2024 (arXiv:2403.03206, Eq. 20 and its best scale in Table 1). Positive scales favour the middle of
    [0, 1], negative ones its ends; 0 is uniform.

    Raises:
      ValueError: unless `-1 <= scale <= 2 / (pi - 2)`, where the map is monotone.
    """
    most = 2 / (math.pi - 2)
    if not -1 <= scale <= most:
        raise ValueError(f"times: mode has scale={scale!r}; expected -1 <= scale <= 2 / (pi - 2) = {most:.4f}")

    def times(key, n):
        u = jax.random.uniform(key, (n,))
        return jnp.clip(1 - u - scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u), 0.0, 1.0)

    return times


def cosmap_times() -> TimeSampler:
    """`1 - 1 / (tan(pi u / 2) + 1)` of a uniform u: on `Flow()` the log-SNR of the cosine schedule.

    Esser et al. 2024 (arXiv:2403.03206, Eq. 21).
    """

    def times(key, n):
        angle = jnp.pi / 2 * (1 - jax.random.uniform(key, (n,)))
        return jnp.sin(angle) / (jnp.sin(angle) + jnp.cos(angle))  # without the tangent's pole

    return times


def beta_times(a: float = 1.5, b: float = 1.0) -> TimeSampler:
    """`Beta(a, b)` in [0, 1]; a > b favours the noise (Black et al. 2024, arXiv:2410.24164, appendix B, time reversed).

    Raises:
      ValueError: for a shape that is not positive.
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"times: expected positive shapes of the beta distribution, got a={a!r}, b={b!r}")
    return lambda key, n: jax.random.beta(key, a, b, (n,))


def discrete_times(num_steps: int = 1000) -> TimeSampler:
    """Uniform over the integers 0 .. num_steps - 1 as floats, for a `Table`."""
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"times: expected num_steps >= 1, a whole number, got {num_steps!r}")
    return lambda key, n: jax.random.randint(key, (n,), 0, num_steps).astype(jnp.float32)


TIMES = {
    "uniform": uniform_times,
    "stratified": stratified_times,
    "antithetic": antithetic_times,
    "logit_normal": logit_normal_times,
    "lognormal": lognormal_times,
    "mode": mode_times,
    "cosmap": cosmap_times,
    "beta": beta_times,
    "discrete": discrete_times,
}
