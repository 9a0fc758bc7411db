"""Schedulers whose state is the variance-preserving sample: DDPM, DDIM and its inverse, LCM, TCD, unCLIP, iPNDM."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from diffjax.convert.grids import (
    F,
    alphas_cumprod,
    betas,
    check_steps,
    cumulative,
    given_steps,
    grid,
    linspace32,
    spaced,
    vp_level,
)
from diffjax.convert.heads import clips, limit, network
from diffjax.convert.tables import linear


def _lookup(bar: np.ndarray, steps: np.ndarray, final: float) -> np.ndarray:
    """`alphas_cumprod` at time steps, `final` at those below 0."""
    return np.where(steps >= 0, bar[np.maximum(steps, 0)], F(final)).astype(F)


def _posterior(a, ap, current_beta, current_alpha) -> dict:
    """Weights of x0 and x in the mean of q(x' | x, x0) (Ho et al. 2020, arXiv:2006.11239, Eq. 7)."""
    b, bp = 1 - a, 1 - ap
    return {"x0": np.sqrt(ap) * current_beta / b, "x": np.sqrt(current_alpha) * bp / b}


def _needs_variance(prediction, kind: str):
    if not hasattr(prediction.aux, "shape"):
        raise ValueError(
            f"variance_type={kind!r}: the network must return (out, variance), the two halves of its channels; "
            f"got {'no' if prediction.aux == () else 'another'} second output"
        )
    return prediction.aux


def _std(c: SimpleNamespace, variance, current_beta, noisy) -> tuple[dict, object]:
    """Rows and `std` of the noise for each `variance_type`; no noise where `noisy` is false."""
    if c.variance_type == "fixed_small":
        return {"draw": np.where(noisy, np.sqrt(variance), 0)}, None
    if c.variance_type == "fixed_small_log":
        return {"draw": np.where(noisy, np.exp(F(0.5) * np.log(variance)), 0)}, None
    if c.variance_type == "fixed_large":
        return {"draw": np.where(noisy, np.sqrt(current_beta), 0)}, None
    rows = {"noisy": noisy.astype(F), "min_log": np.log(variance), "max_log": np.log(current_beta)}
    if c.variance_type == "learned":
        return rows, lambda row, p: row["noisy"] * jnp.sqrt(_needs_variance(p, "learned"))

    def std(row, prediction):
        share = (_needs_variance(prediction, "learned_range") + 1) / 2
        return row["noisy"] * jnp.exp(0.5 * (share * row["max_log"] + (1 - share) * row["min_log"]))

    return rows, std


def ddpm(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DDPM (Ho et al. 2020, arXiv:2006.11239, Algorithm 2), with the variances of Nichol and Dhariwal 2021."""
    bar = alphas_cumprod(c)
    steps = spaced(c, n, whole=True) if o.timesteps is None else given_steps(c, o.timesteps, n, np.int64)
    check_steps(steps, n, len(bar))
    a, ap = bar[steps], _lookup(bar, np.append(steps[1:], -1), 1.0)
    current_alpha = a / ap
    current_beta = 1 - current_alpha
    variance = np.maximum((1 - ap) / (1 - a) * (1 - a / ap), F(1e-20))
    rows, std = _std(c, variance, current_beta, steps > 0)
    solver = linear(rows | _posterior(a, ap, current_beta, current_alpha), order=1, std=std)
    return (
        solver,
        vp_level(steps, a, 1.0),
        network(c.prediction_type, change=limit(c), finite=clips(c), needs_eps=False),
    )


def unclip(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DDPM on unCLIP's grid, each step to the next time step, as its pipeline drives it."""
    if n < 2:
        raise ValueError(f"UnCLIPScheduler: n={n}; its spacing needs at least 2 steps")
    table = betas(c)
    bar = cumulative(1 - table)
    ratio = (c.num_train_timesteps - 1) / (n - 1)
    steps = (np.arange(n) * ratio).round()[::-1].astype(np.int64)
    check_steps(steps, n, len(bar))
    prev = np.append(steps[1:], steps[-1] - 1)
    a, ap = bar[steps], _lookup(bar, prev, 1.0)
    near = prev == steps - 1
    beta = np.where(near, table[steps], 1 - a / ap)
    alpha = np.where(near, (1 - table)[steps], 1 - beta)
    variance = np.maximum((1 - ap) / (1 - a) * beta, F(1e-20))
    rows, std = _std(c, variance, beta, steps > 0)
    solver = linear(rows | _posterior(a, ap, beta, alpha), order=1, std=std)
    return (
        solver,
        vp_level(steps, a, 1.0),
        network(c.prediction_type, change=limit(c), finite=clips(c), needs_eps=False),
    )


def ddim(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DDIM (Song et al. 2021, arXiv:2010.02502, Eq. 12); a step ends at `t - T // n` whatever the spacing."""
    bar = alphas_cumprod(c)
    steps = spaced(c, n, whole=True)
    check_steps(steps, n, len(bar))
    final = 1.0 if c.set_alpha_to_one else bar[0]
    prev = steps - c.num_train_timesteps // n
    a, ap = bar[steps], _lookup(bar, prev, final)
    variance = (1 - ap) / (1 - a) * (1 - a / ap)
    std = F(o.eta) * np.sqrt(variance)
    rows = {"x0": np.sqrt(ap), "eps": np.sqrt(1 - ap - std**2)}
    if o.eta > 0:
        rows["draw"] = std
    head = network(c.prediction_type, change=limit(c), finite=clips(c), keep_eps=not o.use_clipped_model_output)
    return linear(rows, order=1), vp_level(steps, a, ap[-1]), head


def ddim_inverse(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """DDIM from data to noise; the network sees the time step where each step ends."""
    bar = alphas_cumprod(c)
    jump = c.num_train_timesteps / n if c.timestep_spacing == "trailing" else c.num_train_timesteps // n
    if c.timestep_spacing == "leading":
        steps = (np.arange(n) * jump) + c.steps_offset
    else:
        steps = np.round(np.arange(c.num_train_timesteps, 0, -jump)[::-1]).astype(np.int64) - 1
    check_steps(steps, n, len(bar))
    start = np.minimum(steps - c.num_train_timesteps // n, c.num_train_timesteps - 1)
    a, ap = _lookup(bar, start, 1.0 if c.set_alpha_to_one else bar[0]), bar[steps]
    rows = {"x0": np.sqrt(ap), "eps": np.sqrt(1 - ap)}
    # Only the last level may have alpha = 0, and no step begins there.
    head = network(c.prediction_type, change=limit(c), finite=True, keep_eps=True)
    return linear(rows, order=1), vp_level(steps, a, ap[-1]), head


def _distilled_steps(c: SimpleNamespace, n: int, o: SimpleNamespace, kind: str) -> np.ndarray:
    """The time steps of LCM and TCD: a subset of those that the student was distilled on."""
    total = c.num_train_timesteps
    original = c.original_inference_steps if o.original_inference_steps is None else o.original_inference_steps
    if kind == "TCDScheduler" and o.original_inference_steps is not None:
        origin = np.arange(total)
    else:
        if not 0 < original <= total:
            raise ValueError(f"{kind}: original_inference_steps={original}; expected 1 to {total}")
        origin = np.arange(1, original + 1) * (total // original) - 1
    if o.timesteps is not None:
        steps = given_steps(c, o.timesteps, n, np.int64)
        if steps[0] != total - 1 or not set(steps[1:]) <= set(origin):
            raise ValueError(
                f"{kind}: timesteps must begin at {total - 1} and be among the {len(origin)} that the student was "
                f"distilled on, got {list(steps)}"
            )
        return steps
    if n > min(original, len(origin)):
        raise ValueError(f"{kind}: n={n} is more than original_inference_steps={original}")
    return origin[::-1][np.floor(np.linspace(0, len(origin), n, endpoint=False)).astype(np.int64)]


def lcm(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Latent consistency sampling (Luo et al. 2023, arXiv:2310.04378, Algorithm 3)."""
    bar = alphas_cumprod(c)
    steps = _distilled_steps(c, n, o, "LCMScheduler")
    check_steps(steps, n, len(bar))
    a = bar[steps]
    ap = np.append(a[1:], F(1.0))
    scaled = steps.astype(F) * F(c.timestep_scaling)
    c_skip, c_out = F(0.25) / (scaled**2 + F(0.25)), scaled / np.sqrt(scaled**2 + F(0.25))
    rows = {"x0": np.sqrt(ap) * c_out, "x": np.sqrt(ap) * c_skip, "draw": np.append(np.sqrt(1 - a[1:]), F(0))}
    head = network(c.prediction_type, change=limit(c), finite=clips(c), needs_eps=False)
    return (
        linear(rows if n > 1 else {k: v for k, v in rows.items() if k != "draw"}, order=1),
        vp_level(steps, a, 1.0),
        head,
    )


def tcd(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """Trajectory consistency sampling (Zheng et al. 2024, arXiv:2402.19159, Algorithm 4); `eta` is their gamma.

    Neither diffusers nor this clips x0, whatever `clip_sample` and `thresholding` say.
    """
    if not 0 <= o.eta <= 1:
        raise ValueError(f"TCDScheduler: step option eta={o.eta}; expected a number from 0 to 1")
    bar = alphas_cumprod(c)
    steps = _distilled_steps(c, n, o, "TCDScheduler")
    check_steps(steps, n, len(bar))
    prev = np.append(steps[1:], 0)
    inner = np.floor(F(1 - o.eta) * prev.astype(F)).astype(np.int64)
    a, ap, mid = bar[steps], bar[prev], bar[inner]
    noisy = (np.arange(n) < n - 1) & (o.eta > 0)
    grow = np.where(noisy, np.sqrt(ap / mid), F(1))
    rows = {"x0": grow * np.sqrt(mid), "eps": grow * np.sqrt(1 - mid)}
    if noisy.any():
        rows["draw"] = np.where(noisy, np.sqrt(1 - ap / mid), 0)
    return linear(rows, order=1), vp_level(steps, a, ap[-1]), network(c.prediction_type)


def ipndm(c: SimpleNamespace, n: int, o: SimpleNamespace):
    """iPNDM (Zhang and Chen 2023, arXiv:2204.13902): Adams-Bashforth of eps up to order 4, the network returns v."""
    if c.trained_betas is None:
        ramp = np.append(linspace32(1, 0, n + 1)[:-1], F(0))
        sigma = np.sin(ramp * F(math.pi) / F(2)) ** 2
    else:
        sigma = np.asarray(c.trained_betas, F)
        if sigma.shape != (n + 1,):
            raise ValueError(
                f"IPNDMScheduler: trained_betas are the n + 1 = {n + 1} sigmas of a run, got {sigma.shape}"
            )
    alpha = np.sqrt(1 - sigma**2)
    t = (np.arctan2(sigma, alpha) / F(math.pi) * F(2))[:-1]
    grow = alpha[1:] / np.maximum(alpha[:-1], F(1e-8))
    # At alpha = 0 the state is eps itself, and diffusers divides a difference of 0 by 1e-8.
    grow = np.where(alpha[:-1] > 0, grow, 0)
    adams = _adams(n)
    move = sigma[1:] - grow * sigma[:-1]
    rows = {"x": grow, "eps": move * adams[:, 0], "past": move[:, None] * adams[:, 1:]}
    return linear(rows, order=2, half="eps"), grid(t, alpha, sigma), network("v_prediction")


def _adams(n: int) -> np.ndarray:
    """Adams-Bashforth weights [n, 4] on equal steps, of order 1, 2, 3, then 4."""
    table = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55, -59, 37, -9]])
    table[3] /= 24
    return table[np.minimum(np.arange(n), 3)]
