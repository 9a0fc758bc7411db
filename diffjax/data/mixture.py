"""Several data sets in fixed proportions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from diffjax import registry
from diffjax.data.order import substitutes
from diffjax.data.sources import Dataset, Pixels

# Added to the seed entries of the components' own epochs, which must not repeat those of the whole.
_COMPONENT = 1 << 42


class Mixture:
    """Sources one after the other; its epochs hold each of them in the share of its weight.

    An epoch has `epoch_length` items: the fewest with which every source is gone through at least once. Component k has
    the same number of them in every epoch, `epoch_length * weight_k` rounded, and they are the next ones of its own
    endless shuffled epochs, so that in the long run the items of a component come equally often.

    Attributes:
      sources: the components.
      counts: `[K]` items of each in an epoch.
      epoch_length: their sum.
      shifts: `[K]` what is added to the labels of each; None makes all of them 0.
    """

    def __init__(self, sources: Sequence[Any], weights: Sequence[float], shifts: Sequence[int | None]):
        self.sources, self.shifts = list(sources), list(shifts)
        sizes = np.array([len(s) for s in sources])
        self.counts = shares(weights, int(np.ceil(np.max(sizes / np.asarray(weights)))))
        self.epoch_length = int(self.counts.sum())
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        k, i = self._locate(index)
        return self._shifted(k, self.sources[k][i])

    def draw(self, index: int, key: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Item `index` as training sees it; see `diffjax.data.batches`."""
        k, i = self._locate(index)
        source = self.sources[k]
        return self._shifted(k, source.draw(i, key) if hasattr(source, "draw") else source[i])

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """`[epoch_length]` positions of one epoch, in random order."""
        parts = [self._stretch(k, seed, epoch) + self._starts[k] for k in range(len(self.sources))]
        return np.random.default_rng((seed, epoch)).permutation(np.concatenate(parts))

    def substitutes(self, index: int) -> Iterator[int]:
        """What to read in place of an unreadable item: others of its own component."""
        k, i = self._locate(index)
        return (int(self._starts[k]) + other for other in substitutes(self.sources[k], i))

    @property
    def captions(self) -> Sequence[str] | None:
        texts = [getattr(s, "captions", None) for s in self.sources]
        return None if any(t is None for t in texts) else _Joined(texts, self._locate)

    def _locate(self, index) -> tuple[int, int]:
        k = int(np.searchsorted(self._starts, index, side="right")) - 1
        return k, int(index) - int(self._starts[k])

    def _stretch(self, k: int, seed: int, epoch: int) -> np.ndarray:
        size, count = len(self.sources[k]), int(self.counts[k])
        own, offset = divmod(epoch * count, size)
        parts, missing = [], count
        while missing:
            order = np.random.default_rng((seed, _COMPONENT + k, own)).permutation(size)[offset : offset + missing]
            parts.append(order)
            missing, own, offset = missing - len(order), own + 1, 0
        return np.concatenate(parts) if parts else np.zeros(0, int)

    def _shifted(self, k: int, item: dict) -> dict:
        shift = self.shifts[k]
        return {**item, "label": np.int32(0 if shift is None else item["label"] + shift)}


class Part:
    """Some items of a source."""

    def __init__(self, source: Any, positions: np.ndarray):
        self.source, self.positions = source, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        return self.source[int(self.positions[index])]


class _Joined(Sequence):
    def __init__(self, texts: Sequence[Sequence[str]], locate: Callable[[int], tuple[int, int]]):
        self._texts, self._locate = texts, locate

    def __len__(self) -> int:
        return sum(map(len, self._texts))

    def __getitem__(self, index):
        k, i = self._locate(index)
        return self._texts[k][i]


def mixture(*parts: tuple[str, float], labels: str = "shared") -> Dataset:
    """The `Dataset` of several in fixed proportions, as `mixture(("digits()", 3), ("npz('more.npz')", 1))`.

    Args:
      parts: pairs of a data set, as in `config.data`, and its weight.
      labels: see `mix`.

    Raises:
      ValueError: for parts that are no pairs, or as `mix` and the data sets themselves.
    """
    from diffjax.data import SOURCES

    for part in parts:
        if not (isinstance(part, tuple | list) and len(part) == 2 and isinstance(part[0], str)):
            raise ValueError(f'mixture: {part!r}: expected pairs such as ("digits()", 0.7)')
        if isinstance(part[1], bool) or not isinstance(part[1], int | float):
            raise ValueError(f"mixture: {part!r}: expected a number as the weight")
    datasets = [registry.build(spec, SOURCES, "data") for spec, _ in parts]
    return mix(datasets, [weight for _, weight in parts], labels=labels)


def mix(datasets: Sequence[Dataset], weights: Sequence[float], *, labels: str = "shared") -> Dataset:
    """The `Dataset` of several in fixed proportions; see `Mixture`.

    The held-out half is the largest part of the held-out halves that has the same proportions.

    Args:
      datasets: of one image shape.
      weights: a positive number for each; only their ratios count.
      labels: "shared" if label 3 means the same in all of them, "separate" if each has classes of its own, "none".

    Raises:
      ValueError: for other weights or labels, shapes that differ, or data sets with buckets.
    """
    weights = np.asarray(weights, np.float64)
    if not len(datasets) or len(weights) != len(datasets) or not np.all((weights > 0) & np.isfinite(weights)):
        raise ValueError(f"weights {weights.tolist()}: expected a positive number for each data set")
    if labels not in ("shared", "separate", "none"):
        raise ValueError(f"labels={labels!r}; known: shared, separate, none")
    if len({d.shape for d in datasets}) > 1 or any(d.buckets for d in datasets):
        shapes = ", ".join(str(d.buckets or d.shape) for d in datasets)
        raise ValueError(f"a mixture needs data sets of one image shape, got {shapes}; set size= and no buckets")
    weights = weights / weights.sum()
    classes = [d.num_classes for d in datasets]
    if labels != "none" and any(classes) and not all(classes):
        raise ValueError(f"data sets with {classes} classes: give labels='none', or labels to all of them")
    shifts = [None if labels == "none" else 0] * len(classes)
    if labels == "separate":
        shifts = np.cumsum([0, *classes[:-1]]).tolist()
    num_classes = {"shared": max(classes), "separate": sum(classes), "none": 0}[labels]
    held = [len(d.heldout) for d in datasets]
    counts = np.maximum(1, shares(weights, int(np.min(held / weights))))
    parts = [
        Part(d.heldout, np.sort(np.random.default_rng(0).permutation(n)[:count]))
        for d, n, count in zip(datasets, held, counts, strict=True)
    ]
    highs = [getattr(d.to_pixels, "high", None) for d in datasets]
    to_pixels = datasets[0].to_pixels if None in highs else Pixels(max(highs))
    return Dataset(
        train=Mixture([d.train for d in datasets], weights, shifts),
        heldout=Mixture(parts, counts / counts.sum(), shifts),
        shape=datasets[0].shape,
        num_classes=num_classes,
        to_pixels=to_pixels,
    )


def shares(weights: Sequence[float], total: int) -> np.ndarray:
    """`[K]` integers that sum to `total`, each nearest to its share (largest remainders)."""
    exact = np.asarray(weights, np.float64) * total
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts
