"""Power-function averages of any length from snapshots of a few: least squares between the averaging profiles.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696, section 3.2
and appendix C. The average with exponent gamma at time T weighs the parameters at time tau by the profile
`(gamma + 1) tau ** gamma / T ** (gamma + 1)` on `[0, T]`. Averages are linear in their profiles, so the combination of
snapshots whose profile is nearest to a wanted one, in the mean square over time, gives the wanted average nearly.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffjax.train.checkpoint import CheckpointError
from diffjax.train.optim.ema import gamma_of

log = logging.getLogger(__name__)

LARGEST_ERROR = 0.2


def inner_products(times_a, gammas_a, times_b, gammas_b) -> np.ndarray:
    """`<p_a, p_b>`, the integral over time of the product of every pair of profiles (arXiv:2312.02696, appendix C).

    Args:
      times_a, gammas_a: `[m]` ends T and exponents of the first profiles.
      times_b, gammas_b: `[n]` of the second.

    Returns:
      `[m, n] float64`, in one over the unit of time.
    """
    ta, ga = (np.asarray(v, np.float64)[:, None] for v in (times_a, gammas_a))
    tb, gb = (np.asarray(v, np.float64)[None, :] for v in (times_b, gammas_b))
    shared = np.minimum(ta, tb)
    # The integral of tau ** (ga + gb) to the shared end, in ratios: the powers alone overflow.
    return (ga + 1) * (gb + 1) / (ga + gb + 1) * (shared / ta) ** (ga + 1) * (shared / tb) ** (gb + 1) / shared


def coefficients(times, gammas, time: float, gamma: float) -> tuple[np.ndarray, float]:
    """The weights of snapshots that give the profile `(time, gamma)` best, and how far off it is.

    Solves the normal equations of the least squares and scales the weights to the sum 1 (arXiv:2312.02696,
    Algorithm 3), so that constant parameters are met exactly.

    Args:
      times, gammas: `[n]` of the snapshots.
      time, gamma: of the wanted average.

    Returns:
      `(weights [n] float64, error)`: the error is the norm over time of the difference between the two profiles,
      relative to that of the wanted one.
    """
    gram = inner_products(times, gammas, times, gammas)
    against = inner_products(times, gammas, [time], [gamma])[:, 0]
    own = inner_products([time], [gamma], [time], [gamma])[0, 0]
    # Unit profiles: their norms fall with time, which alone would make the equations ill-conditioned.
    norm = np.sqrt(np.diag(gram))
    weights = np.linalg.lstsq(gram / np.outer(norm, norm), against / norm, rcond=1e-13)[0] / norm
    weights = weights / weights.sum()
    off = weights @ gram @ weights - 2 * weights @ against + own
    return weights, float(np.sqrt(max(off, 0.0) / own))


def reconstruct(snapshots: Any, stds: dict[str, float], std: float, step: int | None = None) -> tuple[int, dict]:
    """`(step, params)`: the power-function average of relative width `std` after `step` steps, float32 on the host.

    A damaged snapshot is reported by a logged warning and left out.

    Args:
      snapshots: the checkpoints of `snapshots.open_snapshots`.
      stds: `{spec: std}` of the averages in each snapshot that may be used; the leaves of one are under `ema/spec`.
      std: wanted width, relative to `step`.
      step: of a snapshot, as the profile ends there at its highest; None for the last.

    Raises:
      ValueError: if there is no snapshot of `step`, `std` is out of range, or the nearest combination is further
        off than `LARGEST_ERROR` of the profile, as happens for averages much shorter than those stored.
    """
    saved = snapshots.steps()
    at = saved[-1] if saved and step is None else step
    if at not in saved:
        near = f"; the nearest is {min(saved, key=lambda s: abs(s - at))}" if saved else ""
        raise ValueError(
            f"posthoc step {at}: {snapshots.directory} has snapshots of {_range(saved)}{near}; config.ema_snapshots=N "
            "takes one every N steps of the training"
        )
    pairs = [(s, spec) for s in saved if s <= at for spec in stds]
    weights, error = coefficients([s for s, _ in pairs], [gamma_of(stds[p]) for _, p in pairs], at, gamma_of(std))
    if error > LARGEST_ERROR:
        kept = ", ".join(f"{value:g}" for value in stds.values())
        raise ValueError(
            f"posthoc std {std:g} at step {at}: the profile nearest to it that the {len(pairs)} stored averages give "
            f"(std {kept}; {_range(saved)}) is {100 * error:.0f} % off; ask for a width between the stored ones, or "
            "store more snapshots"
        )
    log.info("posthoc std %g at step %d: profile error %.2g from %d averages", std, at, error, len(pairs))
    total = None
    for (when, spec), weight in zip(pairs, weights, strict=True):
        try:
            _, part = snapshots.restore_part(f"ema/{spec}", when)
        except CheckpointError as damaged:
            log.warning("%s; going on without that snapshot", damaged)
            left = _Without(snapshots, when)
            return reconstruct(left, stds, std, at if when != at or step is not None else None)
        wide = jax.tree.map(lambda leaf, w=weight: w * np.asarray(leaf, np.float64), part)
        total = wide if total is None else jax.tree.map(np.add, total, wide)
    return at, jax.tree.map(lambda leaf: leaf.astype(np.float32), total)


class _Without:
    """Snapshots without one of them."""

    def __init__(self, snapshots, step: int):
        self.directory, self.restore_part = snapshots.directory, snapshots.restore_part
        self.steps = lambda: [s for s in snapshots.steps() if s != step]


def _range(saved: Sequence[int]) -> str:
    return f"{len(saved)} steps from {saved[0]} to {saved[-1]}" if saved else "no step"
