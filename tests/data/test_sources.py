import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from diffjax import registry
from diffjax.data import SOURCES, Pixels, arrays, batches, npz


@pytest.mark.parametrize("split_seed", [0, 3])
def test_digits_are_scikit_learns_images_in_its_own_stratified_split(split_seed):
    data = registry.build(f"digits(split_seed={split_seed})", SOURCES, "data source")
    x, y = load_digits(return_X_y=True)
    x_train, x_held, y_train, y_held = train_test_split(
        x, y, test_size=len(x) // 2, stratify=y, random_state=split_seed
    )
    assert (len(data.train), len(data.heldout)) == (899, 898)
    assert data.shape == (8, 8, 1) and data.num_classes == 10
    for source, images, labels in ((data.train, x_train, y_train), (data.heldout, x_held, y_held)):
        # Sixteenths and eighths are exact in float32.
        np.testing.assert_array_equal(source.images.reshape(-1, 64), images / 8 - 1)
        np.testing.assert_array_equal(source.labels, labels)
        np.testing.assert_array_equal(data.to_pixels(source.images).reshape(-1, 64), images)
    item = data.train[5]
    assert item["image"].dtype == np.float32 and item["image"].shape == (8, 8, 1)
    assert item["label"].dtype == np.int32 and item["label"].shape == ()


@pytest.mark.parametrize("high", [1, 16, 100, 255])
def test_pixels_of_their_inverse_are_themselves_and_values_outside_are_clipped(high):
    pixels = np.arange(high + 1)
    to_pixels = Pixels(high)
    back = to_pixels(to_pixels.inverse(pixels))
    np.testing.assert_array_equal(back, pixels)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(to_pixels(np.array([-7.0, 1.4, 99.0])), [0, high, high])


def test_npz_reads_back_what_was_written(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 3, 4, 2), dtype=np.uint8)
    labels = np.arange(20) % 4
    np.savez(tmp_path / "set.npz", image=images, label=labels)
    data = npz(str(tmp_path / "set.npz"), heldout=8)
    assert (len(data.train), len(data.heldout), data.shape, data.num_classes) == (12, 8, (3, 4, 2), 4)
    both = np.concatenate([data.to_pixels(data.train.images), data.to_pixels(data.heldout.images)])
    order = np.lexsort(both.reshape(20, -1).T)
    np.testing.assert_array_equal(both[order], images[np.lexsort(images.reshape(20, -1).T)])
    np.testing.assert_array_equal(np.bincount(data.heldout.labels), [2, 2, 2, 2])
    batch = next(batches(data.train, 5, seed=0))
    assert batch["image"].shape == (5, 3, 4, 2)


def test_a_set_without_labels_has_no_classes(tmp_path):
    np.savez(tmp_path / "set.npz", pictures=np.linspace(-1, 1, 10 * 9, dtype=np.float32).reshape(10, 3, 3))
    data = npz(str(tmp_path / "set.npz"), image="pictures")
    assert data.num_classes == 0 and data.shape == (3, 3, 1) and len(data.heldout) == 1
    assert data.train[0]["label"] == 0


def test_a_missing_file_a_missing_array_and_a_file_of_another_kind_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz.*numpy\.savez"):
        npz(str(tmp_path / "nowhere.npz"))
    np.savez(tmp_path / "set.npz", x=np.zeros((4, 2, 2), np.uint8))
    with pytest.raises(ValueError, match="no array 'image'; it has: x"):
        npz(str(tmp_path / "set.npz"))
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match="not an .npz archive"):
        npz(str(tmp_path / "text.npz"))
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="single array"):
        npz(str(tmp_path / "one.npy"))


@pytest.mark.parametrize(
    "images, labels, settings, message",
    [
        (np.zeros((4, 8)), None, {}, r"\(4, 8\); expected \[N, H, W, C\]"),
        (np.zeros((0, 2, 2)), None, {}, "none of them 0"),
        (np.full((4, 2, 2), 17), None, {"high": 16}, "17; expected 0 .. 16"),
        (np.full((4, 2, 2), 1.5), None, {}, "1.5; expected -1 .. 1"),
        (np.full((4, 2, 2), np.nan), None, {}, "nan; expected -1 .. 1"),
        (np.full((4, 2, 2), "a"), None, {}, "expected integers or floats"),
        (np.zeros((4, 2, 2)), np.zeros(3, int), {}, r"shape \(3,\)"),
        (np.zeros((4, 2, 2)), np.zeros(4), {}, "float64; expected"),
        (np.zeros((4, 2, 2)), np.arange(4) - 1, {}, "labels from -1"),
        (np.zeros((4, 2, 2)), np.arange(4), {}, "cannot hold out 0.1 of 4"),
        (np.zeros((4, 2, 2)), None, {"heldout": 4}, "cannot hold out 4 of 4"),
        (np.zeros((4, 2, 2)), None, {"high": 256}, "must be in 1 .. 255"),
    ],
)
def test_arrays_that_are_no_image_set_are_refused(images, labels, settings, message):
    with pytest.raises(ValueError, match=message):
        arrays(images, labels, **settings)
