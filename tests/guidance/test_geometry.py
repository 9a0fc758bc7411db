"""What rescaling, projection, thresholds and CFG++ promise, as identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

SHAPE = (3, 4, 4, 2)
LEVEL = dj.VP()(np.array(0.5))
RNG = np.random.default_rng(0)
X, COND, UNCOND = (RNG.normal(size=SHAPE) for _ in range(3))
flat = lambda a: np.asarray(a, np.float64).reshape(len(a), -1)
inner = lambda a, b: np.sum(flat(a) * flat(b), axis=1)


def pair(head):
    return dj.denoiser(lambda x, t: jnp.concatenate([COND, UNCOND]).astype(x.dtype), head)


def target(head, prediction):
    return head.target(np.asarray(prediction.x0), np.asarray(prediction.eps), LEVEL)


@pytest.mark.parametrize("head", [dj.V, dj.X0, dj.EPS], ids=["v", "x0", "eps"])
def test_rescale_restores_the_spread(head, x64):
    guide = lambda pair: dj.cfg(pair, 5.0)
    spread = lambda a: flat(a).std(axis=1)
    full = target(head, dj.rescale(pair(head), guide, 1.0, head=head)(jnp.asarray(X), LEVEL))
    np.testing.assert_allclose(spread(full), spread(COND), rtol=1e-10)
    plain = target(head, guide(pair(head))(jnp.asarray(X), LEVEL))
    half = target(head, dj.rescale(pair(head), guide, 0.5, head=head)(jnp.asarray(X), LEVEL))
    np.testing.assert_allclose(spread(half), (spread(COND) + spread(plain)) / 2, rtol=1e-10)
    off = dj.rescale(pair(head), guide, 0.0, head=head)(jnp.asarray(X), LEVEL)
    np.testing.assert_array_equal(off.x0, guide(pair(head))(jnp.asarray(X), LEVEL).x0)


def test_rescale_calls_the_pair_once():
    rows = []

    def counted(x, level):
        rows.append(len(x))
        return pair(dj.V)(x, level)

    jax.jit(dj.rescale(counted, lambda pair: dj.apg(pair, 4.0)))(np.float32(X), LEVEL)
    assert rows == [2 * SHAPE[0]]


def test_apg_with_everything_let_through_is_cfg(x64):
    got = jax.jit(dj.apg(pair(dj.X0), 4.0, eta=1.0))(X, LEVEL)
    want = jax.jit(dj.cfg(pair(dj.X0), 4.0))(X, LEVEL)
    np.testing.assert_allclose(got.x0, want.x0, atol=1e-12)
    np.testing.assert_allclose(got.eps, want.eps, atol=1e-12)


def test_apg_projects_and_shortens(x64):
    apg = lambda **settings: np.asarray(jax.jit(dj.apg(pair(dj.X0), 2.0, **settings))(X, LEVEL).x0)
    across = apg(eta=0.0) - COND
    np.testing.assert_allclose(inner(across, COND), 0, atol=1e-10)
    along = apg(eta=1.0) - COND - across
    np.testing.assert_allclose(inner(along, COND) ** 2, inner(along, along) * inner(COND, COND), rtol=1e-10)
    lengths = lambda r: np.sqrt(inner(*[apg(eta=1.0, norm=r) - COND] * 2))
    np.testing.assert_allclose(lengths(0.7), 0.7, rtol=1e-10)
    np.testing.assert_allclose(lengths(1e6), np.sqrt(inner(COND - UNCOND, COND - UNCOND)), rtol=1e-10)


def test_cfg_zero_takes_the_nearest_multiple_of_the_unconditional_velocity(x64):
    away = target(dj.FLOW, jax.jit(dj.cfg_zero(pair(dj.FLOW), 2.0))(X, LEVEL)) - np.asarray(COND)
    np.testing.assert_allclose(inner(away, UNCOND), 0, atol=1e-10)  # c - s u is at a right angle to u
    parallel = dj.denoiser(lambda x, t: jnp.concatenate([COND, -2.5 * COND]), dj.FLOW)
    np.testing.assert_allclose(target(dj.FLOW, jax.jit(dj.cfg_zero(parallel, 7.0))(X, LEVEL)), COND, atol=1e-10)


def test_cfg_pp_step_is_a_cfg_step_at_a_larger_scale(x64):
    grid = dj.karras(dj.VP(), 6)
    mixture = dj.Mixture([1.0, 2.0], [[1.0, 0.0], [-1.0, 0.5]], [0.1 * np.eye(2)] * 2)
    label = dj.Gaussian(mixture.means[0], mixture.covs[0])
    two = dj.join(label.denoise, mixture.denoise)
    x = RNG.normal(size=(4, 2))

    @jax.jit
    def both(x, step, scale):
        return [dj.sample(dj.euler(), guided, x, step) for guided in (dj.cfg_pp(two, 0.6), dj.cfg(two, scale))]

    for i in range(6):
        step = grid.at(slice(i, i + 2))
        x, theirs = both(x, step, 0.6 / (1 - step.s[1] / step.s[0]))
        np.testing.assert_allclose(x, theirs, atol=1e-10)
    prediction, unconditional = (jax.jit(f)(x, LEVEL) for f in (dj.cfg_pp(two, 0.3), mixture.denoise))
    np.testing.assert_array_equal(prediction.eps, unconditional.eps)  # on purpose not that of x0


def test_threshold_leaves_what_is_inside_and_fills_the_range_from_outside():
    quiet = lambda x, level: dj.Prediction(jnp.tanh(x), (x - level.alpha * jnp.tanh(x)) / level.sigma)
    same = dj.dynamic_threshold(quiet, 0.9)(jnp.asarray(X), LEVEL)
    np.testing.assert_array_equal(same.x0, quiet(jnp.asarray(X), LEVEL).x0)
    np.testing.assert_array_equal(same.eps, quiet(jnp.asarray(X), LEVEL).eps)
    loud = lambda x, level: dj.Prediction(5 * x, (x - 5 * level.alpha * x) / level.sigma)
    scaled = dj.dynamic_threshold(loud, 1.0, limit=0.5)(jnp.asarray(X), LEVEL)
    np.testing.assert_allclose(np.abs(flat(scaled.x0)).max(axis=1), 0.5, rtol=1e-6)
    np.testing.assert_allclose(scaled.x0 / X, (scaled.x0 / X)[:, :1, :1, :1] * np.ones(SHAPE), rtol=1e-4)
    alone = dj.dynamic_threshold(loud, 0.9)(jnp.asarray(X[1:2]), LEVEL)
    np.testing.assert_allclose(alone.x0, dj.dynamic_threshold(loud, 0.9)(jnp.asarray(X), LEVEL).x0[1:2], rtol=1e-6)
    static = dj.dynamic_threshold(loud, 0.9, s_max=1.0)(jnp.asarray(X), LEVEL)
    np.testing.assert_allclose(static.x0, dj.clip_x0(loud)(jnp.asarray(X), LEVEL).x0, rtol=1e-6)
    raw = dj.dynamic_threshold(loud, 0.9, keep_eps=True)(jnp.asarray(X), LEVEL)
    np.testing.assert_array_equal(raw.eps, loud(jnp.asarray(X), LEVEL).eps)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_rising_scale_keeps_its_mean(shape):
    scale = dj.rising(5.0, shape)
    t = (np.arange(1000) + 0.5) / 1000
    values = scale(dj.Flow()(t))
    np.testing.assert_allclose(np.mean(values), 5.0, rtol=1e-9)
    assert np.all(np.diff(values) < 0)  # larger towards the data, at small t
    np.testing.assert_allclose(scale(dj.Flow()(np.array(1.0))), 1.0, atol=1e-12)
    guided = jax.jit(dj.cfg(pair(dj.V), dj.rising(5.0, shape)))(np.float32(X), LEVEL)
    want = jax.jit(dj.cfg(pair(dj.V), float(scale(LEVEL))))(np.float32(X), LEVEL)
    np.testing.assert_allclose(guided.x0, want.x0, rtol=1e-4, atol=1e-5)
