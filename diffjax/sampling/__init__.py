"""Samplers: the loop, the solvers that it runs, and what is built on both."""

from diffjax.sampling import solvers
from diffjax.sampling.adaptive import Stats, adaptive, flow_time, from_flow, probability_flow, to_flow
from diffjax.sampling.diagnose import Moments, gaussian_kl, gaussian_moments
from diffjax.sampling.edit import inpaint, noised, repaint, repaint_levels, sdedit, start_from
from diffjax.sampling.export import load_sampler, save_sampler
from diffjax.sampling.fit import fit_steps
from diffjax.sampling.inversion import ddim_inversion, decode, encode, inverse, slerp
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
from diffjax.sampling.product import product, self_conditioned
from diffjax.sampling.recommend import recommend
from diffjax.sampling.solvers import *  # noqa: F403
from diffjax.sampling.steer import smc
from diffjax.sampling.steps import Steps, load_steps, save_steps

__all__ = [
    *solvers.__all__,
    "ELBO",
    "Moments",
    "Stats",
    "StepInfo",
    "Steps",
    "adaptive",
    "bits_per_dim",
    "check_grid",
    "ddim_inversion",
    "decode",
    "dequantize",
    "discretized_decoder",
    "elbo",
    "encode",
    "fit_steps",
    "flow_time",
    "from_flow",
    "gaussian_decoder",
    "gaussian_kl",
    "gaussian_moments",
    "gaussian_prior",
    "inpaint",
    "inverse",
    "load_sampler",
    "load_steps",
    "log_likelihood",
    "noised",
    "normal",
    "prior",
    "probability_flow",
    "product",
    "recommend",
    "repaint",
    "repaint_levels",
    "sample",
    "save_sampler",
    "save_steps",
    "sdedit",
    "self_conditioned",
    "slerp",
    "smc",
    "start_from",
    "to_flow",
    "vlb",
]
