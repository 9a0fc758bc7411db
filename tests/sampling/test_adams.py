"""Exponential Adams: true orders in every form, exactness on Gaussians, known solvers as special cases, the jump."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj
from diffjax.sampling.solvers.adams import BASES

PROCESSES = {"vp": dj.VP(), "cosine": dj.Cosine(), "edm": dj.EDM(), "flow": dj.Flow()}
GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))


def wide_grid(schedule, n):
    # Uniform in asinh(s / 0.3), which is smooth in all three bases, from an s so large that the prediction stands still
    # there: the first steps have fewer points, and from s = 40 their error is what a fit of order 4 finds.
    s = 0.3 * np.sinh(np.linspace(np.arcsinh(1000.0), np.arcsinh(1.0), n + 1))
    return dj.custom(schedule, schedule.time(-2 * np.log(s)))


@pytest.mark.often("2-False", "4-True")
@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_on_every_process(order, corrector, x64, order_fit):
    solver = dj.adams(order, corrector=corrector, scale=0.3)
    fits = order_fit(lambda _: solver, PROCESSES, grid=wide_grid, target="mixture", steps=(96, 160, 256))
    for name, (slope, errors) in fits.items():
        assert abs(slope - solver.order) < 0.2, f"{name}: order {slope:.3f}, errors {errors}"


@pytest.mark.often("x0-*", "v-asinh", "eps-log")
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("predict", ["x0", "v", "eps"])
def test_order_in_every_form(predict, basis, x64, order_fit):
    solver = dj.adams(3, predict, basis=basis, corrector=False, scale=0.3)
    fits = order_fit(lambda _: solver, {"vp": dj.VP()}, grid=wide_grid, target="mixture", steps=(96, 160, 256))
    assert abs(fits["vp"][0] - 3) < 0.2, fits


def test_the_step_to_zero_keeps_its_order(x64):
    # To sigma = 0 on a grid smooth in asinh: order 3, where a basis of log s has a first-order last step.
    x = np.random.default_rng(0).normal(size=(16, 3))
    flow = jax.jit(GAUSSIAN.flow)
    slopes = {}
    for basis in ("asinh", "log"):
        solver, errors = dj.adams(3, "v", basis=basis, corrector=False, scale=0.1), []
        run = jax.jit(lambda x, levels, solver=solver: dj.sample(solver, GAUSSIAN.denoise, x, levels))
        for n in (32, 64, 128):
            levels = dj.asinh(dj.EDM(), n, scale=0.1, s_max=40.0)
            pad = dj.Level(*(jnp.asarray(np.pad(f, (0, 128 - n), mode="edge")) for f in levels))
            exact = flow(40 * x, levels.at(0), levels.at(-1))
            errors.append(np.sqrt(np.mean(np.subtract(run(40 * x, pad), exact) ** 2)))
        slopes[basis] = -np.polyfit(np.log([32, 64, 128]), np.log(errors), 1)[0]
    assert slopes["asinh"] > 2.8 and slopes["log"] < 2.5, slopes


@pytest.mark.often("vp-*", "flow-dense", "edm-dense")
@pytest.mark.parametrize("kind", ["scalar", "diagonal", "eigenpairs", "dense"])
@pytest.mark.parametrize("schedule", PROCESSES)
def test_a_gaussian_is_exact_in_any_number_of_steps(schedule, kind, x64):
    # With the data's own statistics g = 0, from the schedule's noisiest level (alpha = 0 for two of them) to sigma = 0.
    rng = np.random.default_rng(0)
    values, vectors = np.array([1.0, 0.3, 0.01]), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    mean = np.array([0.4, -0.3, 0.1])
    cov = {
        "scalar": 0.3,
        "diagonal": values,
        "eigenpairs": (values, vectors),
        "dense": vectors * values @ vectors.T,
    }[kind]
    truth = dj.Gaussian(mean, cov)
    made = PROCESSES[schedule]
    levels = dj.custom(made, np.linspace(made.t_max, 0.0 if schedule == "edm" else made.t_min, 3))
    x = rng.normal(size=(4, 3)) * np.hypot(levels.alpha[0], levels.sigma[0])
    solvers = dj.adams(2, stats=truth), dj.jump(dj.adams(4, stats=truth), truth)
    run = lambda x: [dj.sample(solver, truth.denoise, x, levels) for solver in solvers]
    exact, *outs = jax.jit(lambda x: [truth.flow(x, levels.at(0), levels.at(-1)), *run(x)])(x)
    for out in outs:
        np.testing.assert_allclose(out, exact, atol=1e-9)


def test_x0_in_log_s_of_two_points_is_the_true_second_order_form_of_dpmpp_2m(x64):
    # DPM-Solver++(2M) truncates the integral of the linear term; both are second order and agree to third.
    x = np.random.default_rng(0).normal(size=(16, 3))
    solvers = dj.adams(2, "x0", basis="log", corrector=False), dj.dpmpp_2m()
    gaps = []
    for n in (50, 100):
        levels = dj.logsnr(dj.EDM(), n, s_min=0.1, s_max=40.0)
        run = jax.jit(lambda x, levels=levels: [dj.sample(solver, GAUSSIAN.denoise, x, levels) for solver in solvers])
        gaps.append(np.abs(np.subtract(*run(40 * x))).max())
    assert gaps[1] < 0.01 and gaps[0] / gaps[1] > 3.4


def test_one_point_is_euler(x64):
    levels = dj.karras(dj.VP(), 9)
    solvers = dj.euler(), dj.adams(1, "x0", corrector=False), dj.adams(1, "eps", corrector=False)
    run = jax.jit(lambda x: [dj.sample(solver, GAUSSIAN.denoise, x, levels) for solver in solvers])
    expected, of_x0, of_eps = run(np.full((2, 3), 20.0))
    np.testing.assert_allclose(of_x0, expected, rtol=1e-12)
    np.testing.assert_allclose(of_eps, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "make", [dj.adams, pytest.param(lambda: dj.jump(dj.adams(2), GAUSSIAN), marks=pytest.mark.slow)]
)
def test_traced_padded_and_float32_agree(make):
    solver, levels = make(), dj.uniform(dj.Flow(), 12)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    run = jax.jit(lambda x, levels: dj.sample(solver, GAUSSIAN.denoise, x, levels))
    concrete = jax.jit(lambda x: dj.sample(solver, GAUSSIAN.denoise, x, levels))(x)
    # float32 tables against float64 ones, and steps of no length before and after: rounding only.
    for before, after in ((0, 3), (3, 0), (2, 1)):
        grid = dj.Level(*(np.pad(f, (before, after), mode="edge") for f in levels))
        np.testing.assert_allclose(run(x, grid), concrete, atol=5e-5)
    # From alpha = 0 to sigma = 0.
    grad = jax.jit(jax.grad(lambda x, levels: dj.sample(solver, GAUSSIAN.denoise, x, levels).sum()))(x, grid)
    assert np.isfinite(grad).all()


def test_float32_floor(x64):
    # Rounding, not the method, is what 200 steps of the fourth-order method leave: about 1e-6 of the data's std.
    levels = dj.asinh(dj.EDM(), 200, scale=0.1, s_max=40.0)
    x = 40 * np.random.default_rng(0).normal(size=(64, 3))
    exact = jax.jit(lambda x: GAUSSIAN.flow(x, levels.at(0), levels.at(-1)))(x)
    errors, in_dtype_of_x = {}, lambda x, level: jax.tree.map(lambda a: a.astype(x.dtype), GAUSSIAN.denoise(x, level))
    for dtype in (np.float32, np.float64):
        run = jax.jit(lambda x: dj.sample(dj.adams(), in_dtype_of_x, x, levels))
        out = run(jnp.asarray(x, dtype))
        errors[dtype] = float(np.sqrt(np.mean((np.asarray(out, np.float64) - exact) ** 2)))
    assert errors[np.float64] < 1e-6 and errors[np.float32] < 1e-5, errors


def test_the_jump_costs_nothing_and_keeps_other_solvers(x64):
    levels = dj.karras(dj.EDM(), 10)
    calls = []

    def counted(x, level):
        jax.debug.callback(lambda _: calls.append(1), level.t)
        return GAUSSIAN.denoise(x, level)

    x = np.full((2, 3), 80.0)
    for solver in (dj.dpmpp_2m(), dj.heun("alpha"), dj.adams()):
        calls.clear()
        jumped = dj.jump(solver, GAUSSIAN)
        out = jax.jit(lambda x, jumped=jumped: dj.sample(jumped, counted, x, levels))(x)
        jax.block_until_ready(out)
        jax.effects_barrier()
        assert len(calls) == jumped.nfe(10) == solver.nfe(9)
        landed = jax.jit(lambda x: GAUSSIAN.flow(x, levels.at(0), levels.at(1)))(x)
        rest = jax.jit(lambda x, s=solver: dj.sample(s, GAUSSIAN.denoise, x, levels.at(slice(1, None))))(landed)
        np.testing.assert_allclose(out, rest, rtol=1e-10)


def test_float32_state_stays_float32_where_float64_is_enabled(x64):
    levels, x = dj.karras(dj.EDM(), 5), np.full((2, 3), 80.0, np.float32)
    stats = dj.Gaussian(np.full(3, 0.1), np.full(3, 0.5))
    network = lambda x, level: dj.Prediction(0.1 * x, (x - level.alpha * 0.1 * x) / level.sigma)
    for solver in (dj.adams(stats=stats), dj.jump(dj.adams(stats=stats), stats)):
        assert jax.jit(lambda x, s=solver: dj.sample(s, network, x, levels))(x).dtype == jnp.float32


def test_messages():
    for bad, match in (
        (lambda: dj.adams(5), "order: expected 1, 2, 3 or 4, got 5"),
        (lambda: dj.adams(2, "noise"), "'x0', 'v' or 'eps', got 'noise'"),
        (lambda: dj.adams(2, basis="s"), "unknown basis 's'; known: asinh, half, log"),
        (lambda: dj.adams(2, "x0", stats=GAUSSIAN), "stats belong to predict='v'"),
        (lambda: dj.adams(2, scale=0.0), "must be positive"),
        (
            lambda: dj.sample(dj.adams(stats=GAUSSIAN), GAUSSIAN.denoise, jnp.ones((1, 4)), dj.karras(dj.EDM(), 4)),
            r"mean \(3,\) and eigenvectors \(3, 3\) for samples \(4,\)",
        ),
        (
            lambda: dj.sample(dj.adams(2, "eps"), GAUSSIAN.denoise, jnp.ones((1, 3)), dj.uniform(dj.Flow(), 4)),
            "start the grid at alpha > 0",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
