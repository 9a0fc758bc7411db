"""The U-Net of ADM: adaptive group normalisation, resampling inside residual blocks, attention at chosen resolutions.

Dhariwal & Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", arXiv:2105.05233, section 3.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models.checks import (
    check_attention,
    check_common,
    check_cudnn_heads,
    check_divides,
    check_least,
    check_remat,
    ends_of,
    network,
)
from diffjax.nn import (
    Compute,
    Condition,
    Conv,
    GroupNorm,
    PixelAttention,
    ResBlock,
    fold_key,
    functional,
    scope,
    tap,
    widen,
)
from diffjax.nn import remat as checkpointed

# First match wins: the projections of attention and condition are matrices, the other `inp` and `out` are convolutions.
# In a block the first convolution makes some of the channels on each device and the second sums over them, as in the
# perceptron of a transformer (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
RULES = (
    (r"/attention/out/kernel$|^cond/out/kernel$", ("tensor", "fsdp")),
    (r"/qkv/kernel$", (("tensor", "fsdp"), None)),
    (r"/film/kernel$|^cond/hidden/kernel$", ("fsdp", "tensor")),
    (r"/conv1/kernel$", (None, None, "fsdp", "tensor")),
    (r"/conv2/kernel$", (None, None, "tensor", "fsdp")),
    (r"/skip/kernel$", (None, None, "fsdp", None)),
    (r"^inp/kernel$", (None, None, None, "fsdp")),
    (r"^out/kernel$", (None, None, "fsdp", None)),
    (r"(^|/)embedding$", (None, "fsdp")),
    (r"/conv1/bias$|/norm2/(bias|scale)$", ("tensor",)),
    (r"(^|/)(bias|scale)$", ()),
)
ACTIVATIONS = (
    (r"/hidden$", ("batch", None, None, "tensor")),
    (r"/kernel/rows$", ("tensor",)),
    (r"/kernel/heads$", (None, None, "tensor")),
    (r"/(q|k|v|mixed)$", ("batch", None, "tensor")),
    (r"(^|/)(cond|film|features|out)$", ("batch",)),
    (r"^labels$", ()),
)


class UNet(nnx.Module):
    """The module of `unet`: `enc`, `mid` and `dec` hold blocks under names such as `8x8_block0`.

    Activations: `cond [B, 4 C]`, `features [B, H, W, C]` (the first block's input), those of `ResBlock` and
    `PixelAttention` under their block's name, such as `dec/8x8_block0/out`.
    """

    def __init__(
        self, ends: tuple[tuple[int, ...], tuple[int, ...]], *, num_classes: int, widths: tuple[int, ...], blocks: int,
        attention: tuple[int, ...], head_width: int, groups: int, dropout: float, time: dict, compute: Compute, rngs,
    ):  # fmt: skip
        (shape, (*_, channels_out)), base, cond_width = ends, widths[0], 4 * widths[0]
        given = dict(dtype=compute.dtype, rngs=rngs)

        def block(channels_in, channels_out, resample=None):
            return ResBlock(
                channels_in, channels_out, cond_width=cond_width, groups=groups, dropout_rate=dropout,
                resample=resample, **given,
            )  # fmt: skip

        def attend(channels):
            heads = channels // head_width
            return PixelAttention(channels, heads, groups=groups, implementation=compute.attention, **given)

        self.cond = Condition(cond_width, num_classes, **time, **given)
        self.inp = Conv(shape[-1], base, **given)
        enc, dec, skips, channels = {}, {}, [base], base
        sizes = [f"{shape[0] >> i}x{shape[1] >> i}" for i in range(len(widths))]
        for i, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            if i:
                enc[f"{size}_down"] = block(channels, channels, "down")
                skips.append(channels)
            for j in range(blocks):
                enc[f"{size}_block{j}"] = block(channels, width)
                channels = width
                if shape[0] >> i in attention:
                    enc[f"{size}_attention{j}"] = attend(width)
                skips.append(width)
        middle = block(channels, channels), attend(channels), block(channels, channels)
        self.mid = nnx.Dict(block0=middle[0], attention=middle[1], block1=middle[2])
        for i, (size, width) in reversed(list(enumerate(zip(sizes, widths, strict=True)))):
            for j in range(blocks + 1):
                dec[f"{size}_block{j}"] = block(channels + skips.pop(), width)
                channels = width
                if shape[0] >> i in attention:
                    dec[f"{size}_attention{j}"] = attend(width)
            if i:
                dec[f"{size}_up"] = block(channels, channels, "up")
        self.enc, self.dec = nnx.Dict(enc), nnx.Dict(dec)
        # The order of the blocks is a fact of the architecture; dictionaries of parameters are sorted by name.
        self.order, self.remat = (tuple(enc), tuple(dec)), compute.remat
        self.norm = GroupNorm(base, groups)
        self.out = Conv(base, channels_out, zero=True, **given)

    def __call__(self, x, t, y, *, key=None):
        count = iter(range(1 << 16))

        def run(part, name, h):
            block = getattr(self, part)[name]
            attends = isinstance(block, PixelAttention)
            inputs = () if attends else (cond, fold_key(key, next(count)))
            return checkpointed(partial(_named, block, f"{part}/{name}"), self.remat)(h, *inputs)

        cond = tap("cond", nnx.silu(self.cond(t, y)))
        h = tap("features", self.inp(x))
        skips = [h]
        for name in self.order[0]:
            if "attention" in name:
                skips.pop()
            h = run("enc", name, h)
            skips.append(h)
        for name in ("block0", "attention", "block1"):
            h = run("mid", name, h)
        for name in self.order[1]:
            h = run("dec", name, jnp.concatenate([h, skips.pop()], -1) if "block" in name else h)
        return widen(self.out(nnx.silu(self.norm(h))))


def _named(block, name, *inputs):
    with scope(name):
        return block(*inputs)


def unet(
    *, shape: tuple[int, int, int], num_classes: int = 0, width: int = 128, mults: tuple[int, ...] = (1, 2, 2, 2),
    blocks: int = 2, attention: tuple[int, ...] = (16,), head_width: int = 64, groups: int = 32, dropout: float = 0.0,
    dtype: str = "float32", time_embed: str = "sinusoidal", time_scale: float = 1000.0, remat: str | bool = "none",
    extra_in: int = 0, extra_out: int = 0, shapes: tuple = (), attention_impl: str = "xla",
) -> Model:  # fmt: skip
    """ADM's U-Net (arXiv:2105.05233, section 3); its output starts at zero.

    Args:
      shape: `(H, W, C)` of the images; both sides divisible by `2 ** (len(mults) - 1)`.
      shapes: others that it takes as well, `((H, W, C), ...)`, on the levels that `shape` has.
      num_classes: 0 for an unconditional network, whose `y` is ignored.
      width, mults: the levels, finest first, have `width * mult` channels.
      blocks: residual blocks a level on the way down; one more on the way up.
      attention: heights of the feature maps that get attention; the coarsest map has it in the middle in any case.
      head_width: channels of one attention head.
      groups: of the group normalisation.
      dropout: rate inside the residual blocks, in calls with a key.
      dtype: of the computation: "float32", "bfloat16", "float16" or (in x64 mode) "float64"; parameters are float32.
      time_embed, time_scale: "sinusoidal" or "fourier", and the factor of the time inside (1000 for times in [0, 1]).
      remat: which activations of a block are computed again in the backward pass instead of kept, one of
        `diffjax.nn.POLICIES`: "none", "full", "dots", "dots_no_batch"; True is "full".
      extra_in, extra_out: channels of `x` and of the output beyond C, such as those of a second image beside it.
      attention_impl: one of `diffjax.nn.IMPLEMENTATIONS`; see `diffjax.nn.attend`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, C], t [B], y [B] int or None, *, key=None) -> [B, H, W, C] float32`. Without
      labels, or with `y == num_classes`, the network is unconditional; a key turns dropout on.

    Raises:
      ValueError: for settings that make no network.
      ImportError: for `attention_impl="tokamax"` without the package.
    """
    config = dict(locals(), name="unet", shape=tuple(shape), mults=tuple(mults), attention=tuple(attention))
    check_common("unet", shape, num_classes, dropout=dropout, dtype=dtype, time_embed=time_embed, waves=width)
    check_least("unet", 1, width=width, blocks=blocks, head_width=head_width, groups=groups)
    _check_levels(shape, width, mults, attention, head_width, groups)
    check_attention("unet", "attention_impl", attention_impl, dtype)
    if attention_impl == "cudnn":
        check_cudnn_heads("unet", "attention_impl", head_width, f"head_width={head_width}")
    for other in shapes:
        _check_levels(other, width, mults, (), head_width, groups)
    ends = ends_of("unet", shape, extra_in, extra_out)
    widths = tuple(width * mult for mult in mults)
    time = dict(waves=width, time_embed=time_embed, time_scale=time_scale)
    sizes = dict(num_classes=num_classes, widths=widths, blocks=blocks, attention=attention, head_width=head_width)
    compute = Compute(jnp.dtype(dtype), attention_impl, remat=check_remat("unet", remat))
    rest = dict(groups=groups, dropout=dropout, time=time, compute=compute)
    module = functional(lambda rngs: UNet(ends, **sizes, **rest, rngs=rngs))
    return Model(*network("unet", ends[0], module, shapes), config=config, rules=RULES, activations=ACTIVATIONS)


def _check_levels(shape, width, mults, attention, head_width, groups) -> None:
    if not mults:
        raise ValueError("unet: mults=(): expected a factor of the width for each level, such as (1, 2, 2)")
    for mult in mults:
        check_least("unet", 1, mults=mult)
    height, breadth, _ = shape
    factor = 2 ** (len(mults) - 1)
    if height % factor or breadth % factor:
        most = next(n for n in reversed(range(len(mults))) if height % 2**n == 0 and breadth % 2**n == 0) + 1
        raise ValueError(
            f"unet: {len(mults)} levels need sides divisible by {factor}, got {height}x{breadth}; "
            f"use at most {most} mults"
        )
    heights = [height >> i for i in range(len(mults))]
    for resolution in attention:
        if resolution not in heights:
            best = min(heights, key=lambda h: abs(h - resolution))
            raise ValueError(
                f"unet: attention at {resolution}, but the feature maps have heights {heights}; did you mean {best}?"
            )
    check_divides("unet", "groups", groups, "the channels", *(width * mult for mult in mults))
    attended = [width * m for m, h in zip(mults, heights, strict=True) if h in attention] + [width * mults[-1]]
    check_divides("unet", "head_width", head_width, "the channels", *attended)
