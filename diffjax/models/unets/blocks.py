"""The stages of a U-Net as checkpoints store them: residual blocks, attention behind each, and a change of resolution.

One module for the way down, one for the middle and one for the way up; what the many types of blocks of diffusers
differ in is a row of `TYPES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.models.checks import check_divides
from diffjax.nn import Compute, Conv, GroupNorm, Linear, attend, remat, scope, split_key, tap
from diffjax.nn.blocks import Attention, Downsample, ResnetBlock, Upsample
from diffjax.nn.blocks.attention import split_heads
from diffjax.nn.blocks.resnet import fir_double, fir_halve
from diffjax.nn.blocks.transformer import PixelTransformer

# In a block the first convolution makes some of the channels on each device and the second sums over them.
RULES = (
    (r"/(to_[qkv]|add_[kv]_proj|time_emb_proj)/kernel$|embedding/linear_1/kernel$", ("fsdp", "tensor")),
    (r"/to_out/0/kernel$|embedding/linear_2/kernel$", ("tensor", "fsdp")),
    (r"/conv1/kernel$", (None, None, "fsdp", "tensor")),
    (r"/conv2/kernel$", (None, None, "tensor", "fsdp")),
    (r"/(conv_shortcut|conv|skip_conv)/kernel$", (None, None, "fsdp", None)),
    (r"^conv_in/kernel$", (None, None, None, "fsdp")),
    (r"^conv_out/kernel$", (None, None, "fsdp", None)),
    (r"(^|/)embedding$", (None, "fsdp")),
    (r"/conv1/bias$|/norm2/(bias|scale)$|/time_emb_proj/bias$", ("tensor",)),
    (r"(^|/)(bias|scale|weight)$", ()),
)


class Type(NamedTuple):
    """What a type of block consists of.

    Attributes:
      attention: behind each residual block: None, "self", "cross" (a transformer), or "added" (one attention to the
        pixels and the context together).
      resample: "conv", "resnet" (a residual block), "fir" (the same with `fir_double`, and a small image beside it), or
        "choice" (what the settings say).
    """

    attention: str | None
    resample: str


TYPES = {
    "DownBlock2D": Type(None, "conv"),
    "AttnDownBlock2D": Type("self", "choice"),
    "CrossAttnDownBlock2D": Type("cross", "conv"),
    "SimpleCrossAttnDownBlock2D": Type("added", "resnet"),
    "ResnetDownsampleBlock2D": Type(None, "resnet"),
    "SkipDownBlock2D": Type(None, "fir"),
    "AttnSkipDownBlock2D": Type("self", "fir"),
    "UpBlock2D": Type(None, "conv"),
    "AttnUpBlock2D": Type("self", "choice"),
    "CrossAttnUpBlock2D": Type("cross", "conv"),
    "SimpleCrossAttnUpBlock2D": Type("added", "resnet"),
    "ResnetUpsampleBlock2D": Type(None, "resnet"),
    "SkipUpBlock2D": Type(None, "fir"),
    "AttnSkipUpBlock2D": Type("self", "fir"),
    "UNetMidBlock2D": Type("self", "conv"),
    "UNetMidBlock2DCrossAttn": Type("cross", "conv"),
    "UNetMidBlock2DSimpleCrossAttn": Type("added", "conv"),
}
DOWN = tuple(name for name in TYPES if "Down" in name)
UP = tuple(name for name in TYPES if "Up" in name)
MID = tuple(name for name in TYPES if "Mid" in name)


@dataclasses.dataclass(frozen=True)
class Stage:
    """The settings of a stage.

    Attributes:
      type: one of `TYPES`.
      channels: of its residual blocks.
      layers: how many of these.
      temb_width: of the embedded time.
      head_width, heads: of self-attention, of which `head_width` counts; of transformers, whose heads are counted.
      depth: blocks of each transformer, one number for each residual block.
      context_width, only_cross, linear, cross_norm: of attention to a context.
      choice: the resampling of the types that leave it open, "conv" or "resnet".
      padding: of a convolution that halves.
      groups, attention_groups: of the norms; None for none in front of self-attention.
      eps, activation, film, activated, rescale, dropout_rate: of residual blocks (`diffjax.nn.blocks.ResnetBlock`).
    """

    type: str
    channels: int
    layers: int
    temb_width: int
    head_width: int = 8
    heads: int = 8
    depth: tuple[int, ...] = ()
    context_width: int | None = None
    only_cross: bool = False
    linear: bool = False
    cross_norm: str | None = None
    choice: str = "conv"
    padding: int = 1
    groups: int | None = 32
    attention_groups: int | None = 32
    eps: float = 1e-5
    activation: str = "silu"
    film: bool = False
    activated: bool = False
    rescale: float = 1.0
    dropout_rate: float = 0.0


def _resnet(
    stage: Stage, channels_in: int, *, groups: int | None = None, compute: Compute, rngs, **changes: Any
) -> ResnetBlock:  # fmt: skip
    """A residual block; `groups` of its first norm, where they are not those of the stage."""
    first, second = (stage.groups, stage.groups) if groups is None else (groups, _few(stage.channels))
    for count, channels in ((first, channels_in), (second, stage.channels)):
        check_divides(stage.type, "norm_num_groups", count, "the channels of a block,", channels)
    return ResnetBlock(
        channels_in, stage.channels, temb_width=stage.temb_width, groups=first, groups_out=second, eps=stage.eps,
        activation=stage.activation, film=stage.film, activated=stage.activated, rescale=stage.rescale,
        dropout_rate=stage.dropout_rate, compute=compute, rngs=rngs, **changes,
    )  # fmt: skip


def _resnets(stage: Stage, channels_in: Sequence[int], groups: Sequence[int | None], **given) -> nnx.Dict:
    """A residual block for each of `channels_in`, by their numbers."""
    rows = enumerate(zip(channels_in, groups, strict=True))
    return nnx.Dict({str(i): _resnet(stage, channels, groups=few, **given) for i, (channels, few) in rows})


def _few(channels: int) -> int:
    return min(channels // 4, 32)


def _attentions(stage: Stage, count: int, *, compute: Compute, rngs) -> nnx.Dict | None:
    """What stands behind the residual blocks, by their numbers; None for nothing."""
    kind, channels = TYPES[stage.type].attention, stage.channels
    if kind is None or not count:
        return None
    _check_heads(stage)

    def make(i):
        if kind == "self":
            return Attention(
                channels, channels // stage.head_width, stage.head_width, bias=True, groups=stage.attention_groups,
                eps=stage.eps, compute=compute, rngs=rngs,
            )  # fmt: skip
        if kind == "cross":
            return PixelTransformer(
                channels, stage.heads, channels // stage.heads, stage.depth[i], context_width=stage.context_width,
                groups=stage.groups, linear=stage.linear, only_cross=stage.only_cross, compute=compute, rngs=rngs,
            )  # fmt: skip
        return AddedAttention(stage, compute, rngs)

    return nnx.Dict({str(i): make(i) for i in range(count)})


def _check_heads(stage: Stage) -> None:
    """Raises `ValueError` for heads, and groups of their norm, that attention cannot have."""
    kind, channels, width = TYPES[stage.type].attention, stage.channels, stage.head_width
    if kind == "cross":
        if not 1 <= stage.heads <= channels:
            told = f"its transformers need a number of heads, at most that of their channels, {channels}"
            raise ValueError(f"{stage.type}: attention_head_dim={stage.heads}: {told}")
        return
    if not 1 <= width <= channels:
        raise ValueError(f"{stage.type}: attention_head_dim={width}: expected channels of a head, at most {channels}")
    if kind == "added":
        check_divides(stage.type, "attention_head_dim", width, "the channels", channels)
        if stage.context_width is None:
            raise ValueError(f"{stage.type}: cross_attention_dim=None: its attention needs a context")
    elif stage.attention_groups:
        check_divides(stage.type, "the number of groups", stage.attention_groups, "the channels", channels)


class AddedAttention(nnx.Module):
    """`x` plus the attention of its pixels to themselves and to a context, in one softmax (Saharia et al. 2022,
    arXiv:2205.11487, as DeepFloyd IF has it); the context alone with `only_cross`.

    Activations: `q [B, H W, N, d]`, `k`, `v`, `mixed`, `out [B, H, W, C]`.
    """

    def __init__(self, stage: Stage, compute: Compute, rngs):
        channels, given = stage.channels, dict(dtype=compute.dtype, rngs=rngs)
        self.group_norm = GroupNorm(channels, stage.groups)
        self.norm_cross = GroupNorm(stage.context_width, 32) if stage.cross_norm else None
        self.to_q = Linear(channels, channels, **given)
        self.to_k = None if stage.only_cross else Linear(channels, channels, **given)
        self.to_v = None if stage.only_cross else Linear(channels, channels, **given)
        self.add_k_proj = Linear(stage.context_width, channels, **given)
        self.add_v_proj = Linear(stage.context_width, channels, **given)
        self.to_out = nnx.Dict({"0": Linear(channels, channels, **given)})
        self.heads, self.implementation = channels // stage.head_width, compute.attention

    def __call__(self, x: jax.Array, context: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """`x [B, H, W, C]`, `context [B, L, context_width]`; `bias [B, 1, 1, L]` is added to the context's scores."""
        pixels = x.reshape(len(x), -1, x.shape[-1])
        context = context if self.norm_cross is None else self.norm_cross(context)
        h = self.group_norm(pixels)
        q, k, v = self.to_q(h), self.add_k_proj(context), self.add_v_proj(context)
        if self.to_k is not None:
            k, v = jnp.concatenate([k, self.to_k(h)], 1), jnp.concatenate([v, self.to_v(h)], 1)
            bias = bias if bias is None else jnp.pad(bias, ((0, 0),) * 3 + ((0, h.shape[1]),))
        q, k, v = (tap(name, split_heads(a, self.heads)) for name, a in (("q", q), ("k", k), ("v", v)))
        mixed = tap("mixed", attend(q, k, v, bias=bias, implementation=self.implementation))
        return tap("out", x + self.to_out["0"](mixed.reshape(h.shape)).reshape(x.shape))


