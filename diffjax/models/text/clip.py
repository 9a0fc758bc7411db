"""CLIP's two towers, and the pair of them, as transformers stores them.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv:2103.00020. The text
tower is that of Stable Diffusion (ViT-L/14) and, with another activation and size, OpenCLIP's (arXiv:2212.07143).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.text.shared import HIDDEN, activation, all_hidden, check_ids, divisible, mix, read
from diffjax.nn import Compute, Conv, LayerNorm, Linear, run_stack, scope, stack, tap, widen
from diffjax.nn.blocks import Embedding, mask_bias

RULES = (
    (r"layers/.*/([qkv]_proj|fc1)/kernel$", (None, "fsdp", "tensor")),
    (r"layers/.*/(out_proj|fc2)/kernel$", (None, "tensor", "fsdp")),
    (r"layers/.*/([qkv]_proj|fc1)/bias$", (None, "tensor")),
    (r"(text|visual)_projection/kernel$", ("fsdp", "tensor")),
    (r"token_embedding/embedding$", ("tensor", "fsdp")),
    (r"position_embedding/embedding$", (None, "fsdp")),
    (r"patch_embedding/kernel$", (None, None, None, "fsdp")),
    (r"(^|/)(bias|scale|class_embedding|logit_scale)$", ()),
)


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """The config of a `CLIPTextModel`, with its defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407  # where the text is pooled


@dataclasses.dataclass(frozen=True)
class VisionSettings:
    """The config of a `CLIPVisionModel`, with its defaults."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `CLIPModel`, with its defaults; the `_dict`s of older files replace what the others say."""

    text_config: dict | None = None
    vision_config: dict | None = None
    text_config_dict: dict | None = None
    vision_config_dict: dict | None = None
    projection_dim: int = 512


class TextOutput(NamedTuple):
    """What a text tower returns, all float32.

    Attributes:
      last: `[B, L, D]`, the last hidden state, behind the final normalisation.
      hidden: `[layers + 1, B, L, D]`, the embedded tokens and the output of each layer, not normalised.
      pooled: `[B, D]`, `last` at the end of the text.
      text_embeds: `[B, projection_dim]`, `pooled` projected; None for a tower without projection.
    """

    last: jax.Array
    hidden: jax.Array
    pooled: jax.Array
    text_embeds: jax.Array | None = None


class VisionOutput(NamedTuple):
    """What a vision tower returns, all float32.

    Attributes:
      last: `[B, patches + 1, D]`, the last hidden state, the class token first; not normalised.
      hidden: `[layers + 1, B, patches + 1, D]`, the input of the first layer and the output of each.
      pooled: `[B, D]`, the class token, normalised.
      image_embeds: `[B, projection_dim]`, `pooled` projected; None for a tower without projection.
    """

    last: jax.Array
    hidden: jax.Array
    pooled: jax.Array
    image_embeds: jax.Array | None = None


class PairOutput(NamedTuple):
    """What both towers say of texts and images, all float32.

    Attributes:
      text_embeds, image_embeds: `[B, projection_dim]`, of length 1.
      logits_per_text: `[texts, images]`, the products of these times the learned scale.
    """

    text_embeds: jax.Array
    image_embeds: jax.Array
    logits_per_text: jax.Array


def clip_skip(out: TextOutput, skip: int = 0) -> jax.Array:
    """The hidden state `skip` layers before the last, `[B, L, D]`, without the final normalisation.

    Stable Diffusion XL takes `clip_skip(out, 1)`, the last but one; 1.5 takes the last with the normalisation, and
    another with it when asked to: that is the argument `skip` of the network's call.

    Raises:
      ValueError: if there are not so many layers.
    """
    return out.hidden[_index("clip_skip", len(out.hidden), skip)]


def _index(kind, count, skip):
    if not 0 <= skip < count:
        raise ValueError(f"{kind}: skip={skip} layers, of {count - 1}; expected 0 to {count - 1}")
    return -(skip + 1)


