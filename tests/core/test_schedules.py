"""Schedules against their published formulas in 50-digit-free form, quadrature, and their own inverses."""

import jax
import numpy as np
import pytest
from scipy.integrate import quad

from diffjax import core
from diffjax.core.types import Level

SCHEDULES = {name: make() for name, make in core.SCHEDULES.items()}
PRESERVING = ["vp", "cosine", "linear_logsnr", "ddpm", "scaled_linear", "squared_cosine", "sigmoid"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_logsnr_falls_and_inverts(name):
    schedule = SCHEDULES[name]
    t = np.linspace(schedule.t_min, schedule.t_max, 203)[1:-1]
    level = schedule(t)
    assert np.all(np.diff(level.logsnr) < 0)
    # atan2 in Table and the log-SNR of an almost clean level each lose a few of float64's 16 digits.
    np.testing.assert_allclose(schedule.time(level.logsnr), t, rtol=1e-9, atol=1e-9)
    again = schedule.at_logsnr(level.logsnr)
    np.testing.assert_allclose(again, level, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_infinite_logsnr_is_exact(name):
    with np.errstate(over="ignore"):
        level = SCHEDULES[name].at_logsnr(np.array([np.inf]))
    assert level.alpha == 1 and level.sigma == 0 and np.isfinite(level.t)


@pytest.mark.parametrize("name", PRESERVING)
def test_variance_preserving(name):
    schedule = SCHEDULES[name]
    level = schedule(np.linspace(schedule.t_min, schedule.t_max, 101))
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-14)


def test_vp_is_the_integral_of_beta():
    schedule = core.VP(0.1, 20.0)
    for t in (0.01, 0.3, 1.0):
        integral, _ = quad(lambda u: 0.1 + u * 19.9, 0, t)
        np.testing.assert_allclose(schedule(t).alpha, np.exp(-integral / 2), rtol=1e-12)
        np.testing.assert_allclose(core.SubVP(0.1, 20.0)(t).sigma, 1 - np.exp(-integral), rtol=1e-12)


def test_cosine_is_the_paper_formula_and_has_exact_ends():
    t = np.linspace(0, 1, 11)
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    level = core.Cosine()(t)
    np.testing.assert_allclose(level.alpha**2, f / f[0], atol=1e-15)
    assert level.alpha[-1] == 0 and level.sigma[0] == 0
    # The squared-cosine table, before its cap bites, samples this schedule at (i + 1) / T.
    table = core.squared_cosine(1000)
    np.testing.assert_allclose(table.alphas_cumprod[[0, 499, 900]], core.Cosine()([1e-3, 0.5, 0.901]).alpha ** 2)


def test_edm_and_ve_and_flow():
    level = core.EDM()(np.array([2.0]))
    assert level.alpha == 1 and level.sigma == 2 and np.isclose(level.t, np.log(2) / 4)
    np.testing.assert_allclose(core.VE(0.01, 50)([0, 0.5, 1]).sigma, [0.01, np.sqrt(0.5), 50])
    # Shift 3 at t = 1/2 (Esser et al. 2024, Eq. 23): 3 * .5 / (1 + 2 * .5) = .75.
    level = core.Flow(shift=3.0)(np.array([0.5]))
    np.testing.assert_allclose(level, [[0.75], [0.25], [0.75]])


def test_published_table_ends():
    # DDPM ends at 4.0e-5; k-diffusion prints 0.0292 and 14.6146 as the sigma range of Stable Diffusion.
    np.testing.assert_allclose(core.ddpm().alphas_cumprod[-1], 4.0358e-5, rtol=1e-4)
    np.testing.assert_allclose(core.scaled_linear()([0.0, 999.0]).s, [0.0292, 14.6146], rtol=2e-3)


def test_zero_terminal_snr():
    table = core.ddpm(rescale=True)
    assert table.alphas_cumprod[-1] == 0 and table(999.0).alpha == 0 and table(999.0).sigma == 1
    np.testing.assert_allclose(table.alphas_cumprod[0], core.ddpm().alphas_cumprod[0])
    assert np.all(np.isfinite(table(np.linspace(0, 999, 57)).sigma))


@pytest.mark.parametrize("bad", [[0.5], [0.5, 0.6], [1.1, 0.5], [[0.9, 0.5]], [0.5, -0.1]])
def test_table_refuses(bad):
    with pytest.raises(ValueError, match="strictly decreasing"):
        core.Table(np.array(bad))


@pytest.mark.parametrize(
    "make",
    [
        lambda: core.VP(beta_min=-1.0),
        lambda: core.SubVP(beta_max=0.0),
        lambda: core.VE(sigma_min=0.0),
        lambda: core.EDM(sigma_max=-1.0),
        lambda: core.Flow(shift=-3.0),
        lambda: core.LinearLogSNR(5.0, 5.0),
        lambda: core.Cosine(offset=0.0),
    ],
)
def test_impossible_parameters_name_the_schedule_and_what_it_allows(make):
    with pytest.raises(ValueError, match=r"\(.*\): expected .*[<>]"):
        make()


@pytest.mark.parametrize("name", SCHEDULES)
def test_rate_is_the_slope_of_logsnr(name, x64):
    schedule = SCHEDULES[name]
    if isinstance(schedule, core.Table):
        pytest.skip("piecewise: its slope jumps at the knots")
    t = np.linspace(schedule.t_min, schedule.t_max, 9)[1:-1]
    h = 1e-6 * (schedule.t_max - schedule.t_min)
    slope = (schedule(t + h).logsnr - schedule(t - h).logsnr) / (2 * h)
    rate = jax.jit(lambda logsnr: core.rate(schedule, logsnr))(schedule(t).logsnr)
    np.testing.assert_allclose(rate, -slope, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_traced_float32_matches_the_host(name):
    schedule = SCHEDULES[name]
    t = np.linspace(schedule.t_min, schedule.t_max, 33)[1:-1]
    traced = jax.jit(lambda t: schedule(t))(np.float32(t))
    # float32 rounding of t = 999 +- 6e-5 moves a table by 1e-6; elsewhere a few ulp.
    np.testing.assert_allclose(traced.alpha, schedule(t).alpha, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(traced.sigma, schedule(t).sigma, rtol=1e-5, atol=2e-6)


def test_level_indexing():
    grid = core.uniform(core.Flow(), 4)
    assert isinstance(grid.at(0), Level) and grid.at(-1).sigma == 0 and grid.at(0).s == np.inf
