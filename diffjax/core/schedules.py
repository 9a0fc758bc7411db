"""Noise schedules: each is a function `t -> Level` with an inverse by log-SNR.

Data is at small `t`, noise at large `t`. Every schedule has

  * `schedule(t) -> Level`, elementwise; numpy float64 stays numpy float64, jax arrays stay jax arrays;
  * `schedule.time(logsnr) -> t`, its inverse, and `schedule.at_logsnr(logsnr) -> Level`, finite at `logsnr = +-inf`;
  * `t_min` (the cleanest end) and `t_max` (the noisiest).

A user's schedule is any object with these five. Formulas avoid `1 - alpha ** 2`, so both ends are exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Level, namespace

# Networks are never called at sigma = 0; a finite time there keeps inf and NaN out of tables and gradients.
_TINY = 1e-12


class Schedule(Protocol):
    """What every schedule offers; see the module's docstring."""

    t_min: float
    t_max: float

    def __call__(self, t: Array) -> Level: ...
    def time(self, logsnr: Array) -> Array: ...
    def at_logsnr(self, logsnr: Array) -> Level: ...


def _real(a):
    """`a` as a floating array: jax arrays as they are, all else numpy float64."""
    return a if isinstance(a, jax.Array) else np.asarray(a, np.float64)


def _check(schedule, allowed: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{schedule}: expected {allowed}")


def _sigmoid(a):
    """`1 / (1 + exp(-a))`, exact 0 and 1 at `-inf` and `inf`."""
    xp = namespace(a)
    return xp.exp(-xp.logaddexp(0.0, -a))


def _variance_preserving(logsnr):
    """`(alpha, sigma)` with `alpha ** 2 + sigma ** 2 = 1` at a log-SNR."""
    return _sigmoid(logsnr) ** 0.5, _sigmoid(-logsnr) ** 0.5


@dataclass(frozen=True)
class VP:
    """Variance-preserving SDE with linear beta (Song et al. 2021, arXiv:2011.13456, Eq. 11 and 33), `t` in [0, 1].

    Attributes:
      beta_min: beta(0).
      beta_max: beta(1).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self):
        _check(self, "0 <= beta_min < beta_max", 0 <= self.beta_min < self.beta_max < np.inf)

    def __call__(self, t: Array) -> Level:
        t = _real(t)
        xp = namespace(t)
        log_alpha = -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        return Level(t, xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha)))

    def time(self, logsnr: Array) -> Array:
        xp = namespace(logsnr)
        # The integral of beta from 0 to t is -log alpha^2. VP never reaches alpha = 0; the cap keeps time finite there.
        integral = xp.minimum(xp.logaddexp(0.0, -_real(logsnr)), 1e9)
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + xp.sqrt(self.beta_min**2 + 2 * slope * integral))

    def at_logsnr(self, logsnr: Array) -> Level:
        logsnr = _real(logsnr)
        return Level(self.time(logsnr), *_variance_preserving(logsnr))


@dataclass(frozen=True)
class SubVP:
    """Sub-VP SDE (Song et al. 2021, arXiv:2011.13456, Eq. 12): alpha of `VP`, `sigma = 1 - alpha^2`; `t` in [0, 1]."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self):
        _check(self, "0 <= beta_min < beta_max", 0 <= self.beta_min < self.beta_max < np.inf)

    def __call__(self, t: Array) -> Level:
        level = VP(self.beta_min, self.beta_max)(t)
        return Level(level.t, level.alpha, level.sigma**2)

    def time(self, logsnr: Array) -> Array:
        level = self.at_logsnr(logsnr)
        return level.t

    def at_logsnr(self, logsnr: Array) -> Level:
        logsnr = _real(logsnr)
        xp = namespace(logsnr)
        # alpha / sigma = r and sigma = 1 - alpha^2 give a quadratic in alpha; each root without cancellation.
        with np.errstate(over="ignore"):
            r, q = xp.exp(logsnr / 2), xp.exp(-logsnr / 2)
            alpha = 2 / (q + xp.sqrt(q**2 + 4))
            sigma = 2 / (1 + xp.sqrt(1 + 4 * r**2))
        with np.errstate(divide="ignore"):
            vp_logsnr = 2 * xp.log(alpha) - xp.log(sigma)  # sigma_vp ** 2 = sigma
        return Level(VP(self.beta_min, self.beta_max).time(vp_logsnr), alpha, sigma)


@dataclass(frozen=True)
class Cosine:
    """Cosine schedule (Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 17) in continuous time, `t` in [0, 1].

    `alpha(1)` is exactly 0 and `sigma(0)` exactly 0: there is no cap. The capped table is `squared_cosine_betas`.
    """

    offset: float = 0.008
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self):
        _check(self, "offset > 0", 0 < self.offset < np.inf)

    def _angles(self):
        quarter = np.pi / 2 / (1 + self.offset)
        return quarter, quarter * self.offset

    def __call__(self, t: Array) -> Level:
        t = _real(t)
        xp = namespace(t)
        quarter, start = self._angles()
        angle = quarter * t
        alpha = xp.sin(quarter * (1 - t)) / np.cos(start)
        sigma = xp.sqrt(xp.sin(angle) * xp.sin(angle + 2 * start)) / np.cos(start)
        return Level(t, alpha, sigma)

    def time(self, logsnr: Array) -> Array:
        xp = namespace(logsnr)
        quarter, start = self._angles()
        alpha, sigma = _variance_preserving(_real(logsnr))
        end = xp.arctan2(xp.sqrt((sigma * np.cos(start)) ** 2 + np.sin(start) ** 2), alpha * np.cos(start))
        return xp.arcsin(xp.clip((sigma * np.cos(start)) ** 2 / xp.sin(end + start), 0, 1)) / quarter

    def at_logsnr(self, logsnr: Array) -> Level:
        logsnr = _real(logsnr)
        return Level(self.time(logsnr), *_variance_preserving(logsnr))


