"""Stochastic exponential Adams: multistep solvers of the reverse SDE with true weights on the real nodes.

With `y = x / alpha`, `s = sigma / alpha` and `q = 1 + tau^2`, the SDE that draws tau times the reverse noise has

    y' = r^q y + integral of D dw from w = r^q to 1 + s' sqrt(1 - r^(2 (q - 1))) noise,    w = (s' / s)^q,  r = s' / s,

exactly, with D = x0 along the path. D is replaced by a polynomial in a variable b(s) through its last values, whose
integrals are the weights; they sum to `1 - r^q`. In x the coefficients are ratios of levels, finite from alpha = 0 to
sigma = 0. A corrector redoes the last step when the next D is known, with the same noise and without a call.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from diffjax.core.types import Array, Level, Solver, Step, namespace
from diffjax.sampling.solvers.basic import divide, moving, pairs, remaining
from diffjax.sampling.solvers.stochastic import check_amount, check_known, shrink

# c is the scale below which b is no longer logarithmic; all but "log" are finite at s = 0.
BASES = {
    "asinh": lambda xp, s, c: xp.arcsinh(s / c),
    "softlog": lambda xp, s, c: xp.log(s**2 + c**2) / 2,
    "log": lambda xp, s, c: xp.log(xp.where(s > 0, s, 1.0)),
    "s": lambda xp, s, c: s,
}
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
# Cubed, so that a logarithm at w = 0 (a step from alpha = 0, or a long one) is integrated to 1e-8.
_NODES, _WEIGHTS = ((_NODES + 1) / 2) ** 3, _WEIGHTS / 2 * 3 * ((_NODES + 1) / 2) ** 2


def _finite(levels: Level) -> tuple[Array, Array]:
    """`s` of every level with 1 in place of infinity, and where it is finite."""
    xp = namespace(*levels)
    finite = levels.alpha > 0
    return xp.where(finite, levels.sigma / xp.where(finite, levels.alpha, 1.0), 1.0), finite


def _history(levels: Level, cap: int) -> Array:
    """How many predictions each step may use, its own included: [n] from 1 to `cap`.

    A skipped step and a level at alpha = 0 have none to offer.
    """
    xp = namespace(*levels)
    _, finite = _finite(levels)
    offers = moving(levels) & finite[:-1]
    count = xp.ones(offers.shape, int)
    run = xp.ones(offers.shape, bool)
    for _ in range(cap - 1):
        run = run & xp.concatenate([xp.zeros_like(offers[:1]), offers[:-1]])
        count = count + run
        offers = xp.concatenate([xp.zeros_like(offers[:1]), offers[:-1]])
    return count


def _in_reach(levels: Level, basis: Callable, limit: float = 4.0) -> Array:
    """Where b moves no more than `limit` times as far as in the step before: farther, a polynomial runs away."""
    xp = namespace(*levels)
    s, _ = _finite(levels)
    b = basis(xp, s)
    length = xp.abs(b[1:] - b[:-1])
    return length <= limit * _shifted(length, 1)


def _shifted(a: Array, by: int) -> Array:
    """`a[i - by]` at i, the first value where there is none."""
    xp, by = namespace(a), min(by, len(a))
    return xp.concatenate([xp.repeat(a[:1], by, axis=0), a[:-by]]) if by else a


def _lagrange(at: Array, nodes: list[Array], count: Array) -> list[Array]:
    """The Lagrange polynomials of the first `count` nodes [n] each, at `at` [n, m]; 0 beyond."""
    xp = namespace(at, *nodes)
    out = []
    for i, node in enumerate(nodes):
        value = xp.where((count > i)[:, None], xp.ones_like(at), 0.0)
        for j, other in enumerate(nodes):
            if j != i:
                gap = node - other
                used = (count > j) & (count > i) & (gap != 0)
                factor = (at - other[:, None]) / xp.where(used, gap, 1.0)[:, None]
                value = value * xp.where(used[:, None], factor, 1.0)
        out.append(value)
    return out


def _weights(levels: Level, q: Array, nodes: list[Array], count: Array, basis: Callable) -> list[Array]:
    """The weights [n] of D at each of the nodes (values of b) for the step from level to level."""
    xp = namespace(*levels, q)
    level, following = pairs(levels)
    lo = shrink(level, following) ** q
    w = lo[:, None] + (1 - lo)[:, None] * _NODES
    s = _finite(levels)[0][1:, None] * w ** (-1 / q[:, None])
    # A first-order step may start at alpha = 0, where s at the nodes is huge but does not matter.
    b = xp.where((count > 1)[:, None], basis(xp, s), 0.0)
    return [(1 - lo) * (value @ _WEIGHTS) for value in _lagrange(b, nodes, count)]


def _taylor(levels, q, weights, count, gap):
    """SA-Solver's own second-order weights: the first moment of the kernel replaced by its leading term q h^2 / 2."""
    xp = namespace(*levels)
    level, following = pairs(levels)
    lo = shrink(level, following) ** q
    two = (count == 2) & (following.sigma > 0) & (level.alpha > 0)
    h = xp.where(two, -xp.log(xp.where(two, shrink(level, following), 1.0)), 0.0)
    moment = q * h**2 / 2 / xp.where(two & (gap != 0), gap, 1.0)
    first = xp.where(two, (1 - lo) + moment, weights[0])
    return [first, xp.where(two, -moment, weights[1]), *weights[2:]]


