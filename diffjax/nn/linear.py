"""The affine map of the last axis."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.custom_derivatives import SymbolicZero

from diffjax.nn.norm import plus

zeros = nnx.initializers.zeros_init()
_lecun = nnx.initializers.lecun_normal()


@jax.custom_jvp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x kernel` of `x [..., C_in]` and `kernel [C_in, C_out]`: `[..., C_out]`; both gradients are fast on CPU."""
    return jnp.dot(x, kernel)


def product_of_kernel(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same, with the fast transposition for the kernel: the product goes through an axis of length one.

    Without that axis XLA's CPU back end folds the transposition at the end of the kernel's gradient into the product,
    copies the activations for it, and takes twice as long.
    """
    return jnp.einsum("...i,iuo->...uo", x, kernel[:, None])[..., 0, :]


def bilinear_jvp(fn: Callable, by_kernel: Callable) -> Callable:
    """The rule for `defjvp(..., symbolic_zeros=True)` of a bilinear `fn(x, kernel)`, whose change with the kernel is
    computed as `by_kernel(x, change of the kernel)`."""

    def rule(primals, tangents):
        (x, kernel), (dx, dkernel) = primals, tangents
        # Of what does not change nothing is computed, as in a likelihood, whose parameters are fixed.
        changes = [fn(dx, kernel)] if not isinstance(dx, SymbolicZero) else []
        changes += [by_kernel(x, dkernel)] if not isinstance(dkernel, SymbolicZero) else []
        return fn(x, kernel), sum(changes[1:], changes[0])

    return rule


product.defjvp(bilinear_jvp(product, product_of_kernel), symbolic_zeros=True)


class Linear(nnx.Module):
    """`x kernel + bias` of `x [..., C_in]`: `[..., C_out]` in `dtype`; parameters are float32, the bias starts at zero.

    As Flax's, apart from the gradient of the bias, which is summed in at least float32 (`diffjax.nn.norm.plus`).
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, bias: bool = True, kernel_init=_lecun, dtype, rngs
    ):  # fmt: skip
        self.kernel = nnx.Param(kernel_init(rngs.params(), (channels_in, channels_out), jnp.float32))
        self.bias = nnx.Param(zeros(rngs.params(), (channels_out,), jnp.float32)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        out = product(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return out if self.bias is None else plus(out, self.bias[...])


def _quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


# By the names that configs of checkpoints have for them.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "mish": jax.nn.mish,
    "quick_gelu": _quick_gelu,  # Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
