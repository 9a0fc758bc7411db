"""Adaptive steps against exact flows: the error follows the tolerance, the calls those of scipy, both ends are safe."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

import diffjax as dj

GAUSSIAN = dj.Gaussian(np.array([0.4, -0.3, 0.1]), np.diag([1.0, 0.1, 0.01]))
MIXTURE = dj.Mixture([1.0, 2.0], [[1.0, 0.0], [-0.6, 0.5]], [[[0.5, 0.1], [0.1, 0.4]], [[0.3, 0.0], [0.0, 0.6]]])
exact_flow = jax.jit(partial(MIXTURE.flow, rtol=1e-12))
CLEAN = dj.Level(np.array(0.0), np.array(1.0), np.array(0.0))


def level(schedule, s):
    return schedule.at_logsnr(np.asarray(-2 * np.log(s)))


def noise(start, d, n=6):
    scale = np.hypot(start.alpha, start.sigma)
    return np.random.default_rng(0).normal(size=(n, d)) * scale


def rmse(a, b):
    return np.sqrt(np.mean(np.subtract(a, b) ** 2))


@pytest.mark.parametrize("name", ["flow", "edm"])
def test_the_error_follows_the_tolerance_from_end_to_end(name, x64):
    schedule = dj.SCHEDULES[name]()
    start = schedule(np.array(schedule.t_max))  # alpha = 0 for flow
    x = noise(start, 3)
    exact = jax.jit(lambda x: GAUSSIAN.flow(x, start, CLEAN))(x)
    run = jax.jit(lambda x, tol: dj.adaptive(GAUSSIAN.denoise, schedule, x, start, CLEAN, rtol=tol, atol=tol))
    tolerances = np.array([1e-4, 1e-6, 1e-8])
    outs = [run(x, tol) for tol in tolerances]
    errors = np.array([rmse(out, exact) for out, _ in outs])
    calls = [int(stats.calls) for _, stats in outs]
    assert np.all(errors < 10 * tolerances), errors
    # Proportional: the error falls by the tolerance's own factor of 10^4, to within one power of ten.
    assert 1e3 < errors[0] / errors[2] < 1e5, errors
    assert calls[0] < calls[1] < calls[2]
    assert run._cache_size() == 1
    for _, stats in outs:
        assert np.all(stats.finished)
        # Each try of the batch is six calls, after two for the first slope and the first step size.
        assert int(stats.calls) == 2 + 6 * np.max(np.add(stats.accepted, stats.rejected))


@pytest.mark.parametrize("method", ["rk45", "rk23"])
def test_a_mixture_in_both_directions(method, x64):
    schedule = dj.VP()
    noisy, clean = level(schedule, 20.0), level(schedule, 0.05)
    x = noise(noisy, 2)
    exact = exact_flow(x, noisy, clean)
    run = jax.jit(partial(dj.adaptive, MIXTURE.denoise, schedule, method=method, rtol=1e-7, atol=1e-7))
    down, _ = run(x, noisy, clean)
    assert rmse(down, exact) < 1e-6
    up, stats = run(exact, clean, noisy)
    assert rmse(up, x) / noisy.s < 1e-6 and np.all(stats.finished)


def test_clean_data_are_encoded_from_sigma_zero(x64):
    schedule = dj.Cosine()
    noisy = schedule(np.array(0.9))
    x0 = jax.jit(lambda key: GAUSSIAN.sample(key, 5))(jax.random.key(0))
    run = jax.jit(partial(dj.adaptive, GAUSSIAN.denoise, schedule, rtol=1e-8, atol=1e-8))
    up, _ = run(x0, CLEAN, noisy)
    assert rmse(up, jax.jit(lambda x0: GAUSSIAN.flow(x0, CLEAN, noisy))(x0)) < 1e-7
    np.testing.assert_array_equal(run(x0, CLEAN, CLEAN)[0], x0)


def test_error_and_calls_are_those_of_scipy(x64):
    # The same pair, the same norm and tolerance, one trajectory each: scipy's RK45 is the independent integrator, of
    # `probability_flow` as well. It controls by the last error alone, so the step counts differ by a few.
    schedule = dj.Flow()
    start, end = schedule(np.array(1.0)), level(schedule, 1e-3)
    x = noise(start, 2, n=3)
    exact = np.asarray(exact_flow(x, level(schedule, 1e5), end))
    z = np.asarray(jax.jit(lambda x: dj.to_flow(x, start))(x))
    back = jax.jit(lambda z: dj.from_flow(z, end))
    field = jax.jit(dj.probability_flow(MIXTURE.denoise, schedule))
    run = jax.jit(lambda x, tol: dj.adaptive(MIXTURE.denoise, schedule, x, start, end, rtol=tol, atol=tol))
    for tol in (1e-4, 1e-7):
        ours, theirs = [], []
        for i in range(len(x)):
            out, stats = run(x[i : i + 1], tol)
            ours.append((int(stats.calls), rmse(out[0], exact[i])))
            solution = solve_ivp(
                lambda r, z: np.asarray(field(r, z[None]))[0],
                (float(dj.flow_time(start)), float(dj.flow_time(end))),
                z[i],
                rtol=tol,
                atol=tol,
            )
            theirs.append((solution.nfev, rmse(back(solution.y[:, -1]), exact[i])))
        (calls, error), (scipy_calls, scipy_error) = np.mean(ours, axis=0), np.mean(theirs, axis=0)
        assert calls <= 1.2 * scipy_calls + 6, (tol, ours, theirs)
        assert error < 4 * scipy_error, (tol, ours, theirs)


def test_each_sample_takes_its_own_steps(x64):
    schedule = dj.EDM()
    start, end = level(schedule, 40.0), level(schedule, 0.01)
    x = noise(start, 2, n=4)
    x[0] = MIXTURE.means[0]
    run = lambda x, start, per_sample: dj.adaptive(
        MIXTURE.denoise, schedule, x, start, end, per_sample=per_sample, rtol=1e-7, atol=1e-7
    )
    own = jax.jit(lambda x, start: run(x, start, True))
    starts = dj.Level(*(np.full(4, f) for f in start))
    out, stats = own(x, starts)
    assert len(set(np.asarray(stats.accepted).tolist())) > 1
    # Alone, a sample takes the same steps to the same place.
    alone, alone_stats = own(np.broadcast_to(x[1], x.shape), starts)
    np.testing.assert_allclose(np.asarray(alone)[0], np.asarray(out)[1], rtol=1e-9)
    assert np.asarray(alone_stats.accepted)[0] == np.asarray(stats.accepted)[1]
    # A sample that starts at the end stays where it is.
    begin = dj.Level(*(np.where(np.arange(4) == 2, b, a) for a, b in zip(starts, end, strict=True)))
    moved, still = jax.tree.map(np.asarray, own(x, begin))
    np.testing.assert_array_equal(moved[2], x[2])
    assert still.accepted[2] == 0 and still.finished.all()
    # One step size for all: the network sees scalar levels, and each error is within the tolerance as before.
    seen = []

    def denoise(x, level):
        seen.append(jnp.shape(level.sigma))
        return MIXTURE.denoise(x, level)

    common, common_stats = jax.jit(
        lambda x: dj.adaptive(denoise, schedule, x, start, end, per_sample=False, rtol=1e-7, atol=1e-7)
    )(x)
    exact = exact_flow(x, start, end)
    assert set(seen) == {()} and common_stats.accepted.shape == ()
    assert rmse(common, exact) < 1e-6 and rmse(out, exact) < 1e-6
    # Given as many steps as it needs, less one, the run says that it has not arrived.
    few = int(np.max(stats.accepted)) - 1
    cut, unfinished = jax.jit(
        lambda x: dj.adaptive(MIXTURE.denoise, schedule, x, start, end, rtol=1e-7, atol=1e-7, max_steps=few)
    )(x)
    assert not np.all(unfinished.finished) and np.isfinite(cut).all()


def test_float32_at_the_default_tolerance():
    schedule = dj.Flow()
    start = schedule(np.array(1.0))
    x = noise(start, 3).astype(np.float32)
    levels = []

    def denoise(x, level):
        jax.debug.callback(lambda s: levels.append(float(np.min(s))), level.sigma)
        return GAUSSIAN.denoise(x, level)

    out, stats = jax.block_until_ready(jax.jit(lambda x: dj.adaptive(denoise, schedule, x, start, CLEAN))(x))
    jax.effects_barrier()
    assert out.dtype == jnp.float32
    exact = jax.jit(lambda x: GAUSSIAN.flow(x, start, CLEAN))(x)
    assert rmse(out, exact) < 1e-4 and np.all(stats.finished)
    assert min(levels) > 0  # no call at sigma = 0
    assert len(levels) == int(stats.calls)


def test_messages():
    x, start = jnp.ones((2, 3)), dj.Flow()(np.array(0.9))
    run = partial(dj.adaptive, GAUSSIAN.denoise, dj.Flow(), x)
    with pytest.raises(ValueError, match="unknown method 'rk4'; known: rk45, rk23"):
        run(start, CLEAN, method="rk4")
    with pytest.raises(ValueError, match="not both 0"):
        run(start, CLEAN, rtol=0, atol=0)
    with pytest.raises(ValueError, match="max_steps"):
        run(start, CLEAN, max_steps=0)
    with pytest.raises(ValueError, match="fields of end"):
        run(start, dj.Level(*np.zeros((3, 5))))
    with pytest.raises(ValueError, match=r"one level for the batch\)"):
        run(start, dj.Level(*np.zeros((3, 2))), per_sample=False)
    eps = dj.denoiser(lambda x, t: x, dj.EPS)
    with pytest.raises(ValueError, match="eps head is undefined at alpha = 0"):
        dj.adaptive(eps, dj.Flow(), x, dj.Flow()(np.array(1.0)), CLEAN)
