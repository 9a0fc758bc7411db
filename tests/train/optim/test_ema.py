import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from diffjax.train.optim.ema import EMAS, decay, gamma_of, power, std_of


def run(ema, values, start):
    """The average after the parameters take each of `values`, one a step."""
    update = jax.jit(ema.update)
    average = ema.init(start)
    for step, value in enumerate(values, start=1):
        average = update(average, value, step)
    return average


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_power_weighs_each_step_by_the_integral_of_the_profile(std):
    n, gamma = 24, gamma_of(std)
    # One-hot parameters turn the average into the list of its weights.
    weights = run(power(std), np.eye(n, dtype=np.float32), jnp.full(n, 7.0))
    profile = lambda tau: (gamma + 1) * tau**gamma
    exact = [scipy.integrate.quad(profile, i / n, (i + 1) / n)[0] for i in range(n)]
    # float32 rounding over 24 steps.
    np.testing.assert_allclose(weights, exact, atol=24 * 1.2e-7)


@pytest.mark.parametrize("std", [0.03, 0.05, 0.1, 0.2, 12**-0.5])
def test_power_has_the_relative_width_that_was_asked_for(std):
    gamma = gamma_of(std)
    # Solving the cubic loses a few digits where the root is nearly double or large.
    assert scipy.stats.beta(gamma + 1, 1).std() == pytest.approx(std, rel=1e-9)
    assert std_of(gamma) == pytest.approx(std, rel=1e-9)


def test_gammas_of_the_paper():
    # Karras et al. 2024 (arXiv:2312.02696), section 3.1 gives them to three or four digits.
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


def test_measured_width_of_a_long_run():
    n = 400
    weights = np.asarray(run(power(0.1), np.eye(n, dtype=np.float32), jnp.zeros(n)), np.float64)
    tau = (np.arange(n) + 0.5) / n
    mean = (weights * tau).sum()
    # Midpoints instead of the integral: O(1 / n**2), and float32 weights.
    assert np.sqrt((weights * (tau - mean) ** 2).sum()) == pytest.approx(0.1, abs=2e-5)


@pytest.mark.parametrize("ema", [decay(0.99), decay(0.99, warmup=False), power(0.1)])
def test_constant_parameters_stay_to_the_bit(ema):
    params = {"a": jax.random.normal(jax.random.key(0), (50,)), "b": jnp.float32(1e-30)}
    average = run(ema, [params] * 20, params)
    jax.tree.map(np.testing.assert_array_equal, average, params)


def test_decay_of_a_ramp():
    rate, n = 0.9, 30
    average = run(decay(rate, warmup=False), [jnp.float32(t) for t in range(1, n + 1)], jnp.float32(0))
    assert float(average) == pytest.approx(n - rate * (1 - rate**n) / (1 - rate), rel=1e-5)


def test_power_of_a_ramp_lags_by_the_mean_of_the_profile():
    n, gamma = 200, gamma_of(0.1)
    average = float(run(power(0.1), [jnp.float32(t) for t in range(1, n + 1)], jnp.float32(-5)))
    # Step t stands for the time from t - 1 to t, so the sum exceeds the integral by less than one step.
    assert 0 < average - n * (gamma + 1) / (gamma + 2) < 1


def test_warmup_forgets_the_start():
    start, end = jnp.float32(1), jnp.float32(0)
    kept = run(decay(0.9999), [end] * 50, start)
    # The product of (1 + t) / (10 + t) over t = 1..50 is a ratio of rising factorials.
    exact = scipy.special.poch(2, 50) / scipy.special.poch(11, 50)
    # 50 rounded factors.
    assert float(kept) == pytest.approx(exact, rel=50 * 1.2e-7)
    assert float(run(decay(0.9999, warmup=False), [end] * 50, start)) == pytest.approx(0.9999**50, rel=1e-5)


def test_average_of_bfloat16_is_float32_in_its_own_buffer():
    params = {"w": jnp.ones(4, jnp.bfloat16), "b": jnp.ones(4, jnp.float32)}
    average = power(0.1).init(params)
    assert {k: v.dtype for k, v in average.items()} == {"w": jnp.float32, "b": jnp.float32}
    assert average["b"].unsafe_buffer_pointer() != params["b"].unsafe_buffer_pointer()
    assert power(0.1).update(average, params, 3)["w"].dtype == jnp.float32


@pytest.mark.parametrize("name, value", [("decay", 1.0), ("decay", -0.1), ("power", 0.0), ("power", 0.3)])
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match="expected"):
        EMAS[name](value)
