import numpy as np
import pytest
from scipy.stats import entropy

from diffjax.metrics import accuracy, class_tv, inception_score


def test_inception_score_at_its_ends():
    assert inception_score(np.eye(7)) == pytest.approx(7)
    assert inception_score(np.tile([0.2, 0.3, 0.5], (9, 1))) == pytest.approx(1)


def test_inception_score_is_the_exponential_of_scipys_relative_entropy():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 50)
    want = np.exp(np.mean([entropy(row, p.mean(0)) for row in p]))
    assert inception_score(p) == pytest.approx(want, rel=1e-12)


def test_accuracy_and_class_histogram():
    p = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    assert accuracy(p, np.array([0, 1, 2, 2])) == 0.75
    # Classes 1/4, 1/2, 1/4 against 1/2, 1/2, 0.
    assert class_tv(p, np.array([0, 1])) == 0.25
    assert class_tv(p, np.array([0, 1, 1, 2])) == 0


@pytest.mark.parametrize(
    "p, labels, message",
    [
        (np.ones((2, 3)), [0, 1], "sum to 1"),
        (np.array([[1.5, -0.5]]), [0], "not negative"),
        (np.eye(3), [0, 1], r"expected \[3\] integers"),
        (np.eye(3), [0.0, 1.0, 2.0], "integers"),
        (np.eye(3), [0, 1, 3], "expected 0 .. 2"),
    ],
)
def test_what_is_no_probability_or_label_is_refused(p, labels, message):
    with pytest.raises(ValueError, match=message):
        accuracy(p, labels)
