"""The scale and the shift between what an autoencoder makes and what a network that denoises sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.models.autoencoders import kl, tiny, vq

SETTINGS = {module.KIND: module.settings_of for module in (kl, tiny, vq)}


def to_latents(config: Mapping[str, Any], z: jax.Array) -> jax.Array:
    """What an autoencoder makes, `z [B, h, w, C]`, at the scale of the network that denoises it.

    `(z - shift_factor) * scaling_factor` by the autoencoder's config, and `(z - latents_mean) * scaling_factor /
    latents_std` where that has the statistics of each channel.

    Raises:
      ValueError: for the config of another class, or one that makes no autoencoder.
    """
    shift, scale = _affine(config)
    return (z - shift) * scale


def from_latents(config: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """The inverse of `to_latents`."""
    shift, scale = _affine(config)
    return x / scale + shift


def _affine(config):
    kind = config.get("_class_name")
    if kind not in SETTINGS:
        raise ValueError(f"latents of class {kind!r}: known of {', '.join(SETTINGS)}, by the config's '_class_name'")
    c = SETTINGS[kind](config)
    mean, std = (getattr(c, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return getattr(c, "shift_factor", None) or 0.0, c.scaling_factor
    return jnp.asarray(mean), c.scaling_factor / jnp.asarray(std)