class Attention(nnx.Module):
    """Self-attention with biases everywhere."""

    def __init__(self, c, *, compute: Compute, rngs):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Linear(c.hidden_size, c.hidden_size, dtype=compute.dtype, rngs=rngs))
        self.heads, self.compute = c.num_attention_heads, compute

    def __call__(self, x: jax.Array, bias: jax.Array | None, causal: bool) -> jax.Array:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return tap("out", self.out_proj(mix(q, k, v, self.heads, compute=self.compute, bias=bias, causal=causal)))


class Layer(nnx.Module):
    """Attention and a perceptron, each of what is normalised before."""

    def __init__(self, c, *, compute: Compute, rngs):
        given = dict(dtype=compute.dtype, rngs=rngs)
        self.self_attn = Attention(c, compute=compute, rngs=rngs)
        self.layer_norm1, self.layer_norm2 = (LayerNorm(c.hidden_size, eps=c.layer_norm_eps) for _ in range(2))
        self.mlp = nnx.Dict(
            fc1=Linear(c.hidden_size, c.intermediate_size, **given),
            fc2=Linear(c.intermediate_size, c.hidden_size, **given),
        )
        self.activation = activation("CLIP", "hidden_act", c.hidden_act)

    def __call__(self, x, bias, causal):
        with scope("self_attn"):
            x = x + self.self_attn(self.layer_norm1(x), bias, causal)
        h = tap("hidden", self.activation(self.mlp["fc1"](self.layer_norm2(x))))
        return tap("out", x + self.mlp["fc2"](h))


class Encoder(nnx.Module):
    """The layers of a tower; returns the hidden states `[layers + 1, B, L, D]`."""

    def __init__(self, c, *, compute: Compute, rngs):
        self.layers = stack(lambda rngs: Layer(c, compute=compute, rngs=rngs), 0, c.num_hidden_layers, rngs=rngs)
        self.compute = compute

    def __call__(self, x: jax.Array, bias: jax.Array | None, causal: bool) -> jax.Array:
        def body(layer, h, i):
            with scope("encoder/layers"):
                h = layer(h, bias, causal)
            return h, h

        return all_hidden(x, run_stack(self.layers, body, x, self.compute)[1])


class TextTower(nnx.Module):
    """The module of `clip_text`."""

    def __init__(self, c: TextSettings, *, kind: str, compute: Compute, rngs):
        tables = dict(token_embedding=c.vocab_size, position_embedding=c.max_position_embeddings)
        self.embeddings = nnx.Dict(
            {name: Embedding(count, c.hidden_size, compute=compute, rngs=rngs) for name, count in tables.items()}
        )
        self.encoder = Encoder(c, compute=compute, rngs=rngs)
        self.final_layer_norm = LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.c, self.kind = c, kind

    def __call__(self, ids: jax.Array, *, mask: jax.Array | None = None, skip: int = 0) -> TextOutput:
        c = self.c
        check_ids(self.kind, ids, mask, c.max_position_embeddings)
        x = self.embeddings["token_embedding"](ids)
        x = tap("tokens", x + self.embeddings["position_embedding"](jnp.arange(ids.shape[1])))
        hidden = self.encoder(x, mask_bias(mask, HIDDEN), True)
        last = self.final_layer_norm(hidden[-1])
        # Files with eos_token_id 2 are older than the rule that the id means something: the end is their largest id.
        found = ids if c.eos_token_id == 2 else (ids == c.eos_token_id).astype(jnp.int32)
        pooled = jnp.take_along_axis(last, jnp.argmax(found, axis=1)[:, None, None], axis=1)[:, 0]
        if skip:
            last = self.final_layer_norm(hidden[_index(self.kind, len(hidden), skip)])
        return TextOutput(widen(last), widen(hidden), widen(pooled))