@dataclass(frozen=True)
class LinearLogSNR:
    """Variance-preserving with log-SNR linear in `t` (Kingma et al. 2021, arXiv:2107.00630), `t` in [0, 1]."""

    logsnr_min: float = -10.0
    logsnr_max: float = 10.0
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self):
        _check(self, "logsnr_min < logsnr_max", -np.inf < self.logsnr_min < self.logsnr_max < np.inf)

    def __call__(self, t: Array) -> Level:
        t = _real(t)
        return Level(t, *_variance_preserving(self.logsnr_max + t * (self.logsnr_min - self.logsnr_max)))

    def time(self, logsnr: Array) -> Array:
        xp = namespace(logsnr)
        t = (self.logsnr_max - _real(logsnr)) / (self.logsnr_max - self.logsnr_min)
        return xp.clip(t, -1.0, 2.0)  # finite at logsnr = +-inf, where no network is called

    def at_logsnr(self, logsnr: Array) -> Level:
        logsnr = _real(logsnr)
        return Level(self.time(logsnr), *_variance_preserving(logsnr))


@dataclass(frozen=True)
class VE:
    """Variance-exploding SDE (Song et al. 2021, arXiv:2011.13456, Eq. 9): geometric sigma, alpha 1, `t` in [0, 1]."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self):
        _check(self, "0 < sigma_min < sigma_max", 0 < self.sigma_min < self.sigma_max < np.inf)

    def __call__(self, t: Array) -> Level:
        t = _real(t)
        xp = namespace(t)
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** t
        return Level(t, xp.ones_like(sigma), sigma)

    def time(self, logsnr: Array) -> Array:
        xp = namespace(logsnr)
        sigma = xp.maximum(xp.exp(-_real(logsnr) / 2), _TINY)
        return xp.log(sigma / self.sigma_min) / np.log(self.sigma_max / self.sigma_min)

    def at_logsnr(self, logsnr: Array) -> Level:
        logsnr = _real(logsnr)
        xp = namespace(logsnr)
        sigma = xp.exp(-logsnr / 2)
        return Level(self.time(logsnr), xp.ones_like(sigma), sigma)


@dataclass(frozen=True)
class EDM:
    """Karras et al. 2022 (arXiv:2206.00364): the argument is `sigma` itself, `alpha = 1`.

    `Level.t` is their `c_noise = log(sigma) / 4` (Table 1). `sigma_min` and `sigma_max` are the ends of sampling grids.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    t_min = 0.0

    def __post_init__(self):
        _check(self, "0 < sigma_min < sigma_max", 0 < self.sigma_min < self.sigma_max < np.inf)

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def __call__(self, t: Array) -> Level:
        sigma = _real(t)
        xp = namespace(sigma)
        return Level(xp.log(xp.maximum(sigma, _TINY)) / 4, xp.ones_like(sigma), sigma)

    def time(self, logsnr: Array) -> Array:
        return namespace(logsnr).exp(-_real(logsnr) / 2)

    def at_logsnr(self, logsnr: Array) -> Level:
        return self(self.time(logsnr))


