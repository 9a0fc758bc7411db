"""U-Nets that denoise: one file for each class of checkpoints."""

from diffjax.models.unets.unet_2d import unet_2d
from diffjax.models.unets.unet_cond import unet_condition

__all__ = ["unet_2d", "unet_condition"]
