"""Layers as Flax NNX modules, and the pattern that turns a module into a pair of pure functions."""

from diffjax.nn.adaln import DiTBlock, MLPBlock, modulation
from diffjax.nn.attention import IMPLEMENTATIONS, PixelAttention, SelfAttention, attend
from diffjax.nn.conv import Conv, ResBlock, double, halve
from diffjax.nn.embed import TIME_EMBEDS, Condition, fourier, sincos_2d, sinusoidal
from diffjax.nn.functional import Functional, functional, rngs_of
from diffjax.nn.linear import Linear
from diffjax.nn.norm import GroupNorm, dropout, group_norm, layer_norm, modulate, plus, times, widen
from diffjax.nn.remat import POLICIES, policy_name, remat
from diffjax.nn.taps import scope, tap, tapped

__all__ = [
    "IMPLEMENTATIONS",
    "POLICIES",
    "TIME_EMBEDS",
    "Condition",
    "Conv",
    "DiTBlock",
    "Functional",
    "GroupNorm",
    "Linear",
    "MLPBlock",
    "PixelAttention",
    "ResBlock",
    "SelfAttention",
    "attend",
    "double",
    "dropout",
    "fourier",
    "functional",
    "group_norm",
    "halve",
    "layer_norm",
    "modulate",
    "modulation",
    "plus",
    "policy_name",
    "remat",
    "rngs_of",
    "scope",
    "sincos_2d",
    "sinusoidal",
    "tap",
    "tapped",
    "times",
    "widen",
]
