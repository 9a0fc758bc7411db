"""Steering against tilted densities in closed form, and systematic resampling against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

SLOPE = np.array([1.0, -0.5])
CENTRE = np.array([1.0, 0.5])
GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3]), np.diag([1.0, 0.25]))
LINEAR = lambda x0: x0 @ jnp.asarray(SLOPE, x0.dtype)
QUADRATIC = lambda x0: -jnp.sum((x0 - CENTRE) ** 2, axis=-1) / 2
LEVELS = dj.karras(dj.VP(), 20)
GROUPS, PARTICLES = 20, 500


def chain(levels, gaussian):
    """What `ddim(1.0)` samples of a diagonal Gaussian: each step is the posterior q(x' | x, x0), linear in x."""
    variances = np.diag(gaussian.cov)
    mean = levels.alpha[0] * gaussian.mean
    variance = levels.alpha[0] ** 2 * variances + levels.sigma[0] ** 2
    for (a, s), (a1, s1) in zip(zip(*levels[1:], strict=True), list(zip(*levels[1:], strict=True))[1:], strict=False):
        r2 = (a * s1 / (a1 * s)) ** 2
        gain = a * variances / (a**2 * variances + s**2)  # E[x0 | x] = m + gain (x - a m)
        on_x, on_x0 = r2 * a1 / a, a1 * (1 - r2)
        mean = on_x * mean + on_x0 * (gaussian.mean + gain * (mean - a * gaussian.mean))
        variance = (on_x + on_x0 * gain) ** 2 * variance + s1**2 * (1 - r2)
    return mean, variance


def tilted(mean, variance, reward, scale):
    """Mean and variance of `N(mean, variance) exp(scale reward)`."""
    if reward is LINEAR:
        return mean + scale * variance * SLOPE, variance
    precision = 1 / variance + scale
    return (mean / variance + scale * CENTRE) / precision, 1 / precision


def start(n):
    std = np.sqrt(np.diag(GAUSSIAN.cov))
    return jax.jit(lambda key: dj.prior(key, (n, 2), LEVELS, mean=GAUSSIAN.mean, std=std))(jax.random.key(0))


def groups_of(solver, denoise=GAUSSIAN.denoise):
    """Means and second moments of each group of a run, [G, 2]."""
    run = jax.jit(lambda x, key: dj.sample(solver, denoise, x, LEVELS, key))
    out = np.asarray(run(start(GROUPS * PARTICLES), jax.random.key(1)), np.float64).reshape(GROUPS, PARTICLES, 2)
    return out.mean(1), (out**2).mean(1)


def check(groups, mean, variance):
    """Moments within five standard errors, as the independent groups show it, and 1 / PARTICLES for their bias."""
    for got, expected in zip(groups, (mean, variance + mean**2), strict=True):
        error = got.std(0, ddof=1) / GROUPS**0.5
        np.testing.assert_array_less(np.abs(got.mean(0) - expected), 5 * error + 2 / PARTICLES)


@pytest.mark.often("difference", "function")
@pytest.mark.parametrize(
    "reward, scale, settings",
    [
        (LINEAR, 1.0, {}),
        (QUADRATIC, 2.0, {"threshold": 1.0, "every": 4}),
        (QUADRATIC, 2.0, {"potential": "max", "every": 7}),
        (LINEAR, 0.5, {"potential": "sum", "every": 7}),
        (LINEAR, 1.0, {"threshold": 0.0}),
        (QUADRATIC, 2.0, {"potential": lambda x0, level: 2.0 * QUADRATIC(x0) / (1 + 3 * level.sigma**2)}),
    ],
    ids=["difference", "interval", "max", "sum", "importance", "function"],
)
def test_steered_samples_have_the_tilted_density(reward, scale, settings):
    solver = dj.smc(dj.ddim(1.0), reward, PARTICLES, scale, **settings)
    check(groups_of(solver), *tilted(*chain(LEVELS, GAUSSIAN), reward, scale))
    assert solver.nfe(20) == 20


def test_twisted_proposal_is_exact_and_better():
    # The tilt of each noisy marginal is known, so guidance of strength 1 is exact up to the chain's own steps.
    variances, scale = np.diag(GAUSSIAN.cov), 2.0

    def guided(strength):
        def denoise(x, level):
            spread = variances * level.sigma**2 / (level.alpha**2 * variances + level.sigma**2)
            x0 = GAUSSIAN.denoise(x, level).x0 + strength * scale * spread * SLOPE
            return dj.Prediction(x0, (x - level.alpha * x0) / level.sigma)

        return denoise

    target = tilted(*chain(LEVELS, GAUSSIAN), LINEAR, scale)
    settings = {"threshold": 0.0}  # weights alone: none of the noise of resampling on the way
    twisted = groups_of(dj.smc(dj.ddim(1.0), LINEAR, PARTICLES, scale, proposal=guided(1.0), **settings))
    check(twisted, *target)
    plain = groups_of(dj.smc(dj.ddim(1.0), LINEAR, PARTICLES, scale, **settings))
    # Plain weights keep exp(-scale^2 slope cov slope) = 9 % of the particles; the spread of 20 groups is known to 16 %.
    assert twisted[0].std(0)[0] < 0.6 * plain[0].std(0)[0]
    # A wrong proposal costs variance, not truth: without its weights half the tilt would be missing.
    check(groups_of(dj.smc(dj.ddim(1.0), LINEAR, PARTICLES, scale, proposal=guided(0.5))), *target)


def test_a_reward_without_slope_changes_no_sample():
    flat = lambda x0: jnp.zeros(len(x0))
    x, key = start(64), jax.random.key(1)
    # Draws 0 and 1 of a step are those of the resampling.
    noise = lambda i, j: jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), j), x.shape)
    plain = dj.sample(dj.ddim(1.0), GAUSSIAN.denoise, x, LEVELS, noise=lambda i, j: noise(i, j + 2))
    steered = dj.sample(dj.smc(dj.ddim(1.0), flat, 16), GAUSSIAN.denoise, x, LEVELS, noise=noise)
    np.testing.assert_array_equal(steered, plain)


