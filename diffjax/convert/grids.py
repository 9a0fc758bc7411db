"""diffusers' grids: tables of betas, spacings of time steps and of sigmas, in the precision that it computes them in.

A table of `alphas_cumprod` is float32 there, and `1 - alphas_cumprod` near t = 0 has four digits left, so the rounding
of every operation up to it is part of the format.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from diffjax.core.types import Array, Level

F = np.float32


def linspace32(start: float, end: float, n: int) -> np.ndarray:
    """`torch.linspace` [n] float32: from both ends to the middle, one rounding for each entry (fused multiply-add)."""
    start, end = F(start), F(end)
    if n == 1:
        return np.array([start], F)
    step, i = np.float64(F((end - start) / F(n - 1))), np.arange(n)
    return np.where(i < n // 2, start + step * i, end - step * (n - 1 - i)).astype(F)


def _bar_betas(n: int, bar) -> np.ndarray:
    """Betas [n] of a function `bar(t)`, capped at 0.999 (`betas_for_alpha_bar`)."""
    return np.array([min(1 - bar((i + 1) / n) / bar(i / n), 0.999) for i in range(n)], F)


def _cosine_bar(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_bar(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-06))
    return math.sqrt(snr / (1 + snr))


def betas(c: SimpleNamespace) -> np.ndarray:
    """The betas [T] float32 that options ask for."""
    start, end, n = getattr(c, "beta_start", None), getattr(c, "beta_end", None), c.num_train_timesteps
    if getattr(c, "trained_betas", None) is not None:
        return np.asarray(c.trained_betas, F)
    if c.beta_schedule == "linear":
        return linspace32(start, end, n)
    if c.beta_schedule == "scaled_linear":
        return linspace32(start**0.5, end**0.5, n) ** 2
    if c.beta_schedule == "sigmoid":
        ramp = linspace32(-6, 6, n).astype(np.float64)
        return (1 / (1 + np.exp(-ramp))).astype(F) * F(end - start) + F(start)
    return _bar_betas(n, _laplace_bar if c.beta_schedule == "laplace" else _cosine_bar)


def cumulative(factors: np.ndarray) -> np.ndarray:
    """`torch.cumprod` of float32 [T] on a CPU: accumulated in float64, each entry rounded."""
    return np.cumprod(factors.astype(np.float64)).astype(F)


def _zero_terminal(b: np.ndarray) -> np.ndarray:
    """Betas rescaled to a terminal SNR of zero (Lin et al. 2023, arXiv:2305.08891, Algorithm 1), in float32."""
    root = np.sqrt(cumulative(1 - b))
    first, last = root[0], root[-1]
    bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - np.concatenate([bar[:1], bar[1:] / bar[:-1]])


def alphas_cumprod(c: SimpleNamespace, *, floor: bool = False) -> np.ndarray:
    """The table [T] float32; with `floor`, a terminal SNR of zero is raised to 2^-24 as the sigma schedulers do."""
    b = betas(c)
    rescale = getattr(c, "rescale_betas_zero_snr", False)
    bar = cumulative(1 - (_zero_terminal(b) if rescale else b))
    if rescale and floor:
        bar[-1] = 2**-24
    return bar


def train_sigmas(bar: np.ndarray) -> np.ndarray:
    """`sqrt((1 - bar) / bar)` [T] float32.

    At 2^-24, where a terminal SNR of zero is put, it lies within 1e-11 of the middle between two floats, and PyTorch on
    x86 rounds it up to 4096. From there one unit in the last place is 1e-4 of the next state.
    """
    return np.where(bar == F(2**-24), F(4096), np.sqrt((1 - bar) / bar))


def spaced(c: SimpleNamespace, n: int, *, whole: bool) -> np.ndarray:
    """The n time steps of `timestep_spacing`, noise first; `whole` rounds those of linspace."""
    total = c.num_train_timesteps
    if n > total:
        raise ValueError(f"n={n} is more than num_train_timesteps={total}")
    if c.timestep_spacing == "linspace":
        steps = np.linspace(0, total - 1, n)
        steps = (steps.round() if whole else steps.astype(F))[::-1]
    elif c.timestep_spacing == "leading":
        steps = (np.arange(n) * (total // n))[::-1] + c.steps_offset
    else:
        steps = np.arange(total, 0, -total / n).round() - 1
    return steps.astype(np.int64 if whole else F)


def spaced_between(c: SimpleNamespace, n: int, last: int) -> np.ndarray:
    """The n time steps of the multistep schedulers, which leave out the end: n + 1 points below `last`, all but one."""
    if n >= last:
        raise ValueError(f"n={n} is more than the {last - 1} time steps that the table offers")
    if c.timestep_spacing == "linspace":
        steps = np.linspace(0, last - 1, n + 1).round()[::-1][:-1]
    elif c.timestep_spacing == "leading":
        steps = (np.arange(n + 1) * (last // (n + 1)))[::-1][:-1] + c.steps_offset
    else:
        steps = np.arange(last, 0, -c.num_train_timesteps / n).round() - 1
    return steps.astype(np.int64)


def given_steps(c: SimpleNamespace, steps, n: int, dtype) -> np.ndarray:
    """A caller's own time steps, checked.

    Raises:
      ValueError: unless they are n decreasing numbers within the table.
    """
    out = np.asarray(steps, np.float64)
    if out.shape != (n,) or np.any(np.diff(out) >= 0) or out[0] >= c.num_train_timesteps or out[-1] < 0:
        raise ValueError(
            f"timesteps: expected n = {n} decreasing numbers from {c.num_train_timesteps - 1} down to 0, got {steps!r}"
        )
    return out.astype(dtype)


def check_steps(steps: np.ndarray, n: int, total: int) -> None:
    """Raises ValueError unless there are n time steps, all within the table, as diffusers would index them."""
    if len(steps) != n or np.min(steps) < 0 or np.max(steps) > total - 1:
        raise ValueError(
            f"n={n}: this spacing gives {len(steps)} time steps from {np.max(steps)} to {np.min(steps)}, outside of "
            f"the table of {total}; use another n, steps_offset or timestep_spacing"
        )


def sigma_to_t(sigmas: Array, log_sigmas: np.ndarray) -> np.ndarray:
    """Fractional index of each sigma in the table, linear in the log, within its ends."""
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    below = (log_sigma[None] - log_sigmas[:, None]) >= 0
    low = np.clip(np.cumsum(below, axis=0).argmax(axis=0), None, len(log_sigmas) - 2)
    lo, hi = log_sigmas[low], log_sigmas[low + 1]
    w = np.clip((lo - log_sigma) / (lo - hi), 0, 1)
    return (1 - w) * low + w * (low + 1)


def respacing(c: SimpleNamespace) -> str | None:
    """Which of karras, exponential, beta and lu replaces the sigmas of the time steps, or None."""
    for name, option in (
        ("karras", "use_karras_sigmas"),
        ("lu", "use_lu_lambdas"),
        ("exponential", "use_exponential_sigmas"),
        ("beta", "use_beta_sigmas"),
    ):
        if getattr(c, option, False):
            return name
    return None


def respace(how: str, first: float, last: float, n: int, rho: float = 7.0) -> np.ndarray:
    """n sigmas float64 from `first` to `last`.

    karras: equal steps in `sigma^(1 / rho)` (Karras et al. 2022, arXiv:2206.00364, Eq. 5); exponential and lu: in the
    log (Lu et al. 2022, arXiv:2206.00927, section 3.3); beta: quantiles of Beta(0.6, 0.6) (Lee et al. 2024,
    arXiv:2407.12173).
    """
    first, last = float(first), float(last)
    if how == "karras":
        lo, hi = last ** (1 / rho), first ** (1 / rho)
        return (hi + np.linspace(0, 1, n) * (lo - hi)) ** rho
    if how == "exponential":
        return np.exp(np.linspace(math.log(first), math.log(last), n))
    if how == "lu":
        return np.exp(first + np.linspace(0, 1, n) * (last - first))
    from scipy.special import betaincinv  # jax has no quantiles of the beta distribution

    return last + betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, n)) * (first - last)


def grid(t: Array, alpha: Array, sigma: Array) -> Level:
    """The `Level` [n + 1] of n time steps `t` and n + 1 `alpha` and `sigma`, float64; the last level's t is 0.

    The sampling loop skips steps between equal levels, but clipping moves even those, so such a step's end is lowered
    by a part in 10^6; no network is called there.
    """
    alpha, sigma = (np.array(a, np.float64) for a in (alpha, sigma))
    for i in np.flatnonzero((np.diff(alpha) == 0) & (np.diff(sigma) == 0)):
        sigma[i + 1] = sigma[i] * (1 - 1e-6)
    return Level(np.append(np.asarray(t, np.float64), 0.0), alpha, sigma)


def vp_level(t: Array, bar: np.ndarray, last: float) -> Level:
    """The variance-preserving grid of `alphas_cumprod` [n] at time steps [n], ending at `last`."""
    bar = np.append(bar, F(last))
    return grid(t, np.sqrt(bar), np.sqrt(1 - bar))
