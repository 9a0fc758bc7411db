"""Losses at closed-form optima, weights against their papers, time samplers against their distributions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffjax import core, registry

GAUSSIAN = core.Gaussian(np.array([0.5, -0.5, 0.0]), np.diag([1.0, 0.25, 0.04]))


def optimal(head, level):
    """The network that outputs E[target | x] for Gaussian data, in the coordinates that it sees."""

    def f(x, t):
        noisy = x / head.scale_in(level)[:, None]
        prediction = GAUSSIAN.denoise(noisy, level)
        return head.target(prediction.x0, prediction.eps, level)

    return f


@pytest.mark.parametrize("name", core.HEADS)
def test_loss_at_the_optimum_is_the_posterior_variance(name, x64):
    # E|eps - E[eps|x]|^2 = tr(posterior cov of x0) (alpha / sigma)^2; each head scales it by its own linear factor.
    head = core.HEADS[name]()
    n = 100_000
    level = core.VP().at_logsnr(np.full((n,), 1.0))

    @jax.jit
    def both(key_x0, key):
        x0, best = GAUSSIAN.sample(key_x0, n), optimal(head, level)
        return [core.loss(f, head, x0, level, key=key) for f in (best, lambda x, t: best(x, t) + 0.3)]

    losses, worse = map(np.asarray, both(jax.random.key(0), jax.random.key(1)))
    variances = np.diag(GAUSSIAN.cov)
    one = core.VP().at_logsnr(np.array([1.0]))
    posterior = variances * one.sigma**2 / (one.alpha**2 * variances + one.sigma**2)
    # A unit change of x0 at fixed x changes eps by -alpha / sigma, and the target linearly.
    factor = head.target(np.ones((1, 3)), -np.ones((1, 3)) * one.alpha / one.sigma, one)[0, 0]
    floor = factor**2 * posterior.mean()
    error = losses.std() / np.sqrt(n)
    assert abs(losses.mean() - floor) < 4 * error
    # And no other output does better: a perturbed optimum is worse by the square of the perturbation.
    assert abs(worse.mean() - losses.mean() - 0.09) < 4 * (worse - losses).std() / np.sqrt(n)


@pytest.mark.parametrize("name", core.HEADS)
def test_weighted_loss_does_not_depend_on_the_head(name, x64):
    level = core.VP().at_logsnr(np.array([-3.0, 0.0, 4.0]))
    x0, eps = jax.random.normal(jax.random.key(0), (2, 3, 3))
    head = core.HEADS[name]()

    @partial(jax.jit, static_argnums=0)
    def losses(head):
        return core.loss(optimal(head, level), head, x0, level, eps=eps, weight=core.WEIGHTS["min_snr"](5.0))

    np.testing.assert_allclose(losses(head), losses(core.EPS), rtol=1e-10)


def test_space_measures_in_another_head(x64):
    level = core.Flow()(jnp.array([0.2, 0.9]))
    x0, eps = jax.random.normal(jax.random.key(0), (2, 2, 3))
    got = core.loss(lambda x, t: x * 0, core.X0, x0, level, eps=eps, space=core.FLOW)
    # x0_hat = 0 means eps_hat = x / sigma, so the error of eps - x0 is x0 (1 + alpha / sigma).
    sigma = np.array([0.2, 0.9])
    np.testing.assert_allclose(got, np.mean((x0 * (1 + (1 - sigma) / sigma)[:, None]) ** 2, axis=1), rtol=1e-10)


def test_weights_against_their_papers():
    snr = np.array([0.01, 1.0, 5.0, 400.0])
    level = core.VP().at_logsnr(np.float32(np.log(snr)))
    np.testing.assert_allclose(core.WEIGHTS["min_snr"](5.0)(level), np.minimum(snr, 5) / snr, rtol=1e-4)
    np.testing.assert_allclose(core.WEIGHTS["p2"](1.0, 0.5)(level), (1 + snr) ** -0.5, rtol=1e-4)
    # EDM states lambda(sigma) for the error of x0, which is s^2 times that of eps.
    s = snr**-0.5
    np.testing.assert_allclose(core.WEIGHTS["edm"](0.5)(level), (s**2 + 0.25) / (s * 0.5) ** 2 * s**2, rtol=1e-4)
    linear = core.LinearLogSNR(-10, 10)  # its log-SNR falls by 20 over unit time
    np.testing.assert_allclose(core.WEIGHTS["elbo"](linear)(level), 10.0, rtol=1e-5)
    np.testing.assert_allclose(core.WEIGHTS["sigmoid"](linear, 2.0)(level), 10 / (1 + snr * np.exp(-2)), rtol=1e-4)


def test_elbo_weight_gives_the_likelihood_of_a_gaussian(x64):
    # Over infinite log-SNR the continuous VLB of the exact denoiser is the entropy in excess of the prior's KL and the
    # reconstruction term; for N(0, v) it is known: 1/2 * integral of mmse over SNR = 1/2 log(1 + v SNR_max) (I-MMSE).
    v, schedule = 0.5, core.LinearLogSNR(-14, 6)
    t = np.linspace(0, 1, 20001)
    level = schedule(t)
    eps_mmse = level.alpha**2 * v / (level.alpha**2 * v + level.sigma**2)
    weight = core.WEIGHTS["elbo"](schedule)(core.Level(*(jnp.asarray(a) for a in level)))
    vlb = np.trapezoid(np.asarray(weight) * eps_mmse, t)
    expected = 0.5 * (np.log1p(v * np.exp(6)) - np.log1p(v * np.exp(-14)))
    np.testing.assert_allclose(vlb, expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("times", "cdf"),
    [
        (core.TIMES["uniform"](0.0, 2.0), stats.uniform(0, 2).cdf),
        (core.TIMES["stratified"](), stats.uniform(0, 1).cdf),
        (core.TIMES["antithetic"](), stats.uniform(0, 1).cdf),
        (core.TIMES["logit_normal"](0.5, 0.7), lambda t: stats.norm(0.5, 0.7).cdf(np.log(t / (1 - t)))),
        (core.TIMES["lognormal"](-1.2, 1.2), lambda s: stats.norm(-1.2, 1.2).cdf(np.log(s))),
    ],
)
def test_times_have_their_distribution(times, cdf):
    t = np.asarray(times(jax.random.key(3), 4001), np.float64)
    assert t.shape == (4001,) and np.all(t > 0)
    assert stats.kstest(t, cdf).pvalue > 1e-4  # one seed: fails for one honest sampler in 10,000


@pytest.mark.parametrize("spec", ["uniform(lo=1., hi=0.)", "lognormal(std=-1.)", "lognormal(mean='a')", "discrete(0)"])
def test_impossible_times(spec):
    with pytest.raises(ValueError, match="times: expected"):
        registry.build(spec, core.TIMES, "time sampler")


def test_low_discrepancy():
    t = np.sort(core.TIMES["stratified"]()(jax.random.key(0), 64))
    np.testing.assert_allclose(np.diff(t), 1 / 64, atol=1e-6)
    t = core.TIMES["antithetic"]()(jax.random.key(0), 64)
    np.testing.assert_allclose(t[:32] + t[32:], 1, atol=1e-6)
    t = core.TIMES["discrete"](10)(jax.random.key(0), 1000)
    assert set(np.asarray(t)) == set(range(10))


def test_loss_is_unreduced_float32_and_checks_shapes():
    x0 = jnp.ones((4, 2, 2), jnp.bfloat16)
    level = core.VP()(jnp.full((4,), 0.5))
    got = jax.jit(lambda x0, key: core.loss(lambda x, t: x, core.V, x0, level, key=key))(x0, jax.random.key(0))
    assert got.shape == (4,) and got.dtype == jnp.float32
    with pytest.raises(ValueError, match="either key"):
        core.loss(lambda x, t: x, core.V, x0, level)
    with pytest.raises(ValueError, match=r"\[B\] = \(4,\)"):
        core.loss(lambda x, t: x, core.V, x0, core.VP()(jnp.array(0.5)), key=jax.random.key(0))
    with pytest.raises(ValueError, match="must be equal"):
        core.loss(lambda x, t: x[:2], core.V, x0, level, key=jax.random.key(0))


@pytest.mark.parametrize(
    "weight, of_x0",
    [("truncated_snr()", lambda snr: np.maximum(snr, 1)), ("min_snr(gamma=5.0)", lambda snr: np.minimum(snr, 5))],
)
def test_weights_that_papers_state_for_x0_are_restated_for_eps(weight, of_x0, x64):
    # The same network and noise: an error of x0 is (sigma / alpha) times that of eps.
    n, head = 64, core.V
    level = core.VP().at_logsnr(np.linspace(-6, 6, n))
    x0, eps = jax.random.normal(jax.random.key(0), (2, n, 3))
    loss = partial(core.loss, lambda x, t: jnp.sin(3 * x), head, x0, level, eps=eps)
    by_weight = jax.jit(lambda: loss(weight=registry.build(weight, core.WEIGHTS, "weight")))()
    of_error = jax.jit(lambda: loss(space=core.X0))()
    np.testing.assert_allclose(by_weight, of_x0(np.exp(level.logsnr)) * of_error, rtol=1e-9)


def test_debiased_weight_is_one_over_the_root_of_the_snr():
    level = core.Flow()(np.array([0.2, 0.5]))
    np.testing.assert_allclose(core.WEIGHTS["debiased"]()(level), np.exp(-level.logsnr / 2))


@pytest.mark.parametrize(
    "spec, cdf",
    [
        # cosmap on Flow is the cosine schedule: logsnr = -2 log tan(pi u / 2), so u = atan(t / (1 - t)) 2 / pi.
        ("cosmap()", lambda t: 2 / np.pi * np.arctan2(t, 1 - t)),
        ("beta(a=2.0, b=3.0)", stats.beta(2, 3).cdf),
        ("mode(scale=0.0)", lambda t: t),
        # The map is decreasing in u; its inverse is read off a table of it.
        ("mode(scale=1.29)", lambda t: 1 - np.interp(t, *mode_table(1.29))),
        ("mode(scale=-0.8)", lambda t: 1 - np.interp(t, *mode_table(-0.8))),
    ],
)
def test_times_have_the_distribution_of_the_paper(spec, cdf):
    t = np.asarray(registry.build(spec, core.TIMES, "times")(jax.random.key(0), 20_000))
    assert t.shape == (20_000,) and t.dtype == np.float32 and t.min() >= 0 and t.max() <= 1
    assert stats.kstest(t, cdf).pvalue > 1e-3


def mode_table(scale):
    u = np.linspace(1, 0, 20_001)
    return 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u), u


@pytest.mark.parametrize("spec", ["mode(scale=2.0)", "mode(scale=-1.5)", "beta(a=0.0)"])
def test_time_samplers_refuse_what_is_no_distribution(spec):
    with pytest.raises(ValueError, match="times"):
        registry.build(spec, core.TIMES, "times")


def test_loss_gives_the_prediction_that_it_measured():
    level = core.Flow()(jnp.array([0.3, 0.8]))
    x0, eps = jax.random.normal(jax.random.key(0), (2, 2, 5))
    losses, prediction = core.loss(lambda x, t: (2 * x, "aux"), core.V, x0, level, eps=eps, predict=True)
    assert prediction.aux == "aux"
    np.testing.assert_array_equal(losses, core.loss(lambda x, t: 2 * x, core.V, x0, level, eps=eps))
    x = core.add_noise(x0, eps, level)
    np.testing.assert_allclose(core.add_noise(prediction.x0, prediction.eps, level), x, rtol=1e-5, atol=1e-6)
