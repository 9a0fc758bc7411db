"""The affine map of the last axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn.norm import plus

zeros = nnx.initializers.zeros_init()
_lecun = nnx.initializers.lecun_normal()


@jax.custom_jvp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x kernel` of `x [..., C_in]` and `kernel [C_in, C_out]`: `[..., C_out]`.

    Its gradient for the kernel is taken through an axis of length one. Without it XLA's CPU back end folds the
    transposition at the end of that gradient into the product, copies the activations for it, and takes twice as long.
    """
    return jnp.dot(x, kernel)


@product.defjvp
def _(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    change = jnp.einsum("...i,iuo->...uo", x, dkernel[:, None])[..., 0, :]
    return product(x, kernel), product(dx, kernel) + change


class Linear(nnx.Module):
    """`x kernel + bias` of `x [..., C_in]`: `[..., C_out]` in `dtype`; parameters are float32, the bias starts at zero.

    As Flax's, apart from the gradient of the bias, which is summed in at least float32 (`diffjax.nn.norm.plus`).
    """

    def __init__(self, channels_in: int, channels_out: int, *, kernel_init=_lecun, dtype, rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (channels_in, channels_out), jnp.float32))
        self.bias = nnx.Param(zeros(rngs.params(), (channels_out,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        return plus(product(x.astype(self.dtype), self.kernel[...].astype(self.dtype)), self.bias[...])
