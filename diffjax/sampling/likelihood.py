"""Likelihoods: log-densities by the probability flow, the terms of variational bounds, bits per dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr

from diffjax.core.schedules import Schedule
from diffjax.core.spacing import s_range
from diffjax.core.types import Array, Denoiser, Level, expand, namespace
from diffjax.sampling.adaptive import METHODS, check_method, flow_time, from_flow, integrate, probability_flow, rk_step
from diffjax.sampling.loop import normal
from diffjax.sampling.solvers.basic import divide, pairs

DIVERGENCES = ("exact", "rademacher", "gaussian")
_CHUNK = 64  # columns of the Jacobian computed at a time: a bound on memory, at the speed of one batched call


def _sum(a: Array) -> Array:
    """The sum over all axes but the first."""
    return jnp.sum(a, axis=tuple(range(1, a.ndim)))


def _size(x: Array) -> int:
    return int(np.prod(x.shape[1:]))


def _cast(level: Level, dtype) -> Level:
    return Level(*(jnp.asarray(field, dtype) for field in level))


def _normal_logpdf(x: Array, mean: Array, std: Array) -> Array:
    return -0.5 * ((x - mean) / std) ** 2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)


def gaussian_prior(mean: Array = 0.0, std: Array = 0.0) -> Callable[[Array, Level], Array]:
    """`(x [B, ...], level) -> [B]`, the log-density in nats of `N(alpha mean, alpha^2 std^2 + sigma^2)` at x.

    It is the density from which `prior` draws. The default, `N(0, sigma^2)`, is the usual one; the mean and std of the
    data, broadcast against x, make its first two moments exact where the level still holds some signal.
    """

    def logpdf(x, level):
        alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
        return _sum(_normal_logpdf(x, alpha * mean, jnp.sqrt((alpha * std) ** 2 + sigma**2)))

    return logpdf


def _probes(kind: str, key: jax.Array | None, x: Array, n: int) -> Array:
    """The tangents [k, B or 1, ...] along which the divergence is taken: the unit vectors, or n random probes."""
    if kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kind!r}; known: {', '.join(DIVERGENCES)}")
    if kind == "exact":
        return jnp.eye(_size(x), dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
    if key is None:
        raise ValueError(f'divergence="{kind}" draws probes: pass key=, or divergence="exact"')
    if n < 1:
        raise ValueError(f"n_probes: expected a whole number >= 1, got {n}")
    fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))
    probes = jnp.stack([normal(fold(key, i), x) for i in range(n)])
    return jnp.where(probes < 0, -1.0, 1.0).astype(x.dtype) if kind == "rademacher" else probes


def _with_divergence(field: Callable, probes: Array, exact: bool) -> Callable:
    """`(r, (z, l)) -> (dz / dr, div)` with the divergence per dimension, [B]: samples do not see each other."""

    def augmented(r, state):
        z, _ = state
        slope, jvp = jax.linearize(lambda z: field(r, z), z)
        along = lambda v: _sum(jnp.broadcast_to(v, z.shape) * jvp(jnp.broadcast_to(v, z.shape)))
        traces = jax.lax.map(along, probes, batch_size=min(len(probes), _CHUNK))
        divergence = jnp.sum(traces, axis=0) if exact else jnp.mean(traces, axis=0)
        return slope, divergence / _size(z)

    return augmented


def _along_grid(field: Callable, method: str, r: Array, state):
    """Fixed steps of a Runge-Kutta method from `r[0]` to `r[-1]`, as one scan."""

    def step(carry, ends):
        state, slope = carry
        state, slope, _ = rk_step(field, METHODS[method], ends[0], state, ends[1] - ends[0], slope=slope)
        return (state, slope), None

    (state, _), _ = jax.lax.scan(step, (state, field(r[0], state)), jnp.stack([r[:-1], r[1:]], axis=1))
    return state


def _finite_end(levels: Level) -> None:
    if not isinstance(levels.sigma, jax.core.Tracer) and float(np.asarray(levels.sigma)[-1]) == 0:
        raise ValueError(
            "levels: the grid must end at sigma > 0, where the density exists and the network is defined, but it ends "
            "at sigma = 0; use logsnr(schedule, n) or karras(schedule, n, zero=False)"
        )


def log_likelihood(
    denoise: Denoiser,
    schedule: Schedule,
    x: Array,
    *,
    s_min: float = 1e-3,
    levels: Level | None = None,
    prior_logpdf: Callable[[Array, Level], Array] | None = None,
    divergence: str = "exact",
    n_probes: int = 1,
    key: jax.Array | None = None,
    method: str = "rk45",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 1000,
) -> Array:
    """`log p(x)` in nats [B] under the model's probability flow; not a number for samples that `max_steps` cut short.

    p is the density of the data plus Gaussian noise of standard deviation `s_min`, evaluated at x itself. Data on a
    grid (pixels) or on a manifold have no density of their own, and no network is defined at sigma = 0; where the data
    have one that is smooth on the scale of `s_min`, the difference is of order `s_min^2`.

    The change of variables along `dz / dr = eps - x0` (docs/likelihood.md) adds the integral of the divergence, from
    `s_min` to the noisy end, to the log-density of the prior there. Samples must not see each other in the network.

    Args:
      denoise: any `(x, level) -> Prediction`.
      schedule: gives the levels on the way; it ends at `schedule.t_max`.
      x: clean data [B, ...].
      s_min: `sigma / alpha` at the clean end.
      levels: a grid, noise first and ending at sigma > 0: one fixed step of `method` per interval in place of adaptive
        ones, and both ends in place of the schedule's and `s_min`. Differentiable in reverse, as `while_loop` is not.
      prior_logpdf: `(x, level) -> [B]`, log-density at the noisy end; default `gaussian_prior()`. Its misfit to
        the model's own marginal there is a bias of the result.
      divergence: "exact", one Jacobian-vector product per dimension; or Hutchinson's unbiased estimate with
        "rademacher" or "gaussian" probes, drawn once per call: the noise is that of the result.
      n_probes: probes averaged.
      key: of the probes; one typed key, or one per sample.
      method: "rk45" or "rk23".
      rtol: as in `adaptive`, for the state and for the mean divergence per dimension.
      atol: likewise.
      max_steps: likewise.

    Raises:
      ValueError: for unknown names, a missing key, or ends that are not finite and positive.

    Chen et al. 2018, arXiv:1806.07366, Theorem 1; Song et al. 2021, arXiv:2011.13456, Eq. 39 and 40; Hutchinson's
    estimate as in Grathwohl et al. 2019, arXiv:1810.01367.
    """
    check_method(method, rtol, atol, max_steps)
    if not s_min > 0:
        raise ValueError(f"s_min: expected a positive number, got {s_min}")
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if levels is not None:
        _finite_end(levels)
    end = schedule(np.asarray(schedule.t_max)) if levels is None else levels.at(0)
    if hasattr(denoise, "check") and not isinstance(end.alpha, jax.core.Tracer):
        denoise.check(Level(*(np.atleast_1d(np.asarray(a, np.float64)) for a in end)))
    clean = s_min / (1 + s_min) if levels is None else flow_time(levels.at(-1))
    field = probability_flow(denoise, schedule, s_min=s_min if levels is None else 0.0)
    field = _with_divergence(field, _probes(divergence, key, x, n_probes), divergence == "exact")
    clean = jnp.asarray(clean, x.dtype)
    state = ((1 - clean) * x, jnp.zeros(x.shape[:1], x.dtype))
    if levels is None:
        first, last = (jnp.full(x.shape[:1], a, x.dtype) for a in (clean, flow_time(end)))
        controls = {"method": method, "rtol": rtol, "atol": atol, "max_steps": max_steps}
        (z, change), _, _, stats = integrate(field, state, first, last, **controls)
        change = jnp.where(stats.finished, change, jnp.nan)
    else:
        z, change = _along_grid(field, method, jnp.asarray(flow_time(levels)[::-1], x.dtype), state)
    end = _cast(end, x.dtype)
    # Densities of x at the end and of z differ by m^D, of x and z at the clean end by (1 - r)^D.
    volume = change + jnp.log(end.alpha + end.sigma) + jnp.log1p(-clean)
    return (prior_logpdf or gaussian_prior())(from_flow(z, end), end) + _size(x) * volume


def dequantize(x: Array, key: jax.Array, levels: int = 256, lo: float = -1.0, hi: float = 1.0) -> Array:
    """Integers 0 to `levels - 1` [B, ...] as float32 in [lo, hi), each uniform in its own bin of `levels` equal ones.

    Uniform dequantisation (Theis et al. 2016, arXiv:1511.01844, section 3.1): the log-density of the result bounds the
    log-probability of the integers from below on average; `bits_per_dim` accounts for the width of the bins.

    Raises:
      ValueError: if `x` is not of an integer dtype, or concrete with a value outside that range.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise ValueError(f"dequantize: expected integers from 0 to {levels - 1}, got {jnp.result_type(x)}")
    if not isinstance(x, jax.core.Tracer) and np.size(x) and not 0 <= np.min(x) <= np.max(x) < levels:
        raise ValueError(f"dequantize: expected integers from 0 to {levels - 1}, got {np.min(x)} to {np.max(x)}")
    u = jax.random.uniform(key, jnp.shape(x), jnp.result_type(float))
    return lo + (hi - lo) * (jnp.asarray(x, u.dtype) + u) / levels


