"""Solvers that draw noise: ancestral steps and churn, one call or one inner step at a time.

With `s = sigma / alpha` and `r = s' / s` the exact posterior q(x' | x, x0) is

    x' = (sigma' / sigma) r x + alpha' (1 - r^2) x0 + sigma' sqrt(1 - r^2) noise,

so every coefficient below is a ratio of levels, finite from alpha = 0 to sigma = 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.core.schedules import Schedule
from diffjax.core.types import Array, Level, Prediction, Solver, Step, namespace
from diffjax.sampling.solvers.basic import divide, moving, pairs

VARIANCES = ("beta_tilde", "beta", "learned", "learned_range")


def shrink(level: Level, following: Level) -> Array:
    """`s' / s` of each step with `s = sigma / alpha`: 0 from alpha = 0 and to sigma = 0, 1 where nothing moves."""
    return divide(level.alpha * following.sigma, following.alpha * level.sigma)


def check_known(name: str, value, known) -> None:
    """Raises ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}; got {value!r}")


def check_amount(name: str, value: float) -> None:
    """Raises ValueError unless `value >= 0`: amounts of noise."""
    if not value >= 0:
        raise ValueError(f"{name}: expected a number >= 0 (0 draws no noise), got {value!r}")


def first_order(level: Level, following: Level, eta: float, s_noise: float) -> dict:
    """Coefficients `x`, `x0`, `draw` of the ancestral Euler step: down to s_down without noise, up to s' with it.

    The part of s' that is drawn is `min(1, eta sqrt(1 - r^2))` (`get_ancestral_step` of k-diffusion).
    """
    xp = namespace(*level, *following)
    r = shrink(level, following)
    up = xp.minimum(1.0, eta * xp.sqrt(xp.maximum(1 - r**2, 0.0)))
    keep = xp.sqrt(1 - up**2)
    x = divide(following.sigma, level.sigma) * keep
    return {"x": x, "x0": following.alpha - x * level.alpha, "draw": s_noise * following.sigma * up}


def _affine(at: Step, x: Array, prediction: Prediction) -> Array:
    return at.coef["x"] * x + at.coef["x0"] * prediction.x0


def euler_ancestral(eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    """Euler to a level below the next, then noise up to it, for any alpha and sigma; order 1.

    `sample_euler_ancestral` of k-diffusion and EulerAncestralDiscrete of diffusers (eta = s_noise = 1), there for
    alpha = 1. `eta` <= 1 and `s_noise` = 1 is `ddim(eta)`: DDIM's sigma is the same as their `sigma_up`.

    Args:
      eta: share of the posterior's standard deviation that is drawn anew; may exceed 1, until all noise is new.
      s_noise: factor of the noise drawn.

    Raises:
      ValueError: for a negative argument.
    """
    check_amount("eta", eta)
    check_amount("s_noise", s_noise)

    def init(x, levels):
        return (), first_order(*pairs(levels), eta, s_noise)

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        x = _affine(at, x, prediction)
        return (x if eta == 0 else x + at.coef["draw"] * at.draw(0)), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n)


