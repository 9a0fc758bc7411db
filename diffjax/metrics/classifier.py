"""Metrics of a classifier's opinion: Inception score, accuracy, class histogram."""

from __future__ import annotations

import numpy as np


def inception_score(probabilities) -> float:
    """`exp(E KL(p(y | x) || p(y)))`, from 1 (every image alike) to the number of classes.

    Over all samples at once, not in ten splits. Source: Salimans et al. 2016, arXiv:1606.03498, section 4.

    Args:
      probabilities: `[N, K]`, the classifier's `p(y | x)`; rows sum to 1.

    Raises:
      ValueError: if it is not a matrix of probabilities.
    """
    p = _probabilities(probabilities)
    log = lambda q: np.log(np.where(q > 0, q, 1))  # 0 log 0 = 0
    return float(np.exp((p * (log(p) - log(p.mean(0)))).sum(1).mean()))


def accuracy(probabilities, labels) -> float:
    """Share of the samples whose most probable class is the one in `labels [N]`.

    Raises:
      ValueError: if `probabilities [N, K]` is not a matrix of probabilities or `labels` is not `[N]` integers.
    """
    p = _probabilities(probabilities)
    return float((p.argmax(1) == _labels(labels, len(p), p.shape[1])).mean())


def class_tv(probabilities, labels) -> float:
    """Total variation, in [0, 1], between the histogram of the most probable classes and that of real `labels [M]`.

    Raises:
      ValueError: if `probabilities [N, K]` is not a matrix of probabilities or `labels` are not integers below `K`.
    """
    p = _probabilities(probabilities)
    labels = _labels(labels, np.size(labels), p.shape[1])
    share = lambda classes: np.bincount(classes, minlength=p.shape[1]) / len(classes)
    return float(0.5 * np.abs(share(p.argmax(1)) - share(labels)).sum())


def _probabilities(p) -> np.ndarray:
    p = np.asarray(p, np.float64)
    # float32 softmax over a thousand classes sums to 1 within 1e-4.
    if p.ndim != 2 or 0 in p.shape or not (p >= 0).all() or not np.allclose(p.sum(1), 1, atol=1e-3):
        raise ValueError(f"probabilities of shape {p.shape}; expected [N, K], not negative, rows that sum to 1")
    return p


def _labels(labels, n: int, classes: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (n,) or n == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels of shape {labels.shape} and dtype {labels.dtype}; expected [{n}] integers")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}; expected 0 .. {classes - 1}")
    return labels
