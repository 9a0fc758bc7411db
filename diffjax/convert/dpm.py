"""Exponential multistep schedulers as diffusers runs them: DPM-Solver, DEIS, UniPC and SA-Solver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from diffjax.convert.flow import shifted, stretched, time_shift
from diffjax.convert.grids import (
    F,
    alphas_cumprod,
    check_steps,
    given_steps,
    grid,
    respace,
    respacing,
    sigma_to_t,
    spaced_between,
    train_sigmas,
)
from diffjax.convert.heads import edm_network, limit, network
from diffjax.convert.karras import edm_grid
from diffjax.convert.tables import anchored, corrected, linear


class Points(NamedTuple):
    """A run's grid as these schedulers see it, float32.

    Attributes:
      t: time steps [n].
      sigma: their sigmas [n + 1].
      flow: whether `alpha = 1 - sigma`, else `alpha = 1 / sqrt(1 + sigma^2)`; None for alpha = 1.
    """

    t: np.ndarray
    sigma: np.ndarray
    flow: bool | None

    @property
    def halves(self) -> tuple[np.ndarray, np.ndarray]:
        if self.flow is None:
            return np.ones_like(self.sigma), self.sigma
        if self.flow:
            return 1 - self.sigma, self.sigma
        alpha = 1 / np.sqrt(self.sigma**2 + 1)
        return alpha, self.sigma * alpha

    @property
    def lam(self) -> np.ndarray:
        alpha, sigma = self.halves
        return np.log(alpha) - np.log(sigma)

    def levels(self):
        return grid(self.t, *self.halves)


def _clipped(c: SimpleNamespace, bar: np.ndarray) -> int:
    """How many time steps at the noisy end have half a log-SNR below `lambda_min_clipped`."""
    lam = np.log(np.sqrt(bar)) - np.log(np.sqrt(1 - bar))
    return int(np.searchsorted(lam[::-1], F(c.lambda_min_clipped)))


def _flow_shift(c: SimpleNamespace, o: SimpleNamespace) -> float:
    if getattr(o, "mu", None) is None:
        return c.flow_shift
    if not c.use_dynamic_shifting or c.time_shift_type != "exponential":
        raise ValueError("mu: needs use_dynamic_shifting=True and time_shift_type='exponential'")
    return float(np.exp(o.mu))


def _respaced(c: SimpleNamespace, table: np.ndarray, n: int, rounded) -> tuple[np.ndarray, np.ndarray]:
    """Time steps and sigmas [n] of karras, lu, exponential or beta over the whole table."""
    how, logs = respacing(c), np.log(table)
    first, last = getattr(c, "sigma_max", None), getattr(c, "sigma_min", None)
    ends = logs if how == "lu" else table
    sigmas = respace(how, ends[-1] if first is None else first, ends[0] if last is None else last, n)
    t = sigma_to_t(sigmas, logs)
    return t.round() if how in rounded else t, sigmas


def _points(c: SimpleNamespace, n: int, o: SimpleNamespace, *, last: str, singlestep: bool = False) -> Points:
    """The grid of all but UniPC.

    Args:
      c: options.
      n: steps.
      o: step options.
      last: final sigma: "zero", "sigma_min" (the table's first) or "repeat" (the last again, if sigmas are respaced).
      singlestep: always linspace, karras always rounded.
    """
    bar = alphas_cumprod(c, floor=True)
    table = train_sigmas(bar)
    end = len(bar) - (_clipped(c, bar) if hasattr(c, "lambda_min_clipped") else 0)
    end = min(end, c.num_train_timesteps)
    own = getattr(o, "timesteps", None)
    if own is not None and respacing(c):
        raise ValueError(f"timesteps cannot be given together with use_{respacing(c)} sigmas")
    if own is not None:
        t = given_steps(c, own, n, np.int64)
    elif singlestep:
        t = np.linspace(0, end - 1, n + 1).round()[::-1][:-1].astype(np.int64)
    else:
        t = spaced_between(c, n, end)
    always = singlestep or last == "repeat"
    if respacing(c):
        cosine = c.beta_schedule == "squaredcos_cap_v2" and not always
        t, sigmas = _respaced(c, table, n, () if cosine else ("karras", "lu"))
    elif c.use_flow_sigmas:
        steps = 1.0 - np.linspace(1, 1 / c.num_train_timesteps, n + 1)
        sigmas = shifted(steps, _flow_shift(c, o))[::-1][:-1]
        t = sigmas * c.num_train_timesteps
    else:
        check_steps(np.maximum(t, 0), len(t), len(bar))  # rounding gives "trailing" a step more, t = -1, for some n
        sigmas = np.interp(t, np.arange(len(table)), table)
    if last == "repeat" and (respacing(c) or c.use_flow_sigmas):
        final = sigmas[-1]
    else:
        final = 0 if last == "zero" else table[0]
    if c.use_flow_sigmas and sigmas[0] > 1:
        raise ValueError(f"use_flow_sigmas together with use_{respacing(c)} sigmas: sigma = {sigmas[0]:.4g} is above 1")
    return Points(t.astype(np.int64), np.append(sigmas, final).astype(F), c.use_flow_sigmas)


def _head(c: SimpleNamespace, half: str, through: str | None = None):
    change = limit(c) if half == "x0" or not hasattr(c, "predict_x0") else None
    on_vp = c.prediction_type == "flow_prediction" and not c.use_flow_sigmas
    return network(
        "flow_on_vp" if on_vp else c.prediction_type, change=change, needs_eps=half == "eps", through=through or half
    )


class Update(NamedTuple):
    """One exponential update: weights of x, of D0, of D1 (midpoint, heun), of D2, and of the noise."""

    x: np.ndarray
    zero: np.ndarray
    midpoint: np.ndarray
    heun: np.ndarray
    second: np.ndarray
    draw: np.ndarray


def _update(algorithm: str, p: Points, i: int, j: int) -> Update:
    """The update from point i to point j (Lu et al. 2022, arXiv:2206.00927 and 2211.01095), as diffusers rounds it."""
    (a, b), (s, t) = ((h[i], h[j]) for h in p.halves)
    h = p.lam[j] - p.lam[i]
    if algorithm == "dpmsolver++":
        e = np.exp(-h) - 1
        return Update(t / s, -b * e, F(-0.5) * (b * e), b * (e / h + 1), -b * ((e + h) / h**2 - F(0.5)), F(0))
    if algorithm == "sde-dpmsolver++":
        e, g = 1 - np.exp(-2 * h), -2 * h
        draw = t * np.sqrt(e)
        return Update(t / s * np.exp(-h), b * e, F(0.5) * (b * e), b * (e / g + 1), b * ((e + g) / g**2 - F(0.5)), draw)
    e = np.exp(h) - 1
    if algorithm == "dpmsolver":
        return Update(b / a, -t * e, F(-0.5) * (t * e), -t * (e / h - 1), -t * ((e - h) / h**2 - F(0.5)), F(0))
    draw = t * np.sqrt(np.exp(2 * h) - 1)
    return Update(b / a, -2 * (t * e), -t * e, -2 * (t * (e / h - 1)), F(np.nan), draw)


def _weights(u: Update, order: int, kind: str, r: tuple, *, single: bool) -> list:
    """Weights of the last `order` predictions, newest first; r are `diffusers`' r0 and r1."""
    if order == 1:
        return [u.zero]
    first = u.midpoint if kind == "midpoint" else u.heun
    if order == 2:
        w = first * (1 / r[0])
        return [w, u.zero - w] if single else [u.zero + w, -w]
    r0, r1 = r
    if single:  # D1_0 = (m1 - m2) / r1, D1_1 = (m0 - m2) / r0
        if kind == "midpoint":
            first, second = (u.heun / r0, 0 * u.heun), F(0)
        else:
            first, second = (-u.heun * r1 / (r0 - r1) / r0, u.heun * r0 / (r0 - r1) / r1), 2 * u.second / (r0 - r1)
        m0, m1 = first[0] + second / r0, first[1] - second / r1
        return [m0, m1, u.zero - m0 - m1]
    q = r0 / (r0 + r1)
    d0, d1 = u.heun * (1 + q) + u.second / (r0 + r1), -u.heun * q - u.second / (r0 + r1)
    return [u.zero + d0 / r0, -d0 / r0 + d1 / r1, -d1 / r1]


def _algorithm(c: SimpleNamespace) -> tuple[str, str, str]:
    """Algorithm, solver type and the half it predicts, with diffusers' substitutions."""
    algorithm = "dpmsolver++" if c.algorithm_type == "deis" else c.algorithm_type
    kind = c.solver_type if c.solver_type in ("midpoint", "heun") else "midpoint"
    half = "x0" if algorithm.endswith("++") else "eps"
    if half == "eps" and c.final_sigmas_type == "zero":
        raise ValueError(f"algorithm_type={algorithm!r} needs final_sigmas_type='sigma_min', got 'zero'")
    if half == "eps" and c.prediction_type == "flow_prediction":
        raise ValueError(f"prediction_type='flow_prediction' needs algorithm_type='dpmsolver++', got {algorithm!r}")
    return algorithm, kind, half


def _orders(c: SimpleNamespace, n: int) -> np.ndarray:
    """Order of each step: what the history allows, and diffusers' rules for the end of the run."""
    left = n - np.arange(n)
    orders = np.minimum(np.arange(n) + 1, c.solver_order)
    short = c.lower_order_final and n < 15
    zero = getattr(c, "final_sigmas_type", None) == "zero"
    orders = np.where((left == 2) & short, np.minimum(orders, 2), orders)
    return np.where((left == 1) & (short or zero or getattr(c, "euler_at_final", False)), 1, orders)


def _dpm_multistep(c: SimpleNamespace, p: Points, head, third: tuple):
    algorithm, kind, half = _algorithm(c)
    n = len(p.t)
    orders, lam = _orders(c, n), p.lam
    weights, xs, draws = np.zeros((n, c.solver_order)), np.zeros(n), np.zeros(n)
    for i, order in enumerate(orders):
        if order == 3 and algorithm not in third:
            raise ValueError(f"algorithm_type={algorithm!r} has no third order in diffusers; use solver_order 2")
        u = _update(algorithm, p, i, i + 1)
        h = lam[i + 1] - lam[i]
        r = tuple((lam[i - k] - lam[i - k - 1]) / h for k in range(order - 1))
        weights[i, :order] = _weights(u, order, kind, r, single=False)
        xs[i], draws[i] = u.x, u.draw
    rows = {"x": xs, half: weights[:, 0], "past": weights[:, 1:]}
    if algorithm.startswith("sde"):
        rows["draw"] = draws
    return linear(rows, order=min(c.solver_order, 2), half=half), p.levels(), head(half)


def dpm_multistep(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DPM-Solver, DPM-Solver++ and their SDE forms, multistep (Lu et al. 2022, arXiv:2206.00927 and 2211.01095)."""
    p = _points(c, n, o, last=c.final_sigmas_type)
    third = ("dpmsolver++", "sde-dpmsolver++", "dpmsolver")
    return _dpm_multistep(c, p, lambda half: _head(c, half), third)


def edm_dpm(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DPM-Solver++ multistep with EDM's preconditioning."""
    t, sigmas = edm_grid(c, n, wide=False)
    return _dpm_multistep(c, Points(t, sigmas, None), lambda half: edm_network(c, change=limit(c)), ("dpmsolver++",))


def _single_orders(c: SimpleNamespace, n: int) -> list[int]:
    """Order of each step of a singlestep run: groups of 1, 2, .. order, and a shorter end."""
    order, zero = c.solver_order, c.final_sigmas_type == "zero"
    group = list(range(1, order + 1))
    if not (c.lower_order_final or zero or n % order):
        return group * (n // order)
    if order == 3:
        tail = {0: [1, 2, 1], 1: [1], 2: [1, 2]}[n % 3]
    elif order == 2:
        tail = [1, 1] if n % 2 == 0 else [1]
    else:
        tail = []
    orders = group * ((n - len(tail)) // order) + tail
    return orders[:-1] + [1] if zero else orders


def dpm_singlestep(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DPM-Solver and DPM-Solver++, singlestep: each call ends a step, groups of `solver_order` share their start."""
    algorithm, kind, half = _algorithm(c)
    if half == "eps" and c.thresholding:
        raise ValueError("thresholding needs algorithm_type='dpmsolver++': with 'dpmsolver' diffusers fails")
    p = _points(c, n, o, last=c.final_sigmas_type, singlestep=True)
    lam = p.lam
    weights, xs, draws = np.zeros((n, c.solver_order)), np.zeros(n), np.zeros(n)
    orders = _single_orders(c, n)
    for i, order in enumerate(orders):
        base = i - order + 1
        u = _update(algorithm, p, base, i + 1)
        r = tuple((lam[i - k] - lam[base]) / (lam[i + 1] - lam[base]) for k in range(order - 1))
        weights[i, :order] = _weights(u, order, kind, r, single=True)
        xs[i], draws[i] = u.x, u.draw
    rows = {"x": xs, "new": weights[:, 0], "past": weights[:, 1:], "start": np.array(orders) == 1}
    if algorithm.startswith("sde"):
        rows["draw"] = draws
    return anchored(rows, order=c.solver_order, half=half), p.levels(), _head(c, half)


def deis(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DEIS in log rho (Zhang and Chen 2023, arXiv:2204.13902), multistep."""
    p = _points(c, n, o, last="repeat")
    n = len(p.t)
    alpha, sigma = p.halves
    rho, orders = sigma / alpha, _orders(c, n)
    weights, xs = np.zeros((n, c.solver_order)), alpha[1:] / alpha[:-1]
    for i, order in enumerate(orders):
        if order == 1:
            weights[i, 0] = -sigma[i + 1] * (np.exp(p.lam[i + 1] - p.lam[i]) - 1)
            continue
        nodes = [np.log(rho[i - k]) for k in range(order)]
        for k in range(order):
            others = nodes[k + 1 :] + nodes[:k]
            integral = _log_integral(rho[i + 1], nodes[k], others) - _log_integral(rho[i], nodes[k], others)
            weights[i, k] = alpha[i + 1] * integral
    rows = {"x": xs, "eps": weights[:, 0], "past": weights[:, 1:]}
    return linear(rows, order=min(2, c.solver_order), half="eps"), p.levels(), _head(c, "eps", "x0")


def _log_integral(t, b, others):
    """Antiderivative in rho, at t, of the Lagrange polynomial in log rho that is 1 at b and 0 at the others."""
    log_t, c = np.log(t), others[0]
    if len(others) == 1:
        return t * (-c + log_t - 1) / (b - c)
    d = others[1]
    return t * (c * (d - log_t + 1) - d * log_t + d + log_t**2 - 2 * log_t + 2) / ((b - c) * (b - d))


def _unipc_points(c: SimpleNamespace, n: int, o: SimpleNamespace) -> Points:
    """UniPC's grid: its last sigma is `sigma_min` in each spacing's own sense."""
    bar = alphas_cumprod(c, floor=True)
    table = train_sigmas(bar)
    if c.shift_terminal is not None and not c.use_flow_sigmas:
        raise ValueError("shift_terminal needs use_flow_sigmas=True")
    if o.sigmas is not None and (not c.use_flow_sigmas or respacing(c)):
        raise ValueError("sigmas can be given with use_flow_sigmas=True only, and without karras, exponential or beta")
    if c.use_dynamic_shifting and o.mu is None:
        raise ValueError("use_dynamic_shifting needs the step option mu=...")
    repeat = True
    if respacing(c):
        if c.use_flow_sigmas and respacing(c) != "karras":
            raise ValueError(f"use_flow_sigmas together with use_{respacing(c)}_sigmas gives sigmas above 1")
        t, sigmas = _respaced(c, table, n, ("karras",))
        if c.use_flow_sigmas:
            sigmas = sigmas / (sigmas + 1)
            t = sigmas * c.num_train_timesteps
    elif c.use_flow_sigmas:
        sigmas = _flow_sigmas(c, n, o)
        t = sigmas * c.num_train_timesteps
    else:
        t = spaced_between(c, n, c.num_train_timesteps)
        check_steps(np.maximum(t, 0), len(t), len(bar))
        sigmas, repeat = np.interp(t, np.arange(len(table)), table), False
    final = 0 if c.final_sigmas_type == "zero" else (sigmas[-1] if repeat else table[0])
    return Points(t.astype(np.int64), np.append(sigmas, final).astype(F), c.use_flow_sigmas)


def _flow_sigmas(c: SimpleNamespace, n: int, o: SimpleNamespace) -> np.ndarray:
    sigmas = np.linspace(1, 1 / c.num_train_timesteps, n + 1)[:-1] if o.sigmas is None else np.asarray(o.sigmas, float)
    if sigmas.shape != (n,):
        raise ValueError(f"sigmas: expected n = {n} numbers, got {o.sigmas!r}")
    sigmas = time_shift(sigmas, o.mu, c.time_shift_type) if c.use_dynamic_shifting else shifted(sigmas, c.flow_shift)
    sigmas = stretched(sigmas, c.shift_terminal) if c.shift_terminal else sigmas
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6
    return sigmas


def _uni(lam: np.ndarray, i: int, order: int, kind: str, x0: bool):
    """UniPC's ratios r_k, matrix R, vector b, B(h) and phi_1 for the step from point i to i + 1."""
    h = lam[i + 1] - lam[i]
    rks = np.array([(lam[i - k] - lam[i]) / h for k in range(1, order)] + [1], F)
    hh = -h if x0 else h
    phi_1 = np.expm1(hh)
    big = hh if kind == "bh1" else phi_1
    phi_k, factorial, rows, b = phi_1 / hh - 1, 1, [], []
    for k in range(1, order + 1):
        rows.append(rks ** (k - 1))
        b.append(phi_k * factorial / big)
        factorial *= k + 1
        phi_k = phi_k / hh - F(1 / factorial)
    return rks, np.array(rows, F), np.array(b, F), big, phi_1


def _uni_rows(c: SimpleNamespace, p: Points, i: int, order: int, *, corrector: bool) -> tuple:
    """Weights of x, of the predictions at i, i - 1, .. and of that at i + 1, for the step from i to i + 1."""
    (a, b_next), (s, t) = ((v[i], v[i + 1]) for v in p.halves)
    scale, x = (b_next, t / s) if c.predict_x0 else (t, b_next / a)
    rks, matrix, vector, big, phi_1 = _uni(p.lam, i, order, c.solver_type, c.predict_x0)
    if order == 1:
        rhos = np.array([0.5] if corrector else [], F)
    elif corrector:
        rhos = np.linalg.solve(matrix, vector)
    else:
        rhos = np.array([0.5], F) if order == 2 else np.linalg.solve(matrix[:-1, :-1], vector[:-1])
    past = [-scale * big * rho / rk for rho, rk in zip(rhos[: order - 1], rks, strict=False)]
    new = -scale * big * rhos[-1] if corrector else F(0)
    # 0 * B(h): bh1 on a step to sigma = 0 multiplies infinity by zero, as diffusers does.
    zero = -scale * phi_1 - sum(past) - new + 0 * big
    return x, [zero, *past], new


def unipc(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """UniPC (Zhao et al. 2023, arXiv:2302.04867, Algorithms 5 to 8), one call a step."""
    c.solver_type = c.solver_type if c.solver_type in ("bh1", "bh2") else "bh2"
    if not c.predict_x0 and c.prediction_type == "flow_prediction":
        raise ValueError("prediction_type='flow_prediction' needs predict_x0=True")
    p, width = _unipc_points(c, n, o), c.solver_order
    n = len(p.t)
    half = "x0" if c.predict_x0 else "eps"
    orders = np.minimum(np.arange(n) + 1, width)
    orders = np.minimum(orders, n - np.arange(n)) if c.lower_order_final else orders
    rows = {"x": np.zeros(n), "new": np.zeros(n), "past": np.zeros((n, width - 1))}
    fix = {"x": np.ones(n), "last": np.zeros(n), "new": np.zeros(n), "past": np.zeros((n, width))}
    for i, order in enumerate(orders):
        rows["x"][i], weights, _ = _uni_rows(c, p, i, order, corrector=False)
        rows["new"][i], rows["past"][i, : order - 1] = weights[0], weights[1:]
        if i and i - 1 not in c.disable_corrector:
            before = orders[i - 1]
            fix["last"][i], weights, fix["new"][i] = _uni_rows(c, p, i - 1, before, corrector=True)
            fix["x"][i], fix["past"][i, :before] = 0, weights
    return corrected(rows | {"fix": fix}, order=width, half=half), p.levels(), _head(c, half)
