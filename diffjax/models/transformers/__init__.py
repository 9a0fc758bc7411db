"""Transformers that denoise: one file for each family of checkpoints."""
<<<<<<< HEAD
=======

from diffjax.models.transformers.dit import dit_transformer
from diffjax.models.transformers.legacy import transformer_2d
from diffjax.models.transformers.mmdit import sd3_transformer
from diffjax.models.transformers.pixart import pixart_transformer

__all__ = ["dit_transformer", "pixart_transformer", "sd3_transformer", "transformer_2d"]
>>>>>>> dca6a78 (Transformer2DModel, the class that older files of DiT and PixArt name)
