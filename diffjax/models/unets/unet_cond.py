"""`UNet2DConditionModel`: the U-Nets of Stable Diffusion (1.x, 2.x, inpainting, XL), LCM and DeepFloyd IF.

Rombach et al. 2022, arXiv:2112.10752; Podell et al. 2023, arXiv:2307.01952; Luo et al. 2023, arXiv:2310.04378.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.checks import check_least
from diffjax.models.unets import condition
from diffjax.models.unets.blocks import MID, TYPES, DownStage, MidStage, Stage, UpStage, check_types, skip_channels
from diffjax.models.unets.blocks import RULES as UNET_RULES
from diffjax.nn import ACTIVATIONS, Compute, Conv, GroupNorm, scope, split_key, tap, widen
from diffjax.nn.blocks.attention import Pictured, mask_bias

KIND = "UNet2DConditionModel"
RULES = (
    (r"/transformer_blocks/.*/(to_[qkv]|proj)/kernel$", (None, "fsdp", "tensor")),
    (r"/transformer_blocks/.*/(to_out/0|net/2)/kernel$", (None, "tensor", "fsdp")),
    (r"/transformer_blocks/.*/net/0/proj/bias$", (None, "tensor")),
    (r"^(encoder_hid_proj|add_embedding|class_embedding)(/.*)?/kernel$", ("fsdp",)),
    (r"cond_proj/kernel$", (None, "fsdp")),
    (r"positional_embedding$", ()),
    *UNET_RULES,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `UNet2DConditionModel`, with its defaults."""

    sample_size: int | tuple[int, int] | None = None  # what it was trained at; others do as well
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8  # in transformers the number of heads
    num_attention_heads: int | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False  # the softmax is in float32 in any case
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64


