"""Encoders of text, and CLIP's of images: one file for each family of checkpoints."""

from diffjax.models.text.bert import BertOutput, bert, bert_for_masked_lm
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
from diffjax.models.text.gpt2 import GPT2Output, gpt2, gpt2_lm
from diffjax.models.text.safety import (
    ConceptOutput,
    HeadOutput,
    blacken,
    if_safety_checker,
    stable_diffusion_safety_checker,
)
from diffjax.models.text.shared import GENERIC
from diffjax.models.text.t5 import t5_encoder, umt5_encoder

__all__ = [
    "GENERIC",
    "BertOutput",
    "ConceptOutput",
    "GPT2Output",
    "HeadOutput",
    "PairOutput",
    "TextOutput",
    "VisionOutput",
    "bert",
    "bert_for_masked_lm",
    "blacken",
    "clip",
    "clip_skip",
    "clip_text",
    "clip_text_with_projection",
    "clip_vision",
    "clip_vision_with_projection",
    "gpt2",
    "gpt2_lm",
    "if_safety_checker",
    "stable_diffusion_safety_checker",
    "t5_encoder",
    "umt5_encoder",
]
