"""Blocks that several families of checkpoints share; their parameters have the checkpoints' names."""

from diffjax.nn.blocks.attention import Attention
from diffjax.nn.blocks.embed import Embedding, PatchEmbed, Projection, TimestepLabelEmbedding, grid_positions
from diffjax.nn.blocks.feedforward import FEEDFORWARDS, FeedForward
from diffjax.nn.blocks.resnet import Downsample, ResnetBlock, Upsample

__all__ = [
    "FEEDFORWARDS",
    "Attention",
    "Downsample",
    "Embedding",
    "FeedForward",
    "PatchEmbed",
    "Projection",
    "ResnetBlock",
    "TimestepLabelEmbedding",
    "Upsample",
    "grid_positions",
]
