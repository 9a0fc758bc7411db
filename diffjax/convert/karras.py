"""Schedulers whose state is `x0 + sigma eps`: Euler, Heun, LMS, DPM2, the SDE solver, EDM's and consistency models."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from diffjax.convert.grids import (
    F,
    alphas_cumprod,
    given_steps,
    grid,
    linspace32,
    respace,
    respacing,
    sigma_to_t,
    spaced,
    train_sigmas,
)
from diffjax.convert.heads import edm_network, karras_network, limit, skipping
from diffjax.convert.tables import linear, two_stage
from diffjax.core.types import Level


def _table(c: SimpleNamespace):
    """The training sigmas [T] float32 and their logs."""
    sigmas = train_sigmas(alphas_cumprod(c, floor=True))
    return sigmas, np.log(sigmas)


def _respaced(c: SimpleNamespace, sigmas: np.ndarray, n: int) -> np.ndarray:
    """`sigmas` replaced by those of karras, exponential or beta between its ends, or as they are."""
    how = respacing(c)
    if how is None:
        return sigmas
    first, last = getattr(c, "sigma_max", None), getattr(c, "sigma_min", None)
    return respace(how, sigmas[0] if first is None else first, sigmas[-1] if last is None else last, n)


def sigma_grid(c: SimpleNamespace, n: int, steps=None, *, rounded: bool = False, wide: bool = False):
    """Time steps [n], sigmas [n + 1] float32 with 0 at the end, the n sigmas in float64 and the table's logs.

    Rounding gives the trailing spacing one step more for some n, with t = -1; so it does in diffusers.

    Args:
      c: options.
      n: steps.
      steps: time steps of the caller's own.
      rounded: whether karras time steps are rounded.
      wide: whether time steps are float64, else float32.
    """
    table, logs = _table(c)
    if steps is not None and respacing(c):
        raise ValueError(f"timesteps cannot be given together with use_{respacing(c)}_sigmas")
    t = spaced(c, n, whole=False) if steps is None else given_steps(c, steps, n, F)
    if wide and c.timestep_spacing == "linspace" and steps is None:
        t = np.linspace(0, c.num_train_timesteps - 1, n)[::-1]
    sigmas = np.interp(t, np.arange(len(table)), table)
    if respacing(c):
        sigmas = _respaced(c, sigmas, n)
        t = sigma_to_t(sigmas, logs)
        t = t.round() if rounded and respacing(c) == "karras" else t
    return t, np.append(sigmas, 0).astype(F), sigmas, logs


def _euler_rows(sigmas: np.ndarray, o: SimpleNamespace, count: int, kind: str, d: float | None) -> dict:
    """Euler's step, with churn: noise raises the state to `hat`, where the network is not called again.

    What the network returned at x is read at the raised state: `x0 = a x0 + b x + k x_hat`, exact for each
    prediction type (Karras et al. 2022, arXiv:2206.00364, Algorithm 2, without its second evaluation).
    """
    s, following = sigmas[:-1], sigmas[1:]
    if o.s_churn <= 0:
        return {"x": np.ones_like(s), "slope": following - s}
    inside = (s >= o.s_tmin) & (s <= o.s_tmax)
    gamma = np.where(inside, min(o.s_churn / count, 2**0.5 - 1), 0).astype(F)
    hat = s * (gamma + 1)
    noise = F(o.s_noise) * np.sqrt(np.maximum(hat**2 - s**2, 0))
    one, zero = np.ones_like(s), np.zeros_like(s)
    if d is not None:
        skip, skip_hat = d**2 / (s**2 + d**2), d**2 / (hat**2 + d**2)
        a = hat / s * np.sqrt((s**2 + d**2) / (hat**2 + d**2))
        b, k = -a * skip, skip_hat
    elif kind == "epsilon":
        a, b, k = hat / s, -hat / s, one
    elif kind == "v_prediction":
        k = 1 / (s**2 + 1)
        a, b = one, -k
    else:
        a, b, k = one, zero, zero
    move = (following - hat) / hat
    return {"x": 1 + move - move * (b + k), "x0": -move * a, "draw": noise * (1 + move - move * k)}


def euler(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Euler's method for `x0 + sigma eps` (Karras et al. 2022, arXiv:2206.00364)."""
    if o.timesteps is not None and o.sigmas is not None:
        raise ValueError("EulerDiscreteScheduler: give timesteps or sigmas, not both")
    continuous = c.timestep_type == "continuous" and c.prediction_type == "v_prediction"
    if continuous and o.timesteps is not None:
        raise ValueError("EulerDiscreteScheduler: timesteps cannot be given with timestep_type='continuous' and v")
    t, sigmas = _given_sigmas(c, n, o.sigmas) if o.sigmas is not None else _euler_grid(c, n, o.timesteps)
    if continuous:  # one time step for each sigma: one step more than asked for with interpolation_type="log_linear"
        t = 0.25 * np.log(sigmas[:-1])
    count = len(sigmas) - 1
    sigmas = sigmas[: len(t) + 1]
    rows = _euler_rows(sigmas, o, count, c.prediction_type, None)
    return linear(rows, order=1), grid(t.astype(F), np.ones_like(sigmas), sigmas), karras_network(c)


