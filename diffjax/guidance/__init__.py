"""Guidance: functions from a denoiser to a denoiser; what keeps state across steps, from a solver to a solver."""

from diffjax.guidance.auto import autoguidance, perturbed
from diffjax.guidance.blend import join
from diffjax.guidance.cfg import cfg, cfg_pp, compose, negative, rescale, rising
from diffjax.guidance.classifier import classifier, energy
from diffjax.guidance.interval import interval, split_interval
from diffjax.guidance.inverse import ddnm, ddrm, dps, dps_update, pigdm
from diffjax.guidance.operators import LinearOperator, average_pool, mask_operator, matrix_operator
from diffjax.guidance.projected import apg, momentum
from diffjax.guidance.threshold import clip_x0, dynamic_threshold
from diffjax.guidance.zero import cfg_zero, zero_init

__all__ = [
    "LinearOperator",
    "apg",
    "autoguidance",
    "average_pool",
    "cfg",
    "cfg_pp",
    "cfg_zero",
    "classifier",
    "clip_x0",
    "compose",
    "ddnm",
    "ddrm",
    "dps",
    "dps_update",
    "dynamic_threshold",
    "energy",
    "interval",
    "join",
    "mask_operator",
    "matrix_operator",
    "momentum",
    "negative",
    "perturbed",
    "pigdm",
    "rescale",
    "rising",
    "split_interval",
    "zero_init",
]
