"""Networks and their weights, in the folder format of diffusers and transformers."""

from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folder import load
from diffjax.convert.weights.rewrite import rewrite
from diffjax.convert.weights.survey import survey
from diffjax.convert.weights.write import save

__all__ = ["WeightsError", "load", "rewrite", "save", "survey"]
