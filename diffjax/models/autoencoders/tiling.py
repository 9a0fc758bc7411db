"""Autoencoders on large images: one image at a time, or one tile at a time.

All are pure functions of arrays, to be jitted by their caller. Tiles of one shape run in one loop, whose body is
compiled once: the whole tiles of an image in one, those at its low and right edge, which are cut off, in some others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.types import Model
from diffjax.models.autoencoders import kl, tiny
from diffjax.models.autoencoders.blocks import least_side
from diffjax.models.autoencoders.kl import posterior


class Tiles(NamedTuple):
    """How images are cut.

    Attributes:
      sample: side of a tile of an image, in pixels.
      latent: side of a tile of latents.
      overlap: which part of a tile lies under the next.
    """

    sample: int
    latent: int
    overlap: float = 0.25


def tiles_of(config: Mapping[str, Any]) -> Tiles:
    """The tiles that the config of an `AutoencoderKL` asks for: of the size of the images that it was trained with.

    Those of an `AutoencoderTiny` have 512 pixels a side.

    Raises:
      ValueError: for the config of another class, or one that makes no autoencoder.
    """
    _check_kind(config)
    factor = _factor(config)
    if _is_tiny(config):
        return Tiles(512, 512 // factor, 0.125)
    size = kl.settings_of(config).sample_size
    size = size if isinstance(size, int) else size[0]
    return Tiles(size, size // factor)


def sliced(fn: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """`fn` of `x [B, ...]`, one sample at a time: the same, in the memory of one."""

    def run(x):
        return jax.lax.map(lambda one: jax.tree.map(lambda out: out[0], fn(one[None])), x)

    return run


def tiled_decode(model: Model, params: dict, z: jax.Array, *, tiles: Tiles | None = None) -> jax.Array:
    """`model.apply(params, z, method="decode")` tile by tile, blended where tiles overlap.

    Another image than that of the whole, since a tile does not see the others. Latents that are no larger than a tile
    are decoded as they are.

    Args:
      model: an `AutoencoderKL` or `AutoencoderTiny`.
      tiles: None for those of the model's config (`tiles_of`).

    Raises:
      ValueError: for a network of another class, tiles whose sides are not those of an image and its latents, or that
        overlap so much that none moves on.
    """
    sample, latent, overlap = _tiles(model, tiles)
    join = _painted if _is_tiny(model.config) else _blended
    decode = lambda z: model.apply(params, z, method="decode")
    return join(decode, z, size=latent, size_out=sample, overlap=overlap)


def tiled_moments(model: Model, params: dict, x: jax.Array, *, tiles: Tiles | None = None) -> jax.Array:
    """`model.apply(params, x, method="moments")` of an `AutoencoderKL` tile by tile; see `tiled_decode`.

    Raises:
      ValueError: for images whose last tiles have too few pixels for one latent; sides that are multiples of those of a
        latent have none.
    """
    sample, latent, overlap = _tiles(model, tiles)
    moments = lambda x: model.apply(params, x, method="moments")
    return _blended(moments, x, size=sample, size_out=latent, overlap=overlap)


def tiled_encode(
    model: Model, params: dict, x: jax.Array, *, key: jax.Array | None = None, tiles: Tiles | None = None
) -> jax.Array:
    """`model.apply(params, x, method="encode", key=key)` tile by tile; an `AutoencoderTiny` takes no key.

    Raises:
      ValueError: as `tiled_moments`; for an `AutoencoderTiny`, for sides that are no multiples of those of a latent.
    """
    if not _is_tiny(model.config):
        return posterior(tiled_moments(model, params, x, tiles=tiles), key=key)
    if key is not None:
        raise ValueError("AutoencoderTiny: key=...: its latents have no posterior; leave the key out")
    sample, latent, overlap = _tiles(model, tiles)
    encode = lambda x: model.apply(params, x, method="encode")
    return _painted(encode, x, size=sample, size_out=latent, overlap=overlap)


def _is_tiny(config):
    return config.get("_class_name") == tiny.KIND


def _factor(config) -> int:
    """How many pixels a side there are for one latent."""
    if not _is_tiny(config):
        return least_side(kl.settings_of(config))
    c = tiny.settings_of(config)
    return c.upsampling_scaling_factor ** (len(c.num_decoder_blocks) - 1)


def _check_kind(config):
    kind = config.get("_class_name")
    if kind not in (kl.KIND, tiny.KIND):
        raise ValueError(f"tiles of {kind}: known of {kl.KIND} and {tiny.KIND}; take `sliced`")


def _tiles(model, tiles):
    _check_kind(model.config)
    tiles = tiles_of(model.config) if tiles is None else tiles
    factor = _factor(model.config)
    if tiles.latent < 1 or tiles.sample != tiles.latent * factor:
        raise ValueError(f"{tiles}: one latent of this network has {factor} pixels a side: sample = {factor} latent")
    if not 0 <= tiles.overlap < 1:
        raise ValueError(f"{tiles}: overlap is the part of a tile under the next, in [0, 1)")
    return tiles


def _blended(fn, x, *, size, size_out, overlap):
    """`fn` of tiles of `x [B, H, W, C]`, which makes sides of `size_out` of those of `size`, joined.

    Each tile is mixed with those before it and cut off where the next begins.
    """
    height, width = x.shape[1:3]
    if max(height, width) <= size:
        return fn(x)
    stride, extent = int(size * (1 - overlap)), int(size_out * overlap)
    if stride < 1:
        raise ValueError(f"tiles of {size} with an overlap of {overlap}: no tile moves on; take larger tiles")
    rows, columns = (range(0, n, stride) for n in (height, width))
    tiles = {(i, j): x[:, i : i + size, j : j + size] for i in rows for j in columns}
    out = _by_shape(fn, tiles)
    # A tile is blended into those that are blended already, above and then to the left of it.
    for i in rows:
        for j in columns:
            if i:
                out[i, j] = _blend(out[i - stride, j], out[i, j], extent, 1)
            if j:
                out[i, j] = _blend(out[i, j - stride], out[i, j], extent, 2)
    keep = size_out - extent
    kept = [jnp.concatenate([out[i, j][:, :keep, :keep] for j in columns], 2) for i in rows]
    return jnp.concatenate(kept, 1)


def _painted(fn, x, *, size, size_out, overlap):
    """As `_blended`, with whole tiles painted over those before them, ever more densely from their low sides on."""
    height, width = x.shape[1:3]
    shared = int(size * overlap)
    if shared >= size:
        raise ValueError(f"tiles of {size} with an overlap of {overlap}: no tile moves on; take larger tiles")
    if any(n * size_out % size for n in (height, width)):
        raise ValueError(f"sides of {height} and {width}: expected multiples of {size // size_out}")
    at = lambda n: n * size_out // size
    rows, columns = (range(0, n, size - shared) for n in (height, width))
    out = _by_shape(fn, {(i, j): x[:, i : i + size, j : j + size] for i in rows for j in columns})
    rise = jnp.clip(jnp.arange(size_out) / max(at(shared) - 1, 1), 0, 1)
    whole = None
    for (i, j), tile in sorted(out.items()):
        if whole is None:
            whole = jnp.zeros((len(x), at(height), at(width), tile.shape[-1]), tile.dtype)
        h, w = tile.shape[1:3]
        cover = (rise[:h] if i else jnp.ones(h))[:, None] * (rise[:w] if j else jnp.ones(w))
        place = (slice(None), slice(at(i), at(i) + h), slice(at(j), at(j) + w))
        cover = cover[:, :, None].astype(tile.dtype)
        whole = whole.at[place].set(cover * tile + (1 - cover) * whole[place])
    return whole


def _by_shape(fn, tiles):
    """`fn` of each of some arrays, in one loop for those of one shape."""
    groups: dict[tuple, list] = {}
    for place, tile in tiles.items():
        groups.setdefault(tile.shape, []).append(place)
    out = {}
    for places in groups.values():
        done = jax.lax.map(fn, jnp.stack([tiles[place] for place in places]))
        out |= dict(zip(places, done, strict=True))
    return out


def _blend(before, tile, extent, axis):
    """`tile` with its first rows or columns mixed with the last of the tile `before` it; its weights rise from 0."""
    extent = min(before.shape[axis], tile.shape[axis], extent)
    if extent < 1:
        return tile
    shape = [1] * tile.ndim
    shape[axis] = extent
    weight = (jnp.arange(extent, dtype=tile.dtype) / extent).reshape(shape)
    last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
    first, rest = jnp.split(tile, [extent], axis)
    return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis)