def test_groups_do_not_see_each_other():
    keys = jax.random.split(jax.random.key(1), 64)
    run = jax.jit(lambda x, keys: dj.sample(dj.smc(dj.ddim(1.0), LINEAR, 32, 3.0), GAUSSIAN.denoise, x, LEVELS, keys))
    both = run(start(64), keys)
    np.testing.assert_array_equal(run(start(64)[:32], keys[:32]), both[:32])


def test_resampling_is_systematic():
    # One step from a level to data by a solver that stays: x comes back in the numbers that the weights ask for.
    particles = 8
    weight = np.array([0.3, 0.0, 0.05, 0.2, 0.1, 0.25, 0.1, 0.0])
    stay = dj.Solver(lambda x, levels: ((), ()), lambda d, x, m, at: (x, m, d(x, at.level)), 1, lambda n: n)
    x = jnp.arange(8.0)[:, None]
    reward = lambda x0: jnp.log(jnp.asarray(weight))[x0[:, 0].astype(int)]
    denoise = lambda x, level: dj.Prediction(x, jnp.zeros_like(x))
    one = dj.karras(dj.EDM(), 1)
    counts = []
    solver = dj.smc(stay, reward, particles, threshold=1.0)
    run = jax.jit(lambda key: dj.sample(solver, denoise, x, one, key))
    for seed in range(200):
        counts.append(np.bincount(np.asarray(run(jax.random.key(seed)))[:, 0].astype(int), minlength=8))
    counts = np.array(counts)
    assert np.all((counts >= np.floor(8 * weight)) & (counts <= np.ceil(8 * weight)))
    # A count is one of two neighbours: standard deviation of at most a half.
    np.testing.assert_allclose(counts.mean(0), 8 * weight, atol=5 * 0.5 / 200**0.5)


def test_memory_follows_its_particle():
    # A solver that remembers where each particle was, in the two layouts that multistep solvers use.
    def step(denoise, x, memory, at):
        prediction = denoise(x, at.level)
        history, mark = memory
        mixed = jnp.abs(history[1] - x).max() + jnp.abs(mark - x[:, 0]).max()
        x = x + 0.1 * at.draw(0)
        return x, (jnp.stack([jnp.zeros_like(x), x]), x[:, 0]), prediction._replace(aux=mixed)

    init = lambda x, levels: ((jnp.stack([jnp.zeros_like(x), x]), x[:, 0]), ())
    solver = dj.smc(dj.Solver(init, step, 1, lambda n: n), LINEAR, 8, 5.0, threshold=1.0)
    x = start(16)
    denoise = lambda x, level: GAUSSIAN.denoise(x, level)._replace(aux=jnp.zeros(()))
    run = jax.jit(lambda x, key: dj.sample(solver, denoise, x, LEVELS, key, trace=lambda s: s.prediction.aux))
    out, mixed = run(x, jax.random.key(0))
    np.testing.assert_array_equal(mixed, 0)
    assert len(np.unique(np.asarray(out)[:, 0])) < 16  # it did resample


def test_padded_grids_end_at_the_last_step_that_moves():
    solver = dj.smc(dj.ddim(1.0), LINEAR, 16, 2.0)
    x, key = start(32), jax.random.key(1)
    run = jax.jit(lambda x, levels: dj.sample(solver, GAUSSIAN.denoise, x, levels, key))
    padded = dj.Level(*(jnp.asarray(np.pad(a, (0, 5), mode="edge")) for a in LEVELS))
    np.testing.assert_allclose(
        run(x, padded), jax.jit(lambda x: dj.sample(solver, GAUSSIAN.denoise, x, LEVELS, key))(x), atol=1e-5
    )


def test_messages():
    x, key = start(6), jax.random.key(0)
    with pytest.raises(ValueError, match="particles >= 2"):
        dj.smc(dj.ddim(1.0), LINEAR, 1)
    with pytest.raises(ValueError, match="known: difference, max, sum"):
        dj.smc(dj.ddim(1.0), LINEAR, 4, potential="mean")
    with pytest.raises(ValueError, match="threshold"):
        dj.smc(dj.ddim(1.0), LINEAR, 4, threshold=2.0)
    with pytest.raises(ValueError, match="every"):
        dj.smc(dj.ddim(1.0), LINEAR, 4, every=0)
    with pytest.raises(ValueError, match="whole groups of 4"):
        dj.sample(dj.smc(dj.ddim(1.0), LINEAR, 4), GAUSSIAN.denoise, x, LEVELS, key)
    with pytest.raises(ValueError, match="one reward per sample"):
        dj.sample(dj.smc(dj.ddim(1.0), jnp.sum, 3), GAUSSIAN.denoise, x, LEVELS, key)
    with pytest.raises(ValueError, match="never calls its denoiser at the step's start"):
        dj.sample(dj.smc(dj.churn(dj.euler(), dj.VP()), LINEAR, 3), GAUSSIAN.denoise, x, LEVELS, key)
