"""Samplers: the loop and the solvers that it runs."""

from diffjax.sampling.fewstep import consistency, consistency_head, flow_map, lcm, mean_flow, shortcut, tcd
from diffjax.sampling.loop import StepInfo, check_grid, normal, prior, sample
from diffjax.sampling.multistep import dpmpp_2m
from diffjax.sampling.product import product
from diffjax.sampling.sde_dpm import inner_levels, sde_dpm_2m, sde_dpmpp, sde_dpmpp_2m, sde_dpmpp_3m
from diffjax.sampling.solvers import ddim, euler, heun
from diffjax.sampling.stochastic import ancestral, ancestral_ddpm, churn, euler_ancestral, euler_ancestral_rf

SOLVERS = {
    "ancestral_ddpm": ancestral_ddpm,
    "consistency": consistency,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "euler_ancestral_rf": euler_ancestral_rf,
    "heun": heun,
    "lcm": lcm,
    "sde_dpm_2m": sde_dpm_2m,
    "sde_dpmpp": sde_dpmpp,
    "sde_dpmpp_2m": sde_dpmpp_2m,
    "sde_dpmpp_3m": sde_dpmpp_3m,
    "tcd": tcd,
}

__all__ = [
    "SOLVERS",
    "StepInfo",
    "ancestral",
    "ancestral_ddpm",
    "check_grid",
    "churn",
    "consistency",
    "consistency_head",
    "ddim",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "euler_ancestral_rf",
    "flow_map",
    "heun",
    "inner_levels",
    "lcm",
    "mean_flow",
    "normal",
    "prior",
    "product",
    "sample",
    "sde_dpm_2m",
    "sde_dpmpp",
    "sde_dpmpp_2m",
    "sde_dpmpp_3m",
    "shortcut",
    "tcd",
]
