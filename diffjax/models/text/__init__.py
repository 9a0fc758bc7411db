"""Encoders of text, and CLIP's of images: one file for each family of checkpoints."""

from diffjax.models.text.clip import (
    PairOutput,
    TextOutput,
    VisionOutput,
    clip,
    clip_skip,
    clip_text,
    clip_text_with_projection,
    clip_vision,
    clip_vision_with_projection,
)
from diffjax.models.text.shared import GENERIC

__all__ = [
    "GENERIC",
    "PairOutput",
    "TextOutput",
    "VisionOutput",
    "clip",
    "clip_skip",
    "clip_text",
    "clip_text_with_projection",
    "clip_vision",
    "clip_vision_with_projection",
]
