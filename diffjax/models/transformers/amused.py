"""The transformer of aMUSEd, which fills in the masked tokens of an image, `UVit2DModel`.

Patil et al. 2024, arXiv:2401.01808, after Muse (Chang et al. 2023, arXiv:2301.00704): blocks of convolutions (Woo et
al. 2023, arXiv:2301.00808) around a transformer as in Hoogeboom et al. 2023, arXiv:2301.11093.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.nn import (
    Compute,
    Conv,
    LayerNorm,
    Linear,
    RMSNorm,
    dropout,
    fold_key,
    modulate,
    plus,
    run_stack,
    scope,
    split_key,
    stack,
    tap,
    times,
    timestep_waves,
    widen,
)
from diffjax.nn.blocks import Attention, Embedding, FeedForward, Projection
from diffjax.nn.linear import ACTIVATIONS, zeros

KIND = "UVit2DModel"
RULES = (
    (r"/(to_[qkv]|proj|channelwise_linear_1)/kernel$", (None, "fsdp", "tensor")),
    (r"/(to_out/0|net/2|channelwise_linear_2)/kernel$", (None, "tensor", "fsdp")),
    (r"/(to_[qkv]|proj|channelwise_linear_1)/bias$", (None, "tensor")),
    (r"/(linear|kv_mapper|cond_embeds_mapper)/kernel$", (None, "fsdp", None)),
    (r"/depthwise/kernel$", ()),
    (r"/channelwise_norm/(gamma|beta)$", (None, None, None, None, "tensor")),
    (r"^cond_embed/linear_1/kernel$", ("fsdp", "tensor")),
    (r"^cond_embed/linear_2/kernel$", ("tensor", "fsdp")),
    (r"^(encoder_proj|project_to_hidden|project_from_hidden)/kernel$", ("fsdp", None)),
    (r"^embed/embeddings/embedding$", (None, "fsdp")),
    (r"^(embed/conv|mlm_layer/conv1|(down|up)_block/(down|up)sample/conv)/kernel$", (None, None, "fsdp", None)),
    (r"^mlm_layer/conv2/kernel$", (None, None, "fsdp", "tensor")),
    (r"(^|/)(bias|scale)$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `UVit2DModel`, with its defaults."""

    hidden_size: int = 1024
    use_bias: bool = False
    hidden_dropout: float = 0.0
    cond_embed_dim: int = 768
    micro_cond_encode_dim: int = 256
    micro_cond_embed_dim: int = 1280
    encoder_hidden_size: int = 768
    vocab_size: int = 8256
    codebook_size: int = 8192
    in_channels: int = 768
    block_out_channels: int = 768
    num_res_blocks: int = 3
    downsample: bool = False
    upsample: bool = False
    block_num_heads: int = 12
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    attention_dropout: float = 0.0
    intermediate_size: int = 2816
    layer_norm_eps: float = 1e-6
    ln_elementwise_affine: bool = True
    sample_size: int = 64  # of nothing: the network takes any height and width


class Depthwise(nnx.Module):
    """A 3 x 3 convolution of each channel by itself, `[B, H, W, C] -> [B, H, W, C]`.

    It is a sum of nine products: of XLA's convolution over groups the gradient for the kernel is wrong where the batch
    is split over devices.
    """

    def __init__(self, channels: int, *, bias: bool, dtype, rngs):
        # Nine inputs for each output.
        init = nnx.initializers.normal(1 / 3)
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, 1, channels), jnp.float32))
        self.bias = nnx.Param(zeros(rngs.params(), (channels,), jnp.float32)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        # Rounded to the dtype as the inputs of a convolution are, and once more behind its sum.
        x, kernel = (widen(a.astype(self.dtype)) for a in (x, self.kernel[:, :, 0]))
        padded, (height, width) = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), x.shape[1:3]
        parts = (padded[:, i : i + height, j : j + width] * kernel[i, j] for i in range(3) for j in range(3))
        out = sum(parts).astype(self.dtype)
        return out if self.bias is None else plus(out, self.bias[...])