def _given_sigmas(c: SimpleNamespace, n: int, given):
    sigmas = np.asarray(given, F)
    if sigmas.shape != (n + 1,):
        raise ValueError(f"EulerDiscreteScheduler: sigmas: expected n + 1 = {n + 1} numbers, got {given!r}")
    return sigma_to_t(sigmas[:-1], _table(c)[1]), sigmas


def _euler_grid(c: SimpleNamespace, n: int, steps):
    """Time steps and sigmas. log_linear has n + 1 sigmas before the final one, so its n steps stop short of that."""
    t, sigmas, raw, logs = sigma_grid(c, n, steps)
    if c.interpolation_type == "log_linear":
        raw = _respaced(c, np.exp(linspace32(logs[-1], logs[0], n + 1)), n)
        t = sigma_to_t(raw, logs) if respacing(c) else t
    last = 0 if c.final_sigmas_type == "zero" else _table(c)[0][0]
    return t, np.append(raw, last).astype(F)


def euler_ancestral(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Euler steps to `sigma_down` and noise `sigma_up` (ancestral sampling of k-diffusion)."""
    t, sigmas, _, _ = sigma_grid(c, n)
    down, up = _ancestral(sigmas[:-1], sigmas[1:])
    rows = {"x": np.ones(len(t)), "slope": down - sigmas[:-1], "draw": up}
    return linear(rows, order=1), grid(t, np.ones_like(sigmas), sigmas), karras_network(c)


def _ancestral(s: np.ndarray, following: np.ndarray):
    up = np.sqrt(following**2 * (s**2 - following**2) / s**2)
    return np.sqrt(following**2 - up**2), up


def heun(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Heun's method for `x0 + sigma eps` (Karras et al. 2022, arXiv:2206.00364, Algorithm 1)."""
    t, sigmas, _, _ = sigma_grid(c, n, o.timesteps)
    n = len(t)
    move = np.diff(sigmas)
    single = np.arange(n) == n - 1
    inner = Level(*(np.append(a, a[-1:]) for a in (t[1:], np.ones(n - 1), sigmas[1:-1]))) if n > 1 else None
    inner = inner or Level(t, np.ones(1), sigmas[:1])
    # (y - x0) / sigma' is coarse where sigma' is small and the step long: ulp(y) / sigma'. So is diffusers' state.
    last = {"x": np.ones(n), "eps": move / 2, "gap_2": move / 2 / inner.sigma}
    solver = two_stage({"x": np.ones(n), "eps": move}, inner, last, single, order=2)
    return solver, grid(t, np.ones(n + 1), sigmas), karras_network(c, change=limit(c))


def lms(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Linear multistep in sigma, `order` values of eps (k-diffusion's `sample_lms`)."""
    if o.order not in (1, 2, 3, 4):
        raise ValueError(f"LMSDiscreteScheduler: step option order={o.order}; expected 1, 2, 3 or 4")
    t, sigmas, _, _ = sigma_grid(c, n)
    n = len(t)
    s = sigmas.astype(np.float64)
    weights = np.zeros((n, o.order))
    points, gauss = np.polynomial.legendre.leggauss(3)
    for i in range(n):
        used = min(i + 1, o.order)
        tau = s[i] + (s[i + 1] - s[i]) * (points + 1) / 2
        for j in range(used):
            nodes = [s[i - k] for k in range(used) if k != j]
            values = np.prod([(tau - node) / (s[i - j] - node) for node in nodes], axis=0) * np.ones(3)
            weights[i, j] = (s[i + 1] - s[i]) / 2 * np.dot(gauss, values)
    rows = {"x": np.ones(n), "eps": weights[:, 0], "past": weights[:, 1:]}
    return linear(rows, order=2, half="eps"), grid(t, np.ones(n + 1), sigmas), karras_network(c)


def _log_middle(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The geometric mean of sigmas float32, 0 where one of them is."""
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)
    both = np.isfinite(log_a) & np.isfinite(log_b)
    safe = lambda x: np.where(both, x, 0)
    return np.where(both, np.exp(safe(log_a) + F(0.5) * (safe(log_b) - safe(log_a))), 0).astype(F)


def dpm2(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DPM-Solver-2 in log sigma (k-diffusion's `sample_dpm_2`)."""
    return _dpm2(c, n, ancestral=False)


def dpm2_ancestral(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DPM-Solver-2 to `sigma_down`, then noise `sigma_up` (k-diffusion's `sample_dpm_2_ancestral`)."""
    return _dpm2(c, n, ancestral=True)


def _dpm2(c: SimpleNamespace, n: int, *, ancestral: bool):
    t, sigmas, _, logs = sigma_grid(c, n, rounded=True)
    n = len(t)
    s, following = sigmas[:-1], sigmas[1:]
    end, up = _ancestral(s, following) if ancestral else (following, np.zeros_like(s))
    single = np.arange(n) == n - 1
    # In float32 sigma_down rounds to 0 where a step is long; its own value then.
    exact = following.astype(np.float64) ** 2 / s if ancestral else end
    middle = _log_middle(s, np.where((end == 0) & ~single, exact, end).astype(F))
    safe = np.where(single, s, middle)
    inner = Level(sigma_to_t(safe, logs).astype(t.dtype), np.ones(n), safe)
    last = {"x": np.ones(n), "gap_2": (end - s) / safe}
    if ancestral:
        last["draw"] = up
    first = {"x": np.ones(n), "eps": np.where(single, following, middle) - s}
    solver = two_stage(first, inner, last, single, order=2)
    return solver, grid(t, np.ones(n + 1), sigmas), karras_network(c)


def dpm_sde(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DPM-Solver++ (SDE) with a midpoint (k-diffusion's `sample_dpmpp_sde`).

    Draws 0 and 1 of a step are unit noise. diffusers takes both from one Brownian path, whose seed
    (`noise_sampler_seed`) has no meaning here.
    """
    t, sigmas, raw, logs = sigma_grid(c, n, wide=True)
    n = len(t)
    s, following = sigmas[:-1], sigmas[1:]
    single = following == 0
    log_s, log_end = np.log(s), np.log(np.where(single, s, following))
    log_middle = np.where(single, log_s, log_s + (log_end - log_s) * F(0.5))
    inner_t = np.append(sigma_to_t(np.exp((np.log(raw[:-1]) + np.log(raw[1:])) / 2), logs), t[-1])
    first, last = _sde_stage(log_s, log_middle, o.s_noise), _sde_stage(log_s, log_end, o.s_noise)
    first["x"], first["x0"] = np.where(single, 0, first["x"]), np.where(single, 1, first["x0"])
    last["x0_2"] = last.pop("x0")
    last = {k: np.where(single, 0, v) for k, v in last.items()}
    solver = two_stage(first, Level(inner_t, np.ones(n), np.exp(log_middle)), last, single, order=1)
    return solver, grid(t, np.ones(n + 1), sigmas), karras_network(c)


def _sde_stage(log_start: np.ndarray, log_end: np.ndarray, s_noise: float) -> dict:
    """An ancestral step between logs of sigmas, with the roundings of float32: where they end, `down` is noise."""
    start, end = np.exp(log_start), np.exp(log_end)
    up = np.minimum(end, np.sqrt(end**2 * (start**2 - end**2) / start**2))
    log_down = np.log(np.sqrt(end**2 - up**2))
    return {"x": np.exp(log_down) / start, "x0": -np.expm1(log_down - log_start), "draw": F(s_noise) * up}


def _edm_sigmas(c: SimpleNamespace, ramp: np.ndarray) -> np.ndarray:
    if c.sigma_schedule == "exponential":
        return np.exp(linspace32(math.log(c.sigma_min), math.log(c.sigma_max), len(ramp)))[::-1]
    lo, hi = c.sigma_min ** (1 / c.rho), c.sigma_max ** (1 / c.rho)
    return ((hi + ramp * (lo - hi)) ** c.rho).astype(F)


def edm_grid(c: SimpleNamespace, n: int, *, wide: bool):
    """EDM's time steps `log(sigma) / 4` [n] and sigmas [n + 1] float32; `wide`: computed in float64."""
    sigmas = _edm_sigmas(c, np.linspace(0, 1, n) if wide else linspace32(0, 1, n))
    last = 0 if c.final_sigmas_type == "zero" else (sigmas[-1] if wide else c.sigma_min)
    return F(0.25) * np.log(sigmas), np.append(sigmas, F(last))


def edm_euler(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Euler's method with EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364)."""
    t, sigmas = edm_grid(c, n, wide=True)
    rows = _euler_rows(sigmas, o, n, c.prediction_type, c.sigma_data)
    return linear(rows, order=1), grid(t, np.ones(n + 1), sigmas), edm_network(c)


def consistency(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, Algorithm 1)."""
    total, low, d = c.num_train_timesteps, c.sigma_min, c.sigma_data
    if o.timesteps is not None:
        steps = given_steps(c, o.timesteps, n, np.int64)
    elif n > total:
        raise ValueError(f"CMStochasticIterativeScheduler: n={n} is more than num_train_timesteps={total}")
    else:
        steps = (np.arange(n) * (total // n))[::-1]
    lo, hi = low ** (1 / c.rho), c.sigma_max ** (1 / c.rho)
    raw = (hi + steps[::-1] / (total - 1) * (lo - hi)) ** c.rho
    sigmas = np.append(raw, low).astype(F)
    following = np.clip(sigmas[1:], F(low), F(c.sigma_max))
    rows = {"x0": np.ones(n), "draw": F(c.s_noise) * np.sqrt(following**2 - F(low**2))}
    if n == 1:
        rows.pop("draw")
    rows = {k: np.nan_to_num(v) if k == "draw" else v for k, v in rows.items()}
    head = skipping(
        lambda s: d**2 / ((s - low) ** 2 + d**2),
        lambda s: (s - low) * d / (s**2 + d**2) ** 0.5,
        d,
        limit(SimpleNamespace(clip_sample=c.clip_denoised, clip_sample_range=1.0)),
    )
    return linear(rows, order=1), grid(250 * np.log(raw + 1e-44), np.ones(n + 1), sigmas), head