class UNetCondition(nnx.Module):
    """The module of `unet_condition`.

    Activations: `temb`, `features`, those of the stages under `down_blocks/0/resnets/0/out` and so on.
    """

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        given, widths = dict(compute=compute, rngs=rngs), c.block_out_channels
        # As many zeros on either side: a kernel of an even size makes each side of the image one pixel less.
        end = lambda size: dict(size=size, padding=(size - 1) // 2, dtype=compute.dtype, rngs=rngs)
        self.conv_in = Conv(c.in_channels, widths[0], **end(c.conv_in_kernel))
        self.time_proj, self.time_embedding = condition.time_proj(c, rngs=rngs), condition.time_embedding(c, **given)
        self.encoder_hid_proj = condition.encoder_hid_proj(c, **given)
        self.class_embedding = condition.class_embedding(c, **given)
        self.add_embedding = condition.add_embedding(c, **given)
        self.down_blocks, self.mid_block = down_stages(c, **given), mid_stage(c, **given)
        layers = spread(c.layers_per_block, len(widths))
        skips, below, up = skip_channels(widths, layers), widths[-1], {}
        for i, width in enumerate(reversed(widths)):
            up[str(i)] = UpStage(_up(c, i), below, skips[i], twice=i < len(widths) - 1, **given)
            below = width
        self.up_blocks = nnx.Dict(up)
        self.conv_norm_out = GroupNorm(widths[0], c.norm_num_groups, eps=c.norm_eps)
        self.conv_out = Conv(widths[0], c.out_channels, **end(c.conv_out_kernel))
        self.c, self.activation = c, ACTIVATIONS[c.act_fn]
        self.adapters = 0  # how many IP-Adapters there is room for

    def __call__(
        self, x: jax.Array, t: jax.Array, context: jax.Array | None = None, y: jax.Array | None = None, *,
        mask: jax.Array | None = None, pooled: jax.Array | None = None, time_ids: jax.Array | None = None,
        image: jax.Array | None = None, hint: jax.Array | None = None, cond: jax.Array | None = None,
        residuals: Sequence[jax.Array] | None = None, mid_residual: jax.Array | None = None,
        adapter: Sequence[jax.Array] = (), pictures: Sequence[tuple[jax.Array, Any]] = (),
        key: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """`[B, H, W, out_channels] float32`; `unet_condition` tells what the arguments are, and their shapes."""
        c, count = self.c, len(self.c.block_out_channels)
        settings.expect(KIND, "x", x, None, None, None, c.in_channels - 4 * (c.addition_embed_type == "image_hint"))
        t = settings.times_of(KIND, t, x)
        given = condition.Given(context, y, pooled, time_ids, image, hint, cond)
        condition.check(KIND, c, x, given)
        keys = split_key(key, 2 * count + 1)
        temb, context, hint = condition.embed(self, c, t, given)
        temb = tap("temb", temb if c.time_embedding_act_fn is None else ACTIVATIONS[c.time_embedding_act_fn](temb))
        bias = bias_of(KIND, mask, context)
        context = self._pictured(context, tuple(pictures))
        x = 2 * x - 1.0 if c.center_input_sample else x
        x = x if hint is None else jnp.concatenate([x, hint.astype(x.dtype)], -1)
        h = tap("features", self.conv_in(x))
        check_adapter(adapter, count, self.mid_block)
        h, skips = run_down(self.down_blocks, h, temb, context=context, bias=bias, keys=keys, adapter=adapter)
        skips = _steered("residuals", skips, residuals)
        if self.mid_block is not None:
            with scope("mid_block"):
                h = self.mid_block(h, temb, context, bias=bias, key=keys[-1])
        if len(adapter) > count:
            settings.expect(KIND, f"adapter[{count}]", adapter[count], *h.shape)
            h = h + adapter[count]
        (h,) = _steered("mid_residual", [h], None if mid_residual is None else [mid_residual])
        for i in range(count):
            block = self.up_blocks[str(i)]
            taken, skips = skips[-block.stage.layers :], skips[: -block.stage.layers]
            # Of odd sizes the half is rounded up, and the way back follows the features.
            size = skips[-1].shape[1:3] if skips else None
            _check_size(block.stage.type, h, size, x)
            with scope(f"up_blocks/{i}"):
                h, _ = block(h, taken, temb, context, bias=bias, size=size, key=keys[count + i])
        return widen(self.conv_out(self.activation(self.conv_norm_out(h))))

    def _pictured(self, context, pictures):
        """The context with the pictures beside it."""
        if len(pictures) not in (0, self.adapters):
            raise ValueError(f"{KIND}: {len(pictures)} pictures, in a network for {self.adapters} IP-Adapters")
        for i, (tokens, _) in enumerate(pictures):
            width = spread(self.c.cross_attention_dim, 1)[0]
            settings.expect(KIND, f"pictures[{i}]", tokens, context.shape[0], None, width)
        return Pictured(context, pictures) if pictures else context


def run_down(
    stages: nnx.Dict, h: jax.Array, temb: jax.Array, *, context: jax.Array | None, bias: jax.Array | None,
    keys: Sequence[jax.Array | None] | jax.Array, adapter: Sequence[jax.Array] = (),
) -> tuple[jax.Array, list[jax.Array]]:  # fmt: skip
    """The way down: the features, and those for the way up.

    Args:
      stages: as from `down_stages`.
      h: what `conv_in` makes, `[B, H, W, C]`.
      temb, context, bias: see `diffjax.models.unets.blocks.DownStage`.
      keys: one for each stage, or more.
      adapter: features of a T2I-Adapter, at least one for each stage, or none.
    """
    skips = [h]
    for i in range(len(stages)):
        block, extra = stages[str(i)], adapter[i] if adapter else None
        crossed = TYPES[block.stage.type].attention in ("cross", "added")
        if extra is not None and crossed:
            settings.expect(KIND, f"adapter[{i}]", extra, *h.shape[:3], block.stage.channels)
        with scope(f"down_blocks/{i}"):
            h, outs, _ = block(h, temb, context, bias=bias, residual=extra if crossed else None, key=keys[i])
        if extra is not None and not crossed:
            settings.expect(KIND, f"adapter[{i}]", extra, *h.shape)
            h = outs[-1] = h + extra
        skips += outs
    return h, skips


def bias_of(kind: str, mask: jax.Array | None, context: jax.Array | None) -> jax.Array | None:
    """What `mask [B, L]` adds to the scores of `context [B, L, D]`; raises `ValueError` for a mask of another shape."""
    if mask is not None:
        settings.expect(kind, "mask", mask, *context.shape[:2])
    return mask_bias(mask)


def check_adapter(adapter: Sequence[jax.Array], count: int, mid_block: nnx.Module | None) -> None:
    """Raises `ValueError` unless there are no features of a T2I-Adapter, one for each stage, or one more for the
    middle."""
    most = count + (mid_block is not None)
    if len(adapter) not in (0, count, most):
        raise ValueError(
            f"{KIND}: {len(adapter)} features of an adapter; expected {count}, one for each of block_out_channels"
            + (f", or {most} with one for the middle" if most > count else "")
        )


def _steered(name: str, features: list[jax.Array], residuals: Sequence[jax.Array] | None) -> list[jax.Array]:
    """The features plus the residuals of a ControlNet, which are of their shapes, or pooled to one pixel."""
    if residuals is None:
        return features
    given, wanted = ([tuple(a.shape) for a in part] for part in (residuals, features))
    pooled = [(b, 1, 1, c) for b, _, _, c in wanted]
    if given not in (wanted, pooled):
        raise ValueError(f"{KIND}: {name} of shapes {given}; the features there have {wanted}")
    return [a + b for a, b in zip(features, residuals, strict=True)]


def _check_size(kind: str, h: jax.Array, size: tuple[int, int] | None, x: jax.Array) -> None:
    """Raises `ValueError` where a type of block that cannot follow an odd side meets one, as in PyTorch's class."""
    doubled = (2 * h.shape[1], 2 * h.shape[2])
    if size not in (None, doubled) and TYPES[kind].resample == "resnet":
        raise ValueError(
            f"{KIND}: x is {x.shape[1]}x{x.shape[2]}: {kind} makes {doubled[0]}x{doubled[1]} where the way down had "
            f"{size[0]}x{size[1]}; take sides that halve without a rest"
        )


def spread(value: Any, count: int) -> tuple:
    """One value for each stage."""
    return value if isinstance(value, tuple) else (value,) * count


def _stage(c: Settings, kind: str, channels: int, layers: int, i: int, depth: Any, heads: Any) -> Stage:
    """The settings of a stage whose attention is that of stage i on the way down."""
    count = len(c.block_out_channels)
    typed = TYPES[kind]
    own = typed.resample == "resnet" or kind == "UNetMidBlock2DSimpleCrossAttn"
    rescale = c.mid_block_scale_factor if kind in MID else c.resnet_out_scale_factor if own else 1.0
    width = condition.temb_width(c) * (2 if c.class_embeddings_concat else 1)
    return Stage(
        kind, channels, layers, width, head_width=channels if heads[0] is None else heads[0], heads=heads[1],
        depth=spread(depth, max(layers, 1)), context_width=spread(c.cross_attention_dim, count)[i],
        only_cross=spread(c.only_cross_attention, count)[i], linear=c.use_linear_projection,
        cross_norm=c.cross_attention_norm, padding=c.downsample_padding, groups=c.norm_num_groups,
        attention_groups=c.norm_num_groups, eps=c.norm_eps, activation=c.act_fn,
        film=c.resnet_time_scale_shift == "scale_shift", activated=own and c.resnet_skip_time_act, rescale=rescale,
        dropout_rate=c.dropout,
    )  # fmt: skip


def down_stages(c: Settings, *, compute: Compute, rngs) -> nnx.Dict:
    """The stages of the way down."""
    widths, out = c.block_out_channels, {}
    count = len(widths)
    heads, depths = spread(c.attention_head_dim, count), spread(c.transformer_layers_per_block, count)
    for i, (kind, layers) in enumerate(zip(c.down_block_types, spread(c.layers_per_block, count), strict=True)):
        stage = _stage(c, kind, widths[i], layers, i, depths[i], (heads[i], heads[i]))
        half = i < count - 1
        out[str(i)] = DownStage(stage, widths[max(i - 1, 0)], half=half, compute=compute, rngs=rngs)
    return nnx.Dict(out)


def mid_stage(c: Settings, *, compute: Compute, rngs) -> MidStage | None:
    """The middle, or None."""
    kind, count = c.mid_block_type, len(c.block_out_channels)
    if kind is None:
        return None
    depth, heads = spread(c.transformer_layers_per_block, count)[-1], spread(c.attention_head_dim, count)[-1]
    layers = 0 if kind == "UNetMidBlock2D" else 1
    stage = _stage(c, kind, c.block_out_channels[-1], layers, count - 1, depth, (heads, heads))
    alone = c.mid_block_only_cross_attention
    if alone is None:
        alone = c.only_cross_attention if isinstance(c.only_cross_attention, bool) else False
    alone = alone and kind == "UNetMidBlock2DSimpleCrossAttn"
    return MidStage(dataclasses.replace(stage, only_cross=alone), compute=compute, rngs=rngs)


def _up(c: Settings, i: int) -> Stage:
    """The settings of stage i of the way up."""
    count = len(c.block_out_channels)
    back = count - 1 - i
    depths = spread(c.transformer_layers_per_block, count)[::-1]
    depths = depths if c.reverse_transformer_layers_per_block is None else c.reverse_transformer_layers_per_block
    heads = spread(c.attention_head_dim, count)
    # Checkpoints count the heads from below, but the channels of a head from above.
    both = heads[i], heads[back]
    layers = spread(c.layers_per_block, count)[back] + 1
    return _stage(c, c.up_block_types[i], c.block_out_channels[back], layers, back, depths[i], both)


def unet_condition(config: Mapping[str, Any], **how) -> Model:
    """`UNet2DConditionModel` by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, in_channels], t [B], context [B, L, D], y=None, *, ...)`, `[B, H, W,
      out_channels] float32`, with these keywords:
        mask: `[B, L]`, 1 for the tokens that are seen; all are by default.
        pooled `[B, P]`, time_ids `[B, 6]`: of SDXL, the pooled text and (height, width, top, left, target height,
          target width) in pixels.
        cond: `[B, time_cond_proj_dim]`, the embedded guidance scale of LCM.
        image `[B, D]`, hint `[B, 8 H, 8 W, 3]`: of Kandinsky.
        y: labels `[B]` of a table; what the class embedding takes otherwise, such as the noise level of an upscaler.
        residuals, mid_residual: of a ControlNet, added to the features of the way down and to those of the middle.
        adapter: features of a T2I-Adapter, one for each stage, and perhaps one for the middle.
        pictures: of IP-Adapters, for a network of `diffjax.adapters.ip_adapter`.
        key: turns dropout on.
      Times are steps of 1000.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings_of(config)
    make = lambda compute, rngs: UNetCondition(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), rules_of(c, RULES))


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings in a config; raises `ValueError` for what is unknown or not supported."""
    c = settings.read(KIND, Settings, config)
    check_settings(KIND, c)
    settings.only(
        KIND, c, num_attention_heads=(None,), dual_cross_attention=(False,), attention_type=("default",),
        cross_attention_norm=(None, "group_norm"), time_embedding_act_fn=(None, *ACTIVATIONS),
        timestep_post_act=(None, *ACTIVATIONS),
    )  # fmt: skip
    return c


def rules_of(c: Any, rules: tuple) -> tuple:
    """The rules with those of the projections around transformers: matrices in some checkpoints, else convolutions."""
    pixel = () if c.use_linear_projection else (None, None)
    around = ((r"/proj_in/kernel$", (*pixel, "fsdp", "tensor")), (r"/proj_out/kernel$", (*pixel, "tensor", "fsdp")))
    return (*around, *rules)


def check_settings(kind: str, c: Settings) -> None:
    """Raises `ValueError` for what neither this network nor its ControlNet can be built from."""
    settings.only(
        kind, c, mid_block_type=(None, *MID), act_fn=tuple(ACTIVATIONS), downsample_padding=(0, 1),
        resnet_time_scale_shift=("default", "scale_shift"),
    )  # fmt: skip
    condition.check_settings(kind, c)
    check_types(kind, c, tuple(name for name, typed in TYPES.items() if typed.resample != "fir"))
    if c.norm_num_groups is None:
        raise ValueError(f"{kind}: norm_num_groups=None is not supported; its blocks need a number of groups")
    check_least(kind, 1, norm_num_groups=c.norm_num_groups, conv_in_kernel=c.conv_in_kernel)
    check_least(kind, 1, conv_out_kernel=c.conv_out_kernel)
    count = len(c.block_out_channels)
    for name in ("only_cross_attention", "layers_per_block", "cross_attention_dim", "attention_head_dim"):
        _check_length(kind, name, getattr(c, name), count)
    for width in c.block_out_channels:
        check_least(kind, 1, block_out_channels=width)
    for layers in spread(c.layers_per_block, count):
        check_least(kind, 1, layers_per_block=layers)
    _check_depths(kind, c)


def _check_length(kind: str, name: str, value: Any, count: int) -> None:
    if isinstance(value, tuple) and len(value) != count:
        raise ValueError(f"{kind}: {name} has {len(value)} values for {count} block_out_channels")


def _check_depths(kind: str, c: Settings) -> None:
    """Raises `ValueError` for a wrong number of depths of transformers, among the stages or in one of them."""
    name, count = "transformer_layers_per_block", len(c.block_out_channels)
    layers, back = spread(c.layers_per_block, count), c.reverse_transformer_layers_per_block
    depths = spread(c.transformer_layers_per_block, count)
    if any(isinstance(depth, tuple) for depth in depths) and back is None:
        raise ValueError(f"{kind}: {name}={depths!r}: that of each layer needs reverse_{name} for the way up")
    ways = [(name, depths, layers)]
    ways += [] if back is None else [(f"reverse_{name}", back, tuple(n + 1 for n in layers[::-1]))]
    for name, depths, layers in ways:
        _check_length(kind, name, depths, count)
        for depth, wanted in zip(depths, layers, strict=True):
            if isinstance(depth, tuple) and len(depth) < wanted:
                raise ValueError(f"{kind}: {name}={depths!r}: {depth!r} is for a stage of {wanted} layers")
            for n in depth if isinstance(depth, tuple) else (depth,):
                check_least(kind, 0, **{name: n})
