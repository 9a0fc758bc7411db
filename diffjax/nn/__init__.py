"""Layers as Flax NNX modules, and the pattern that turns a module into a pair of pure functions."""

from diffjax.nn.adaln import DiTBlock, MLPBlock, modulation
from diffjax.nn.attention import IMPLEMENTATIONS, PixelAttention, SelfAttention, attend
from diffjax.nn.conv import Conv, ResBlock, double, halve
from diffjax.nn.embed import TIME_EMBEDS, Condition, fourier, sincos_2d, sinusoidal, timestep_waves
from diffjax.nn.functional import Fixed, Functional, functional, numbered, rngs_of
from diffjax.nn.keys import fold_key, split_key
from diffjax.nn.linear import ACTIVATIONS, Linear
from diffjax.nn.norm import (
    GroupNorm,
    LayerNorm,
    RMSNorm,
    dropout,
    group_norm,
    layer_norm,
    modulate,
    plus,
    rms_norm,
    times,
    widen,
)
from diffjax.nn.remat import POLICIES, policy_name, remat
from diffjax.nn.stack import Compute, parts_of, run_stack, stack
from diffjax.nn.taps import scope, tap, tapped

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "POLICIES",
    "TIME_EMBEDS",
    "Compute",
    "Condition",
    "Conv",
    "DiTBlock",
    "Fixed",
    "Functional",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "MLPBlock",
    "PixelAttention",
    "RMSNorm",
    "ResBlock",
    "SelfAttention",
    "attend",
    "double",
    "dropout",
    "fold_key",
    "fourier",
    "functional",
    "group_norm",
    "halve",
    "layer_norm",
    "modulate",
    "modulation",
    "numbered",
    "parts_of",
    "plus",
    "policy_name",
    "remat",
    "rms_norm",
    "rngs_of",
    "run_stack",
    "scope",
    "sincos_2d",
    "sinusoidal",
    "split_key",
    "stack",
    "tap",
    "tapped",
    "times",
    "timestep_waves",
    "widen",
]
