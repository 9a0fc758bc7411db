"""Inverse problems against exact posteriors, linear algebra and the theorem behind DDRM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

RNG = np.random.default_rng(0)
A = RNG.normal(size=(2, 3))
Y = np.array([0.7, -0.4])
ISOTROPIC = dj.Gaussian(np.array([0.5, -0.2, 0.1]), 0.3 * np.eye(3))
SKEW = dj.Gaussian(np.array([0.5, -0.2, 0.1]), np.array([[1.0, 0.3, 0.1], [0.3, 0.5, 0.0], [0.1, 0.0, 0.2]]))
# A denoiser that is not linear in x, for identities.
MIXTURE = dj.Mixture([1.0, 2.0], RNG.normal(size=(2, 3)), np.stack([0.3 * np.eye(3), 0.6 * np.eye(3)]))
LEVELS = {name: make() for name, make in dj.SCHEDULES.items()}


def dense(operator, shape):
    """The matrix of an operator on samples of a shape, column by column."""
    eye = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    return np.asarray(operator.apply(eye).reshape(len(eye), -1)).T


OPERATORS = {
    "mask": (lambda: dj.mask_operator(np.array([True, False, True])), (3,)),
    "image mask": (lambda: dj.mask_operator(np.arange(12).reshape(2, 6, 1) % 3 == 0), (2, 6, 2)),
    "matrix": (lambda: dj.matrix_operator(A), (3,)),
    "tall": (lambda: dj.matrix_operator(RNG.normal(size=(5, 3))), (3,)),
    "rank 1": (lambda: dj.matrix_operator(np.outer([1.0, 2.0, 0.5], RNG.normal(size=4)), (2, 2)), (2, 2)),
    "pool": (lambda: dj.average_pool(2), (4, 2, 3)),
    "pool 3": (lambda: dj.average_pool(3), (3, 6, 1)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_what_linear_algebra_says(name, x64):
    make, shape = OPERATORS[name]
    operator = make()
    matrix = dense(operator, shape)
    x = jnp.asarray(RNG.normal(size=(4, *shape)))
    y = jnp.asarray(RNG.normal(size=operator.apply(x).shape))
    if "mask" in name:  # measurements of a mask are zero where nothing was seen
        y = operator.apply(y)
    flat = lambda a: np.asarray(a).reshape(len(a), -1)
    np.testing.assert_allclose(flat(operator.adjoint(y)), flat(y) @ matrix, atol=1e-12)
    np.testing.assert_allclose(flat(operator.pinv(y)), flat(y) @ np.linalg.pinv(matrix).T, atol=1e-12)
    c = operator.analyse(x)
    np.testing.assert_allclose(operator.synthesise(c), x, atol=1e-12)
    np.testing.assert_allclose(np.sum(flat(c) ** 2, -1), np.sum(flat(x) ** 2, -1), rtol=1e-12)
    again = operator.synthesise(operator.singular**2 * c)
    np.testing.assert_allclose(flat(again), flat(x) @ matrix.T @ matrix, atol=1e-7)
    values = np.sort(np.broadcast_to(operator.singular, c.shape[1:]).ravel())[::-1]
    expected = np.zeros(len(values))
    found = np.linalg.svd(matrix, compute_uv=False)
    expected[: len(found)] = found[: len(values)]
    np.testing.assert_allclose(values, expected, atol=1e-7)


def test_average_pool_is_the_mean_of_blocks():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(dj.average_pool(2).apply(x)[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize("schedule", ["vp", "flow", "edm"])
def test_pigdm_is_exact_for_isotropic_data(schedule, noise_std, x64):
    guided = dj.pigdm(ISOTROPIC.denoise, dj.matrix_operator(A), Y[None], noise_std, variance=0.3)
    exact = ISOTROPIC.condition(A, Y, noise_std)
    x = jnp.asarray(RNG.normal(size=(8, 3)))
    both = jax.jit(lambda x, level: (guided(x, level), exact.denoise(x, level)))
    for level in (LEVELS[schedule](np.array(t)) for t in (0.02, 0.5, 0.9)):
        ours, truth = both(x, level)
        np.testing.assert_allclose(ours.x0, truth.x0, atol=1e-6)
        np.testing.assert_allclose(ours.eps, truth.eps, atol=1e-6)
    # One level and one measurement per sample.
    levels = LEVELS[schedule](np.linspace(0.1, 0.9, 8))
    many = dj.pigdm(ISOTROPIC.denoise, dj.matrix_operator(A), jnp.tile(Y, (8, 1)), noise_std, variance=0.3)
    ours, truth = jax.jit(lambda x, levels: (many(x, levels), exact.denoise(x, levels)))(x, levels)
    np.testing.assert_allclose(ours.x0, truth.x0, atol=1e-6)


def test_pigdm_samples_the_exact_posterior():
    exact = ISOTROPIC.condition(A, Y, 0.3)
    levels, n = dj.karras(dj.VP(), 30), 8000
    guided = dj.pigdm(ISOTROPIC.denoise, dj.matrix_operator(A), Y[None], 0.3, variance=0.3)
    x = dj.prior(jax.random.key(0), (n, 3), levels)
    out = np.asarray(jax.jit(lambda x: dj.sample(dj.heun(), guided, x, levels))(x), np.float64)
    std = np.sqrt(np.diag(exact.cov))
    np.testing.assert_allclose((out.mean(0) - exact.mean) / std, 0, atol=5 / n**0.5)
    np.testing.assert_allclose(np.cov(out.T) / np.outer(std, std), exact.cov / np.outer(std, std), atol=7 / n**0.5)


@pytest.mark.parametrize("make", [lambda d, y: dj.ddnm(d, OP, y), lambda d, y: dj.pigdm(d, OP, y, variance=0.3)])
def test_predictions_agree_with_a_measurement_without_noise(make, x64):
    # DDNM by construction; PiGDM where its model of the data is right.
    level = dj.VP()(np.array(0.5))
    x = jnp.asarray(RNG.normal(size=(8, 3)))
    prediction = jax.jit(make(ISOTROPIC.denoise, Y[None]))(x, level)
    np.testing.assert_allclose(OP.apply(prediction.x0), np.tile(Y, (8, 1)), atol=1e-10)
    np.testing.assert_allclose(level.alpha * prediction.x0 + level.sigma * prediction.eps, x, atol=1e-10)


OP = dj.matrix_operator(A)


def test_ddnm_keeps_the_null_space_and_trusts_noise_less(x64):
    level = dj.VP()(np.array(0.3))
    x = jnp.asarray(RNG.normal(size=(8, 3)))
    plain = jax.jit(MIXTURE.denoise)(x, level).x0
    null = np.eye(3) - np.linalg.pinv(A) @ A
    for noise_std in (0.0, 0.1, 10.0):
        moved = jax.jit(dj.ddnm(MIXTURE.denoise, OP, Y[None], noise_std))(x, level).x0 - plain
        np.testing.assert_allclose(moved @ null.T, 0, atol=1e-10)
        # What is taken over of A^+ y carries noise: never more per direction than x / alpha has (or all of it).
        gap = np.linalg.pinv(A) @ Y - plain @ (np.linalg.pinv(A) @ A).T
        _, s, vt = np.linalg.svd(A, full_matrices=False)
        share = np.asarray((moved @ vt.T) / (gap @ vt.T))
        np.testing.assert_allclose(share, np.broadcast_to(share[:1], share.shape), rtol=1e-6)
        assert np.all(share[0] * noise_std / s <= float(level.s) * (1 + 1e-9))
        assert np.all((share[0] > 1 - 1e-9) | (share[0] * noise_std / s > float(level.s) * (1 - 1e-9)))


@pytest.mark.parametrize("eta, eta_b, noise_std", [(0.85, 1.0, 0.5), (0.3, 0.6, 0.5), (1.0, 1.0, 0.0)])
@pytest.mark.parametrize("schedule", ["vp", "edm"])
def test_ddrm_has_the_marginals_of_its_theorem(schedule, eta, eta_b, noise_std):
    # Kawar et al. 2022, Proposition 3.1: told the true x0, and over the noise of y, x / alpha ~ N(x0, s^2) everywhere.
    n = 20_000
    true = jnp.asarray([0.4, -1.0, 0.2])
    y = true @ jnp.asarray(A.T, jnp.float32) + noise_std * jax.random.normal(jax.random.key(0), (n, 2))
    levels = dj.karras(LEVELS[schedule], 6, s_min=0.1, s_max=5.0, zero=False)

    def denoise(x, level):
        return dj.Prediction(jnp.broadcast_to(true, x.shape), (x - level.alpha * true) / level.sigma)

    def moments(info):
        z = (info.x_next - info.next.alpha * true) / info.next.sigma
        return z.mean(0), jnp.cov(z.T)

    solver = dj.ddrm(OP, y, noise_std, eta=eta, eta_b=eta_b)
    x = dj.noised(jnp.broadcast_to(true, (n, 3)), levels.at(0), jax.random.key(1))
    run = jax.jit(lambda x, levels, key: dj.sample(solver, denoise, x, levels, key, trace=moments)[1])
    mean, cov = run(x, levels, jax.random.key(2))
    np.testing.assert_allclose(mean, 0, atol=5 / n**0.5)
    np.testing.assert_allclose(cov, np.broadcast_to(np.eye(3), cov.shape), atol=5 * (2 / n) ** 0.5)


def test_ddrm_ends_on_a_measurement_without_noise():
    levels = dj.karras(dj.Flow(), 10)
    x = dj.prior(jax.random.key(0), (50, 3), levels)
    out = dj.sample(dj.ddrm(OP, Y[None]), MIXTURE.denoise, x, levels, jax.random.key(1))
    np.testing.assert_allclose(OP.apply(out), np.tile(Y, (50, 1)), atol=1e-5)


def test_dps_is_the_gradient_of_the_residual(x64):
    forward = lambda x0: jnp.tanh(x0 @ jnp.asarray(A.T)) ** 2  # not linear
    level, h = dj.VP()(np.array(0.4)), 1e-6
    x = jnp.asarray(RNG.normal(size=(3, 3)))
    y = jnp.asarray(RNG.normal(size=(3, 2)))
    miss = jax.jit(lambda x: jnp.linalg.norm(y - forward(MIXTURE.denoise(x, level).x0), axis=-1))
    slope = np.stack([(miss(x + h * e) ** 2 - miss(x - h * e) ** 2) / (2 * h) for e in np.eye(3)], -1)
    correction = 0.7 * slope / miss(x)[:, None]
    methods = dj.dps(MIXTURE.denoise, forward, y, 0.7), MIXTURE.denoise
    guided, plain = (jax.jit(lambda x, f=f: f(x, level))(x) for f in methods)
    np.testing.assert_allclose(plain.x0 - guided.x0, correction, atol=1e-7)
    np.testing.assert_allclose(level.alpha * guided.x0 + level.sigma * guided.eps, x, atol=1e-10)
    # The algorithm as printed subtracts the same from the result of a step, whatever the solver.
    grid = dj.karras(dj.VP(), 5)
    one = dj.Level(*(np.stack([a, b]) for a, b in zip(level, grid.at(-2), strict=True)))
    for solver in (dj.ddim(1.0), dj.euler()):
        runs = [
            jax.jit(lambda x, s=s: dj.sample(s, MIXTURE.denoise, x, one, jax.random.key(0)))
            for s in (solver, dj.dps_update(solver, forward, y, 0.7))
        ]
        np.testing.assert_allclose(runs[0](x) - runs[1](x), correction, atol=1e-7)
    # On the last step the two forms are one.
    last = dj.Level(*(np.stack([a, b]) for a, b in zip(level, grid.at(-1), strict=True)))
    printed = jax.jit(lambda x: dj.sample(dj.dps_update(dj.euler(), forward, y, 0.7), MIXTURE.denoise, x, last))(x)
    shifted = jax.jit(lambda x: dj.sample(dj.euler(), dj.dps(MIXTURE.denoise, forward, y, 0.7), x, last))(x)
    np.testing.assert_allclose(printed, shifted, atol=1e-10)


def test_dps_is_finite_on_a_measurement_that_is_met():
    forward = lambda x0: x0[:, :1]
    level = dj.VP()(np.array(0.4))
    x = jnp.ones((2, 3))

    @jax.jit
    def both(x):
        plain = SKEW.denoise(x, level).x0
        return dj.dps(SKEW.denoise, forward, forward(plain))(x, level).x0, plain

    np.testing.assert_array_equal(*both(x))


def test_from_end_to_end_of_flow():
    # alpha = 0 at the start: all but PiGDM, which needs a gradient with respect to x to say something about x0.
    levels = dj.uniform(dj.Flow(), 8)
    x = dj.prior(jax.random.key(0), (4, 3), levels)
    solvers = {
        "dps": (dj.ddim(1.0), dj.dps(MIXTURE.denoise, OP.apply, Y[None])),
        "ddnm": (dj.ddim(1.0), dj.ddnm(MIXTURE.denoise, OP, Y[None])),
        "ddnm+": (dj.ddim(1.0), dj.ddnm(MIXTURE.denoise, OP, Y[None], 0.1)),
        "ddrm": (dj.ddrm(OP, Y[None], 0.1), MIXTURE.denoise),
    }

    @jax.jit
    def run(x):
        end = lambda x: [dj.sample(s, d, x, levels, jax.random.key(1)).sum() for s, d in solvers.values()]
        return jax.jacobian(end)(x)

    for name, slope in zip(solvers, run(x), strict=True):
        assert np.all(np.isfinite(slope)), name
    with pytest.raises(ValueError, match="pigdm: .*alpha = 0 at index 0"):
        dj.sample(dj.euler(), dj.pigdm(MIXTURE.denoise, OP, Y[None]), x, levels)


def test_messages():
    x, level = jnp.ones((2, 3)), dj.VP()(np.array(0.5))
    with pytest.raises(ValueError, match="must be boolean"):
        dj.mask_operator(np.ones(3))
    with pytest.raises(ValueError, match="finite matrix"):
        dj.matrix_operator(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="does not have the 3 numbers"):
        dj.matrix_operator(A, (2, 2))
    with pytest.raises(ValueError, match="whole factor"):
        dj.average_pool(1)
    with pytest.raises(ValueError, match="multiples of it; got"):
        dj.average_pool(2).apply(jnp.ones((1, 3, 4, 1)))
    for make in (dj.dps, dj.ddnm, dj.pigdm):
        forward = OP.apply if make is dj.dps else OP
        with pytest.raises(ValueError, match=r"measurements of shape \(2, 2\)"):
            make(ISOTROPIC.denoise, forward, Y)(x, level)
    with pytest.raises(ValueError, match="noise_std"):
        dj.pigdm(ISOTROPIC.denoise, OP, Y[None], -1.0)
    with pytest.raises(ValueError, match="variance > 0"):
        dj.pigdm(ISOTROPIC.denoise, OP, Y[None], variance=0.0)
    with pytest.raises(ValueError, match="eta_b from 0 to 1"):
        dj.ddrm(OP, Y[None], eta_b=1.5)
    with pytest.raises(ValueError, match="measurements of shape"):
        dj.sample(dj.ddrm(OP, Y), ISOTROPIC.denoise, x, dj.karras(dj.VP(), 3), jax.random.key(0))
