"""`Transformer2DModel`, the class that older files of DiT and PixArt name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffjax.core.types import Model
from diffjax.models.checks import check_name
from diffjax.models.transformers import dit, pixart

KIND = "Transformer2DModel"
# By norm_type.
KINDS = {
    "ada_norm_zero": (dit.dit_transformer, dit.Settings),
    "ada_norm_single": (pixart.pixart_transformer, pixart.Settings),
}
# Settings of other networks of that class, with the values at which they say nothing.
SILENT = {
    "attention_type": "default", "caption_channels": None, "cross_attention_dim": None, "double_self_attention": False,
    "interpolation_scale": None, "num_vector_embeds": None, "only_cross_attention": False,
    "use_additional_conditions": None, "use_linear_projection": False,
}  # fmt: skip


def transformer_2d(config: Mapping[str, Any], **how) -> Model:
    """`DiTTransformer2DModel` or `PixArtTransformer2DModel`, by the `norm_type` of a config of the class before them.

    Args:
      config: that of either class, and with settings that only networks of other kinds had.
      how: see `diffjax.models.settings.how`.

    Raises:
      ValueError: for another `norm_type`, and for settings that are unknown or not supported.
    """
    norm_type = config.get("norm_type", "layer_norm")
    check_name(KIND, "norm_type", norm_type, KINDS)
    make, made_of = KINDS[norm_type]
    size = config.get("sample_size")
    if norm_type == "ada_norm_zero" and isinstance(size, int) and size >= 128:
        raise ValueError(
            f"{KIND}: sample_size={size} is not supported with norm_type={norm_type!r}: from 128 on this class divides "
            "its positions, DiTTransformer2DModel does not; name that one if it is meant"
        )
    known = {field.name for field in dataclasses.fields(made_of)}
    kept = {k: v for k, v in config.items() if k in known or k not in SILENT or v != SILENT[k]}
    return make(kept, **how)._replace(config={"_class_name": KIND, **config})
