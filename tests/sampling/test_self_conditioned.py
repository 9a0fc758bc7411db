"""Samplers whose denoiser is given its own last estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import core
from diffjax.sampling import SOLVERS, sample, self_conditioned

GAUSSIAN = core.Gaussian(np.array([0.5, -0.5, 0.0]), np.diag([1.0, 0.25, 0.04]))
LEVELS = core.logsnr(core.VP(), 8)


def run(solver, denoise, **options):
    x = jax.random.normal(jax.random.key(0), (4, 3))
    return sample(solver, denoise, x, LEVELS, jax.random.key(1), **options)


@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2m", "euler_ancestral"])
def test_a_denoiser_that_ignores_the_estimate_samples_as_ever(name):
    solver = SOLVERS[name]()
    plain = run(solver, GAUSSIAN.denoise)
    wrapped = self_conditioned(solver)
    np.testing.assert_array_equal(run(wrapped, lambda x, level, estimate: GAUSSIAN.denoise(x, level)), plain)
    assert wrapped.order == solver.order and wrapped.nfe(8) == solver.nfe(8)


@pytest.mark.parametrize("loop", ["scan", "host"])
def test_the_estimate_is_the_x0_of_the_step_before(loop):
    def denoise(x, level, estimate):
        return GAUSSIAN.denoise(x, level)._replace(aux=estimate)

    trace = lambda info: (info.prediction.x0, info.prediction.aux)
    _, (x0, estimates) = run(self_conditioned(SOLVERS["ddim"]()), denoise, trace=trace, loop=loop)
    np.testing.assert_array_equal(estimates[0], jnp.zeros((4, 3)))
    np.testing.assert_array_equal(estimates[1:], x0[:-1])
    assert np.abs(estimates[1:]).max() > 0.1
