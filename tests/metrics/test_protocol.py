import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from diffjax.metrics import Protocol, baseline_rows, digits_protocol, digits_report, judge, report, table


@pytest.fixture(scope="module")
def digits():
    return digits_protocol(0)


@pytest.fixture(scope="module")
def rows(digits):
    return baseline_rows(digits, ["memoriser", "class_gaussian", "gaussian", "pixel_histogram", "noise"])


def test_the_halves_are_the_digits(digits):
    assert digits.train.shape == (899, 8, 8, 1) and digits.heldout.shape == (898, 8, 8, 1)
    both = np.concatenate([digits.train, digits.heldout]).reshape(-1, 64)
    images = load_digits().data
    np.testing.assert_array_equal(both[np.lexsort(both.T)], images[np.lexsort(images.T)])


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_features_have_unit_mean_variance_and_tell_the_digits_apart(digits, name):
    images, labels = load_digits(return_X_y=True)
    features = digits.features[name](images.astype(np.uint8))
    assert features.shape == (1797, 32)
    assert features.var(0).mean() == pytest.approx(1, rel=1e-12)
    # A linear rule errs on 3.6 % of the images from their pixels; the features halve that at least.
    error = lambda x: 1 - LinearDiscriminantAnalysis().fit(x, labels).score(x, labels)
    assert error(features) < error(images) / 2


def test_features_are_the_same_when_trained_again(digits):
    again = judge.digits_features.__wrapped__("relu")
    np.testing.assert_array_equal(again(digits.heldout), digits.features["relu"](digits.heldout))


def test_the_held_out_half_itself_is_perfect(digits):
    out = report(digits.heldout, digits.heldout_labels, digits)
    for name in ("fd_relu", "fd_tanh", "fd_pixels"):
        assert out[name] == pytest.approx(0, abs=1e-5)  # Rounding under the root, for each of up to 64 features.
    assert out["closer"] == 0 and out["class_tv"] == 0 and out["accuracy"] == 1
    assert out["precision"] == out["recall"] == out["coverage"] == 1
    assert out["c2st"] < 0.01


def test_the_floor_is_at_chance(rows):
    floor = rows["floor"]
    # 1797 decisions: a standard error of .012.
    assert abs(floor["c2st"] - 0.5) < 4 * 0.012
    assert abs(floor["mmd2"]) < 1e-3
    assert floor["accuracy"] == 1 and floor["closer"] == 1
    assert 9.5 < floor["inception_score"] <= 10
    assert abs(floor["density"] - 1) < 0.1


def test_distances_order_the_generators_by_what_they_model(rows):
    order = ["floor", "memoriser", "class_gaussian", "gaussian", "pixel_histogram"]
    for name in ("fd_relu", "fd_pixels"):
        values = [rows[row][name] for row in order]
        assert values == sorted(values) and values[-1] < rows["noise"][name]
    # A pixel histogram has each pixel's exact distribution, which neighbours in pixel space reward.
    for name in ("floor", "memoriser", "class_gaussian"):
        assert rows[name]["c2st"] < rows["pixel_histogram"]["c2st"] < rows["noise"]["c2st"]
    assert rows["memoriser"]["closer"] == 1
    assert rows["class_gaussian"]["accuracy"] > 0.95 and "accuracy" not in rows["gaussian"]
    assert rows["noise"]["c2st"] > 0.99 and rows["noise"]["coverage"] == 0


def test_wrong_labels_are_seen(digits):
    shifted = (digits.heldout_labels + 1) % 10
    assert digits_report(digits.heldout, shifted)["accuracy"] == 0


def test_one_class_only_shows_in_the_histogram(digits):
    ones = digits.train[digits.train_labels == 1]
    out = digits_report(np.repeat(ones, 3, 0), np.ones(3 * len(ones), int))
    assert out["class_tv"] == pytest.approx(1 - (digits.heldout_labels == 1).mean(), abs=1e-12)
    assert out["inception_score"] < 1.1 and out["recall"] < 0.3 and out["accuracy"] == 1


def test_another_data_set_of_integers():
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 256, (n, 3, 4, 2), dtype=np.uint8)
    protocol = Protocol(
        draw(60), np.arange(60) % 2, draw(60), np.arange(60) % 2, 255, {"mean": lambda x: x.mean((1, 2))}
    )
    rows = baseline_rows(protocol, ["pixel_histogram"])
    assert "fd_mean" in rows["floor"] and "accuracy" not in rows["floor"]
    # Pixels are independent, so the histogram is the right model, and worse than the floor only by its finite data.
    assert rows["pixel_histogram"]["fd_pixels"] < 2 * rows["floor"]["fd_pixels"]


@pytest.mark.parametrize(
    "samples, labels, message",
    [
        (np.zeros((9, 8, 8, 1), np.float32), None, "float32; expected integers 0 .. 16: use to_pixels"),
        (np.full((9, 8, 8, 1), 17), None, "to 17; expected integers 0 .. 16"),
        (np.zeros((9, 8, 8), int), None, r"\(9, 8, 8\); expected \[n, 8, 8, 1\]"),
        (np.zeros((3, 8, 8, 1), int), None, "n >= 6"),
        (np.zeros((9, 8, 8, 1), int), np.zeros(8, int), r"expected \[9\] integers"),
    ],
)
def test_samples_that_do_not_fit_are_refused(samples, labels, message):
    with pytest.raises(ValueError, match=message):
        digits_report(samples, labels)


def test_an_unknown_baseline_is_named(digits):
    with pytest.raises(ValueError, match="did you mean 'gaussian'"):
        baseline_rows(digits, ["gausian"])


def test_the_table_aligns_and_counts_in_floors():
    text = table({"floor": {"fd_relu": 0.1, "c2st": 0.5}, "a model": {"fd_relu": 0.25, "mmd2": 2.5e-3}})
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["FD-relu", "x", "floor", "C2ST", "MMD2", "e3"]
    assert lines[1].split() == ["good", "is", "lower", "1", "0.5", "0"]
    assert lines[2].split() == ["floor", "0.100", "1.00", "0.500", "-"]
    assert lines[3].split() == ["a", "model", "0.250", "2.50", "-", "2.50"]
    assert "x floor" not in table({"a": {"fd_relu": 0.25}})
