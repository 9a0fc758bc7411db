"""`ControlNetModel`: a copy of the way down of a Stable Diffusion U-Net that follows a picture.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv:2302.05543.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.checks import check_least
from diffjax.models.unets import condition, unet_cond
from diffjax.nn import Compute, Conv, scope, split_key, tap, widen
from diffjax.nn.functional import check_params

KIND = "ControlNetModel"
RULES = (
    (r"^controlnet_(down_blocks/\d+|mid_block)/kernel$", (None, None, "fsdp", None)),
    (r"^controlnet_cond_embedding/.*/kernel$", (None, None, None, "fsdp")),
    *unet_cond.RULES,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `ControlNetModel`, with its defaults."""

    in_channels: int = 4
    conditioning_channels: int = 3
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8  # in transformers the number of heads
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False  # the softmax is in float32 in any case
    resnet_time_scale_shift: str = "default"
    projection_class_embeddings_input_dim: int | None = None
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False
    addition_embed_type_num_heads: int = 64


_OWN = (
    "conditioning_channels", "num_attention_heads", "controlnet_conditioning_channel_order",
    "conditioning_embedding_out_channels", "global_pool_conditions",
)  # fmt: skip


def unet_settings(c: Settings) -> unet_cond.Settings:
    """The settings of the U-Net whose way down this is a copy of."""
    shared = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name not in _OWN}
    # It has no way up.
    return unet_cond.Settings(**shared, up_block_types=("UpBlock2D",) * len(c.block_out_channels))


class Residuals(NamedTuple):
    """What a ControlNet adds to a U-Net: `apply(..., residuals=r.down, mid_residual=r.mid)`.

    Attributes:
      down: one `[B, h, w, C]` for each feature of the way down; `h = w = 1` with `global_pool_conditions`.
      mid: the same for the middle.
    """

    down: tuple[jax.Array, ...]
    mid: jax.Array


class PictureEmbedding(nnx.Module):
    """A picture `[B, 8 H, 8 W, C]` as features `[B, H, W, width]`, zero at first."""

    def __init__(self, channels: int, widths: tuple[int, ...], width: int, *, compute: Compute, rngs):
        given = dict(dtype=compute.dtype, rngs=rngs)
        self.conv_in = Conv(channels, widths[0], **given)
        blocks = {}
        for i, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
            blocks[str(2 * i)] = Conv(before, before, **given)
            blocks[str(2 * i + 1)] = Conv(before, after, stride=2, padding=1, **given)
        self.blocks, self.count = nnx.Dict(blocks), len(blocks)
        self.conv_out = Conv(widths[-1], width, zero=True, **given)

    def __call__(self, picture: jax.Array) -> jax.Array:
        h = nnx.silu(self.conv_in(picture))
        for i in range(self.count):
            h = nnx.silu(self.blocks[str(i)](h))
        return self.conv_out(h)