@dataclass(frozen=True)
class Flow:
    """Rectified flow and flow matching: `alpha = 1 - s`, `sigma = s`, `s = shift t / (1 + (shift - 1) t)`, t in [0, 1].

    Liu et al. 2022 (arXiv:2209.03003), Lipman et al. 2023 (arXiv:2210.02747); the resolution shift is Esser et al. 2024
    (arXiv:2403.03206, Eq. 23). `Level.t` is `s`, the shifted time that the network sees.
    """

    shift: float = 1.0
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self):
        _check(self, "shift > 0", 0 < self.shift < np.inf)

    def __call__(self, t: Array) -> Level:
        t = _real(t)
        stretch = 1 + (self.shift - 1) * t
        sigma = self.shift * t / stretch
        return Level(sigma, (1 - t) / stretch, sigma)

    def time(self, logsnr: Array) -> Array:
        logsnr = _real(logsnr)
        alpha, sigma = _sigmoid(logsnr / 2), _sigmoid(-logsnr / 2)
        return sigma / (sigma + self.shift * alpha)

    def at_logsnr(self, logsnr: Array) -> Level:
        logsnr = _real(logsnr)
        sigma = _sigmoid(-logsnr / 2)
        return Level(sigma, _sigmoid(logsnr / 2), sigma)


@dataclass(frozen=True, eq=False)
class Table:
    """Any discrete schedule by its table of `alphas_cumprod = alpha ** 2`; `t` is the step index in [0, T - 1].

    Between two steps the angle `atan2(sigma, alpha)` is linear in `t`, which is finite at both ends, a terminal SNR of
    zero included.

    Attributes:
      alphas_cumprod: [T] strictly decreasing in [0, 1].

    Raises:
      ValueError: if the table is not one-dimensional, decreasing and within [0, 1].
    """

    alphas_cumprod: np.ndarray

    def __post_init__(self):
        table = np.asarray(self.alphas_cumprod, np.float64)
        if table.ndim != 1 or len(table) < 2 or np.any(np.diff(table) >= 0) or table[0] > 1 or table[-1] < 0:
            raise ValueError(
                f"alphas_cumprod: expected [T >= 2] strictly decreasing within [0, 1], got shape {table.shape} with "
                f"ends {table.flat[0] if table.size else None} and {table.flat[-1] if table.size else None}"
            )
        object.__setattr__(self, "alphas_cumprod", table)

    @property
    def t_min(self) -> float:
        return 0.0

    @property
    def t_max(self) -> float:
        return len(self.alphas_cumprod) - 1.0

    @property
    def _angles(self) -> np.ndarray:
        return np.arctan2(np.sqrt(1 - self.alphas_cumprod), np.sqrt(self.alphas_cumprod))

    def __call__(self, t: Array) -> Level:
        t = _real(t)
        xp = namespace(t)
        angle = xp.interp(t, np.arange(len(self.alphas_cumprod), dtype=np.float64), self._angles)
        alpha = xp.where(angle >= np.pi / 2, 0.0, xp.cos(angle))
        return Level(t, alpha, xp.sin(angle))

    def time(self, logsnr: Array) -> Array:
        xp = namespace(logsnr)
        alpha, sigma = _variance_preserving(_real(logsnr))
        return xp.interp(xp.arctan2(sigma, alpha), self._angles, np.arange(len(self.alphas_cumprod), dtype=np.float64))

    def at_logsnr(self, logsnr: Array) -> Level:
        logsnr = _real(logsnr)
        return Level(self.time(logsnr), *_variance_preserving(logsnr))


