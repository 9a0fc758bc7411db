"""What every guidance keeps: checks, x, dtype, samples apart, jit, vmap and gradients; and its messages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

W1, W2 = (np.random.default_rng(i).normal(size=(6, 6)) / 3 for i in (0, 1))
X = np.random.default_rng(2).normal(size=(4, 2, 3))
LEVEL = dj.Cosine()(np.array(0.6))
LEVELS = dj.Cosine()(np.array([0.2, 0.6, 0.6, 0.9]))


def network(w, head=dj.V):
    def f(x, t):
        flat = x.reshape(len(x), -1)
        return jnp.tanh(flat @ w.astype(x.dtype) + jnp.cos(t).astype(x.dtype)[:, None]).reshape(x.shape)

    return dj.denoiser(f, head)


def methods(head=dj.V):
    one, two = network(W1, head), network(W2, head)
    pair = dj.join(one, two)
    down = lambda x, level: 0.1 * jnp.sum(x**2, axis=(1, 2)).astype(x.dtype)
    guide = lambda pair: dj.cfg(pair, 3.0)
    return {
        "join": dj.cfg(dj.join(one, two), 2.0),
        "cfg": dj.cfg(pair, 3.0),
        "cfg rising": dj.cfg(pair, dj.rising(3.0)),
        "rescale": dj.rescale(pair, guide, 0.7),
        "compose": dj.compose(dj.join(one, two, one), (2.0, lambda level: 1 + level.sigma)),
        "negative": dj.negative(dj.join(one, two, two), 3.0, 0.5),
        "apg": dj.apg(pair, 3.0, eta=0.3, norm=0.5),
        "cfg_zero": dj.cfg_zero(pair, 3.0),
        "autoguidance": dj.autoguidance(one, two, 2.0),
        "perturbed": dj.perturbed(pair, two, 2.0, 1.0),
        "classifier": dj.classifier(one, lambda x, level: -down(x, level), 2.0),
        "energy": dj.energy(one, down, 2.0),
        "energy around": dj.energy(one, down, 0.1, through=False),
        "clip_x0": dj.clip_x0(one, -0.5, 0.5),
        "dynamic_threshold": dj.dynamic_threshold(guide(pair), 0.8, limit=0.3),
        "interval": dj.interval(guide(pair), one, 0.1, 10.0),
        "cfg_pp": dj.cfg_pp(pair, 0.6),
    }


METHODS = methods()


@pytest.mark.parametrize("name", METHODS)
def test_keeps_x_and_dtype_under_jit_for_levels_of_any_shape(name):
    run = jax.jit(METHODS[name])
    x = np.float32(X)
    for level in (LEVEL,) if name == "interval" else (LEVEL, LEVELS):
        out = jax.tree.map(np.asarray, run(x, level))
        assert out.x0.dtype == out.eps.dtype == jnp.float32
        alpha, sigma = (dj.core.types.expand(a, x) for a in (level.alpha, level.sigma))
        adds_up = np.abs(alpha * out.x0 + sigma * out.eps - x).max() < 1e-5
        assert adds_up == (name != "cfg_pp")
    if name != "interval":  # samples 1 and 2 are at the level of the first call; none depends on its neighbours
        alone = np.asarray(run(x, LEVEL).x0)
        np.testing.assert_allclose(out.x0[1:3], alone[1:3], rtol=2e-5, atol=2e-6)


@pytest.mark.often("cfg", "apg", "cfg_zero", "energy", "*_threshold", "interval")
@pytest.mark.parametrize("name", METHODS)
def test_vmap_and_finite_gradients_from_end_to_end(name):
    x = np.float32(X[:2])
    grid = dj.custom(dj.Cosine(), np.linspace(0.95 if name in ("classifier", "energy") else 1.0, 0.0, 4))
    total = lambda x: jnp.sum(dj.sample(dj.heun(), METHODS[name], x, grid) ** 2)
    stacked = jax.jit(jax.vmap(jax.grad(total)))(np.stack([x, 2 * x]))
    assert np.all(np.isfinite(stacked)) and np.any(np.asarray(stacked) != 0)


def test_float32_stays_float32_and_bfloat16_bfloat16(x64):
    for dtype in (jnp.float32, jnp.bfloat16):
        level = dj.Level(*(jnp.asarray(a, dtype) for a in LEVEL))
        for name, denoise in METHODS.items():
            out = jax.eval_shape(denoise, jnp.asarray(X, dtype), level)
            assert out.x0.dtype == out.eps.dtype == dtype, name


def test_every_method_keeps_the_check_of_its_denoisers():
    for name, denoise in methods(dj.EPS).items():
        with pytest.raises(ValueError, match="alpha = 0"):
            denoise.check(dj.uniform(dj.Flow(), 3))
        denoise.check(dj.karras(dj.Flow(), 3).at(slice(None, -1)))
        assert name


def test_gradient_guidance_refuses_alpha_zero_and_flow_denoisers_do_not():
    grid = dj.uniform(dj.Flow(), 3)
    for name, denoise in METHODS.items():
        if name in ("classifier", "energy"):
            with pytest.raises(ValueError, match="alpha = 0 at index 0"):
                dj.sample(dj.euler(), denoise, jnp.asarray(X), grid)
        else:
            denoise.check(grid.at(slice(None, -1)))


def test_finite_without_a_direction():
    same = dj.denoiser(lambda x, t: jnp.zeros_like(x), dj.X0)  # x0 = 0 from both halves, spread and lengths 0
    pair = dj.join(same, same)
    guide = lambda pair: dj.cfg(pair, 3.0)
    still = dj.denoiser(lambda x, t: jnp.zeros_like(x), dj.FLOW)
    for denoise in (
        dj.apg(pair, 3.0, norm=0.5),
        dj.rescale(pair, guide, 0.7, head=dj.X0),
        dj.cfg_zero(dj.join(still, still), 3.0),
    ):
        gradient = jax.jit(jax.grad(lambda x, f=denoise: jnp.sum(f(x, LEVEL).eps ** 2)))(np.float32(X))
        assert np.all(np.isfinite(gradient))


BASE = network(W1)
BOTH = dj.join(BASE, BASE)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dj.rescale(BOTH, lambda pair: pair, 1.5), "phi from 0"),
        (lambda: dj.apg(BOTH, 2.0, norm=0.0), "norm is the largest length"),
        (lambda: dj.apg(BOTH, 2.0, eta=np.inf), "finite eta"),
        (lambda: dj.cfg_pp(BOTH, 7.5), r"from 0 to 1, got 7.5"),
        (lambda: dj.dynamic_threshold(BASE, 0.0), r"quantile in \(0, 1\]"),
        (lambda: dj.dynamic_threshold(BASE, 99.5), r"quantile in \(0, 1\]"),
        (lambda: dj.dynamic_threshold(BASE, s_max=0.5), "0 < limit <= s_max"),
        (lambda: dj.rising(3.0, "cubic"), "known: cosine, linear"),
        (lambda: dj.rising(3.0, t_max=0.0), "t_max > 0"),
        (lambda: dj.energy(BASE, None, on="eps"), '"x" .* or "x0"'),
        (lambda: dj.energy(BASE, None, on="x", through=False), "no denoiser to go around"),
        (lambda: dj.compose(BOTH, ()), "one scale per condition"),
        (lambda: dj.join(), "at least one denoiser"),
        (lambda: BOTH(jnp.zeros((3, 2)), LEVEL), "must divide by 2, got 3"),
        (lambda: dj.cfg(BOTH, jnp.ones(3))(jnp.asarray(X), LEVEL), r"shape \(4,\).*got shape \(3,\)"),
        (lambda: dj.cfg(BOTH, lambda level: jnp.ones((4, 1)))(jnp.asarray(X), LEVEL), r"got shape \(4, 1\)"),
        (lambda: dj.cfg(lambda x, level: BASE(x[:4], level), 2.0)(jnp.asarray(X), LEVEL), "batch 2 times over"),
        (lambda: dj.rescale(BOTH, lambda p: p)(jnp.zeros((4, 1)), LEVEL), "at least 2 elements"),
        (lambda: dj.classifier(BASE, lambda x, level: x)(jnp.asarray(X), LEVEL), "one value per sample"),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()
