"""The residual block of convolutions of U-Nets and autoencoders, and changes of resolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.nn.conv import Conv, double, halve
from diffjax.nn.linear import ACTIVATIONS, Linear
from diffjax.nn.norm import GroupNorm, dropout
from diffjax.nn.stack import Compute
from diffjax.nn.taps import tap

FIR = (1, 3, 3, 1)


def filtered(x: jax.Array, *, up: int = 1, down: int = 1, gain: float = 1.0, pad: tuple[int, int]) -> jax.Array:
    """`x [B, H, W, C]` with zeros put between its pixels, filtered by the outer square of `FIR`, and thinned out.

    The upfirdn of Karras et al. 2019, arXiv:1912.04958, with the filter's sum set to `gain`.
    """
    taps = np.outer(FIR, FIR) / np.sum(FIR) ** 2 * gain
    kernel = jnp.asarray(np.broadcast_to(taps[:, :, None, None], (4, 4, 1, x.shape[-1])), x.dtype)
    # Zeros behind the last pixel as well, as between the others.
    pads = ((pad[0], pad[1] + up - 1),) * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (down, down), pads, lhs_dilation=(up, up), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )  # fmt: skip


def fir_double(x: jax.Array) -> jax.Array:
    """Twice the height and width, by interpolation with `FIR` (Song et al. 2021, arXiv:2011.13456)."""
    return filtered(x, up=2, gain=4.0, pad=(2, 1))


def fir_halve(x: jax.Array) -> jax.Array:
    """Half of the height and width, by means with `FIR`."""
    return filtered(x, down=2, pad=(1, 1))


def mean_halve(x: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels; the last row or column of an odd side is left out, as PyTorch's means leave it."""
    return halve(x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2])


# By the `kernel` of the block; both directions.
RESAMPLERS = {None: (double, mean_halve), "fir": (fir_double, fir_halve)}


def resize_nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """`x [B, h, w, C]` at another height and width: each pixel that of the nearest corner above and to the left."""
    rows, columns = ((np.arange(n) * (m / n)).astype(int) for n, m in ((height, x.shape[1]), (width, x.shape[2])))
    return x[:, rows][:, :, columns]


class ResnetBlock(nnx.Module):
    """Two convolutions beside a skip connection, with the embedded time `temb [B, temb_width]` added between them.

    He et al. 2016, arXiv:1512.03385, as DDPM (arXiv:2006.11239) and ADM (arXiv:2105.05233, `film`) have it.

    Args:
      temb_width: None for a block without a time.
      film: the time scales and shifts what is normalised, and is not only added before.
      resample: "up", "down" or None; of both branches, behind the first normalisation.
      kernel: how, one of `RESAMPLERS`.
      rescale: what the sum of both branches is divided by.
      activated: whether `temb` comes without the need of an activation.
      skip: whether the skip connection has a convolution; None where it must.

    Activations: `hidden` and `out`, `[B, H', W', C_out]`.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, temb_width: int | None = None, film: bool = False,
        groups: int = 32, groups_out: int | None = None, eps: float = 1e-6, activation: str = "silu",
        dropout_rate: float = 0.0, resample: str | None = None, kernel: str | None = None, rescale: float = 1.0,
        activated: bool = False, skip: bool | None = None, compute: Compute, rngs,
    ):  # fmt: skip
        settings = dict(dtype=compute.dtype, rngs=rngs)
        self.norm1 = GroupNorm(channels_in, groups, eps=eps)
        self.conv1 = Conv(channels_in, channels_out, **settings)
        self.time_emb_proj = (
            Linear(temb_width, (2 if film else 1) * channels_out, **settings) if temb_width is not None else None
        )
        self.norm2 = GroupNorm(channels_out, groups_out or groups, eps=eps)
        self.conv2 = Conv(channels_out, channels_out, **settings)
        skip = channels_in != channels_out if skip is None else skip
        self.conv_shortcut = Conv(channels_in, channels_out, 1, **settings) if skip else None
        up, down = RESAMPLERS[kernel]
        self.resample = {"up": up, "down": down, None: lambda a: a}[resample]
        self.film, self.activated, self.activation = film, activated, ACTIVATIONS[activation]
        self.dropout_rate, self.rescale = dropout_rate, rescale

    def __call__(self, x: jax.Array, temb: jax.Array | None = None, *, key: jax.Array | None = None) -> jax.Array:
        h = self.resample(self.activation(self.norm1(x)))
        h = tap("hidden", self.conv1(h))
        scale = shift = None
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.activated else self.activation(temb))
            if self.film:
                scale, shift = jnp.split(temb, 2, axis=-1)
            else:
                h = h + temb[:, None, None]
        h = self.activation(self.norm2(h, shift, scale))
        h = self.conv2(dropout(h, self.dropout_rate, key))
        x = self.resample(x)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return tap("out", (x + h) / self.rescale)


class Downsample(nnx.Module):
    """Half of the height and width by a convolution with stride 2, `[B, H, W, C_in] -> [B, H / 2, W / 2, C_out]`.

    `padding` is that of each side; 0 stands for one row and column of zeros on the high side, as in autoencoders.
    """

    def __init__(self, channels: int, channels_out: int | None = None, *, padding: int = 1, compute: Compute, rngs):
        pads = padding or (0, 1)
        self.conv = Conv(channels, channels_out or channels, stride=2, padding=pads, dtype=compute.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return tap("out", self.conv(x))


class Upsample(nnx.Module):
    """Twice the height and width, or the `size` that is asked for, by copies of pixels and a convolution."""

    def __init__(self, channels: int, channels_out: int | None = None, *, compute: Compute, rngs):
        self.conv = Conv(channels, channels_out or channels, dtype=compute.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
        even = size is None or size == (2 * x.shape[1], 2 * x.shape[2])
        return tap("out", self.conv(double(x) if even else resize_nearest(x, *size)))
