"""Guidance: functions from a denoiser to a denoiser; what keeps state across steps, from a solver to a solver."""

from diffjax.guidance.auto import autoguidance, perturbed
from diffjax.guidance.blend import join
from diffjax.guidance.cfg import cfg, cfg_pp, compose, negative, rescale, rising
from diffjax.guidance.classifier import classifier, energy
from diffjax.guidance.interval import interval, split_interval
from diffjax.guidance.projected import apg, momentum
from diffjax.guidance.threshold import clip_x0, dynamic_threshold
from diffjax.guidance.zero import cfg_zero, zero_init

__all__ = [
    "apg",
    "autoguidance",
    "cfg",
    "cfg_pp",
    "cfg_zero",
    "classifier",
    "clip_x0",
    "compose",
    "dynamic_threshold",
    "energy",
    "interval",
    "join",
    "momentum",
    "negative",
    "perturbed",
    "rescale",
    "rising",
    "split_interval",
    "zero_init",
]
