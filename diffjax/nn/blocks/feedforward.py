"""The perceptron of a transformer's block, plain or gated."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn.linear import ACTIVATIONS, Linear
from diffjax.nn.norm import dropout
from diffjax.nn.stack import Compute
from diffjax.nn.taps import tap


def _gated(activation, h):
    value, gate = jnp.split(h, 2, axis=-1)
    return value * activation(gate)


# What happens to the first projection, and its width over that of the hidden layer (Shazeer 2020, arXiv:2002.05202).
FEEDFORWARDS = {
    "gelu": (ACTIVATIONS["gelu"], 1),
    "gelu-approximate": (ACTIVATIONS["gelu_new"], 1),
    "geglu": (partial(_gated, ACTIVATIONS["gelu"]), 2),
    "geglu-approximate": (ACTIVATIONS["quick_gelu"], 1),
    "swiglu": (partial(_gated, ACTIVATIONS["silu"]), 2),
    "linear-silu": (ACTIVATIONS["silu"], 1),
}


class FeedForward(nnx.Module):
    """Two linear maps with an activation between them, one of `FEEDFORWARDS`, `[..., C] -> [..., C]`.

    Activations: `hidden [..., hidden]` and `out`.
    """

    def __init__(
        self, width: int, *, activation: str = "geglu", hidden: int | None = None, dropout_rate: float = 0.0,
        bias: bool = True, compute: Compute, rngs,
    ):  # fmt: skip
        hidden, (self.activation, factor) = hidden or 4 * width, FEEDFORWARDS[activation]
        settings = dict(bias=bias, dtype=compute.dtype, rngs=rngs)
        up = nnx.Dict(proj=Linear(width, factor * hidden, **settings))
        self.net = nnx.Dict({"0": up, "2": Linear(hidden, width, **settings)})
        self.dropout_rate = dropout_rate

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        h = tap("hidden", self.activation(self.net["0"]["proj"](x)))
        return tap("out", self.net["2"](dropout(h, self.dropout_rate, key)))
