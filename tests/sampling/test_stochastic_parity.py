"""Stochastic and few-step solvers against diffusers 0.42.1 and k-diffusion on one toy network and given noise.

The golden file is written by make_stochastic_golden.py, which needs torch; this test does not.
"""

from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import diffjax as dj

GOLDEN = np.load(Path(__file__).parent / "stochastic_golden.npz")
NAMES = sorted({key.rsplit("/", 1)[0] for key in GOLDEN.files})
VE = dj.EDM()
TABLE = dj.ddpm()
ETAS = {"1.0": {"eta": 1.0, "s_noise": 1.0}, "0.6": {"eta": 0.6, "s_noise": 1.1}}


def k_denoise(x, level):
    x0 = jnp.tanh(x) / (1 + level.sigma**2)
    return dj.Prediction(x0, (x - x0) / level.sigma)


def eps_denoise(x, level, *, scale_in=lambda level: 1.0, head=dj.EPS):
    """The toy network of the generator; `scale_in` is what a scheduler's scale_model_input multiplies by."""
    x_in = x * scale_in(level)
    out = jnp.sin(0.7 * x_in) + level.t / 2000
    return head.split(out, x, level)._replace(aux=jnp.cos(x_in))


VE_SCALE = partial(eps_denoise, scale_in=lambda level: (level.sigma**2 + 1) ** -0.5)


def flow_denoise(x, level):
    return eps_denoise(x, level, head=dj.FLOW)


def cm_denoise(x, level):
    head = dj.consistency_head(0.002, 0.5)
    return eps_denoise(x, level, scale_in=head.scale_in, head=head)


class Midpoint:
    """The midpoint rule in s with the inner level at the geometric mean: DPM-2 of k-diffusion, for alpha = 1."""

    @staticmethod
    def solver():
        def init(x, levels):
            s = np.sqrt(levels.sigma[:-1] * levels.sigma[1:])
            return (), {"mid": VE(s), "two": levels.sigma[1:] > 0}

        def step(denoise, x, memory, at):
            first = denoise(x, at.level)
            mid = at.coef["mid"]
            x_2 = x + first.eps * (mid.sigma - at.level.sigma)
            slope = jnp.where(at.coef["two"], denoise(x_2, mid).eps, first.eps)
            return x + slope * (at.next.sigma - at.level.sigma), memory, first

        return dj.Solver(init, step, 2, lambda n: 2 * n)


def cases():
    for tag, options in ETAS.items():
        yield f"k/euler_ancestral/{tag}", dj.euler_ancestral(**options), k_denoise, 1
        yield f"k/dpmpp_3m_sde/{tag}", dj.sde_dpmpp_3m(**options), k_denoise, 1
        yield f"k/dpmpp_sde/{tag}", dj.sde_dpmpp(VE, **options), k_denoise, 2
        yield f"k/dpm_2_ancestral/{tag}", dj.ancestral(Midpoint.solver(), VE, **options), k_denoise, 1
        for kind in ("midpoint", "heun"):
            solver = dj.sde_dpmpp_2m(**options, solver_type=kind)
            yield f"k/dpmpp_2m_sde_{kind}/{tag}", solver, k_denoise, 1
    for theirs, ours in (
        ("fixed_small", "beta_tilde"),
        ("fixed_small_log", "beta_tilde"),
        ("fixed_large", "beta"),
        ("learned_range", "learned_range"),
    ):
        yield f"d/ddpm_{theirs}", dj.ancestral_ddpm(ours), eps_denoise, 1
    yield "d/euler_ancestral", dj.euler_ancestral(), VE_SCALE, 1
    for kind in ("midpoint", "heun"):
        # With fewer than 15 steps diffusers' default takes the last ones with lower orders.
        yield f"d/sde-dpmsolver++_1_{kind}", dj.euler_ancestral(), eps_denoise, 1
        yield f"d/sde-dpmsolver++_2_{kind}", dj.sde_dpmpp_2m(solver_type=kind, lower_order_final=1), eps_denoise, 1
        solver = dj.sde_dpmpp_3m(solver_type=kind, curvature="diffusers", lower_order_final=2)
        yield f"d/sde-dpmsolver++_3_{kind}", solver, eps_denoise, 1
        for order in (1, 2):
            solver = dj.sde_dpm_2m(kind, order=order, lower_order_final=1)
            yield f"d/sde-dpmsolver_{order}_{kind}", solver, eps_denoise, 1
    yield "d/lcm", dj.lcm(), eps_denoise, 1
    for eta in (0.0, 0.3, 1.0):
        yield f"d/tcd_{eta}", dj.tcd(TABLE, eta), eps_denoise, 1
    yield "d/cm", dj.consistency(0.002), cm_denoise, 1
    yield "d/flow_stochastic", dj.consistency(), flow_denoise, 1
    yield "d/rf_1.0", dj.euler_ancestral_rf(), flow_denoise, 1
    for tau, flag in ((1.0, "one"), (0.5, "half")):
        for predictor, corrector in ((1, 1), (2, 2), (3, 3), (3, 4), (2, 1)):
            yield f"d/sa_{flag}_{predictor}{corrector}", dj.sa_solver(predictor, corrector, tau), eps_denoise, 1
    yield "d/rf_0.4", dj.euler_ancestral_rf(0.4, 0.9), flow_denoise, 1


CASES = {name: rest for name, *rest in cases()}


@pytest.mark.parametrize("name", CASES)
def test_parity(name, x64):
    solver, denoise, per_step = CASES[name]
    case = {key: GOLDEN[f"{name}/{key}"] for key in ("levels", "x", "noise", "out")}
    levels = dj.Level(*case["levels"])
    if name.startswith("d/tcd"):
        # The table in float64: two roundings of the last level would differ by what the poison below makes visible.
        levels = dj.custom(TABLE, levels.t)
    drawn = jnp.asarray(case["noise"])

    def noise(i, j):
        # Two draws a step: k-diffusion draws the inner one first. Past the last draw the coefficient has to be 0.
        k = i if per_step == 1 else 2 * i + 1 - j
        return jnp.take(drawn, k, axis=0, mode="fill", fill_value=1e3)

    out = dj.sample(solver, denoise, jnp.asarray(case["x"], float), levels, noise=noise, loop="unroll")
    # The references run in float32 (k-diffusion in float64); a run has at most eight steps.
    tolerance = 1e-12 if name.startswith("k/") else 2e-5 * max(1.0, np.abs(case["out"]).max())
    np.testing.assert_allclose(out, case["out"], atol=tolerance, rtol=0)
