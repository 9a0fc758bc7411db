"""Convolutions, resampling, and the residual block of ADM."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn.linear import Linear, bilinear_jvp, product, product_of_kernel, zeros
from diffjax.nn.norm import GroupNorm, dropout, plus
from diffjax.nn.taps import tap


@jax.custom_jvp
def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlation of `x [B, H, W, C_in]`, padded with zeros, with `kernel [h, w, C_in, C_out]`: `[B, H, W, C_out]`.

    On a single device that is a CPU its gradient for the kernel is computed as a product for each of the kernel's
    pixels: XLA's own, a convolution with a window as large as the image, takes two to three times as long there.
    """
    if kernel.shape[:2] == (1, 1):
        return product(x, kernel[0, 0])
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _by_kernel(x, kernel):
    # Several devices that are CPUs stand for others: in tests, and in plans of runs on machines that are not here.
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    return _by_pixels(x, kernel) if alone else convolution(x, kernel)


@jax.checkpoint  # keeps x for the backward pass in place of the parts of it
def _by_pixels(x, kernel):
    """`convolution(x, kernel)` as a sum of products."""
    height, width = kernel.shape[:2]
    edges = [((n - 1) // 2, n // 2) for n in (height, width)]
    padded = jnp.pad(x, ((0, 0), *edges, (0, 0)))
    corners = [(i, j) for i in range(height) for j in range(width)]
    # The gradient of a split is one concatenation.
    pixels = jax.lax.split(kernel.reshape(-1, *kernel.shape[2:]), (1,) * len(corners))
    parts = (padded[:, i : i + x.shape[1], j : j + x.shape[2]] for i, j in corners)
    return sum(product_of_kernel(part, pixel[0]) for part, pixel in zip(parts, pixels, strict=True))


convolution.defjvp(bilinear_jvp(convolution, _by_kernel), symbolic_zeros=True)


class Conv(nnx.Module):
    """A `size` x `size` convolution NHWC -> NHWC; `zero` starts it at zero.

    As Flax's, apart from the gradient of the bias, which is summed in at least float32 (`diffjax.nn.norm.plus`).

    Args:
      stride: of the window, the same in both directions.
      padding: rows and columns of zeros: None for as many as keep height and width at stride 1, a number for each side,
        or a pair for the low and the high side.
    """

    def __init__(
        self, channels_in: int, channels_out: int, size: int = 3, *, stride: int = 1,
        padding: int | tuple[int, int] | None = None, bias: bool = True, zero: bool = False, dtype, rngs,
    ):  # fmt: skip
        init = zeros if zero else nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (size, size, channels_in, channels_out), jnp.float32))
        self.bias = nnx.Param(zeros(rngs.params(), (channels_out,), jnp.float32)) if bias else None
        same = ((size - 1) // 2, size // 2)
        padding = same if padding is None else (padding, padding) if isinstance(padding, int) else tuple(padding)
        self.same, self.stride, self.padding, self.dtype = stride == 1 and padding == same, stride, padding, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.same:
            out = convolution(x, kernel)
        else:
            window = (self.stride, self.stride), (self.padding, self.padding)
            out = jax.lax.conv_general_dilated(x, kernel, *window, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return out if self.bias is None else plus(out, self.bias[...])


def halve(x: jax.Array) -> jax.Array:
    """Means of 2 x 2 pixels: `[B, H, W, C] -> [B, H/2, W/2, C]`, H and W even."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def double(x: jax.Array) -> jax.Array:
    """Every pixel four times: `[B, H, W, C] -> [B, 2H, 2W, C]`."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def unshuffle(x: jax.Array, factor: int) -> jax.Array:
    """`[B, H f, W f, C] -> [B, H, W, C f f]`: the pixels of a square as channels, those of one channel together."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return jnp.transpose(x, (0, 1, 3, 5, 2, 4)).reshape(b, h // factor, w // factor, c * factor**2)


class ResBlock(nnx.Module):
    """ADM's residual block with adaptive group normalisation and resampling inside (arXiv:2105.05233, section 3).

    Args:
      resample: "up", "down" or None; applied to both branches between the first normalisation and convolution.
      dropout_rate: before the second convolution, only in calls that are given a key.

    The second convolution starts at zero, so the block starts as its skip connection. Activations: `film [B, 2 C_out]`,
    `hidden` between the convolutions and `out`, `[B, H', W', C_out]`.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, cond_width: int, groups: int, dropout_rate: float = 0.0,
        resample: str | None = None, dtype, rngs,
    ):  # fmt: skip
        self.norm1 = GroupNorm(channels_in, groups)
        self.conv1 = Conv(channels_in, channels_out, dtype=dtype, rngs=rngs)
        self.film = Linear(cond_width, 2 * channels_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(channels_out, groups)
        self.conv2 = Conv(channels_out, channels_out, zero=True, dtype=dtype, rngs=rngs)
        self.skip = Conv(channels_in, channels_out, 1, dtype=dtype, rngs=rngs) if channels_in != channels_out else None
        self.dropout_rate, self.resample = dropout_rate, resample

    def __call__(self, x: jax.Array, cond: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """`x [B, H, W, C_in]` and the activated condition `cond [B, cond_width]` to `[B, H', W', C_out]`."""
        resample = {"up": double, "down": halve, None: lambda a: a}[self.resample]
        h = tap("hidden", self.conv1(resample(nnx.silu(self.norm1(x)))))
        scale, shift = jnp.split(tap("film", self.film(cond)), 2, axis=-1)
        h = nnx.silu(self.norm2(h, shift, scale))
        h = self.conv2(dropout(h, self.dropout_rate, key))
        x = resample(x)
        return tap("out", h + (x if self.skip is None else self.skip(x)))