def _predictor(levels, q, count, order, basis, taylor):
    s, _ = _finite(levels)
    b = basis(namespace(*levels), s)
    nodes = [_shifted(b[:-1], k) for k in range(order)]
    weights = _weights(levels, q, nodes, count, basis)
    return _taylor(levels, q, weights, count, nodes[0] - nodes[1]) if taylor and order > 1 else weights


def _corrector(levels, q, count, order, basis, taylor):
    """Weights of the step before, redone with D at its end: node 0 is the end, then as for the predictor."""
    s, _ = _finite(levels)
    b = basis(namespace(*levels), s)
    nodes = [b[1:]] + [_shifted(b[:-1], k) for k in range(order - 1)]
    weights = _weights(levels, q, nodes, count, basis)
    if taylor and order > 1:
        weights[:2] = _taylor(levels, q, weights[1::-1], count, nodes[1] - nodes[0])[1::-1]
    # Row i is step i; it is applied when D at its end is known, in step i + 1.
    return [_shifted(w, 1) for w in weights]


def _adams(levels: Level, tau: Array, counts: tuple, orders: tuple, basis: Callable, taylor: bool) -> dict:
    """Every coefficient of every step; `counts` and `orders` are of the predictor and the corrector."""
    xp = namespace(*levels)
    level, following = pairs(levels)
    r, q = shrink(level, following), 1 + tau**2
    stack = lambda weights: xp.stack(weights, axis=1)
    coef = {
        "x": divide(following.sigma, level.sigma) * r ** (tau**2),
        "x0": following.alpha[:, None] * stack(_predictor(levels, q, counts[0], orders[0], basis, taylor)),
        "draw": following.sigma * xp.sqrt(xp.maximum(1 - r ** (2 * tau**2), 0.0)),
    }
    if not orders[1]:
        return coef
    redo = _shifted(moving(levels) & (counts[1] > 1), 1) & (xp.arange(len(tau)) > 0)
    weights = stack(_corrector(levels, q, counts[1], orders[1], basis, taylor))
    return coef | {"redo": redo, "again": level.alpha[:, None] * weights}


def _solver(coefficients: Callable, orders: tuple[int, int], s_noise: float, draws: bool) -> Solver:
    """The solver of a table of coefficients; its memory is the last predictions and the last step without D."""
    kept = max(orders[0] - 1, orders[1] - 1, 0)

    def init(x, levels):
        return (tuple(jnp.zeros_like(x) for _ in range(kept)), jnp.zeros_like(x)), coefficients(levels)

    def step(denoise, x, memory, at: Step):
        past, base = memory
        prediction = denoise(x, at.level)
        known = (prediction.x0, *past)
        if orders[1]:
            redone = base + sum(at.coef["again"][k] * known[k] for k in range(orders[1]))
            x = jnp.where(at.coef["redo"], redone, x)
        base = at.coef["x"] * x
        if draws:
            base = base + s_noise * at.coef["draw"] * at.draw(0)
        x = base + sum(at.coef["x0"][k] * known[k] for k in range(orders[0]))
        return x, (known[:kept], base), prediction

    return Solver(init, step, order=max(orders), nfe=lambda n: n)


