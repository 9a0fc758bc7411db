"""Transformers that denoise: one file for each family of checkpoints."""
