"""Exact denoisers against scipy, Monte Carlo-free identities and each other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from diffjax import core

MEAN = np.array([0.5, -0.2])
COV = np.array([[1.0, 0.3], [0.3, 0.2]])
GAUSSIAN = core.Gaussian(MEAN, COV)
MIXTURE = core.Mixture(
    [1.0, 2.0, 0.5], [[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], [0.1 * COV, 0.05 * np.eye(2), 0.2 * COV]
)
SCHEDULES = [core.VP(), core.VE(), core.Flow(), core.Cosine()]


def points(n=6):
    return jnp.asarray(np.random.default_rng(0).normal(size=(n, 2)))


def denoised(oracle, *given):
    return np.asarray(jax.jit(oracle.denoise)(*given).x0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logpdf_is_scipys(schedule, x64):
    level = schedule(np.array(0.3))
    x = points()
    noisy = stats.multivariate_normal(level.alpha * MEAN, level.alpha**2 * COV + level.sigma**2 * np.eye(2))
    gaussian, mixture = jax.jit(lambda x: (GAUSSIAN.logpdf(x, level), MIXTURE.logpdf(x, level)))(x)
    np.testing.assert_allclose(gaussian, noisy.logpdf(x), rtol=1e-10)
    density = sum(
        w * stats.multivariate_normal(level.alpha * m, level.alpha**2 * c + level.sigma**2 * np.eye(2)).pdf(x)
        for w, m, c in zip(MIXTURE.weights, MIXTURE.means, MIXTURE.covs, strict=True)
    )
    np.testing.assert_allclose(mixture, np.log(density), rtol=1e-9)


@pytest.mark.parametrize("oracle", [GAUSSIAN, MIXTURE])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_score_is_the_gradient_and_halves_add_up(oracle, schedule, x64):
    level = schedule(np.array(0.4))
    x = points()
    gradient = jax.jit(jax.grad(lambda x: oracle.logpdf(x, level).sum()))(x)
    score, prediction = jax.jit(lambda x: (oracle.score(x, level), oracle.denoise(x, level)))(x)
    np.testing.assert_allclose(score, gradient, rtol=1e-9)
    np.testing.assert_allclose(prediction.eps, -level.sigma * gradient, rtol=1e-9, atol=1e-12)  # Tweedie
    np.testing.assert_allclose(level.alpha * prediction.x0 + level.sigma * prediction.eps, x, rtol=1e-9)


def test_mixture_posterior_mean_by_quadrature(x64):
    oracle = core.Mixture([1.0, 3.0], [[-1.0], [0.5]], [[[0.2]], [[0.05]]])
    level = core.VP()(np.array(0.35))

    logpdf = jax.jit(lambda x0: oracle.logpdf(x0, core.VP()(np.array(0.0))))

    def joint(x0, x):
        noise = np.exp(-(((x - level.alpha * x0) / level.sigma) ** 2) / 2) / (level.sigma * np.sqrt(2 * np.pi))
        return np.exp(logpdf(np.array([[x0]]))[0]) * noise

    half = jax.jit(lambda x: (oracle.denoise(x, level).x0, *oracle.posterior(x, level)))
    for x in (-1.0, 0.1):
        x0, weights, means, covs = map(np.asarray, half(np.array([[x]])))
        z = integrate.quad(joint, -5, 5, args=(x,), epsabs=1e-10)[0]
        mean = integrate.quad(lambda x0, x=x: x0 * joint(x0, x), -5, 5, epsabs=1e-10)[0] / z
        np.testing.assert_allclose(x0[0, 0], mean, atol=1e-7)
        np.testing.assert_allclose(np.sum(weights * means[..., 0]), mean, atol=1e-7)
        second = integrate.quad(lambda x0, x=x: x0**2 * joint(x0, x), -5, 5, epsabs=1e-10)[0] / z
        np.testing.assert_allclose(np.sum(weights[0] * (covs[:, 0, 0] + means[0, :, 0] ** 2)), second, atol=1e-7)


@pytest.mark.parametrize("start,end", [(0.9, 0.0), (0.9, 0.2), (0.1, 0.8)])
def test_gaussian_flow_carries_the_density(start, end, x64):
    # Change of variables: log p_end(flow(x)) + log |d flow / dx| = log p_start(x), for every x.
    start, end = (core.VP()(np.array(t)) for t in (start, end))
    flow = lambda x: GAUSSIAN.flow(x[None], start, end)[0]

    @jax.jit
    def densities(x):
        logdet = jax.vmap(lambda x: jnp.linalg.slogdet(jax.jacfwd(flow)(x))[1])(x)
        return GAUSSIAN.logpdf(GAUSSIAN.flow(x, start, end), end) + logdet, GAUSSIAN.logpdf(x, start)

    np.testing.assert_allclose(*densities(points()), rtol=1e-9)


def test_mixture_flow_of_one_component_is_the_closed_form(x64):
    one = core.Mixture([1.0], [MEAN], [COV])
    start, end = core.VP()(np.array(0.9)), core.VP()(np.array(0.05))
    x = points()
    np.testing.assert_allclose(one.flow(x, start, end), GAUSSIAN.flow(x, start, end), rtol=1e-7)


def test_mixture_flow_carries_the_density(x64):
    start, end = core.Flow()(np.array(0.7)), core.Flow()(np.array(0.2))
    x = points(3)
    h = 1e-5
    flow = jax.jit(lambda x: MIXTURE.flow(x, start, end))
    columns = [np.asarray(flow(x + h * e) - flow(x - h * e)) / (2 * h) for e in np.eye(2)]
    logdet = np.linalg.slogdet(np.stack(columns, axis=-1))[1]
    logpdf = jax.jit(MIXTURE.logpdf)
    # Central differences of a flow solved to 1e-10 with step 1e-5 leave 1e-5.
    np.testing.assert_allclose(logpdf(flow(x), end) + logdet, logpdf(x, start), atol=1e-4)


def test_gaussian_posterior_is_the_schur_complement(x64):
    level = core.VP()(np.array(0.3))
    a, s = level.alpha, level.sigma
    gain = a * COV @ np.linalg.inv(a**2 * COV + s**2 * np.eye(2))
    mean, cov = jax.jit(GAUSSIAN.posterior)(points(), level)
    np.testing.assert_allclose(mean, MEAN + (np.asarray(points()) - a * MEAN) @ gain.T, rtol=1e-10)
    np.testing.assert_allclose(cov, COV - a * gain @ COV, rtol=1e-9)


def test_samples_have_the_moments():
    n = 40_000
    x = np.asarray(GAUSSIAN.sample(jax.random.key(0), n))
    np.testing.assert_allclose(x.mean(0), MEAN, atol=5 / np.sqrt(n))  # std is at most 1
    np.testing.assert_allclose(np.cov(x.T), COV, atol=5 * np.sqrt(2 / n))
    x, component = MIXTURE.sample(jax.random.key(0), n)
    np.testing.assert_allclose(np.bincount(component) / n, MIXTURE.weights, atol=5 * 0.5 / np.sqrt(n))
    np.testing.assert_allclose(np.asarray(x).mean(0), MIXTURE.weights @ MIXTURE.means, atol=5 / np.sqrt(n))


def test_empirical_denoiser_is_a_mixture_of_points(x64):
    data = np.random.default_rng(1).normal(size=(5, 2))
    labels = np.array([0, 1, 0, 1, 1])
    points_ = core.Mixture(np.ones(5), data, np.zeros((5, 2, 2)))
    x, level = points(), core.VP()(np.array(0.3))
    empirical = core.Empirical(data, labels)
    np.testing.assert_allclose(denoised(empirical, x, level), denoised(points_, x, level), rtol=1e-9)
    of_class = core.Mixture(np.ones(3), data[labels == 1], np.zeros((3, 2, 2)))
    got = denoised(empirical, x, level, jnp.ones(len(x), int))
    np.testing.assert_allclose(got, denoised(of_class, x, level), rtol=1e-9)
    # One level per sample, images: each row is that sample alone.
    images = core.Empirical(data.reshape(5, 2, 1))
    levels = core.VP()(np.linspace(0.1, 0.9, len(x)))
    one = jax.jit(lambda x, level: empirical.denoise(x, level).x0)
    rows = [one(x[i : i + 1], levels.at(slice(i, i + 1))) for i in range(len(x))]
    np.testing.assert_allclose(denoised(images, x[..., None], levels)[..., 0], np.concatenate(rows), rtol=1e-9)


def test_messages():
    with pytest.raises(ValueError, match="symmetric"):
        core.Gaussian(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="semi-definite"):
        core.Gaussian(np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="weights must be positive"):
        core.Mixture([1.0, 0.0], np.zeros((2, 1)), np.ones((2, 1, 1)))
    with pytest.raises(ValueError, match="without labels"):
        core.Empirical(np.zeros((2, 1))).denoise(jnp.zeros((1, 1)), core.VP()(np.array(0.5)), jnp.zeros(1, int))


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full", "rank"])
def test_every_form_of_covariance_is_the_dense_one(kind, x64):
    # Four ways to write a covariance, each against the [D, D] form of the same Gaussian, on image-shaped data.
    rng = np.random.default_rng(0)
    shape, mean = (2, 3, 1), rng.normal(size=(2, 3, 1))
    vectors = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    values = np.array([0.1, 0.2, 0.9, 0.1, 0.5, 0.3])
    cov, dense = {
        "scalar": (0.3, 0.3 * np.eye(6)),
        "diagonal": (values.reshape(shape), np.diag(values)),
        "full": ((values, vectors), vectors * values @ vectors.T),
        # In any order; the direction left out has the smallest variance of those given.
        "rank": ((values[1:], vectors[:, 1:]), vectors * values @ vectors.T),
    }[kind]
    short, full = core.Gaussian(mean, cov), core.Gaussian(mean.ravel(), dense)
    x = jnp.asarray(rng.normal(size=(4, *shape)))
    flat = x.reshape(4, 6)
    end = core.EDM()(np.array(0.1))

    @partial(jax.jit, static_argnums=0)
    def answers(oracle, x, level):
        of_x = *oracle.denoise(x, level)[:2], oracle.score(x, level), oracle.flow(x, level, end)
        return [answer.reshape(4, 6) for answer in of_x], oracle.logpdf(x, level)

    for level in (core.VP()(np.array(0.4)), core.Flow()(np.array(1.0)), core.Flow()(np.linspace(0.1, 0.9, 4))):
        (*ours, moved), logpdf = answers(short, x, level)
        (*theirs, end_moved), full_logpdf = answers(full, flat, level)
        for a, b, atol in zip(ours, theirs, (1e-12, 1e-12, 1e-11), strict=True):
            np.testing.assert_allclose(a, b, atol=atol)
        np.testing.assert_allclose(moved, end_moved, atol=1e-11)
        np.testing.assert_allclose(logpdf, full_logpdf, atol=1e-11)


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "full"])
def test_fit_finds_the_moments_of_the_data(kind):
    data = np.random.default_rng(0).normal(size=(200, 3, 2)) * np.array([[1.0], [0.5], [0.1]])
    fitted = core.Gaussian.fit(data, kind)
    flat = data.reshape(200, 6)
    cov = np.cov(flat.T, bias=True)
    expected = {"scalar": np.trace(cov) / 6 * np.eye(6), "diagonal": np.diag(np.diag(cov)), "full": cov}[kind]
    np.testing.assert_allclose(
        fitted.operate(fitted.spectrum, jnp.eye(6).reshape(6, 3, 2)).reshape(6, 6), expected, atol=1e-5
    )
    np.testing.assert_allclose(fitted.mean, data.mean(0))


@pytest.mark.parametrize("rank", [3, 7])
def test_fit_of_low_rank_keeps_the_total_variance(rank):
    data = np.random.default_rng(0).normal(size=(500, 8)) * np.geomspace(1, 0.1, 8)
    fitted = core.Gaussian.fit(data, "full", rank=rank)
    kept = np.linalg.eigvalsh(np.cov(data.T, bias=True))[::-1]
    cov = np.asarray(fitted.operate(fitted.spectrum, jnp.eye(8)))
    np.testing.assert_allclose(
        np.linalg.eigvalsh(cov)[::-1], [*kept[:rank], *[kept[rank:].mean()] * (8 - rank)], rtol=1e-4
    )
    with pytest.raises(ValueError, match="'scalar', 'diagonal' or 'full', got 'pca'"):
        core.Gaussian.fit(data, "pca")
    with pytest.raises(ValueError, match="rank: expected 1 to 8"):
        core.Gaussian.fit(data, "full", rank=0)
    with pytest.raises(ValueError, match=r"mean \(8,\) and eigenvectors \(8, 4\) for samples \(2, 4\)"):
        core.Gaussian.fit(data, "full", rank=3).check((2, 4))
    with pytest.raises(ValueError, match="orthonormal"):
        core.Gaussian(0.0, (np.ones(2), np.ones((8, 2))))
    with pytest.raises(ValueError, match="variances >= 0"):
        core.Gaussian(0.0, -1.0)
