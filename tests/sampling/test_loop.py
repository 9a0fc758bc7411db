"""The loop: its three forms agree, it is differentiable and does not retrace, keys and grids are checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3]), np.array([[1.0, 0.2], [0.2, 0.1]]))
MIXTURE = dj.Mixture([1.0, 2.0], [[1.0, 0.0], [-1.0, 0.0]], [0.05 * np.eye(2)] * 2)
SOLVERS = {
    "ddim": dj.ddim(),
    "ddpm": dj.ddim(1.0),
    "heun": dj.heun(),
    "dpmpp_2m": dj.dpmpp_2m(),
    "churn": dj.churn(dj.heun("alpha"), dj.EDM(), s_churn=10.0),
}


def normal(*shape, std=1.0):
    return (std * np.random.default_rng(0).normal(size=shape)).astype(np.float32)


def test_the_three_line_example():
    def f(x, t):
        return -x

    noise, key = jnp.ones((2, 4, 4, 1)), jax.random.key(0)
    levels = dj.uniform(dj.Flow(), 40)
    x0 = dj.sample(dj.heun(), dj.denoiser(f, dj.FLOW), noise, levels, key)
    # dx/ds = -x from s = 1 to 0: e, to the error of 40 second-order steps, e / 40^2.
    np.testing.assert_allclose(x0, np.e, atol=np.e / 40**2)


@pytest.mark.parametrize("name", SOLVERS)
def test_scan_unroll_and_host_agree(name):
    grid = dj.karras(dj.EDM(), 6)
    trace = lambda info: {"x0": info.prediction.x0, "index": info.index, "s": info.level.s}
    x, key = normal(3, 2, std=80), jax.random.key(1)
    results = [
        dj.sample(SOLVERS[name], GAUSSIAN.denoise, x, grid, key, trace=trace, loop=loop)
        for loop in ("scan", "unroll", "host")
    ]
    for out, traced in results[1:]:
        # The same arithmetic fused differently: a few float32 ulp of the largest intermediate, 80.
        np.testing.assert_allclose(out, results[0][0], atol=1e-4)
        np.testing.assert_allclose(traced["x0"], results[0][1]["x0"], atol=1e-4)
        np.testing.assert_array_equal(traced["index"], np.arange(6))
        np.testing.assert_allclose(traced["s"], grid.s[:-1], rtol=1e-6)


def test_no_retrace_when_only_the_grid_changes():
    traces = []

    @jax.jit
    def run(x, levels):
        traces.append(1)
        return dj.sample(dj.dpmpp_2m(), GAUSSIAN.denoise, x, levels)

    x = jnp.ones((2, 2))
    for schedule in (dj.EDM(), dj.VP(), dj.Flow()):
        for spacing in (dj.karras, dj.exponential, dj.asinh):
            run(x, spacing(schedule, 5))
    assert len(traces) == 1


@pytest.mark.parametrize("name", SOLVERS)
def test_a_padded_grid_is_the_short_grid(name):
    grid = dj.karras(dj.EDM(), 5)
    longer = dj.Level(*(np.pad(field, (0, 4), mode="edge") for field in grid))
    run = lambda x, key: [dj.sample(SOLVERS[name], GAUSSIAN.denoise, x, levels, key) for levels in (grid, longer)]
    short, long = jax.jit(run)(normal(3, 2, std=80), jax.random.key(1))
    np.testing.assert_allclose(long, short, atol=1e-5)


@pytest.mark.often("*-scan", "ddim-unroll")
@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "ddpm"])
def test_gradients_are_finite_on_the_full_flow_grid(name, loop):
    # From alpha = 0 to sigma = 0 in float32, through the whole run, also batched (where cond becomes select).
    grid = dj.uniform(dj.Flow(), 5)
    head = dj.FLOW

    def objective(w, x):
        f = lambda x, t: w * x * jnp.cos(t)[:, None]
        return jnp.sum(dj.sample(SOLVERS[name], dj.denoiser(f, head), x, grid, jax.random.key(0), loop=loop) ** 2)

    x = normal(3, 2)
    value, (dw, dx) = jax.jit(jax.value_and_grad(objective, argnums=(0, 1)))(np.float32(0.3), x)
    assert np.isfinite(value) and np.isfinite(dw) and np.all(np.isfinite(dx))
    step = 1e-2
    ends = jax.jit(lambda x: (objective(0.3 + step, x), objective(0.3 - step, x)))(x)
    numeric = np.subtract(*ends) / (2 * step)
    np.testing.assert_allclose(dw, numeric, rtol=0.01)  # central difference of float32 values
    batched = jax.jit(jax.vmap(jax.grad(objective)))(np.array([0.3, 0.5], np.float32), np.stack([x, x]))
    np.testing.assert_allclose(batched[0], dw, rtol=1e-4)


def test_prior_has_the_std_of_x_at_the_first_level():
    # Of the peers, one draws unit noise for a VE process that starts at sigma 80.
    n = 100_000
    draw = jax.jit(lambda grid: dj.prior(jax.random.key(0), (n, 1), grid, mean=0.5, std=0.3))
    for schedule in (dj.VE(0.01, 80.0), dj.EDM(), dj.VP(), dj.Flow(), dj.ddpm(), dj.SubVP()):
        for grid in (dj.uniform(schedule, 4), dj.karras(schedule, 4, s_max=10.0)):
            x = np.asarray(draw(grid))
            x0 = 0.5 + 0.3 * np.random.default_rng(0).normal(size=n)
            eps = np.random.default_rng(1).normal(size=n)
            true = grid.alpha[0] * x0 + grid.sigma[0] * eps
            # Standard errors: .22 % of a std, .32 % of a mean; two draws each, five of them.
            np.testing.assert_allclose(x.std(), true.std(), rtol=5 * 2**0.5 * 0.0022)
            np.testing.assert_allclose(x.mean(), true.mean(), atol=5 * 2**0.5 * 0.0032 * true.std())


def test_noise_of_a_sample_does_not_depend_on_the_batch():
    grid = dj.karras(dj.EDM(), 5)
    keys = jax.random.split(jax.random.key(7), 5)
    starts = jax.jit(jax.vmap(lambda k: jax.random.fold_in(k, 1000)))(keys)
    noise = dj.prior(starts, (5, 2), grid)
    np.testing.assert_array_equal(dj.prior(starts[3:4], (1, 2), grid), noise[3:4])  # bit for bit
    run = jax.jit(lambda keys, x: dj.sample(dj.ddim(1.0), GAUSSIAN.denoise, x, grid, keys))
    np.testing.assert_allclose(run(keys[3:4], noise[3:4]), run(keys, noise)[3:4], rtol=1e-5, atol=1e-6)


def test_injected_noise_replaces_the_key():
    grid = dj.karras(dj.EDM(), 4)

    @jax.jit
    def both(x, key):
        fold = lambda i, j: jax.random.fold_in(jax.random.fold_in(key, i), j)
        noise = lambda i, j: jax.random.normal(fold(i, j), x.shape)
        run = lambda **given: dj.sample(dj.ddim(1.0), GAUSSIAN.denoise, x, grid, **given)
        return run(noise=noise), run(key=key)

    np.testing.assert_allclose(*both(np.full((2, 2), 80.0, np.float32), jax.random.key(3)), rtol=1e-6)


def test_bfloat16_state_is_sampled_in_float32():
    grid = dj.karras(dj.EDM(), 4)
    run = jax.jit(lambda x: dj.sample(dj.heun(), GAUSSIAN.denoise, x, grid))
    assert run(np.ones((2, 2), jnp.bfloat16)).dtype == jnp.float32


def test_progress_wraps_the_host_loop():
    seen = []

    def progress(steps):
        for i in steps:
            seen.append(i)
            yield i

    dj.sample(dj.euler(), GAUSSIAN.denoise, jnp.ones((1, 2)), dj.karras(dj.EDM(), 4), loop="host", progress=progress)
    assert seen == [0, 1, 2, 3]


def test_sharded_sampling_is_single_device_sampling(tmp_path):
    """On 8 fake devices, in a process of its own since the device count is fixed at start."""
    import subprocess
    import sys

    script = """
