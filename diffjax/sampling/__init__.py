"""Samplers: the loop and the solvers that it runs."""

from diffjax.sampling.adams import adams, jump
from diffjax.sampling.adaptive import Stats, adaptive, flow_time, from_flow, probability_flow, to_flow
from diffjax.sampling.brownian import brownian
from diffjax.sampling.diagnose import Moments, gaussian_kl, gaussian_moments
from diffjax.sampling.edit import inpaint, noised, repaint, repaint_levels, sdedit, start_from
from diffjax.sampling.export import load_sampler, save_sampler
from diffjax.sampling.fewstep import consistency, consistency_head, flow_map, lcm, mean_flow, shortcut, tcd
from diffjax.sampling.fit import Steps, fit_steps, load_steps, save_steps
from diffjax.sampling.inversion import ddim_inversion, decode, encode, inverse, slerp
from diffjax.sampling.langevin import annealed_langevin, euler_maruyama, predictor_corrector
from diffjax.sampling.likelihood import (
    ELBO,
    bits_per_dim,
    dequantize,
    discretized_decoder,
    elbo,
    gaussian_decoder,
    gaussian_prior,
    log_likelihood,
    vlb,
)
from diffjax.sampling.loop import StepInfo, check_grid, normal, prior, sample
from diffjax.sampling.multistep import deis, dpm_multistep, dpmpp_2m, dpmpp_3m, lms
from diffjax.sampling.pndm import ipndm, plms, pndm
from diffjax.sampling.product import product
from diffjax.sampling.recommend import recommend
from diffjax.sampling.sde_adams import sa_solver, sde_adams
from diffjax.sampling.sde_dpm import inner_levels, sde_dpm_2m, sde_dpmpp, sde_dpmpp_2m, sde_dpmpp_3m
from diffjax.sampling.singlestep import dpm_solver, dpmpp_2s
from diffjax.sampling.solvers import ddim, dpm2, euler, heun, midpoint, rk4
from diffjax.sampling.steer import smc
from diffjax.sampling.stochastic import ancestral, ancestral_ddpm, churn, euler_ancestral, euler_ancestral_rf
from diffjax.sampling.unipc import unipc

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
    "ELBO",
    "Moments",
    "SOLVERS",
    "Stats",
    "StepInfo",
    "Steps",
    "adams",
    "adaptive",
    "ancestral",
    "ancestral_ddpm",
    "annealed_langevin",
    "bits_per_dim",
    "brownian",
    "check_grid",
    "churn",
    "consistency",
    "consistency_head",
    "ddim",
    "ddim_inversion",
    "decode",
    "deis",
    "dequantize",
    "discretized_decoder",
    "dpm2",
    "dpm_multistep",
    "dpm_solver",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "elbo",
    "encode",
    "euler",
    "euler_ancestral",
    "euler_ancestral_rf",
    "euler_maruyama",
    "fit_steps",
    "flow_map",
    "flow_time",
    "from_flow",
    "gaussian_decoder",
    "gaussian_kl",
    "gaussian_moments",
    "gaussian_prior",
    "heun",
    "inner_levels",
    "inpaint",
    "inverse",
    "ipndm",
    "jump",
    "lcm",
    "lms",
    "load_sampler",
    "load_steps",
    "log_likelihood",
    "mean_flow",
    "midpoint",
    "noised",
    "normal",
    "plms",
    "pndm",
    "predictor_corrector",
    "prior",
    "probability_flow",
    "product",
    "recommend",
    "repaint",
    "repaint_levels",
    "rk4",
    "sa_solver",
    "sample",
    "save_sampler",
    "save_steps",
    "sde_adams",
    "sde_dpm_2m",
    "sde_dpmpp",
    "sde_dpmpp_2m",
    "sde_dpmpp_3m",
    "sdedit",
    "shortcut",
    "slerp",
    "smc",
    "start_from",
    "tcd",
    "to_flow",
    "unipc",
    "vlb",
]