class Doubling(nnx.Module):
    """Twice the height and width by a transposed convolution whose windows do not overlap, `[B, H, W, C]`.

    The kernel is `[2, 2, C_out, C_in]`.
    """

    def __init__(self, channels: int, *, bias: bool, dtype, rngs):
        init = nnx.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        self.kernel = nnx.Param(init(rngs.params(), (2, 2, channels, channels), jnp.float32))
        self.bias = nnx.Param(zeros(rngs.params(), (channels,), jnp.float32)) if bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, _ = x.shape
        out = jnp.einsum("bijc,pqoc->bipjqo", x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        out = out.reshape(b, 2 * h, 2 * w, -1)
        return out if self.bias is None else plus(out, self.bias[...])


class ResponseNorm(nnx.Module):
    """Channels of `x [B, H, W, C]` compete: each is scaled by its size over the mean size (arXiv:2301.00808, eq. 3)."""

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.zeros((1, 1, 1, channels), jnp.float32))
        self.beta = nnx.Param(jnp.zeros((1, 1, 1, channels), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        f = widen(x)
        square = jnp.sum(f * f, axis=(1, 2), keepdims=True)
        # The root has no gradient at zero.
        size = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
        relative = size / (size.mean(-1, keepdims=True) + 1e-6)
        return (plus(times(f * relative, self.gamma[...]), self.beta[...]) + f).astype(x.dtype)


class AdaNorm(nnx.Module):
    """A norm that is scaled and shifted by a vector for each sample."""

    def __init__(self, c: Settings, norm: nnx.Module, *, compute: Compute, rngs):
        self.linear = Linear(c.hidden_size, 2 * c.hidden_size, bias=c.use_bias, dtype=compute.dtype, rngs=rngs)
        self.norm = norm

    def __call__(self, x: jax.Array, cond: jax.Array) -> jax.Array:
        scale, shift = jnp.split(tap("modulation", self.linear(nnx.silu(cond))), 2, axis=-1)
        return modulate(self.norm(x), shift, scale)


class Layer(nnx.Module):
    """Self-attention, attention to the text, and a gated perceptron."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, given = c.hidden_size, dict(compute=compute, rngs=rngs)
        affine = dict(eps=c.layer_norm_eps, scale=c.ln_elementwise_affine)
        sizes = width, c.num_attention_heads, width // c.num_attention_heads
        biases = dict(bias=c.use_bias, out_bias=c.use_bias, dropout_rate=c.hidden_dropout)
        self.norm1 = AdaNorm(c, RMSNorm(width, **affine), **given)
        self.attn1 = Attention(*sizes, **biases, **given)
        self.norm2 = AdaNorm(c, RMSNorm(width, **affine), **given)
        self.attn2 = Attention(*sizes, context_width=width, **biases, **given)
        self.norm3 = AdaNorm(c, LayerNorm(width, bias=c.use_bias, **affine), **given)
        self.ff = FeedForward(
            width, hidden=c.intermediate_size, dropout_rate=c.hidden_dropout, bias=c.use_bias, **given
        )

    def __call__(self, x: jax.Array, context: jax.Array, cond: jax.Array, key: jax.Array | None) -> jax.Array:
        """`[B, T, hidden_size]` of `x` of this shape, `context [B, L, hidden_size]` and `cond [B, hidden_size]`."""
        keys = split_key(key, 3)
        with scope("attn1"):
            x = x + self.attn1(self.norm1(x, cond), key=keys[0])
        with scope("attn2"):
            x = x + self.attn2(self.norm2(x, cond), context, key=keys[1])
        with scope("ff"):
            return tap("out", x + self.ff(self.norm3(x, cond), key=keys[2]))


class ConvNext(nnx.Module):
    """A residual block of a depthwise convolution and a perceptron over channels, modulated at its end."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, given = c.block_out_channels, dict(bias=c.use_bias, dtype=compute.dtype, rngs=rngs)
        self.depthwise = Depthwise(width, **given)
        self.norm = RMSNorm(width, eps=c.layer_norm_eps, scale=c.ln_elementwise_affine)
        self.channelwise_linear_1 = Linear(width, 4 * width, **given)
        self.channelwise_norm = ResponseNorm(4 * width)
        self.channelwise_linear_2 = Linear(4 * width, width, **given)
        self.cond_embeds_mapper = Linear(c.hidden_size, 2 * width, **given)
        self.dropout_rate = c.hidden_dropout

    def __call__(self, x: jax.Array, cond: jax.Array, key: jax.Array | None) -> jax.Array:
        """`[B, H, W, block_out_channels]` of `x` of this shape and `cond [B, hidden_size]`."""
        h = ACTIVATIONS["gelu"](self.channelwise_linear_1(self.norm(self.depthwise(x))))
        h = self.channelwise_linear_2(tap("hidden", self.channelwise_norm(h)))
        scale, shift = jnp.split(self.cond_embeds_mapper(nnx.silu(cond)), 2, axis=-1)
        return tap("out", modulate(x + dropout(h, self.dropout_rate, key), shift, scale))


class TextBlock(nnx.Module):
    """Two attentions of pixels `[B, T, C]` to the text, without a perceptron."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, given = c.block_out_channels, dict(compute=compute, rngs=rngs)
        mapped = c.hidden_size != width
        self.kv_mapper = (
            Linear(c.hidden_size, width, bias=c.use_bias, dtype=compute.dtype, rngs=rngs) if mapped else None
        )
        sizes = width, c.block_num_heads, width // c.block_num_heads
        biases = dict(bias=c.use_bias, out_bias=c.use_bias, dropout_rate=c.attention_dropout)
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attn1 = Attention(*sizes, context_width=width, **biases, **given)
        self.attn2 = Attention(*sizes, context_width=width, **biases, **given)

    def __call__(self, x: jax.Array, context: jax.Array, key: jax.Array | None) -> jax.Array:
        """`[B, T, block_out_channels]` of `x` of this shape and `context [B, L, hidden_size]`."""
        keys = split_key(key)
        context = context if self.kv_mapper is None else self.kv_mapper(nnx.silu(context))
        with scope("attn1"):
            x = x + self.attn1(self.norm1(x), context, key=keys[0])
        with scope("attn2"):
            return tap("out", x + self.attn2(self.norm2(x), context, key=keys[1]))


class Resample(nnx.Module):
    """A norm, and half or twice the height and width."""

    def __init__(self, c: Settings, *, up: bool, compute: Compute, rngs):
        width, given = c.block_out_channels, dict(bias=c.use_bias, dtype=compute.dtype, rngs=rngs)
        self.norm = RMSNorm(width, eps=c.layer_norm_eps, scale=c.ln_elementwise_affine)
        # A row and a column of zeros behind an odd side.
        self.conv = Doubling(width, **given) if up else Conv(width, width, 2, stride=2, padding=(0, 1), **given)

    def __call__(self, x: jax.Array) -> jax.Array:
        return tap("out", self.conv(self.norm(x)))


class Stage(nnx.Module):
    """Residual blocks and attention to the text in turns, at the image's resolution or half of it."""

    def __init__(self, c: Settings, *, down: bool = False, up: bool = False, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        self.downsample = Resample(c, up=False, **given) if down else None
        self.res_blocks = stack(lambda rngs: ConvNext(c, compute=compute, rngs=rngs), 0, c.num_res_blocks, rngs=rngs)
        self.attention_blocks = stack(
            lambda rngs: TextBlock(c, compute=compute, rngs=rngs), 0, c.num_res_blocks, rngs=rngs
        )
        self.upsample = Resample(c, up=True, **given) if up else None
        self.compute = compute

    def __call__(self, x: jax.Array, context: jax.Array, cond: jax.Array, key: jax.Array | None) -> jax.Array:
        """`[B, H', W', block_out_channels]` of `x [B, H, W, block_out_channels]`, the text's states `context [B, L,
        hidden_size]` and the embedded conditions `cond [B, hidden_size]`."""
        if self.downsample is not None:
            with scope("downsample"):
                x = self.downsample(x)

        def body(blocks, x, i):
            keys = split_key(fold_key(key, i))
            res, attention = blocks
            with scope("res_blocks"):
                x = res(x, cond, keys[0])
            with scope("attention_blocks"):
                return attention(x.reshape(len(x), -1, x.shape[-1]), context, keys[1]).reshape(x.shape), None

        pairs = {name: (block, self.attention_blocks[name]) for name, block in self.res_blocks.items()}
        x, _ = run_stack(pairs, body, x, self.compute)
        if self.upsample is None:
            return x
        with scope("upsample"):
            return self.upsample(x)


class Tokens(nnx.Module):
    """Rows of a table by tokens `[B, H, W]`, as pixels of `block_out_channels`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        self.embeddings = Embedding(c.vocab_size, c.in_channels, compute=compute, rngs=rngs)
        self.layer_norm = RMSNorm(c.in_channels, eps=c.layer_norm_eps, scale=c.ln_elementwise_affine)
        self.conv = Conv(c.in_channels, c.block_out_channels, 1, bias=c.use_bias, dtype=compute.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return tap("out", self.conv(self.layer_norm(self.embeddings(x))))


class Logits(nnx.Module):
    """Of the codebook, for each pixel."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        given = dict(bias=c.use_bias, dtype=compute.dtype, rngs=rngs)
        self.conv1 = Conv(c.block_out_channels, c.in_channels, 1, **given)
        self.layer_norm = RMSNorm(c.in_channels, eps=c.layer_norm_eps, scale=c.ln_elementwise_affine)
        self.conv2 = Conv(c.in_channels, c.codebook_size, 1, **given)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv2(self.layer_norm(self.conv1(x)))


class Amused(nnx.Module):
    """The module of `uvit_2d`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        norm = lambda width: RMSNorm(width, eps=c.layer_norm_eps, scale=c.ln_elementwise_affine)
        linear = lambda a, b: Linear(a, b, bias=c.use_bias, dtype=compute.dtype, rngs=rngs)
        width, channels = c.hidden_size, c.block_out_channels
        self.encoder_proj, self.encoder_proj_layer_norm = linear(c.encoder_hidden_size, width), norm(width)
        self.embed = Tokens(c, **given)
        self.cond_embed = Projection(c.micro_cond_embed_dim + c.cond_embed_dim, width, bias=c.use_bias, **given)
        self.down_block = Stage(c, down=c.downsample, **given)
        self.project_to_hidden_norm, self.project_to_hidden = norm(channels), linear(channels, width)
        self.transformer_layers = stack(
            lambda rngs: Layer(c, compute=compute, rngs=rngs), 0, c.num_hidden_layers, rngs=rngs
        )
        self.project_from_hidden_norm, self.project_from_hidden = norm(width), linear(width, channels)
        self.up_block = Stage(c, up=c.upsample, **given)
        self.mlm_layer = Logits(c, **given)
        self.c, self.compute = c, compute

    def __call__(
        self, x: jax.Array, t: jax.Array | None = None, context: jax.Array | None = None,
        pooled: jax.Array | None = None, *, micro: jax.Array, key: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """`[B, H, W, codebook_size] float32`; `uvit_2d` tells what the arguments are."""
        cond, context = self._conditions(x, context, pooled, micro)
        keys = split_key(key, 3)
        with scope("embed"):
            h = self.embed(x)
        with scope("down_block"):
            h = self.down_block(h, context, cond, keys[0])
        shape = h.shape
        h = self.project_to_hidden(self.project_to_hidden_norm(h.reshape(len(h), -1, shape[-1])))

        def body(layer, h, i):
            with scope("transformer_layers"):
                return layer(h, context, cond, fold_key(keys[1], i)), None

        h, _ = run_stack(self.transformer_layers, body, h, self.compute)
        h = self.project_from_hidden(self.project_from_hidden_norm(h)).reshape(shape)
        with scope("up_block"):
            h = self.up_block(h, context, cond, keys[2])
        return widen(self.mlm_layer(h))

    def _conditions(self, x, context, pooled, micro):
        """One vector for each sample, and the states of the text."""
        c = self.c
        settings.expect(KIND, "x", x, None, None, None)
        settings.expect(KIND, "context", context, len(x), None, c.encoder_hidden_size)
        settings.expect(KIND, "pooled", pooled, len(x), c.cond_embed_dim)
        settings.expect(KIND, "micro", micro, len(x), c.micro_cond_embed_dim // c.micro_cond_encode_dim)
        waves = timestep_waves(jnp.reshape(micro, -1), c.micro_cond_encode_dim).reshape(len(x), -1)
        cond = self.cond_embed(jnp.concatenate([widen(jnp.asarray(pooled)), waves], axis=-1))
        return cond, self.encoder_proj_layer_norm(self.encoder_proj(context))


def uvit_2d(config: Mapping[str, Any], **how) -> Model:
    """`UVit2DModel` (aMUSEd, arXiv:2401.01808) by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W] int, t, context [B, L, encoder_hidden_size], pooled [B, cond_embed_dim], *,
      micro [B, n], key=None)`, logits `[B, H, W, codebook_size] float32`. The tokens of x are below `vocab_size`, and
      the one behind the codebook is the mask. `t` is not looked at: how much is masked tells the time. `micro` are the
      numbers that describe the image that is wanted: width, height, the corner of the cut, and the score of its looks;
      there are `micro_cond_embed_dim / micro_cond_encode_dim`. A key turns dropout on.

    Raises:
      ValueError: for settings that are unknown or do not fit each other.
    """
    c = settings.read(KIND, Settings, config)
    if c.micro_cond_embed_dim % c.micro_cond_encode_dim:
        raise ValueError(
            f"{KIND}: micro_cond_encode_dim={c.micro_cond_encode_dim} does not divide "
            f"micro_cond_embed_dim={c.micro_cond_embed_dim}"
        )
    make = lambda compute, rngs: Amused(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
