import itertools

import numpy as np
import pytest
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from diffjax.metrics import arrays, c2st, kid, median_gamma, mmd2


def test_c2st_is_scikit_learns_leave_one_out_score():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 5)), 0.5 + rng.standard_normal((30, 5))
    x, y = np.concatenate([a, b]), np.repeat([0, 1], [40, 30])
    want = cross_val_score(KNeighborsClassifier(1), x, y, cv=LeaveOneOut()).mean()
    assert c2st(a, b) == pytest.approx(want, abs=1e-12)


def test_c2st_at_its_ends():
    even, odd = np.arange(0, 20, 2)[:, None], np.arange(1, 21, 2)[:, None]
    assert c2st(even, odd) == 0
    assert c2st(even, even + 100) == 1
    # A copy of a set with gaps has every point's nearest in the other set; three copies in each set tie.
    assert c2st(even, even) == 0
    assert c2st(np.repeat(even, 3, 0), np.repeat(even, 3, 0)) == 0.5


def test_c2st_of_one_distribution_is_a_fair_coin():
    rng = np.random.default_rng(1)
    values = [c2st(*rng.standard_normal((2, 200, 3))) for _ in range(20)]
    assert abs(np.mean(values) - 0.5) < 4 * np.std(values) / np.sqrt(20) + 1 / 399


def test_mmd2_is_the_double_sum():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((9, 3)), rng.standard_normal((7, 3))
    k = lambda x, y: rbf_kernel(x, y, gamma=0.3)
    off = lambda m: np.mean([m[i, j] for i in range(len(m)) for j in range(len(m)) if i != j])
    assert mmd2(a, b, 0.3) == pytest.approx(off(k(a, a)) + off(k(b, b)) - 2 * k(a, b).mean(), rel=1e-12)


def test_mmd2_of_two_gaussians_has_the_closed_form_as_its_mean():
    rng = np.random.default_rng(3)
    d, gamma, shift = 3, 0.2, 1.0
    # x - y ~ N(m, 2 I): E exp(-gamma |x - y|^2) = (1 + 4 gamma)^(-d / 2) exp(-gamma |m|^2 / (1 + 4 gamma)).
    kernel = lambda m2: (1 + 4 * gamma) ** (-d / 2) * np.exp(-gamma * m2 / (1 + 4 * gamma))
    want = 2 * kernel(0) - 2 * kernel(d * shift**2)
    values = [mmd2(rng.standard_normal((60, d)), shift + rng.standard_normal((80, d)), gamma) for _ in range(60)]
    assert abs(np.mean(values) - want) < 4 * np.std(values) / np.sqrt(60)
    null = [mmd2(*rng.standard_normal((2, 60, d))) for _ in range(60)]
    assert abs(np.mean(null)) < 4 * np.std(null) / np.sqrt(60)
    assert min(null) < 0


def test_the_median_heuristic_takes_distinct_pairs():
    # Distances squared of 0, 1, 3: 1, 9, 4.
    assert median_gamma([[0.0], [1.0], [3.0]]) == 0.25
    with pytest.raises(ValueError, match="give gamma"):
        median_gamma(np.ones((4, 2)))


def test_kid_of_every_possible_sample_averages_to_the_population():
    """Unbiasedness, exactly: all samples of three points, with replacement, from populations of three points."""
    a, b = np.array([[0.0, 1.0], [2.0, -1.0], [1.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 0.5], [3.0, 1.0]])
    k = lambda x, y: polynomial_kernel(x, y, degree=3, gamma=1 / 2, coef0=1).mean()
    want = k(a, a) + k(b, b) - 2 * k(a, b)
    draws = [list(i) for i in itertools.product(range(3), repeat=3)]
    values = [kid(a[i], b[j], subsets=1)[0] for i in draws for j in draws]
    assert np.mean(values) == pytest.approx(want, rel=1e-12)


def test_kid_over_subsets_is_unbiased_and_reports_their_spread():
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((200, 4)), rng.standard_normal((200, 4)) + 0.3
    whole, none = kid(a, b, subsets=2)
    mean, std = kid(a, b, subsets=200, subset_size=50)
    assert none == pytest.approx(0, abs=1e-12) and std > 0
    assert abs(mean - whole) < 4 * std / np.sqrt(200)
    assert kid(a, b, subsets=5, subset_size=50) == kid(a, b, subsets=5, subset_size=50)
    assert kid(a, b, subsets=5, subset_size=50) != kid(a, b, subsets=5, subset_size=50, seed=1)


def test_blocks_of_rows_change_nothing(monkeypatch):
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 9, (2, 50, 4)).astype(float)
    whole = c2st(a, b), arrays.nearest(a, b, 4), arrays.nearest(a, a, 2, same=True)
    monkeypatch.setattr(arrays, "BLOCK", 120)
    assert c2st(a, b) == whole[0]
    np.testing.assert_array_equal(arrays.nearest(a, b, 4), whole[1])
    np.testing.assert_array_equal(arrays.nearest(a, a, 2, same=True), whole[2])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: mmd2(x, x, 0), "gamma=0"),
        (lambda x: mmd2(x[:1], x), "N >= 2"),
        (lambda x: c2st(x, x[:, :2]), "3 features and reference 2"),
        (lambda x: kid(x, x, subsets=0), "subsets=0"),
        (lambda x: kid(x, x, subset_size=1), "subset_size=1"),
    ],
)
def test_unfit_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(12.0).reshape(4, 3))
