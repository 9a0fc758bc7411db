"""Exact denoisers: distributions whose posterior mean, score, likelihood and probability flow are known.

Use them as a network that is never wrong: `sample(heun(), Gaussian(mean, cov).denoise, x, levels)` has the solver's
error and nothing else. Data are vectors [B, D] for `Mixture`, arrays of any shape for `Gaussian` and `Empirical`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.ode import odeint

from diffjax.core.types import Array, Level, Prediction, expand


def _split(x0, x, level):
    return Prediction(x0, (x - expand(level.alpha, x) * x0) / expand(level.sigma, x))


def _check_covariance(mean, cov):
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if cov.shape != mean.shape + mean.shape[-1:] or not np.allclose(cov, np.swapaxes(cov, -1, -2)):
        expected = mean.shape + mean.shape[-1:]
        raise ValueError(f"cov must be symmetric {expected} for a mean {mean.shape}, got {cov.shape}")
    variances, basis = np.linalg.eigh(cov)
    if np.any(variances < -1e-9 * np.abs(variances).max()):
        raise ValueError(f"cov must be positive semi-definite; its smallest eigenvalue is {variances.min():.3g}")
    return mean, np.maximum(variances, 0.0), basis


def _condition(mean, cov, A, y, noise_std):
    """Mean, covariance and log evidence of `N(mean, cov)`, any leading axes, given `y = A x0 + noise_std eps`."""
    A, y = np.asarray(A, np.float64), np.asarray(y, np.float64)
    if A.ndim != 2 or A.shape[1] != mean.shape[-1] or y.shape != A.shape[:1]:
        d = mean.shape[-1]
        raise ValueError(
            f"condition: expected A [M, {d}] and y [M] for data in {d} dimensions, got {A.shape}, {y.shape}"
        )
    if not noise_std >= 0:
        raise ValueError(f"condition: noise_std must be a number >= 0, got {noise_std}")
    # Redundant rows carry no information on x0, and would make the covariance of y singular without noise.
    u, s, vt = np.linalg.svd(A, full_matrices=False)
    kept = s > len(s) * np.finfo(float).eps * s.max(initial=0.0) * 10
    u, rows = u[:, kept], s[kept, None] * vt[kept]
    if noise_std == 0 and not np.allclose(u @ (u.T @ y), y, rtol=1e-9, atol=1e-9 * np.abs(y).max(initial=0.0)):
        raise ValueError("condition: no x0 has this y = A x0; give the noise of the measurement, noise_std > 0")
    spread = rows @ cov @ rows.T + noise_std**2 * np.eye(len(rows))
    if len(rows) and np.any(np.linalg.eigvalsh(spread)[..., 0] <= 1e-14 * np.abs(cov).max()):
        raise ValueError("condition: cov leaves y = A x0 no freedom in some direction; give noise_std > 0")
    gain = np.swapaxes(np.linalg.solve(spread, rows @ cov), -1, -2)
    residual = u.T @ y - mean @ rows.T
    # Joseph's form stays positive semi-definite in floating point.
    left = np.eye(mean.shape[-1]) - gain @ rows
    posterior = left @ cov @ np.swapaxes(left, -1, -2) + noise_std**2 * gain @ np.swapaxes(gain, -1, -2)
    quadratic = np.sum(residual * np.linalg.solve(spread, residual[..., None])[..., 0], axis=-1)
    evidence = -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * spread)[1])
    return mean + (gain @ residual[..., None])[..., 0], (posterior + np.swapaxes(posterior, -1, -2)) / 2, evidence


def _check_eigenpairs(values, vectors):
    values, vectors = np.asarray(values, np.float64), np.asarray(vectors, np.float64)
    if values.ndim != 1 or vectors.ndim != 2 or vectors.shape[1] != len(values) or not np.all(values >= 0):
        raise ValueError(
            "cov: eigenpairs are (values [K] >= 0, vectors [D, K]); got values "
            f"{values.shape} and vectors {vectors.shape}"
        )
    inner = vectors.T @ vectors
    if not np.allclose(inner, np.diag(np.round(np.diag(inner))), atol=1e-6):
        raise ValueError("cov: the columns of the eigenvectors must be orthonormal (np.linalg.eigh returns such)")
    order = np.argsort(-values, kind="stable")  # the last pair stands for the directions that are left out
    return values[order], vectors[:, order]


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Data `N(mean, cov)`: an exact denoiser, and the statistics that samplers take (`Gaussian.fit(data)`).

    Attributes:
      mean: [D], or any shape that broadcasts against one sample; a number is a constant mean.
      cov: [D, D] symmetric positive semi-definite, for a mean [D]; a number (isotropic) or an array that broadcasts
        against one sample (diagonal) otherwise; or eigenpairs `(values [K], vectors [D, K])` with orthonormal columns:
        then the D - K directions left over have the variance of the smallest value.

    Raises:
      ValueError: for any other shape, a negative variance or an indefinite covariance.
    """

    mean: np.ndarray
    cov: np.ndarray | tuple[np.ndarray, np.ndarray]

    def __post_init__(self):
        mean = np.asarray(self.mean, np.float64)
        if isinstance(self.cov, tuple):
            spectrum, basis = _check_eigenpairs(*self.cov)
        elif np.ndim(self.cov) == 2 and mean.ndim == 1:
            mean, spectrum, basis = _check_covariance(mean, self.cov)
        else:
            spectrum, basis = np.asarray(self.cov, np.float64), None
            if not np.all(spectrum >= 0):
                raise ValueError(f"cov: expected variances >= 0, got {self.cov}")
        if not isinstance(self.cov, tuple):
            object.__setattr__(self, "cov", np.asarray(self.cov, np.float64))
        for name, value in (("mean", mean), ("spectrum", spectrum), ("basis", basis)):
            object.__setattr__(self, name, value)
        complete = basis is not None and basis.shape[0] == basis.shape[1] and bool(np.all(np.any(basis != 0, axis=0)))
        object.__setattr__(self, "_complete", complete)

    @classmethod
    def fit(cls, data: Array, kind: str = "scalar", *, rank: int | None = None) -> Gaussian:
        """The mean and covariance of `data` [N, ...].

        Args:
          data: samples.
          kind: "scalar" (one variance, the mean over all dimensions), "diagonal" or "full" (eigenpairs).
          rank: how many eigenpairs to keep, the largest; the rest share the mean of their variances. Default all.

        Raises:
          ValueError: for another kind, or a rank that the data cannot have.
        """
        data = np.asarray(data, np.float64)
        mean = data.mean(axis=0)
        if kind == "scalar":
            return cls(mean, data.var(axis=0).mean())
        if kind == "diagonal":
            return cls(mean, data.var(axis=0))
        if kind != "full":
            raise ValueError(f"kind: expected 'scalar', 'diagonal' or 'full', got {kind!r}")
        size = data[0].size
        if rank is not None and not 1 <= rank <= size:
            raise ValueError(f"rank: expected 1 to {size} eigenpairs, got {rank}")
        _, singular, vectors = np.linalg.svd((data - mean).reshape(len(data), -1), full_matrices=False)
        values, rank = singular**2 / len(data), len(singular) if rank is None else rank
        total = values.sum()
        values, vectors = values[:rank], vectors[:rank].T
        if rank < size:  # one more pair carries the variance of all directions that were left out
            rest = max(total - values.sum(), 0.0) / (size - rank)
            values = np.append(values, rest)
            vectors = np.concatenate([vectors, np.zeros((size, 1))], axis=1)
        return cls(mean, (values, vectors))

    def operate(self, coef: Array, x: Array) -> Array:
        """`f(cov) x` for `x` [B, ...], where `coef` holds `f` of each variance in `spectrum`, or of each level's.

        Args:
          coef: the shape of `spectrum` (or of `spectrum` with a batch axis in front).
          x: [B, ...]; the result has its dtype.
        """
        coef = coef.astype(x.dtype)
        if self.basis is None:
            return coef * x
        flat, basis = x.reshape(len(x), -1), self.basis.astype(x.dtype)
        if self._complete:
            return (((flat @ basis) * coef) @ basis.T).reshape(x.shape)
        rest = coef[..., -1:]
        out = rest * flat + ((flat @ basis) * (coef - rest)) @ basis.T
        return out.reshape(x.shape)

    @property
    def std(self) -> float:
        """The root of the mean variance over all dimensions."""
        if self.basis is None:
            return float(np.sqrt(np.mean(self.spectrum)))
        size, pairs = self.basis.shape
        return float(np.sqrt((self.spectrum.sum() + (size - pairs) * self.spectrum[-1]) / size))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises `ValueError` unless these are statistics of samples of `shape`, without the batch axis."""
        size = int(np.prod(shape))
        fits = self.basis is None or self.basis.shape[0] == size
        for array in (self.mean, self.spectrum) if self.basis is None else (self.mean,):
            try:
                fits &= np.broadcast_shapes(array.shape, shape) == tuple(shape)
            except ValueError:
                fits = False
        if not fits:
            kind = "variances" if self.basis is None else "eigenvectors"
            given = self.spectrum.shape if self.basis is None else self.basis.shape
            raise ValueError(
                f"statistics of another shape: mean {self.mean.shape} and {kind} {given} for samples {tuple(shape)}; "
                "fit them to data of the samples' own shape, Gaussian.fit(data [N, ...])"
            )

    def _variance(self, level, x):
        """The variance of x at the level in every direction of `spectrum`, and alpha and sigma beside it."""
        like = x if self.basis is None else x.reshape(len(x), -1)
        alpha, sigma = expand(level.alpha, like), expand(level.sigma, like)
        return alpha**2 * self.spectrum.astype(x.dtype) + sigma**2, alpha, sigma

    def denoise(self, x: Array, level: Level) -> Prediction:
        """`E[x0 | x]` and `E[eps | x]`, [B, ...]: finite at alpha = 0, and at sigma = 0 for full rank."""
        variance, alpha, sigma = self._variance(level, x)
        mean = self.mean.astype(x.dtype)
        z = x - expand(level.alpha, x) * mean
        x0 = mean + self.operate(alpha * self.spectrum / variance, z)
        return Prediction(x0, self.operate(sigma / variance, z))

    def score(self, x: Array, level: Level) -> Array:
        """`d log p(x) / dx` at the level, [B, ...]."""
        variance, _, _ = self._variance(level, x)
        return -self.operate(1 / variance, x - expand(level.alpha, x) * self.mean.astype(x.dtype))

    def logpdf(self, x: Array, level: Level) -> Array:
        """`log p(x)` at the level in nats, [B]."""
        variance, _, _ = self._variance(level, x)
        z = x - expand(level.alpha, x) * self.mean.astype(x.dtype)
        size, axes = z[0].size, tuple(range(1, z.ndim))
        if self.basis is None:
            log_det = jnp.sum(jnp.log(jnp.broadcast_to(variance, z.shape)), axis=axes)
        else:
            rest = size - self.basis.shape[1]
            log_det = jnp.sum(jnp.log(variance), axis=-1) + rest * jnp.log(variance[..., -1])
        quadratic = jnp.sum(z * self.operate(1 / variance, z), axis=axes)
        return -0.5 * (quadratic + log_det + size * np.log(2 * np.pi))

    def posterior(self, x: Array, level: Level) -> tuple[Array, Array]:
        """Mean [B, D] and covariance [D, D] of `x0 | x` at one level (scalar fields), for flat data [B, D]."""
        variance, _, sigma = self._variance(level, x)
        return self.denoise(x, level).x0, self.operate(self.spectrum * sigma**2 / variance, jnp.eye(x.shape[1]))

    def flow(self, x: Array, start: Level, end: Level) -> Array:
        """Where the probability-flow ODE carries `x` [B, ...] from `start` to `end`, in closed form."""
        before, after = self._variance(start, x)[0], self._variance(end, x)[0]
        mean = self.mean.astype(x.dtype)
        z = x - expand(start.alpha, x) * mean
        return expand(end.alpha, x) * mean + self.operate(jnp.sqrt(after / before), z)

    def condition(self, A: Array, y: Array, noise_std: float) -> Gaussian:
        """The data given a linear measurement `y = A x0 + noise_std eps`: their posterior, again a `Gaussian`.

        Its own `denoise` is what every method for inverse problems approximates.

        Args:
          A: [M, D], concrete.
          y: [M], concrete.
          noise_std: of the measurement; 0 pins `A x0`.

        Raises:
          ValueError: for other shapes, or without noise for a `y` that no data have or that is certain already.
        """
        cov = np.asarray(self.operate(np.asarray(self.spectrum), np.eye(np.shape(A)[-1])))
        return Gaussian(*_condition(np.broadcast_to(self.mean, np.shape(A)[-1:]), cov, A, y, noise_std)[:2])

    def sample(self, key: jax.Array, n: int) -> Array:
        """Clean data [n, ...] of the shape of the mean (of a diagonal covariance, if that is larger)."""
        shape = np.broadcast_shapes(self.mean.shape, () if self.basis is not None else self.spectrum.shape)
        z = jax.random.normal(key, (n, *shape), jnp.result_type(float))
        return self.mean + self.operate(np.sqrt(self.spectrum), z)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data from a mixture of Gaussians.

    Attributes:
      weights: [K] positive; normalised to sum to one.
      means: [K, D].
      covs: [K, D, D].

    Raises:
      ValueError: for other shapes, a weight that is not positive, or an indefinite covariance.
    """

    weights: np.ndarray
    means: np.ndarray
    covs: np.ndarray

    def __post_init__(self):
        means, variances, bases = _check_covariance(self.means, self.covs)
        weights = np.asarray(self.weights, np.float64)
        if weights.shape != means.shape[:1] or np.any(weights <= 0):
            raise ValueError(f"weights must be positive [{len(means)}], got {weights}")
        object.__setattr__(self, "weights", weights / weights.sum())
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "covs", np.asarray(self.covs, np.float64))
        object.__setattr__(self, "_variances", variances)
        object.__setattr__(self, "_bases", bases)

    def _whiten(self, x, level):
        """Per component: coordinates [B, K, D] of `x - alpha mean` and their variances at the level."""
        alpha, sigma = (expand(a, x[:, None]) for a in (level.alpha, level.sigma))
        z = jnp.einsum("bkd,kde->bke", x[:, None] - alpha * self.means, self._bases)
        return z, jnp.broadcast_to(alpha**2 * self._variances + sigma**2, z.shape)

    def _log_joint(self, x, level):
        z, variance = self._whiten(x, level)
        return np.log(self.weights) - 0.5 * jnp.sum(z**2 / variance + jnp.log(2 * jnp.pi * variance), axis=-1)

    def responsibilities(self, x: Array, level: Level) -> Array:
        """`p(component | x)` at the level, [B, K]: the exact classifier of the mixture's components."""
        return jax.nn.softmax(self._log_joint(x, level), axis=-1)

    def denoise(self, x: Array, level: Level) -> Prediction:
        """`E[x0 | x]` and `E[eps | x]`, [B, D]: finite at alpha = 0, and at sigma = 0 for full-rank components."""
        z, variance = self._whiten(x, level)
        weight = self.responsibilities(x, level)[..., None]
        alpha, sigma = (expand(a, z) for a in (level.alpha, level.sigma))
        x0 = self.means + jnp.einsum("bke,kde->bkd", alpha * self._variances / variance * z, self._bases)
        eps = jnp.einsum("bke,kde->bkd", sigma / variance * z, self._bases)
        return Prediction(jnp.sum(weight * x0, axis=1), jnp.sum(weight * eps, axis=1))

    def score(self, x: Array, level: Level) -> Array:
        """`d log p(x) / dx` at the level, [B, D]."""
        z, variance = self._whiten(x, level)
        per_component = jnp.einsum("bke,kde->bkd", z / variance, self._bases)
        return -jnp.sum(self.responsibilities(x, level)[..., None] * per_component, axis=1)

    def logpdf(self, x: Array, level: Level) -> Array:
        """`log p(x)` at the level in nats, [B]."""
        return jax.nn.logsumexp(self._log_joint(x, level), axis=-1)

    def posterior(self, x: Array, level: Level) -> tuple[Array, Array, Array]:
        """The mixture of `x0 | x` at one level: weights [B, K], means [B, K, D] and covariances [K, D, D]."""
        z, variance = self._whiten(x, level)
        means = self.means + jnp.einsum("bke,kde->bkd", level.alpha * self._variances / variance * z, self._bases)
        shrunk = self._variances * level.sigma**2 / variance[0]
        covs = jnp.einsum("kde,ke,kfe->kdf", self._bases, shrunk, self._bases)
        return self.responsibilities(x, level), means, covs

    def flow(self, x: Array, start: Level, end: Level, *, rtol: float = 1e-10) -> Array:
        """Where the probability-flow ODE carries `x` [B, D], by Dormand-Prince in log-SNR; both levels finite.

        Enable float64 (`jax_enable_x64`) for tolerances below 1e-6. It integrates `y = x / alpha` with
        `dy / d(log s) = s eps`, `s = sigma / alpha`, which is the same for every schedule.
        """

        first, last = (jnp.log(jnp.asarray(level.s, x.dtype)) for level in (start, end))

        def velocity(y, u):  # u runs from 0 to 1, since odeint wants growing times
            s = jnp.exp(first + u * (last - first))
            return (last - first) * s * self.denoise(y, Level(s, jnp.ones_like(s), s)).eps

        return end.alpha * odeint(velocity, x / start.alpha, jnp.array([0.0, 1.0], x.dtype), rtol=rtol, atol=rtol)[-1]

    def condition(self, A: Array, y: Array, noise_std: float) -> Mixture:
        """The data given a linear measurement `y = A x0 + noise_std eps`: each component conditioned and reweighted.

        Args:
          A: [M, D], concrete.
          y: [M], concrete.
          noise_std: of the measurement; 0 pins `A x0`.

        Raises:
          ValueError: for other shapes, or without noise for a `y` that no data have or that is certain already.
        """
        means, covs, evidence = _condition(self.means, self.covs, A, y, noise_std)
        log_weights = np.log(self.weights) + evidence
        # Components keep their order; one that the measurement rules out keeps the smallest weight there is.
        weights = np.maximum(np.exp(log_weights - log_weights.max()), np.finfo(float).tiny)
        return Mixture(weights, means, covs)

    def sample(self, key: jax.Array, n: int) -> tuple[Array, Array]:
        """Clean data [n, D] and the component of each [n] int32."""
        key_component, key_noise = jax.random.split(key)
        component = jax.random.categorical(key_component, jnp.log(self.weights), shape=(n,))
        z = jax.random.normal(key_noise, (n, self.means.shape[1]), jnp.result_type(float))
        scaled = z * jnp.asarray(np.sqrt(self._variances))[component]
        offset = jnp.einsum("bde,be->bd", jnp.asarray(self._bases)[component], scaled)
        return jnp.asarray(self.means)[component] + offset, component


