"""Grids of images: labelled rows and columns, captions under tiles, mosaics, samples beside their neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from diffjax.viz.figure import FAINT, INK, TEXT, TITLE, line_height, new_figure, text_width, to_display, wrap

GAP, MARGIN, PAD = 4, 14, 6


class _Layout(NamedTuple):
    """Where the tiles of a grid lie: pixel edges of columns and rows, tile size, and the size of the whole figure."""

    lefts: np.ndarray
    tops: np.ndarray
    pitch: float
    tile: tuple[int, int]
    size: tuple[int, int]


def mosaic(images, *, columns: int, gap: int = 1, max_value: int | None = None) -> np.ndarray:
    """One image `[H', W', C]` of all `images [N, H, W, C]` in rows of `columns`, `gap` white pixels between them.

    Floats in `[-1, 1]` and integers in `[0, max_value]` keep their kind, so the result is a tile of `image_grid`.
    """
    images = np.asarray(images)
    white = (255 if max_value is None else max_value) if np.issubdtype(images.dtype, np.integer) else 1
    rows = -(-len(images) // columns)
    height, width, channels = images.shape[1:]
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    canvas = np.full(shape, white, images.dtype)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def image_grid(
    images,
    *,
    columns: int,
    title: str = "",
    note: str = "",
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    captions: Sequence[str] = (),
    max_value: int | None = None,
    zoom: int | None = None,
    gap: int = GAP,
) -> Figure:
    """A figure of `images` in rows of `columns`, every tile enlarged by a whole factor with sharp pixels.

    Columns widen to their longest label and rows make room for their captions, so that no text overlaps.

    Args:
      images: `[N, H, W, C]`, floats in `[-1, 1]` or integers in `[0, max_value]`; a tile of NaN stays empty.
      columns: tiles in a row.
      title: what is seen; `note`: a second, paler line. Both are wrapped to the width.
      row_labels: one string per row, left of it.
      column_labels: one string per column, above it.
      captions: one string per tile, under it; may hold line breaks.
      max_value: the integer that shows as white, 255 by default.
      zoom: pixels per image pixel; by default tiles come to about 48 pixels, and never under their own size.
      gap: pixels between tiles.

    Raises:
      ValueError: for images of another shape, or a number of labels or captions that does not fit.
    """
    images = np.asarray(images)
    shown = to_display(images, max_value=max_value)
    rows = -(-len(shown) // columns)
    for name, given, expected in (
        ("row_labels", row_labels, rows), ("column_labels", column_labels, columns), ("captions", captions, len(shown))
    ):
        if len(given) not in (0, expected):
            raise ValueError(f"{name}: {len(given)} strings for {expected} places; give one for each, or none")
    zoom = zoom or max(1, round(48 / max(shown.shape[1:3])))
    shown = shown.repeat(zoom, axis=1).repeat(zoom, axis=2)
    layout, left = _lay_out(shown.shape[1:3], rows, columns, row_labels, column_labels, captions, gap)
    width = max(layout.size[0], 300 if title or note else 0)
    heading = [(wrap(text, width - 2 * MARGIN, size, weight), size, weight, ink) for text, size, weight, ink in
               ((title, TITLE, "bold", INK), (note, TEXT, "normal", FAINT)) if text]
    drop = sum(line_height(size) * (text.count("\n") + 1) for text, size, *_ in heading) + (PAD if heading else 0)
    empty = np.isnan(images).all(axis=(1, 2, 3)) if images.dtype.kind == "f" else np.zeros(len(images), bool)
    return _draw(shown, empty, layout, width, drop, heading, left, row_labels, column_labels, captions)


def _lay_out(tile, rows, columns, row_labels, column_labels, captions, gap):
    """`(layout, where row labels end)`: the pixel positions that leave room for every text."""
    height, width = tile
    left = MARGIN + (max(map(text_width, row_labels)) + PAD + 2 if row_labels else 0)
    texts = [*captions, *column_labels]
    pitch = max(width + gap, max(map(text_width, texts), default=0) + PAD)
    top = MARGIN + (line_height() + 2 if column_labels else 0)
    tops = []
    for row in range(rows):
        tops.append(top)
        lines = [text.count("\n") + 1 for text in captions[row * columns : (row + 1) * columns] if text]
        top += height + (max(lines) * line_height() + PAD if lines else gap)
    # Whole pixels: a tile on a fraction of a pixel would blur.
    lefts = np.round(left + pitch * np.arange(columns) + (pitch - width) / 2)
    size = (int(np.ceil(left + pitch * columns + MARGIN)), int(np.ceil(top + MARGIN - gap)))
    return _Layout(lefts, np.round(tops), pitch, (height, width), size), left


def _draw(shown, empty, layout, width, drop, heading, left, row_labels, column_labels, captions):
    """The figure: one image for all tiles, one text for each label."""
    height = int(np.ceil(layout.size[1] + drop))
    shift = (width - layout.size[0]) // 2
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    canvas = np.ones((height, width, 3), np.float32)
    columns, (tall, wide) = len(layout.lefts), layout.tile
    corners = [(round(layout.tops[i // columns] + drop), round(layout.lefts[i % columns]) + shift)
               for i in range(len(shown))]
    for image, skip, (y, x) in zip(shown, empty, corners, strict=True):
        if not skip:
            canvas[y : y + tall, x : x + wide] = image
    axes.imshow(canvas, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    y = MARGIN
    for text, size, weight, ink in heading:
        axes.text(MARGIN, y, text, fontsize=size, fontweight=weight, color=ink, va="top", linespacing=1.2)
        y += line_height(size) * (text.count("\n") + 1)
    for text, x in zip(column_labels, layout.lefts, strict=bool(column_labels)):
        axes.text(x + shift + wide / 2, layout.tops[0] + drop - 3, text, fontsize=TEXT, color=INK, ha="center",
                  va="bottom")
    for text, top in zip(row_labels, layout.tops, strict=bool(row_labels)):
        axes.text(left + shift - PAD, top + drop + tall / 2, text, fontsize=TEXT, color=INK, ha="right",
                  va="center_baseline", multialignment="right")
    for text, (y, x) in zip(captions, corners, strict=bool(captions)):
        axes.text(x + wide / 2, y + tall + 3, text, fontsize=TEXT, color=INK, ha="center", va="top", linespacing=1.2)
    return figure


def neighbour_grid(
    samples, train, *, heldout=None, count: int = 3, labels: Sequence[str] = (), max_value: int | None = None
) -> Figure:
    """Each sample above its nearest training images, with the distances that tell a copy from a new image.

    Args:
      samples: `[N, H, W, C]`, one column each.
      train: `[M, H, W, C]` images that the model saw, of the same kind and range.
      heldout: `[K, H, W, C]` images that it did not see: their nearest is the last row, what an honest distance is.
      count: training images under each sample.
      labels: one string per sample, above it.
      max_value: the integer that shows as white.
    """
    white = 255 if max_value is None else max_value
    unit = white if np.issubdtype(np.asarray(samples).dtype, np.integer) else 2
    near, far = nearest(samples, train, count)
    rows, captions = [np.asarray(samples)], [""] * len(near)
    names = ["sample", "nearest\nin training", *(f"{rank}." for rank in range(2, count + 1))]
    for rank in range(count):
        rows.append(np.asarray(train)[near[:, rank]])
        captions += [f"{d / unit:.2f}" for d in far[:, rank]]
    if heldout is not None:
        index, distance = nearest(samples, heldout, 1)
        rows.append(np.asarray(heldout)[index[:, 0]])
        captions += [f"{d / unit:.2f}" for d in distance[:, 0]]
        names.append("nearest\nheld out")
    return image_grid(
        np.concatenate(rows), columns=len(near), row_labels=names, captions=captions, column_labels=labels,
        max_value=max_value, title="Samples and their nearest real images",
        note="Under each real image: its Euclidean distance to the sample, pixels in [0, 1]. A copy is near a training "
        "image (0.00 = the same) and far from every held-out one.",
    )


def nearest(samples, images, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`(index, distance)`, both `[N, count]`: the nearest of `images [M, ...]` to each of `samples [N, ...]`, L2."""
    a = np.asarray(samples, np.float64).reshape(len(samples), -1)
    b = np.asarray(images, np.float64).reshape(len(images), -1)
    squared = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)
    index = np.argsort(squared, axis=1, kind="stable")[:, :count]
    return index, np.sqrt(np.take_along_axis(squared, index, axis=1))
