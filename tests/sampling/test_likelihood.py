"""Likelihoods against closed forms: log-densities, every term of both bounds, bits per dimension."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import diffjax as dj

GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))
MIXTURE = dj.Mixture([1.0, 2.0], [[1.0, 0.0], [-0.6, 0.5]], [[[0.5, 0.1], [0.1, 0.4]], [[0.3, 0.0], [0.0, 0.6]]])
SMOOTHED = dj.Level(np.array(0.0), np.array(1.0), np.array(1e-3))  # the data plus noise of s_min


@pytest.mark.often("flow")
@pytest.mark.parametrize("name", ["edm", "flow"])
def test_the_density_of_a_mixture_is_exact_with_the_exact_prior(name, x64):
    schedule = dj.SCHEDULES[name]()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)) * 0.5)
    common = {"prior_logpdf": MIXTURE.logpdf, "method": "rk23", "rtol": 1e-6, "atol": 1e-6}
    out = jax.jit(lambda x: dj.log_likelihood(MIXTURE.denoise, schedule, x, **common))(x)
    np.testing.assert_allclose(out, jax.jit(MIXTURE.logpdf)(x, SMOOTHED), atol=2e-5)


def test_the_bias_of_the_usual_prior_is_its_misfit(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)) * 0.5)
    end = dj.VP()(np.array(1.0))
    run = jax.jit(lambda x: dj.log_likelihood(GAUSSIAN.denoise, dj.VP(), x, rtol=1e-6, atol=1e-6))

    @jax.jit
    def truth(x):
        start = GAUSSIAN.flow(x, SMOOTHED, end)
        return dj.gaussian_prior()(start, end) - GAUSSIAN.logpdf(start, end), GAUSSIAN.logpdf(x, SMOOTHED)

    misfit, exact = map(np.asarray, truth(x))
    np.testing.assert_allclose(run(x) - exact, misfit, atol=3e-5)
    assert 1e-4 < np.abs(misfit).max() < 0.02  # nats in three dimensions


def test_fixed_steps_are_differentiable_and_exact(x64):
    grid = dj.logsnr(dj.Cosine(), 128, s_min=1e-3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)) * 0.5)

    def logp(x):
        prior = MIXTURE.logpdf
        return dj.log_likelihood(MIXTURE.denoise, dj.Cosine(), x, levels=grid, prior_logpdf=prior, method="rk23")

    gradient, value = jax.jit(jax.grad(lambda x: logp(x).sum())), jax.jit(logp)
    logpdf, score = jax.jit(lambda x: (MIXTURE.logpdf(x, SMOOTHED), MIXTURE.score(x, SMOOTHED)))(x)
    np.testing.assert_allclose(value(x), logpdf, atol=1e-5)
    np.testing.assert_allclose(gradient(x), score, atol=1e-4)


@pytest.mark.slow
def test_hutchinson_is_unbiased():
    # 400 copies of one point, each with probes of its own.
    x = jnp.broadcast_to(jnp.array([0.3, -0.2]), (400, 2))
    grid = dj.logsnr(dj.VP(), 16, s_min=0.1)
    keys = jax.random.split(jax.random.key(0), 400)

    @partial(jax.jit, static_argnums=(0, 1))
    def run(kind, n, keys):
        common = {"levels": grid, "method": "rk23", "divergence": kind, "key": keys, "n_probes": n}
        return dj.log_likelihood(MIXTURE.denoise, dj.VP(), x, **common)

    exact = run("exact", 1, None)[0]
    for kind in ("rademacher", "gaussian"):
        one = run(kind, 1, keys)
        error = one.std() / np.sqrt(400)
        assert error > 1e-4 and abs(one.mean() - exact) < 4 * error
    # Four probes quarter the variance; the relative error of a variance is sqrt(2 / 400) = 7 %, of a ratio 10 %.
    assert abs(run(kind, 4, keys).var() / one.var() - 0.25) < 4 * 0.1 * 0.25
    np.testing.assert_allclose(run(kind, 1, keys[::-1])[::-1], one, rtol=1e-5)  # a sample's noise is its key's


def test_a_run_cut_short_is_not_a_number():
    out = jax.jit(lambda x: dj.log_likelihood(GAUSSIAN.denoise, dj.VP(), x, max_steps=3))(jnp.ones((2, 3)))
    assert bool(jnp.isnan(out).all())


def test_bits_per_dim_of_integer_data():
    # Uniform over the 256 values: 8 bits, with the density 1 / 2 per dimension on [-1, 1].
    np.testing.assert_allclose(dj.bits_per_dim(jnp.full((3,), 5 * np.log(0.5)), (5,)), 8, rtol=1e-6)
    # A density piecewise constant on the bins has exactly the entropy of the integers, whatever the noise.
    p = np.array([0.1, 0.2, 0.3, 0.4])
    ints = jax.random.choice(jax.random.key(0), 4, (1000, 1), p=jnp.asarray(p))
    x = dj.dequantize(ints, jax.random.key(1), levels=4, lo=0.0, hi=2.0)
    bins = np.floor(np.asarray(x) / 0.5).astype(int)
    np.testing.assert_array_equal(bins, ints)
    logp = np.log(p[bins[:, 0]] / 0.5)
    np.testing.assert_allclose(dj.bits_per_dim(logp, (1,), 4, 0.0, 2.0), -np.log2(p[ints[:, 0]]), rtol=1e-5)
    # Uniform within the bin: mean 1/2, standard error sqrt(1 / 12 / 1000).
    assert abs(float(jnp.mean(x / 0.5 - bins)) - 0.5) < 4 * np.sqrt(1 / 12000)


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)
WEIGHTS = WEIGHTS / WEIGHTS.sum()
POINTS = np.array([-0.8, 0.1, 0.9])


def quadrature(x0):
    """Each x0 with every node as its noise, [K * 80, 1], and the average over the nodes."""
    x = jnp.repeat(jnp.asarray(x0)[:, None], len(NODES), axis=0)
    eps = jnp.asarray(np.tile(NODES, len(x0)))[:, None]
    average = lambda a: np.asarray(a).reshape(*a.shape[:-1], len(x0), len(NODES)) @ WEIGHTS
    return x, lambda i: eps, average


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_each_term_of_the_elbo_on_three_points(variance, x64):
    # Data on three points, their exact denoiser, and every KL by numerical integration of the two densities.
    grid = dj.custom(dj.ddpm(), [999, 700, 400, 250])
    x, noise, average = quadrature(POINTS)
    oracle = dj.Empirical(POINTS[:, None])
    out = jax.jit(lambda x: dj.elbo(oracle.denoise, x, grid, variance=variance, prior_std=1.0, noise=noise))(x)

    def x0_hat(x, i):
        w = stats.norm.pdf(x, grid.alpha[i] * POINTS, grid.sigma[i])
        return w @ POINTS / w.sum()

    def posterior(x, x0, i):
        """Bayes' rule: q(x_next | x, x0) from N(alpha' x0, sigma'^2) and the likelihood of x."""
        a = grid.alpha[i] / grid.alpha[i + 1]
        beta = grid.sigma[i] ** 2 - a**2 * grid.sigma[i + 1] ** 2
        precision = 1 / grid.sigma[i + 1] ** 2 + a**2 / beta
        return (grid.alpha[i + 1] * x0 / grid.sigma[i + 1] ** 2 + a * x / beta) / precision, 1 / precision, beta

    def kl(x, x0, i):
        mean, var, beta = posterior(x, x0, i)
        guess = posterior(x, x0_hat(x, i), i)[0]
        q, p = stats.norm(mean, var**0.5), stats.norm(guess, (var if variance == "beta_tilde" else beta) ** 0.5)
        u = np.linspace(mean - 10 * var**0.5, mean + 10 * var**0.5, 2001)
        return integrate.trapezoid(q.pdf(u) * (q.logpdf(u) - p.logpdf(u)), u)

    for i in range(3):
        xs = grid.alpha[i] * POINTS[:, None] + grid.sigma[i] * NODES
        expected = [[kl(x, x0, i) if w > 1e-10 else 0 for x, w in zip(row, WEIGHTS, strict=True)] for x0, row in
                    zip(POINTS, xs, strict=True)]  # fmt: skip
        np.testing.assert_allclose(average(out.steps)[i], np.array(expected) @ WEIGHTS, atol=1e-6)
    # The prior's KL and the decoder from scipy's densities.
    q = stats.norm(grid.alpha[0] * POINTS, grid.sigma[0])
    u = np.linspace(-12, 12, 4001)[:, None]
    np.testing.assert_allclose(
        average(out.prior), integrate.trapezoid(q.pdf(u) * (q.logpdf(u) - stats.norm.logpdf(u)), u, axis=0), atol=1e-6
    )
    xs = grid.alpha[-1] * POINTS[:, None] + grid.sigma[-1] * NODES
    decoded = [
        [-stats.norm.logpdf(x0, x0_hat(x, -1), grid.sigma[-1]) for x in row] for x0, row in zip(POINTS, xs, strict=True)
    ]
    np.testing.assert_allclose(average(out.decoder), np.array(decoded) @ WEIGHTS, atol=1e-6)
    np.testing.assert_allclose(out.total, out.prior + np.sum(out.steps, 0) + out.decoder)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_the_elbo_bounds_the_likelihood_of_its_own_chain(variance, x64):
    # On N(m, v) the chain is linear, so the density of what it generates is a Gaussian known by recursion.
    m, v = 0.3, 0.25
    grid = dj.Level(*(np.append(f, end) for f, end in zip(dj.logsnr(dj.VP(), 20, s_min=0.05), (0, 1, 0), strict=True)))
    x0 = np.array([-0.5, 0.2, 0.3, 1.1])
    x, noise, average = quadrature(x0)
    target = dj.Gaussian(np.array([m]), np.array([[v]]))
    bound = jax.jit(lambda x: dj.elbo(target.denoise, x, grid, variance=variance, prior_std=1.0, noise=noise).total)(x)
    bound = average(bound)
    mean, var = 0.0, 1.0
    for i in range(len(grid.t) - 2):
        (a, s), (a1, s1) = ((grid.alpha[k], grid.sigma[k]) for k in (i, i + 1))
        beta = s**2 - (a / a1 * s1) ** 2
        to_x0, to_x = a1 * beta / s**2, a / a1 * s1**2 / s**2  # Ho et al. 2020, Eq. 7
        gain = a * v / (a**2 * v + s**2)
        mean = to_x * mean + to_x0 * (m + gain * (mean - a * m))
        var = (to_x + to_x0 * gain) ** 2 * var + (beta * s1**2 / s**2 if variance == "beta_tilde" else beta)
    gain = a1 * v / (a1**2 * v + s1**2)
    generated = stats.norm(m + gain * (mean - a1 * m), np.sqrt(gain**2 * var + s1**2))
    assert np.all(bound >= -generated.logpdf(x0)), (bound, -generated.logpdf(x0))
    # And not by much: the chain has 20 steps.
    assert np.all(bound < -generated.logpdf(x0) + 1.5)


