"""Generators of known quality that need no network: what a diffusion model must beat, and what it must not resemble.

Each is `(train [N, D] float in [0, 1], labels [N], classes [n], rng) -> samples [n, D]`; `classes` are the requested
classes, which only a class-conditional generator heeds.
"""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np


def memoriser(train, labels, classes, rng) -> np.ndarray:
    """Draws from the training set with replacement: perfect images, nothing learnt."""
    return train[rng.integers(0, len(train), len(classes))]


def gaussian(train, labels, classes, rng) -> np.ndarray:
    """One Gaussian with the mean and full covariance of the training set."""
    return _normal(train, len(classes), rng)


def class_gaussian(train, labels, classes, rng) -> np.ndarray:
    """One full Gaussian per class."""
    out = np.empty((len(classes), train.shape[1]))
    for c in np.unique(classes):
        members = train[labels == c]
        if len(members) < 2:
            raise ValueError(f"class {c} has {len(members)} training images; class_gaussian needs at least 2 of each")
        out[classes == c] = _normal(members, int((classes == c).sum()), rng)
    return out


def mixture(train, labels, classes, rng, *, components: int, covariance: str) -> np.ndarray:
    """A Gaussian mixture by expectation maximisation, unconditional; `covariance` is `"full"` or `"diag"`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    seed = int(rng.integers(2**31))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = GaussianMixture(components, covariance_type=covariance, random_state=seed).fit(train)
        return model.sample(len(classes))[0]


def pixel_histogram(train, labels, classes, rng) -> np.ndarray:
    """Each pixel from its own histogram, independent of all others."""
    picks = rng.integers(0, len(train), (len(classes), train.shape[1]))
    return np.take_along_axis(train, picks, axis=0)


def pixel_gaussian(train, labels, classes, rng) -> np.ndarray:
    """Each pixel from a Gaussian of its own mean and variance, independent of all others."""
    return train.mean(0) + train.std(0, ddof=1) * rng.standard_normal((len(classes), train.shape[1]))


def noise(train, labels, classes, rng) -> np.ndarray:
    """Independent uniform pixels."""
    return rng.random((len(classes), train.shape[1]))


def _normal(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    # `z / sqrt(N - 1)` times the centred data has the data's covariance, of whatever rank, without factoring it.
    return x.mean(0) + rng.standard_normal((n, len(x))) @ (x - x.mean(0)) / np.sqrt(len(x) - 1)


BASELINES = {
    "memoriser": memoriser,
    "gmm100_full": partial(mixture, components=100, covariance="full"),
    "gmm100_diag": partial(mixture, components=100, covariance="diag"),
    "class_gaussian": class_gaussian,
    "gmm10_full": partial(mixture, components=10, covariance="full"),
    "gaussian": gaussian,
    "pixel_histogram": pixel_histogram,
    "pixel_gaussian": pixel_gaussian,
    "noise": noise,
}
