"""Langevin steps and the reverse SDE with any amount of noise: solvers that keep the marginals in the limit."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.types import Array, Level, Solver, Step, namespace
from diffjax.sampling.solvers.basic import divide, pairs
from diffjax.sampling.solvers.stochastic import check_amount, check_known

# w as a function of f = sigma / (alpha + sigma), the time of rectified flow.
DIFFUSIONS = {
    "sigma": lambda xp, f: f,
    "constant": lambda xp, f: xp.ones_like(f),
    "sbdm": lambda xp, f: 2 * f / xp.where(f < 1, 1 - f, 1.0),
    "decreasing": lambda xp, f: (xp.cos(xp.pi * (1 - f)) + 1) ** 2 / 4,
    "increasing-decreasing": lambda xp, f: xp.sin(xp.pi * (1 - f)) ** 2,
}


def euler_maruyama(diffusion: str | Callable[[Level], Array] = "sigma", scale: float = 1.0) -> Solver:
    """Euler-Maruyama for the reverse SDE with any diffusion coefficient; order 1, one call a step.

    In the coordinates of rectified flow, `z = x / (alpha + sigma)` and `f = sigma / (alpha + sigma)`, every SDE

        dz = (eps - x0) df + w / 2 (eps / f) df + sqrt(w |df|) noise,    w(f) >= 0,  df < 0,

    has the marginals of the flow, since `-eps / f` is the score (Ma et al. 2024, SiT, arXiv:2401.08740, Eq. 4 to 8;
    Song et al. 2021, arXiv:2011.13456, Eq. 6 for "sbdm"). Finite at both ends: w is evaluated where a step begins, and
    the step to sigma = 0 is x0 without noise (SiT's last step "Mean" keeps the drift instead). It needs small steps
    where `w |df| > f^2`.

    Args:
      diffusion: w: "sigma" f; "constant" 1; "sbdm" `2 f / (1 - f)`, that of the forward process, infinite at alpha = 0;
        "decreasing" `(1 + cos(pi (1 - f)))^2 / 4`; "increasing-decreasing" `sin(pi (1 - f))^2`; or a function of the
        levels [n] where steps begin. ("linear" of SiT is "sigma" on its linear path.)
      scale: factor of w, SiT's norm; 0 is the flow ODE.

    Raises:
      ValueError: for an unknown name or a negative scale.
    """
    if not callable(diffusion):
        check_known("diffusion", diffusion, tuple(DIFFUSIONS))
    check_amount("scale", scale)

    def init(x, levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        norm, norm_next = (a.alpha + a.sigma for a in (level, following))
        f, f_next = level.sigma / norm, following.sigma / norm_next
        w = scale * (diffusion(level) if callable(diffusion) else DIFFUSIONS[diffusion](xp, f))
        w = xp.where(following.sigma > 0, w, 0.0)
        df = f - f_next
        ratio = norm_next / norm
        return (), {
            "x": ratio,
            "x0": norm_next * df,
            "eps": -norm_next * df * (1 + w / 2 / xp.where(f > 0, f, 1.0)),
            "draw": norm_next * xp.sqrt(w * df),
        }

    def step(denoise, x, memory, at: Step):
        prediction = denoise(x, at.level)
        x = at.coef["x"] * x + at.coef["x0"] * prediction.x0 + at.coef["eps"] * prediction.eps
        return (x if scale == 0 else x + at.coef["draw"] * at.draw(0)), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n)


def _norm(a: Array) -> Array:
    """The Euclidean norm of each sample [B, 1, ...]."""
    return jnp.sqrt(jnp.sum(a**2, axis=tuple(range(1, a.ndim)), keepdims=True))


def predictor_corrector(predictor: Solver, snr: float = 0.16, n_steps: int = 1) -> Solver:
    """Adds Langevin steps at every level that a solver reaches, but not at sigma = 0.

    Song et al. 2021 (arXiv:2011.13456, Algorithms 4 and 5): `x + e score + sqrt(2 e) z` with `e = 2 (snr |z| /
    |score|)^2`. It departs in two ways: norms are of each sample, where the released code averages them over the batch,
    so that a sample does not depend on its batch; and the factor alpha_i of Algorithm 5, near 1, is left out.

    Args:
      predictor: any solver; the paper's are `ancestral_ddpm("beta")` and `euler_maruyama("sbdm")`.
      snr: signal-to-noise ratio of a step.
      n_steps: corrector steps a level, one call each.

    Raises:
      ValueError: for a negative snr or n_steps below 1.
    """
    check_amount("snr", snr)
    if not n_steps >= 1:
        raise ValueError(f"n_steps: expected a whole number >= 1, got {n_steps!r}")

    def init(x, levels):
        return predictor.init(x, levels)

    def step(denoise, x, memory, at: Step):
        inner = Step(at.index, at.level, at.next, at.coef, lambda j: at.draw(j + n_steps))
        x, memory, prediction = predictor.step(denoise, x, memory, inner)
        noisy = at.next.sigma > 0
        safe = Level(*(jnp.where(noisy, b, a) for a, b in zip(at.level, at.next, strict=True)))

        def correct(k, x):
            eps, z = denoise(x, safe).eps, at.draw(k)
            # With score = -eps / sigma the step is in ratios of norms: no division by sigma.
            size = snr * divide(_norm(z), _norm(eps))
            return x + safe.sigma * (2 * size * z - 2 * size**2 * eps)

        repeat = lambda x: jax.lax.fori_loop(0, n_steps, correct, x)
        return jax.lax.cond(noisy, repeat, lambda x: x, x), memory, prediction

    return Solver(init, step, order=predictor.order, nfe=lambda n: predictor.nfe(n) + n_steps * (n - 1))


def annealed_langevin(n_steps: int = 100, step_lr: float = 2e-5) -> Solver:
    """Annealed Langevin dynamics: `n_steps` steps at each level, then on to the next (NCSN).

    Song and Ermon 2019 (arXiv:1907.05600, Algorithm 1) for any alpha and sigma, in `y = x / alpha`: the step at s is
    `step_lr s^2 / s_last^2`, with s_last the last level that is not clean. The step to sigma = 0 is one denoising call
    (Song and Ermon 2020, arXiv:2006.09011, section 3.4); end the grid at s_last for Algorithm 1 as it is. From
    alpha = 0, x moves on scaled by sigma.

    Args:
      n_steps: T of the paper; one call each.
      step_lr: epsilon of the paper, at s_last.

    Raises:
      ValueError: for n_steps below 1 or a step_lr that is not positive.
    """
    if not n_steps >= 1:
        raise ValueError(f"n_steps: expected a whole number >= 1, got {n_steps!r}")
    if not step_lr > 0:
        raise ValueError(f"step_lr: expected a positive number, got {step_lr!r}")

    def init(x, levels):
        level, following = pairs(levels)
        xp = namespace(*levels)
        s = divide(levels.sigma, levels.alpha)
        last = xp.min(xp.where((levels.alpha > 0) & (s > 0), s, xp.inf))
        grown = divide(following.alpha, level.alpha)
        grown = xp.where(level.alpha > 0, grown, divide(following.sigma, level.sigma))
        rate = step_lr / last**2
        return (), {"x": grown, "eps": -rate / 2 * level.sigma, "draw": xp.sqrt(rate) * level.sigma}

    def step(denoise, x, memory, at: Step):
        def move(k, carry):
            x, _ = carry
            prediction = denoise(x, at.level)
            return x + at.coef["eps"] * prediction.eps + at.coef["draw"] * at.draw(k), prediction

        x, prediction = jax.lax.fori_loop(1, n_steps, move, move(0, (x, None)))

        def clean(x):
            return at.next.alpha * denoise(x, at.level).x0

        return jax.lax.cond(at.next.sigma > 0, lambda x: at.coef["x"] * x, clean, x), memory, prediction

    return Solver(init, step, order=1, nfe=lambda n: n * n_steps + 1)
