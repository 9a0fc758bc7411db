"""From a source to an endless, shuffled, resumable iterator of batches, on Grain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from diffjax import registry
from diffjax.data import augment as augmentations

AUGMENTS = {"affine": augmentations.affine, "flip": augmentations.flip, "shift": augmentations.shift}


def batches(
    source: Any, batch_size: int, *, seed: int, augment: str | Callable | tuple | None = None, threads: int = 0
):
    """An endless Grain iterator of shuffled batches; batch `i` is a function of the arguments and `i` alone.

    Each epoch visits every item once, in an order of its own; a batch may span two epochs, so none is short and no
    item is dropped. `get_state()` and `set_state(state)` stop and go on mid-epoch with the very same batches. A state
    belongs to one source length, batch size, seed and augmentation; `threads` may differ.

    Grain's own per-item shuffle and batch cost 13 ms per batch of 128 digits on one CPU core, all of it Python per
    item; here an element of the Grain data set is a whole batch, and costs 0.1 ms.

    Args:
      source: has `__len__` and `__getitem__(i) -> dict of arrays`, and optionally `take(indices) -> dict of stacked
        arrays`, which is then used for speed.
      batch_size: items per batch, at most `len(source)`.
      seed: of the order and the augmentation, in `0 .. 2**32 - 1`.
      augment: a spec such as `"shift(pixels=1)"`, a function `(batch, rng) -> batch`, or a tuple of them, applied in
        order; None or an empty one leaves batches as they are.
      threads: 0 reads each batch when it is asked for; more read ahead, for sources that wait on a disk.

    Returns:
      An iterator of dicts of numpy arrays, `{"image": [B, H, W, C] float32, "label": [B] int32}` for the sources here.

    Raises:
      ValueError: for a batch larger than the data or smaller than 1, a seed out of range, or an unknown augmentation.
    """
    import grain

    if not 1 <= batch_size <= len(source):
        raise ValueError(f"batch_size={batch_size} with {len(source)} items; expected 1 .. {len(source)}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: expected an integer in 0 .. {2**32 - 1}")
    dataset = grain.MapDataset.source(Batches(source, batch_size, seed))
    dataset = dataset.seed(seed)
    for fn in _augments(augment):
        dataset = dataset.random_map(fn)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    return iter(dataset.to_iter_dataset(options))


class Batches:
    """Random access to the batches of all epochs: item `b` holds shuffled items `b * batch_size ...` of the stream.

    Attributes:
      source: see `batches`.
      batch_size: items per batch.
      seed: the order of epoch `e` is `numpy.random.default_rng((seed, e)).permutation(len(source))`.
    """

    def __init__(self, source: Any, batch_size: int, seed: int):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        indices = self.indices(int(index))
        if hasattr(self.source, "take"):
            return self.source.take(indices)
        items = [self.source[int(i)] for i in indices]
        return {name: np.stack([item[name] for item in items]) for name in items[0]}

    def indices(self, index: int) -> np.ndarray:
        """`[batch_size]` positions in the source of batch `index`."""
        epoch, offset = divmod(index * self.batch_size, len(self.source))
        head = self._order(epoch)[offset : offset + self.batch_size]
        return np.concatenate([head, self._order(epoch + 1)[: self.batch_size - len(head)]])

    def _order(self, epoch: int) -> np.ndarray:
        # Two epochs are kept, because a batch spans at most two. Replacing the dict keeps concurrent readers safe.
        orders = self._orders
        if epoch not in orders:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
            orders = {e: o for e, o in orders.items() if abs(e - epoch) <= 1} | {epoch: order}
            self._orders = orders
        return orders[epoch]


def _augments(augment) -> list[Callable]:
    if not augment:
        return []
    specs = augment if isinstance(augment, list | tuple) else (augment,)
    return [spec if callable(spec) else registry.build(spec, AUGMENTS, "augmentation") for spec in specs if spec]
