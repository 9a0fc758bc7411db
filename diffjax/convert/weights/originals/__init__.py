"""Checkpoints in one file under the names of their authors: Stable Diffusion 1, 2, XL, 3 and 3.5, FLUX.1.

A file may hold a whole pipeline. Each of its parts is a network of `NETWORKS`; which tensor is which is told by the
tables of `unet`, `vae`, `mmdit`, `flux` and `text`, which are read in either direction.
"""

from diffjax.convert.weights.originals.contents import Contents, Part, original_components
from diffjax.convert.weights.originals.load import load_original, survey_original
from diffjax.convert.weights.originals.save import save_original

__all__ = ["Contents", "Part", "load_original", "original_components", "save_original", "survey_original"]
