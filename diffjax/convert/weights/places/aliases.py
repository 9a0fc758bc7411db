"""Names that tensors have had in older files."""

from __future__ import annotations

import re

# By class: what a name is replaced by (None: the tensor is a constant that the network makes itself).
_ATTENTION = (
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
)
_CLIP = ((r"(^|\.)position_ids$", None),)
_CLIP_PROJECTED = (*_CLIP, (r"^(text|vision)_model\.\1_model\.", r"\1_model."))
# One tower out of a file of both, with or without what its class has of the projections.
_NO_IMAGE = (r"^(vision_model\.|visual_projection\.|logit_scale$)", None)
_NO_TEXT = (r"^(text_model\.|text_projection\.|logit_scale$)", None)
_CLIP_TEXT = (*_CLIP, _NO_IMAGE, (r"^text_projection\.", None), (r"^text_model\.", ""))
_CLIP_VISION = (*_CLIP, _NO_TEXT, (r"^visual_projection\.", None), (r"^(vision_model\.)+", ""))
# The text of no prompt, which pipelines encode instead.
_PIXART = ((r"^caption_projection\.y_embedding$", None),)
# TensorFlow's names, and heads that the classes here do not have.
_BERT = (*_CLIP, (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))
# The causal mask; and names of the network without its head.
_GPT2 = ((r"\.attn\.(masked_)?bias$", None),)
_T5 = ((r"^(decoder\.|lm_head\.)", None),)
ALIASES: dict[str, tuple[tuple[str, str | None], ...]] = {
    "AutoencoderKL": _ATTENTION,
    "BertForMaskedLM": (*_BERT, (r"^(bert\.pooler|cls\.seq_relationship)\.", None)),
    "BertModel": (*_BERT, (r"^cls\.", None), (r"^bert\.", "")),
    "CLIPModel": _CLIP_PROJECTED,
    "CLIPTextModel": _CLIP_TEXT,
    "CLIPTextModelWithProjection": (_NO_IMAGE, *_CLIP_PROJECTED),
    "CLIPVisionModel": _CLIP_VISION,
    "CLIPVisionModelWithProjection": (_NO_TEXT, *_CLIP_PROJECTED),
    "EDM2UNet": ((r"^unet\.", ""),),
    "GPT2LMHeadModel": (*_GPT2, (r"^(?!transformer\.|lm_head\.)", "transformer.")),
    "GPT2Model": (*_GPT2, (r"^lm_head\.", None), (r"^transformer\.", "")),
    "IFSafetyChecker": (*_CLIP, (r"^(vision_model\.)+(?!visual_projection\.)", "vision_model.vision_model.")),
    "PixArtTransformer2DModel": _PIXART,
    "StableDiffusionSafetyChecker": (*_CLIP, (r"^(vision_model\.)+", "vision_model.")),
    "T5EncoderModel": _T5,
    "Transformer2DModel": _PIXART,
    "UMT5EncoderModel": _T5,
    "UNet2DConditionModel": _ATTENTION,
    "UNet2DModel": _ATTENTION,
    "VQModel": _ATTENTION,
}
# By class: pairs of names that stand for one tensor where the network has one parameter for both, the other name first.
_SHARED = (("encoder.embed_tokens.weight", "shared.weight"),)
TIED: dict[str, tuple[tuple[str, str], ...]] = {
    "BertForMaskedLM": (
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    "GPT2LMHeadModel": (("lm_head.weight", "transformer.wte.weight"),),
    "T5EncoderModel": _SHARED,
    "UMT5EncoderModel": _SHARED,
}
# Projections of attention, which older files have as convolutions of single pixels, `[C, C, 1, 1]`.
_PROJECTIONS = re.compile(r"\.attentions\.\d+\.to_(q|k|v|out\.0)\.weight$")


def without_pixels(kind: str, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Today's shape of a tensor of the class `kind` under today's name."""
    old = ALIASES.get(kind) is _ATTENTION and _PROJECTIONS.search(name) and shape[2:] == (1, 1)
    return shape[:2] if old else shape


def modern(kind: str, name: str) -> str | None:
    """Today's name of a tensor of the class `kind`; None for one that is no parameter."""
    for regex, replacement in ALIASES.get(kind, ()):
        if replacement is None:
            if re.search(regex, name):
                return None
        else:
            name = re.sub(regex, replacement, name)
    return name
