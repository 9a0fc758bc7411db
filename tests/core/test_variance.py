"""The terms of the bound with a learned variance, against quadrature, scipy and the posterior of a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from diffjax import core
from diffjax.core.types import Prediction
from diffjax.core.variance import bin_nll, learned_log_variance, log_variances, step_kl

TABLE = core.squared_cosine(50)


def levels(t, step=1):
    return TABLE(np.array([t * 1.0])), TABLE(np.array([t - step * 1.0]))


@pytest.mark.parametrize("t, aux", [(1, -1.0), (10, 0.3), (49, 1.0), (49, -2.0)])
def test_step_kl_is_the_integral_of_its_definition(t, aux, x64):
    level, following = levels(t)
    x, x0, guess = 0.3, 0.8, -0.1

    @jax.jit
    def run(aux, x0, guess):
        log_variance = learned_log_variance(aux, *log_variances(level, following)[::-1])
        return log_variance, step_kl(Prediction(guess, None), x0, log_variance, level, following)

    log_variance, found = map(np.asarray, run(*(np.full((1, 1), a) for a in (aux, x0, guess))))

    # The posterior by Bayes' rule from the forward process alone: x' given x0, then x given x'.
    step = (level.alpha / following.alpha)[0]
    noise = (level.sigma**2 - step**2 * following.sigma**2)[0]

    def posterior(given):
        precision = 1 / following.sigma[0] ** 2 + step**2 / noise
        mean = (following.alpha[0] * given / following.sigma[0] ** 2 + step * x / noise) / precision
        return mean, precision**-0.5

    mean, std = posterior(x0)
    q, p = stats.norm(mean, std), stats.norm(posterior(guess)[0], np.exp(0.5 * float(log_variance[0, 0])))
    definition = lambda y: q.pdf(y) * (q.logpdf(y) - p.logpdf(y))
    expected, _ = integrate.quad(definition, mean - 12 * std, mean + 12 * std, epsabs=1e-13, limit=200)
    assert float(found[0]) == pytest.approx(expected, rel=1e-7, abs=1e-10)
    # Eq. 15 lies between the two variances of the paper's Figure 1.
    if aux == -1.0:
        assert np.exp(log_variance[0, 0]) == pytest.approx(std**2, rel=1e-10)
    if aux == 1.0:
        assert np.exp(log_variance[0, 0]) == pytest.approx(noise, rel=1e-10)


def test_the_mass_of_all_bins_is_one_and_each_is_scipys(x64):
    values = np.linspace(-1, 1, 17)[:, None]
    log_variance = np.full((17, 1), 2 * np.log(0.07))
    nll = lambda log_variance: bin_nll(jnp.full((17, 1), 0.31), values, log_variance, 17)
    mass = np.exp(-np.asarray(jax.jit(nll)(log_variance)))
    edges = np.concatenate([[-np.inf], (values[1:, 0] + values[:-1, 0]) / 2, [np.inf]])
    near = mass > 1e-5  # below, the floor of the log against an infinite gradient
    np.testing.assert_allclose(mass[near], np.diff(stats.norm(0.31, 0.07).cdf(edges))[near], rtol=1e-4)
    assert mass.sum() == pytest.approx(1, rel=1e-4)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(nll(v))))(log_variance)
    assert np.all(np.isfinite(gradient))


def test_the_best_variance_is_that_of_the_reverse_process_of_gaussian_data(x64):
    # x0 ~ N(0, s^2): p(x' | x) = integral q(x' | x, x0) p(x0 | x) is a Gaussian whose variance is that of q and that of
    # its mean under p(x0 | x). There the mean KL has no slope.
    s, n = 0.5, 200_000
    level, following = (core.Level(*(np.full(n, a[0]) for a in b)) for b in levels(20))
    noise, x0 = np.random.default_rng(0).normal(size=(2, n, 1))
    x0 = s * x0
    x = core.add_noise(x0, noise, level)
    mean = jax.jit(lambda x: core.Gaussian(0.0, s**2).denoise(x, core.Level(*(a[:, None] for a in level))))(x)
    spread = s**2 * level.sigma[0] ** 2 / (level.alpha[0] ** 2 * s**2 + level.sigma[0] ** 2)
    r = level.alpha[0] * following.sigma[0] / (following.alpha[0] * level.sigma[0])
    truth = following.sigma[0] ** 2 * (1 - r**2) + (following.alpha[0] * (1 - r**2)) ** 2 * spread
    slope = jax.jit(jax.grad(lambda v: jnp.sum(step_kl(mean, x0, v, level, following))))
    each = np.asarray(slope(np.full((n, 1), np.log(truth))))
    assert abs(each.mean()) < 4 * each.std() / n**0.5
    wrong = np.asarray(slope(np.full((n, 1), np.log(truth) + 0.05)))
    assert wrong.mean() > 8 * each.std() / n**0.5
