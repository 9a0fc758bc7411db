"""Solvers for networks that jump: consistency models, LCM, TCD and flow maps in one to eight steps."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from diffjax.core.heads import FLOW
from diffjax.core.schedules import Schedule, Table
from diffjax.core.types import Array, Head, Level, Prediction, Solver, Step, expand, namespace
from diffjax.sampling.solvers.basic import pairs, to_level
from diffjax.sampling.solvers.stochastic import check_amount


def consistency(s_min: float = 0.0, s_noise: float = 1.0) -> Solver:
    """Multistep consistency sampling: x0, and fresh noise up to the next level; one call a step.

    Song et al. 2023 (arXiv:2303.01469, Algorithm 1) for any alpha and sigma. The denoiser's x0 has to be the end of the
    flow, not the mean: exact for a consistency function, biased for a plain denoiser. CMStochasticIterative of
    diffusers with its sigma_min as `s_min`, FlowMatchLCM and the `stochastic_sampling` of FlowMatchEuler, SCM on the
    levels (cos t, sigma_data sin t).

    Args:
      s_min: s = sigma / alpha at which the network's function is the identity; noise is drawn for
        `sqrt(s'^2 - s_min^2)`, as its output still holds that of s_min.
      s_noise: factor of the noise drawn.

    Raises:
      ValueError: for a negative argument.
    """
    check_amount("s_min", s_min)
    check_amount("s_noise", s_noise)

    def init(x, levels):
        _, following = pairs(levels)
        xp = namespace(*levels)
        return (), s_noise * xp.sqrt(xp.maximum(following.sigma**2 - (s_min * following.alpha) ** 2, 0.0))

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        return at.next.alpha * prediction.x0 + at.coef * at.draw(0), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n)


def consistency_head(s_min: float = 0.002, sigma_data: float = 0.5) -> Head:
    """The head of a consistency model: EDM's preconditioning, the identity at `s_min` (arXiv:2303.01469, appendix C).

    With `y = x / alpha` and `s = sigma / alpha`: `x0 = c_skip y + c_out F`, `c_skip = d^2 / ((s - s_min)^2 + d^2)`,
    `c_out = d (s - s_min) / sqrt(s^2 + d^2)`; the network sees `y / sqrt(s^2 + d^2)`. Undefined at alpha = 0.

    Args:
      s_min: level of the boundary condition.
      sigma_data: `d`, standard deviation of the clean data.

    Raises:
      ValueError: unless `s_min >= 0` and `sigma_data > 0`.
    """
    check_amount("s_min", s_min)
    if not sigma_data > 0:
        raise ValueError(f"sigma_data: expected a positive number, got {sigma_data}")

    def scales(level):
        s = level.sigma / level.alpha
        skip = sigma_data**2 / ((s - s_min) ** 2 + sigma_data**2)
        return skip, sigma_data * (s - s_min) / namespace(s).sqrt(s**2 + sigma_data**2)

    def target(x0, eps, level):
        skip, out = (expand(a, x0) for a in scales(level))
        return (x0 - skip * (x0 + expand(level.sigma / level.alpha, x0) * eps)) / out

    def split(out, x, level):
        skip, scale = (expand(a, x) for a in scales(level))
        x0 = skip * x / expand(level.alpha, x) + scale * out
        return Prediction(x0, (x - expand(level.alpha, x) * x0) / expand(level.sigma, x))

    def scale_in(level):
        return 1 / namespace(level.alpha).sqrt((level.alpha * sigma_data) ** 2 + level.sigma**2)

    def check(levels):
        if np.any(np.asarray(levels.alpha) == 0):
            raise ValueError("the consistency head is undefined at alpha = 0; start the grid at a finite s_max")

    return Head(target, split, scale_in, check)


def lcm(sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> Solver:
    """Latent consistency sampling: `consistency` with LCM's own boundary scalings in the network's time.

    Luo et al. 2023 (arXiv:2310.04378, section 4.1 and Algorithm 3), LCMScheduler of diffusers. With `k = t *
    timestep_scaling`: `x0' = sigma_data^2 / (k^2 + sigma_data^2) x + k / sqrt(k^2 + sigma_data^2) x0`, and fresh noise
    up to the next level. `Level.t` is the table's step index. The last level should be the clean one.

    Args:
      sigma_data: of the scalings.
      timestep_scaling: of t; in diffusers' configs and the paper's code 10.

    Raises:
      ValueError: unless both are positive.
    """
    for name, value in (("sigma_data", sigma_data), ("timestep_scaling", timestep_scaling)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")

    def init(x, levels):
        xp = namespace(*levels)
        k = levels.t[:-1] * timestep_scaling
        square = k**2 + sigma_data**2
        return (), {"skip": sigma_data**2 / square, "out": k / xp.sqrt(square)}

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        x0 = at.coef["out"] * prediction.x0 + at.coef["skip"] * x
        return at.next.alpha * x0 + at.next.sigma * at.draw(0), memory, prediction._replace(x0=x0)

    return Solver(init, step, order=1, nfe=lambda n: n)


def tcd(schedule: Schedule, eta: float = 0.3) -> Solver:
    """Trajectory consistency sampling: along the flow below the next level, then noise up to it; one call a step.

    Zheng et al. 2024 (arXiv:2402.19159, Algorithm 4, strategic stochastic sampling), TCDScheduler of diffusers: the
    level below is at time `(1 - eta) t'`, rounded down to a step of a `Table`, and never noisier than the next.
    With eta = 0 it is `euler()`, with eta = 1 on a table whose first step is clean `consistency()`.

    Args:
      schedule: that the grid was made from.
      eta: `gamma` of the paper, from 0 (deterministic) to 1.

    Raises:
      ValueError: unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number from 0 (deterministic) to 1, got {eta}")

    def init(x, levels):
        _, following = pairs(levels)
        xp = namespace(*levels)
        if isinstance(schedule, Table):
            # In float32, as torch multiplies: the last digit decides which step the floor is.
            t = xp.floor(xp.asarray(1 - eta, "float32") * xp.asarray(following.t, "float32"))
        else:
            t = (1 - eta) * schedule.time(following.logsnr)
        down = schedule(xp.asarray(t, levels.alpha.dtype))
        below = down.sigma * following.alpha < following.sigma * down.alpha
        down = Level(*(xp.where(below, a, b) for a, b in zip(down, following, strict=True)))
        grown = xp.where(below, following.alpha / xp.where(below, down.alpha, 1.0), 1.0)
        std = xp.sqrt(xp.where(below, xp.maximum(following.sigma**2 - (grown * down.sigma) ** 2, 0.0), 0.0))
        return (), {"down": down, "x": grown, "draw": std}

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        x = at.coef["x"] * to_level(at.coef["down"], prediction)
        return (x if eta == 0 else x + at.coef["draw"] * at.draw(0)), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n)


