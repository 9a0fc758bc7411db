"""Grids: their ends, their order, and the published step lists."""

import numpy as np
import pytest

from diffjax import core

CONTINUOUS = ["vp", "sub_vp", "cosine", "linear_logsnr", "ve", "edm", "flow"]


@pytest.mark.parametrize("schedule", core.SCHEDULES)
@pytest.mark.parametrize("spacing", ["uniform", "karras", "logsnr", "asinh", "exponential"])
def test_grids_run_from_noise_to_data(schedule, spacing):
    made = core.SCHEDULES[schedule]()
    for n in (1, 2, 7):
        grid = core.SPACINGS[spacing](made, n)
        assert grid.t.shape == grid.alpha.shape == grid.sigma.shape == (n + 1,)
        assert grid.sigma.dtype == np.float64
        assert np.all(np.diff(np.arctan2(grid.sigma, grid.alpha)) < 0)


def test_karras_is_the_paper_formula():
    grid = core.karras(core.EDM(), 18)
    i = np.arange(18)
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(grid.sigma[:-1], expected)
    assert grid.sigma[-1] == 0


@pytest.mark.parametrize("schedule", CONTINUOUS)
def test_spacings_in_s_do_not_depend_on_the_schedule(schedule):
    made = core.SCHEDULES[schedule]()
    for spacing in (core.karras, core.exponential, core.logsnr):
        grid = spacing(made, 9, s_min=0.1, s_max=10.0)
        np.testing.assert_allclose(grid.s, spacing(core.EDM(), 9, s_min=0.1, s_max=10.0).s, rtol=1e-10)


def test_logsnr_and_asinh_are_uniform_in_their_variable():
    np.testing.assert_allclose(np.diff(core.logsnr(core.VP(), 8).logsnr, 2), 0, atol=1e-10)
    np.testing.assert_allclose(np.diff(np.arcsinh(core.asinh(core.EDM(), 8).s / 0.1), 2), 0, atol=1e-10)


def test_timesteps_are_those_of_diffusers():
    # From the docstring of diffusers' schedulers and Lin et al. 2023, Table 2, for T = 1000 and 10 steps.
    table = core.ddpm()
    np.testing.assert_array_equal(core.leading(table, 10).t[:-1], [900, 800, 700, 600, 500, 400, 300, 200, 100, 0])
    np.testing.assert_array_equal(core.leading(table, 10, offset=1).t[:-1][-1], 1)
    np.testing.assert_array_equal(core.trailing(table, 10).t[:-1], [999, 899, 799, 699, 599, 499, 399, 299, 199, 99])
    np.testing.assert_array_equal(core.linspace(table, 10).t[:-1], [999, 888, 777, 666, 555, 444, 333, 222, 111, 0])
    assert core.leading(table, 10).sigma[-1] == 0
    np.testing.assert_allclose(core.leading(table, 10, final="first").alpha[-1], np.sqrt(table.alphas_cumprod[0]))
    np.testing.assert_array_equal(core.trailing(table, 1).t[:-1], [999])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: core.uniform(core.VP(), 0), "whole number of steps"),
        (lambda: core.uniform(core.VP(), 2.5), "whole number of steps"),
        (lambda: core.karras(core.VP(), 5, s_min=3.0, s_max=1.0), "s_min < s_max"),
        (lambda: core.karras(core.VP(), 5, rho=0), "rho: expected a positive number, got 0"),
        (lambda: core.karras(core.VP(), 5, s_max="a"), "s_max: expected a positive number, got 'a'"),
        (lambda: core.asinh(core.VP(), 5, scale=0.0), "scale: expected a positive number"),
        (lambda: core.leading(core.VP(), 5), "picks steps of a Table"),
        (lambda: core.trailing(core.ddpm(), 2000), "table of 1000"),
        (lambda: core.linspace(core.ddpm(), 5, final="zero"), "'clean' or 'first'"),
        (lambda: core.custom(core.VP(), [0.1, 0.9]), "from noise to data"),
        (lambda: core.custom(core.VP(), [0.1]), "at least two times"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
