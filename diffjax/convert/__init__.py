"""Models, weights and samplers of other libraries, read from their own files and written for them.

`load` and `save` bring Flax with them when they are first asked for.
"""

from diffjax.convert.scheduler import scheduler, start_scale

_WEIGHTS = (
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
)
__all__ = [*_WEIGHTS, "scheduler", "start_scale"]


def __getattr__(name: str):
    if name not in _WEIGHTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffjax.convert import weights

    return getattr(weights, name)
