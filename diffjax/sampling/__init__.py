"""Samplers: the loop and the solvers that it runs."""

from diffjax.sampling.loop import StepInfo, normal, prior, sample
from diffjax.sampling.solvers import SOLVERS, churn, ddim, dpmpp_2m, euler, heun

__all__ = ["SOLVERS", "StepInfo", "churn", "ddim", "dpmpp_2m", "euler", "heun", "normal", "prior", "sample"]
