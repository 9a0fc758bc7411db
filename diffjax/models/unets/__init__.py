"""U-Nets that denoise: one file for each class of checkpoints."""

from diffjax.models.unets.unet_2d import unet_2d

__all__ = ["unet_2d"]
