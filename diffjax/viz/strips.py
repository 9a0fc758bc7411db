"""The way from noise to image: what the solver holds and what the network makes of it, level by level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from diffjax.viz.grids import image_grid


def denoising_strip(
    x, x0, alpha, sigma, *, columns: int = 12, title: str = "From noise to image", show: Callable | None = None
) -> Figure:
    """A strip of two rows per sample: the state `x` and the prediction of `x0` from it, with `sigma / alpha` below.

    `x` is shown over `sqrt(alpha^2 + sigma^2)`, so that every level has the contrast of the data.

    Args:
      x: `[n, S, H, W, C]`, S samples at the start of each of n steps.
      x0: `[n, S, H, W, C]`, the prediction at the same levels, in `[-1, 1]`.
      alpha: `[n]`; `sigma`: `[n]`.
      columns: levels shown, evenly chosen among the n, first and last included.
      title: the heading.
      show: `[N, H, W, C] -> images [N, h, w, 1 or 3]` as `image_grid` takes them, for states that are no images.

    Raises:
      ValueError: where the shapes disagree.
    """
    x, x0, alpha, sigma = (np.asarray(a) for a in (x, x0, alpha, sigma))
    if x.shape != x0.shape or x.ndim != 5 or not alpha.shape == sigma.shape == x.shape[:1]:
        raise ValueError(f"x {x.shape}, x0 {x0.shape}, alpha {alpha.shape}, sigma {sigma.shape}: expected "
                         "[n, S, H, W, C] twice and [n] twice")
    chosen = np.unique(np.linspace(0, len(x) - 1, min(columns, len(x))).round().astype(int))
    scale = np.sqrt(alpha**2 + sigma**2)[:, None, None, None, None]
    pairs = np.stack([x / scale, x0], axis=2)[chosen].swapaxes(0, 1)
    samples = pairs.shape[0]
    tiles = pairs.swapaxes(1, 2).reshape((-1,) + x.shape[2:])
    # A blank line under every pair sets the samples apart; the levels stand under the last.
    captions = ([""] * len(chosen) + [" "] * len(chosen)) * samples
    captions[-len(chosen) :] = [_level(alpha[i], sigma[i]) for i in chosen]
    return image_grid(
        tiles if show is None else show(tiles), columns=len(chosen), captions=captions,
        row_labels=["x", "x0 predicted"] * samples, title=title,
        note="Left to right: the steps of the solver. Below: noise over signal, sigma / alpha.",
    )  # fmt: skip


def _level(alpha: float, sigma: float) -> str:
    """`sigma / alpha` to two digits."""
    if alpha == 0:
        return "inf"
    return f"{sigma / alpha:.2g}" if sigma / alpha < 99.5 else f"{sigma / alpha:.0f}"
