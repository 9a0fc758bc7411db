"""A residual perceptron over all pixels at once, for small images and for tests."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models.checks import check_common, check_least, network
from diffjax.nn import Condition, MLPBlock, functional, layer_norm, modulate, modulation

RULES = (
    (r"(^|/)(up|inp|hidden)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(down|out|modulation)/kernel$", ("tensor", "fsdp")),
    (r"(^|/)embedding$", (None, "fsdp")),
    (r"(^|/)bias$", ()),
)


class MLP(nnx.Module):
    """The module of `mlp`."""

    def __init__(self, shape, num_classes, width, depth, hidden, dropout, dtype, time, rngs):
        pixels = math.prod(shape)
        self.cond = Condition(width, num_classes, **time, dtype=dtype, rngs=rngs)
        self.inp = nnx.Linear(pixels, width, dtype=dtype, rngs=rngs)
        settings = dict(cond_width=width, dropout_rate=dropout, activation=nnx.silu, dtype=dtype)
        blocks = {f"block{i}": MLPBlock(width, hidden, **settings, rngs=rngs) for i in range(depth)}
        self.blocks, self.depth = nnx.Dict(blocks), depth
        self.modulation = modulation(width, width, 2, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.out = nnx.Linear(width, pixels, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x, t, y, *, key=None):
        cond = nnx.silu(self.cond(t, y))
        h = self.inp(x.reshape(len(x), -1))
        for i in range(self.depth):
            h = self.blocks[f"block{i}"](h, cond, None if key is None else jax.random.fold_in(key, i))
        shift, scale = jnp.split(self.modulation(cond), 2, axis=-1)
        return self.out(modulate(layer_norm(h), shift, scale)).reshape(x.shape).astype(jnp.float32)


def mlp(
    *, shape: tuple[int, int, int], num_classes: int = 0, width: int = 256, depth: int = 3, expand: int = 2,
    dropout: float = 0.0, dtype: str = "float32", time_embed: str = "sinusoidal", time_scale: float = 1000.0,
) -> Model:  # fmt: skip
    """A residual perceptron on flattened images, conditioned by adaLN-Zero; its output starts at zero.

    Args:
      shape: `(H, W, C)` of the images.
      num_classes: 0 for an unconditional network, whose `y` is ignored.
      width, depth, expand: width of the residual stream, number of blocks, hidden width of a block over `width`.
      dropout: rate inside the blocks, in calls with a key.
      dtype: of the computation: "float32", "bfloat16" or "float16"; parameters are float32.
      time_embed, time_scale: "sinusoidal" or "fourier", and the factor of the time inside (1000 for times in [0, 1]).

    Returns:
      A `Model`: `apply(params, x [B, H, W, C], t [B], y [B] int or None, *, key=None) -> [B, H, W, C] float32`. Without
      labels, or with `y == num_classes`, the network is unconditional; a key turns dropout on.

    Raises:
      ValueError: for settings that make no network.
    """
    config = dict(locals(), name="mlp", shape=tuple(shape))
    check_common("mlp", shape, num_classes, dropout, dtype, time_embed, width)
    check_least("mlp", 0, depth=depth)
    check_least("mlp", 1, expand=expand)
    time = dict(waves=width, time_embed=time_embed, time_scale=time_scale)
    dtype = jnp.dtype(dtype)
    module = functional(lambda rngs: MLP(shape, num_classes, width, depth, expand * width, dropout, dtype, time, rngs))
    return Model(*network("mlp", tuple(shape), module), config=config, rules=RULES)