def bits_per_dim(logp: Array, shape: tuple[int, ...], levels: int = 256, lo: float = -1.0, hi: float = 1.0) -> Array:
    """Bits per dimension, shape of `logp`, of integer data from the log-density in nats of `dequantize`'s output.

    `-(logp + D log((hi - lo) / levels)) / (D log 2)`: for 256 levels in [-1, 1] the offset is 7 bits. With
    `levels = hi - lo = 1` it is that of the density itself.

    Args:
      logp: nats, of whole samples.
      shape: of one sample, without the batch; D is its product.
      levels: number of values of the integer data.
      lo: as in `dequantize`.
      hi: likewise.
    """
    d = int(np.prod(shape))
    return -(logp / d + np.log((hi - lo) / levels)) / np.log(2)


class ELBO(NamedTuple):
    """Terms of a variational bound on `-log p(x0)`, each in nats: their `total` bounds it from above on average.

    Attributes:
      prior: [B], KL of the noisiest latent from the prior: L_T.
      steps: [n, B], `elbo`: KL of each step, L_{t-1}, noise first; `vlb`: estimates at n times of their integral.
      decoder: [B], reconstruction from the cleanest latent: L_0.
      total: [B], the bound: `prior + decoder`, plus the sum of `steps` for `elbo` and their mean for `vlb`.
    """

    prior: Array
    steps: Array
    decoder: Array
    total: Array