def _run(name: str, fn: Callable, policy: str, *inputs):
    """`fn(*inputs)` in the scope of its name; what `policy` does not keep of it is computed again."""

    def named(*inputs):
        with scope(name):
            return fn(*inputs)

    return remat(named, policy)(*inputs)


def _residual(net: nnx.Module, name: str, part: nnx.Module, x, temb, key):
    """`x` behind a residual block of a stage."""
    return _run(name, lambda x, temb, key: part(x, temb, key=key), net.compute.remat, x, temb, key)


def _attended(net: nnx.Module, i: int, x, context, bias, key):
    """`x` behind attention number `i` of a stage; `x` itself if there is none."""
    if net.attentions is None or str(i) not in net.attentions:
        return x
    name, attention, policy = f"attentions/{i}", net.attentions[str(i)], net.compute.remat
    if isinstance(attention, PixelTransformer):
        # Its layers are computed again one by one.
        return _run(name, lambda x: attention(x, context, bias=bias, key=key), "none", x)
    if isinstance(attention, AddedAttention):
        return _run(name, attention, policy, x, context, bias)

    def alone(x):
        h = attention(x.reshape(len(x), -1, x.shape[-1])).reshape(x.shape)
        return tap("out", (x + h) / net.stage.rescale)

    return _run(name, alone, policy, x)


