"""SA-Solver as diffusers runs it (Xue et al. 2023, arXiv:2309.05019)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from diffjax.convert.dpm import Points, _head, _points
from diffjax.convert.grids import F
from diffjax.convert.tables import corrected


def _moment(k: int, start: F, end: F, tau: float, x0: bool) -> F:
    """The integral of `l^k` over the step, weighted by the solver's exponential, float32 as diffusers rounds it."""
    if not x0:
        return np.exp(-end) * (_poly(k, start, 1) * np.exp(end - start) - _poly(k, end, 1))
    rate = 1 + tau**2
    start, end = F(rate) * start, F(rate) * end
    return np.exp(end) * (_poly(k, end, -1) - _poly(k, start, -1) * np.exp(-(end - start))) / F(rate ** (k + 1))


def _poly(k: int, x: F, sign: int) -> F:
    """`x^k + sign k x^(k - 1) + k (k - 1) x^(k - 2) + ..`."""
    powers = [F(1), x, x * x, x * x * x]
    total = powers[k]
    for j in range(k - 1, -1, -1):
        total = total + F(sign ** (k - j) * math.factorial(k) // math.factorial(j)) * powers[j]
    return total


def _lagrange(node: F, others: list) -> list:
    """Coefficients of the polynomial that is 1 at `node` and 0 at the others, highest power first."""
    scale = F(1)
    for other in others:
        scale = scale * (node - other)
    if not others:
        return [F(1)]
    if len(others) == 1:
        return [1 / scale, -others[0] / scale]
    if len(others) == 2:
        a, b = others
        return [1 / scale, (-a - b) / scale, a * b / scale]
    a, b, c = others
    return [1 / scale, (-a - b - c) / scale, (a * b + a * c + b * c) / scale, -a * b * c / scale]


def _integrals(nodes: list, start: F, end: F, tau: float, x0: bool) -> np.ndarray:
    """Weights of the predictions at the nodes: integrals of their Lagrange polynomials over the step."""
    p, out = len(nodes), []
    for j, node in enumerate(nodes):
        coefficients = _lagrange(node, nodes[:j] + nodes[j + 1 :])
        out.append(sum(w * _moment(p - 1 - k, start, end, tau, x0) for k, w in enumerate(coefficients)))
    return np.array(out, F)


def _step(p: Points, i: int, nodes: list[int], tau: float, x0: bool, *, corrector: bool):
    """Weights of x, of the predictions at `nodes` and of the noise, for the step from point i to i + 1."""
    (alpha, sigma), lam = p.halves, p.lam
    start, end = lam[i], lam[i + 1]
    h, rate, square = end - start, F(1 + tau**2), F(tau**2)
    weights = _integrals([lam[k] for k in nodes], start, end, tau, x0)
    if not x0:
        draw = F(tau) * sigma[i + 1] * np.sqrt(np.exp(2 * h) - 1)
        return alpha[i + 1] / alpha[i], -rate * alpha[i + 1] * weights, draw
    if len(nodes) == 2:
        inner = h * rate - 1 + np.exp(rate * -h)
        if corrector:
            gain = h / 2 - inner / (rate**2 * h)
        else:
            gain = (h * h / 2 - inner / rate**2) / (start - lam[i - 1])
        weights = weights + np.exp(rate * end) * gain * np.array([1, -1], F)
    weights = rate * sigma[i + 1] * np.exp(-square * end) * weights
    draw = sigma[i + 1] * np.sqrt(1 - np.exp(-2 * square * h))
    return np.exp(-square * h) * (sigma[i + 1] / sigma[i]), weights, draw


def sa_solver(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """SA-Solver: stochastic Adams steps, a corrector that costs no call; `tau_func` of the time step is the noise."""
    x0 = c.algorithm_type == "data_prediction"
    if not x0 and (c.thresholding or c.prediction_type == "flow_prediction"):
        raise ValueError("thresholding and prediction_type='flow_prediction' need algorithm_type='data_prediction'")
    p = _points(c, n, o, last="repeat")
    n = len(p.t)
    tau_of = c.tau_func or (lambda t: 1 if 200 <= t <= 800 else 0)
    memory = max(c.predictor_order, c.corrector_order - 1)
    index, left = np.arange(n), n - np.arange(n)
    known = np.minimum(index, memory)
    predictor, corrector = np.minimum(c.predictor_order, known + 1), np.minimum(c.corrector_order, known + 2)
    if c.lower_order_final:
        predictor, corrector = np.minimum(predictor, left), np.minimum(corrector, left + 1)
    rows = {"x": np.zeros(n), "new": np.zeros(n), "past": np.zeros((n, memory)), "draw": np.zeros(n)}
    fix = {"x": np.ones(n), "last": np.zeros(n), "new": np.zeros(n), "past": np.zeros((n, memory)), "draw": np.zeros(n)}
    for i in range(n):
        tau, order = tau_of(int(p.t[i])), predictor[i]
        nodes = [i - k for k in range(order)]
        rows["x"][i], weights, rows["draw"][i] = _step(p, i, nodes, tau, x0, corrector=False)
        rows["new"][i], rows["past"][i, : order - 1] = weights[0], weights[1:]
        if i:
            tau, order = tau_of(int(p.t[i - 1])), corrector[i - 1]
            nodes = [i - k for k in range(order)]
            fix["last"][i], weights, fix["draw"][i] = _step(p, i - 1, nodes, tau, x0, corrector=True)
            fix["x"][i], fix["new"][i], fix["past"][i, : order - 1] = 0, weights[0], weights[1:]
    half = "x0" if x0 else "eps"
    return corrected(rows | {"fix": fix}, order=c.predictor_order, half=half), p.levels(), _head(c, half)
