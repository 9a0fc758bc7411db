"""Samples of a run while it trains, as one picture for its log."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from diffjax.pipelines.generate import largest_pixel
from diffjax.pipelines.sampler import check_guidance, compile_sampler, grid, in_batches, settings_of
from diffjax.train.parallel.mesh import gather
from diffjax.train.parts import Parts
from diffjax.train.state import Run, opened

ROWS, COLUMNS = 4, 10
LEAST_SIDE = 64  # pixels that an image is enlarged to, by a whole factor


def preview(config: ConfigDict, parts: Parts) -> Callable[[dict, int], np.ndarray]:
    """`(params, step) -> uint8 [H, W, 1 or 3]`: a sheet of samples drawn with `config.sample`, compiled once.

    Each picture of a run has the same noise and classes, so that a sequence of them shows what training changes. One
    class a column, at most ten of them, one seed a row.

    Args:
      config: the resolved config of the run.
      parts: what it names.

    Raises:
      ValueError: as `diffjax.pipelines.sampler.grid` and `check_guidance`.
    """
    base = Run(config, parts.dataset, parts.model, {}, parts.schedule, parts.head, 0)
    settings = settings_of(config.sample)
    check_guidance(base, settings)
    build = lambda run: (grid(run, settings), compile_sampler(run, settings))
    built = build(base)
    seeds, labels = np.divmod(np.arange(ROWS * COLUMNS), COLUMNS)
    if parts.dataset.num_classes:
        # Fewer classes than columns repeat, with other noise.
        labels, seeds = labels % parts.dataset.num_classes, seeds + ROWS * (labels // parts.dataset.num_classes)
    else:
        labels, seeds = np.zeros_like(labels), np.arange(ROWS * COLUMNS)

    def picture(params: dict, step: int) -> np.ndarray:
        run = opened(base, params, step)
        # A schedule that is trained is another one each time, and so is the sampler.
        levels, draw = built if run.schedule is base.schedule else build(run)
        one = lambda keys, labels: gather(draw(params, keys, labels, levels, settings.guidance))
        pixels = parts.dataset.to_pixels(in_batches(one, seeds, labels, batch_size=ROWS * COLUMNS))
        return sheet((pixels * (255 / largest_pixel(parts.dataset))).round().astype(np.uint8), COLUMNS)

    return picture


def sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """`uint8 [rows * (H + 2) - 2, columns * (W + 2) - 2, 1 or 3]` of images `uint8 [N, H, W, C]`, row by row.

    Small images are enlarged by a whole factor; of other channel counts than 1 and 3 the first (up to 3) are shown.
    """
    images = images[..., : 3 if images.shape[-1] >= 3 else 1]
    factor = -(-LEAST_SIDE // min(images.shape[1:3]))
    images = images.repeat(factor, 1).repeat(factor, 2)
    n, h, w, c = images.shape
    rows = -(-n // columns)
    page = np.full((rows * (h + 2), columns * (w + 2), c), 128, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + 2), (i % columns) * (w + 2)
        page[top : top + h, left : left + w] = image
    return page[:-2, :-2]
