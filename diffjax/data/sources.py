"""Data sets as random-access sources: scikit-learn's digits, arrays in memory, an `.npz` file.

A source has `__len__` and `__getitem__(i) -> {"image": [H, W, C] float32 in [-1, 1], "label": int32}`. One that also
has `take(indices) -> {"image": [n, H, W, C], "label": [n]}` is read a whole batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Two disjoint sources and what a model and an evaluation must know about them.

    Attributes:
      train: random-access source to train on; None in what `without_items` makes.
      heldout: random-access source of the same kind that training never sees; None likewise.
      shape: `(H, W, C)` of one image.
      num_classes: labels are `0 .. num_classes - 1`; 0 if there are no labels (every label is then 0).
      to_pixels: `(x) -> uint8`, from model space `[-1, 1]` to the integers of the data, clipped and rounded; any shape.
      buckets: every shape that a batch of `train` may have, `shape` first; () if that is the only one.
    """

    train: Any
    heldout: Any
    shape: tuple[int, int, int]
    num_classes: int
    to_pixels: Callable[[Any], np.ndarray]
    buckets: tuple[tuple[int, int, int], ...] = ()

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Every shape `(H, W, C)` that the images of a batch may have; all images of one batch have the same."""
        return self.buckets or (self.shape,)


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images and labels held in memory.

    Attributes:
      images: `[N, H, W, C] float32` in `[-1, 1]`.
      labels: `[N] int32`.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The items at `indices [n]`, stacked; copies, so a caller may write into them."""
        return {"image": self.images[indices], "label": self.labels[indices]}


@dataclass(frozen=True)
class Pixels:
    """From model space `[-1, 1]` to the integers `0 .. high`.

    Attributes:
      high: the largest integer of the data, 255 for 8-bit images and 16 for the digits.
    """

    high: int = 255

    def __call__(self, x) -> np.ndarray:
        """`uint8` of the shape of `x`: `round((x + 1) * high / 2)`, clipped to `0 .. high`."""
        scaled = (np.asarray(x, np.float32) + 1) * (self.high / 2)
        return np.clip(np.rint(scaled), 0, self.high).astype(np.uint8)

    def inverse(self, pixels) -> np.ndarray:
        """`float32` in `[-1, 1]` of the shape of `pixels`."""
        return np.asarray(pixels, np.float32) * np.float32(2 / self.high) - 1


def arrays(images, labels=None, *, high: int = 255, heldout: float | int = 0.1, split_seed: int = 0) -> Dataset:
    """A `Dataset` of arrays in memory, split at random and, when there are labels, with equal shares of each class.

    Args:
      images: `[N, H, W, C]` or `[N, H, W]`; integers `0 .. high`, or floats in `[-1, 1]`.
      labels: `[N]` integers from 0, or None for unlabelled data.
      high: the largest integer pixel, at most 255; float images are quantised to `0 .. high` by `to_pixels` only.
      heldout: how much to hold out, a share in (0, 1) or a number of images.
      split_seed: another seed gives another split.

    Raises:
      ValueError: for another rank, range or dtype of the images, labels of another length, below 0 or not integers, or
        a split that leaves a half empty or (with labels) a class with fewer than two images.
    """
    from sklearn.model_selection import train_test_split

    to_pixels = _pixels(high)
    images = _images(np.asarray(images), to_pixels)
    known = labels is not None
    labels = _labels(labels, len(images)) if known else np.zeros(len(images), np.int32)
    try:
        train, held = train_test_split(
            np.arange(len(images)), test_size=heldout, stratify=labels if known else None, random_state=split_seed
        )
    except ValueError as error:
        raise ValueError(f"cannot hold out {heldout!r} of {len(images)} images: {error}") from None
    return Dataset(
        train=ArraySource(images[train], labels[train]),
        heldout=ArraySource(images[held], labels[held]),
        shape=images.shape[1:],
        num_classes=int(labels.max()) + 1 if known else 0,
        to_pixels=to_pixels,
    )


def digits(split_seed: int = 0) -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8 x 8, integers 0 to 16, ten classes; 899 to train on and 898 held out.

    The split is scikit-learn's stratified `train_test_split` at `random_state=split_seed`. Source: Alpaydin and Kaynak
    1998, Optical Recognition of Handwritten Digits, UCI.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    return arrays(images, labels, high=16, heldout=len(images) // 2, split_seed=split_seed)


def npz(
    path: str, *, image: str = "image", label: str = "label", high: int = 255, heldout: float | int = 0.1, split_seed=0
) -> Dataset:
    """A `Dataset` from one `.npz` file; see `arrays` for the shapes, the split and what it raises.

    Args:
      path: the file; `~` is expanded.
      image: name of the images in it.
      label: name of the labels in it; a file without that name is unlabelled.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not an `.npz` archive, or has no array called `image`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}; npz(path=...) takes an archive written by numpy.savez")
    try:
        content = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{str(file)!r} is not an .npz archive ({error}); write one with numpy.savez") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(file)!r} holds a single array; write it with numpy.savez(path, {image}=images)")
    with content:
        if image not in content:
            raise ValueError(
                f"{str(file)!r} has no array {image!r}; it has: {', '.join(content)}; name it with npz(path, image=...)"
            )
        labels = content[label] if label in content else None
        return arrays(content[image], labels, high=high, heldout=heldout, split_seed=split_seed)


def _pixels(high: int) -> Pixels:
    if not 1 <= high <= 255:
        raise ValueError(f"high={high}: the largest pixel must be in 1 .. 255 (pixels are uint8)")
    return Pixels(int(high))


def _images(images: np.ndarray, to_pixels: Pixels) -> np.ndarray:
    """`images` as `[N, H, W, C] float32` in `[-1, 1]`, checked."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images of shape {images.shape}; expected [N, H, W, C] or [N, H, W], none of them 0")
    if np.issubdtype(images.dtype, np.integer):
        low, high, scaled = 0, to_pixels.high, to_pixels.inverse(images)
    elif np.issubdtype(images.dtype, np.floating):
        low, high, scaled = -1, 1, images.astype(np.float32)
    else:
        raise ValueError(f"images of dtype {images.dtype}; expected integers or floats")
    least, most = images.min(), images.max()
    if not (low <= least and most <= high):
        raise ValueError(
            f"{images.dtype} images from {least} to {most}; expected {low} .. {high} "
            f"(integers 0 .. high, floats -1 .. 1); set high= or rescale them"
        )
    return scaled


def _labels(labels, n: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (n,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels of shape {labels.shape} and dtype {labels.dtype}; expected [{n}] integers")
    if labels.min() < 0:
        raise ValueError(f"labels from {labels.min()}; expected integers from 0")
    return labels.astype(np.int32)