class ControlNet(nnx.Module):
    """The module of `controlnet`.

    Activations: as those of the way down of `diffjax.models.unets.unet_cond`.
    """

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        unet, given, widths = unet_settings(c), dict(compute=compute, rngs=rngs), c.block_out_channels
        self.conv_in = Conv(c.in_channels, widths[0], dtype=compute.dtype, rngs=rngs)
        self.time_proj = condition.time_proj(unet, rngs=rngs)
        self.time_embedding = condition.time_embedding(unet, **given)
        self.encoder_hid_proj = condition.encoder_hid_proj(unet, **given)
        # Not that of the U-Net, whose own has `act_fn`.
        self.class_embedding = condition.class_embedding(unet, activation="silu", **given)
        self.add_embedding = condition.add_embedding(unet, **given)
        embedding = c.conditioning_channels, c.conditioning_embedding_out_channels, widths[0]
        self.controlnet_cond_embedding = PictureEmbedding(*embedding, **given)
        self.down_blocks, self.mid_block = unet_cond.down_stages(unet, **given), unet_cond.mid_stage(unet, **given)
        skips = [widths[0]]
        for i, width in enumerate(widths):
            skips += [width] * (c.layers_per_block + (i < len(widths) - 1))
        zero = lambda width: Conv(width, width, 1, zero=True, dtype=compute.dtype, rngs=rngs)
        self.controlnet_down_blocks = nnx.Dict({str(i): zero(width) for i, width in enumerate(skips)})
        self.controlnet_mid_block = zero(widths[-1])
        self.c, self.unet = c, unet

    def __call__(
        self, x: jax.Array, t: jax.Array, context: jax.Array, picture: jax.Array, y: jax.Array | None = None, *,
        scale: jax.Array | float = 1.0, guess: bool = False, mask: jax.Array | None = None,
        pooled: jax.Array | None = None, time_ids: jax.Array | None = None, cond: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Residuals:  # fmt: skip
        """The arguments are those that `controlnet` tells."""
        c = self.c
        settings.expect(KIND, "x", x, None, None, None, c.in_channels)
        times = 2 ** (len(c.conditioning_embedding_out_channels) - 1)
        settings.expect(KIND, "picture", picture, len(x), *(times * n for n in x.shape[1:3]), c.conditioning_channels)
        given = condition.Given(context, y, pooled, time_ids, cond=cond)
        condition.check(KIND, self.unet, x, given)
        temb, context, _ = condition.embed(self, self.unet, settings.times_of(KIND, t, x), given)
        bias = unet_cond.bias_of(KIND, mask, context)
        picture = picture if c.controlnet_conditioning_channel_order == "rgb" else picture[..., ::-1]
        h = tap("features", self.conv_in(x) + self.controlnet_cond_embedding(picture))
        keys = split_key(key, len(self.down_blocks) + 1)
        temb = tap("temb", temb)
        h, skips = unet_cond.run_down(self.down_blocks, h, temb, context=context, bias=bias, keys=keys)
        if self.mid_block is not None:
            with scope("mid_block"):
                h = self.mid_block(h, temb, context, bias=bias, key=keys[-1])
        out = [self.controlnet_down_blocks[str(i)](skip) for i, skip in enumerate(skips)]
        out.append(self.controlnet_mid_block(h))
        # Without a text the deeper features say more (section 3.5 there).
        guess = guess and not c.global_pool_conditions
        scales = np.logspace(-1, 0, len(out), dtype=np.float32) if guess else np.ones(len(out), np.float32)
        out = [widen(a) * (scale * s) for a, s in zip(out, scales, strict=True)]
        if c.global_pool_conditions:
            out = [jnp.mean(a, (1, 2), keepdims=True) for a in out]
        return Residuals(tuple(out[:-1]), out[-1])


def controlnet(config: Mapping[str, Any], **how) -> Model:
    """`ControlNetModel`, for Stable Diffusion 1.x, 2.x and XL, by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, in_channels], t [B], context [B, L, D], picture [B, 8 H, 8 W, 3], y=None, *,
      scale=1.0, guess=False, mask=None, pooled=None, time_ids=None, cond=None, key=None)` returns `Residuals`. The
      picture is in [0, 1]; `guess` weakens the finer features; the others are those of the U-Net
      (`diffjax.models.unets.unet_cond`). Several ControlNets are added up.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings.read(KIND, Settings, config)
    settings.only(
        # PyTorch's class has a projection of the context, and never calls it.
        KIND, c, encoder_hid_dim=(None,), addition_embed_type=(None, "text", "text_time"),
        class_embed_type=(None, "timestep", "identity", "projection"), num_attention_heads=(None,),
        controlnet_conditioning_channel_order=("rgb", "bgr"),
        mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    )  # fmt: skip
    check_least(KIND, 1, layers_per_block=c.layers_per_block)
    unet_cond.check_settings(KIND, unet_settings(c))
    make = lambda compute, rngs: ControlNet(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), unet_cond.rules_of(c, RULES))


def params_of_unet(params: dict, unet: dict) -> dict:
    """A ControlNet's parameters with those of the U-Net that it is to steer, where both have them, as it starts.

    Args:
      params: as from `init` of a `controlnet`, whose own layers are zero.
      unet: those of its U-Net.

    Raises:
      ValueError: for parameters that are none of a ControlNet, or those of another U-Net.
    """
    if "controlnet_mid_block" not in params:
        raise ValueError(f"{KIND}: params are none of a ControlNet; give its own first, and then those of the U-Net")
    shared = {name: unet[name] for name in params if name in unet}
    check_params(shared, {name: params[name] for name in shared})
    return {**params, **shared}


def add(*parts: Residuals) -> Residuals:
    """The sum of what several ControlNets say."""
    return jax.tree.map(lambda *a: sum(a[1:], a[0]), *parts)
