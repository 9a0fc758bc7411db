"""`T2IAdapter`: a small network that turns a picture into features for each level of a U-Net.

Mou et al. 2023, "T2I-Adapter", arXiv:2302.08453. It does not see the time: its features are computed once for a sample.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.nn import Compute, Conv, remat, scope, tap, widen
from diffjax.nn.conv import unshuffle

KIND = "T2IAdapter"
TYPES = ("full_adapter", "full_adapter_xl", "light_adapter")
RULES = (
    (r"/block2/kernel$", (None, None, "tensor", "fsdp")),
    (r"/kernel$", (None, None, "fsdp", "tensor")),
    (r"/block1/bias$", ("tensor",)),
    (r"/bias$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `T2IAdapter`, with its defaults."""

    in_channels: int = 3
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    num_res_blocks: int = 2
    downscale_factor: int = 8
    adapter_type: str = "full_adapter"


def halve(x: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels; at an odd side of those that are there."""
    ones = jnp.ones((1, *x.shape[1:3], 1), x.dtype)
    pads = ((0, 0), *((0, n % 2) for n in x.shape[1:3]), (0, 0))
    sums = (jax.lax.reduce_window(a, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), pads) for a in (x, ones))
    return next(sums) / next(sums)


class Block(nnx.Module):
    """Residual convolutions at one resolution; `half`: half of that of the input."""

    def __init__(
        self, channels_in: int, channels: int, layers: int, *, half: bool, light: bool, compute: Compute, rngs
    ):  # fmt: skip
        given, inner = dict(dtype=compute.dtype, rngs=rngs), channels // 4 if light else channels
        self.in_conv = Conv(channels_in, inner, 1, **given) if light or channels_in != channels else None
        size = 3 if light else 1
        layer = lambda: nnx.Dict(block1=Conv(inner, inner, **given), block2=Conv(inner, inner, size, **given))
        self.resnets = nnx.Dict({str(i): layer() for i in range(layers)})
        self.out_conv = Conv(inner, channels, 1, **given) if light else None
        self.half, self.layers = half, layers

    def __call__(self, x: jax.Array) -> jax.Array:
        x = halve(x) if self.half else x
        x = x if self.in_conv is None else self.in_conv(x)
        for i in range(self.layers):
            layer = self.resnets[str(i)]
            x = x + layer["block2"](nnx.relu(tap("hidden", layer["block1"](x))))
        return x if self.out_conv is None else self.out_conv(x)


class Adapter(nnx.Module):
    """The network itself, which lies under `adapter` in a checkpoint."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        light, given = c.adapter_type == "light_adapter", dict(compute=compute, rngs=rngs)
        pixels, widths = c.in_channels * c.downscale_factor**2, c.channels
        self.conv_in = None if light else Conv(pixels, widths[0], dtype=compute.dtype, rngs=rngs)
        # Channels before and after, and whether the resolution halves.
        if light:
            rows = [(pixels, widths[0], False), *((a, b, True) for a, b in zip(widths, widths[1:], strict=False))]
            rows.append((widths[-1], widths[-1], True))
        elif c.adapter_type == "full_adapter":
            rows = [(widths[max(i - 1, 0)], width, i > 0) for i, width in enumerate(widths)]
        else:  # the levels of SDXL: 1, 1, 1/2, 1/2
            rows = [(widths[i - 1] if i in (1, 2) else width, width, i == 2) for i, width in enumerate(widths)]
        blocks = (Block(a, b, c.num_res_blocks, half=half, light=light, **given) for a, b, half in rows)
        self.body = nnx.Dict({str(i): block for i, block in enumerate(blocks)})
        self.count, self.remat = len(rows), compute.remat

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        x, out = x if self.conv_in is None else self.conv_in(x), []
        for i in range(self.count):
            with scope(f"body/{i}"):
                x = tap("out", remat(Block.__call__, self.remat)(self.body[str(i)], x))
            out.append(x)
        return out


class T2IAdapter(nnx.Module):
    """The module of `t2i_adapter`.

    Activations: `hidden` of each layer and `out [B, h, w, C]` under `adapter/body/0` and so on.
    """

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        self.adapter, self.c = Adapter(c, compute=compute, rngs=rngs), c

    def __call__(self, picture, *, scale=1.0):
        factor = self.c.downscale_factor
        settings.expect(KIND, "picture", picture, None, None, None, self.c.in_channels)
        if picture.shape[1] % factor or picture.shape[2] % factor:
            raise ValueError(f"{KIND}: a picture of {picture.shape[1:3]}; its sides must be multiples of {factor}")
        with scope("adapter"):
            return tuple(scale * widen(a) for a in self.adapter(unshuffle(picture, factor)))


def t2i_adapter(config: Mapping[str, Any], **how) -> Model:
    """`T2IAdapter` by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, picture [B, H, W, in_channels], *, scale=1.0)` returns a tuple of features
      `[B, h, w, C] float32`, to be passed as `adapter` to the U-Net (`diffjax.models.unets.unet_cond`). The picture is
      in [0, 1]. Features of several adapters are added up.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings.read(KIND, Settings, config)
    settings.only(KIND, c, adapter_type=TYPES)
    make = lambda compute, rngs: T2IAdapter(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