def flow_map() -> Solver:
    """One call a step of a network that knows where the step ends: `x' = alpha' x0 + sigma' eps`; deterministic.

    The denoiser is called with three arguments, `denoise(x, level, next) -> Prediction`, the halves averaged over it:
    see `mean_flow` and `shortcut`. Exact for an exact flow map, in any number of steps.
    """

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level, at.next)
        return to_level(at.next, prediction), memory, prediction

    return Solver(lambda x, levels: ((), ()), step, order=1, nfe=lambda n: n)


def _times(x: Array, *times: Array) -> tuple[Array, ...]:
    return tuple(jnp.broadcast_to(jnp.asarray(t, jnp.float32), x.shape[:1]) for t in times)


def mean_flow(f: Callable[[Array, Array, Array], Array]) -> Callable[[Array, Level, Level], Prediction]:
    """The three-argument denoiser of a mean-flow network, for `flow_map` on grids with alpha = 1 - sigma.

    Geng et al. 2025 (arXiv:2505.13447, Eq. 12): `z_r = z_t - (t - r) u(z_t, r, t)`. FlowMapEuler of diffusers.

    Args:
      f: `(x [B, ...], t [B], r [B]) -> u [B, ...]`, float32 times `Level.t` of both ends; u points from data
        to noise.
    """

    def denoise(x, level, following):
        return FLOW.split(f(x, *_times(x, level.t, following.t)).astype(x.dtype), x, level)

    return denoise


def shortcut(f: Callable[[Array, Array, Array], Array]) -> Callable[[Array, Level, Level], Prediction]:
    """The three-argument denoiser of a shortcut model, for `flow_map` on grids with alpha = 1 - sigma.

    Frans et al. 2024 (arXiv:2410.12557, Eq. 4): `x_(t + d) = x_t + d s(x_t, t, d)`, their time from noise at 0 to data
    at 1.

    Args:
      f: `(x [B, ...], t [B], d [B]) -> s [B, ...]`, float32; s points from noise to data.
    """

    def denoise(x, level, following):
        out = f(x, *_times(x, 1 - level.sigma, level.sigma - following.sigma))
        return FLOW.split(-out.astype(x.dtype), x, level)

    return denoise
