"""Samplers: the loop and the solvers that it runs."""

from diffjax.sampling.loop import StepInfo, check_grid, normal, prior, sample
from diffjax.sampling.multistep import dpmpp_2m
from diffjax.sampling.product import product
from diffjax.sampling.solvers import ddim, euler, heun
from diffjax.sampling.stochastic import churn

SOLVERS = {"ddim": ddim, "dpmpp_2m": dpmpp_2m, "euler": euler, "heun": heun}

__all__ = [
    "SOLVERS",
    "StepInfo",
    "check_grid",
    "churn",
    "ddim",
    "dpmpp_2m",
    "euler",
    "heun",
    "normal",
    "prior",
    "product",
    "sample",
]