def _prior_kl(x0, level, mean, std):
    """KL(N(alpha x0, sigma^2) || N(alpha mean, alpha^2 std^2 + sigma^2)), [B]."""
    extra = (level.alpha * std / level.sigma) ** 2  # the ratio of variances is 1 + extra
    distance = (level.alpha / level.sigma * (x0 - mean)) ** 2
    return 0.5 * _sum(jnp.broadcast_to(distance / (1 + extra) - extra / (1 + extra) + jnp.log1p(extra), x0.shape))


def gaussian_decoder(std: float | None = None) -> Callable[[Array, Array, Level], Array]:
    """`(x0, x0_hat, level) -> [B]`, nats: -log N(x0; x0_hat, std^2), for continuous data; default std `level.sigma`."""
    return lambda x0, x0_hat, level: -_sum(_normal_logpdf(x0, x0_hat, level.sigma if std is None else std))


def discretized_decoder(
    levels: int = 256, lo: float = -1.0, hi: float = 1.0, std: float | None = None
) -> Callable[[Array, Array, Level], Array]:
    """`(x0, x0_hat, level) -> [B]`, nats: -log of a Gaussian's mass in x0's bin (Ho et al. 2020, Eq. 13).

    For data with `levels` values equally spaced from `lo` to `hi`, both included; the outer bins reach to infinity.
    The std is `level.sigma` by default: sqrt(beta_1) for a table.
    """
    half = (hi - lo) / (levels - 1) / 2

    def decoder(x0, x0_hat, level):
        scale = level.sigma if std is None else std
        left = jnp.where(x0 < lo + half, -jnp.inf, (x0 - half - x0_hat) / scale)
        right = jnp.where(x0 > hi - half, jnp.inf, (x0 + half - x0_hat) / scale)
        # Reflected so that both are in the lower tail, where the logarithm of the CDF keeps its digits.
        flip = left + right > 0
        a, b = jnp.where(flip, -right, left), jnp.where(flip, -left, right)
        return -_sum(log_ndtr(b) + jnp.log1p(-jnp.exp(log_ndtr(a) - log_ndtr(b))))

    return decoder


