"""Autoencoders between images and latents: one file for each family of checkpoints."""

from diffjax.models.autoencoders.kl import autoencoder_kl, kl_divergence, posterior
from diffjax.models.autoencoders.latents import from_latents, to_latents
from diffjax.models.autoencoders.tiling import Tiles, sliced, tiled_decode, tiled_encode, tiled_moments, tiles_of
from diffjax.models.autoencoders.tiny import autoencoder_tiny, from_bytes, to_bytes
from diffjax.models.autoencoders.vq import Quantized, vq_model

__all__ = [
    "Quantized",
    "Tiles",
    "autoencoder_kl",
    "autoencoder_tiny",
    "from_bytes",
    "from_latents",
    "kl_divergence",
    "posterior",
    "sliced",
    "tiled_decode",
    "tiled_encode",
    "tiled_moments",
    "tiles_of",
    "to_bytes",
    "to_latents",
    "vq_model",
]