def euler_ancestral_rf(eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    """`euler_ancestral` with the lower level chosen on the straight path of rectified flow; order 1.

    With `f = sigma / (alpha + sigma)` it steps to `f_down = f' (1 + eta (f' / f - 1))` and adds noise up to f'. For
    alpha = 1 - sigma it is `sample_euler_ancestral_RF` of ComfyUI and LTXEulerAncestralRF of diffusers; for other
    schedules it is the same sampler of the same process in other coordinates.

    Args:
      eta: 0 draws no noise; 1 is the default of both.
      s_noise: factor of the noise drawn.

    Raises:
      ValueError: for a negative argument, or eta > 1, where f_down may fall below the clean end.
    """
    check_amount("s_noise", s_noise)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected a number from 0 (deterministic) to 1, got {eta}")

    def init(x, levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        f, f_next = (a.sigma / (a.alpha + a.sigma) for a in (level, following))
        down = f_next * (1 + eta * (divide(f_next, f) - 1))
        # alpha' s_down in a form that needs no division by alpha: s_down = f_down / (1 - f_down).
        reach = following.alpha * divide(down, 1 - down)
        reach = xp.where(down == f_next, following.sigma, reach)
        x_coef = divide(reach, level.sigma)
        std = s_noise * xp.sqrt(xp.maximum(following.sigma**2 - reach**2, 0.0))
        return (), {"x": x_coef, "x0": following.alpha - x_coef * level.alpha, "draw": std}

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        x = _affine(at, x, prediction)
        return (x if eta == 0 else x + at.coef["draw"] * at.draw(0)), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n)


def ancestral_ddpm(variance: str = "beta_tilde") -> Solver:
    """DDPM's ancestral sampling over any grid, for any alpha and sigma; order 1.

    The mean of the posterior q(x' | x, x0) (Ho et al. 2020, arXiv:2006.11239, Eq. 7) and one of four variances. `beta`
    on a variance-exploding grid is the reverse diffusion predictor of Song et al. 2021 (arXiv:2011.13456, Eq. 46). The
    step to sigma = 0 draws nothing. (The name `ddpm` is that of the schedule.)

    Args:
      variance: "beta_tilde", the posterior's own, `sigma'^2 (1 - r^2)` (diffusers: fixed_small, fixed_small_log);
        "beta", that of the forward step, `sigma^2 (1 - r^2)` (fixed_large, fixed_large_log); "learned_range",
        `exp(v log beta + (1 - v) log beta_tilde)` with `v = (aux + 1) / 2` (Nichol and Dhariwal 2021,
        arXiv:2102.09672, Eq. 15); "learned", `aux` itself. `aux` is `Prediction.aux`, an array of the shape of x: the
        network's second half, which `denoiser` passes on when `f` returns `(out, aux)`.

    Raises:
      ValueError: for an unknown variance; in sampling, for a learned one if `aux` is no array of the shape of x.
    """
    check_known("variance", variance, VARIANCES)

    def init(x, levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        r = shrink(level, following)
        beta, tilde = level.sigma**2 * (1 - r**2), following.sigma**2 * (1 - r**2)
        draws = (following.sigma > 0) & (r < 1)
        log = lambda a: xp.log(xp.where(draws, a, 1.0))
        coef = {"x": divide(following.sigma, level.sigma) * r, "x0": following.alpha * (1 - r**2)}
        if variance == "learned_range":
            return (), coef | {"hi": log(beta), "lo": log(tilde), "draws": draws}
        if variance == "learned":
            return (), coef | {"draws": draws}
        return (), coef | {"draw": xp.sqrt(xp.where(draws, xp.maximum({"beta": beta}.get(variance, tilde), 0.0), 0.0))}

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        mean = _affine(at, x, prediction)
        if variance.startswith("learned"):
            std = _learned_std(prediction.aux, x, at.coef, variance)
        else:
            std = at.coef["draw"]
        return mean + std * at.draw(0), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n)


def _learned_std(aux, x, coef, variance):
    if getattr(aux, "shape", None) != x.shape:
        raise ValueError(
            f"variance={variance!r} reads Prediction.aux, expected an array of shape {x.shape}; got "
            f"{getattr(aux, 'shape', aux)!r}. Let the network return (out, aux), or choose 'beta' or 'beta_tilde'"
        )
    if variance == "learned":
        positive = jnp.where(coef["draws"], aux, 1.0)
        return jnp.where(coef["draws"], jnp.sqrt(positive), 0.0)
    v = (aux + 1) / 2
    return jnp.where(coef["draws"], jnp.exp((v * coef["hi"] + (1 - v) * coef["lo"]) / 2), 0.0)


def paired(solver: Solver, x: Array, start: Level, end: Level):
    """The memory and the coefficients `[n, ...]` of a single-step solver that goes from start[i] to end[i].

    Raises:
      ValueError: for a solver with memory between steps, which has no meaning on steps that do not follow each other.
    """
    n = start.t.shape[0]
    xp = namespace(*start, *end)
    ends = Level(*(xp.stack([a, b], axis=1) for a, b in zip(start, end, strict=True)))
    if xp is np:
        inner = [solver.init(x, ends.at(i)) for i in range(n)]
        memory = inner[0][0]
        coef = jax.tree.map(lambda *rows: np.concatenate(rows), *(c for _, c in inner))
    else:
        memory = solver.init(x, ends.at(0))[0]
        coef = jax.tree.map(lambda a: a[:, 0], jax.vmap(lambda pair: solver.init(x, pair)[1])(ends))
    if jax.tree.leaves(memory):
        raise ValueError("needs a solver without memory between steps, such as heun('alpha') or euler()")
    return memory, coef


def ancestral(solver: Solver, schedule: Schedule, eta: float = 1.0, s_noise: float = 1.0) -> Solver:
    """A single-step solver made ancestral: down to s_down with it, then noise up to s'.

    With Euler it is `euler_ancestral`; with the midpoint rule in s, `sample_dpm_2_ancestral` of k-diffusion; with
    DPM-Solver++(2S), `sample_dpmpp_2s_ancestral`. s_down lies between grid points, so the schedule is needed.

    Args:
      solver: without memory between steps.
      schedule: that the grid was made from.
      eta: as in `euler_ancestral`.
      s_noise: factor of the noise drawn.

    Raises:
      ValueError: for a negative argument; at the start of sampling, for a solver with memory.
    """
    check_amount("eta", eta)
    check_amount("s_noise", s_noise)

    def init(x, levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        r = shrink(level, following)
        up = xp.minimum(1.0, eta * xp.sqrt(xp.maximum(1 - r**2, 0.0)))
        keep = xp.sqrt(1 - up**2)
        moved = (keep < 1) & (following.alpha > 0)
        with np.errstate(divide="ignore"):
            s_down = xp.where(moved, divide(following.sigma, following.alpha) * keep, 1.0)
            down = schedule.at_logsnr(-2 * xp.log(s_down))
        down = Level(*(xp.where(moved, a, b) for a, b in zip(down, following, strict=True)))
        memory, inner = paired(solver, x, level, down)
        grown = xp.where(moved, divide(following.alpha, down.alpha), 1.0)
        return memory, {"inner": inner, "down": down, "x": grown, "draw": s_noise * following.sigma * up}

    def step(denoise, x, memory, at: Step):
        inner = Step(at.index, at.level, at.coef["down"], at.coef["inner"], lambda j: at.draw(j + 1))
        x, memory, prediction = solver.step(denoise, x, memory, inner)
        return at.coef["x"] * x + at.coef["draw"] * at.draw(0), memory, prediction

    return Solver(init, step, order=1, nfe=solver.nfe)


def churn(
    solver: Solver,
    schedule: Schedule,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> Solver:
    """Adds noise before each step of a single-step solver (Karras et al. 2022, arXiv:2206.00364, Algorithm 2).

    `s = sigma / alpha` grows to `s (1 + gamma)` with `gamma = min(s_churn / n, sqrt(2) - 1)` where `s_tmin <= s <=
    s_tmax`. The raised levels lie between grid points, so the schedule is needed. Defaults are those of the paper for
    ImageNet-64 (Table 5).

    Args:
      solver: without memory between steps: `euler()`, `heun("alpha")`.
      schedule: that the grid was made from.
      s_churn: total noise over all steps.
      s_tmin: smallest s at which noise is added.
      s_tmax: largest one.
      s_noise: standard deviation of the noise added.

    Raises:
      ValueError: for a negative amount, unless `s_tmin <= s_tmax`, or, at the start of sampling, for a solver with
        memory.
    """
    check_amount("s_churn", s_churn)
    check_amount("s_noise", s_noise)
    if not 0 <= s_tmin <= s_tmax:
        raise ValueError(f"churn: expected 0 <= s_tmin <= s_tmax, got {s_tmin} and {s_tmax}")

    def raised(levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        n = xp.sum(moving(levels))
        s = xp.where(level.alpha > 0, divide(level.sigma, level.alpha), xp.inf)
        gamma = xp.where((s >= s_tmin) & (s <= s_tmax), xp.minimum(s_churn / xp.maximum(n, 1), 2**0.5 - 1), 0.0)
        finite = xp.where((s > 0) & xp.isfinite(s), s, 1.0)
        moved = schedule.at_logsnr(-2 * xp.log(finite * (1 + gamma)))
        hat = Level(*(xp.where(gamma > 0, a, b) for a, b in zip(moved, level, strict=True)))
        std = s_noise * finite * xp.sqrt(gamma * (2 + gamma))
        grown = hat.alpha / xp.where(level.alpha > 0, level.alpha, 1.0)
        return hat, {"x": xp.where(gamma > 0, grown, 1.0), "draw": hat.alpha * std}

    def init(x, levels):
        hat, coef = raised(levels)
        memory, inner = paired(solver, x, hat, pairs(levels)[1])
        return memory, coef | {"hat": hat, "inner": inner}

    def step(denoise, x, memory, at: Step):
        x = at.coef["x"] * x + at.coef["draw"] * at.draw(0)
        inner = Step(at.index, at.coef["hat"], at.next, at.coef["inner"], lambda j: at.draw(j + 1))
        return solver.step(denoise, x, memory, inner)

    return Solver(init, step, order=solver.order, nfe=solver.nfe)
