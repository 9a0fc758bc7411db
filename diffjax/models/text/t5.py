"""The encoders of T5 and UMT5, as transformers stores them.

Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
arXiv:1910.10683; Chung et al. 2023, "UniMax", arXiv:2304.09151 (UMT5). Positions enter as numbers that are added to the
scores, by the distance of two tokens: T5 learns them once for all layers, UMT5 in each.
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
from diffjax.models.text.shared import HIDDEN, activation, check_ids, mix, read
from diffjax.nn import Compute, Linear, RMSNorm, run_stack, scope, stack, tap, widen
from diffjax.nn.blocks import Embedding, mask_bias

RULES = (
    (r"block/.*/([qkv]|wi|wi_0|wi_1)/kernel$", (None, "fsdp", "tensor")),
    (r"block/.*/(o|wo)/kernel$", (None, "tensor", "fsdp")),
    (r"block/0/.*/relative_attention_bias/embedding$", (None, "tensor")),
    (r"block/.*/relative_attention_bias/embedding$", (None, None, "tensor")),
    (r"^shared/embedding$", ("tensor", "fsdp")),
    (r"/scale$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `T5EncoderModel`, with its defaults.

    `feed_forward_proj` is the name of an activation, with "gated-" in front for a product of two projections;
    "gated-gelu" means the approximate GELU. `dense_act_fn` and `is_gated_act` replace what it says.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None


@dataclasses.dataclass(frozen=True)
class UMT5Settings:
    """The config of a `UMT5EncoderModel`, with its defaults; see `Settings`."""

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None


def buckets(length: int, count: int, farthest: int) -> np.ndarray:
    """Which of `count` buckets the distance from query i to key j lies in, `[length, length] int`.

    Half of the buckets are for keys behind the query. Half of each half holds one distance each, the rest have
    logarithmic bounds up to `farthest`, and the last one all that is beyond (arXiv:1910.10683, section 2.1). The
    logarithm is rounded to float32, as in the networks that were trained with it.
    """
    half = count // 2
    exact = half // 2
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    far = np.abs(distance)
    ratio = np.maximum(far, 1).astype(np.float32) / np.float32(exact)
    part = np.log(ratio.astype(np.float64)).astype(np.float32) / np.float32(math.log(farthest / exact))
    bounded = np.minimum(exact + (part * np.float32(half - exact)).astype(int), half - 1)
    return (distance > 0) * half + np.where(far < exact, far, bounded)


def _positions(c: Settings | UMT5Settings, length: int, table: Embedding) -> jax.Array:
    """What the distances add to the scores, `[1, heads, length, length]`."""
    index = buckets(length, c.relative_attention_num_buckets, c.relative_attention_max_distance)
    return jnp.moveaxis(table(jnp.asarray(index)), -1, 0)[None]


class Attention(nnx.Module):
    """Self-attention of the normalised input; products are not scaled."""

    def __init__(self, c, *, per_layer: bool, compute: Compute, rngs):
        inner, given = c.num_heads * c.d_kv, dict(bias=False, dtype=compute.dtype, rngs=rngs)
        projections = {name: Linear(c.d_model, inner, **given) for name in "qkv"}
        table = dict(relative_attention_bias=_table(c, compute, rngs)) if per_layer else {}
        self.SelfAttention = nnx.Dict(**projections, o=Linear(inner, c.d_model, **given), **table)
        self.layer_norm = RMSNorm(c.d_model, eps=c.layer_norm_epsilon)
        self.c, self.per_layer, self.compute = c, per_layer, compute

    def __call__(self, x: jax.Array, positions: jax.Array | None, bias: jax.Array | None) -> jax.Array:
        h, layer = self.layer_norm(x), self.SelfAttention
        if self.per_layer:
            positions = _positions(self.c, x.shape[1], layer["relative_attention_bias"])
        bias = widen(positions) if bias is None else widen(positions) + bias
        mixed = mix(*(layer[n](h) for n in "qkv"), self.c.num_heads, compute=self.compute, scale=1.0, bias=bias)
        return tap("out", layer["o"](mixed))


class FeedForward(nnx.Module):
    """A perceptron of the normalised input, gated or not; the last projection is in float32 at least.

    That projection meets numbers beyond float16's range, and transformers keeps it in float32 as well.
    """

    def __init__(self, c, *, compute: Compute, rngs):
        given = dict(bias=False, dtype=compute.dtype, rngs=rngs)
        wide = {**given, "dtype": jnp.promote_types(compute.dtype, jnp.float32)}
        name, self.gated = _feedforward(c)
        names = ("wi_0", "wi_1") if self.gated else ("wi",)
        up = {n: Linear(c.d_model, c.d_ff, **given) for n in names}
        self.DenseReluDense = nnx.Dict(**up, wo=Linear(c.d_ff, c.d_model, **wide))
        self.layer_norm = RMSNorm(c.d_model, eps=c.layer_norm_epsilon)
        self.activation = activation("T5", "dense_act_fn", name)

    def __call__(self, x: jax.Array) -> jax.Array:
        h, layer = self.layer_norm(x), self.DenseReluDense
        if self.gated:
            h = widen(self.activation(layer["wi_0"](h))) * widen(layer["wi_1"](h))
        else:
            h = self.activation(layer["wi"](h))
        return tap("out", layer["wo"](tap("hidden", h)))


class Block(nnx.Module):
    """Attention and a perceptron, added to `x` in float32 at least."""

    def __init__(self, c, *, per_layer: bool, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        self.layer = nnx.Dict({"0": Attention(c, per_layer=per_layer, **given), "1": FeedForward(c, **given)})

    def __call__(self, x, positions, bias):
        with scope("layer/0"):
            x = x + widen(self.layer["0"](x, positions, bias))
        with scope("layer/1"):
            x = x + widen(self.layer["1"](x))
        return tap("out", x)


class Encoder(nnx.Module):
    """The module of `t5_encoder` and `umt5_encoder`."""

    def __init__(self, c, *, kind: str, per_layer: bool, compute: Compute, rngs):
        self.shared = Embedding(c.vocab_size, c.d_model, compute=compute, rngs=rngs)
        make = lambda rngs: Block(c, per_layer=per_layer, compute=compute, rngs=rngs)
        layers = dict(stack(make, 0, c.num_layers, rngs=rngs).items())
        if not per_layer:
            # The first layer's alone; beside the stack, so that all layers have one shape.
            table = nnx.Dict(SelfAttention=nnx.Dict(relative_attention_bias=_table(c, compute, rngs)))
            layers["0"] = nnx.Dict(layer=nnx.Dict({"0": table}))
        norm = RMSNorm(c.d_model, eps=c.layer_norm_epsilon)
        self.encoder = nnx.Dict(block=nnx.Dict(layers), final_layer_norm=norm)
        self.c, self.kind, self.compute = c, kind, compute

    def __call__(self, ids: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        check_ids(self.kind, ids, mask)
        layers = dict(self.encoder["block"].items())
        first = layers.pop("0", None)
        table = None if first is None else first["layer"]["0"]["SelfAttention"]["relative_attention_bias"]
        positions = None if table is None else _positions(self.c, ids.shape[1], table)
        bias = mask_bias(mask, HIDDEN)

        def body(block, h, i):
            with scope("encoder/block"):
                return block(h, positions, bias), None

        x, _ = run_stack(layers, body, tap("tokens", widen(self.shared(ids))), self.compute)
        return widen(self.encoder["final_layer_norm"](x))


def _table(c, compute, rngs):
    return Embedding(c.relative_attention_num_buckets, c.num_heads, compute=compute, rngs=rngs)


def _feedforward(c) -> tuple[str, bool]:
    """The activation, and whether the perceptron is gated."""
    gate, _, name = c.feed_forward_proj.rpartition("-")
    name = "gelu_new" if c.feed_forward_proj == "gated-gelu" else name
    return c.dense_act_fn or name, gate == "gated" if c.is_gated_act is None else c.is_gated_act


def _encoder(kind, cls, config, how, per_layer):
    c = read(kind, cls, config)
    given = c.feed_forward_proj
    if given.rpartition("-")[0] not in ("", "gated"):
        raise ValueError(f"{kind}: feed_forward_proj={given!r} is not supported; supported: 'relu', 'gated-gelu', ...")
    activation(kind, "feed_forward_proj" if c.dense_act_fn is None else "dense_act_fn", _feedforward(c)[0])
    count, farthest = c.relative_attention_num_buckets, c.relative_attention_max_distance
    if count < 4 or farthest <= count // 4:
        raise ValueError(
            f"{kind}: relative_attention_num_buckets={count}, relative_attention_max_distance={farthest}: expected at "
            f"least 4 buckets, and a distance of more than a quarter of them"
        )
    make = lambda compute, rngs: Encoder(c, kind=kind, per_layer=per_layer, compute=compute, rngs=rngs)
    return settings.model(kind, config, make, settings.how(kind, **how), RULES)


def t5_encoder(config: Mapping[str, Any], **how) -> Model:
    """`T5EncoderModel` (arXiv:1910.10683) by the config of a checkpoint.

    Args:
      config: see `Settings`; keys of `diffjax.models.text.GENERIC` are passed over. Dropout is never on.
      how: see `diffjax.models.settings.how`. Whatever the dtype, sums over layers and the perceptrons' last projections
        are float32 at least, without which the larger networks overflow in float16.

    Returns:
      A `Model`: `apply(params, ids [B, L] int, *, mask=None)`, the last hidden state `[B, L, d_model] float32`.
      `mask [B, L]` is 1 where a token is seen.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    return _encoder("T5EncoderModel", Settings, config, how, False)


def umt5_encoder(config: Mapping[str, Any], **how) -> Model:
    """`UMT5EncoderModel` (arXiv:2304.09151) by the config of a checkpoint; see `t5_encoder` and `UMT5Settings`."""
    return _encoder("UMT5EncoderModel", UMT5Settings, config, how, True)
