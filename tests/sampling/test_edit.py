"""Editing against exact posteriors, marginals in closed form, and RePaint's released schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3]), np.array([[1.0, 0.6], [0.6, 0.5]]))
MASK = np.array([True, False])
KNOWN = np.array([1.5, np.nan])  # the hidden half must never be read


def start(n, grid, seed=0):
    std = np.sqrt(np.diag(GAUSSIAN.cov))
    return jax.jit(lambda key: dj.prior(key, (n, 2), grid, mean=GAUSSIAN.mean, std=std))(jax.random.key(seed))


@pytest.mark.parametrize("n, strength, steps", [(50, 0.3, 15), (10, 1.0, 10), (7, 0.5, 3), (30, 0.99, 29)])
def test_strength_counts_steps_as_image_to_image_does(n, strength, steps):
    levels = dj.karras(dj.VP(), n)
    cut = dj.start_from(levels, strength)
    assert len(cut.t) == steps + 1
    np.testing.assert_array_equal(cut.sigma, levels.sigma[n - steps :])


def test_sdedit_is_the_exact_flow_from_the_noised_guide(x64):
    # From one level down, the probability flow of a Gaussian is known: mean and variance of the result follow.
    levels = dj.karras(dj.VP(), 40, s_min=0.01, zero=False)
    guide = np.array([[2.0, -1.0]])
    cut = dj.start_from(levels, 0.5)
    run = jax.jit(lambda x0, keys: dj.sdedit(dj.heun(), GAUSSIAN.denoise, x0, levels, keys, strength=0.5))
    keys = jax.random.split(jax.random.key(0), 10_000)
    out = np.asarray(run(np.broadcast_to(guide, (10_000, 2)), keys))
    carry = lambda x: GAUSSIAN.flow(x, cut.at(0), cut.at(-1))
    both = jax.jit(lambda x: (carry(x[None])[0], jax.jacobian(lambda x: carry(x[None])[0])(x)))
    mean, push = map(np.asarray, both(cut.alpha[0] * guide[0]))
    push = push * cut.sigma[0]
    std = np.sqrt(np.diag(push @ push.T))
    # 10,000 draws: 1 % of a std for a mean, 0.7 % for a std; five of each, and heun's 40 steps leave less.
    np.testing.assert_allclose((out.mean(0) - mean) / std, 0, atol=5 * 0.01)
    np.testing.assert_allclose(out.std(0) / std, 1, atol=5 * 0.007)
    # A sample's result depends on its own key alone. Another batch size is another program, which may round otherwise:
    # a few units in the last place of float64 in each of 40 steps; another key would change the first digit.
    np.testing.assert_allclose(run(np.broadcast_to(guide, (3, 2)), keys[:3]), out[:3], rtol=0, atol=1e-13)


def test_noised_has_the_moments_of_the_level():
    level = dj.VP()(np.array([0.2, 0.8]))
    draw = jax.vmap(lambda key: dj.noised(jnp.asarray([[1.0, -2.0], [3.0, 0.0]], jnp.bfloat16), level, key))
    x = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(1), 10_000)))
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x.mean(0), level.alpha[:, None] * [[1.0, -2.0], [3.0, 0.0]], atol=5 / 10_000**0.5)
    np.testing.assert_allclose(x.std(0), np.broadcast_to(level.sigma[:, None], (2, 2)), rtol=5 / 20_000**0.5)


@pytest.mark.parametrize("solver", [dj.ddim(1.0), dj.heun(), dj.dpmpp_2m()], ids=["ddim1", "heun", "dpmpp_2m"])
def test_known_part_is_exact_at_the_end_and_noised_before(solver):
    levels = dj.karras(dj.VP(), 10)
    x = start(4000, levels)
    filled = dj.inpaint(solver, KNOWN, MASK)
    trace = lambda s: (s.x_next[:, 0].mean(), s.x_next[:, 0].std())
    run = jax.jit(lambda x, key: dj.sample(filled, GAUSSIAN.denoise, x, levels, key, trace=trace))
    out, path = jax.tree.map(np.asarray, run(x, jax.random.key(1)))
    np.testing.assert_array_equal(out[:, 0], np.float32(1.5))
    assert np.all(np.isfinite(out)) and np.any(out[:, 1] != out[0, 1])
    np.testing.assert_allclose(path[0], levels.alpha[1:] * 1.5, atol=5 / 4000**0.5)
    np.testing.assert_allclose(path[1], levels.sigma[1:], rtol=5 / 8000**0.5, atol=1e-6)
    assert filled.nfe(10) == solver.nfe(10)


def test_fixed_noise_is_one_path_and_draws_nothing():
    levels = dj.karras(dj.VP(), 6)
    x, noise = start(5, levels), np.random.default_rng(3).normal(size=(5, 2)).astype(np.float32)
    solver = dj.inpaint(dj.euler(), KNOWN, MASK, noise=noise)
    run = jax.jit(lambda x: dj.sample(solver, GAUSSIAN.denoise, x, levels, trace=lambda s: s.x_next[:, 0]))
    _, path = run(x)
    np.testing.assert_allclose(path, levels.alpha[1:, None] * 1.5 + levels.sigma[1:, None] * noise[:, 0], rtol=1e-5)


def test_repaint_grid_is_the_released_schedule():
    # Time steps of RePaintScheduler in diffusers 0.42.1, in units of its stride; ours ends with the clean level.
    published = {
        (12, 3, 3): [11, 10, 9, 8, 7, 6, 7, 8, 9, 8, 7, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 4, 5, 6, 5, 4, 3, 4, 5, 6]
        + [5, 4, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0],
        (10, 4, 2): [9, 8, 7, 6, 5, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0],
        (7, 2, 1): [6, 5, 4, 3, 2, 1, 0],
        (6, 10, 5): [5, 4, 3, 2, 1, 0],
    }
    for (n, jump, resamplings), times in published.items():
        levels = dj.karras(dj.VP(), n)
        grid = dj.repaint_levels(levels, jump, resamplings)
        np.testing.assert_array_equal(grid.sigma, np.append(levels.sigma[n - 1 - np.array(times)], 0.0))


@pytest.mark.parametrize("make", [lambda: dj.ddim(1.0), dj.heun], ids=["ddim1", "heun"])
def test_repaint_calls_the_network_on_the_way_down_only(make):
    calls = []

    def counted(x, level):
        jax.debug.callback(lambda: calls.append(1))
        return GAUSSIAN.denoise(x, level)

    solver = dj.repaint(make(), KNOWN, MASK, jump_length=3, resamplings=3)
    grid = dj.repaint_levels(dj.karras(dj.VP(), 12), 3, 3)
    run = jax.jit(lambda x, key: dj.sample(solver, counted, x, grid, key))
    out = np.asarray(run(start(3, grid), jax.random.key(0)))
    jax.effects_barrier()
    # 12 steps and six jumps of three, each walked down again.
    assert len(calls) == solver.nfe(len(grid.t) - 1) == make().nfe(12 + 6 * 3)
    np.testing.assert_array_equal(out[:, 0], np.float32(1.5))


def test_going_up_is_the_forward_process():
    # x distributed as data noised to the lower level must be distributed as data noised to the upper one.
    low, high = dj.VP()(np.array(0.3)), dj.VP()(np.array(0.6))
    grid = dj.Level(*(np.stack([a, b]) for a, b in zip(low, high, strict=True)))
    n = 40_000
    solver = dj.repaint(dj.ddim(1.0), KNOWN, MASK, jump_length=1, resamplings=2)

    @jax.jit
    def run(keys):
        x = dj.noised(GAUSSIAN.sample(keys[0], n), low, keys[1])
        return dj.sample(solver, GAUSSIAN.denoise, x, grid, keys[2])

    up = np.asarray(run([jax.random.key(i) for i in range(3)]))
    cov = high.alpha**2 * GAUSSIAN.cov + high.sigma**2 * np.eye(2)
    std = np.sqrt(np.diag(cov))
    np.testing.assert_allclose((up.mean(0) - high.alpha * GAUSSIAN.mean) / std, 0, atol=5 / n**0.5)
    np.testing.assert_allclose(np.cov(up.T) / np.outer(std, std), cov / np.outer(std, std), atol=5 * (2 / n) ** 0.5)


def test_resampling_lessens_the_bias_of_replacement():
    exact = GAUSSIAN.condition(np.array([[1.0, 0.0]]), np.array([1.5]), 0.0)
    levels, n = dj.karras(dj.VP(), 20), 4000
    gaps = []
    for resamplings in (1, 5):
        grid = dj.repaint_levels(levels, 5, resamplings)
        solver = dj.repaint(dj.ddim(1.0), KNOWN, MASK, jump_length=5, resamplings=resamplings)
        run = jax.jit(lambda x, key, s=solver, g=grid: dj.sample(s, GAUSSIAN.denoise, x, g, key))
        out = np.asarray(run(start(n, grid), jax.random.key(1)), np.float64)[:, 1]
        gaps.append(abs(out.mean() - exact.mean[1]) / np.sqrt(exact.cov[1, 1]))
    # In stds of the exact posterior; the standard error of a mean is 1 / sqrt(n) of one. Four of them on either side.
    error = 4 / n**0.5
    assert gaps[1] + error < (gaps[0] - error) / 2, gaps


def test_traced_grids_and_gradients():
    grid = dj.repaint_levels(dj.karras(dj.Flow(), 6), 2, 2)
    solver = dj.repaint(dj.ddim(1.0), KNOWN, MASK, jump_length=2, resamplings=2)

    def end(x, levels):
        out = dj.sample(solver, GAUSSIAN.denoise, x, levels, jax.random.key(0))
        return out.sum(), out

    x = start(3, grid)
    (_, traced), slope = jax.jit(jax.value_and_grad(end, has_aux=True))(x, dj.Level(*(jnp.asarray(a) for a in grid)))
    (_, concrete), _ = jax.jit(jax.value_and_grad(lambda x: end(x, grid), has_aux=True))(x)
    np.testing.assert_allclose(traced, concrete, atol=1e-4)
    assert np.all(np.isfinite(slope))


def test_messages():
    levels, x, key = dj.karras(dj.VP(), 4), jnp.ones((2, 2)), jax.random.key(0)
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        dj.start_from(levels, 0.0)
    with pytest.raises(ValueError, match="leaves none; give at least 0.25"):
        dj.start_from(levels, 0.2)
    with pytest.raises(ValueError, match=r"levels.at\(0\)"):
        dj.noised(x, levels, key)
    with pytest.raises(ValueError, match="must be boolean"):
        dj.sample(dj.inpaint(dj.euler(), KNOWN, np.ones(2)), GAUSSIAN.denoise, x, levels, key)
    with pytest.raises(ValueError, match="mask of shape .3,. does not broadcast"):
        dj.sample(dj.inpaint(dj.euler(), KNOWN, np.ones(3, bool)), GAUSSIAN.denoise, x, levels, key)
    with pytest.raises(ValueError, match="x0 of shape .3, 1, 2. does not"):
        dj.sample(dj.inpaint(dj.euler(), np.ones((3, 1, 2)), MASK), GAUSSIAN.denoise, x, levels, key)
    with pytest.raises(ValueError, match="without memory"):
        dj.sample(dj.repaint(dj.dpmpp_2m(), KNOWN, MASK), GAUSSIAN.denoise, x, levels, key)
    with pytest.raises(ValueError, match="jump_length: expected a whole number"):
        dj.repaint_levels(levels, 0)
    with pytest.raises(ValueError, match="must not grow"):
        dj.sample(dj.inpaint(dj.euler(), KNOWN, MASK), GAUSSIAN.denoise, x, dj.repaint_levels(levels, 1, 2), key)
