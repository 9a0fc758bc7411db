"""Guidance with state across steps, and guidance that is not paid for: momentum, zero initialisation, intervals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

GAUSSIAN = dj.Gaussian(np.zeros(2), np.diag([0.5, 0.2]))
APART = np.array([0.3, -0.2])
X = np.random.default_rng(0).normal(size=(3, 2))
GRID = dj.custom(dj.Flow(), np.linspace(0.95, 0.05, 6))


def shifted(x, level, by):
    """A denoiser whose x0 is moved by a constant."""
    out = GAUSSIAN.denoise(x, level)
    return dj.Prediction(out.x0 + by, out.eps - (level.alpha / level.sigma)[..., None] * by)


# The two predictions of x0 differ by APART everywhere.
PAIR = dj.join(lambda x, level: shifted(x, level, APART), GAUSSIAN.denoise)


@pytest.mark.parametrize("solver", [dj.euler(), dj.heun(), dj.dpmpp_2m()], ids=["euler", "heun", "dpmpp_2m"])
def test_no_momentum_is_the_plain_solver(solver, x64):
    guide = lambda pair: dj.cfg(pair, 3.0)
    got = dj.sample(dj.momentum(solver, guide, beta=0.0), PAIR, jnp.asarray(X), GRID)
    np.testing.assert_allclose(got, dj.sample(solver, guide(PAIR), jnp.asarray(X), GRID), atol=1e-12)


@pytest.mark.parametrize("solver", [dj.euler(), dj.heun()], ids=["euler", "heun"])
def test_the_sum_moves_once_a_step(solver, x64):
    # A constant difference d sums to d (1 - beta^(i + 1)) / (1 - beta) in step i, in all calls of that step.
    beta, w = -0.5, 3.0
    got = dj.sample(dj.momentum(solver, lambda pair: dj.cfg(pair, w), beta), PAIR, jnp.asarray(X), GRID)
    run = jax.jit(lambda x, grid, by: dj.sample(solver, lambda x, level: shifted(x, level, by), x, grid))
    x = jnp.asarray(X)
    for i in range(5):
        by = APART * (1 + (w - 1) * (1 - beta ** (i + 1)) / (1 - beta))
        x = run(x, dj.Level(*map(jnp.asarray, GRID.at(slice(i, i + 2)))), by)
    np.testing.assert_allclose(got, x, atol=1e-12)


def counting(f, calls):
    def denoise(x, level):
        jax.debug.callback(lambda: calls.append(x.shape[0]))
        return f(x, level)

    return denoise


def rows(solver, denoise, calls, grid=GRID, **options):
    calls.clear()
    dj.sample(solver, denoise, jnp.asarray(X, jnp.float32), grid, **options)
    jax.effects_barrier()
    return sum(calls)


def test_momentum_and_zero_init_cost_what_they_say():
    calls = []
    pair = counting(PAIR, calls)
    for solver in (dj.heun(), dj.dpmpp_2m()):
        wrapped = dj.momentum(solver, lambda pair: dj.cfg(pair, 2.0))
        to_zero = dj.uniform(dj.Flow(), 5)
        assert rows(wrapped, pair, calls, to_zero) == 2 * 3 * wrapped.nfe(5)
        held = dj.zero_init(wrapped, 2)
        assert rows(held, pair, calls, to_zero) == 2 * 3 * held.nfe(5)
        assert held.nfe(5) == solver.nfe(3)


def test_a_flow_stands_still_while_it_is_zero():
    _, xs = dj.sample(
        dj.zero_init(dj.heun(), 2), GAUSSIAN.denoise, jnp.asarray(X, jnp.float32), GRID, trace=lambda info: info.x_next
    )
    np.testing.assert_allclose(xs[0], X, rtol=1e-5)
    np.testing.assert_allclose(xs[1], X, rtol=1e-5)
    assert abs(xs[2] - X).max() > 1e-2
    rest = dj.sample(dj.heun(), GAUSSIAN.denoise, jnp.asarray(X, jnp.float32), GRID.at(slice(2, None)))
    np.testing.assert_allclose(xs[-1], rest, rtol=1e-4, atol=1e-6)


def test_an_interval_is_paid_for_only_inside():
    calls = []
    plain = counting(GAUSSIAN.denoise, calls)
    guided = dj.cfg(counting(PAIR, calls), 3.0)
    lo, hi = 0.3, 3.0  # of the five levels where a step begins, s = 19, 3.35, 1.22, 0.45 and 0.16: two inside
    denoise = dj.interval(guided, plain, lo, hi)
    paid = 2 * (2 * 3) + 3 * 3
    for loop in ("scan", "unroll", "host"):
        assert rows(dj.euler(), denoise, calls, loop=loop) == paid, loop
    pieces = dj.split_interval(GRID, lo, hi)
    assert [(inside, len(part.t) - 1) for inside, part in pieces] == [(False, 2), (True, 2), (False, 1)]
    assert sum(rows(dj.euler(), guided if inside else plain, calls, part) for inside, part in pieces) == paid


def test_pieces_need_no_branch_and_reach_the_same_point():
    guided, lo, hi = dj.cfg(PAIR, 3.0), 0.3, 3.0

    def in_pieces(x):
        for inside, part in dj.split_interval(GRID, lo, hi):
            x = dj.sample(dj.euler(), guided if inside else GAUSSIAN.denoise, x, part)
        return x

    whole = lambda x: dj.sample(dj.euler(), dj.interval(guided, GAUSSIAN.denoise, lo, hi), x, GRID)
    np.testing.assert_allclose(jax.jit(in_pieces)(jnp.asarray(X)), jax.jit(whole)(jnp.asarray(X)), atol=1e-5)
    assert "cond[" in str(jax.make_jaxpr(whole)(X)) and "cond[" not in str(jax.make_jaxpr(in_pieces)(X))
    # A concrete level takes its branch in Python, under jit as well.
    assert "cond[" not in str(jax.make_jaxpr(lambda x: dj.interval(guided, GAUSSIAN.denoise, lo, hi)(x, GRID.at(1)))(X))


def test_pieces_cover_the_grid_once():
    for lo, hi in [(0.0, np.inf), (1e3, np.inf), (0.0, 0.2), (0.3, 3.0)]:
        pieces = dj.split_interval(GRID, lo, hi)
        assert sum(len(part.t) - 1 for _, part in pieces) == 5
        np.testing.assert_array_equal(np.concatenate([pieces[0][1].t[:1], *(p.t[1:] for _, p in pieces)]), GRID.t)


def test_messages():
    with pytest.raises(ValueError, match="-1 < beta < 1"):
        dj.momentum(dj.euler(), lambda pair: pair, 1.0)
    with pytest.raises(ValueError, match="whole number of steps >= 0"):
        dj.zero_init(dj.euler(), 0.04)
    with pytest.raises(ValueError, match="0 <= s_lo < s_hi"):
        dj.split_interval(GRID, 2.0, 1.0)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda grid: dj.split_interval(grid, 0.1, 1.0)[0][1])(dj.Level(*map(jnp.asarray, GRID)))
