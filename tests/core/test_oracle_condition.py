"""Posteriors under linear measurements against Bayes' rule on a grid and against regression."""

import jax
import numpy as np
import pytest

import diffjax as dj

PRIOR = dj.Mixture([1.0, 2.0], [[1.0, 0.0], [-0.6, 0.5]], [[[0.5, 0.1], [0.1, 0.4]], [[0.3, 0.0], [0.0, 0.6]]])
CLEAN = dj.Level(np.array(0.0), np.array(1.0), np.array(0.0))


def grid_moments(log_density, lo=-7.0, hi=7.0, n=1401):
    """Log mass, mean and covariance of a density in the plane by the trapezoid rule: spectral for smooth ones."""
    axis = np.linspace(lo, hi, n)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    log = np.asarray(log_density(points), np.float64)
    weight = np.exp(log - log.max())
    mean = weight @ points / weight.sum()
    offset = points - mean
    return (offset * weight[:, None]).T @ offset / weight.sum(), mean


def test_mixture_is_bayes_rule_on_a_grid(x64):
    A, y, noise_std = np.array([[1.0, 0.7], [0.2, -0.4], [1.2, 0.3]]), np.array([0.8, -0.3, 0.4]), 0.5

    def joint(points):
        return jax.jit(PRIOR.logpdf)(points, CLEAN) - np.sum((y - points @ A.T) ** 2, -1) / (2 * noise_std**2)

    cov, mean = grid_moments(joint)
    posterior = PRIOR.condition(A, y, noise_std)
    got_cov, got_mean = grid_moments(lambda points: jax.jit(posterior.logpdf)(points, CLEAN))
    np.testing.assert_allclose(got_mean, mean, atol=1e-8)
    np.testing.assert_allclose(got_cov, cov, atol=1e-8)
    np.testing.assert_allclose(posterior.weights @ posterior.means, mean, atol=1e-8)


def test_gaussian_without_noise_is_regression():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    prior = dj.Gaussian(rng.normal(size=4), root @ root.T)
    # Coordinates 0 and 2 known, as a square projection with zero rows: redundant rows must not matter.
    A = np.diag([1.0, 0.0, 1.0, 0.0])
    y = np.array([0.3, 0.0, -1.0, 0.0])
    posterior = prior.condition(A, y, 0.0)
    known, free = [0, 2], [1, 3]
    slope = np.linalg.lstsq(prior.cov[np.ix_(known, known)], prior.cov[np.ix_(known, free)], rcond=None)[0].T
    np.testing.assert_allclose(posterior.mean[known], y[known], atol=1e-10)
    np.testing.assert_allclose(posterior.mean[free], prior.mean[free] + slope @ (y - prior.mean)[known], rtol=1e-9)
    np.testing.assert_allclose(posterior.cov[known], 0, atol=1e-10)
    expected = prior.cov[np.ix_(free, free)] - slope @ prior.cov[np.ix_(known, free)]
    np.testing.assert_allclose(posterior.cov[np.ix_(free, free)], expected, rtol=1e-8, atol=1e-10)


def test_one_measurement_after_another_is_both_at_once():
    a, b = np.array([[1.0, 0.7]]), np.array([[0.2, -0.4]])
    both = PRIOR.condition(np.concatenate([a, b]), np.array([0.8, -0.3]), 0.5)
    chained = PRIOR.condition(a, np.array([0.8]), 0.5).condition(b, np.array([-0.3]), 0.5)
    np.testing.assert_allclose(chained.weights, both.weights, rtol=1e-10)
    np.testing.assert_allclose(chained.means, both.means, rtol=1e-10)
    np.testing.assert_allclose(chained.covs, both.covs, rtol=1e-10)


def test_messages():
    with pytest.raises(ValueError, match=r"expected A \[M, 2\] and y \[M\]"):
        PRIOR.condition(np.ones(2), np.ones(1), 0.1)
    with pytest.raises(ValueError, match="noise_std must be"):
        PRIOR.condition(np.ones((1, 2)), np.ones(1), -0.1)
    with pytest.raises(ValueError, match="no x0 has this y"):
        PRIOR.condition(np.ones((2, 2)), np.array([0.0, 1.0]), 0.0)
    with pytest.raises(ValueError, match="no freedom"):
        dj.Gaussian(np.zeros(2), np.diag([1.0, 0.0])).condition(np.array([[0.0, 1.0]]), np.zeros(1), 0.0)
