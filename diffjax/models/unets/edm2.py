"""EDM2's U-Net, in which every layer keeps the magnitude of what passes through it.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696, config G;
equation numbers are those of its appendix B. There are no biases, no group norms and no learned scales: weights are
normalised where they are used, and sums and concatenations are divided by what they would grow by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.nn import Compute, Fixed, attend, double, dropout, fold_key, halve, scope, tap, widen
from diffjax.nn.conv import convolution
from diffjax.nn.functional import names_of
from diffjax.nn.linear import product
from diffjax.nn.remat import remat

KIND = "EDM2UNet"
EPS = 1e-4
RULES = (
    (r"/(conv_res0|attn_qkv)/kernel$", (None, None, "fsdp", "tensor")),
    (r"/(conv_res1|attn_proj)/kernel$", (None, None, "tensor", "fsdp")),
    (r"/(conv_skip|\d+x\d+_conv)/kernel$", (None, None, None, "fsdp")),
    (r"^out_conv/kernel$", (None, None, "fsdp", None)),
    (r"/emb_linear/kernel$", ("fsdp", "tensor")),
    (r"^(emb_noise|emb_label)/kernel$", (None, "fsdp")),
    (r"^logvar_linear/kernel$|_gain$|/(freqs|phases)$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of the official network, with its defaults; the first three have none and must be given."""

    img_resolution: int | None = None
    img_channels: int | None = None
    label_dim: int | None = None
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    resample_filter: tuple[float, ...] = (1, 1)
    channels_per_head: int = 64
    dropout: float = 0.0
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0
    logvar_channels: int = 128  # of the official wrapper; 0 for a network without the head


def unit(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`w` divided by its root mean square over `axes` plus `EPS`, of w's dtype (Equation 47)."""
    f = widen(w)
    # The gradient of a root at zero is infinite, that of a norm there is zero.
    square = jnp.mean(f * f, axes, keepdims=True)
    rms = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return w / (rms + EPS).astype(w.dtype)


def mp_silu(x: jax.Array) -> jax.Array:
    """SiLU divided by its root mean square on unit Gaussians (Equation 81)."""
    return jax.nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
    """`(1 - t) a + t b`, divided by what independent unit `a` and `b` would have (Equation 88)."""
    return (a + t * (b - a)) / math.hypot(1 - t, t)


def mp_cat(a: jax.Array, b: jax.Array, t: float = 0.5) -> jax.Array:
    """Channels of `a` and `b`, with shares `1 - t` and `t` of the magnitude whatever their number (Equation 103)."""
    whole = math.sqrt((a.shape[-1] + b.shape[-1]) / ((1 - t) ** 2 + t**2))
    parts = (whole / math.sqrt(x.shape[-1]) * share * x for x, share in ((a, 1 - t), (b, t)))
    return jnp.concatenate(list(parts), axis=-1)


def resample(x: jax.Array, mode: str, taps: tuple[float, ...]) -> jax.Array:
    """`x [B, H, W, C]` at twice ("up"), half ("down") or the same ("keep") height and width, by a separable filter."""
    if mode == "keep":
        return x
    if tuple(taps) == (1, 1):
        return halve(x) if mode == "down" else double(x)
    taps = np.asarray(taps, np.float32) / np.sum(taps, dtype=np.float32)
    pad, size, channels = (len(taps) - 1) // 2, len(taps), x.shape[-1]
    # What is put in between are zeros, so that four times the filter's sum keeps the mean; transposed, it lies flipped.
    kernel = np.outer(taps, taps) if mode == "down" else 4 * np.outer(taps, taps)[::-1, ::-1]
    edges, stride, dilation = ((pad,) * 2, 2, 1) if mode == "down" else ((size - 1 - pad,) * 2, 1, 2)
    kernel = jnp.asarray(np.broadcast_to(kernel[:, :, None, None], (size, size, 1, channels)), x.dtype)
    return jax.lax.conv_general_dilated(
        x, kernel, (stride,) * 2, (edges,) * 2, lhs_dilation=(dilation,) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=channels,
    )  # fmt: skip


class MPFourier(nnx.Module):
    """`sqrt(2) cos(f_i t + p_i)` of `t [B]`: `[B, channels] float32` (Equation 75); `f` and `p` are fixed."""

    def __init__(self, channels: int, *, rngs):
        self.freqs = Fixed(2 * np.pi * jax.random.normal(rngs.params(), (channels,), jnp.float32))
        self.phases = Fixed(2 * np.pi * jax.random.uniform(rngs.params(), (channels,), jnp.float32))

    def __call__(self, t: jax.Array) -> jax.Array:
        freqs, phases = (jax.lax.stop_gradient(widen(a[...])) for a in (self.freqs, self.phases))
        return jnp.sqrt(2.0) * jnp.cos(widen(t)[:, None] * freqs + phases)


class MPConv(nnx.Module):
    """A convolution, or with `size=0` a linear map, whose weights have unit mean square for each output (Equation 47).

    The weights are normalised in float32 here and used in the type of the input.
    """

    def __init__(self, channels_in: int, channels_out: int, size: int = 0, *, rngs):
        window = (size, size) if size else ()
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (*window, channels_in, channels_out), jnp.float32))

    def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
        w = widen(self.kernel[...])
        w = unit(w, tuple(range(w.ndim - 1))) * (widen(jnp.asarray(gain)) / math.sqrt(math.prod(w.shape[:-1])))
        w = w.astype(x.dtype)
        return product(x, w) if w.ndim == 2 else convolution(x, w)


