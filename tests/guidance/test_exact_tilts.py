"""Guidance against densities that are known: exact conditionals, tilted scores, shifted Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

ROOM = 0.05 * np.eye(2)
MEANS = np.array([[1.0, 0.2], [0.7, -0.8], [-0.9, 0.4], [-0.6, -0.6]])
MIXTURE = dj.Mixture([1.0, 2.0, 1.0, 3.0], MEANS, [ROOM, 2 * ROOM, ROOM, 3 * ROOM])
LABEL = dj.Mixture([1.0, 2.0], MEANS[:2], [ROOM, 2 * ROOM])  # components 0 and 1 carry the wanted label
OTHER = dj.Mixture([1.0, 3.0], MEANS[2:], [ROOM, 3 * ROOM])
WEAK = dj.Mixture([1.0, 2.0], MEANS[:2], [4 * ROOM, 5 * ROOM])
LOG_PROB = lambda x, level: jnp.log(jnp.sum(MIXTURE.responsibilities(x, level)[:, :2], axis=-1))
PAIR = dj.join(LABEL.denoise, MIXTURE.denoise)
X = np.random.default_rng(0).normal(size=(5, 2))
LEVELS = {
    "vp": dj.VP()(np.array(0.4)),
    "edm": dj.EDM()(np.array(0.7)),
    "flow per sample": dj.Flow()(np.array([0.2, 0.4, 0.6, 0.8, 0.9])),
}


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_the_exact_classifier_makes_the_exact_conditional(level, x64):
    guided = jax.jit(dj.classifier(MIXTURE.denoise, LOG_PROB, 1.0))(jnp.asarray(X), level)
    exact = jax.jit(LABEL.denoise)(jnp.asarray(X), level)
    np.testing.assert_allclose(guided.x0, exact.x0, atol=1e-8)
    np.testing.assert_allclose(guided.eps, exact.eps, atol=1e-8)


def test_classifier_is_cfg_at_every_scale_and_energy_of_x_is_classifier(x64):
    level, x = LEVELS["vp"], jnp.asarray(X)
    scale = jnp.array([0.0, 0.5, 2.0, 4.0, -1.0])
    by_classifier = jax.jit(dj.classifier(MIXTURE.denoise, LOG_PROB, scale))(x, level)
    np.testing.assert_allclose(by_classifier.x0, jax.jit(dj.cfg(PAIR, scale))(x, level).x0, atol=1e-8)
    by_energy = jax.jit(dj.energy(MIXTURE.denoise, lambda x, level: -LOG_PROB(x, level), scale, on="x"))(x, level)
    np.testing.assert_allclose(by_energy.x0, by_classifier.x0, atol=1e-12)
    np.testing.assert_allclose(by_energy.eps, by_classifier.eps, atol=1e-12)


def test_scores_are_those_of_the_densities_claimed(x64):
    w, s = 3.0, 1.5
    densities = {"p": MIXTURE, "c": LABEL, "o": OTHER, "q": WEAK}
    three = dj.join(LABEL.denoise, OTHER.denoise, MIXTURE.denoise)
    claims = [  # each method, and the exponents of the product of densities that its score belongs to
        (dj.cfg(PAIR, w), {"c": w, "p": 1 - w}),
        (dj.autoguidance(LABEL.denoise, WEAK.denoise, w), {"c": w, "q": 1 - w}),
        (dj.perturbed(PAIR, WEAK.denoise, w, s), {"c": w + s, "p": 1 - w, "q": -s}),
        (dj.negative(three, w, s), {"p": 1 - w + s, "c": w, "o": -s}),
        (dj.compose(three, (w, s)), {"p": 1 - w - s, "c": w, "o": s}),
    ]

    @jax.jit
    def run(x, level):
        scores = {k: jax.grad(lambda x, d=d: jnp.sum(d.logpdf(x, level)))(x) for k, d in densities.items()}
        return scores, [method(x, level) for method, _ in claims]

    for level in LEVELS.values():
        level = dj.Level(*(np.broadcast_to(a, (5,)) for a in level))
        scores, predictions = jax.tree.map(np.asarray, run(X, level))
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        for (_, exponents), prediction in zip(claims, predictions, strict=True):
            exact = sum(power * scores[k] for k, power in exponents.items())
            np.testing.assert_allclose(-prediction.eps / sigma, exact, rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(alpha * prediction.x0 + sigma * prediction.eps, X, rtol=1e-9)


def test_independent_conditions_compose_exactly(x64):
    # p(x) = a(x_1) b(x_2), each of two components. One condition names the component of x_1, the other that of x_2.
    centres, weights, std2 = np.array([-0.8, 0.7]), np.array([0.3, 0.7]), 0.05
    mixture = lambda first, second: dj.Mixture(
        [weights[i] * weights[j] for i in first for j in second],
        [[centres[i], centres[j]] for i in first for j in second],
        [std2 * np.eye(2)] * (len(first) * len(second)),
    )
    both, one, two = (0, 1), (0,), (1,)
    parts = (mixture(one, both), mixture(both, two), mixture(both, both))
    composed = dj.compose(dj.join(*(part.denoise for part in parts)), (1.0, 1.0))
    level = LEVELS["vp"]
    run = jax.jit(lambda x: [f(x, level).x0 for f in (composed, mixture(one, two).denoise, parts[0].denoise)])
    got, exact, alone = run(jnp.asarray(X))
    np.testing.assert_allclose(got, exact, atol=1e-9)
    assert np.abs(np.subtract(alone, exact)).max() > 0.1  # one condition is not it


def test_linear_energy_on_gaussian_data_is_exact(x64):
    # p(x0) exp(a x0) of N(m, C) is N(m + C a, C).
    mean, cov, a = np.array([0.3, -0.2]), np.array([[0.5, 0.2], [0.2, 0.3]]), np.array([0.8, -1.5])
    plain, tilted = dj.Gaussian(mean, cov), dj.Gaussian(mean + cov @ a, cov)
    guided = dj.energy(plain.denoise, lambda x0, level: -x0 @ a)
    both = jax.jit(lambda x, level: (guided(x, level), tilted.denoise(x, level)))
    for level in LEVELS.values():
        got, exact = both(X, level)
        np.testing.assert_allclose(got.x0, exact.x0, atol=1e-10)
        np.testing.assert_allclose(got.eps, exact.eps, atol=1e-10)


def test_energy_around_the_denoiser_is_exact_with_the_posterior_variance_as_scale(x64):
    v, a = 0.4, np.array([0.8, -1.5])
    plain, tilted = (dj.Gaussian(m, v * np.eye(2)) for m in (np.zeros(2), v * a))
    variance = lambda level: v * level.sigma**2 / (level.alpha**2 * v + level.sigma**2)
    guided = dj.energy(plain.denoise, lambda x0, level: -x0 @ a, variance, through=False)
    both = jax.jit(lambda x, level: (guided(x, level), tilted.denoise(x, level)))
    for level in (*LEVELS.values(), dj.Flow()(np.array(1.0))):  # alpha = 0 as well
        got, exact = both(X, level)
        np.testing.assert_allclose(got.x0, exact.x0, atol=1e-10)
        np.testing.assert_allclose(got.eps, exact.eps, atol=1e-10)


def test_scale_one_changes_no_bit_and_others_do():
    rng = np.random.default_rng(1)
    outs = [jnp.asarray(rng.normal(size=X.shape), jnp.float32) for _ in range(2)]
    x, level = jnp.asarray(X, jnp.float32), LEVELS["vp"]
    denoise, other = (dj.denoiser(lambda x, t, out=out: out, dj.V) for out in outs)
    cond, pair = denoise(x, level), dj.join(denoise, other)
    for method in (
        lambda w: dj.cfg(pair, w),
        lambda w: dj.apg(pair, w),
        lambda w: dj.cfg_zero(pair, w),
        lambda w: dj.autoguidance(denoise, other, w),
        lambda w: dj.perturbed(pair, other, w, w - 1),
    ):
        np.testing.assert_array_equal(method(1.0)(x, level).x0, cond.x0)
        np.testing.assert_array_equal(method(1.0)(x, level).eps, cond.eps)
        assert abs(method(3.0)(x, level).x0 - cond.x0).max() > 1e-2


def test_a_pair_from_two_functions_is_a_pair_from_one_call():
    def doubled(x, level):
        cond, uncond = LABEL.denoise(x[:5], level), MIXTURE.denoise(x[5:], level)
        return dj.Prediction(jnp.concatenate([cond.x0, uncond.x0]), jnp.concatenate([cond.eps, uncond.eps]))

    got, want = (jax.jit(dj.cfg(pair, 2.0))(np.float32(X), LEVELS["vp"]) for pair in (PAIR, doubled))
    np.testing.assert_array_equal(got.x0, want.x0)


def test_aux_is_that_of_the_condition():
    def pair(x, level):
        out = MIXTURE.denoise(x, level)
        return out._replace(aux={"variance": jnp.arange(len(x)), "constant": jnp.array(7.0)})

    for guided in (
        dj.cfg(pair, 2.0),
        dj.apg(pair, 2.0),
        dj.rescale(pair, lambda p: dj.cfg(p, 2.0)),
        dj.cfg_pp(pair, 1),
    ):
        aux = jax.jit(lambda x, f=guided: f(x, LEVELS["vp"]).aux)(np.float32(X))
        np.testing.assert_array_equal(aux["variance"], np.arange(5))
        assert aux["constant"] == 7.0
