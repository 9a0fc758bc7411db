"""A schedule with parameters: monotone whatever they are, its ends fixed, its inverse exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import core


def wild(seed, width=8):
    schedule = core.Learned(-12.0, 9.0, width=width)
    params = schedule.init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    noise = [3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)]
    params = tree.unflatten([a + b for a, b in zip(leaves, noise, strict=True)])
    return schedule.bind(params | {"height": params["height"] + 4})


@pytest.mark.parametrize("seed", range(6))
def test_any_parameters_give_a_decreasing_log_snr_between_the_ends(seed):
    schedule = wild(seed)
    logsnr = schedule(np.linspace(0, 1, 500)).logsnr
    assert logsnr[0] == pytest.approx(9, abs=1e-6) and logsnr[-1] == pytest.approx(-12, abs=1e-6)
    assert np.all(np.diff(logsnr) < 0)
    assert np.abs(logsnr - np.linspace(9, -12, 500)).max() > 0.05  # and it is not the straight line


def test_the_inverse_by_log_snr_and_the_two_precisions():
    schedule, t = wild(1), np.linspace(0.01, 0.99, 50)
    # The network's parameters are float32: 1e-5 is what the flattest part of the curve makes of their rounding.
    np.testing.assert_allclose(schedule.time(schedule(t).logsnr), t, atol=1e-5)
    traced = jax.jit(lambda t: schedule(t))(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(traced.logsnr, schedule(t).logsnr, atol=2e-4)
    # What the network is told depends on the log-SNR alone, not on the way there.
    level = schedule.at_logsnr(schedule(t).logsnr)
    np.testing.assert_allclose(level.t, schedule(t).t, atol=1e-6)
    np.testing.assert_allclose(level.t, core.LinearLogSNR(-12, 9).at_logsnr(level.logsnr).t, atol=1e-6)


def test_it_begins_near_the_line_and_without_parameters_on_it():
    t = np.linspace(0, 1, 100)
    line = core.LinearLogSNR(-10, 10)(t).logsnr
    np.testing.assert_array_equal(core.Learned()(t).logsnr, line)
    started = core.Learned().bind(core.Learned().init(jax.random.key(0)))
    np.testing.assert_allclose(started(t).logsnr, line, atol=0.2)
    for wrong in (dict(logsnr_min=3.0, logsnr_max=3.0), dict(width=0), dict(width=1.5)):
        with pytest.raises(ValueError, match="expected"):
            core.Learned(**wrong)
