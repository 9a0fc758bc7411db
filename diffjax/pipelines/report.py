"""What an evaluation leaves behind: one table for the terminal, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from diffjax import metrics, viz
from diffjax.pipelines.generate import Samples

# Columns of the picture of samples by class, at most.
CLASSES = 20
# What the table shows of all metrics, and what each means.
SHOWN = {
    "fd_relu": ("FD-relu", "Frechet distance to the held-out images in the features of a ReLU classifier"),
    "fd_tanh": ("FD-tanh", "the same with a tanh classifier"),
    "fd_pixels": ("FD-pixels", "Frechet distance to the held-out images in raw pixels in [0, 1]"),
    "mmd2": ("MMD2 e3", "squared maximum mean discrepancy of pixels (RBF kernel, unbiased), times 1000"),
    "c2st": ("C2ST", "how well nearest neighbours tell samples from held-out images: 0.5 = not at all, 1 = always"),
    "closer": ("closer", "share of the samples nearer to training than to held-out images: {new} = new, 1 = copies"),
    "recall": ("recall", "share of the held-out images that the samples surround: variety"),
    "accuracy": ("acc", "share of the samples that an independent classifier reads as the class asked for"),
}


def table(rows: Mapping[str, Mapping], *, title: str, new: float) -> str:
    """Aligned text: a title, the rows under headings that say which direction is good, and what the metrics mean.

    Args:
      rows: `{name: {metric: value}}`, the metrics of `diffjax.metrics.report`; what is missing is a dash.
      title: the first line.
      new: the share of training images among all, which `closer` is for samples that copy nothing.
    """
    told = f"{new:.2g}"
    shown = [key for key in SHOWN if any(key in row for row in rows.values())]
    # No row is named "": multiples of the floor would double the width.
    cells = {name: {key: row[key] for key in shown if key in row} for name, row in rows.items()}
    body = metrics.table(cells, floor="", good={"closer": told})
    lines = body.split("\n")
    rule = "-" * max(map(len, lines))
    meaning = [f"{SHOWN[key][0]:10} {SHOWN[key][1].replace('{new}', told)}" for key in shown]
    return "\n".join([title, rule, *lines[:2], rule, *lines[2:], rule, *meaning])


def by_class(images: np.ndarray, labels: np.ndarray, num_classes: int, most: int) -> np.ndarray:
    """The first images of every class `[num_classes, n, H, W, C]`, n at most `most` and never more than a class has.

    A class without images is blank (zeros).
    """
    found = [images[labels == label] for label in range(num_classes)]
    each = min([most, *(len(one) for one in found if len(one))])
    blank = np.zeros((each, *images.shape[1:]), images.dtype)
    return np.stack([one[:each] if len(one) else blank for one in found])


def draw_grid(folder: Path, samples: Samples, *, num_classes: int, max_value: int, note: str) -> Path:
    """`grid.png`: ten samples of every class, one class a column; for data without classes, the first hundred.

    Of more than `CLASSES` classes the first that were drawn are shown: a picture holds no thousand columns.
    """
    columns, names, title = 10, (), "Samples"
    images = samples.images[:100]
    if num_classes:
        shown = np.arange(num_classes) if num_classes <= CLASSES else np.unique(samples.labels)[:CLASSES]
        chosen = np.isin(samples.labels, shown)
        images = by_class(samples.images[chosen], np.searchsorted(shown, samples.labels[chosen]), len(shown), 10)
        images = images.swapaxes(0, 1).reshape(-1, *images.shape[2:])
        columns, names, title = len(shown), [str(label) for label in shown], "Samples by class"
    figure = viz.image_grid(
        images, columns=columns, column_labels=names, max_value=max_value, title=title, note=note
    )
    return viz.save(figure, folder / "grid.png")


def draw_neighbours(folder: Path, samples: Samples, train, heldout, *, num_classes: int, max_value: int) -> Path:
    """`neighbours.png`: one sample of every class above its nearest training images and its nearest held-out one."""
    images, names = samples.images[:10], ()
    if num_classes:
        images = by_class(samples.images, samples.labels, min(num_classes, 10), 1)[:, 0]
        names = [f"class {label}" for label in range(len(images))]
    figure = viz.neighbour_grid(images, train, heldout=heldout, labels=names, max_value=max_value)
    return viz.save(figure, folder / "neighbours.png")


def draw_guidance(
    folder: Path, panels: Sequence[tuple[float, Samples, Mapping]], *, num_classes: int, max_value: int, note: str
) -> Path:
    """`guidance.png`: the same seeds and classes at every scale, with accuracy and distance under each panel.

    Args:
      folder: where to write.
      panels: `(scale, samples, metrics)`.
      num_classes: up to ten of them are shown, two samples of each.
      max_value: the integer that shows as white.
      note: the line under the title.
    """
    shown, tiles, captions = min(num_classes, 10), [], []
    for scale, samples, scores in panels:
        chosen = by_class(samples.images, samples.labels, shown, 2).swapaxes(0, 1)
        tiles.append(viz.mosaic(chosen.reshape(-1, *chosen.shape[2:]), columns=min(5, shown), max_value=max_value))
        lines = [f"w = {scale:g}" + {0.0: " (no class)", 1.0: " (no guidance)"}.get(scale, "")]
        if "accuracy" in scores:
            lines.append(f"accuracy {100 * scores['accuracy']:.1f} %")
        key = "fd_relu" if "fd_relu" in scores else "fd_pixels"
        captions.append("\n".join([*lines, f"{SHOWN[key][0]} {scores[key]:.3f}"]))
    figure = viz.image_grid(
        np.stack(tiles), columns=len(tiles), captions=captions, max_value=max_value, gap=22,
        zoom=max(1, round(32 / panels[0][1].images.shape[1])), note=note,
        title="Guidance: the same seeds and classes at growing scales",
    )
    return viz.save(figure, folder / "guidance.png")
