"""Transformers that denoise: one file for each family of checkpoints."""

from diffjax.models.transformers.dit import dit_transformer

__all__ = ["dit_transformer"]
