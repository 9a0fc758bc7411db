"""Few-step solvers with exact consistency functions and flow maps of a Gaussian, for which they have no error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))
FLOW, EDM, VP = dj.Flow(), dj.EDM(), dj.VP()
CLEAN = dj.Level(np.array(0.0), np.array(1.0), np.array(0.0))


def consistent(x, level, end=CLEAN):
    """The exact consistency function as a denoiser: x0 is where the flow ends."""
    x0 = GAUSSIAN.flow(x, level, end)
    return dj.Prediction(x0, (x - level.alpha * x0) / level.sigma)


def exact_map(x, level, following):
    """The halves that lead from x at `level` to the exact flow at `following`: two linear equations."""
    x_next = GAUSSIAN.flow(x, level, following)
    det = following.alpha * level.sigma - level.alpha * following.sigma
    x0 = (x_next * level.sigma - x * following.sigma) / det
    return dj.Prediction(x0, (x * following.alpha - x_next * level.alpha) / det)


@pytest.mark.parametrize("schedule", [FLOW, VP, EDM])
def test_one_step_of_an_exact_function_is_exact(schedule, x64):
    grid = dj.karras(schedule, 1, s_max=30.0)
    x = dj.prior(jax.random.key(0), (5, 3), grid)
    exact = GAUSSIAN.flow(x, grid.at(0), CLEAN)
    out = dj.sample(dj.consistency(), consistent, x, grid, noise=lambda i, j: jnp.full((5, 3), 7.0))
    np.testing.assert_allclose(out, exact, rtol=1e-9)
    for n in (1, 4):
        grid = dj.karras(schedule, n, s_max=30.0)
        np.testing.assert_allclose(dj.sample(dj.flow_map(), exact_map, x, grid), exact, rtol=1e-7)


@pytest.mark.parametrize("s_min", [0.0, 0.05])
@pytest.mark.parametrize("schedule", [FLOW, EDM])
def test_multistep_consistency_keeps_the_exact_marginal(schedule, s_min):
    # Every step maps the marginal to the data (or to the marginal at s_min) and back, so any number of steps does.
    grid = dj.karras(schedule, 4, s_min=0.3, s_max=30.0)
    end = schedule.at_logsnr(-2 * np.log(s_min)) if s_min else CLEAN
    n = 20_000
    std = np.sqrt(np.diag(GAUSSIAN.cov))
    x = dj.prior(jax.random.key(1), (n, 3), grid, mean=GAUSSIAN.mean, std=std)

    def denoise(x, level):
        # A network trained with s_min returns y at s_min as its x0.
        y = GAUSSIAN.flow(x, level, end) / end.alpha
        return dj.Prediction(y, x)

    out = jax.jit(lambda x, key: dj.sample(dj.consistency(s_min), denoise, x, grid, key))(x, jax.random.key(2))
    expected = np.sqrt(std**2 + s_min**2)
    # Standard errors: 1 / sqrt(2 n) = .5 % of a std, 1 / sqrt(n) = .7 % of it for a mean; five of each.
    np.testing.assert_allclose(out.std(axis=0) / expected, 1, atol=5 * 0.005)
    np.testing.assert_allclose((out.mean(axis=0) - GAUSSIAN.mean) / expected, 0, atol=5 * 0.0071)


def test_consistency_head_is_the_identity_at_s_min_and_inverts(x64):
    head = dj.consistency_head(0.002, 0.5)
    x, out = jnp.ones((2, 3)), jnp.full((2, 3), 3.0)
    at_min = EDM(np.array(0.002))
    np.testing.assert_allclose(head.split(out, x, at_min).x0, x, rtol=1e-12)
    for level in (VP(np.array(0.6)), EDM(np.array(3.0)), FLOW(np.array(0.4))):
        prediction = head.split(out, x, level)
        np.testing.assert_allclose(level.alpha * prediction.x0 + level.sigma * prediction.eps, x, rtol=1e-9)
        np.testing.assert_allclose(head.target(*prediction[:2], level), out, rtol=1e-9)
    # Far from s_min it is EDM's own head (Karras et al. 2022, Table 1), whose target is scaled the same way.
    level = EDM(np.array(2.0))
    edm = dj.edm(0.5).split(out, x, level)
    np.testing.assert_allclose(dj.consistency_head(0.0, 0.5).split(out, x, level).x0, edm.x0, rtol=1e-9)


@pytest.mark.parametrize("schedule", [VP, FLOW, dj.ddpm()])
def test_tcd_between_the_flow_and_consistency(schedule, x64):
    times = np.linspace(schedule.t_max * 0.9, schedule.t_min, 6)
    grid = dj.custom(schedule, np.floor(times) if isinstance(schedule, dj.Table) else times)
    x = dj.prior(jax.random.key(0), (4, 3), grid)
    run = lambda solver: dj.sample(solver, GAUSSIAN.denoise, x, grid, jax.random.key(1), loop="unroll")
    np.testing.assert_allclose(run(dj.tcd(schedule, 0.0)), run(dj.euler()), atol=1e-6)
    if not isinstance(schedule, dj.Table):  # whose first step is not clean
        np.testing.assert_allclose(run(dj.tcd(schedule, 1.0)), run(dj.consistency()), atol=1e-6)


def test_tcd_keeps_the_marginal_of_an_exact_consistency_function(x64):
    # Along the exact flow below the next level and noise back up: the marginal is kept for every eta.
    grid = dj.karras(VP, 5, s_min=0.05, s_max=20.0)
    std = np.sqrt(np.diag(GAUSSIAN.cov))

    def denoise(x, level):
        return exact_map(x, level, lower(level))

    solver = dj.tcd(VP, 0.4)
    down = solver.init(jnp.zeros((1, 3)), grid)[1]["down"]

    def lower(level):  # the level that the solver will go to, from its own table
        i = jnp.argmin(jnp.abs(jnp.asarray(grid.sigma[:-1]) - level.sigma))
        return dj.Level(*(jnp.asarray(field)[i] for field in down))

    n = 20_000
    x = dj.prior(jax.random.key(1), (n, 3), grid, mean=GAUSSIAN.mean, std=std)
    out = jax.jit(lambda x, key: dj.sample(solver, denoise, x, grid, key))(x, jax.random.key(2))
    np.testing.assert_allclose(out.std(axis=0) / std, 1, atol=5 * 0.005)
    np.testing.assert_allclose((out.mean(axis=0) - GAUSSIAN.mean) / std, 0, atol=5 * 0.0071)


def test_lcm_scalings(x64):
    # Far from t = 0 the scalings are 0 and 1 to (sigma_data / (10 t))^2, so LCM is consistency sampling.
    grid = dj.leading(dj.ddpm(), 4, 100)
    x = dj.prior(jax.random.key(0), (4, 3), grid)
    run = lambda solver, grid=grid: dj.sample(solver, GAUSSIAN.denoise, x, grid, jax.random.key(1), loop="unroll")
    np.testing.assert_allclose(run(dj.lcm()), run(dj.consistency()), atol=1e-5)
    # At t = 0 the function is the identity, whatever the network says.
    ends = dj.Level(np.array([0.0, 0.0]), np.array([0.99, 1.0]), np.array([0.1, 0.0]))
    np.testing.assert_allclose(run(dj.lcm(), ends), x, rtol=1e-12)


def test_adapters_of_flow_map_networks(x64):
    # The average velocity of the exact flow, in each paper's own time and sign.
    grid = dj.uniform(FLOW, 4)
    x = dj.prior(jax.random.key(0), (3, 3), grid)
    at = lambda t: dj.Level(t, 1 - t, t)

    def mean_velocity(x, t, r):
        t, r = t[0].astype(x.dtype), r[0].astype(x.dtype)
        return (x - GAUSSIAN.flow(x, at(t), at(r))) / (t - r)

    def shortcut_velocity(x, t, d):
        return -mean_velocity(x, 1 - t, 1 - t - d)

    exact = GAUSSIAN.flow(x, grid.at(0), CLEAN)
    for denoise in (dj.mean_flow(mean_velocity), dj.shortcut(shortcut_velocity)):
        # The networks see float32 times.
        np.testing.assert_allclose(dj.sample(dj.flow_map(), denoise, x, grid), exact, atol=1e-5)


def test_messages():
    for make, match in (
        (lambda: dj.consistency(-0.1), "s_min: expected a number >= 0"),
        (lambda: dj.consistency_head(sigma_data=0.0), "sigma_data: expected a positive"),
        (lambda: dj.lcm(timestep_scaling=0.0), "timestep_scaling"),
        (lambda: dj.tcd(VP, 1.5), "eta: expected a number from 0"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    with pytest.raises(ValueError, match="consistency head is undefined at alpha = 0"):
        dj.consistency_head().check(dj.uniform(FLOW, 2))
