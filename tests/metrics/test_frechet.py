import numpy as np
import pytest
import scipy.linalg

from diffjax.metrics import frechet_distance, frechet_gaussian, moments


def covariance(rng, d, rank=None):
    root = rng.standard_normal((d, rank or d))
    return root @ root.T / d


def test_gaussians_on_a_line():
    # (1 - 4)^2 + (sqrt 4 - sqrt 9)^2
    assert frechet_gaussian([1.0], [[4.0]], [4.0], [[9.0]]) == pytest.approx(10.0, rel=1e-14)


@pytest.mark.parametrize("d", [2, 32])
def test_general_covariances_against_scipys_matrix_root(d):
    rng = np.random.default_rng(d)
    mean_a, mean_b = rng.standard_normal((2, d))
    a, b = covariance(rng, d), covariance(rng, d)
    root = scipy.linalg.sqrtm(a @ b).real
    want = ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * root)
    # The root of the smallest eigenvalues, near 1e-3, loses half of the digits.
    assert frechet_gaussian(mean_a, a, mean_b, b) == pytest.approx(want, rel=1e-8)


def test_an_optimal_map_costs_what_it_moves():
    """`y = T x + m` with symmetric positive `T` is the optimal transport, so the distance is `E |y - x|^2`, exactly."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((50, 6))
    t, m = covariance(rng, 6) + 0.1 * np.eye(6), rng.standard_normal(6)
    move = x @ t + m - x
    want = (move.mean(0) ** 2).sum() + move.var(0, ddof=1).sum()
    assert frechet_distance(x @ t + m, x) == pytest.approx(want, rel=1e-10)


def test_singular_covariances_in_orthogonal_planes():
    # No overlap: the root vanishes, and the distance is the sum of the traces.
    assert frechet_gaussian(np.zeros(3), np.diag([2.0, 0, 0]), np.zeros(3), np.diag([0, 3.0, 5.0])) == 10


def test_fewer_samples_than_features_and_the_same_samples_twice():
    x = np.random.default_rng(2).standard_normal((5, 4, 4, 1))
    # Rounding of sqrt(1e-16) for each of 12 null directions.
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_two_samples_of_one_gaussian_show_the_bias_of_order_one_over_n():
    rng = np.random.default_rng(3)
    d, n = 4, 500
    values = [frechet_distance(*rng.standard_normal((2, n, d))) for _ in range(40)]
    # To leading order: means 2 d / n; covariances tr(dC^2) / 4 with E tr(dC^2) = 2 (d^2 + d) / n, dC their difference.
    want = 2 * d / n + (d * d + d) / (2 * n)
    assert abs(np.mean(values) - want) < 4 * np.std(values) / np.sqrt(40)


def test_moments_are_numpys():
    x = np.random.default_rng(4).standard_normal((7, 2, 3))
    mean, cov = moments(x)
    np.testing.assert_allclose(mean, x.reshape(7, 6).mean(0))
    np.testing.assert_allclose(cov, np.cov(x.reshape(7, 6).T))
    assert moments(np.ones((3, 1)))[1].shape == (1, 1)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.zeros((4, 3)), np.zeros((4, 2)), "3 features and reference 2"),
        (np.zeros((1, 3)), np.zeros((4, 3)), "N >= 2"),
        (np.zeros(3), np.zeros((4, 3)), r"\[N, ...\]"),
        (np.full((4, 3), np.nan), np.zeros((4, 3)), "4 of 4 samples hold NaN"),
    ],
)
def test_unfit_features_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_moments_of_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected \[D\], \[D, D\]"):
        frechet_gaussian(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
