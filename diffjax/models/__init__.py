"""Networks as pairs of pure functions.

`MODELS[name](*, shape, num_classes, ...) -> Model` are those to train from a config of this library; `NETWORKS` those
of published checkpoints, by the name of the class in their `config.json`, which `from_config` builds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from diffjax.core.types import Model
from diffjax.models.checkpoint import checkpoint
from diffjax.models.dit import dit
from diffjax.models.mlp import mlp
from diffjax.models.presets import PRESETS, preset
from diffjax.models.unet import unet
from diffjax.registry import lookup, nearest

MODELS = {"mlp": mlp, "unet": unet, "dit": dit, "checkpoint": checkpoint}
# Where the function `(config, **how) -> Model` of a class is; it is imported when it is asked for.
NETWORKS = {
    "AutoencoderKL": "diffjax.models.autoencoders.kl:autoencoder_kl",
    "AutoencoderTiny": "diffjax.models.autoencoders.tiny:autoencoder_tiny",
    "BertForMaskedLM": "diffjax.models.text.bert:bert_for_masked_lm",
    "BertModel": "diffjax.models.text.bert:bert",
    "CLIPModel": "diffjax.models.text.clip:clip",
    "CLIPTextModel": "diffjax.models.text.clip:clip_text",
    "CLIPTextModelWithProjection": "diffjax.models.text.clip:clip_text_with_projection",
    "CLIPVisionModel": "diffjax.models.text.clip:clip_vision",
    "CLIPVisionModelWithProjection": "diffjax.models.text.clip:clip_vision_with_projection",
    "ControlNetModel": "diffjax.adapters.controlnet:controlnet",
    "DiTTransformer2DModel": "diffjax.models.transformers.dit:dit_transformer",
    "EDM2UNet": "diffjax.models.unets.edm2:edm2_unet",
    "FluxControlNetModel": "diffjax.adapters.controlnet_flux:flux_controlnet",
    "FluxTransformer2DModel": "diffjax.models.transformers.flux:flux_transformer",
    "GPT2LMHeadModel": "diffjax.models.text.gpt2:gpt2_lm",
    "GPT2Model": "diffjax.models.text.gpt2:gpt2",
    "IFSafetyChecker": "diffjax.models.text.safety:if_safety_checker",
    "PixArtTransformer2DModel": "diffjax.models.transformers.pixart:pixart_transformer",
    "PriorTransformer": "diffjax.models.transformers.prior:prior_transformer",
    "SD3ControlNetModel": "diffjax.adapters.controlnet_sd3:sd3_controlnet",
    "SD3Transformer2DModel": "diffjax.models.transformers.mmdit:sd3_transformer",
    "StableDiffusionSafetyChecker": "diffjax.models.text.safety:stable_diffusion_safety_checker",
    "T2IAdapter": "diffjax.adapters.t2i_adapter:t2i_adapter",
    "T5EncoderModel": "diffjax.models.text.t5:t5_encoder",
    "Transformer2DModel": "diffjax.models.transformers.legacy:transformer_2d",
    "UMT5EncoderModel": "diffjax.models.text.t5:umt5_encoder",
    "UNet2DConditionModel": "diffjax.models.unets.unet_cond:unet_condition",
    "UNet2DModel": "diffjax.models.unets.unet_2d:unet_2d",
    "UVit2DModel": "diffjax.models.transformers.amused:uvit_2d",
    "UViT": "diffjax.models.transformers.uvit:uvit",
    "VQModel": "diffjax.models.autoencoders.vq:vq_model",
}

__all__ = [
    "MODELS", "NETWORKS", "PRESETS", "checkpoint", "dit", "from_config", "kind_of", "mlp",
    "network", "preset", "unet",
]  # fmt: skip


def kind_of(config: Mapping[str, Any]) -> str:
    """The class that a `config.json` names: `_class_name`, or the first of `architectures`.

    Raises:
      ValueError: if it names none, or is none itself.
    """
    if isinstance(config, str | os.PathLike):
        told = "expected what a config.json holds; `diffjax.convert.load` reads a folder"
        raise ValueError(f"the config is {config!r}: {told}")
    architectures = config.get("architectures")
    several = isinstance(architectures, list | tuple) and architectures
    kind = config.get("_class_name", architectures[0] if several else None)
    if not isinstance(kind, str):
        raise ValueError("the config names no class: expected '_class_name', or 'architectures' with one name")
    return kind


def network(kind: str) -> Callable[..., Model]:
    """The function `(config, **how) -> Model` of a class, whose docstring has the inputs of its network.

    Raises:
      ValueError: for a class that is not known.
    """
    if kind not in NETWORKS:
        told = f"which is not known here{nearest(kind, NETWORKS)}; known: {', '.join(sorted(NETWORKS))}"
        raise ValueError(f"the class is a {kind!r}, {told}")
    return lookup(NETWORKS[kind], {}, "class of network")


def from_config(config: Mapping[str, Any], **how) -> Model:
    """The network that the `config.json` of a checkpoint describes, without parameters.

    Args:
      config: with the name of a class of `NETWORKS` under `_class_name` or `architectures`, and its settings.
      how: how it is computed: `dtype`, `param_dtype`, `attention`, `scan`, `remat`; see `diffjax.models.settings.how`.

    Raises:
      ValueError: for a class, or a setting of it, that is not known or not supported.
    """
    return network(kind_of(config))(config, **how)
