"""Guidance against diffusers' guiders; make_golden.py wrote the numbers."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

GOLDEN = dict(np.load(Path(__file__).with_name("golden_guiders.npz")))
STEPS = len(GOLDEN["cond"])
X = np.random.default_rng(1).normal(size=GOLDEN["cond"].shape[1:])
LEVEL = dj.Level(*map(np.array, (0.3, 0.6, 0.7)))
# Time is the index of the step: the network of these tests looks its outputs up.
GRID = dj.Level(np.arange(STEPS + 1.0), np.linspace(0.1, 0.9, STEPS + 1), np.linspace(0.9, 0.1, STEPS + 1))
HEADS = {"eps": dj.EPS, "v": dj.V, "flow": dj.FLOW, "x0": dj.X0}


def network(head, *names):
    stacked = np.concatenate([GOLDEN[name] for name in names], axis=1)
    return dj.denoiser(lambda x, t: jnp.asarray(stacked)[t[0].astype(int)].astype(x.dtype), head)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    "name, guide, rtol",
    [
        ("cfg", lambda pair, head: dj.cfg(pair, 3.0), 1e-12),
        ("rescale", lambda pair, head: dj.rescale(pair, lambda pair: dj.cfg(pair, 3.0), 0.7, head=head), 1e-12),
        ("apg", lambda pair, head: dj.apg(pair, 3.0, eta=0.25, norm=5.0, head=head), 1e-12),
        # diffusers' s* is computed in float32.
        ("zero_star", lambda pair, head: dj.cfg_zero(pair, 3.0, head=head), 1e-6),
        ("pag", lambda pair, head: dj.perturbed(pair, network(head, "worse"), 3.0, 1.5), 1e-12),
    ],
)
def test_one_call(name, guide, rtol, head, x64):
    step = 1  # zero_star's step 0 is zeroed
    level = LEVEL._replace(t=np.array(float(step)))
    prediction = guide(network(head, "cond", "uncond"), head)(jnp.asarray(X), level)
    out = head.target(prediction.x0, prediction.eps, level)
    np.testing.assert_allclose(out, GOLDEN[name][step], rtol=rtol, atol=10 * rtol)


def test_momentum_over_steps(x64):
    solver = dj.momentum(dj.euler(), lambda pair: dj.apg(pair, 3.0, eta=0.25, norm=5.0), beta=-0.5)
    pair = network(dj.X0, "cond", "uncond")
    _, seen = dj.sample(solver, pair, jnp.asarray(X), GRID, trace=lambda info: info.prediction.x0)
    np.testing.assert_allclose(seen, GOLDEN["apg_momentum"], rtol=1e-11, atol=1e-12)


def test_zero_star_over_steps(x64):
    solver = dj.zero_init(dj.euler(), 1)
    guided = dj.cfg_zero(network(dj.FLOW, "cond", "uncond"), 3.0)
    velocity = lambda info: info.prediction.eps - info.prediction.x0
    _, seen = dj.sample(solver, guided, jnp.asarray(X), GRID, trace=velocity)
    np.testing.assert_allclose(seen, GOLDEN["zero_star"], rtol=1e-6, atol=1e-6)
    assert not np.any(np.asarray(seen[0]))


def test_dynamic_threshold(x64):
    loud = dj.denoiser(lambda x, t: 3 * jnp.asarray(GOLDEN["cond"])[t[0].astype(int)], dj.X0)
    for step in range(STEPS):
        denoise = dj.dynamic_threshold(loud, 0.9, s_max=4.5)
        out = denoise(jnp.asarray(X), LEVEL._replace(t=np.array(float(step))))
        np.testing.assert_allclose(out.x0, GOLDEN["threshold"][step], rtol=1e-12)
