"""SA-Solver as diffusers runs it (Xue et al. 2023, arXiv:2309.05019)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np

from diffjax.convert.dpm import Points, _head, _points
from diffjax.convert.tables import corrected


def _moment(k: int, start: float, end: float, tau: float, x0: bool) -> float:
    """The integral of `l^k` over the step, weighted by the solver's exponential."""
    if not x0:
        poly = lambda l: sum(math.factorial(k) / math.factorial(j) * l**j for j in range(k + 1))
        return math.exp(-end) * (poly(start) * math.exp(end - start) - poly(end))
    rate = 1 + tau**2
    poly = lambda l: sum((-1) ** (k - j) * math.factorial(k) / math.factorial(j) * l**j for j in range(k + 1))
    gap = math.exp(-rate * (end - start))
    return math.exp(rate * end) * (poly(rate * end) - poly(rate * start) * gap) / rate ** (k + 1)


def _integrals(nodes: list[float], start: float, end: float, tau: float, x0: bool) -> np.ndarray:
    """Weights of the predictions at the nodes: integrals of their Lagrange polynomials over the step."""
    moments = np.array([_moment(k, start, end, tau, x0) for k in range(len(nodes))])
    out = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        coefficients = np.atleast_1d(np.poly(others))[::-1] / np.prod([node - other for other in others])
        out.append(coefficients @ moments)
    return np.array(out)


def _step(p: Points, i: int, nodes: list[int], tau: float, x0: bool, *, corrector: bool):
    """Weights of x, of the predictions at `nodes` and of the noise, for the step from point i to i + 1."""
    alpha, sigma = (v.astype(np.float64) for v in p.halves)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    start, end = lam[i], lam[i + 1]
    h, rate = end - start, 1 + tau**2
    weights = _integrals([lam[k] for k in nodes], start, end, tau, x0)
    if not x0:
        draw = tau * sigma[i + 1] * math.sqrt(math.expm1(2 * h))
        return alpha[i + 1] / alpha[i], -rate * alpha[i + 1] * weights, draw
    if len(nodes) == 2:
        inner = (h * rate - 1 + math.exp(-rate * h)) / rate**2
        gain = h / 2 - inner / h if corrector else (h**2 / 2 - inner) / (start - lam[i - 1])
        weights += math.exp(rate * end) * gain * np.array([1, -1])
    weights = rate * sigma[i + 1] * math.exp(-(tau**2) * end) * weights
    draw = sigma[i + 1] * math.sqrt(-math.expm1(-2 * tau**2 * h))
    return math.exp(-(tau**2) * h) * sigma[i + 1] / sigma[i], weights, draw


def sa_solver(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """SA-Solver: stochastic Adams steps, a corrector that costs no call; `tau_func` of the time step is the noise."""
    x0 = c.algorithm_type == "data_prediction"
    if not x0 and (c.thresholding or c.prediction_type == "flow_prediction"):
        raise ValueError("thresholding and prediction_type='flow_prediction' need algorithm_type='data_prediction'")
    p = _points(c, n, o, last="repeat")
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
