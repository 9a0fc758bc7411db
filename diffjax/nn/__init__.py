"""Layers as Flax NNX modules, and the pattern that turns a module into a pair of pure functions."""

from diffjax.nn.adaln import DiTBlock, MLPBlock, modulation
from diffjax.nn.attention import PixelAttention, SelfAttention
from diffjax.nn.conv import ResBlock, conv, double, halve
from diffjax.nn.embed import TIME_EMBEDS, Condition, fourier, sincos_2d, sinusoidal
from diffjax.nn.functional import Functional, functional
from diffjax.nn.norm import GroupNorm, dropout, group_norm, layer_norm, modulate

__all__ = [
    "TIME_EMBEDS",
    "Condition",
    "DiTBlock",
    "Functional",
    "GroupNorm",
    "MLPBlock",
    "PixelAttention",
    "ResBlock",
    "SelfAttention",
    "conv",
    "double",
    "dropout",
    "fourier",
    "functional",
    "group_norm",
    "halve",
    "layer_norm",
    "modulate",
    "modulation",
    "sincos_2d",
    "sinusoidal",
]
