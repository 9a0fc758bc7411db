"""Flow-matching schedulers: the state is `(1 - sigma) x0 + sigma eps`, the network returns the velocity."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from diffjax.convert.grids import F, grid, respace, respacing
from diffjax.convert.heads import network
from diffjax.convert.tables import linear, two_stage
from diffjax.core.types import Level


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """The resolution shift (Esser et al. 2024, arXiv:2403.03206, Eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def time_shift(sigmas: np.ndarray, mu: float, how: str) -> np.ndarray:
    """The shift by `mu`, its log or itself (diffusers' `exponential` and `linear`)."""
    weight = math.exp(mu) if how == "exponential" else mu
    return weight / (weight + (1 / sigmas - 1))


def stretched(sigmas: np.ndarray, terminal: float) -> np.ndarray:
    """`sigmas` stretched so that the last is `terminal`."""
    clean = 1 - sigmas
    return 1 - clean / (clean[-1] / (1 - terminal))


def _range(c: SimpleNamespace, *, shift: bool) -> tuple[float, float]:
    """Ends of the training time steps: the largest and the smallest sigma, shifted once already."""
    ends = np.array([c.num_train_timesteps, 1], F) / F(c.num_train_timesteps)
    if shift:
        ends = F(c.shift) * ends / (1 + F(c.shift - 1) * ends)
    return float(ends[0]), float(ends[1])


def _given(name: str, values, n: int) -> np.ndarray:
    out = np.asarray(values, F)
    if out.shape != (n,):
        raise ValueError(f"{name}: expected n = {n} numbers, got {values!r}")
    return out


def _sigmas(c: SimpleNamespace, n: int, o: SimpleNamespace) -> np.ndarray:
    """Sigmas [n] float32 after every shift and respacing, before `invert_sigmas`."""
    total = c.num_train_timesteps
    if o.sigmas is not None:
        sigmas = _given("sigmas", o.sigmas, n)
    elif o.timesteps is not None:
        sigmas = _given("timesteps", o.timesteps, n) / total
    else:
        first, last = _range(c, shift=not c.use_dynamic_shifting)
        sigmas = np.linspace(first * total, last * total, n) / total
    if c.use_dynamic_shifting:
        if o.mu is None:
            raise ValueError(
                "use_dynamic_shifting needs the step option mu=...; pipelines take it from the length of the sequence, "
                f"between base_shift={c.base_shift} at {c.base_image_seq_len} tokens and max_shift={c.max_shift} at "
                f"{c.max_image_seq_len}"
            )
        sigmas = time_shift(sigmas, o.mu, c.time_shift_type)
    else:
        sigmas = shifted(sigmas, c.shift)
    if c.shift_terminal:
        sigmas = stretched(sigmas, c.shift_terminal)
    if respacing(c):
        sigmas = respace(respacing(c), sigmas[0], sigmas[-1], n)
    return sigmas.astype(F)


def flow_euler(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Euler's method on the flow ODE (Lipman et al. 2023, arXiv:2210.02747), or with `stochastic_sampling` a jump to x0
    and back.

    With `invert_sigmas` sigma is the share of data and the network's velocity goes to it. The churn options of `step`
    do nothing, as in diffusers.
    """
    sigmas = _sigmas(c, n, o)
    total = F(c.num_train_timesteps)
    t = sigmas * total if o.timesteps is None else np.asarray(o.timesteps, F)
    if c.invert_sigmas:
        sigmas = 1 - sigmas
        t = sigmas * total
    sigmas = np.append(sigmas, F(c.invert_sigmas))
    if c.stochastic_sampling:
        return _jumps(c, sigmas, t)
    if c.invert_sigmas:
        rows = {"x": np.ones(n), "x0": np.diff(sigmas), "eps": -np.diff(sigmas)}
        return linear(rows, order=1), grid(t, sigmas, 1 - sigmas), network("to_data")
    rows = {"x": np.ones(n), "x0": -np.diff(sigmas), "eps": np.diff(sigmas)}
    return linear(rows, order=1), grid(t, 1 - sigmas, sigmas), network("straight")


def _jumps(c: SimpleNamespace, sigmas: np.ndarray, t: np.ndarray):
    """`x' = (1 - sigma') x0 + sigma' noise`; inverted sigmas enter it as they are, so there the noise grows."""
    rows = {"x0": 1 - sigmas[1:], "draw": sigmas[1:]}
    return linear(rows, order=1), grid(t, 1 - sigmas, sigmas), network("straight")


def flow_heun(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Heun's method on the flow ODE. Churn raises sigma, and the network is not called again at the raised state."""
    first, last = _range(c, shift=True)
    total = c.num_train_timesteps
    sigmas = np.append(shifted(np.linspace(first * total, last * total, n) / total, c.shift), 0).astype(F)
    s, following = sigmas[:-1], sigmas[1:]
    t = s * F(total)
    inside = (s >= o.s_tmin) & (s <= o.s_tmax) & (o.s_churn > 0)
    gamma = np.where(inside, min(o.s_churn / (2 * n - 1), 2**0.5 - 1), 0).astype(F)
    hat = s * (gamma + 1)
    noise = F(o.s_noise) * np.sqrt(np.maximum(hat**2 - s**2, 0))
    move, slope = following - hat, s / hat
    one = np.ones(n)
    single = np.arange(n) == n - 1
    middle = {"x": one, "x0": -move * slope, "eps": move * slope}
    safe = np.where(single, s, following)
    end = {"x": one, "x0": -move * slope / 2, "eps": move * slope / 2, "gap_2": move / 2 / safe}
    if o.s_churn > 0:
        middle["draw"], end["again"] = noise, noise
    inner = Level(np.where(single, t, np.append(t[1:], t[-1])), 1 - safe, safe)
    return two_stage(middle, inner, end, single, order=2), grid(t, 1 - sigmas, sigmas), network("straight")
