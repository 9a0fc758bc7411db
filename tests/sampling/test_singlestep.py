"""Single-step solvers: orders against exact flows, both ends of the noise range, and budgets that are too small."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj
from diffjax.core.types import Level, Prediction
from diffjax.sampling.solvers import stability

PROCESSES = {"vp": dj.VP(), "cosine": dj.Cosine(), "edm": dj.EDM(), "flow": dj.Flow()}
GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))
BLOCKS = {
    "dpm_solver(3)": dj.dpm_solver(3),
    "dpm_solver(3, x0, heun)": dj.dpm_solver(3, "x0", "heun"),
    "dpm_solver(2, lower_order_final)": dj.dpm_solver(2, lower_order_final=True),
    "dpmpp_2s": dj.dpmpp_2s(),
}
INNER = {
    "dpm2": dj.dpm2,
    "dpm2(r=0.7)": partial(dj.dpm2, r=0.7),
    "midpoint": dj.midpoint,
    "rk4": dj.rk4,
}


@pytest.mark.often("dpm_solver(3)", "dpmpp_2s")
@pytest.mark.parametrize("name", BLOCKS)
def test_order_of_blocks(name, order_fit, x64):
    # Multiples of 2 and of 3: whole blocks.
    target = "mixture" if "3" in name else "gaussian"
    fits = order_fit(lambda _: BLOCKS[name], PROCESSES, target=target, steps=(48, 96, 192))
    for label, (slope, errors) in fits.items():
        assert abs(slope - BLOCKS[name].order) < 0.2, f"{label}: order {slope:.3f}, errors {errors}"


@pytest.mark.often("dpm2", "rk4")
@pytest.mark.parametrize("name", INNER)
def test_order_with_calls_between_grid_points(name, order_fit, x64):
    steps = (16, 32, 64) if name == "rk4" else (32, 64, 128)
    target = "gaussian" if "dpm2" in name else "mixture"  # the midpoint rule gains an order on a Gaussian
    for label, (slope, errors) in order_fit(INNER[name], PROCESSES, target=target, steps=steps).items():
        assert abs(slope - INNER[name](dj.VP()).order) < 0.2, f"{label}: order {slope:.3f}, errors {errors}"


def test_rk4_and_midpoint_keep_their_order_down_to_sigma_zero(x64):
    # From near alpha = 0 to sigma = 0 in equal steps of the flow's time.
    target = dj.Gaussian(np.zeros(2), np.diag([1.0, 0.2]))
    x = np.random.default_rng(0).normal(size=(8, 2))
    flow = jax.jit(target.flow)
    for make, order in ((dj.rk4, 4), (dj.midpoint, 3)):  # the midpoint rule gains one on Gaussian data
        solver = make(dj.Flow())
        run = jax.jit(lambda x, levels, s=solver: dj.sample(s, target.denoise, x, levels))
        errors = []
        for n in (16, 32, 64):
            grid = dj.custom(dj.Flow(), np.linspace(1.0, 0.0, n + 1))
            longer = Level(*(jnp.asarray(np.pad(field, (0, 64 - n), mode="edge")) for field in grid))
            errors.append(np.abs(np.subtract(run(x, longer), flow(x, grid.at(0), grid.at(-1)))).max())
        slope = -np.polyfit(np.log([16, 32, 64]), np.log(errors), 1)[0]
        assert abs(slope - order) < 0.3, (slope, errors)


def everything():
    flow = dj.Flow()
    return BLOCKS | {name: make(flow) for name, make in INNER.items()} | {"rk4(alpha)": dj.rk4(flow, "alpha")}


@pytest.mark.often("dpm_solver(3)", "dpmpp_2s", "rk4")
@pytest.mark.filterwarnings("ignore:.*unstable")
@pytest.mark.parametrize("name", everything())
def test_from_pure_noise_to_data_in_float32(name):
    solver = everything()[name]
    grid = dj.uniform(dj.Flow(), 9)  # alpha = 0 first, sigma = 0 last
    longer = Level(*(np.append(field, [field[-1]] * 2) for field in grid))
    x = jax.random.normal(jax.random.key(0), (4, 3))

    def run(x, levels):
        out, predictions = dj.sample(solver, GAUSSIAN.denoise, x, levels, trace=lambda info: info.prediction.x0)
        return jnp.sum(out**2), (out, predictions)

    (_, (out, x0)), grad = jax.jit(jax.value_and_grad(lambda x: run(x, grid), has_aux=True))(x)
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(grad))
    if name not in ("midpoint", "rk4", "rk4(alpha)"):  # these keep their order on the last step
        np.testing.assert_allclose(out, x0[-1], atol=1e-6)
    (_, (padded, _)), grad_padded = jax.jit(jax.value_and_grad(run, has_aux=True))(x, longer)
    np.testing.assert_allclose(padded, out, atol=2e-5)
    np.testing.assert_allclose(grad_padded, grad, atol=2e-4)
    # The floor: what float32 arithmetic adds to nine steps of it.
    with jax.enable_x64(True):
        exact = jax.jit(lambda x: run(x, grid)[1][0])(jnp.asarray(np.asarray(x, np.float64)))
    np.testing.assert_allclose(out, exact, atol=5e-6)


@pytest.mark.parametrize("name", ["dpm_solver(3)", "dpm2", "rk4"])
def test_nfe_is_the_number_of_calls(name):
    solver, calls = everything()[name], []

    def counted(x, level):
        jax.debug.callback(lambda: calls.append(1))
        return GAUSSIAN.denoise(x, level)

    grid = dj.karras(dj.Flow(), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        jax.block_until_ready(jax.jit(lambda x: dj.sample(solver, counted, x, grid))(jnp.ones((2, 3))))
    jax.effects_barrier()
    assert len(calls) == solver.nfe(7)


def test_dpm2_calls_at_the_geometric_mean(x64):
    # Two levels of EDM, s = 4 and 1: the inner call is at 2, and its slope carries the whole step.
    seen = []

    def denoise(x, level):
        seen.append(float(level.sigma))
        return Prediction(x - level.sigma * level.sigma, level.sigma * jnp.ones_like(x))  # eps = sigma

    grid = Level(np.log([4.0, 1.0]) / 4, np.ones(2), np.array([4.0, 1.0]))
    solver = dj.dpm2(dj.EDM())
    memory, coef = solver.init(jnp.zeros((1, 1)), grid)
    at = dj.core.types.Step(0, grid.at(0), grid.at(1), jax.tree.map(lambda a: a[0], coef), None)
    with jax.disable_jit():
        out = solver.step(denoise, jnp.full((1, 1), 10.0), memory, at)[0]
    np.testing.assert_allclose(seen, [4.0, 2.0])
    np.testing.assert_allclose(out, 10.0 + (1.0 - 4.0) * 2.0)


THIN = 1.3e-5**0.5  # the std along which Heun is worst on EDM's grids
STRIPS = dj.Mixture([1.0, 2.0], [[1.0, 0.0], [-0.6, 0.5]], [np.diag([0.3, THIN**2])] * 2)


def test_where_it_warns_a_mixture_blows_up_and_elsewhere_not(x64):
    solver = dj.heun("alpha")
    run = jax.jit(lambda x, levels: dj.sample(solver, STRIPS.denoise, x, levels))
    draw = jax.jit(lambda levels: dj.prior(jax.random.key(0), (4000, 2), levels))
    two = {"first": 0.5, "second": 0.5}
    for n in (5, 8, 12, 18):
        grid = dj.karras(dj.EDM(), n)
        longer = Level(*(np.pad(field, (0, 18 - n), "edge") for field in grid))
        out = np.asarray(run(draw(longer), longer))
        # The median distance from the nearer strip over that of a normal: few samples between strips do not count.
        off = np.minimum(np.abs(out[:, 1]), np.abs(out[:, 1] - 0.5))
        observed = np.median(off) / 0.6745 / THIN
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            coef = solver.init(out, grid)[1]
        figure = np.interp(
            THIN**2, stability.VARIANCES, stability.gain(grid, coef | two | {"inner": grid.at(slice(1, None))})
        )
        # The median of 4,000 has a standard error of 2 %. A mixture adds its own error to a Gaussian's, so where the
        # figure is large it is a lower bound.
        if caught:
            assert observed > 0.92 * figure > 2.5, (n, observed, figure)
        else:
            assert observed < 1.8, (n, observed, figure)
        assert bool(caught) == (n <= 8)


def test_the_gain_in_closed_form_is_that_of_the_solver(x64):
    variance = stability.VARIANCES
    for grid in (dj.karras(dj.EDM(), 6), dj.uniform(dj.Flow(), 7)):
        directions = dj.Gaussian(np.zeros(49), np.diag(variance))
        start = np.hypot(grid.alpha[0] * variance**0.5, grid.sigma[0])[None]
        for solver, extra in (
            (dj.heun(), {"inner": grid.at(slice(1, None)), "first": 0.5, "second": 0.5}),
            (dj.dpm2(dj.Flow(), 0.7), {"first": 1 - 1 / 1.4, "second": 1 / 1.4, "x0": np.zeros(len(grid.t) - 1)}),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = jax.jit(lambda x, s=solver, g=grid, d=directions: dj.sample(s, d.denoise, x, g))
                out = np.abs(np.asarray(run(start))[0] / np.sqrt(variance))
                coef = solver.init(start, grid)[1]
            np.testing.assert_allclose(stability.gain(grid, coef | extra), out, rtol=1e-8)


def test_warns_where_few_steps_explode_and_only_there():
    x = np.zeros((1, 3))
    for solver in (dj.heun(), dj.heun("alpha"), dj.dpm2(dj.EDM())):
        with pytest.warns(RuntimeWarning, match="of 5 steps.* times that of the data; use about .* calls.*unipc"):
            solver.init(x, dj.karras(dj.EDM(), 5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            solver.init(x, dj.karras(dj.EDM(), 18))
            solver.init(x, dj.karras(dj.VP(), 18))
            jax.jit(lambda levels, s=solver: s.init(x, levels)[1])(dj.karras(dj.EDM(), 5))  # traced: silent
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (2, 5, 10):
            dj.heun().init(x, dj.uniform(dj.Flow(), n))


def test_messages():
    for make, match in [
        (partial(dj.dpm2, dj.VP(), r=0.0), r"r: expected a number in \(0, 1\], got 0.0"),
        (partial(dj.rk4, dj.VP(), "beta"), "unknown gauge 'beta'; known: alpha, sigma, sum"),
        (partial(dj.midpoint, dj.VP(), "beta"), "unknown gauge"),
        (partial(dj.dpm_solver, 4), "order: expected one of 1, 2, 3, got 4"),
        (partial(dj.dpm_solver, predict="v"), "predict"),
    ]:
        with pytest.raises(ValueError, match=match):
            make()
