import numpy as np
import pytest
from scipy.spatial import KDTree

from diffjax.metrics import closer_to_train, density_coverage, precision_recall


def test_closer_is_what_a_tree_search_finds():
    rng = np.random.default_rng(0)
    x, train, heldout = rng.standard_normal((50, 3)), rng.standard_normal((30, 3)), rng.standard_normal((40, 3))
    want = (KDTree(train).query(x)[0] < KDTree(heldout).query(x)[0]).mean()
    assert closer_to_train(x, train, heldout) == pytest.approx(want, abs=1e-12)
    assert closer_to_train(train, train, heldout) == 1
    assert closer_to_train(heldout, train, heldout) == 0
    assert closer_to_train(x, train, train) == 0.5


def test_precision_and_recall_by_hand():
    reference = np.array([[0.0], [1.0], [3.0]])  # k = 1 balls: [-1, 1], [0, 2], [1, 5]
    samples = np.array([[-0.9], [4.0], [5.5], [8.0]])  # k = 1 balls: [-5.8, 4], [2.5, 5.5], [4, 7], [5.5, 10.5]
    assert precision_recall(samples, reference, k=1) == (0.5, 1.0)
    samples = np.array([[4.0], [5.5], [8.0]])  # only 3 lies in a ball of the samples
    assert precision_recall(samples, reference, k=1) == pytest.approx((1 / 3, 1 / 3))


def test_density_and_coverage_by_hand():
    reference = np.array([[0.0], [1.0], [3.0]])  # k = 1 balls: [-1, 1], [0, 2], [1, 5]
    samples = np.array([[0.5], [1.5], [2.5], [9.0]])  # in 2, 2, 1 and 0 balls
    assert density_coverage(samples, reference, k=1) == (5 / 4, 1.0)
    assert density_coverage(samples[:2], reference, k=1) == (2.0, 1.0)
    assert density_coverage(samples[3:].repeat(2, 0), reference, k=1) == (0, 0)


@pytest.mark.parametrize("k", [1, 4])
def test_all_four_are_what_tree_searches_find(k):
    rng = np.random.default_rng(k)
    a, b = rng.standard_normal((60, 3)), 0.6 * rng.standard_normal((50, 3))
    radius = lambda x: KDTree(x).query(x, k + 1)[0][:, -1]
    inside = lambda x, c: np.linalg.norm(x[:, None] - c[None], axis=-1) <= radius(c)[None]
    assert precision_recall(a, b, k) == pytest.approx((inside(a, b).any(1).mean(), inside(b, a).any(1).mean()))
    assert density_coverage(a, b, k) == pytest.approx((inside(a, b).sum(1).mean() / k, inside(a, b).any(0).mean()))


def test_equal_distributions_have_density_one_and_the_expected_coverage():
    rng = np.random.default_rng(7)
    n, m, k = 60, 40, 3
    values = np.array([density_coverage(rng.random((n, 2)), rng.random((m, 2)), k) for _ in range(150)])
    # A ball misses every sample when the k nearest of all n + m - 1 other points are all from the reference.
    missed = np.prod([(m - 1 - i) / (n + m - 1 - i) for i in range(k)])
    error = values.std(0) / np.sqrt(150)
    assert (np.abs(values.mean(0) - [1, 1 - missed]) < 4 * error).all()


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
@pytest.mark.parametrize("k", [0, 4])
def test_a_neighbour_that_does_not_exist_is_refused(metric, k):
    with pytest.raises(ValueError, match=f"k={k} with 9 samples and 4 reference points; expected 1 .. 3"):
        metric(np.zeros((9, 2)), np.zeros((4, 2)), k)


def test_of_new_samples_as_many_are_closer_as_the_training_images_are_of_all():
    rng = np.random.default_rng(0)
    found = [closer_to_train(*(rng.normal(size=(n, 3)) for n in (50, 90, 10))) for _ in range(200)]
    # Four standard errors of 200 independent draws; a half would be ten times as far off.
    error = 4 * np.std(found) / np.sqrt(200)
    assert abs(np.mean(found) - 0.9) < error < (0.9 - 0.5) / 10
