"""Stochastic solvers: exact moments on Gaussians, strong convergence on one Brownian path, identities, messages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))
FLOW, VP, EDM, COSINE = dj.Flow(), dj.VP(), dj.EDM(), dj.Cosine()

# Every solver of the reverse SDE, with a schedule where one is needed; all draw the full noise or more.
SOLVERS = {
    "ddpm beta_tilde": dj.ancestral_ddpm(),
    "ddpm beta": dj.ancestral_ddpm("beta"),
    "euler_ancestral": dj.euler_ancestral(),
    "euler_ancestral .5": dj.euler_ancestral(0.5),
    "euler_ancestral_rf": dj.euler_ancestral_rf(),
    "sde_dpmpp_2m midpoint": dj.sde_dpmpp_2m(),
    "sde_dpmpp_2m heun": dj.sde_dpmpp_2m(solver_type="heun"),
    "sde_dpmpp_3m": dj.sde_dpmpp_3m(),
    "sde_dpmpp_3m exact": dj.sde_dpmpp_3m(curvature="exact"),
    "sde_dpmpp": dj.sde_dpmpp(VP),
    "ancestral heun": dj.ancestral(dj.heun("alpha"), VP),
    "sde_dpm_2m": dj.sde_dpm_2m(),
    "sa_solver": dj.sa_solver(),
    "sa_solver exact": dj.sa_solver(3, 3, 0.7, taylor=False),
    "sa_solver interval": dj.sa_solver(tau=lambda level: (level.sigma > 0.05 * level.alpha) * 1.0),
    "sde_adams": dj.sde_adams(),
    "sde_adams 2 asinh": dj.sde_adams(2, basis="asinh", corrector=False),
    "sde_adams log half": dj.sde_adams(3, 0.5, "log"),
    "maruyama sigma": dj.euler_maruyama(),
    "maruyama sbdm": dj.euler_maruyama("sbdm"),
    "maruyama decreasing": dj.euler_maruyama("decreasing", 0.5),
    "maruyama hump": dj.euler_maruyama("increasing-decreasing"),
    "maruyama callable": dj.euler_maruyama(lambda level: level.sigma**2),
}

# One of each kind.
OFTEN = (
    "ddpm beta_tilde", "euler_ancestral", "euler_ancestral_rf", "sde_dpmpp_2m midpoint", "sde_dpmpp_3m*", "sde_dpmpp",
    "ancestral heun", "sde_dpm_2m", "sa_solver exact", "sde_adams", "maruyama sigma",
)  # fmt: skip


def with_clean_end(grid, n):
    """The grid with sigma = 0 appended, repeated to n steps: grids of all lengths share one program."""
    rows = [np.append(field, np.full(n + 1 - len(field), last)) for field, last in zip(grid, (0, 1, 0), strict=True)]
    return dj.Level(*(jnp.asarray(row) for row in rows))


@pytest.mark.often(*OFTEN)
@pytest.mark.parametrize("name", SOLVERS)
def test_exact_divergence_falls_with_the_step(name, x64):
    divergence = jax.jit(lambda levels: dj.gaussian_kl(SOLVERS[name], GAUSSIAN, levels, exact_start=True))
    grids = [with_clean_end(dj.logsnr(VP, n, s_min=0.02, s_max=20.0), 97) for n in (24, 96)]
    coarse, fine = (float(divergence(grid)) for grid in grids)
    # The bias of the moments is of order 1 / n or smaller, so the divergence falls 16-fold at the best order 1, down
    # to a floor: the step from s = .02 to 0 loses 4 % of the smallest variance, KL .04^2 / 4 / 3 = 1.3e-4 alone.
    assert fine < max(coarse / 6, 4e-4), f"{coarse} -> {fine}"


def ddpm_recursion(grid, data, variance):
    """Moments of the DDPM chain from Ho et al. 2020, Eq. 7, in alpha_bar, for a variance-preserving grid."""
    mean, bar = grid.alpha[0] * data.mean, grid.alpha**2
    v = np.diag(data.cov)
    var = bar[0] * v + 1 - bar[0]
    for i in range(len(bar) - 1):
        beta = 1 - bar[i] / bar[i + 1]
        x0_coef = np.sqrt(bar[i + 1]) * beta / (1 - bar[i])
        x_coef = np.sqrt(1 - beta) * (1 - bar[i + 1]) / (1 - bar[i])
        gain = np.sqrt(bar[i]) * v / (bar[i] * v + 1 - bar[i])
        mean = x0_coef * (data.mean + gain * (mean - np.sqrt(bar[i]) * data.mean)) + x_coef * mean
        drawn = {"beta": beta, "beta_tilde": (1 - bar[i + 1]) / (1 - bar[i]) * beta}[variance]
        var = (x0_coef * gain + x_coef) ** 2 * var + (drawn if bar[i + 1] < 1 else 0.0)
    return mean, np.sqrt(var)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_ddpm_has_the_moments_of_its_chain(variance, x64):
    grid = dj.leading(dj.ddpm(), 20)
    moments = jax.jit(lambda: dj.gaussian_moments(dj.ancestral_ddpm(variance), GAUSSIAN, grid, exact_start=True))()
    order = np.argsort(np.diag(GAUSSIAN.cov))  # eigenvectors come in this order
    mean, std = ddpm_recursion(grid, GAUSSIAN, variance)
    np.testing.assert_allclose(np.abs(moments.mean), np.abs(mean[order]), rtol=1e-9)
    np.testing.assert_allclose(moments.std, std[order], rtol=1e-9)


def test_moments_agree_with_monte_carlo():
    grid = dj.karras(EDM, 12, s_max=10.0)
    n = 20_000
    cov = np.array([[0.5, 0.3], [0.3, 0.4]])
    data = dj.Gaussian(np.array([0.4, -0.3]), cov)
    solver = dj.sde_dpmpp_2m()

    @jax.jit
    def run(start, key):
        x = dj.prior(start, (n, 2), grid)
        return dj.gaussian_moments(solver, data, grid), dj.sample(solver, data.denoise, x, grid, key)

    moments, out = run(jax.random.key(0), jax.random.key(1))
    turned = np.asarray(out) @ np.linalg.eigh(cov)[1]
    # Standard errors: 1 / sqrt(2 n) = .5 % of a std, 1 / sqrt(n) = .7 % of it for a mean; five of each.
    np.testing.assert_allclose(turned.std(0) / moments.std, 1, atol=5 * 0.005)
    np.testing.assert_allclose((turned.mean(0) - moments.mean) / moments.std, 0, atol=5 * 0.0071)


@pytest.mark.parametrize("make", [dj.sde_dpmpp_2m, partial(dj.sde_adams, 3), partial(dj.sde_adams, 2, corrector=False)])
def test_order_of_the_deterministic_part(make, order_fit, x64):
    solver = make(eta=0.0)
    for name, (slope, errors) in order_fit(lambda _: solver, {"vp": VP, "flow": FLOW}).items():
        assert slope > solver.order - 0.2, f"{name}: order {slope:.2f} of {solver.order}, errors {errors}"


EXACT = {
    "3m": (dj.sde_dpmpp_3m(0.7, curvature="exact"), 1.7),
    "adams": (dj.sde_adams(3, 0.7, "log", corrector=False), 1.49),
    "adams corrected": (dj.sde_adams(3, 1.0, "log"), 2.0),
    "sa": (dj.sa_solver(3, 0, 0.7, lower_order_final=False, taylor=False), 1.49),
}


@pytest.mark.parametrize("name", EXACT)
def test_quadratics_are_integrated_exactly(name, x64):
    # x0 a quadratic in half the log-SNR u and nothing else: y' = e^(-q h) y + int q e^(-q (u' - u)) x0(u) du, with q
    # the exponent that each solver's noise implies (1 + eta, or 1 + tau^2).
    solver, q = EXACT[name]
    grid = dj.karras(VP, 7, s_min=0.1, s_max=8.0, zero=False)
    quadratic = lambda u: 0.3 - 0.5 * u + 0.2 * u**2

    def denoise(x, level):
        x0 = quadratic(jnp.log(level.alpha / level.sigma)) * jnp.ones_like(x)
        return dj.Prediction(x0, (x - level.alpha * x0) / level.sigma)

    zero = lambda i, j: jnp.zeros((1, 1))
    trace = lambda info: (info.x, info.x_next)
    run = jax.jit(lambda x: dj.sample(solver, denoise, x, grid, noise=zero, trace=trace)[1])
    path = [np.asarray(a) for a in run(np.ones((1, 1)))]
    u, alpha = grid.logsnr / 2, grid.alpha
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for i in range(3, 7):
        start, end = (float(a[i, 0, 0]) / alpha[i + k] for k, a in enumerate(path))
        h = u[i + 1] - u[i]
        at = u[i] + h * (nodes + 1) / 2
        integral = np.sum(weights * h / 2 * q * np.exp(-q * (u[i + 1] - at)) * quadratic(at))
        if name != "adams corrected":  # there `start` itself is redone inside the step
            np.testing.assert_allclose(end, np.exp(-q * h) * start + integral, rtol=1e-6)
    if name == "adams corrected":
        # Redone steps are exact too, so from the third on the difference to the exact solution only contracts.
        exact, y = [], float(path[0][3, 0, 0]) / alpha[3]
        whole = lambda a, b, y: (
            np.exp(-q * (b - a)) * y
            + sum(
                w * (b - a) / 2 * q * np.exp(-q * (b - t)) * quadratic(t)
                for w, t in zip(weights, a + (b - a) * (nodes + 1) / 2, strict=True)
            )
        )
        for i in range(3, 7):
            y = whole(u[i], u[i + 1], y)
            exact.append(y)
        found = path[1][3:, 0, 0] / alpha[4:]
        gap = np.abs(found - exact)
        assert gap[-1] <= gap[0] + 1e-9


def test_published_third_order_is_second_order(order_fit, x64):
    solver = dj.sde_dpmpp_3m(0.0)
    slope, errors = order_fit(lambda _: solver, {"vp": VP})["vp"]
    assert abs(slope - solver.order) < 0.3, f"order {slope:.2f}, errors {errors}"
    broken = dj.sde_dpmpp_3m(0.0, curvature="diffusers")
    slope, errors = order_fit(lambda _: broken, {"vp": VP})["vp"]
    assert abs(slope - broken.order) < 0.3, f"order {slope:.2f}, errors {errors}"


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_identities_with_ddim(eta, x64):
    grid = dj.karras(VP, 9)
    x = dj.prior(jax.random.key(0), (4, 3), grid)

    @partial(jax.jit, static_argnums=0)
    def run(solver):
        return dj.sample(solver, GAUSSIAN.denoise, x, grid, jax.random.key(1))

    expected = run(dj.ddim(eta))
    np.testing.assert_allclose(run(dj.euler_ancestral(eta)), expected, rtol=1e-9)
    np.testing.assert_allclose(run(dj.ancestral(dj.euler(), VP, eta)), expected, rtol=1e-7)
    if eta != 0.4:  # eta enters differently in between
        np.testing.assert_allclose(run(dj.sde_adams(1, eta, corrector=False)), expected, rtol=1e-7)
        np.testing.assert_allclose(run(dj.sa_solver(1, 0, eta)), expected, rtol=1e-7)
    if eta == 1:
        np.testing.assert_allclose(run(dj.ancestral_ddpm()), expected, rtol=1e-9)


def test_learned_range_interpolates_the_two_variances(x64):
    grid = dj.karras(VP, 4, s_max=5.0)
    x = jnp.ones((2, 3))

    @partial(jax.jit, static_argnums=(0, 1))
    def run(variance, aux):
        def denoise(x, level):
            return GAUSSIAN.denoise(x, level)._replace(aux=jnp.full_like(x, aux))

        solver = dj.ancestral_ddpm(variance)
        one = dj.sample(solver, denoise, x, grid, noise=lambda i, j: jnp.ones((2, 3)) * (i == 1))
        return one - dj.sample(solver, denoise, x, grid, noise=lambda i, j: jnp.zeros((2, 3)))

    np.testing.assert_allclose(run("learned_range", 1.0), run("beta", 0.0), rtol=1e-9)
    np.testing.assert_allclose(run("learned_range", -1.0), run("beta_tilde", 0.0), rtol=1e-9)
    # Halfway in the logarithm is the geometric mean of the standard deviations.
    middle = np.sqrt(run("beta", 0.0) * run("beta_tilde", 0.0))
    np.testing.assert_allclose(run("learned_range", 0.0), middle, rtol=1e-9)
    # A learned variance of four times another has twice its response.
    np.testing.assert_allclose(run("learned", 0.4), 2 * run("learned", 0.1), rtol=1e-9)


DISTINCT = [name for name in SOLVERS if name not in ("ddpm beta", "euler_ancestral .5", "sde_dpmpp_3m", "sa_solver")]


@pytest.mark.often(*OFTEN)
@pytest.mark.parametrize("name", DISTINCT)
def test_padded_traced_and_from_alpha_zero(name):
    solver = SOLVERS[name]
    noise = lambda i, j: jnp.cos(jnp.arange(12.0).reshape(4, 3) + i + 5 * j)
    x = dj.prior(jax.random.key(0), (4, 3), dj.karras(VP, 6))

    def value(x, levels):
        out = dj.sample(solver, GAUSSIAN.denoise, x, levels, noise=noise)
        return jnp.sum(out**2), out

    run = jax.jit(jax.value_and_grad(value, has_aux=True))
    grid = dj.karras(VP, 6)
    padded = dj.Level(*(jnp.asarray(np.pad(field, (0, 3), mode="edge"), jnp.float32) for field in grid))
    plain = jax.jit(lambda x: dj.sample(solver, GAUSSIAN.denoise, x, grid, noise=noise))(x)
    (_, out), grads = run(x, padded)
    # Tables in float32 on the traced grid against float64: 1e-3 of a state of order 1, from differences of levels.
    np.testing.assert_allclose(out, plain, atol=3e-3)
    assert np.isfinite(grads).all()
    if name != "sde_dpm_2m":  # refuses alpha = 0
        (_, out), grads = run(x, jax.tree.map(np.float32, dj.uniform(COSINE, 9)))
        assert np.isfinite(out).all() and np.isfinite(grads).all()


@pytest.mark.often("sde_dpmpp")
@pytest.mark.parametrize("name", ["maruyama", "sde_dpmpp"])
def test_one_brownian_path_converges_path_by_path(name, x64):
    solver = {"maruyama": dj.euler_maruyama(), "sde_dpmpp": dj.sde_dpmpp(FLOW)}[name]
    data = dj.Gaussian(np.array([0.2]), np.array([[0.3]]))
    keys = jax.random.split(jax.random.key(3), 64)
    x = jax.jit(jax.vmap(lambda k: jax.random.normal(k, (1,))))(keys)

    @jax.jit
    def run(levels, path):
        shifted = jax.vmap(lambda k: jax.random.fold_in(k, path))(keys)
        noise = dj.brownian(shifted, x, levels, inner=dj.inner_levels(FLOW, levels))
        return dj.sample(solver, data.denoise, x, levels, noise=noise)

    def grid(n):  # padded to one length: one program
        times = np.append(np.linspace(0.9, 0.2, n + 1), np.full(256 - n, 0.2))
        return jax.tree.map(jnp.asarray, FLOW(times))

    reference = run(grid(256), 0)
    steps = (4, 16, 64)
    errors, other = [], []
    rmse = lambda out: np.sqrt(np.mean(np.subtract(out, reference) ** 2))
    for n in steps:
        errors.append(rmse(run(grid(n), 0)))
        other.append(rmse(run(grid(n), 1)))
    # Noise that does not depend on x: strong order 1. With another path the error is the spread of the samples.
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope > 0.7, errors
    assert min(other) > 0.2


def test_brownian_increments_are_unit_and_add_up(x64):
    keys = jax.random.split(jax.random.key(0), 2000)
    x = jnp.zeros((2000, 1))
    coarse, fine = (dj.uniform(FLOW, n) for n in (4, 8))
    noise = {n: dj.brownian(keys, x, grid) for n, grid in ((4, coarse), (8, fine))}
    both = jax.jit(lambda: {n: jax.lax.map(lambda i, f=f: f(i, 0), jnp.arange(n))[..., 0] for n, f in noise.items()})
    draws = jax.tree.map(np.asarray, both())
    # A step of the coarse grid is two of the fine one: unit noises add with weights sqrt(1 / 2).
    np.testing.assert_allclose(draws[4][1], (draws[8][2] + draws[8][3]) / np.sqrt(2), atol=1e-6)
    # The covariance of 8 unit noises from 2,000 paths: standard error sqrt(2 / 2000) = .032 on the diagonal.
    covariance = np.cov(draws[8])
    np.testing.assert_allclose(covariance, np.eye(8), atol=5 * 0.032)
    with pytest.raises(ValueError, match="draw 1 of a step"):
        noise[4](0, 1)


def test_predictor_corrector_keeps_the_marginals_and_the_batch_out():
    grid = dj.karras(VP, 40, s_min=0.01, s_max=20.0)
    d, n = 64, 200
    # One variance per sample direction, so that the norms concentrate and the sampler is nearly linear.
    data = dj.Gaussian(np.zeros(d), np.eye(d) * 0.25)
    solver = dj.predictor_corrector(dj.ancestral_ddpm("beta"), snr=0.16)
    x = dj.prior(jax.random.key(0), (n, d), grid, std=0.5)
    run = jax.jit(lambda x, keys: dj.sample(solver, data.denoise, x, grid, keys))
    keys = jax.random.split(jax.random.key(1), n)
    out = np.asarray(run(x, keys))
    # 12,800 numbers: standard error of the std .63 %; the corrector's own bias at snr .16 is under 3 %.
    assert abs(out.std() / 0.5 - 1) < 0.03 + 5 * 0.0063
    alone = jax.jit(lambda x, keys: dj.sample(solver, data.denoise, x, grid, keys))(x[:1], keys[:1])
    np.testing.assert_allclose(alone[0], out[0], atol=1e-5)
    assert solver.nfe(40) == 40 + 39


def test_corrector_repairs_a_wrong_state():
    # From a start twice too wide, Langevin steps at fixed snr move the std towards the marginal's; the predictor
    # alone does not.
    levels = dj.custom(EDM, [1.001, 1.0, 0.0])
    data = dj.Gaussian(np.zeros(64), np.eye(64))
    x = (2 * np.sqrt(2) * np.random.default_rng(0).normal(size=(200, 64))).astype(np.float32)
    stay = levels.at(slice(0, 2))
    run = lambda solver, key: dj.sample(solver, data.denoise, x, stay, key).std()
    solvers = dj.euler_ancestral(), dj.predictor_corrector(dj.euler_ancestral(), n_steps=100)
    plain, corrected = jax.jit(lambda key: [run(solver, key) for solver in solvers])(jax.random.key(1))
    np.testing.assert_allclose(plain, 2 * np.sqrt(2), rtol=0.02)
    # The step size follows from norms, e = 2 (snr |z| / |score|)^2, so its fixed point is 1 + O(snr^2) of the truth.
    np.testing.assert_allclose(corrected, np.sqrt(2), rtol=0.05)


def test_annealed_langevin_has_the_moments_of_its_recursion(x64):
    sigmas = np.array([1.0, 0.5, 0.25])
    levels = dj.Level(np.log(np.append(sigmas, 0.1)) / 4, np.ones(4), np.append(sigmas, 0.1))
    v, epsilon, steps = 0.3, 5e-3, 7
    data = dj.Gaussian(np.array([0.2]), np.array([[v]]))
    mean, var = 0.0, sigmas[0] ** 2
    for s in sigmas:
        a = epsilon * s**2 / 0.1**2  # Algorithm 1, line 3; the last level of the grid is 0.1
        gain = 1 - a / 2 / (v + s**2)
        for _ in range(steps):
            mean, var = 0.2 + gain * (mean - 0.2), gain**2 * var + a
    solver = dj.annealed_langevin(steps, epsilon)
    moments = jax.jit(lambda: dj.gaussian_moments(solver, data, levels, draws=steps))()
    np.testing.assert_allclose(moments.mean, [mean], rtol=1e-9)
    np.testing.assert_allclose(moments.std, [np.sqrt(var)], rtol=1e-9)


def test_messages():
    for make, match in (
        (lambda: dj.ancestral_ddpm("tilde"), "variance: expected one of 'beta_tilde', 'beta'"),
        (lambda: dj.euler_ancestral(-1.0), "eta: expected a number >= 0"),
        (lambda: dj.euler_ancestral_rf(1.5), "eta: expected a number from 0"),
        (lambda: dj.sde_dpmpp_2m(solver_type="euler"), "solver_type: expected one of 'midpoint', 'heun'"),
        (lambda: dj.sde_dpmpp_3m(curvature="half"), "curvature"),
        (lambda: dj.sde_dpmpp(VP, fraction=0.0), "fraction"),
        (lambda: dj.sa_solver(5), "predictor_order"),
        (lambda: dj.sde_adams(basis="t"), "basis: expected one of 'asinh'"),
        (lambda: dj.euler_maruyama("linear"), "diffusion: expected one of 'sigma'"),
        (lambda: dj.predictor_corrector(dj.euler(), n_steps=0), "n_steps"),
        (lambda: dj.annealed_langevin(step_lr=0.0), "step_lr"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    grid, x = dj.karras(VP, 3), jnp.ones((1, 3))
    with pytest.raises(ValueError, match="reads Prediction.aux"):
        dj.sample(dj.ancestral_ddpm("learned"), GAUSSIAN.denoise, x, grid, jax.random.key(0))
    with pytest.raises(ValueError, match="alpha = 0"):
        dj.sample(dj.sde_dpm_2m(), GAUSSIAN.denoise, x, dj.uniform(COSINE, 3), jax.random.key(0))


# The recommended solver of the reverse SDE, below and from 15 steps, with its grid.
FEW = dj.sde_adams(2, basis="asinh", scale=0.2, corrector=False)
MANY = dj.sde_adams(3, basis="softlog", scale=0.1)


@pytest.mark.often("vp")
@pytest.mark.parametrize("schedule", [dj.ddpm(), EDM], ids=["vp", "edm"])
def test_full_noise_in_ten_and_twenty_calls(schedule, x64):
    # The start's own error, N(0, sigma^2) at s = 4 in place of the marginal, is included.
    fine = dj.Gaussian(np.linspace(-0.5, 0.5, 16), np.diag(np.geomspace(0.02, 1, 16) ** 2))
    other = dj.Gaussian(np.linspace(-0.8, 0.8, 8), np.diag(np.geomspace(0.05, 0.5, 8) ** 2))
    for data in (fine, other):
        kl = lambda solver, n, scale, data=data: dj.gaussian_kl(solver, data, dj.asinh(schedule, n, scale, s_max=4.0))
        few, many, more_few, more_many = jax.jit(
            lambda kl=kl: (kl(FEW, 10, 0.01), kl(MANY, 10, 0.02), kl(FEW, 20, 0.01), kl(MANY, 20, 0.02))
        )()
        assert few < 0.005
        assert many < 0.01
        assert more_few < 0.001
        assert more_many < 0.0003
    # The best published one at 20 calls on the same Gaussian, to within its last digit: .0022 (SDE-DPM++2M, lu).
    best = jax.jit(lambda: dj.gaussian_kl(dj.sde_dpmpp_2m(), fine, dj.exponential(dj.ddpm(), 20)))
    assert 0.0015 < best() < 0.003


@pytest.mark.parametrize("make", [dj.sde_adams, lambda: dj.sde_adams(4), lambda: dj.sa_solver(4, 4)])
def test_grids_shorter_than_the_order(make):
    denoise = lambda x, level: dj.Prediction(0 * x, x / level.sigma)
    grids = [dj.karras(dj.EDM(), n) for n in (1, 2, 3)]
    run = jax.jit(lambda x, key: [dj.sample(make(), denoise, x, grid, key) for grid in grids])
    for out in run(np.ones((2, 3), np.float32), jax.random.key(0)):
        np.testing.assert_allclose(out, 0, atol=1e-6)  # the last step returns x0, which is 0