import jax, jax.numpy as jnp, numpy as np, diffjax as dj
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
assert jax.device_count() == 8
mixture = dj.Mixture([1.0, 2.0], [[1.0, 0.0], [-1.0, 0.0]], [0.05 * np.eye(2)] * 2)
mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
grid = dj.karras(dj.EDM(), 6)
keys = jax.random.split(jax.random.key(0), 16)
x = dj.prior(keys, (16, 2), grid)
split = NamedSharding(mesh, P("data"))
for solver in (dj.dpmpp_2m(), dj.heun(), dj.ddim(1.0)):
    run = lambda x, k: dj.sample(solver, mixture.denoise, x, grid, k)
    one = jax.jit(run)(x, keys)
    many = jax.jit(run, in_shardings=split, out_shardings=split)(jax.device_put(x, split), jax.device_put(keys, split))
    assert len(many.sharding.device_set) == 8
    # The same arithmetic per sample; programs of another shape may fuse differently, a few ulp of 80.
    np.testing.assert_allclose(many, one, atol=1e-4)
    noise = jax.jit(lambda k: dj.normal(k, x), in_shardings=split)(jax.device_put(keys, split))
    np.testing.assert_array_equal(noise, dj.normal(keys, x))
"""
    env = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: dj.Level(*(a[::-1] for a in g)), "from noise to data"),
        (lambda g: g.at(slice(0, 1)), r"shape \[n \+ 1\]"),
        (lambda g: g._replace(t=g.t[:-1]), r"t \(4,\), alpha \(5,\)"),
        (lambda g: g._replace(sigma=g.sigma * np.nan), "numbers >= 0"),
    ],
)
def test_bad_grids(change, message):
    with pytest.raises(ValueError, match=message):
        dj.sample(dj.euler(), GAUSSIAN.denoise, jnp.ones((1, 2)), change(dj.karras(dj.EDM(), 4)))


def test_other_messages():
    grid = dj.uniform(dj.Flow(), 4)
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="pass sample"):
        dj.sample(dj.ddim(1.0), GAUSSIAN.denoise, x, grid)
    with pytest.raises(ValueError, match="one of scan, unroll, host"):
        dj.sample(dj.euler(), GAUSSIAN.denoise, x, grid, loop="while")
    with pytest.raises(ValueError, match="undefined at alpha = 0"):
        dj.sample(dj.euler(), dj.denoiser(lambda x, t: x, dj.EPS), x, grid)
    with pytest.raises(ValueError, match="one key per sample"):
        dj.sample(dj.ddim(1.0), GAUSSIAN.denoise, x, grid, jax.random.split(jax.random.key(0), 2))
    with pytest.raises(ValueError, match="cannot run inside jit"):
        jax.jit(lambda x: dj.sample(dj.euler(), GAUSSIAN.denoise, x, grid, loop="host"))(x)


@pytest.mark.parametrize(
    "solver, denoise, levels, key, match",
    [
        (dj.heun, None, None, None, r"got function heun; call it, heun\(\)"),
        ("heun", None, None, None, "got str heun|got str 'heun'"),
        (None, 3, None, None, "expected a function"),
        (None, lambda x, level: x, None, None, r"wrapped: denoiser\(f, head\)"),
        (None, None, np.linspace(1, 0, 5), None, "expected a Level"),
        (None, None, None, 0, r"jax.random.key\(seed\)"),
        (None, None, None, jax.random.PRNGKey(0), r"jax.random.key\(seed\)"),
    ],
)
def test_slips_are_named(solver, denoise, levels, key, match):
    given = [
        a if a is not None else b
        for a, b in zip(
            (solver, denoise, levels), (dj.ddim(1.0), GAUSSIAN.denoise, dj.karras(dj.EDM(), 4)), strict=True
        )
    ]
    with pytest.raises((TypeError, ValueError), match=match):
        dj.sample(given[0], given[1], jnp.ones((2, 2)), given[2], key if key is not None else jax.random.key(0))


def poisoned(step):
    """A denoiser that returns NaN from the given level on."""

    def denoise(x, level):
        p = GAUSSIAN.denoise(x, level)
        return p._replace(x0=jnp.where(level.t <= dj.karras(dj.EDM(), 6).t[step] + 1e-4, jnp.nan, p.x0))

    return denoise


@pytest.mark.parametrize("loop", dj.sampling.loop.LOOPS)
def test_the_first_step_that_is_not_finite_is_reported(loop):
    grid = dj.karras(dj.EDM(), 6)
    x = jnp.ones((2, 2))
    with pytest.raises(Exception, match=r"first at step 4 \(from 0\), where t = .*sigma = "):
        jax.block_until_ready(dj.sample(dj.ddim(), poisoned(4), x, grid, loop=loop, check_finite=True))
        jax.effects_barrier()
    jax.block_until_ready(dj.sample(dj.ddim(), GAUSSIAN.denoise, x, grid, loop=loop, check_finite=True))
    assert np.isnan(dj.sample(dj.ddim(), poisoned(4), x, grid, loop=loop)).all()


def test_a_solver_must_allow_noise_to_grow():
    back = lambda n: dj.Level(*(field[::-1] for field in dj.logsnr(dj.EDM(), n, s_min=0.01, s_max=10.0)))
    x = np.ones((2, 2), np.float32)
    solver = dj.ddim()._replace(ascending=True)
    with pytest.raises(ValueError, match="must not grow along the grid.*encode"):
        dj.sample(dj.ddim(), GAUSSIAN.denoise, x, back(6))
    errors = []
    for n in (100, 200):
        there = jax.jit(lambda x, n=n: dj.sample(solver, GAUSSIAN.denoise, x, back(n)))(x)
        exact = jax.jit(lambda x, n=n: GAUSSIAN.flow(x, back(n).at(0), back(n).at(-1)))(x)
        errors.append(np.abs(np.subtract(there, exact)).max())
    assert 1.7 < errors[0] / errors[1] < 2.3  # Euler's method, order 1, in this direction as in the other
