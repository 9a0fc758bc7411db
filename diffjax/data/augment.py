"""Augmentations: `(batch, rng) -> batch` on whole batches, in numpy, before the batch leaves the host.

`batch` is `{"image": [B, H, W, C] float32, ...}`; other entries pass through. All randomness comes from `rng`, a
`numpy.random.Generator`. Those of the library are `Rowwise`: what they draw is one row per image, so that a process
can augment its own rows of a batch with what the whole batch would have given them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Augment = Callable[[dict, np.random.Generator], dict]


@dataclass(frozen=True)
class Rowwise:
    """An `Augment` whose draws come before, and apart from, the images.

    Attributes:
      draw: `(rng, n) -> tuple of arrays [n, ...]`, for a batch of n images.
      apply: `(batch, draws) -> batch`, with one row of each array for each image.
    """

    draw: Callable[[np.random.Generator, int], tuple]
    apply: Callable[[dict, tuple], dict]

    def __call__(self, batch: dict, rng: np.random.Generator) -> dict:
        """The batch, augmented."""
        return self.apply(batch, self.draw(rng, len(batch["image"])))

    def part(self, batch: dict, rng: np.random.Generator, rows: slice, total: int) -> dict:
        """`batch`, which holds the `rows` of a batch of `total` items, as it comes out of the whole batch."""
        return self.apply(batch, tuple(array[rows] for array in self.draw(rng, total)))


def shift(pixels: int = 1, fill: float = -1.0) -> Augment:
    """Moves each image by an independent whole number of pixels in `-pixels .. pixels` along each axis.

    Args:
      pixels: the largest move.
      fill: what enters at the border, in model space; -1 is the background of the digits.

    Raises:
      ValueError: if `pixels` is negative or not an integer.
    """
    if pixels != int(pixels) or pixels < 0:
        raise ValueError(f"shift(pixels={pixels}): expected an integer >= 0; affine(translate=...) moves by fractions")

    def draw(rng, n):
        return tuple(rng.integers(0, 2 * pixels + 1, (2, n)))

    def apply(batch, draws):
        image, (top, left) = batch["image"], draws
        n, h, w, _ = image.shape
        padded = np.pad(image, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), constant_values=fill)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (h, w), axis=(1, 2))
        moved = windows[np.arange(n), top, left]
        return {**batch, "image": np.ascontiguousarray(np.moveaxis(moved, 1, -1))}

    return Rowwise(draw, apply)


def flip(p: float = 0.5) -> Augment:
    """Mirrors each image left to right with probability `p`.

    Raises:
      ValueError: if `p` is outside `[0, 1]`.
    """
    _probability("flip", p)

    def apply(batch, draws):
        image, chosen = batch["image"], draws[0]
        return {**batch, "image": np.where(chosen[:, None, None, None], image[:, :, ::-1], image)}

    return Rowwise(lambda rng, n: (rng.random(n) < p,), apply)


def affine(
    rotate: float = 10.0,
    scale: float = 0.1,
    *,
    shear: float = 0.1,
    translate: float = 0.5,
    p: float = 1.0,
    fill: float = -1.0,
) -> Augment:
    """Warps each image about its centre by a random affine map, bilinearly, with probability `p`.

    The map is `rotation @ [[1, shear], [0, 1]] @ diag(scales)` and a move; each parameter is drawn uniformly within
    plus or minus its argument, scales as `exp(u)` per axis.

    Args:
      rotate: largest angle, in degrees.
      scale: largest log-scale.
      shear: largest shear, in widths per height.
      translate: largest move, in pixels.
      p: share of the images that are warped; the others are returned bit for bit.
      fill: what lies outside the image, in model space.

    Raises:
      ValueError: if an amount is negative or `p` is outside `[0, 1]`.
    """
    _probability("affine", p)
    amounts = {"rotate": rotate, "scale": scale, "shear": shear, "translate": translate}
    for name, amount in amounts.items():
        if not amount >= 0:
            raise ValueError(f"affine({name}={amount}): expected a number >= 0, the largest {name}")

    def draw(rng, n):
        angle = np.deg2rad(rotate) * rng.uniform(-1, 1, n)
        scales = np.exp(scale * rng.uniform(-1, 1, (n, 2)))
        shears = shear * rng.uniform(-1, 1, n)
        move = translate * rng.uniform(-1, 1, (n, 2))
        return _matrix(angle, scales, shears), move, rng.random(n) < p

    def apply(batch, draws):
        image, (matrix, move, chosen) = batch["image"], draws
        warped = warp(image, matrix, move, fill)
        return {**batch, "image": np.where(chosen[:, None, None, None], warped, image)}

    return Rowwise(draw, apply)


def warp(image: np.ndarray, matrix: np.ndarray, move: np.ndarray, fill: float) -> np.ndarray:
    """Bilinear resampling: the output at `centre + matrix @ (p - centre) + move` is the input at `p`.

    Args:
      image: `[B, H, W, C] float32`.
      matrix: `[B, 2, 2]`, invertible, acting on `(row, column)`.
      move: `[B, 2]` in pixels, `(row, column)`.
      fill: value outside the image.

    Returns:
      `[B, H, W, C] float32`.
    """
    n, h, w, c = image.shape
    centre = np.array([(h - 1) / 2, (w - 1) / 2])
    grid = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij")).reshape(2, -1) - centre[:, None]
    source = np.linalg.inv(matrix) @ (grid - move[:, :, None]) + centre[:, None]
    # A border of two pixels of `fill` on each side: what is clipped to lie outside the image reads nothing else.
    row = np.clip(source[:, 0] + 2, 0, h + 2).astype(np.float32)
    col = np.clip(source[:, 1] + 2, 0, w + 2).astype(np.float32)
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=fill).reshape(-1, c)
    top, left = np.floor(row), np.floor(col)
    down, right = (row - top)[..., None], (col - left)[..., None]
    corner = (np.arange(n)[:, None] * (h + 4) + top.astype(np.int64)) * (w + 4) + left.astype(np.int64)
    at = lambda offset: padded.take(corner + offset, axis=0)
    upper = at(0) + right * (at(1) - at(0))
    lower = at(w + 4) + right * (at(w + 5) - at(w + 4))
    return (upper + down * (lower - upper)).reshape(image.shape)


def _matrix(angle: np.ndarray, scales: np.ndarray, shears: np.ndarray) -> np.ndarray:
    """`[B, 2, 2]`: rotation, then shear, then scales, applied from right to left."""
    one, zero = np.ones_like(angle), np.zeros_like(angle)
    stack = lambda a, b, c, d: np.stack([np.stack([a, b], -1), np.stack([c, d], -1)], -2)
    rotation = stack(np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle))
    return rotation @ stack(one, shears, zero, one) @ stack(scales[:, 0], zero, zero, scales[:, 1])


def _probability(name: str, p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"{name}(p={p}): expected a probability in [0, 1]")
