"""The benchmark's own truth: closed forms, the library's oracle, and a flow that ends where a Gaussian's must."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

PATH = Path(__file__).parent.parent / "benchmarks" / "targets.py"


@pytest.fixture(scope="module")
def targets():
    spec = importlib.util.spec_from_file_location("benchmark_targets", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ring8", "scales16", "spiral32"])
def test_halves_are_the_oracle_s(targets, name, x64):
    target = targets.TARGETS[name]()
    mixture = dj.Mixture(target.weights, target.means, target.covs)
    x = np.random.default_rng(0).normal(size=(4, target.dim))
    for alpha, sigma in ((0.0, 1.0), (0.6, 0.8), (1.0, 0.01)):
        level = dj.Level(*(jnp.asarray(a) for a in (0.0, alpha, sigma)))
        expected = mixture.denoise(jnp.asarray(x), level)
        x0, eps = target.halves(x, alpha, sigma)
        # Components of condition number 1600 leave 1e-9 of float64.
        np.testing.assert_allclose(x0, expected.x0, atol=1e-8)
        np.testing.assert_allclose(eps, expected.eps, atol=1e-8 / max(sigma, 0.1))


@pytest.mark.parametrize("s_max", [157.4, np.inf])
def test_the_flow_of_a_gaussian_ends_at_its_closed_form(targets, s_max):
    target = targets.gauss16()
    noise = targets.unit_noise(target, 8)
    variance = np.diag(target.covs[0])
    if np.isinf(s_max):
        exact = target.means[0] + np.sqrt(variance) * noise
    else:
        exact = target.means[0] + np.sqrt(variance / (variance + s_max**2)) * (s_max * noise - target.means[0])
    np.testing.assert_allclose(targets.solve(target, noise, s_max), exact, atol=1e-9)


@pytest.mark.parametrize("name", ["ring8", "scales16", "spiral32"])
def test_moments_are_those_of_samples(targets, name):
    target = targets.TARGETS[name]()
    x, _ = target.sample(np.random.default_rng(1), 4000)
    spread = np.sqrt(np.diag(target.cov) / len(x))
    assert np.all(np.abs(x.mean(0) - target.mean) < 5 * spread)
    # The error of a second moment is that of the products; 5 of its own standard errors.
    products = (x - target.mean)[:, :, None] * (x - target.mean)[:, None, :]
    assert np.all(np.abs(products.mean(0) - target.cov) < 5 * products.std(0) / np.sqrt(len(x)) + 1e-12)


def test_law_of_exact_samples_is_one_and_of_shrunk_ones_is_not(targets):
    target = targets.ring8()
    x, mode = target.sample(np.random.default_rng(2), 4096)
    found = targets.law(target, x)
    assert abs(found["spread"] - 1) < 4 * np.sqrt(2 / x.size)
    assert abs(found["weights"] - 1) < 4 * np.sqrt(2 / 7)
    shrunk = target.means[mode] + 0.5 * (x - target.means[mode])
    assert targets.law(target, shrunk)["spread"] == pytest.approx(found["spread"] / 4, rel=1e-6)
    assert targets.law(target, x[mode < 4])["weights"] > 20


def test_errors_count_flips_and_runs_that_left_the_numbers(targets):
    target = targets.ring8()
    exact = np.tile(target.means[:1], (4, 1))
    x = exact.copy()
    x[1] = target.means[4]
    x[2] = np.nan
    found = targets.errors(target, x, exact)
    assert found["rmse"] == np.inf and found["flips"] == 0.5
    one = targets.errors(target, exact + [3.0, 4.0], exact)
    assert one["median"] == pytest.approx(5 / np.sqrt(2) / target.sigma_data)
