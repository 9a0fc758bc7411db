"""Autoencoders between images and latents: one file for each family of checkpoints."""

from diffjax.models.autoencoders.kl import autoencoder_kl, from_latents, kl_divergence, posterior, to_latents

__all__ = ["autoencoder_kl", "from_latents", "kl_divergence", "posterior", "to_latents"]
