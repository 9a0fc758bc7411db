"""Which items a batch holds: positions in a source as a function of the batch's number, for shuffled epochs and for
batches that must each come from one bucket of image shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

# Second entries of the seeds that are not epochs of a whole source, so that no two streams share one.
_BUCKET, _PLAN = 1 << 40, 1 << 41


class Shuffled:
    """Endless shuffled epochs, cut into batches; a batch may span two epochs, so none is short and no item is dropped.

    Epoch `e` is `numpy.random.default_rng((seed, e)).permutation(len(source))`, or `source.order(seed, e)` for a source
    that has an order of its own (a mixture), whose epochs all have `source.epoch_length` items.
    """

    def __init__(self, source: Any, batch_size: int, seed: int):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._length = getattr(source, "epoch_length", len(source))
        self._orders: dict[int, np.ndarray] = {}

    def indices(self, index: int) -> np.ndarray:
        """`[batch_size]` positions in the source of batch `index`."""
        epoch, offset = divmod(index * self.batch_size, self._length)
        parts, missing = [], self.batch_size
        while missing:
            parts.append(self._order(epoch)[offset : offset + missing])
            missing -= len(parts[-1])
            epoch, offset = epoch + 1, 0
        return np.concatenate(parts)

    def _order(self, epoch: int) -> np.ndarray:
        # Replacing the dict keeps concurrent readers safe.
        orders = self._orders
        if epoch not in orders:
            if hasattr(self.source, "order"):
                order = self.source.order(self.seed, epoch)
            else:
                order = np.random.default_rng((self.seed, epoch)).permutation(self._length)
            orders = {e: o for e, o in orders.items() if abs(e - epoch) <= 1} | {epoch: order}
            self._orders = orders
        return orders[epoch]


class Bucketed:
    """Batches that each hold items of one bucket, every item equally often.

    Each bucket is an endless stream of its own shuffled epochs. When the source has been gone through `e` times, bucket
    `g` with `n_g` items has given `floor(e * n_g / batch_size)` batches; the batches of one pass come in random order.
    So a batch of a bucket with fewer than `batch_size` items holds some of them twice.
    """

    def __init__(self, source: Any, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        buckets = np.asarray(source.buckets)
        self._members = [np.flatnonzero(buckets == g) for g in range(int(buckets.max()) + 1)]
        self._sizes = np.array([len(m) for m in self._members])
        self._plans: dict[int, np.ndarray] = {}
        self._perms: dict[tuple[int, int], np.ndarray] = {}

    def indices(self, index: int) -> np.ndarray:
        """`[batch_size]` positions in the source of batch `index`, all of one bucket."""
        # The bound of each floor puts the pass within len(sizes) batches of the mean; walk up from below it.
        total = int(self._sizes.sum())
        e = max(0, index * self.batch_size // total - 1)
        while self._given(e + 1).sum() <= index:
            e += 1
        bucket, turn = self._plan(e)[index - int(self._given(e).sum())]
        return self._stream(int(bucket), int(turn) * self.batch_size)

    def _given(self, passes: int) -> np.ndarray:
        return passes * self._sizes // self.batch_size

    def _plan(self, e: int) -> np.ndarray:
        """`[n, 2]`: the bucket and its how-manieth batch, for each batch of pass `e`."""
        plans = self._plans
        if e not in plans:
            before, after = self._given(e), self._given(e + 1)
            rows = [(g, k) for g in range(len(before)) for k in range(before[g], after[g])]
            order = np.random.default_rng((self.seed, _PLAN, e)).permutation(len(rows))
            self._plans = plans = {i: p for i, p in plans.items() if abs(i - e) <= 1} | {e: np.array(rows)[order]}
        return plans[e]

    def _stream(self, g: int, start: int) -> np.ndarray:
        epoch, offset = divmod(start, int(self._sizes[g]))
        parts, missing = [], self.batch_size
        while missing:
            parts.append(self._perm(g, epoch)[offset : offset + missing])
            missing -= len(parts[-1])
            epoch, offset = epoch + 1, 0
        return np.concatenate(parts)

    def _perm(self, g: int, epoch: int) -> np.ndarray:
        perms = self._perms
        if (g, epoch) not in perms:
            order = np.random.default_rng((self.seed, _BUCKET + g, epoch)).permutation(self._members[g])
            near = {k: p for k, p in perms.items() if k[0] != g or abs(k[1] - epoch) <= 1}
            self._perms = perms = near | {(g, epoch): order}
        return perms[g, epoch]


def make_order(source: Any, batch_size: int, seed: int) -> Shuffled | Bucketed:
    """`Bucketed` for a source with `buckets [N] int`, else `Shuffled`."""
    kind = Shuffled if getattr(source, "buckets", None) is None else Bucketed
    return kind(source, batch_size, seed)


def substitutes(source: Any, index: int) -> Iterator[int]:
    """The positions to read in place of an unreadable item: those after it, round the source, in the same bucket.

    A source that is made of others has a method `substitutes(index)` of its own.
    """
    if hasattr(source, "substitutes"):
        yield from source.substitutes(index)
        return
    buckets, n = getattr(source, "buckets", None), len(source)
    for step in range(1, n):
        other = (index + step) % n
        if buckets is None or buckets[other] == buckets[index]:
            yield other
