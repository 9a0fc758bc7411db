"""One report for every generator of small integer images: against the held-out half, beside baselines and a floor.

No single number here is proof: a memoriser has a low Frechet distance, and a noisy sampler can have a good `c2st`. Read
the Frechet distances, `c2st`, `closer` and `accuracy` together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from diffjax import registry
from diffjax.metrics.baselines import BASELINES
from diffjax.metrics.c2st import c2st
from diffjax.metrics.classifier import accuracy, class_tv, inception_score
from diffjax.metrics.frechet import frechet_distance
from diffjax.metrics.mmd import mmd2
from diffjax.metrics.neighbours import closer_to_train, density_coverage, precision_recall

Features = Callable[[np.ndarray], np.ndarray]


class Protocol(NamedTuple):
    """What samples are compared with, and through which eyes.

    Attributes:
      train: `uint8 [N, H, W, C]`, integers `0 .. high`, what the generator was trained on.
      train_labels: `[N]` integers.
      heldout: `uint8 [M, H, W, C]`, what it never saw.
      heldout_labels: `[M]` integers.
      high: the largest pixel.
      features: name -> function `(uint8 [n, H, W, C]) -> [n, D]`; each gives a Frechet distance, the first also the
        precision, recall, density and coverage.
      judge: `(uint8 [n, H, W, C]) -> [n, K]` class probabilities, or None for data without classes.
    """

    train: np.ndarray
    train_labels: np.ndarray
    heldout: np.ndarray
    heldout_labels: np.ndarray
    high: int
    features: Mapping[str, Features]
    judge: Callable[[np.ndarray], np.ndarray] | None = None


def report(samples, labels, protocol: Protocol) -> dict[str, float]:
    """The quality of `samples`, each value a Python float.

    `fd_<features>` and `fd_pixels` (Frechet distances, pixels in [0, 1]), `mmd2` and `c2st` on pixels, `closer` (share
    nearer to the training half), `precision`, `recall`, `density`, `coverage` on the first features; with a judge
    `inception_score`, `class_tv` (its classes against the held-out labels) and, with labels, `accuracy` on them.

    Args:
      samples: `[n, H, W, C]` integers `0 .. high`; `Dataset.to_pixels` clips and rounds. Take `n = len(heldout)`: the
        Frechet distances and `c2st` depend on it.
      labels: `[n]` requested classes, or None for an unconditional generator.
      protocol: what to compare with.

    Raises:
      ValueError: for samples that are not integers in range or not of the data's shape, or labels of another length.
    """
    from threadpoolctl import threadpool_limits

    samples = _samples(samples, protocol)
    # On a busy machine BLAS threads wait for each other, and matrices of a thousand rows take ten times as long.
    with threadpool_limits(1):
        return _distances(samples, protocol) | _judged(samples, labels, protocol)


def _distances(samples: np.ndarray, protocol: Protocol) -> dict[str, float]:
    pixels, train, heldout = (_unit(x, protocol.high) for x in (samples, protocol.train, protocol.heldout))
    out = {}
    seen = {name: (fn(samples), fn(protocol.heldout)) for name, fn in protocol.features.items()}
    for name, (a, b) in seen.items():
        out[f"fd_{name}"] = frechet_distance(a, b)
    out["fd_pixels"] = frechet_distance(pixels, heldout)
    out["mmd2"] = mmd2(pixels, heldout)
    out["c2st"] = c2st(pixels, heldout)
    out["closer"] = closer_to_train(pixels, train, heldout)
    first = next(iter(seen.values()), (pixels, heldout))
    out["precision"], out["recall"] = precision_recall(*first)
    out["density"], out["coverage"] = density_coverage(*first)
    return out


def _judged(samples: np.ndarray, labels, protocol: Protocol) -> dict[str, float]:
    if protocol.judge is None:
        return {}
    probabilities = protocol.judge(samples)
    out = {
        "inception_score": inception_score(probabilities),
        "class_tv": class_tv(probabilities, protocol.heldout_labels),
    }
    if labels is not None:
        out["accuracy"] = accuracy(probabilities, labels)
    return out


def baseline_rows(protocol: Protocol, names: Iterable[str] | None = None, seed: int = 0) -> dict[str, dict[str, float]]:
    """`name -> report` of the floor (the real training half itself) and of the generators of `BASELINES`.

    Each baseline is fitted to the training half, asked for the classes of the held-out half, clipped and rounded.

    Args:
      protocol: what to fit to and compare with.
      names: which baselines, in this order; None for all.
      seed: of the fits and draws.

    Raises:
      ValueError: for an unknown name.
    """
    names = list(BASELINES if names is None else names)
    generators = [registry.lookup(name, BASELINES, "baseline") for name in names]
    rows = {"floor": report(protocol.train, protocol.train_labels, protocol)}
    train = _unit(protocol.train, protocol.high)
    for name, generate in zip(names, generators, strict=True):
        rng = np.random.default_rng((seed, *name.encode()))
        drawn = generate(train, protocol.train_labels, protocol.heldout_labels, rng)
        samples = np.clip(np.rint(drawn * protocol.high), 0, protocol.high).astype(np.uint8)
        labels = protocol.heldout_labels if name == "class_gaussian" else None
        rows[name] = report(samples.reshape(-1, *protocol.train.shape[1:]), labels, protocol)
    return rows


@lru_cache
def digits_protocol(split_seed: int = 0) -> Protocol:
    """The digits, split as in `diffjax.data.digits`, with the extractors and the judge of `metrics.judge`."""
    from diffjax.data import digits
    from diffjax.metrics.judge import digits_features, digits_judge

    data = digits(split_seed)
    halves = []
    for source in (data.train, data.heldout):
        halves += [data.to_pixels(source.images), source.labels]
    features = {name: digits_features(name) for name in ("relu", "tanh")}
    return Protocol(*halves, high=16, features=features, judge=digits_judge())


def digits_report(samples, labels=None, split_seed: int = 0) -> dict[str, float]:
    """`report` of `samples [n, 8, 8, 1]` (integers 0 .. 16; take `n = 898`) against that split's held-out digits."""
    return report(samples, labels, digits_protocol(split_seed))


def digits_baselines(split_seed: int = 0, names: Iterable[str] | None = None, seed: int = 0) -> dict[str, dict]:
    """`baseline_rows` on the digits."""
    return baseline_rows(digits_protocol(split_seed), names, seed)


def _unit(pixels: np.ndarray, high: int) -> np.ndarray:
    """`[n, D] float64` in [0, 1]."""
    return pixels.reshape(len(pixels), -1) / high


def _samples(samples, protocol: Protocol) -> np.ndarray:
    samples = np.asarray(samples)
    shape = protocol.heldout.shape[1:]
    if samples.ndim != 1 + len(shape) or samples.shape[1:] != shape or len(samples) < 6:
        raise ValueError(f"samples of shape {samples.shape}; expected [n, {', '.join(map(str, shape))}] with n >= 6")
    if not np.issubdtype(samples.dtype, np.integer):
        raise ValueError(f"samples of dtype {samples.dtype}; expected integers 0 .. {protocol.high}: use to_pixels")
    if samples.min() < 0 or samples.max() > protocol.high:
        raise ValueError(f"samples from {samples.min()} to {samples.max()}; expected integers 0 .. {protocol.high}")
    return samples
