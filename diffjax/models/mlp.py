"""A residual perceptron over all pixels at once, for small images and for tests."""

from __future__ import annotations

import math
from functools import partial

import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models.checks import check_common, check_least, check_remat, ends_of, network
from diffjax.nn import (
    Condition,
    Linear,
    MLPBlock,
    fold_key,
    functional,
    layer_norm,
    modulate,
    modulation,
    scope,
    tap,
    widen,
)
from diffjax.nn import remat as checkpointed

RULES = (
    (r"(^|/)(up|hidden|modulation)/kernel$", ("fsdp", "tensor")),
    (r"(^|/)(down|out)/kernel$", ("tensor", "fsdp")),
    (r"^inp/kernel$|(^|/)embedding$", (None, "fsdp")),
    (r"/up/bias$", ("tensor",)),
    (r"(^|/)bias$", ()),
)
ACTIVATIONS = (
    (r"/hidden$", ("batch", "tensor")),
    (r"(^|/)(cond|modulation|tokens|down|out)$", ("batch",)),
    (r"^labels$", ()),
)


class MLP(nnx.Module):
    """The module of `mlp`.

    Activations: `cond` and `tokens [B, C]`, those of `MLPBlock` under `blocks/block0/` and so on, `modulation`.
    """

    def __init__(
        self, ends: tuple[tuple[int, ...], tuple[int, ...]], *, num_classes: int, width: int, depth: int, hidden: int,
        dropout: float, time: dict, dtype, remat: str, rngs,
    ):  # fmt: skip
        self.cond = Condition(width, num_classes, **time, dtype=dtype, rngs=rngs)
        self.inp = Linear(math.prod(ends[0]), width, dtype=dtype, rngs=rngs)
        settings = dict(cond_width=width, dropout_rate=dropout, activation=nnx.silu, dtype=dtype)
        blocks = {f"block{i}": MLPBlock(width, hidden, **settings, rngs=rngs) for i in range(depth)}
        self.blocks, self.depth, self.remat, self.shape = nnx.Dict(blocks), depth, remat, ends[1]
        self.modulation = modulation(width, width, 2, dtype=dtype, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.out = Linear(width, math.prod(ends[1]), kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, x, t, y, *, key=None):
        cond = tap("cond", nnx.silu(self.cond(t, y)))
        h = tap("tokens", self.inp(x.reshape(len(x), -1)))
        for i in range(self.depth):
            h = checkpointed(partial(self._block, i), self.remat)(h, cond, key)
        shift, scale = jnp.split(tap("modulation", self.modulation(cond)), 2, axis=-1)
        return widen(self.out(modulate(layer_norm(h), shift, scale)).reshape(len(x), *self.shape))

    def _block(self, i, h, cond, key):
        with scope(f"blocks/block{i}"):
            return self.blocks[f"block{i}"](h, cond, fold_key(key, i))


def mlp(
    *, shape: tuple[int, int, int], num_classes: int = 0, width: int = 256, depth: int = 3, expand: int = 2,
    dropout: float = 0.0, dtype: str = "float32", time_embed: str = "sinusoidal", time_scale: float = 1000.0,
    remat: str | bool = "none", extra_in: int = 0, extra_out: int = 0,
) -> Model:  # fmt: skip
    """A residual perceptron on flattened images, conditioned by adaLN-Zero; its output starts at zero.

    Args:
      shape: `(H, W, C)` of the images.
      num_classes: 0 for an unconditional network, whose `y` is ignored.
      width, depth, expand: width of the residual stream, number of blocks, hidden width of a block over `width`.
      dropout: rate inside the blocks, in calls with a key.
      dtype: of the computation: "float32", "bfloat16", "float16" or (in x64 mode) "float64"; parameters are float32.
      time_embed, time_scale: "sinusoidal" or "fourier", and the factor of the time inside (1000 for times in [0, 1]).
      remat: which activations of a block are computed again in the backward pass instead of kept, one of
        `diffjax.nn.POLICIES`: "none", "full", "dots", "dots_no_batch"; True is "full".
      extra_in, extra_out: channels of `x` and of the output beyond C, such as those of a second image beside it.

    Returns:
      A `Model`: `apply(params, x [B, H, W, C], t [B], y [B] int or None, *, key=None) -> [B, H, W, C] float32`. Without
      labels, or with `y == num_classes`, the network is unconditional; a key turns dropout on.

    Raises:
      ValueError: for settings that make no network.
    """
    config = dict(locals(), name="mlp", shape=tuple(shape))
    check_common("mlp", shape, num_classes, dropout=dropout, dtype=dtype, time_embed=time_embed, waves=width)
    check_least("mlp", 0, depth=depth)
    check_least("mlp", 1, expand=expand)
    time = dict(waves=width, time_embed=time_embed, time_scale=time_scale)
    ends = ends_of("mlp", shape, extra_in, extra_out)
    sizes = dict(num_classes=num_classes, width=width, depth=depth, hidden=expand * width)
    rest = dict(dropout=dropout, time=time, dtype=jnp.dtype(dtype), remat=check_remat("mlp", remat))
    module = functional(lambda rngs: MLP(ends, **sizes, **rest, rngs=rngs))
    return Model(*network("mlp", ends[0], module), config=config, rules=RULES, activations=ACTIVATIONS)
