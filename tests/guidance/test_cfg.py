"""Guidance against the exact conditional and unconditional scores of a mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

MIXTURE = dj.Mixture([1.0, 2.0, 1.0], [[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], [0.1 * np.eye(2)] * 3)
COMPONENTS = [dj.Gaussian(m, c) for m, c in zip(MIXTURE.means, MIXTURE.covs, strict=True)]


def conditional(x, level, labels):
    """The exact denoiser of each sample's own component; label 3 is the whole mixture."""
    parts = [g.denoise(x, level) for g in COMPONENTS] + [MIXTURE.denoise(x, level)]
    pick = lambda half: jnp.stack([p[half] for p in parts])[labels, jnp.arange(len(x))]
    return dj.Prediction(pick(0), pick(1))


LABELS = jnp.array([0, 1, 2, 1])
PAIR = lambda x, level: conditional(x, level, jnp.concatenate([LABELS, jnp.full(4, 3)]))
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
LEVEL = dj.VP()(np.array(0.5))


def test_scale_one_is_conditional_and_zero_unconditional():
    one, zero = dj.cfg(PAIR, 1.0)(X, LEVEL), dj.cfg(PAIR, 0.0)(X, LEVEL)
    np.testing.assert_array_equal(one.x0, conditional(X, LEVEL, LABELS).x0)  # bit for bit
    np.testing.assert_allclose(zero.eps, MIXTURE.denoise(X, LEVEL).eps, atol=1e-6)


@pytest.mark.parametrize("w", [0.0, 1.5, 4.0])
def test_guided_score_is_that_of_the_tilted_density(w, x64):
    # CFG's score is grad log [p(x|c)^w p(x)^(1-w)] at each level (Ho and Salimans 2022, section 3.2).
    def tilted(x):
        cond = jnp.stack([g.logpdf(x, LEVEL) for g in COMPONENTS])[LABELS, jnp.arange(4)]
        return jnp.sum(w * cond + (1 - w) * MIXTURE.logpdf(x, LEVEL))

    x = X.astype(jnp.float64)
    exact, prediction = jax.jit(lambda x: (jax.grad(tilted)(x), dj.cfg(PAIR, w)(x, LEVEL)))(x)
    np.testing.assert_allclose(-prediction.eps / LEVEL.sigma, exact, rtol=1e-9)
    np.testing.assert_allclose(LEVEL.alpha * prediction.x0 + LEVEL.sigma * prediction.eps, x, rtol=1e-9)


def test_scale_per_sample_and_by_level():
    scales = jnp.array([1.0, 2.0, 3.0, 0.5])
    per_sample = dj.cfg(PAIR, scales)(X, LEVEL).x0
    for i, w in enumerate(scales):
        np.testing.assert_allclose(per_sample[i], dj.cfg(PAIR, w)(X, LEVEL).x0[i], rtol=1e-6)
    by_level = dj.cfg(PAIR, lambda level: 1 + level.sigma)(X, LEVEL).x0
    np.testing.assert_allclose(by_level, dj.cfg(PAIR, 1 + float(LEVEL.sigma))(X, LEVEL).x0, rtol=1e-5)


def test_levels_per_sample_are_doubled():
    levels = dj.VP()(np.array([0.2, 0.4, 0.6, 0.8]))
    together = dj.cfg(PAIR, 2.0)(X, levels).x0
    alone = dj.cfg(PAIR, 2.0)(X, levels.at(2)).x0
    np.testing.assert_allclose(together[2], alone[2], rtol=1e-5)


def test_interval_guides_inside_only_and_computes_one_branch():
    calls = []

    def counted(name, f):
        def denoise(x, level):
            jax.debug.callback(lambda: calls.append(name))
            return f(x, level)

        return denoise

    plain = lambda x, level: conditional(x, level, LABELS)
    guided = dj.cfg(counted("guided", PAIR), 3.0)
    denoise = jax.jit(dj.interval(guided, counted("plain", plain), 0.1, 2.0))
    for s, expected in [(3.0, "plain"), (2.0, "guided"), (0.11, "guided"), (0.1, "plain")]:
        calls.clear()
        level = dj.EDM()(jnp.float32(s))
        got = denoise(X, level)
        jax.effects_barrier()
        assert calls == [expected], s
        exact = (guided if expected == "guided" else plain)(X, level).x0
        np.testing.assert_allclose(got.x0, exact, rtol=1e-5, atol=1e-6)


def test_open_interval_guides_at_pure_noise():
    start = dj.Flow()(jnp.float32(1.0))  # alpha = 0, s = inf
    guided = dj.cfg(PAIR, 3.0)
    for lo in (0.0, 0.1):
        got = dj.interval(guided, lambda x, level: conditional(x, level, LABELS), lo, np.inf)(X, start)
        np.testing.assert_allclose(got.eps, guided(X, start).eps, rtol=1e-5)


def test_clip_x0():
    out_of_range = lambda x, level: dj.Prediction(3 * x, (x - level.alpha * 3 * x) / level.sigma)
    clipped = dj.clip_x0(out_of_range, -1.0, 1.0)(X, LEVEL)
    np.testing.assert_allclose(clipped.x0, np.clip(3 * np.asarray(X), -1, 1), rtol=1e-6)
    np.testing.assert_allclose(LEVEL.alpha * clipped.x0 + LEVEL.sigma * clipped.eps, X, rtol=1e-5)
    kept = dj.clip_x0(out_of_range, keep_eps=True)(X, LEVEL)
    np.testing.assert_array_equal(kept.eps, out_of_range(X, LEVEL).eps)


def test_checks_and_messages():
    denoise = dj.denoiser(lambda x, t: x, dj.EPS)
    wrapped = dj.clip_x0(dj.interval(dj.cfg(denoise, 2.0), denoise, 0.0, 1.0))
    with pytest.raises(ValueError, match="undefined at alpha = 0"):
        wrapped.check(dj.uniform(dj.Flow(), 3))
    with pytest.raises(ValueError, match="s_lo < s_hi"):
        dj.interval(denoise, denoise, 2.0, 1.0)
    with pytest.raises(ValueError, match="one level for the batch"):
        dj.interval(denoise, denoise, 0.0, 1.0)(X, dj.VP()(np.full(4, 0.5)))
    with pytest.raises(ValueError, match="lo < hi"):
        dj.clip_x0(denoise, 1.0, -1.0)
