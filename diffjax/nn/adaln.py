"""Residual blocks that a condition modulates through the layer normalisation (adaLN-Zero)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn.attention import SelfAttention
from diffjax.nn.keys import split_key
from diffjax.nn.linear import Linear
from diffjax.nn.norm import dropout, layer_norm, modulate, times
from diffjax.nn.taps import scope, tap

_zeros = nnx.initializers.zeros_init()
_xavier = nnx.initializers.xavier_uniform()


def modulation(cond_width: int, width: int, parts: int, *, dtype, rngs) -> Linear:
    """The zero-initialised map from an activated condition to `parts` vectors of `width`, concatenated."""
    return Linear(cond_width, parts * width, kernel_init=_zeros, dtype=dtype, rngs=rngs)


class MLPBlock(nnx.Module):
    """`x + gate * perceptron(modulated layer norm of x)` for `x [B, ..., C]`, the identity at first.

    Activations: `modulation [B, 3 C]`, `hidden [B, ..., hidden]`, `down` and `out [B, ..., C]`.
    """

    def __init__(
        self, width: int, hidden: int, *, cond_width: int, dropout_rate: float = 0.0, activation=nnx.gelu, dtype, rngs
    ):
        self.modulation = modulation(cond_width, width, 3, dtype=dtype, rngs=rngs)
        self.up = Linear(width, hidden, kernel_init=_xavier, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, kernel_init=_xavier, dtype=dtype, rngs=rngs)
        self.dropout_rate, self.activation = dropout_rate, activation

    def __call__(self, x: jax.Array, cond: jax.Array, key: jax.Array | None = None) -> jax.Array:
        shift, scale, gate = jnp.split(tap("modulation", self.modulation(cond)), 3, axis=-1)
        h = tap("hidden", self.activation(self.up(modulate(layer_norm(x), shift, scale))))
        h = tap("down", self.down(dropout(h, self.dropout_rate, key)))
        return tap("out", x + times(h, gate.reshape((len(x),) + (1,) * (x.ndim - 2) + (-1,))))


class DiTBlock(nnx.Module):
    """The adaLN-Zero block of DiT (Peebles & Xie 2023, arXiv:2212.09748, section 3.2) on tokens `x [B, T, C]`.

    Attention, then a perceptron; each normalised, modulated and gated by `cond [B, cond_width]`. The identity at first.
    Activations: `modulation`, those of the attention under `attention/`, of the perceptron under `mlp/`.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, *, dropout_rate: float = 0.0, scale: str = "sqrt",
        implementation: str = "xla", dtype, rngs,
    ):  # fmt: skip
        self.modulation = modulation(width, width, 3, dtype=dtype, rngs=rngs)
        attention = dict(scale=scale, implementation=implementation)
        self.attention = SelfAttention(width, heads, **attention, dtype=dtype, rngs=rngs)
        self.mlp = MLPBlock(width, hidden, cond_width=width, dropout_rate=dropout_rate, dtype=dtype, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(self, x: jax.Array, cond: jax.Array, key: jax.Array | None = None) -> jax.Array:
        keys = split_key(key)
        shift, scale, gate = jnp.split(tap("modulation", self.modulation(cond)), 3, axis=-1)
        with scope("attention"):
            h = self.attention(modulate(layer_norm(x), shift, scale))
        x = x + times(dropout(h, self.dropout_rate, keys[0]), gate[:, None])
        with scope("mlp"):
            return self.mlp(x, cond, keys[1])
