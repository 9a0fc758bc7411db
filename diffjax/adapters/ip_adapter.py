"""IP-Adapter: pictures as further tokens, which the cross-attention of a U-Net looks at beside its text.

Ye et al. 2023, arXiv:2308.06721. Each attention to the text gets keys and values of the picture's tokens, and a second
softmax, whose result is added to the first's. The U-Net keeps its parameters; those of adapters are put beside them:

    adapter = load_ip_adapter("ip-adapter_sd15.safetensors", unet)
    net = with_pictures(unet.config, 1)
    tokens = project(adapter, embeds)   # once for a sample
    out = net.apply(join(params, [adapter]), x, t, context, pictures=[(tokens, 0.6)])

`jax.grad` for an `Adapter` leaves the U-Net alone, as the paper trains it. Masks for regions are not supported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.unets import unet_cond
from diffjax.models.unets.blocks import TYPES
from diffjax.nn import ACTIVATIONS, Compute, LayerNorm, Linear, attend, run_stack, stack, widen
from diffjax.nn.blocks.attention import split_heads
from diffjax.nn.functional import Functional, functional, names_of, nested, rngs_of
from diffjax.nn.stack import parts_of

KIND = "IP-Adapter"
RULES = ((r"/processor/to_[kv]_ip/\d+/kernel$", (None, "fsdp", "tensor")), *unet_cond.RULES)
# Attention to the text, in the order in which files count it.
WAYS = ("down_blocks", "up_blocks", "mid_block")
BLOCK = re.compile(
    rf"(?P<way>{'|'.join(WAYS)})/((?P<level>\d+)/)?attentions/(?P<i>\d+)/transformer_blocks/(?P<first>\d+):\d+/attn2"
)
HEAD = 64  # channels of a head of the resampler, which its files do not tell


class Keys(NamedTuple):
    """The kernels for the tokens of pictures, `[layers, D, C]` as those for the text: `to_k` and `to_v`."""

    k: jax.Array
    v: jax.Array


class Adapter(NamedTuple):
    """An IP-Adapter, a pytree.

    Attributes:
      projection: the parameters of what makes tokens of an embedded picture, by their names in files.
      attention: `Keys` by the name of the attention, such as "mid_block/attentions/0/transformer_blocks/0:1/attn2".
    """

    projection: dict
    attention: dict[str, Keys]


class PictureAttention(nnx.Module):
    """Adds to attention to a text that to the tokens of pictures, by the same queries."""

    def __init__(self, context_width: int, width: int, count: int, *, compute: Compute, rngs):
        linear = lambda: Linear(context_width, width, bias=False, dtype=compute.dtype, rngs=rngs)
        self.to_k_ip, self.to_v_ip = (nnx.Dict({str(i): linear() for i in range(count)}) for _ in range(2))
        self.implementation = compute.attention

    def __call__(self, q: jax.Array, mixed: jax.Array, pictures) -> jax.Array:
        for i, (tokens, scale) in enumerate(pictures):
            if isinstance(scale, int | float) and scale == 0:
                continue
            k, v = (split_heads(to[str(i)](tokens), q.shape[2]) for to in (self.to_k_ip, self.to_v_ip))
            scale = jnp.asarray(scale, mixed.dtype)
            scale = scale[:, None, None, None] if scale.ndim else scale
            mixed = mixed + scale * attend(q, k, v, implementation=self.implementation)
        return mixed


class PicturedUNet(unet_cond.UNetCondition):
    """The module of `with_pictures`."""

    def __init__(self, c: unet_cond.Settings, count: int, *, compute: Compute, rngs):
        super().__init__(c, compute=compute, rngs=rngs)
        self.adapters = count
        levels = [*self.down_blocks.values(), *self.up_blocks.values(), self.mid_block]
        found = [level.attentions for level in levels if level is not None and level.attentions is not None]
        for attentions in found:
            for transformer in attentions.values():
                for _, _, block in parts_of(transformer.transformer_blocks):
                    layers, *widths = block.attn2.to_k.kernel.shape
                    make = lambda key, widths=widths: PictureAttention(
                        *widths, count, compute=compute, rngs=rngs_of(key)
                    )
                    made = jax.vmap(make)(jax.random.split(rngs.params(), layers))
                    block.attn2.processor = nnx.data(made)


def with_pictures(config: Mapping[str, Any], count: int = 1, **how) -> Model:
    """A `UNet2DConditionModel` with room for IP-Adapters.

    Args:
      config: of the U-Net.
      count: how many adapters.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model` whose parameters are those of `join`, and whose `apply` is that of the U-Net
      (`diffjax.models.unets.unet_cond`) with `pictures`, one pair `(tokens [B, L, D], scale)` for each adapter. A scale
      is a number, or a scalar or `[B]` that may be traced; what the number 0 belongs to is not computed. Without
      `pictures` it is the U-Net alone.

    Raises:
      ValueError: for another class, a U-Net whose attention is not that of Stable Diffusion, or settings that are not
        supported.
    """
    kind = config.get("_class_name", unet_cond.KIND)
    if kind != unet_cond.KIND:
        raise ValueError(f"{KIND}: the config is that of a {kind}; expected a {unet_cond.KIND}")
    c = unet_cond.settings_of(config)
    _check(c)
    if type(count) is not int or count < 1:
        raise ValueError(f"{KIND}: count={count!r}: expected a number of adapters, at least 1")
    make = lambda compute, rngs: PicturedUNet(c, count, compute=compute, rngs=rngs)
    return settings.model(unet_cond.KIND, config, make, settings.how(KIND, **how), unet_cond.rules_of(c, RULES))


def _check(c: unet_cond.Settings) -> None:
    types = (*c.down_block_types, c.mid_block_type, *c.up_block_types)
    others = [t for t in types if t not in (None, "UNetMidBlock2D") and TYPES[t].attention not in (None, "cross")]
    if others or not any(TYPES[t].attention == "cross" for t in types if t):
        raise ValueError(f"{KIND}: blocks of types {', '.join(map(str, others or types))} are not supported")
    alone = c.only_cross_attention
    if any(alone) if isinstance(alone, tuple) else alone:
        raise ValueError(f"{KIND}: only_cross_attention={alone!r} is not supported; supported: False")
    if len({*unet_cond.spread(c.cross_attention_dim, 1)}) > 1:
        raise ValueError(f"{KIND}: cross_attention_dim={c.cross_attention_dim!r}: expected one width for all levels")
    settings.only(KIND, c, encoder_hid_dim_type=(None, "text_proj"))


def attentions(params: Any) -> dict[str, Any]:
    """The kernels of the keys of each attention to the text, by its name and in the order of files.

    Args:
      params: of a U-Net, or their shapes.

    Raises:
      ValueError: if it has none.
    """
    end = "/to_k/kernel"
    leaves = {name.removesuffix(end): leaf for name, leaf in names_of(params).items() if name.endswith(end)}
    found = {name: match for name in leaves if (match := BLOCK.fullmatch(name))}
    if not found:
        raise ValueError(f"{KIND}: the parameters are none of a U-Net with attention to a text")
    order = lambda m: (WAYS.index(m["way"]), int(m["level"] or 0), int(m["i"]), int(m["first"]))
    return {name: leaves[name] for name in sorted(found, key=lambda name: order(found[name]))}


def init(key: jax.Array, params: dict, width: int, *, tokens: int = 4) -> Adapter:
    """A new adapter, whose keys and values start as those for the text, as in the paper's code.

    Args:
      key: consumed.
      params: of the U-Net.
      width: of the embedded picture, such as 1024 of CLIP's ViT-H.
      tokens: how many a picture becomes.
    """
    leaves, kernels = names_of(params), attentions(params)
    attention = {name: Keys(*(jnp.asarray(leaves[f"{name}/to_{a}/kernel"]) for a in "kv")) for name in kernels}
    cross = next(iter(kernels.values())).shape[1]
    shapes = {"proj/kernel": (width, tokens * cross), "norm/scale": (cross,)}
    return Adapter(projection(shapes).init(key), attention)


def join(params: dict, adapters: Sequence[Adapter]) -> dict:
    """The parameters of a U-Net with those of adapters beside them, for the network of `with_pictures`.

    Raises:
      ValueError: for an adapter of another network.
    """
    kernels = attentions(params)
    leaves = names_of(params)
    for i, adapter in enumerate(adapters):
        wanted = {name: tuple(kernel.shape) for name, kernel in kernels.items()}
        for slot, part in enumerate("kv"):
            given = {name: tuple(keys[slot].shape) for name, keys in adapter.attention.items()}
            if given != wanted:
                wrong = [name for name in wanted | given if wanted.get(name) != given.get(name)]
                raise ValueError(f"{KIND}: adapter {i} is not for this network: its to_{part}_ip differ at {wrong[0]}")
        for name, keys in adapter.attention.items():
            leaves[f"{name}/processor/to_k_ip/{i}/kernel"] = keys.k
            leaves[f"{name}/processor/to_v_ip/{i}/kernel"] = keys.v
    return nested(leaves)


class Plain(nnx.Module):
    """An embedded picture `[B, E]` as tokens `[B, L, D]`: the adapter of the paper."""

    def __init__(self, width_in: int, width: int, tokens: int, *, compute: Compute, rngs):
        self.proj = Linear(width_in, tokens * width, dtype=compute.dtype, rngs=rngs)
        self.norm, self.tokens = LayerNorm(width), tokens

    def __call__(self, x: jax.Array) -> jax.Array:
        return widen(self.norm(self.proj(x).reshape(len(x), self.tokens, -1)))


class Full(nnx.Module):
    """The hidden states of a picture `[B, L, E]` as so many tokens `[B, L, D]`: "full face"."""

    def __init__(self, width_in: int, hidden: int, width: int, *, compute: Compute, rngs):
        given = dict(dtype=compute.dtype, rngs=rngs)
        layers = {"0": Linear(width_in, hidden, **given), "2": Linear(hidden, width, **given), "3": LayerNorm(width)}
        self.proj = nnx.Dict(layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return widen(self.proj["3"](self.proj["2"](ACTIVATIONS["gelu"](self.proj["0"](x)))))


class Resampler(nnx.Module):
    """Learned queries that look at the hidden states of a picture, `[B, L, E] -> [B, queries, D]`: "Plus".

    Alayrac et al. 2022, "Flamingo", arXiv:2204.14198, section 3.1.1.
    """

    def __init__(
        self, width_in: int, width: int, *, queries: int, hidden: int, inner: int, up: int, depth: int,
        compute: Compute, rngs,
    ):  # fmt: skip
        given = dict(dtype=compute.dtype)
        self.latents = nnx.Param(jax.random.normal(rngs.params(), (1, queries, hidden)) / hidden**0.5)
        self.proj_in = Linear(width_in, hidden, rngs=rngs, **given)

        def layer(rngs):
            linear = lambda a, b: Linear(a, b, bias=False, rngs=rngs, **given)
            attention = dict(to_q=linear(hidden, inner), to_kv=linear(hidden, 2 * inner), to_out=linear(inner, hidden))
            attention |= dict(norm1=LayerNorm(hidden), norm2=LayerNorm(hidden))
            perceptron = {"0": LayerNorm(hidden), "1": linear(hidden, up), "3": linear(up, hidden)}
            return nnx.Dict({"0": nnx.Dict(attention), "1": nnx.Dict(perceptron)})

        self.layers = stack(layer, 0, depth, rngs=rngs)
        self.proj_out, self.norm_out = Linear(hidden, width, rngs=rngs, **given), LayerNorm(width)
        self.heads, self.compute = inner // HEAD, compute

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.proj_in(x)
        h = jnp.broadcast_to(self.latents[...].astype(x.dtype), (len(x), *self.latents.shape[1:]))

        def body(layer, h, i):
            a, p = layer["0"], layer["1"]
            queries = a["norm2"](h)
            k, v = jnp.split(a["to_kv"](jnp.concatenate([a["norm1"](x), queries], 1)), 2, -1)
            q, k, v = (split_heads(y, self.heads) for y in (a["to_q"](queries), k, v))
            mixed = attend(q, k, v, implementation=self.compute.attention)
            h = h + a["to_out"](mixed.reshape(*h.shape[:2], -1))
            return h + p["3"](ACTIVATIONS["gelu"](p["1"](p["0"](h)))), None

        h, _ = run_stack(self.layers, body, h, self.compute)
        return widen(self.norm_out(self.proj_out(h)))


def projection(shapes: Mapping[str, tuple[int, ...]], **how) -> Functional:
    """What makes tokens of an embedded picture, by the names and shapes of its parameters.

    Args:
      shapes: such as `{"proj/kernel": (1024, 3072), "norm/scale": (768,)}`; more than tell what it is are ignored.
      how: see `diffjax.models.settings.how`.

    Raises:
      ValueError: for parameters of no projection that is known; for those of FaceID.
    """
    compute = settings.how(KIND, **how).compute
    try:
        make = _projection(shapes)
    except (KeyError, ValueError) as error:
        if str(error).startswith(KIND):
            raise
        told = f"there is no {error}" if isinstance(error, KeyError) else f"a tensor has a strange shape ({error})"
        raise ValueError(f"{KIND}: image_proj is of no kind that is known: {told}") from None
    return functional(lambda rngs: make(compute=compute, rngs=rngs))


def _projection(shapes):
    if any(name.startswith("perceiver_resampler/") for name in shapes) or {"proj/0/kernel", "norm/scale"} <= {*shapes}:
        raise ValueError(f"{KIND}: FaceID is not supported; supported: plain, Plus, full face")
    empty = next((name for name, shape in shapes.items() if 0 in shape), None)
    if empty is not None:
        raise ValueError(f"{KIND}: image_proj has {empty[:200]!r} of shape {tuple(shapes[empty])}, of no numbers")
    if "latents" in shapes:
        (_, queries, hidden), (width_in, _), (_, width) = (
            shapes[name] for name in ("latents", "proj_in/kernel", "proj_out/kernel")
        )
        stacked = next((name.partition("/0/to_q/")[0] for name in shapes if name.endswith("/0/to_q/kernel")), "layers")
        depth, _, inner = shapes[f"{stacked}/0/to_q/kernel"]
        *_, up = shapes[f"{stacked}/1/1/kernel"]
        if inner % HEAD:
            raise ValueError(f"{KIND}: a resampler of {inner} channels; expected heads of {HEAD}")
        sizes = dict(queries=queries, hidden=hidden, inner=inner, up=up, depth=depth)
        return lambda **given: Resampler(width_in, width, **sizes, **given)
    if "proj/3/scale" in shapes:
        (width_in, hidden), (width,) = shapes["proj/0/kernel"], shapes["proj/3/scale"]
        return lambda **given: Full(width_in, hidden, width, **given)
    (width_in, columns), (width,) = shapes["proj/kernel"], shapes["norm/scale"]
    if columns % width:
        raise ValueError(f"{KIND}: a projection to {columns} channels is not of tokens with {width}")
    return lambda **given: Plain(width_in, width, columns // width, **given)


def project(adapter: Adapter, embeds: jax.Array, **how) -> jax.Array:
    """The tokens of embedded pictures, `[B, L, D] float32`, for `pictures` of the network.

    Args:
      embeds: what the adapter's encoder says of one picture for each sample, or of n whose tokens are put behind one
        another: `[B, E]` or `[B, n, E]`, `image_embeds` of CLIP; for Plus and full face `[B, S, E]` or `[B, n, S, E]`,
        its last hidden state but one. Without a picture (for guidance) zeros, or the states of a black one.
      how: see `diffjax.models.settings.how`.

    Raises:
      ValueError: for an array of another shape.
    """
    shapes = {name: tuple(leaf.shape) for name, leaf in names_of(adapter.projection).items()}
    net = projection(shapes, **how)
    plain = "proj/kernel" in shapes
    width_in = shapes["proj_in/kernel" if "latents" in shapes else "proj/kernel" if plain else "proj/0/kernel"][0]
    axes = 1 if plain else 2
    if embeds.ndim not in (axes + 1, axes + 2) or embeds.shape[-1] != width_in:
        wanted = ("E" if plain else "S, E").replace("E", str(width_in))
        raise ValueError(f"{KIND}: embeds have shape {embeds.shape}; expected [B, {wanted}] or [B, n, {wanted}]")
    tokens = net.apply(adapter.projection, embeds.reshape(-1, *embeds.shape[-axes:]))
    return tokens.reshape(len(embeds), -1, tokens.shape[-1])
