"""Networks, adapters and their weights, in the formats of diffusers, transformers, and the networks' authors."""

from diffjax.convert.weights.adapters.ip_adapter import load_ip_adapter, save_ip_adapter
from diffjax.convert.weights.adapters.lora import load_lora, lora_components, save_lora
from diffjax.convert.weights.adapters.textual_inversion import load_textual_inversion, save_textual_inversion
from diffjax.convert.weights.errors import WeightsError
from diffjax.convert.weights.folders.load import load
from diffjax.convert.weights.folders.save import save
from diffjax.convert.weights.folders.survey import survey
from diffjax.convert.weights.official_dit import load_official_dit, save_official_dit
from diffjax.convert.weights.originals import load_original, original_components, save_original
from diffjax.convert.weights.rewrite import rewrite

__all__ = [
    "WeightsError",
    "load",
    "load_ip_adapter",
    "load_lora",
    "load_official_dit",
    "load_original",
    "load_textual_inversion",
    "lora_components",
    "original_components",
    "rewrite",
    "save",
    "save_ip_adapter",
    "save_lora",
    "save_official_dit",
    "save_original",
    "save_textual_inversion",
    "survey",
]
