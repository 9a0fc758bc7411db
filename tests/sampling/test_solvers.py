"""Solvers against exact probability flows: order of convergence, identities, endpoints, stochastic moments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj
from diffjax.core.types import Level, Prediction, Step

SCHEDULES = {name: make() for name, make in dj.SCHEDULES.items()}
GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))
DETERMINISTIC = {
    "euler": dj.euler,
    "heun(alpha)": partial(dj.heun, "alpha"),
    "heun(sigma)": partial(dj.heun, "sigma"),
    "heun(sum)": dj.heun,
    "dpmpp_2m": dj.dpmpp_2m,
}


def padded(grid, n):
    """The grid with its last level repeated until it has n steps, as jax arrays."""
    return Level(*(jnp.asarray(np.pad(field, (0, n + 1 - len(field)), mode="edge")) for field in grid))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_on_every_schedule(name, x64):
    solver = DETERMINISTIC[name]()
    steps = (32, 64, 128)
    # One compilation for all schedules and lengths: the grid is an argument, shorter ones are padded.
    run = jax.jit(lambda x, levels: dj.sample(solver, GAUSSIAN.denoise, x, levels))
    flow = jax.jit(GAUSSIAN.flow)
    x = np.random.default_rng(0).normal(size=(16, 3))
    for label, schedule in SCHEDULES.items():
        errors = []
        for n in steps:
            # Uniform in log-SNR between finite levels is smooth in the variable of every one of these solvers; the
            # levels come from the schedule's own formula at those times, so a wrong one would show.
            grid = dj.custom(schedule, schedule.time(dj.logsnr(schedule, n, s_min=0.1, s_max=10.0).logsnr))
            start = x * np.hypot(grid.alpha[0], grid.sigma[0])
            exact = flow(start, grid.at(0), grid.at(-1))
            errors.append(np.sqrt(np.mean(np.subtract(run(start, padded(grid, steps[-1])), exact) ** 2)))
        slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert abs(slope - solver.order) < 0.2, f"{label}: order {slope:.3f}, errors {errors}"


@pytest.mark.often("flow-*", "*-dpmpp_2m", "edm-heun(sigma)", "vp-euler")
@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("schedule", ["flow", "cosine", "edm", "vp"])
def test_whole_range_converges_to_the_data(name, schedule, x64):
    # From the schedule's own start (alpha = 0 for flow and cosine) to sigma = 0.
    made = SCHEDULES[schedule]
    grid = dj.karras(made, 200) if schedule == "edm" else dj.uniform(made, 400)
    std = np.sqrt(np.diag(GAUSSIAN.cov))

    @jax.jit
    def run(key):
        x = dj.prior(key, (2000, 3), grid, mean=GAUSSIAN.mean, std=std)
        return dj.sample(DETERMINISTIC[name](), GAUSSIAN.denoise, x, grid)

    out = np.asarray(run(jax.random.key(1)))
    # The exact prior through an exact flow gives the exact data; 400 first-order steps leave 2 % of the std, and 2,000
    # samples a standard error of 1.6 % of it: five of those.
    np.testing.assert_allclose(out.std(axis=0) / std, 1, atol=0.10)
    np.testing.assert_allclose((out.mean(axis=0) - GAUSSIAN.mean) / std, 0, atol=0.12)


def test_euler_is_the_same_in_every_gauge(x64):
    level, following = dj.VP()(np.array(0.7)), dj.VP()(np.array(0.5))
    x = np.random.default_rng(0).normal(size=(4, 3))
    step = lambda x: dj.euler().step(GAUSSIAN.denoise, x, (), Step(0, level, following, (), None))[0]
    p, ours = jax.tree.map(np.asarray, jax.jit(lambda x: (GAUSSIAN.denoise(x, level), step(x)))(x))
    for gauge in (
        lambda v: v.alpha,
        lambda v: v.sigma,
        lambda v: v.alpha + v.sigma,
        lambda v: np.hypot(v.alpha, v.sigma),
    ):
        m, m1 = gauge(level), gauge(following)
        stepped = (
            x / m + p.x0 * (following.alpha / m1 - level.alpha / m) + p.eps * (following.sigma / m1 - level.sigma / m)
        )
        np.testing.assert_allclose(ours, m1 * stepped, rtol=1e-10)


def test_ddim_one_has_the_moments_of_the_ddpm_posterior(x64):
    # Ho et al. 2020, Eq. 7, with the table's own betas.
    betas = dj.linear_betas(1000)
    bar = np.cumprod(1 - betas)
    t = 600
    table = dj.Table(bar)
    grid = dj.custom(table, [t, t - 1])
    x0, x = 0.7, -0.4
    mean = (
        np.sqrt(bar[t - 1]) * betas[t] / (1 - bar[t]) * x0 + np.sqrt(1 - betas[t]) * (1 - bar[t - 1]) / (1 - bar[t]) * x
    )
    variance = (1 - bar[t - 1]) / (1 - bar[t]) * betas[t]

    def denoise(x, level):
        return Prediction(jnp.full_like(x, x0), (x - level.alpha * x0) / level.sigma)

    run = jax.jit(lambda x, noise: dj.sample(dj.ddim(1.0), denoise, x, grid, noise=lambda i, j: noise))
    at_zero, at_one = (np.asarray(run(np.full((1, 1), x), noise)) for noise in (np.zeros((1, 1)), np.ones((1, 1))))
    np.testing.assert_allclose(at_zero[0, 0], mean, rtol=1e-8)
    np.testing.assert_allclose((at_one - at_zero)[0, 0] ** 2, variance, rtol=1e-8)


def ddim_std(grid, variances, eta):
    """The std at the end of the DDIM chain on Gaussian data: each step is linear, so variances obey a recursion."""
    var = grid.alpha[0] ** 2 * variances + grid.sigma[0] ** 2
    for i in range(len(grid.t) - 1):
        (a, s), (a1, s1) = ((grid.alpha[k], grid.sigma[k]) for k in (i, i + 1))
        # Song et al. 2021, Eq. 16 in alpha_bar = alpha^2, for x / alpha where alpha^2 + sigma^2 is not 1.
        drawn = eta * s1 * np.sqrt(1 - (a * s1 / (a1 * s)) ** 2)
        gain = (a1 * a * variances + np.sqrt(s1**2 - drawn**2) * s) / (a**2 * variances + s**2)
        var = gain**2 * var + drawn**2
    return np.sqrt(var)


@pytest.mark.often("flow-0.3", "vp-1.0", "edm-1.0")
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
def test_stochastic_ddim_has_the_moments_of_its_chain(eta, schedule):
    grid = dj.karras(SCHEDULES[schedule], 60)
    n = 10_000
    variances = np.diag(GAUSSIAN.cov)
    std = np.sqrt(variances)

    @jax.jit
    def run(start, key):
        x = dj.prior(start, (n, 3), grid, mean=GAUSSIAN.mean, std=std)
        return dj.sample(dj.ddim(eta), GAUSSIAN.denoise, x, grid, key)

    out = np.asarray(run(jax.random.key(1), jax.random.key(2)))
    expected = ddim_std(grid, variances, eta)
    # Standard errors: 1 / sqrt(2 n) = .7 % of a std and 1 / sqrt(n) = 1 % of it for a mean; five of each.
    np.testing.assert_allclose(out.std(axis=0) / expected, 1, atol=5 * 0.007)
    np.testing.assert_allclose((out.mean(axis=0) - GAUSSIAN.mean) / std, 0, atol=5 * 0.01)
    # And the chain approaches the data as the steps shrink.
    finer = ddim_std(dj.karras(SCHEDULES[schedule], 2000), variances, eta)
    np.testing.assert_allclose(finer, std, rtol=0.01)


@pytest.mark.often("vp")
@pytest.mark.parametrize("schedule", ["edm", "vp"])
def test_churn_keeps_the_marginals(schedule):
    made = SCHEDULES[schedule]
    grid = dj.karras(made, 60)
    n = 4000
    std = np.sqrt(np.diag(GAUSSIAN.cov))
    x = jax.jit(lambda key: dj.prior(key, (n, 3), grid, mean=GAUSSIAN.mean, std=std))(jax.random.key(1))
    solver = dj.churn(dj.heun("alpha"), made, s_churn=20.0, s_tmin=0.01, s_tmax=50.0, s_noise=1.0)
    run = jax.jit(lambda x, levels, key: dj.sample(solver, GAUSSIAN.denoise, x, levels, key))
    out = np.asarray(run(x, grid, jax.random.key(2)))
    np.testing.assert_allclose(out.std(axis=0) / std, 1, atol=0.01 + 5 * 0.011)
    np.testing.assert_allclose((out.mean(axis=0) - GAUSSIAN.mean) / std, 0, atol=5 / np.sqrt(n) + 0.01)
    # Traced and concrete grids build their tables by two routes; they must agree to float32.
    concrete = jax.jit(lambda x, key: dj.sample(solver, GAUSSIAN.denoise, x, grid, key))(x, jax.random.key(2))
    np.testing.assert_allclose(out, concrete, atol=2e-4)


def test_churn_zero_is_the_inner_solver(x64):
    grid = dj.karras(dj.EDM(), 12)
    x = np.random.default_rng(1).normal(size=(5, 3)) * grid.sigma[0]
    solvers = dj.churn(dj.heun("alpha"), dj.EDM(), s_churn=0.0), dj.heun("alpha")
    run = jax.jit(lambda x, key: [dj.sample(solver, GAUSSIAN.denoise, x, grid, key) for solver in solvers])
    np.testing.assert_allclose(*run(x, jax.random.key(0)), rtol=1e-12)


def test_churn_raises_the_level_as_in_algorithm_2(x64):
    # One step from sigma 2, n = 1, gamma = sqrt(2) - 1, with a denoiser that records where it is called.
    grid = dj.Level(np.log([2.0, 1.0]) / 4, np.ones(2), np.array([2.0, 1.0]))
    seen = []

    def denoise(x, level):
        seen.append((level.sigma, x))
        return Prediction(x * 0, x / level.sigma)

    solver = dj.churn(dj.euler(), dj.EDM(), s_churn=100.0, s_noise=1.0)
    dj.sample(solver, denoise, jnp.zeros((1, 1)), grid, noise=lambda i, j: jnp.ones((1, 1)), loop="unroll")
    np.testing.assert_allclose(seen[0][0], 2 * np.sqrt(2))
    np.testing.assert_allclose(seen[0][1][0, 0], np.sqrt(8 - 4))  # sqrt(s_hat^2 - s^2) of noise


@pytest.mark.parametrize("name", ["euler", "heun(sum)", "heun(alpha)", "dpmpp_2m"])
def test_nfe_is_the_number_of_calls(name):
    solver, calls = DETERMINISTIC[name](), []

    def counted(x, level):
        jax.debug.callback(lambda: calls.append(1))
        return GAUSSIAN.denoise(x, level)

    grid = dj.karras(dj.EDM(), 7)
    jax.block_until_ready(jax.jit(lambda x: dj.sample(solver, counted, x, grid))(jnp.ones((2, 3))))
    jax.effects_barrier()
    assert len(calls) == solver.nfe(7)


def test_messages():
    with pytest.raises(ValueError, match="unknown gauge 'beta'; known: alpha, sigma, sum"):
        dj.heun("beta")
    with pytest.raises(ValueError, match="eta"):
        dj.ddim(-0.1)
    with pytest.raises(ValueError, match="from 0 .* to 1 .*got 2"):
        dj.ddim(2.0)
    for bad in ({"s_churn": -1.0}, {"s_noise": -1.0}, {"s_tmin": 5.0, "s_tmax": 1.0}):
        with pytest.raises(ValueError, match=">= 0|s_tmin <= s_tmax"):
            dj.churn(dj.euler(), dj.EDM(), **bad)
    with pytest.raises(ValueError, match="without memory"):
        dj.sample(
            dj.churn(dj.dpmpp_2m(), dj.EDM()),
            GAUSSIAN.denoise,
            jnp.ones((1, 3)),
            dj.karras(dj.EDM(), 3),
            jax.random.key(0),
        )
