"""The ControlNet of Stable Diffusion 3 and 3.5, `SD3ControlNetModel`.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv:2302.05543: the first blocks of
the denoiser once more, which also see an image, and give the denoiser's blocks residuals that start at zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.checks import check_least
from diffjax.models.transformers import mmdit
from diffjax.nn import Compute, Linear, layer_norm, modulate, parts_of, run_stack, scope, stack, tap, times, widen
from diffjax.nn.blocks import Attention, FeedForward, Modulation, PatchEmbed, TimeTextEmbedding

KIND = "SD3ControlNetModel"
RULES = ((r"^controlnet_blocks/.*/kernel$", (None, "fsdp")), *mmdit.RULES)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of an `SD3ControlNetModel`, with its defaults."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int | None = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16  # of nothing: a relic in the files
    pos_embed_max_size: int | None = 96
    extra_conditioning_channels: int = 0
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None
    pos_embed_type: str | None = "sincos"
    use_pos_embed: bool = True
    force_zeros_for_pooled_projection: bool = True  # for who calls it: whether `pooled` is to be zeros

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


class SingleBlock(nnx.Module):
    """Attention and a perceptron, each modulated and gated, of an image without a text."""

    def __init__(self, width: int, heads: int, *, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        self.norm1 = Modulation(width, 6, **given)
        self.attn = Attention(width, heads, width // heads, bias=True, **given)
        self.ff = FeedForward(width, activation="gelu-approximate", **given)

    def __call__(self, x: jax.Array, emb: jax.Array) -> jax.Array:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(emb)
        with scope("attn"):
            x = x + times(self.attn(modulate(layer_norm(x), shift, scale)), gate[:, None])
        with scope("ff"):
            h = self.ff(modulate(layer_norm(x), shift_mlp, scale_mlp))
        return tap("out", x + times(h, gate_mlp[:, None]))


class ControlNet(nnx.Module):
    """The module of `sd3_controlnet`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        self.pos_embed = _positioned(c, compute, rngs) if c.use_pos_embed else None
        self.time_text_embed = TimeTextEmbedding(c.pooled_projection_dim, c.width, **given)
        if c.joint_attention_dim is None:
            self.context_embedder = None
            single = lambda rngs: SingleBlock(c.width, c.num_attention_heads, compute=compute, rngs=rngs)
            self.transformer_blocks = stack(single, 0, c.num_layers, rngs=rngs)
        else:
            self.context_embedder = Linear(c.joint_attention_dim, c.width, dtype=compute.dtype, rngs=rngs)
            self.transformer_blocks = mmdit.joint_blocks(c, last=False, **given)
        zero = lambda rngs: Linear(c.width, c.width, kernel_init=nnx.initializers.zeros, dtype=compute.dtype, rngs=rngs)
        self.controlnet_blocks = stack(zero, 0, c.num_layers, rngs=rngs)
        channels = c.in_channels + c.extra_conditioning_channels
        self.pos_embed_input = PatchEmbed(channels, c.width, c.patch_size, zero=True, **given)
        self.c, self.compute = c, compute

    def __call__(self, x, t, context, pooled, control, *, scale=1.0, key=None):
        c = self.c
        t = _check_inputs(c, x, t, context, pooled, control)
        h = x.astype(self.compute.dtype) if self.pos_embed is None else self.pos_embed(x)
        emb = nnx.silu(self.time_text_embed(t, pooled))
        h = tap("tokens", h + self.pos_embed_input(control))
        context = None if self.context_embedder is None else self.context_embedder(context)

        def body(block, carry, _):
            h, context = carry
            with scope("transformer_blocks"):
                h, context = (block(h, emb), None) if context is None else block(h, context, emb)
            return (h, context), h

        _, hidden = run_stack(self.transformer_blocks, body, (h, context), self.compute)
        ((_, _, projections),) = parts_of(self.controlnet_blocks)
        residuals = jax.vmap(lambda project, h: project(h))(projections, hidden)
        return tuple(widen(residuals) * scale)


def _positioned(c: Settings, compute, rngs):
    if c.pos_embed_type is None:
        return PatchEmbed(c.in_channels, c.width, c.patch_size, compute=compute, rngs=rngs)
    base, largest = c.sample_size // c.patch_size, c.pos_embed_max_size
    return mmdit.PositionedPatches(
        c.in_channels, c.width, c.patch_size, base=base, largest=largest, compute=compute, rngs=rngs
    )


def _check_inputs(c: Settings, x, t, context, pooled, control) -> jax.Array:
    """The times as `[B]`; raises `ValueError` for inputs of other shapes than the settings ask for."""
    positions = c.use_pos_embed and c.pos_embed_type is not None
    channels = c.in_channels + c.extra_conditioning_channels
    mmdit.check_image(KIND, c, control, channels, name="control", positions=positions)
    _, height, breadth, _ = control.shape
    if c.use_pos_embed:
        settings.expect(KIND, "x", x, len(control), height, breadth, c.in_channels)
    else:
        settings.expect(KIND, "x", x, len(control), (height // c.patch_size) * (breadth // c.patch_size), c.width)
    if c.joint_attention_dim is None and context is not None:
        raise ValueError(f"{KIND}: a network with joint_attention_dim=None takes no context; pass None")
    return mmdit.check_inputs(KIND, c, x, t, context, pooled)


def sd3_controlnet(config: Mapping[str, Any], **how) -> Model:
    """`SD3ControlNetModel` (Stable Diffusion 3 and 3.5; ControlNet, arXiv:2302.05543) by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, in_channels], t [B], context [B, L, joint_attention_dim],
      pooled [B, pooled_projection_dim], control [B, H, W, in_channels + extra_conditioning_channels], *, scale=1.0,
      key=None)`, a tuple of `num_layers` arrays `[B, T, width] float32` times `scale`: the `residuals` of
      `sd3_transformer`. They are zero at first. `control` is an image in the latent space, with a mask or the like in
      the extra channels. Networks with `joint_attention_dim=None` take None as `context`; those with
      `use_pos_embed=False` take as `x` what the denoiser's `apply(params, x, method="tokens")` returns. Whether
      `pooled` is to be zeros, `force_zeros_for_pooled_projection`, is left to the caller. There is no dropout: a key
      changes nothing.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings.read(KIND, Settings, config)
    mmdit.check_settings(KIND, c)
    settings.only(KIND, c, pos_embed_type=("sincos", None))
    check_least(KIND, 0, extra_conditioning_channels=c.extra_conditioning_channels)
    make = lambda compute, rngs: ControlNet(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