class DownStage(nnx.Module):
    """A stage on the way down; `half`: whether it ends in half of the resolution."""

    def __init__(self, stage: Stage, channels_in: int, *, half: bool, compute: Compute, rngs):
        given, channels = dict(compute=compute, rngs=rngs), [channels_in] + [stage.channels] * (stage.layers - 1)
        resample = TYPES[stage.type].resample
        groups = [_few(n) if resample == "fir" else None for n in channels]
        self.resnets = _resnets(stage, channels, groups, **given)
        self.attentions = _attentions(stage, stage.layers, **given)
        resample = stage.choice if resample == "choice" else resample
        parts: dict[str, nnx.Module] = {}
        if half and resample == "conv":
            parts["downsamplers"] = nnx.Dict({"0": Downsample(stage.channels, padding=stage.padding, **given)})
        elif half and resample == "resnet":
            parts["downsamplers"] = nnx.Dict({"0": _resnet(stage, stage.channels, resample="down", **given)})
        elif half:
            few = dict(groups=_few(stage.channels), kernel="fir", skip=True)
            parts["resnet_down"] = _resnet(stage, stage.channels, resample="down", **few, **given)
            parts["skip_conv"] = Conv(3, stage.channels, 1, dtype=compute.dtype, rngs=rngs)
        self.downsamplers = parts.get("downsamplers")
        self.resnet_down, self.skip_conv = parts.get("resnet_down"), parts.get("skip_conv")
        self.stage, self.compute = stage, compute

    def __call__(
        self, x: jax.Array, temb: jax.Array, context: jax.Array | None = None, *, bias: jax.Array | None = None,
        image: jax.Array | None = None, residual: jax.Array | None = None, key: jax.Array | None = None,
    ) -> tuple[jax.Array, list[jax.Array], jax.Array | None]:  # fmt: skip
        """The features, those of all layers for the way up, and the small image.

        Args:
          x: `[B, H, W, channels_in]`.
          temb: `[B, temb_width]`.
          context: `[B, L, context_width]`, for attention to it.
          bias: `[B, 1, 1, L]`, added to the scores of the context.
          image: `[B, H, W, 3]`, of the types that halve one beside the features.
          residual: `[B, H, W, channels]`, added behind the last layer (T2I-Adapter).
          key: turns dropout on.
        """
        keys, outs = split_key(key, 2 * self.stage.layers + 1), []
        for i in range(self.stage.layers):
            x = _residual(self, f"resnets/{i}", self.resnets[str(i)], x, temb, keys[2 * i])
            x = _attended(self, i, x, context, bias, keys[2 * i + 1])
            if residual is not None and i == self.stage.layers - 1:
                x = x + residual
            outs.append(x)
        if self.downsamplers is not None:
            down = self.downsamplers["0"]
            plain = isinstance(down, Downsample)
            x = down(x) if plain else _residual(self, "downsamplers/0", down, x, temb, keys[-1])
            outs.append(x)
        if self.resnet_down is not None:
            image = fir_halve(image)
            x = self.skip_conv(image) + _residual(self, "resnet_down", self.resnet_down, x, temb, keys[-1])
            outs.append(x)
        return x, outs, image