def linear_betas(num_steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Betas [T] equally spaced (Ho et al. 2020, arXiv:2006.11239, section 4)."""
    return np.linspace(start, end, num_steps)


def scaled_linear_betas(num_steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Betas [T] with equally spaced square roots (Rombach et al. 2022, arXiv:2112.10752, released configs)."""
    return np.linspace(start**0.5, end**0.5, num_steps) ** 2


def squared_cosine_betas(num_steps: int = 1000, cap: float = 0.999, offset: float = 0.008) -> np.ndarray:
    """Betas [T] of the cosine schedule, capped (Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 17 and below)."""
    t = np.linspace(0, 1, num_steps + 1)
    alpha_bar = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], cap)


def sigmoid_betas(num_steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Betas [T] on a sigmoid from -6 to 6 (Xu et al. 2022, GeoDiff, arXiv:2203.02923; `sigmoid` in diffusers)."""
    return _sigmoid(np.linspace(-6, 6, num_steps)) * (end - start) + start


def zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """The table [T] shifted and scaled in `alpha` so that the last entry is 0 and the first is kept.

    Lin et al. 2023 (arXiv:2305.08891, Algorithm 1).
    """
    alpha = np.sqrt(np.asarray(alphas_cumprod, np.float64))
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return alpha**2


def _table(betas: np.ndarray, rescale: bool) -> Table:
    alphas_cumprod = np.cumprod(1 - betas)
    return Table(zero_terminal_snr(alphas_cumprod) if rescale else alphas_cumprod)


def ddpm(num_steps: int = 1000, start: float = 1e-4, end: float = 0.02, *, rescale: bool = False) -> Table:
    """The `Table` of DDPM's linear betas; `rescale` makes the terminal SNR zero."""
    return _table(linear_betas(num_steps, start, end), rescale)


def scaled_linear(num_steps: int = 1000, start: float = 0.00085, end: float = 0.012, *, rescale: bool = False) -> Table:
    """The `Table` of Stable Diffusion's betas; `rescale` makes the terminal SNR zero."""
    return _table(scaled_linear_betas(num_steps, start, end), rescale)


def squared_cosine(num_steps: int = 1000, cap: float = 0.999, *, rescale: bool = False) -> Table:
    """The `Table` of iDDPM's capped cosine betas; `rescale` makes the terminal SNR zero."""
    return _table(squared_cosine_betas(num_steps, cap), rescale)


def sigmoid_table(num_steps: int = 1000, start: float = 1e-4, end: float = 0.02, *, rescale: bool = False) -> Table:
    """The `Table` of sigmoid betas; `rescale` makes the terminal SNR zero."""
    return _table(sigmoid_betas(num_steps, start, end), rescale)


@dataclass(frozen=True, eq=False)
class Learned:
    """Variance-preserving, log-SNR a decreasing network of `t` in [0, 1] between two fixed ends.

    `logsnr(t) = logsnr_max - (logsnr_max - logsnr_min) (g(t) - g(0)) / (g(1) - g(0))` with
    `g(t) = w1 t + mean_k w3_k sigmoid(w2_k t + b_k)` and positive weights (Kingma et al. 2021, arXiv:2107.00630,
    appendix H), so it decreases whatever the parameters are. It departs from the paper in its ends, which are settings,
    and in `Level.t`: the network is told the fraction of log-SNR between the ends, the same as by
    `LinearLogSNR(logsnr_min, logsnr_max)`, so its input does not move when the schedule does.

    Attributes:
      logsnr_min: at t = 1.
      logsnr_max: at t = 0.
      width: sigmoids in g.
      params: as from `init`; None is the schedule linear in log-SNR.

    Raises:
      ValueError: unless `logsnr_min < logsnr_max`, both finite, and `width >= 1`.
    """

    logsnr_min: float = -10.0
    logsnr_max: float = 10.0
    width: int = 64
    params: Any = None
    t_min = 0.0
    t_max = 1.0

    def __post_init__(self):
        LinearLogSNR(self.logsnr_min, self.logsnr_max)  # which checks them
        if not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"learned schedule: width={self.width!r}: expected a whole number >= 1")

    @property
    def _linear(self) -> LinearLogSNR:
        return LinearLogSNR(self.logsnr_min, self.logsnr_max)

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Parameters, near the linear schedule: the sigmoids begin with a fifth of its slope."""
        centres = (jnp.arange(self.width) + jax.random.uniform(key)) / self.width
        raw = lambda value, *shape: jnp.full(shape, np.log(np.expm1(value)), jnp.float32)  # undone by softplus
        wide = {"steep": raw(10.0, self.width), "bias": -10 * centres, "height": raw(0.2, self.width)}
        return {"slope": raw(1.0), **wide}

    def bind(self, params: Any) -> Learned:
        """The schedule with these parameters."""
        return replace(self, params=params)

    def _fraction(self, t):
        """`(g(t) - g(0)) / (g(1) - g(0))`, exactly 0 and 1 at the ends."""
        xp = namespace(t, *(a for a in self.params.values() if isinstance(a, jax.core.Tracer)))
        p = {name: xp.asarray(a) for name, a in self.params.items()}
        softplus = lambda a: xp.logaddexp(a, 0.0)
        slope, steep, height = softplus(p["slope"]), softplus(p["steep"]), softplus(p["height"])

        def rise(t):
            # g(t) - g(0) as one difference per sigmoid: 1/2 (tanh(a / 2) - tanh(b / 2)).
            each = xp.tanh((steep * t[..., None] + p["bias"]) / 2) - xp.tanh(p["bias"] / 2)
            return slope * t + 0.5 * (each * height).mean(-1)

        return rise(t) / rise(xp.ones_like(t))

    def __call__(self, t: Array) -> Level:
        t = t if isinstance(t, jax.Array) else np.asarray(t, np.float64)
        # Level.t of the linear schedule is its argument: the fraction of log-SNR that lies behind.
        return self._linear(t if self.params is None else self._fraction(t))

    def time(self, logsnr: Array) -> Array:
        """The inverse, by 60 bisections; not for gradients with respect to the parameters."""
        goal = self._linear.time(logsnr)
        if self.params is None:
            return goal
        xp = namespace(goal)
        low, high = xp.zeros_like(goal), xp.ones_like(goal)
        for _ in range(60 if xp is np else 30):  # all the bits of float64 and of float32
            middle = (low + high) / 2
            above = self._fraction(middle) >= goal
            low, high = xp.where(above, low, middle), xp.where(above, middle, high)
        return (low + high) / 2

    def at_logsnr(self, logsnr: Array) -> Level:
        return self._linear.at_logsnr(logsnr)


def rate(schedule: Schedule, logsnr: Array) -> Array:
    """`-d logsnr / dt` of a schedule at a log-SNR, shape of `logsnr`: the density of noise levels per unit of time."""
    t = jnp.asarray(schedule.time(logsnr))
    return -jax.jvp(lambda t: schedule(t).logsnr, (t,), (jnp.ones_like(t),))[1]


SCHEDULES = {
    "vp": VP,
    "sub_vp": SubVP,
    "cosine": Cosine,
    "linear_logsnr": LinearLogSNR,
    "ve": VE,
    "edm": EDM,
    "flow": Flow,
    "learned": Learned,
    "ddpm": ddpm,
    "scaled_linear": scaled_linear,
    "squared_cosine": squared_cosine,
    "sigmoid": sigmoid_table,
}
