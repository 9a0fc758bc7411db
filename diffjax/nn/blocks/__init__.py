"""Blocks that several families of checkpoints share; their parameters have the checkpoints' names."""

from diffjax.nn.blocks.attention import MASKED, Attention, mask_bias
from diffjax.nn.blocks.embed import (
    Embedding,
    Fourier,
    Modulation,
    PatchEmbed,
    Projection,
    TimestepLabelEmbedding,
    TimeTextEmbedding,
    grid_positions,
    patch_conv,
)
from diffjax.nn.blocks.feedforward import FEEDFORWARDS, FeedForward
from diffjax.nn.blocks.joint import JointAttention
from diffjax.nn.blocks.resnet import Downsample, ResnetBlock, Upsample

__all__ = [
    "FEEDFORWARDS",
    "MASKED",
    "Attention",
    "Downsample",
    "Embedding",
    "FeedForward",
    "Fourier",
    "JointAttention",
    "Modulation",
    "PatchEmbed",
    "Projection",
    "ResnetBlock",
    "TimeTextEmbedding",
    "TimestepLabelEmbedding",
    "Upsample",
    "grid_positions",
    "mask_bias",
    "patch_conv",
]