class MidStage(nnx.Module):
    """The middle: a residual block, and then attention (if `attends`) and another one, `stage.layers` times."""

    def __init__(self, stage: Stage, *, attends: bool = True, compute: Compute, rngs):
        given, count = dict(compute=compute, rngs=rngs), stage.layers + 1
        self.resnets = _resnets(stage, [stage.channels] * count, [None] * count, **given)
        self.attentions = _attentions(stage, stage.layers if attends else 0, **given)
        self.stage, self.compute = stage, compute

    def __call__(
        self, x: jax.Array, temb: jax.Array, context: jax.Array | None = None, *, bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """`[B, H, W, channels]` of `x` of this shape; the others are those of `DownStage`."""
        keys = split_key(key, 2 * self.stage.layers + 1)
        x = _residual(self, "resnets/0", self.resnets["0"], x, temb, keys[-1])
        for i in range(self.stage.layers):
            x = _attended(self, i, x, context, bias, keys[2 * i])
            x = _residual(self, f"resnets/{i + 1}", self.resnets[str(i + 1)], x, temb, keys[2 * i + 1])
        return x


class UpStage(nnx.Module):
    """A stage on the way up; `twice`: whether it ends in twice the resolution.

    Args:
      channels_in: of what comes from below.
      skips: of the features that are concatenated, one for each layer.
    """

    def __init__(self, stage: Stage, channels_in: int, skips: list[int], *, twice: bool, compute: Compute, rngs):
        given, before = dict(compute=compute, rngs=rngs), [channels_in] + [stage.channels] * (stage.layers - 1)
        resample, both = TYPES[stage.type].resample, list(zip(before, skips, strict=True))
        self.fir = resample == "fir"
        # One of the two types forgets the brackets, and so do its checkpoints.
        loose = stage.type == "AttnSkipUpBlock2D"
        groups = [(min(a + b // 4, 32) if loose else _few(a + b)) if self.fir else None for a, b in both]
        self.resnets = _resnets(stage, [a + b for a, b in both], groups, **given)
        self.attentions = _attentions(stage, 1 if self.fir else stage.layers, **given)
        resample = stage.choice if resample == "choice" else resample
        parts: dict[str, nnx.Module] = {}
        if twice and resample == "conv":
            parts["upsamplers"] = nnx.Dict({"0": Upsample(stage.channels, **given)})
        elif twice and resample == "resnet":
            parts["upsamplers"] = nnx.Dict({"0": _resnet(stage, stage.channels, resample="up", **given)})
        elif twice:
            few = dict(groups=_few(stage.channels), kernel="fir", skip=True)
            parts["resnet_up"] = _resnet(stage, stage.channels, resample="up", **few, **given)
            parts["skip_conv"] = Conv(stage.channels, 3, dtype=compute.dtype, rngs=rngs)
            parts["skip_norm"] = GroupNorm(stage.channels, _few(stage.channels), eps=stage.eps)
        self.upsamplers, self.resnet_up = parts.get("upsamplers"), parts.get("resnet_up")
        self.skip_conv, self.skip_norm = parts.get("skip_conv"), parts.get("skip_norm")
        self.stage, self.compute = stage, compute

    def __call__(
        self, x: jax.Array, skips: Sequence[jax.Array], temb: jax.Array, context: jax.Array | None = None, *,
        bias: jax.Array | None = None, image: jax.Array | None = None, size: tuple[int, int] | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
        """The features and the small image.

        Args:
          x: `[B, H, W, channels_in]`.
          skips: from the way down, one `[B, H, W, C]` for each layer; the last is taken first.
          image: `[B, H, W, 3]`, what the stages before have made of the types that double one beside the features.
          size: height and width to end in, if not twice those of x; only a convolution follows them.
          temb, context, bias, key: as of `DownStage`.
        """
        keys = split_key(key, 2 * self.stage.layers + 1)
        for i in range(self.stage.layers):
            x = jnp.concatenate([x, skips[-1 - i]], -1)
            x = _residual(self, f"resnets/{i}", self.resnets[str(i)], x, temb, keys[2 * i])
            x = x if self.fir else _attended(self, i, x, context, bias, keys[2 * i + 1])
        if self.fir:
            # One attention behind all layers.
            x = _attended(self, 0, x, context, bias, keys[1])
            image = None if image is None else fir_double(image)
        if self.resnet_up is not None:
            part = self.skip_conv(nnx.silu(self.skip_norm(x)))
            image = part if image is None else image + part
            x = _residual(self, "resnet_up", self.resnet_up, x, temb, keys[-1])
        if self.upsamplers is not None:
            up = self.upsamplers["0"]
            plain = isinstance(up, Upsample)
            x = up(x, size) if plain else _residual(self, "upsamplers/0", up, x, temb, keys[-1])
        return x, image


def skip_channels(widths: tuple[int, ...], layers: tuple[int, ...]) -> list[list[int]]:
    """The channels of the features that each stage on the way up takes, for stages of `widths` on the way down."""
    made = [widths[0]]
    for i, (width, count) in enumerate(zip(widths, layers, strict=True)):
        made += [width] * count + [width] * (i < len(widths) - 1)
    out = []
    for count in reversed(layers):
        out.append([made.pop() for _ in range(count + 1)])
    return out


def check_types(kind: str, c: Any, known: Sequence[str]) -> None:
    """Raises `ValueError` unless there is one type of block for each of `block_out_channels`, all of them known."""
    for setting, types in (("down_block_types", DOWN), ("up_block_types", UP)):
        names = getattr(c, setting)
        if len(names) != len(c.block_out_channels):
            raise ValueError(f"{kind}: {len(names)} {setting} for {len(c.block_out_channels)} block_out_channels")
        allowed = [name for name in types if name in known]
        for name in names:
            if name not in allowed:
                raise ValueError(f"{kind}: {setting}: {name!r} is not supported; supported: {', '.join(allowed)}")
