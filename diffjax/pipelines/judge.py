"""The judge of an evaluation: what a data set's samples are compared with, its floor and its baselines."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from diffjax import metrics, registry
from diffjax.data import Unreadable, UnreadableError
from diffjax.pipelines.generate import largest_pixel, pixels_of

# Features of an image without extractor, and images of a half that are used, at most: both keep an evaluation short.
FEATURES, IMAGES = 256, 2000
# Images that an evaluation leaves out because they cannot be read, at most.
MAX_BAD = 16
CHUNK = 1000
BASELINES = ("memoriser", "gmm100_full", "class_gaussian", "gmm10_full", "gaussian")
# A hundred full covariances need several images each, and beyond this many pixels minutes instead of half a second.
MANY_IMAGES, MANY_PIXELS = 500, 64

log = logging.getLogger("diffjax")


class Judge(NamedTuple):
    """How samples of one data set are judged.

    Attributes:
      protocol: `diffjax.metrics.Protocol` of what is compared: the images, or small versions of them.
      train: `[N, H, W, C] uint8` at full size, for pictures.
      heldout: `[M, H, W, C] uint8` at full size.
      headline: the metric that sweeps draw.
      heading: its name for a person.
      floor: `(mean, std)` of the headline between two random halves of the real images, the halves floor.
      notes: what a reader of the numbers must know.
    """

    protocol: metrics.Protocol
    train: np.ndarray
    heldout: np.ndarray
    headline: str
    heading: str
    floor: tuple[float, float]
    notes: tuple[str, ...] = ()


def judge_of(run) -> Judge:
    """The judge of a run's data: classifier features for the digits, pixels for everything else."""
    name, args, kwargs = registry.parse(run.config.data)
    if name == "digits":
        protocol = metrics.digits_protocol(*args, **kwargs)
        return Judge(protocol, protocol.train, protocol.heldout, "fd_relu", "FD-relu", halves(protocol))
    (train, train_labels), (heldout, heldout_labels) = (
        integers(run.dataset, half, IMAGES) for half in (run.dataset.train, run.dataset.heldout)
    )
    small = [pooled(images) for images in (train, heldout)]
    protocol = metrics.Protocol(small[0], train_labels, small[1], heldout_labels, largest_pixel(run.dataset), {})
    note = (
        f"no feature extractor is known for {run.config.data}: all distances are between pixels, averaged down to "
        f"{small[0][0].size} values, and see layout and brightness rather than content; there is no accuracy"
    )
    return Judge(protocol, train, heldout, "fd_pixels", "FD-pixels", halves(protocol), (note,))


def score(judge: Judge, images: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """Every metric of `images [n, H, W, C] uint8` that were asked to be of the classes `labels [n]`."""
    return metrics.report(pooled(images), labels, judge.protocol)


def brief(judge: Judge, images: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """The Frechet distances and the accuracy alone: what a sweep needs, in a tenth of the time."""
    small, protocol = pooled(images), judge.protocol
    out = {
        f"fd_{name}": metrics.frechet_distance(features(small), features(protocol.heldout))
        for name, features in protocol.features.items()
    }
    out["fd_pixels"] = metrics.frechet_distance(small / protocol.high, protocol.heldout / protocol.high)
    if protocol.judge is not None and labels is not None:
        out["accuracy"] = metrics.accuracy(protocol.judge(small), labels)
    return out


def rows(judge: Judge) -> dict[str, Mapping[str, float]]:
    """`{name: metrics}` of the real training half and of the baselines that suit the data, fitted to that half."""
    train = judge.protocol.train
    suits = {
        "class_gaussian": len(np.unique(judge.protocol.heldout_labels)) > 1,
        "gmm100_full": len(train) >= MANY_IMAGES and train[0].size <= MANY_PIXELS,
    }
    return metrics.baseline_rows(judge.protocol, [name for name in BASELINES if suits.get(name, True)])


def halves(protocol: metrics.Protocol, repeats: int = 10) -> tuple[float, float]:
    """`(mean, std)` of the first Frechet distance between two random parts of all real images: the halves floor.

    The parts have the size of the held-out half and the same share of each class. A perfect sampler draws from the
    distribution of the data, as one part does, and cannot be expected below it.
    """
    features = next(iter(protocol.features.values()), lambda x: x / protocol.high)
    every = features(np.concatenate([protocol.train, protocol.heldout]))
    labels = np.concatenate([protocol.train_labels, protocol.heldout_labels])
    size = min(len(protocol.heldout), len(every) // 2)
    rng, values = np.random.default_rng(0), []
    for _ in range(repeats):
        place = np.empty(len(every))
        for members in (np.flatnonzero(labels == label) for label in np.unique(labels)):
            # Every class evenly over [0, 1), so that each stretch of the order holds its share of it.
            place[members] = (rng.permutation(len(members)) + rng.random(len(members))) / len(members)
        order = np.argsort(place)
        values.append(metrics.frechet_distance(every[order[:size]], every[order[size : 2 * size]]))
    return float(np.mean(values)), float(np.std(values, ddof=1))


def integers(dataset, source, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """`(images [N, H, W, C] uint8, labels [N] int32)` of up to `limit` items, evenly chosen over the source."""
    items = read_items(source, limit)
    images = pixels_of(dataset, np.stack([item["image"] for item in items]))
    return images, np.array([int(item["label"]) for item in items], np.int32)


def read_items(source, limit: int = IMAGES, *, max_bad: int = MAX_BAD) -> list[dict]:
    """Up to `limit` items, evenly chosen over the source; what cannot be read is left out, with a logged warning.

    Raises:
      UnreadableError: if that were more than `max_bad` of them, or all.
    """
    items, bad = [], []
    for i in np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).round().astype(int)):
        try:
            items.append(source[int(i)])
        except Unreadable as error:
            bad.append(str(error))
            log.warning("%s; it is left out of the evaluation", error)
    if len(bad) > max_bad or not items:
        shown = "; ".join(bad[:8])
        raise UnreadableError(f"{len(bad)} images cannot be read, and the limit of an evaluation is {max_bad}: {shown}")
    return items


def pooled(images: np.ndarray) -> np.ndarray:
    """`[N, h, w, C] uint8`: images averaged over 2 x 2 pixels until one has at most `FEATURES` values."""
    images = np.asarray(images)
    # Averages are in float64, in which fifty thousand photographs at once would take 80 GB.
    return np.concatenate([_halved(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)])


def _halved(images: np.ndarray) -> np.ndarray:
    while images[0].size > FEATURES and min(images.shape[1:3]) > 1:
        height, width = (side // 2 * 2 for side in images.shape[1:3])
        cut = images[:, :height, :width].astype(np.float64)
        mean = (cut[:, ::2, ::2] + cut[:, 1::2, ::2] + cut[:, ::2, 1::2] + cut[:, 1::2, 1::2]) / 4
        images = np.rint(mean).astype(np.uint8)
    return images