def test_the_discretized_decoder_is_a_distribution(x64):
    values = np.linspace(-1, 1, 256)
    level = dj.Level(np.array(0.0), np.array(1.0), np.array(0.01))
    nats = jax.jit(dj.discretized_decoder())(values[:, None], np.full((256, 1), 0.337), level)
    np.testing.assert_allclose(np.exp(-nats).sum(), 1, rtol=1e-10)
    edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    cdf = stats.norm(0.337, 0.01).cdf(edges)
    near = slice(160, 170)
    np.testing.assert_allclose(np.exp(-nats)[near], np.diff(cdf)[near], rtol=1e-8)
    # Far out, where the mass underflows, the nats are still those of the tail.
    far = stats.norm(0.337, 0.01).logsf(values[-1] - 1 / 255)
    np.testing.assert_allclose(-nats[-1], far, rtol=1e-8)
    assert bool(jnp.isfinite(nats).all())


def test_vlb_on_gaussian_data(x64):
    # E|eps - eps_hat|^2 for x0 = c is |gap of the means|^2 of a linear denoiser: integrated by scipy over log-SNR.
    m, v, c = 0.3, 0.25, 0.8
    target, s_min, s_max = dj.Gaussian(np.array([m]), np.array([[v]])), 0.05, 30.0
    x, noise, average = quadrature(np.array([c]))

    def integrand(logsnr):
        a2, s2 = 1 / (1 + np.exp(-logsnr)), 1 / (1 + np.exp(logsnr))
        gap = np.sqrt(s2 / (a2 * v + s2) ** 2)  # eps_hat = gap (x - a m), x = a c + s eps
        return 0.5 * ((1 - gap * np.sqrt(s2)) ** 2 + gap**2 * a2 * (c - m) ** 2)

    exact = integrate.quad(integrand, -2 * np.log(s_max), -2 * np.log(s_min))[0]
    run = jax.jit(
        lambda x, key: dj.vlb(
            target.denoise, dj.VP(), x, key, n_times=64, s_min=s_min, s_max=s_max, noise=noise, prior_std=1.0
        )
    )
    outs = [run(x, key) for key in jax.random.split(jax.random.key(0), 4)]
    estimates = np.array([average(out.steps.mean(0))[0] for out in outs])
    # Each is a mean over 80 weighted nodes with times of their own; stratified over 64, its own error is under 1e-3.
    np.testing.assert_allclose(estimates, exact, rtol=2e-3)
    level = dj.VP().at_logsnr(np.array(-2 * np.log(s_max)))
    closed = -np.log(level.sigma) + (level.sigma**2 + (level.alpha * c) ** 2) / 2 - 0.5
    np.testing.assert_allclose(average(outs[0].prior)[0], closed, rtol=1e-8)
    # The bound is tight on average: over the data, prior + steps is the information between x0 and the latent.
    draws = target.sample(jax.random.key(1), 4000)
    out = jax.jit(
        lambda x, key: dj.vlb(target.denoise, dj.VP(), x, key, n_times=16, s_min=s_min, s_max=s_max, prior_std=1.0)
    )(draws, jax.random.key(2))
    information = np.asarray(out.prior + out.steps.mean(0))
    expected = 0.5 * np.log(1 + v / s_min**2)  # I(x0; latent at s_min), with a prior whose misfit is 1e-6
    assert abs(information.mean() - expected) < 4 * information.std() / np.sqrt(4000)


def test_messages(x64):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="unknown divergence 'trace'; known: exact, rademacher, gaussian"):
        dj.log_likelihood(GAUSSIAN.denoise, dj.VP(), x, divergence="trace")
    with pytest.raises(ValueError, match="pass key="):
        dj.log_likelihood(GAUSSIAN.denoise, dj.VP(), x, divergence="rademacher")
    with pytest.raises(ValueError, match="ends at sigma = 0"):
        dj.log_likelihood(GAUSSIAN.denoise, dj.VP(), x, levels=dj.karras(dj.VP(), 4))
    with pytest.raises(ValueError, match="integers from 0 to 255"):
        dj.dequantize(x, jax.random.key(0))
    with pytest.raises(ValueError, match="unknown variance 'learned'"):
        dj.elbo(GAUSSIAN.denoise, x, dj.karras(dj.VP(), 4), jax.random.key(0), variance="learned")
    with pytest.raises(ValueError, match="either key"):
        dj.elbo(GAUSSIAN.denoise, x, dj.karras(dj.VP(), 4))
    with pytest.raises(ValueError, match="strictly decreasing"):
        dj.elbo(GAUSSIAN.denoise, x, dj.Level(*np.ones((3, 4))), jax.random.key(0))


def test_dequantize_refuses_integers_out_of_range():
    with pytest.raises(ValueError, match="from 0 to 255, got 3 to 300"):
        dj.dequantize(np.array([[3, 300]]), jax.random.key(0))
