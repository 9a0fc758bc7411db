"""Multistep solvers: orders against exact flows, exact integrals of polynomials, and both ends of the noise range."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj
from diffjax.core.types import Level, Prediction

PROCESSES = {"vp": dj.VP(), "cosine": dj.Cosine(), "edm": dj.EDM(), "flow": dj.Flow()}
GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))
SOLVERS = {
    "dpm_multistep(2, eps, heun)": dj.dpm_multistep(2, "eps", "heun"),
    "dpm_multistep(3)": dj.dpm_multistep(3),
    "dpmpp_2m": dj.dpmpp_2m(),
    "dpmpp_3m": dj.dpmpp_3m(),
    "deis": dj.deis(),
    "lms": dj.lms(),
    "unipc(2)": dj.unipc(),
    "unipc(3, bh1)": dj.unipc(3, "bh1"),
    "unipc(2, eps)": dj.unipc(2, predict="eps", lower_order_final=False),
    "plms": dj.plms(),
    "ipndm": dj.ipndm(),
}


def late_grid(schedule, n):
    """Uniform in log-SNR where eps and x0 change at once, so that a low-order start shows at moderate n."""
    return dj.custom(schedule, schedule.time(dj.logsnr(schedule, n, s_min=0.1, s_max=1.0).logsnr))


# Grids and numbers of steps at which the asymptotic order is reached: methods that start or end with an Euler step
# first gain at the rate of the steps between.
ORDERS = {
    "dpm_multistep(2, eps, heun)": {},
    "dpm_multistep(3)": {},
    "dpmpp_3m": {"steps": (64, 128, 256)},
    "deis": {"grid": late_grid, "steps": (64, 128, 256)},
    "lms": {"grid": late_grid, "steps": (64, 128, 256)},
    "unipc(2)": {"steps": (64, 128, 256)},
    "unipc(2, eps)": {},
    "plms": {},
    "ipndm": {},
}


@pytest.mark.parametrize("name", ORDERS)
def test_order(name, order_fit, x64):
    for label, (slope, errors) in order_fit(lambda _: SOLVERS[name], PROCESSES, **ORDERS[name]).items():
        assert abs(slope - SOLVERS[name].order) < 0.2, f"{label}: order {slope:.3f}, errors {errors}"


def test_the_published_third_order_is_second(order_fit, x64):
    fits = {
        make: order_fit(lambda _, make=make: make, {"vp": dj.VP()}, steps=(64, 128, 256))["vp"]
        for make in (dj.dpm_multistep(3), dj.dpmpp_3m())
    }
    (published, worse), (ours, better) = fits.values()
    assert published < 2.2 and ours > 2.8, (published, ours)
    assert worse[-1] > 20 * better[-1]


def test_pndm_is_second_order_on_any_grid_and_fourth_on_equal_steps_in_s(order_fit, x64):
    for label, (slope, _) in order_fit(dj.pndm, {"vp": dj.VP(), "flow": dj.Flow()}).items():
        assert abs(slope - 2) < 0.2, (label, slope)

    def equal(schedule, n):
        return dj.custom(schedule, np.linspace(3.0, 0.5, n + 1))  # EDM's argument is s

    assert abs(order_fit(dj.pndm, {"edm": dj.EDM()}, grid=equal, steps=(128, 256, 512))["edm"][0] - 4) < 0.2


def test_unipc_without_a_low_order_end_reaches_order_plus_one(order_fit, x64):
    solver = dj.unipc(2, lower_order_final=False)
    assert solver.order == 3
    assert abs(order_fit(lambda _: solver, {"flow": dj.Flow()})["flow"][0] - 3) < 0.2


def polynomial(half, degree):
    """A denoiser whose `half` is a polynomial of the log-SNR (or of s, for "s"), whatever x is."""

    def value(xp, level):
        u = level.s if half == "s" else level.logsnr / 2
        return 1.0 + sum((0.7 * u) ** k for k in range(1, degree + 1))

    def denoise(x, level):
        known = jnp.ones_like(x) * value(jnp, level)
        if half == "x0":
            return Prediction(known, (x - level.alpha * known) / level.sigma)
        return Prediction((x - level.sigma * known) / level.alpha, known)

    def exact(x, levels):
        """From the last but one level to the last by 40 Gauss-Legendre nodes in s or 1 / s."""
        nodes, weights = np.polynomial.legendre.leggauss(40)
        begin, end = levels.at(-2), levels.at(-1)
        variable = (lambda level: 1 / level.s) if half == "x0" else (lambda level: level.s)
        gauge = (lambda level: level.sigma) if half == "x0" else (lambda level: level.alpha)
        lo, hi = variable(begin), variable(end)
        at = (lo + hi) / 2 + (hi - lo) / 2 * nodes
        s = 1 / at if half == "x0" else at
        integral = (hi - lo) / 2 * np.sum(weights * value(np, Level(s, np.ones_like(s), s)))
        return gauge(end) * (x / gauge(begin) + integral)

    return denoise, exact


UNEVEN = np.array([4.0, 3.1, 1.9, 1.5, 0.8, 0.7, 0.3])


@pytest.mark.parametrize(
    ("solver", "half", "degree"),
    [
        (dj.dpmpp_3m(), "x0", 2),
        (dj.dpm_multistep(2, solver_type="heun", lower_order_final=False), "x0", 1),
        (dj.dpm_multistep(2, "eps", "heun", lower_order_final=False), "eps", 1),
        (dj.deis(3, lower_order_final=False), "eps", 2),
        (dj.unipc(3, lower_order_final=False, disable_corrector=range(9)), "x0", 2),
        (dj.unipc(3, "bh1", "eps", lower_order_final=False, disable_corrector=range(9)), "eps", 2),
        (dj.lms(4), "s", 3),
    ],
)
def test_weights_integrate_polynomials_on_uneven_steps(solver, half, degree, x64):
    levels = dj.Flow().at_logsnr(-2 * np.log(UNEVEN))
    denoise, exact = polynomial(half, degree)
    trace = lambda info: (info.x, info.x_next)
    states = jax.jit(lambda x: dj.sample(solver, denoise, x, levels, trace=trace)[1])(np.ones((1, 1)))
    # The start of the last step is whatever the solver made of it; the step itself must be exact.
    begin, end = (np.asarray(a)[-1, 0, 0] for a in states)
    np.testing.assert_allclose(end, exact(begin, levels), rtol=1e-10)


@pytest.mark.often("dpmpp_2m", "deis", "unipc(3, bh1)")
@pytest.mark.parametrize("name", SOLVERS)
def test_from_pure_noise_to_data_in_float32(name):
    solver = SOLVERS[name]
    grid = dj.uniform(dj.Flow(), 9)  # alpha = 0 first, sigma = 0 last
    longer = Level(*(np.append(field, [field[-1]] * 2) for field in grid))
    x = jax.random.normal(jax.random.key(0), (4, 3))

    def run(x, levels):
        out, predictions = dj.sample(solver, GAUSSIAN.denoise, x, levels, trace=lambda info: info.prediction.x0)
        return jnp.sum(out**2), (out, predictions)

    (_, (out, x0)), grad = jax.jit(jax.value_and_grad(lambda x: run(x, grid), has_aux=True))(x)
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(grad))
    # The others keep their order on the last step, or interpolate eps after correcting x.
    if name not in ("deis", "lms", "plms", "ipndm", "unipc(2, eps)"):
        np.testing.assert_allclose(out, x0[-1], atol=1e-6)
    # A traced grid, padded: coefficients by the other route, in float32, and two steps that are skipped.
    (_, (padded, _)), grad_padded = jax.jit(jax.value_and_grad(run, has_aux=True))(x, longer)
    np.testing.assert_allclose(padded, out, atol=2e-5)
    np.testing.assert_allclose(grad_padded, grad, atol=2e-4)
    # The floor: what float32 arithmetic adds to nine steps of it.
    with jax.enable_x64(True):
        exact = jax.jit(lambda x: run(x, grid)[1][0])(jnp.asarray(np.asarray(x, np.float64)))
    np.testing.assert_allclose(out, exact, atol=5e-6)


def test_a_step_of_no_length_in_the_middle_changes_nothing(x64):
    grid = dj.karras(dj.EDM(), 8)
    doubled = Level(*(np.insert(field, 4, field[4]) for field in grid))
    names = "dpmpp_3m", "unipc(3, bh1)", "lms"

    @jax.jit
    def run(key):
        x = dj.prior(key, (2, 3), grid)
        return [[dj.sample(SOLVERS[name], GAUSSIAN.denoise, x, g) for g in (grid, doubled)] for name in names]

    for short, long in run(jax.random.key(1)):
        np.testing.assert_allclose(long, short, rtol=1e-12)


def test_deis_is_the_dpm_solver_with_the_whole_quadratic(x64):
    # Both interpolate eps in log-SNR; with two predictions they are one method (heun weights).
    grid = dj.logsnr(dj.VP(), 20)
    x = np.random.default_rng(1).normal(size=(2, 3)) * grid.sigma[0]
    solvers = dj.deis(2), dj.dpm_multistep(2, "eps", "heun")
    two = jax.jit(lambda x: [dj.sample(solver, GAUSSIAN.denoise, x, grid) for solver in solvers])(x)
    np.testing.assert_allclose(*two, rtol=1e-12)


def test_messages():
    for make, match in [
        (partial(dj.dpm_multistep, 4), "order: expected one of 1, 2, 3, got 4"),
        (partial(dj.dpm_multistep, predict="v"), "predict: expected one of x0, eps, got 'v'"),
        (partial(dj.dpm_multistep, solver_type="logrho"), "solver_type"),
        (partial(dj.unipc, variant="bh3"), "variant: expected one of bh1, bh2"),
        (partial(dj.unipc, disable_corrector=(-1,)), "disable_corrector"),
        (partial(dj.lms, 5), "order"),
        (partial(dj.plms, "x0"), "predict"),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
