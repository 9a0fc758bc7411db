"""Solvers: one function each, from a few settings to `Solver(init, step, order, nfe)`."""

from diffjax.sampling.solvers.adams import adams, jump
from diffjax.sampling.solvers.basic import ddim, dpm2, euler, heun, midpoint, rk4
from diffjax.sampling.solvers.brownian import brownian
from diffjax.sampling.solvers.fewstep import consistency, consistency_head, flow_map, lcm, mean_flow, shortcut, tcd
from diffjax.sampling.solvers.langevin import annealed_langevin, euler_maruyama, predictor_corrector
from diffjax.sampling.solvers.multistep import deis, dpm_multistep, dpmpp_2m, dpmpp_3m, lms, unipc
from diffjax.sampling.solvers.pndm import ipndm, plms, pndm
from diffjax.sampling.solvers.sde_adams import sa_solver, sde_adams
from diffjax.sampling.solvers.sde_dpm import inner_levels, sde_dpm_2m, sde_dpmpp, sde_dpmpp_2m, sde_dpmpp_3m
from diffjax.sampling.solvers.singlestep import dpm_solver, dpmpp_2s
from diffjax.sampling.solvers.stochastic import ancestral, ancestral_ddpm, churn, euler_ancestral, euler_ancestral_rf

SOLVERS = {
    "adams": adams,
    "ancestral_ddpm": ancestral_ddpm,
    "annealed_langevin": annealed_langevin,
    "consistency": consistency,
    "ddim": ddim,
    "deis": deis,
    "dpm2": dpm2,
    "dpm_multistep": dpm_multistep,
    "dpm_solver": dpm_solver,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3m": dpmpp_3m,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "euler_ancestral_rf": euler_ancestral_rf,
    "euler_maruyama": euler_maruyama,
    "heun": heun,
    "ipndm": ipndm,
    "lcm": lcm,
    "lms": lms,
    "midpoint": midpoint,
    "plms": plms,
    "pndm": pndm,
    "rk4": rk4,
    "sa_solver": sa_solver,
    "sde_adams": sde_adams,
    "sde_dpm_2m": sde_dpm_2m,
    "sde_dpmpp": sde_dpmpp,
    "sde_dpmpp_2m": sde_dpmpp_2m,
    "sde_dpmpp_3m": sde_dpmpp_3m,
    "tcd": tcd,
    "unipc": unipc,
}

__all__ = [
    "SOLVERS",
    "adams",
    "ancestral",
    "ancestral_ddpm",
    "annealed_langevin",
    "brownian",
    "churn",
    "consistency",
    "consistency_head",
    "ddim",
    "deis",
    "dpm2",
    "dpm_multistep",
    "dpm_solver",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "euler",
    "euler_ancestral",
    "euler_ancestral_rf",
    "euler_maruyama",
    "flow_map",
    "heun",
    "inner_levels",
    "ipndm",
    "jump",
    "lcm",
    "lms",
    "mean_flow",
    "midpoint",
    "plms",
    "pndm",
    "predictor_corrector",
    "rk4",
    "sa_solver",
    "sde_adams",
    "sde_dpm_2m",
    "sde_dpmpp",
    "sde_dpmpp_2m",
    "sde_dpmpp_3m",
    "shortcut",
    "tcd",
    "unipc",
]
