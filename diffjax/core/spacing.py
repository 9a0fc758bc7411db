"""Sampling grids: `(schedule, n) -> Level[n + 1]`, noise first, numpy float64.

A grid is data. Solvers never see a schedule, and grids of one length share a compiled sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from diffjax.core.schedules import Schedule, Table
from diffjax.core.types import Level

# Where a schedule itself has no finite end: EDM's choices (Karras et al. 2022, arXiv:2206.00364, Table 1).
DEFAULT_S_MIN, DEFAULT_S_MAX = 0.002, 80.0


def _steps(n: int) -> int:
    if not isinstance(n, (int, np.integer)) or n < 1:
        raise ValueError(f"a grid needs a whole number of steps >= 1, got {n!r}")
    return int(n)


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, (int, float, np.number)) and 0 < value < np.inf):
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return float(value)


def s_range(schedule: Schedule, s_min: float | None = None, s_max: float | None = None) -> tuple[float, float]:
    """The ends `(s_min, s_max)` of `s = sigma / alpha` for spacings that need finite ones.

    A given end is taken as it is. Else a schedule's own `sigma_min` and `sigma_max`, else its values at `t_min` and
    `t_max` where these are finite and not zero, else 0.002 and 80.

    Raises:
      ValueError: unless `0 < s_min < s_max`.
    """
    if s_min is None:
        own = getattr(schedule, "sigma_min", None) or float(schedule(schedule.t_min).s)
        s_min = own if own > 0 else DEFAULT_S_MIN
    if s_max is None:
        own = getattr(schedule, "sigma_max", None) or float(schedule(schedule.t_max).s)
        s_max = own if np.isfinite(own) else DEFAULT_S_MAX
    s_min, s_max = _positive("s_min", s_min), _positive("s_max", s_max)
    if not s_min < s_max:
        raise ValueError(f"expected 0 < s_min < s_max < inf, got s_min={s_min}, s_max={s_max}")
    return float(s_min), float(s_max)


def _at_s(schedule: Schedule, s: np.ndarray) -> Level:
    with np.errstate(divide="ignore"):
        level = schedule.at_logsnr(-2 * np.log(s))
    return Level(*(np.asarray(field, np.float64) for field in level))


def custom(schedule: Schedule, t: Sequence[float]) -> Level:
    """The grid at the given times [n + 1], noise first.

    Raises:
      ValueError: if there are fewer than two times or the noise does not decrease along them.
    """
    t = np.asarray(t, np.float64)
    if t.ndim != 1 or len(t) < 2:
        raise ValueError(f"a grid needs at least two times in one dimension, got shape {t.shape}")
    level = Level(*(np.asarray(field, np.float64) for field in schedule(t)))
    noise = np.arctan2(level.sigma, level.alpha)
    if np.any(np.diff(noise) > 0):
        i = int(np.argmax(np.diff(noise) > 0))
        raise ValueError(f"noise grows from t[{i}] = {t[i]} to t[{i + 1}] = {t[i + 1]}; give times from noise to data")
    return level


def uniform(schedule: Schedule, n: int) -> Level:
    """Equal steps in the schedule's own time, from `t_max` to `t_min`."""
    return custom(schedule, np.linspace(schedule.t_max, schedule.t_min, _steps(n) + 1))


def karras(
    schedule: Schedule,
    n: int,
    rho: float = 7.0,
    s_min: float | None = None,
    s_max: float | None = None,
    *,
    zero: bool = True,
) -> Level:
    """Equal steps in `s ** (1 / rho)` (Karras et al. 2022, arXiv:2206.00364, Eq. 5).

    With `zero` the first n levels span `[s_max, s_min]` and the last is sigma = 0; without it all n + 1 span the range.
    Ends not given are those of `s_range`.
    """
    _positive("rho", rho)

    def ramp(u, lo, hi):
        return (hi ** (1 / rho) + u * (lo ** (1 / rho) - hi ** (1 / rho))) ** rho

    return _span(schedule, n, ramp, s_min, s_max, zero)


