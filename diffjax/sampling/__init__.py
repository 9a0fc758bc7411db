"""Samplers: the loop and the solvers that it runs."""

from diffjax.sampling.loop import StepInfo, check_grid, normal, prior, sample
from diffjax.sampling.solvers import SOLVERS, churn, ddim, dpmpp_2m, euler, heun

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
    "sample",
]