def _draw(noise, key, x0):
    """`i -> [B, ...]` noise, from the function given or folded from the key."""
    if (noise is None) == (key is None):
        raise ValueError("give either key (to draw the noise) or noise (a function of the index)")
    if noise is not None:
        return noise
    fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))
    return lambda i: normal(fold(key, i), x0)


def _latents(levels: Level, dtype) -> Level:
    """The levels of the latents, without a last one at sigma = 0, which is the data itself."""
    if not any(isinstance(field, jax.core.Tracer) for field in levels):
        levels = Level(*(np.asarray(field, np.float64) for field in levels))
        if np.any(levels.sigma[:-1] == 0) or np.any(np.diff(np.arctan2(levels.sigma, levels.alpha)) >= 0):
            raise ValueError("levels: a bound needs strictly decreasing noise, sigma = 0 at most in the last place")
        if levels.sigma[-1] == 0:
            levels = levels.at(slice(None, -1))
    return levels


def elbo(
    denoise: Denoiser,
    x0: Array,
    levels: Level,
    key: jax.Array | None = None,
    *,
    variance: str = "beta_tilde",
    decoder: Callable[[Array, Array, Level], Array] | None = None,
    prior_mean: Array = 0.0,
    prior_std: Array = 0.0,
    noise: Callable[[Array], Array] | None = None,
) -> ELBO:
    """The discrete-time bound of DDPM, term by term, on one noise draw per term; n + 1 latents give n steps.

    The chain is ancestral sampling along the grid: p(x_next | x) has the mean of q(x_next | x, x0) at the predicted
    x0. The terms are KL divergences between Gaussians, so only the noise of the latents is random.

    Args:
      denoise: any `(x, level) -> Prediction`.
      x0: clean data [B, ...].
      levels: the latents' levels, noise first; a last one at sigma = 0 (of a concrete grid) is the data and dropped.
      key: draws the latents; one typed key, or one per sample.
      variance: of p: "beta_tilde", that of the posterior q(x_next | x, x0), or "beta", that of q(x | x_next).
      decoder: `(x0, x0_hat, level) -> [B]` nats, default `gaussian_decoder()`; `discretized_decoder()` for pixels.
      prior_mean: the prior is `N(alpha prior_mean, alpha^2 prior_std^2 + sigma^2)`, as in `prior`.
      prior_std: 1 is DDPM's N(0, 1) where alpha^2 + sigma^2 = 1.
      noise: `i -> [B, ...]`, noise of latent i (0 is the noisiest) in place of the key; traceable.

    Raises:
      ValueError: for an unknown variance, both or neither of key and noise, or a grid that does not decrease.

    Sohl-Dickstein et al. 2015, arXiv:1503.03585, Eq. 14; Ho et al. 2020, arXiv:2006.11239, Eq. 5 to 8.
    """
    if variance not in ("beta_tilde", "beta"):
        raise ValueError(f"unknown variance {variance!r}; known: beta_tilde, beta")
    x0 = jnp.asarray(x0)
    x0 = x0.astype(jnp.promote_types(x0.dtype, jnp.float32))
    latents, draw = _latents(levels, x0.dtype), _draw(noise, key, x0)
    n = latents.t.shape[0] - 1
    level, following = pairs(latents)
    # SNR' - SNR = SNR' (1 - ratio); a KL is weight |x0 - x0_hat|^2 + offset per dimension.
    ratio = divide(level.alpha * following.sigma, following.alpha * level.sigma) ** 2
    weight = 0.5 * (following.alpha / following.sigma) ** 2 * (1 - ratio)
    offset = namespace(*latents).zeros_like(ratio)
    if variance == "beta":
        shrink = (following.sigma / level.sigma) ** 2  # beta_tilde / beta
        weight, offset = weight * shrink, 0.5 * (shrink - 1 - namespace(*latents).log(shrink))

    def predict(i, level):
        return denoise(level.alpha * x0 + level.sigma * draw(i), level).x0

    def term(_, row):
        i, level, weight, offset = row
        return None, weight * _sum((x0 - predict(i, level)) ** 2) + _size(x0) * offset

    rows = jax.tree.map(lambda a: jnp.asarray(a, x0.dtype), (level, weight, offset))
    _, steps = jax.lax.scan(term, None, (jnp.arange(n), *rows))
    first, last = _cast(latents.at(0), x0.dtype), _cast(latents.at(-1), x0.dtype)
    prior = _prior_kl(x0, first, prior_mean, prior_std)
    reconstruction = (decoder or gaussian_decoder())(x0, predict(n, last), last)
    return ELBO(prior, steps, reconstruction, prior + jnp.sum(steps, axis=0) + reconstruction)