class VisionTower(nnx.Module):
    """The module of `clip_vision`."""

    def __init__(self, c: VisionSettings, *, kind: str, compute: Compute, rngs):
        width, patch = c.hidden_size, c.patch_size
        self.embeddings = nnx.Dict(
            class_embedding=nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (width,), jnp.float32)),
            patch_embedding=Conv(
                c.num_channels, width, patch, stride=patch, padding=0, bias=False, dtype=compute.dtype, rngs=rngs
            ),
            position_embedding=Embedding((c.image_size // patch) ** 2 + 1, width, compute=compute, rngs=rngs),
        )
        self.pre_layrnorm, self.post_layernorm = (LayerNorm(width, eps=c.layer_norm_eps) for _ in range(2))
        self.encoder = Encoder(c, compute=compute, rngs=rngs)
        self.c, self.kind, self.dtype = c, kind, compute.dtype

    def __call__(self, x: jax.Array) -> VisionOutput:
        c = self.c
        settings.expect(self.kind, "x", x, None, c.image_size, c.image_size, c.num_channels)
        h = self.embeddings["patch_embedding"](x)
        h = h.reshape(len(h), -1, c.hidden_size)
        first = jnp.broadcast_to(self.embeddings["class_embedding"][...].astype(h.dtype), (len(h), 1, c.hidden_size))
        h = jnp.concatenate([first, h], axis=1)
        h = tap("tokens", h + self.embeddings["position_embedding"](jnp.arange(h.shape[1])))
        hidden = self.encoder(self.pre_layrnorm(h), None, False)
        pooled = self.post_layernorm(hidden[-1][:, 0])
        return VisionOutput(widen(hidden[-1]), widen(hidden), widen(pooled))


class ProjectedText(nnx.Module):
    """A text tower and the projection of its pooled state."""

    def __init__(self, c: TextSettings, *, kind: str, compute: Compute, rngs):
        self.text_model = TextTower(c, kind=kind, compute=compute, rngs=rngs)
        self.text_projection = Linear(c.hidden_size, c.projection_dim, bias=False, dtype=compute.dtype, rngs=rngs)

    def __call__(self, ids: jax.Array, *, mask: jax.Array | None = None, skip: int = 0) -> TextOutput:
        with scope("text_model"):
            out = self.text_model(ids, mask=mask, skip=skip)
        return out._replace(text_embeds=widen(self.text_projection(out.pooled)))


class ProjectedVision(nnx.Module):
    """A vision tower and the projection of its pooled state."""

    def __init__(self, c: VisionSettings, *, kind: str, compute: Compute, rngs):
        self.vision_model = VisionTower(c, kind=kind, compute=compute, rngs=rngs)
        self.visual_projection = Linear(c.hidden_size, c.projection_dim, bias=False, dtype=compute.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> VisionOutput:
        with scope("vision_model"):
            out = self.vision_model(x)
        return out._replace(image_embeds=widen(self.visual_projection(out.pooled)))


class Pair(nnx.Module):
    """The module of `clip`."""

    def __init__(self, text: TextSettings, vision: VisionSettings, width: int, *, kind: str, compute: Compute, rngs):
        given = dict(kind=kind, compute=compute, rngs=rngs)
        self.text_model, self.vision_model = TextTower(text, **given), VisionTower(vision, **given)
        flat = dict(bias=False, dtype=compute.dtype, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, width, **flat)
        self.visual_projection = Linear(vision.hidden_size, width, **flat)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, jnp.float32))  # log(1 / 0.07), section 2.5 of the paper

    def text(self, ids: jax.Array, *, mask: jax.Array | None = None, skip: int = 0) -> TextOutput:
        with scope("text_model"):
            out = self.text_model(ids, mask=mask, skip=skip)
        return out._replace(text_embeds=widen(self.text_projection(out.pooled)))

    def image(self, x: jax.Array) -> VisionOutput:
        with scope("vision_model"):
            out = self.vision_model(x)
        return out._replace(image_embeds=widen(self.visual_projection(out.pooled)))

    def __call__(self, ids: jax.Array, x: jax.Array, *, mask: jax.Array | None = None) -> PairOutput:
        text, image = self.text(ids, mask=mask).text_embeds, self.image(x).image_embeds
        text, image = (a / jnp.linalg.norm(a, axis=-1, keepdims=True) for a in (text, image))
        products = jnp.einsum("td,id->ti", text, image, precision=jax.lax.Precision.HIGHEST)
        return PairOutput(text, image, products * jnp.exp(widen(self.logit_scale[...])))


def _text_settings(kind: str, config: Mapping[str, Any]) -> TextSettings:
    c = read(kind, TextSettings, config)
    divisible(kind, "hidden_size", c.hidden_size, "num_attention_heads", c.num_attention_heads)
    activation(kind, "hidden_act", c.hidden_act)
    return c


