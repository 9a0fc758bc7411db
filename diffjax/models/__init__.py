"""Networks as pairs of pure functions: `MODELS[name](*, shape, num_classes, ...) -> Model`."""

from diffjax.models.dit import dit
from diffjax.models.mlp import mlp
from diffjax.models.presets import PRESETS, preset
from diffjax.models.unet import unet

MODELS = {"mlp": mlp, "unet": unet, "dit": dit}

__all__ = ["MODELS", "PRESETS", "dit", "mlp", "preset", "unet"]
