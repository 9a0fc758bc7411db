"""Grids: the pixels of the file are the pixels of the images, the size follows from the content, nothing overlaps."""

import numpy as np
import pytest
from matplotlib.image import imread

from diffjax import viz
from diffjax.viz.figure import text_width, to_display, wrap


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 17, (6, 8, 8, 1)).astype(np.uint8)


def rendered(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def test_every_pixel_of_every_tile_is_in_the_file_enlarged_by_a_whole_factor(images, tmp_path):
    path = viz.save(viz.image_grid(images, columns=3, max_value=16, zoom=5), tmp_path / "deep" / "grid.png")
    picture = np.round(imread(path)[..., :3] * 255).astype(int)
    value = np.round(images / 16 * 255).astype(int)
    found = 0
    for image in value:
        tile = image[..., 0].repeat(5, axis=0).repeat(5, axis=1)
        windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], tile.shape)
        # One grey level of rounding between float, uint8 and PNG.
        found += (np.abs(windows - tile).max(axis=(2, 3)) <= 1).any()
    assert found == 6


def test_integers_and_floats_of_the_same_image_show_the_same():
    integers = np.arange(17, dtype=np.uint8).reshape(1, 17, 1, 1)
    floats = (integers / 8.0 - 1).astype(np.float32)
    np.testing.assert_allclose(to_display(integers, max_value=16), to_display(floats), atol=1e-6)
    assert to_display(np.full((1, 1, 1, 3), 9.0)).max() == 1 and to_display(np.full((1, 1, 1, 3), -9.0)).min() == 0


@pytest.mark.parametrize("captions", [[""] * 6, [f"a long caption\nwith lines {i}" for i in range(6)]])
def test_labels_stay_inside_and_never_overlap(images, captions):
    figure = viz.image_grid(
        images, columns=3, title="A title that has to be broken since it is longer than three tiles are wide",
        note="and a note below it, which is also long enough to need a second line", row_labels=["row one", "2"],
        column_labels=["0", "a wide label", "2"], captions=captions, max_value=16,
    )
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text().strip()]
    width, height = figure.canvas.get_width_height()
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        for other in boxes[:i]:
            apart = box.x1 <= other.x0 or other.x1 <= box.x0 or box.y1 <= other.y0 or other.y1 <= box.y0
            assert apart, figure.axes[0].texts[i].get_text()


def test_an_empty_tile_is_left_white(images):
    floats = (images / 8.0 - 1).astype(np.float32)
    floats[:] = np.nan
    assert (rendered(viz.image_grid(floats, columns=3)) == 255).all()


def test_mosaic_keeps_images_and_fills_the_rest_white():
    images = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1) % 16
    canvas = viz.mosaic(images, columns=3, max_value=16)
    assert canvas.shape == (5, 8, 1)
    np.testing.assert_array_equal(canvas[3:5, 3:5], images[4])
    assert (canvas[2] == 16).all() and (canvas[3:, 6:] == 16).all()


def test_nearest_agrees_with_scipy():
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(1)
    samples, images = rng.standard_normal((7, 3, 3, 1)), rng.standard_normal((50, 3, 3, 1))
    full = cdist(samples.reshape(7, -1), images.reshape(50, -1))
    index, distance = viz.nearest(samples, images, 4)
    np.testing.assert_array_equal(index, np.argsort(full, axis=1)[:, :4])
    np.testing.assert_allclose(distance, np.sort(full, axis=1)[:, :4], rtol=1e-9)


def test_a_copy_is_shown_at_distance_zero(images):
    figure = viz.neighbour_grid(images[:2], images, heldout=images[4:], labels=["3", "4"], max_value=16)
    captions = [t.get_text() for t in figure.axes[0].texts]
    assert captions.count("0.00") == 2


def test_errors_name_what_is_wrong(images):
    with pytest.raises(ValueError, match=r"captions: 2 strings for 6 places"):
        viz.image_grid(images, columns=3, captions=["a", "b"])
    with pytest.raises(ValueError, match=r"\(6, 8, 8, 2\).*C = 1 or 3"):
        viz.image_grid(np.zeros((6, 8, 8, 2)), columns=3)


def test_of_many_channels_the_first_are_shown():
    for channels, shown in ((4, 3), (3, 3), (2, 1), (1, 1)):
        images = np.arange(2 * channels).reshape(2, 1, 1, channels)
        np.testing.assert_array_equal(viz.first_channels(images), images[..., :shown])


def test_wrap_breaks_at_spaces_within_the_width():
    text = "several words that do not fit in one short line"
    lines = wrap(text, 120).split("\n")
    assert " ".join(lines) == text and all(text_width(line) <= 120 for line in lines) and len(lines) > 1