def _vision_settings(kind: str, config: Mapping[str, Any]) -> VisionSettings:
    c = read(kind, VisionSettings, config)
    divisible(kind, "hidden_size", c.hidden_size, "num_attention_heads", c.num_attention_heads)
    activation(kind, "hidden_act", c.hidden_act)
    return c


def _text(kind, module, config, how):
    c = _text_settings(kind, config)
    make = lambda compute, rngs: module(c, kind=kind, compute=compute, rngs=rngs)
    return settings.model(kind, config, make, settings.how(kind, **how), RULES)


def _vision(kind, module, config, how):
    c = _vision_settings(kind, config)
    make = lambda compute, rngs: module(c, kind=kind, compute=compute, rngs=rngs)
    return settings.model(kind, config, make, settings.how(kind, **how), RULES)


def clip_text(config: Mapping[str, Any], **how) -> Model:
    """`CLIPTextModel` (arXiv:2103.00020) by the config of a checkpoint.

    Args:
      config: see `TextSettings`; keys of `diffjax.models.text.GENERIC` are passed over. Dropout is never on.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, ids [B, L] int, *, mask=None, skip=0) -> TextOutput`. `mask [B, L]` is 1 where a token
      is seen, besides the causal mask; with `skip` the `last` state is that of so many layers before the last,
      normalised as that one is. `pooled` is taken at the largest id if `eos_token_id` is 2, else at the first
      `eos_token_id`; a text without that token has the state of its first one there, the same for all texts.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    return _text("CLIPTextModel", TextTower, config, how)


def clip_text_with_projection(config: Mapping[str, Any], **how) -> Model:
    """`CLIPTextModelWithProjection`: `clip_text` with `text_embeds` in what it returns."""
    return _text("CLIPTextModelWithProjection", ProjectedText, config, how)


def clip_vision(config: Mapping[str, Any], **how) -> Model:
    """`CLIPVisionModel` (arXiv:2103.00020) by the config of a checkpoint.

    Args:
      config: see `VisionSettings`; keys of `diffjax.models.text.GENERIC` are passed over. Dropout is never on.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, image_size, image_size, num_channels]) -> VisionOutput`, for images that are
      normalised as the checkpoint's preprocessor says.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    return _vision("CLIPVisionModel", VisionTower, config, how)


def clip_vision_with_projection(config: Mapping[str, Any], **how) -> Model:
    """`CLIPVisionModelWithProjection`: `clip_vision` with `image_embeds` in what it returns."""
    return _vision("CLIPVisionModelWithProjection", ProjectedVision, config, how)


def clip(config: Mapping[str, Any], **how) -> Model:
    """`CLIPModel`, both towers, by the config of a checkpoint.

    Args:
      config: see `Settings`; its parts are those of `clip_text` and `clip_vision`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, ids, x, *, mask=None) -> PairOutput`; `method="text"` and `method="image"` are the calls
      of the towers with their projections.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    kind = "CLIPModel"
    c = read(kind, Settings, config)
    text = _text_settings(*_part(kind, "text_config", TextSettings, c))
    vision = _vision_settings(*_part(kind, "vision_config", VisionSettings, c))
    make = lambda compute, rngs: Pair(text, vision, c.projection_dim, kind=kind, compute=compute, rngs=rngs)
    return settings.model(kind, config, make, settings.how(kind, **how), RULES)


def vision_of(kind: str, config: Mapping[str, Any]) -> tuple[VisionSettings, int]:
    """The settings of the vision tower in the config of a pair, and the width that its embedding is projected to."""
    c = read(kind, Settings, config)
    return _vision_settings(*_part(kind, "vision_config", VisionSettings, c)), c.projection_dim


def _part(kind, name, cls, c):
    """The name of a tower's config, for messages, and the config.

    What the older key says counts, with the defaults of what it does not say.
    """
    given, replacing = getattr(c, name), getattr(c, f"{name}_dict")
    if replacing is None:
        return f"{kind}.{name}", dict(given or {})
    return f"{kind}.{name}_dict", dataclasses.asdict(read(f"{kind}.{name}_dict", cls, replacing))