def vlb(
    denoise: Denoiser,
    schedule: Schedule,
    x0: Array,
    key: jax.Array,
    *,
    n_times: int = 16,
    s_min: float | None = None,
    s_max: float | None = None,
    decoder: Callable[[Array, Array, Level], Array] | None = None,
    prior_mean: Array = 0.0,
    prior_std: Array = 0.0,
    noise: Callable[[Array], Array] | None = None,
) -> ELBO:
    """The continuous-time bound of VDM: `1/2` the integral over log-SNR of `E|eps - eps_hat|^2`, by n stratified times.

    In log-SNR the integral is the same for every schedule (VDM, section 5.1), so times are uniform in it and `steps`
    are `(logsnr_max - logsnr_min) / 2 |eps - eps_hat|^2`, unbiased in their mean. Terms are those of `ELBO`.

    Args:
      denoise: any `(x, level) -> Prediction`.
      schedule: gives the levels at the drawn log-SNRs.
      x0: clean data [B, ...].
      key: draws times and noise; one typed key, or one per sample.
      n_times: strata, each with one time and one noise per sample.
      s_min: `sigma / alpha` of the cleanest latent; default that of `s_range`, as for `s_max`, the noisiest.
      s_max: the cost of a finite end is in the terms `prior` and `decoder`.
      decoder: as in `elbo`.
      prior_mean: as in `elbo`.
      prior_std: likewise.
      noise: `i -> [B, ...]` in place of that of the key, for time i; n_times is the decoder's.

    Raises:
      ValueError: unless n_times >= 1 and 0 < s_min < s_max.

    Kingma et al. 2021, arXiv:2107.00630, Eq. 11 to 15 and appendix I.1 (low-discrepancy times).
    """
    if n_times < 1:
        raise ValueError(f"n_times: expected a whole number >= 1, got {n_times}")
    x0 = jnp.asarray(x0)
    x0 = x0.astype(jnp.promote_types(x0.dtype, jnp.float32))
    s_min, s_max = s_range(schedule, s_min, s_max)
    lowest, span = -2 * np.log(s_max), 2 * np.log(s_max / s_min)
    fold = jax.random.fold_in if key.ndim == 0 else jax.vmap(jax.random.fold_in, (0, None))
    draw = noise or _draw(None, fold(key, 0), x0)
    uniform = lambda k, shape: jax.random.uniform(k, shape, x0.dtype)

    def term(_, i):
        k = fold(fold(key, 1), i)
        u = uniform(k, x0.shape[:1]) if key.ndim == 0 else jax.vmap(lambda k: uniform(k, ()))(k)
        level = schedule.at_logsnr(lowest + span * (i + u) / n_times)
        eps = draw(i)
        x = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps
        return None, span / 2 * _sum((eps - denoise(x, level).eps) ** 2)

    _, steps = jax.lax.scan(term, None, jnp.arange(n_times))
    first, last = (_cast(schedule.at_logsnr(np.asarray(-2 * np.log(s))), x0.dtype) for s in (s_max, s_min))
    prior = _prior_kl(x0, first, prior_mean, prior_std)
    x0_hat = denoise(last.alpha * x0 + last.sigma * draw(n_times), last).x0
    reconstruction = (decoder or gaussian_decoder())(x0, x0_hat, last)
    return ELBO(prior, steps, reconstruction, prior + jnp.mean(steps, axis=0) + reconstruction)
