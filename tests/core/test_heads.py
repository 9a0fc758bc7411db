"""Round trips of every head on every schedule, and EDM's preconditioning against the paper's form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import core

HEADS = {name: make() for name, make in core.HEADS.items()}


def halves(shape=(5, 3, 2)):
    rng = np.random.default_rng(0)
    return rng.normal(size=shape), rng.normal(size=shape)


@pytest.mark.parametrize("schedule", core.SCHEDULES)
def test_every_head_gives_both_halves_back(schedule, x64):
    made = core.SCHEDULES[schedule]()
    level = made.at_logsnr(np.array([-6.0, -2.0, 0.0, 3.0, 7.0]))
    x0, eps = halves()
    x = core.add_noise(x0, eps, level)
    for head in HEADS.values():
        prediction = head.split(head.target(x0, eps, level), x, level)
        # At log-SNR -6 the signal is 1/20 of x: two digits are lost of 16.
        np.testing.assert_allclose(prediction.x0, x0, atol=1e-12)
        np.testing.assert_allclose(prediction.eps, eps, atol=1e-12)


@pytest.mark.parametrize("name", ["x0", "v", "flow", "edm"])
def test_finite_at_pure_noise(name):
    x0, eps = halves((1, 4))
    level = core.Flow()(np.array([1.0]))
    prediction = HEADS[name].split(HEADS[name].target(x0, eps, level), eps, level)
    np.testing.assert_allclose(prediction.x0, x0, atol=1e-12)
    np.testing.assert_allclose(prediction.eps, eps, atol=1e-12)


def test_edm_is_the_paper_preconditioning():
    # Karras et al. 2022, Table 1, in their coordinates alpha = 1.
    sigma = np.array([0.05, 0.7, 30.0])
    d = 0.5
    c_skip, c_out = d**2 / (sigma**2 + d**2), sigma * d / np.sqrt(sigma**2 + d**2)
    x0, eps = halves((3, 6))
    level = core.EDM()(sigma)
    x = x0 + sigma[:, None] * eps
    head = core.edm(d)
    np.testing.assert_allclose(head.target(x0, eps, level), (x0 - c_skip[:, None] * x) / c_out[:, None], rtol=1e-9)
    np.testing.assert_allclose(head.scale_in(level), 1 / np.sqrt(sigma**2 + d**2))
    out = np.ones_like(x)
    np.testing.assert_allclose(head.split(out, x, level).x0, c_skip[:, None] * x + c_out[:, None] * out, rtol=1e-12)


def test_edm_input_and_target_have_unit_variance():
    n = 200_000
    x0, eps = np.random.default_rng(1).normal(size=(2, 3, n))
    x0 = 0.5 * x0
    for schedule in (core.EDM(), core.VP(), core.Flow()):
        level = schedule.at_logsnr(np.array([-4.0, 0.0, 4.0]))
        x = core.add_noise(x0, eps, level) * core.edm(0.5).scale_in(level)[:, None]
        # The standard error of a variance of n unit Gaussians is sqrt(2 / n) = .0032; five of them.
        np.testing.assert_allclose(x.var(axis=1), 1, atol=0.016)
        np.testing.assert_allclose(core.edm(0.5).target(x0, eps, level).var(axis=1), 1, atol=0.016)


def test_denoiser_scales_input_broadcasts_time_and_keeps_aux():
    seen = {}

    def f(x, t):
        seen["x"], seen["t"] = x, t
        return x, {"logvar": t}

    x = jnp.ones((4, 3))
    level = core.EDM().at_logsnr(np.array(0.0))
    prediction = core.denoiser(f, core.edm(0.5), dtype=jnp.bfloat16)(x, level)
    assert seen["t"].shape == (4,) and seen["x"].dtype == jnp.bfloat16 and prediction.x0.dtype == jnp.float32
    np.testing.assert_allclose(seen["x"].astype(jnp.float32), 1 / np.sqrt(1.25), rtol=2**-8)
    np.testing.assert_array_equal(prediction.aux["logvar"], seen["t"])


def test_from_karras_agrees_with_the_oracle(x64):
    gaussian = core.Gaussian(np.array([0.3, -0.2]), np.array([[1.0, 0.4], [0.4, 0.5]]))
    level = core.VP()(np.array(0.4))
    x = np.random.default_rng(0).normal(size=(7, 2))

    def karras_denoiser(y, sigma):
        return gaussian.denoise(y, core.EDM()(sigma)).x0

    ours, exact = jax.jit(lambda x: (core.from_karras(karras_denoiser)(x, level), gaussian.denoise(x, level)))(x)
    np.testing.assert_allclose(ours.x0, exact.x0, rtol=1e-12)
    np.testing.assert_allclose(ours.eps, exact.eps, rtol=1e-12)


def test_messages():
    with pytest.raises(ValueError, match="undefined at alpha = 0.*index 0"):
        core.EPS.check(core.uniform(core.Flow(), 3))
    with pytest.raises(ValueError, match="positive number, got 0"):
        core.edm(0)
    with pytest.raises(ValueError, match=r"shape \(2, 1\) for x of shape \(2, 3\)"):
        core.denoiser(lambda x, t: x[:, :1], core.V)(jnp.ones((2, 3)), core.VP()(np.array(0.5)))