def exponential(
    schedule: Schedule, n: int, s_min: float | None = None, s_max: float | None = None, *, zero: bool = True
) -> Level:
    """Equal steps in `log s`; ends and `zero` as in `karras` (`exponential` in k-diffusion and diffusers)."""
    return _span(schedule, n, lambda u, lo, hi: hi * (lo / hi) ** u, s_min, s_max, zero)


def logsnr(schedule: Schedule, n: int, s_min: float | None = None, s_max: float | None = None) -> Level:
    """Equal steps in log-SNR from `s_max` to the finite end `s_min` (Lu et al. 2022, arXiv:2206.00927, section 3.3)."""
    return exponential(schedule, n, s_min, s_max, zero=False)


def asinh(
    schedule: Schedule, n: int, scale: float = 0.1, s_max: float | None = None, s_min: float | None = None
) -> Level:
    """Equal steps in `asinh(s / scale)`: logarithmic above `scale`, linear below it, down to `s_min` (default 0)."""
    _steps(n)
    _positive("scale", scale)
    hi = s_range(schedule, s_min or None, s_max)[1]
    s = scale * np.sinh(np.linspace(np.arcsinh(hi / scale), np.arcsinh((s_min or 0.0) / scale), n + 1))
    s[0] = hi
    return _at_s(schedule, s)


def _span(schedule: Schedule, n: int, ramp: Callable, s_min, s_max, zero: bool) -> Level:
    """The grid on `ramp(u, s_min, s_max)` for u from 0 to 1, with sigma = 0 appended if `zero`."""
    n = _steps(n) if not zero else _steps(n) - 1
    lo, hi = s_range(schedule, s_min, s_max)
    s = ramp(np.linspace(0, 1, n + 1) if n else np.zeros(1), lo, hi)
    s[0] = hi
    return _at_s(schedule, np.append(s, 0.0) if zero else s)


def _length(table: Table, n: int) -> int:
    if not isinstance(table, Table):
        raise ValueError(f"this spacing picks steps of a Table, got {type(table).__name__}; use uniform or karras")
    if _steps(n) > len(table.alphas_cumprod):
        raise ValueError(f"{n} steps asked of a table of {len(table.alphas_cumprod)}")
    return len(table.alphas_cumprod)


def _timesteps(table: Table, steps: np.ndarray, final: str) -> Level:
    if final not in ("clean", "first"):
        raise ValueError(f"final: expected 'clean' or 'first', got {final!r}")
    grid = table(np.clip(steps, 0, len(table.alphas_cumprod) - 1))
    last = Level(np.zeros(1), np.ones(1), np.zeros(1)) if final == "clean" else table(np.zeros(1))
    return Level(*(np.append(a, b) for a, b in zip(grid, last, strict=True)))


def leading(schedule: Table, n: int, offset: int = 0, *, final: str = "clean") -> Level:
    """Steps `0, T // n, 2 (T // n), ...` plus `offset`, reversed (`leading` in diffusers; DDIM's uniform spacing).

    The last level is sigma = 0 (`final="clean"`, set_alpha_to_one) or the table's first entry (`final="first"`).
    """
    total = _length(schedule, n)
    return _timesteps(schedule, np.arange(n)[::-1] * (total // n) + offset, final)


def trailing(schedule: Table, n: int, *, final: str = "clean") -> Level:
    """Steps `T - 1, T - 1 - T / n, ...` (Lin et al. 2023, arXiv:2305.08891, Table 2); `final` as in `leading`."""
    total = _length(schedule, n)
    return _timesteps(schedule, np.round(np.arange(total, 0, -total / n))[:n] - 1, final)


def linspace(schedule: Table, n: int, *, final: str = "clean") -> Level:
    """Steps equally spaced from `T - 1` to 0, rounded (`linspace` in diffusers); `final` as in `leading`."""
    total = _length(schedule, n)
    return _timesteps(schedule, np.round(np.linspace(0, total - 1, n))[::-1], final)


SPACINGS = {
    "uniform": uniform,
    "karras": karras,
    "logsnr": logsnr,
    "asinh": asinh,
    "exponential": exponential,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}