class Block(nnx.Module):
    """A residual block of the encoder or decoder, with attention or without (Figure 21).

    Activations: `out [B, H', W', C_out]`; of attention `q`, `k`, `v` `[B, T, N, d]` and `mixed`.
    """

    def __init__(
        self, c: Settings, channels_in: int, channels_out: int, emb_width: int, *, flavor: str, mode: str = "keep",
        attention: bool = False, compute: Compute, rngs,
    ):  # fmt: skip
        self.emb_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.conv_res0 = MPConv(channels_out if flavor == "enc" else channels_in, channels_out, 3, rngs=rngs)
        self.emb_linear = MPConv(emb_width, channels_out, rngs=rngs)
        self.conv_res1 = MPConv(channels_out, channels_out, 3, rngs=rngs)
        self.conv_skip = MPConv(channels_in, channels_out, 1, rngs=rngs) if channels_in != channels_out else None
        self.heads = channels_out // c.channels_per_head if attention else 0
        self.attn_qkv = MPConv(channels_out, 3 * channels_out, 1, rngs=rngs) if self.heads else None
        self.attn_proj = MPConv(channels_out, channels_out, 1, rngs=rngs) if self.heads else None
        self.c, self.flavor, self.mode, self.implementation = c, flavor, mode, compute.attention

    def __call__(self, x: jax.Array, emb: jax.Array, key: jax.Array | None) -> jax.Array:
        c = self.c
        x = resample(x, self.mode, c.resample_filter)
        if self.flavor == "enc":
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = unit(x, (-1,))
        # The residual branch.
        h = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain[...]) + 1
        h = mp_silu(h * scale[:, None, None].astype(h.dtype))
        h = self.conv_res1(dropout(h, c.dropout, key))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, h, c.res_balance)
        if self.heads:
            x = mp_sum(x, self._attention(x), c.attn_balance)
        return tap("out", x if c.clip_act is None else jnp.clip(x, -c.clip_act, c.clip_act))

    def _attention(self, x):
        batch, height, width, channels = x.shape
        qkv = self.attn_qkv(x).reshape(batch, height * width, self.heads, channels // self.heads, 3)
        qkv = unit(qkv, (-2,))  # each query, key and value, over the channels of its head
        q, k, v = (tap(name, qkv[..., i]) for i, name in enumerate("qkv"))
        mixed = tap("mixed", attend(q, k, v, implementation=self.implementation))
        return self.attn_proj(mixed.reshape(x.shape))


def plan(c: Settings) -> tuple[list[tuple[str, tuple]], list[tuple[str, tuple]], int]:
    """What the encoder and the decoder are made of, in order, and the width of the last block.

    Each is `(name, (channels_in, channels_out, mode, attention))`; the convolution in front has the mode "conv".
    """
    widths = [c.model_channels * mult for mult in c.channel_mult]
    sides = [c.img_resolution >> level for level in range(len(widths))]
    enc, dec, now = [], [], c.img_channels + 1
    for level, (width, side) in enumerate(zip(widths, sides, strict=True)):
        if level == 0:
            enc.append((f"{side}x{side}_conv", (now, width, "conv", False)))
            now = width
        else:
            enc.append((f"{side}x{side}_down", (now, now, "down", False)))
        for i in range(c.num_blocks):
            enc.append((f"{side}x{side}_block{i}", (now, width, "keep", side in c.attn_resolutions)))
            now = width
    skips = [facts[1] for _, facts in enc]
    for level, (width, side) in reversed(list(enumerate(zip(widths, sides, strict=True)))):
        if level == len(widths) - 1:
            dec += [(f"{side}x{side}_in{i}", (now, now, "keep", i == 0)) for i in range(2)]
        else:
            dec.append((f"{side}x{side}_up", (now, now, "up", False)))
        for i in range(c.num_blocks + 1):
            wide = now + skips.pop()
            dec.append((f"{side}x{side}_block{i}", (wide, width, "keep", side in c.attn_resolutions)))
            now = width
    return enc, dec, now


class EDM2UNet(nnx.Module):
    """The module of `edm2_unet`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        widths = [c.model_channels * mult for mult in c.channel_mult]
        noise, emb = (
            c.model_channels * mult if mult is not None else width
            for mult, width in ((c.channel_mult_noise, widths[0]), (c.channel_mult_emb, max(widths)))
        )
        self.out_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.emb_fourier = MPFourier(noise, rngs=rngs)
        self.emb_noise = MPConv(noise, emb, rngs=rngs)
        self.emb_label = MPConv(c.label_dim, emb, rngs=rngs) if c.label_dim else None
        enc, dec, last = plan(c)

        def layer(flavor, channels_in, channels_out, mode, attention):
            if mode == "conv":
                return MPConv(channels_in, channels_out, 3, rngs=rngs)
            given = dict(flavor=flavor, mode=mode, attention=attention, compute=compute, rngs=rngs)
            return Block(c, channels_in, channels_out, emb, **given)

        self.enc = nnx.Dict({name: layer("enc", *facts) for name, facts in enc})
        self.dec = nnx.Dict({name: layer("dec", *facts) for name, facts in dec})
        self.out_conv = MPConv(last, c.img_channels, 3, rngs=rngs)
        self.logvar_fourier = MPFourier(c.logvar_channels, rngs=rngs) if c.logvar_channels else None
        self.logvar_linear = MPConv(c.logvar_channels, 1, rngs=rngs) if c.logvar_channels else None
        self.order = tuple(name for name, _ in enc), tuple(name for name, _ in dec)
        self.c, self.compute = c, compute

    def __call__(
        self, x: jax.Array, t: jax.Array, y: jax.Array | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:  # fmt: skip
        """`[B, H, W, C] float32`; `edm2_unet` tells what the arguments are."""
        c = self.c
        settings.expect(KIND, "x", x, None, None, None, c.img_channels)
        factor = 2 ** (len(c.channel_mult) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"{KIND}: x is {x.shape[1]}x{x.shape[2]}; its levels need sides divisible by {factor}")
        emb = self._embed(settings.times_of(KIND, t, x), y)
        run = remat(lambda block, x, emb, key: block(x, emb, key), self.compute.remat, scanned=False)
        count = 0

        def block(side, name, x):
            nonlocal count
            own = fold_key(key, count)
            count += 1
            with scope(f"{side}/{name}"):
                return run(getattr(self, side)[name], x, emb, own)

        x = x.astype(self.compute.dtype)
        # The channel of ones stands in for a bias.
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
        first, *names = self.order[0]
        x = self.enc[first](x)
        skips = [x]
        for name in names:
            x = block("enc", name, x)
            skips.append(x)
        for name in self.order[1]:
            x = mp_cat(x, skips.pop(), c.concat_balance) if "block" in name else x
            x = block("dec", name, x)
        return widen(self.out_conv(x, self.out_gain[...]))

    def _embed(self, t, y):
        """`[B, emb]` in float32, as the official network has it in every mode."""
        emb = self.emb_noise(self.emb_fourier(t))
        if self.emb_label is None and y is not None:
            raise ValueError(f"{KIND}: y is given, but the network has no use for it (label_dim=0); leave it out")
        if self.emb_label is not None:
            y = _one_hot(y, len(t), self.c.label_dim)
            emb = mp_sum(emb, self.emb_label(y * math.sqrt(self.c.label_dim)), self.c.label_balance)
        return tap("emb", mp_silu(emb))

    def logvar(self, t: jax.Array) -> jax.Array:
        """u(sigma) of Equation 21, the log variance of the loss at each level: `[B]` of `t [B]`, float32."""
        if self.logvar_linear is None:
            raise ValueError(f"{KIND}: logvar_channels=0: this network has no estimate of the loss")
        return self.logvar_linear(self.logvar_fourier(jnp.atleast_1d(t)))[:, 0]


def _one_hot(y, batch, count):
    if y is None:
        return jnp.zeros((batch, count), jnp.float32)
    y = jnp.asarray(y)
    if y.ndim == 2:
        settings.expect(KIND, "y", y, batch, count)
        return y.astype(jnp.float32)
    settings.expect(KIND, "y", y, batch)
    return jax.nn.one_hot(y, count, dtype=jnp.float32)


def normalize(params: dict) -> dict:
    """The parameters with every kernel at unit mean square for each output: forced weight normalisation (Equation 66).

    To be called on new parameters and after each step of the optimiser. It hardly changes what the network computes,
    which normalises by itself, but keeps weights from growing, and with them the effective learning rate from falling.
    """
    leaves = {
        name: unit(leaf, tuple(range(leaf.ndim - 1))) if name.endswith("/kernel") else leaf
        for name, leaf in names_of(params).items()
    }
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


def edm2_unet(config: Mapping[str, Any], **how) -> Model:
    """EDM2's U-Net (arXiv:2312.02696) by the arguments of the official class, as `EDM2UNet`.

    It is the raw network F of the paper, with the head for the loss's variance beside it. Its preconditioning is the
    head `edm(sigma_data)`, and `EDM()` levels carry its time, log(sigma) / 4:
    `denoiser(lambda x, t: model.apply(params, x, t, y), edm(0.5))`. Files may have the official `unet.` before names.

    Args:
      config: see `Settings`. EDM2-XS, S, M, L, XL, XXL have model_channels 128, 192, 256, 320, 384, 448, with
        img_resolution 64, img_channels 4, label_dim 1000 on latents of ImageNet-512.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, C], t [B], y=None, *, key=None) -> [B, H, W, C] float32`, zero at first. `y`
      is `[B] int`, of which `label_dim` is no class, or `[B, label_dim]`, weights of the classes; None is no class. A
      key turns dropout on. `apply(params, t, method="logvar")` is the head, `[B]`. See `normalize` for training.

    Raises:
      ValueError: for settings that are unknown or make no network.
    """
    c = settings.read(KIND, Settings, config)
    for name in ("img_resolution", "img_channels", "label_dim"):
        if type(getattr(c, name)) is not int:
            raise ValueError(f"{KIND}: {name}={getattr(c, name)!r}: expected a whole number")
    if len(c.resample_filter) % 2 or not c.resample_filter:
        raise ValueError(f"{KIND}: resample_filter={c.resample_filter!r}: expected an even number of values")
    for _, (_, width, _, attention) in [row for part in plan(c)[:2] for row in part]:
        heads = width // c.channels_per_head
        if attention and heads and width % heads:
            raise ValueError(f"{KIND}: {width} channels with channels_per_head={c.channels_per_head}: {heads} heads")
    make = lambda compute, rngs: EDM2UNet(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