@dataclass(frozen=True, eq=False)
class Empirical:
    """A finite data set as a distribution: its denoiser is the exact minimiser of every denoising loss on that set.

    The lower bound of any network's training loss, and the model that has memorised everything.

    Attributes:
      data: [N, ...].
      labels: [N] integers for the class-conditional denoiser, or None.
    """

    data: np.ndarray
    labels: np.ndarray | None = None

    def denoise(self, x: Array, level: Level, labels: Array | None = None) -> Prediction:
        """The softmax-weighted mean of the data, [B, ...]; with `labels` [B], only over data of that label.

        Needs sigma > 0. Memory is B * N floats.

        Raises:
          ValueError: if `labels` are given and the data set has none.
        """
        flat = jnp.asarray(self.data, x.dtype).reshape(len(self.data), -1)
        y = x.reshape(len(x), -1)
        alpha, sigma = (expand(jnp.asarray(a, x.dtype), y) for a in (level.alpha, level.sigma))
        distance = jnp.sum(y**2, -1, keepdims=True) - 2 * alpha * (y @ flat.T) + alpha**2 * jnp.sum(flat**2, -1)
        logits = -distance / (2 * sigma**2)
        if labels is not None:
            if self.labels is None:
                raise ValueError("labels were given, but this Empirical was made without labels=")
            logits = jnp.where(labels[:, None] == jnp.asarray(self.labels), logits, -jnp.inf)
        x0 = (jax.nn.softmax(logits, axis=-1) @ flat).reshape(x.shape)
        return _split(x0, x, level)
