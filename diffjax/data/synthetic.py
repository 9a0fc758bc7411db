"""Noise in the shape of data: for plans, benchmarks and smoke tests of networks whose data is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffjax.data.sources import Dataset, Pixels


@dataclass(frozen=True)
class NoiseSource:
    """Standard normal noise with random labels, made when it is read: item i is a function of `seed` and i alone.

    Attributes:
      shape: `(H, W, C)` of an image.
      num_classes: labels are below it; 0 for none.
      size: how many items.
      seed: of the noise, at least 0.
    """

    shape: tuple[int, int, int]
    num_classes: int
    size: int
    seed: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        if not 0 <= int(index) < self.size:
            raise IndexError(f"item {int(index)} of {self.size}")
        rng = np.random.default_rng((self.seed, int(index)))
        label = rng.integers(self.num_classes) if self.num_classes else 0
        return {"image": rng.standard_normal(self.shape, np.float32), "label": np.int32(label)}


def synthetic(
    shape: tuple[int, int, int] = (32, 32, 4), num_classes: int = 1000, *, size: int = 1 << 20, seed: int = 0
) -> Dataset:
    """A `Dataset` of `size` items of standard normal noise, such as latents of a data set that is not here.

    Args:
      shape: `(H, W, C)` of an image or of a latent.
      num_classes: 0 for unlabelled data.
      size: items to train on; as many are held out, of other noise.
      seed: of the noise.

    Raises:
      ValueError: for a shape that is not three positive integers, or a negative number of classes or of items.
    """
    if len(shape) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"shape={shape!r}: expected (height, width, channels), three positive integers")
    if num_classes < 0 or size < 1 or seed < 0:
        raise ValueError(f"num_classes={num_classes}, size={size}, seed={seed}: expected at least 0, 1 and 0")
    train, heldout = (NoiseSource(tuple(shape), num_classes, size, 2 * seed + half) for half in (0, 1))
    return Dataset(train, heldout, tuple(shape), num_classes, Pixels(255))
