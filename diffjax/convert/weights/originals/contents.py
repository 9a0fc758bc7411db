"""Which networks an original checkpoint holds, by the names of its tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from diffjax.convert.weights.folders.find import find
from diffjax.convert.weights.originals.tables import flux, mmdit, unet, vae
from diffjax.convert.weights.tensors import Tensor

# Folders of a U-Net's tensors; the average of its parameters lies beside it, under names without dots.
UNET, AVERAGE = "model.diffusion_model.", "model_ema."
NETWORKS = {
    unet.FIRST: "UNet2DConditionModel", mmdit.FIRST: "SD3Transformer2DModel", flux.FIRST: "FluxTransformer2DModel"
}  # fmt: skip
FAMILIES = {mmdit.FIRST: "sd3", flux.FIRST: "flux"}
# Text encoders: the prefix of their tensors, the first of them, the name of the component and the class.
CLIP_FIRST = "embeddings.position_embedding.weight"
TEXTS = (
    ("cond_stage_model.transformer.", f"text_model.{CLIP_FIRST}", "text_encoder", "CLIPTextModel"),
    ("cond_stage_model.transformer.", CLIP_FIRST, "text_encoder", "CLIPTextModel"),
    ("cond_stage_model.model.", "positional_embedding", "text_encoder", "CLIPTextModel"),
    ("conditioner.embedders.0.transformer.", f"text_model.{CLIP_FIRST}", "text_encoder", "CLIPTextModel"),
    ("conditioner.embedders.0.model.", "positional_embedding", "text_encoder_2", "CLIPTextModelWithProjection"),
    ("conditioner.embedders.1.model.", "positional_embedding", "text_encoder_2", "CLIPTextModelWithProjection"),
    ("text_encoders.clip_l.transformer.", f"text_model.{CLIP_FIRST}", "text_encoder", "CLIPTextModelWithProjection"),
    ("text_encoders.clip_g.transformer.", f"text_model.{CLIP_FIRST}", "text_encoder_2", "CLIPTextModelWithProjection"),
    ("text_encoders.t5xxl.transformer.", "shared.weight", "text_encoder_3", "T5EncoderModel"),
)
# What belongs to no parameter of the networks here: of training, of CLIP's other tower, or made by the network itself.
IGNORED = {
    "AutoencoderKL": (r"loss\.", r"model_ema\."),
    "CLIPTextModel": (r"logit_scale$", r"attn_mask$", r"text_projection(\.weight)?$"),
    "CLIPTextModelWithProjection": (r"logit_scale$", r"attn_mask$"),
    "T5EncoderModel": (r"logit_scale$",),
    "UNet2DConditionModel": (r"(decay|num_updates)$",),
}


class Part(NamedTuple):
    """A network in an original checkpoint.

    Attributes:
      kind: its class in `diffjax.models.NETWORKS`.
      prefix: of the names of its tensors.
      tensors: those of its parameters, without the prefix.
      ignored: those that are none of its parameters.
    """

    kind: str
    prefix: str
    tensors: Mapping[str, Tensor]
    ignored: Mapping[str, Tensor]


class Contents(NamedTuple):
    """What an original checkpoint holds.

    Attributes:
      path: of the file.
      family: "sd" (1.x), "sd2", "sdxl", "refiner", "sd3" or "flux"; "" for one without a sampling network.
      parts: its networks by the names of the components: "unet", "unet_ema", "transformer", "vae", "text_encoder", ...
      rest: the names of tensors of no network, such as tables of a schedule.
    """

    path: Path
    family: str
    parts: Mapping[str, Part]
    rest: tuple[str, ...]


def original_components(path: str | os.PathLike) -> Contents:
    """The networks in a safetensors file under the names of its authors; nothing but its header is read.

    A file that is none of these has no `parts`.

    Raises:
      WeightsError: for a damaged file or a pickle.
      OSError: if it cannot be read.
    """
    path = Path(path)
    left = dict(find(path))
    places = _places(left)
    family = _family(places, left)
    parts: dict[str, Part] = {}
    # Long prefixes first: the empty one takes what is left.
    for component, (prefix, kind) in sorted(places.items(), key=lambda item: -len(item[1][0])):
        component, kind = _of(family, component, kind)
        held = {name.removeprefix(prefix): left.pop(name) for name in list(left) if name.startswith(prefix)}
        ignored = [name for name in held if any(re.match(regex, name) for regex in IGNORED.get(kind, ()))]
        ignored += _unused_layer(held) if prefix == "cond_stage_model.model." else []
        beside = {name: held.pop(name) for name in dict.fromkeys(ignored)}
        parts[component] = Part(kind, prefix, held, beside)
    return Contents(path, family, dict(sorted(parts.items())), tuple(sorted(left)))


def _places(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
    """The prefix and the class of each component."""
    found: dict[str, tuple[str, str]] = {}
    for prefix in (UNET, ""):
        for first, kind in NETWORKS.items():
            if prefix + first in tensors:
                found.setdefault("unet" if first == unet.FIRST else "transformer", (prefix, kind))
    if f"{AVERAGE}{flat(unet.FIRST)}" in tensors:
        found["unet_ema"] = (AVERAGE, "UNet2DConditionModel")
    for prefix in ("first_stage_model.", "vae.", ""):
        if prefix + vae.FIRST in tensors:
            found.setdefault("vae", (prefix, "AutoencoderKL"))
    for prefix, first, component, kind in TEXTS:
        if prefix + first in tensors:
            found.setdefault(component, (prefix, kind))
    return found


def flat(name: str) -> str:
    """The name of a U-Net's tensor in the average of its parameters, behind the prefix."""
    return "diffusion_model" + name.replace(".", "")


def _family(places, tensors):
    for component, first in (("transformer", mmdit.FIRST), ("transformer", flux.FIRST)):
        if component in places and places[component][0] + first in tensors:
            return FAMILIES[first]
    if "unet" in places:
        prefix = places["unet"][0]
        return unet.family({n.removeprefix(prefix): t.shape for n, t in tensors.items() if n.startswith(prefix)})
    prefix = places.get("vae", ("",))[0]
    # Unpacked, both come with networks; alone, one with 16 channels is that of FLUX.1 if nothing is in front.
    held = tensors.get("decoder.conv_in.weight")
    alone = "vae" in places and not prefix and held is not None and held.shape[1:2] == (16,)
    return "flux" if alone else ""


def _of(family, component, kind):
    """The name of a component in a pipeline of the family, and its class there."""
    if family == "flux" and component == "text_encoder_3":
        return "text_encoder_2", kind
    if family == "flux" and component == "text_encoder":
        return component, "CLIPTextModel"
    return component, kind


def _unused_layer(names) -> list[str]:
    """The last layer of OpenCLIP's tower in Stable Diffusion 2, which takes the states in front of it."""
    layers = {int(match[1]) for name in names if (match := re.match(r"transformer\.resblocks\.(\d{1,9})\.", name))}
    return [name for name in names if name.startswith(f"transformer.resblocks.{max(layers)}.")] if layers else []