def sde_adams(
    order: int = 3, eta: float = 1.0, basis: str = "softlog", *, scale: float = 0.1, corrector: bool = True
) -> Solver:
    """Stochastic exponential Adams-Bashforth-Moulton for the reverse SDE: one call a step.

    The kernel of the SDE is integrated exactly, x0 as a polynomial in b(s) through the last `order` predictions (Xue et
    al. 2023, arXiv:2309.05019, section 4, in log-SNR). It departs in b, which is finite at sigma = 0, so that the last
    step keeps its order. A step more than four times as long in b as the one before is first order.

    The defaults are for data of standard deviation near 1 or below, on `asinh(schedule, n, 0.02, s_max=4.0)`: the full
    noise makes the sampler forget its start, so s_max may be small, and the steps shorten smoothly down to s = 0.

    Args:
      order: predictions used by the predictor, and with its end by the corrector: 1 to 4.
      eta: noise: the SDE draws eta times what the reverse SDE draws; 0 is the probability flow, 1 the reverse SDE.
      basis: "softlog" `log(s^2 + scale^2) / 2`, "asinh" `asinh(s / scale)`, "log" (the last step is then first order)
        or "s".
      scale: below it b is no longer logarithmic; about the width of the data's details.
      corrector: whether to redo each step with the prediction at its end.

    Raises:
      ValueError: for an order outside 1 to 4, an unknown basis, a negative eta or a scale that is not positive.
    """
    check_known("order", order, (1, 2, 3, 4))
    check_known("basis", basis, tuple(BASES))
    check_amount("eta", eta)
    if not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale!r}")
    variable = lambda xp, s: BASES[basis](xp, s, scale)
    orders = (order, order if corrector and order > 1 else 0)

    def coefficients(levels):
        xp = namespace(*levels)
        count = xp.where(_in_reach(levels, variable), _history(levels, order), 1)
        if basis == "log":
            count = xp.where(levels.sigma[1:] > 0, count, 1)
        # The corrector has one node more to choose from, the end of the step.
        more = xp.where(_finite(levels)[1][:-1] & (levels.sigma[1:] > 0), xp.minimum(count + 1, order), 1)
        tau = xp.full(count.shape, float(eta))
        return _adams(levels, tau, (count, more), orders, variable, taylor=False)

    return _solver(coefficients, orders, 1.0, eta > 0)


def sa_solver(
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float | Callable[[Level], Array] = 1.0,
    *,
    lower_order_final: bool = True,
    taylor: bool = True,
) -> Solver:
    """SA-Solver: stochastic Adams predictor and corrector in log-SNR, data prediction; one call a step.

    Xue et al. 2023 (arXiv:2309.05019, Algorithm 1), SASolverScheduler of diffusers with `data_prediction`. A step from
    alpha = 0 or to sigma = 0 is first order.

    Args:
      predictor_order: 1 to 4.
      corrector_order: 1 to 4 predictions with that at the end of the step; 0 for no corrector.
      tau: noise: a number, or a function of the level [n] where steps begin, such as `lambda level: (level.s > 0.05) *
        (level.s < 1) * 1.0` for noise in an interval.
      lower_order_final: the last steps with orders ..., 2, 1.
      taylor: second-order weights by the leading term of the kernel's moment, as in the released code and in diffusers;
        False for exact integrals.

    Raises:
      ValueError: for orders outside these.
    """
    check_known("predictor_order", predictor_order, (1, 2, 3, 4))
    check_known("corrector_order", corrector_order, (0, 1, 2, 3, 4))
    if not callable(tau):
        check_amount("tau", tau)
    orders = (predictor_order, corrector_order)

    def coefficients(levels):
        xp = namespace(*levels)
        level, following = pairs(levels)
        known = _history(levels, max(predictor_order, corrector_order, 1))
        smooth = (level.alpha > 0) & (following.sigma > 0)
        left = remaining(levels)
        final = left if lower_order_final else xp.full_like(left, 9)
        count = xp.where(smooth, xp.minimum(xp.minimum(known, predictor_order), xp.maximum(final, 1)), 1)
        more = xp.where(smooth, xp.minimum(xp.minimum(known + 1, max(corrector_order, 1)), final + 1), 1)
        noise = tau(level) * xp.ones_like(level.sigma) if callable(tau) else xp.full(known.shape, float(tau))
        variable = lambda xp, s: -BASES["log"](xp, s, 1.0)
        table = _adams(levels, noise, (count, more), orders, variable, taylor)
        if corrector_order == 1:  # the prediction at the end of the step alone; on by itself
            table["redo"] = _shifted(moving(levels) & smooth, 1) & (xp.arange(len(noise)) > 0)
        return table

    return _solver(coefficients, orders, 1.0, callable(tau) or tau > 0)
