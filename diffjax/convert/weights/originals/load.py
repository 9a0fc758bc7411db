"""Networks out of original checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from diffjax.convert.weights.errors import WeightsError, told_of
from diffjax.convert.weights.folders.load import parameters
from diffjax.convert.weights.folders.survey import Survey, build, check_fits
from diffjax.convert.weights.originals.contents import Contents, Part, flat, original_components
from diffjax.convert.weights.originals.tables import flux, mmdit, text, unet, vae
from diffjax.convert.weights.originals.tables.naming import Naming, arrange, cut, fit
from diffjax.convert.weights.places.layout import layout
from diffjax.convert.weights.places.match import compare, match
from diffjax.convert.weights.tensors.dtypes import check_dtype
from diffjax.convert.weights.tensors.views import Unit
from diffjax.core.types import Model
from diffjax.models import kind_of
from diffjax.nn.functional import names_of

MODULES = {
    "UNet2DConditionModel": unet, "AutoencoderKL": vae, "SD3Transformer2DModel": mmdit, "FluxTransformer2DModel": flux
}  # fmt: skip


def load_original(
    path: str | os.PathLike, component: str, *, config: Mapping[str, Any] | None = None, family: str | None = None,
    param_dtype: str | None = None, sharding: Callable[[Model, dict], Any] | None = None, **how,
) -> tuple[Model, dict]:  # fmt: skip
    """A network of an original checkpoint, and its parameters, as `load` returns them from a folder.

    Args:
      path: a safetensors file.
      component: "unet", "unet_ema" (the average of its parameters that some files have), "transformer", "vae",
        "text_encoder", "text_encoder_2" or "text_encoder_3", as in diffusers' pipelines.
      config: settings as of a `config.json`; None for those that the shapes tell, of the published networks. They tell
        no heads and no groups: other widths than the published ones need it.
      family: of `Contents.family`, where the file does not tell it: a VAE alone.
      param_dtype, sharding, how: as for `load`.

    Raises:
      WeightsError: for a damaged file; one without the component; one that does not hold each of its parameters exactly
        once; shapes of which no config follows.
      ValueError: for a config that describes no network that is known here.
      OSError: if it cannot be read.
    """
    check_dtype("param_dtype", param_dtype)
    found = survey_original(path, component, config=config, family=family, **how)
    check_fits(found, component)
    return found.model, parameters(found, param_dtype, sharding)


def survey_original(
    path: str | os.PathLike, component: str, *, config: Mapping[str, Any] | None = None, family: str | None = None,
    **how,
) -> Survey:  # fmt: skip
    """What `survey` tells of a folder, of a network of an original checkpoint; its tensors are named as in a folder.

    If they do not fit, `report` has the names of the file, and `tensors` is empty.

    Args and raises as `load_original`.
    """
    contents = original_components(Path(path))
    if component not in contents.parts:
        if not contents.parts:
            raise WeightsError(f"{path}: it has nothing of Stable Diffusion or FLUX.1 under its authors' names")
        raise WeightsError(f"{path}: no component {component!r}; it has: {', '.join(contents.parts)}")
    with told_of(contents.path):
        return _surveyed(contents, component, config, family, how)


def _surveyed(contents: Contents, component: str, config, family, how) -> Survey:
    path, part = contents.path, contents.parts[component]
    given = infer(contents, component, family) if config is None else _named(config, part.kind)
    kind = kind_of(given)
    if kind != part.kind:
        raise WeightsError(f"{path}: {component} is a {part.kind}, and the config that of a {kind}")
    model, tree = build(given, path, **how)
    shapes = names_of(tree)
    naming = naming_of(part, component, given)
    if naming is None:
        places, tensors = match(kind, _projected(part), shapes)
        return Survey(path, kind, tensors, model, shapes, places, compare(places, tensors, shapes))
    places = layout(shapes)
    slots = arrange(naming, {key: place.shape for place in places.values() for key in place.keys})
    report = fit(slots, part.tensors)
    tensors = {} if any(report) else cut(slots, part.tensors)
    report = compare(places, tensors, shapes) if tensors else report
    return Survey(path, kind, tensors, model, shapes, places, report)


def infer(contents: Contents, component: str, family: str | None = None) -> dict[str, Any]:
    """The config of a component from the shapes of its tensors; raises `WeightsError` where they do not tell it."""
    part, family = contents.parts[component], family or contents.family
    # Of an average the names have no dots; it has the shapes of the network beside it.
    tensors = contents.parts["unet" if component == "unet_ema" else component].tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if component == "vae" and "edm_mean" in contents.rest:
        # Playground 2.5, whose latents have a mean and a spread of their own.
        raise WeightsError(f"{contents.path}: its latents are scaled by edm_mean and edm_std: give its config")
    try:
        if part.kind in MODULES:
            return MODULES[part.kind].config(shapes, family)
        if part.kind == "T5EncoderModel":
            return text.t5_config(shapes, part.kind)
        openclip = "positional_embedding" in shapes
        if openclip:
            shapes |= {name: tensor.shape for name, tensor in part.ignored.items()}
        return (text.openclip_config if openclip else text.clip_config)(shapes, part.kind)
    except (IndexError, KeyError, ValueError, ZeroDivisionError) as error:
        told = error if isinstance(error, WeightsError) else f"{type(error).__name__}: {error}"
        raise WeightsError(f"{contents.path}: {component}: no config follows from its tensors: {told}") from None


def naming_of(part: Part, component: str, config: Mapping[str, Any]) -> Naming | None:
    """The names of a component; None if they are those of transformers."""
    if part.kind in MODULES:
        naming = MODULES[part.kind].naming(config)
        if component != "unet_ema":
            return naming
        return lambda name: (found := naming(name)) and found._replace(name=flat(found.name))
    return text.naming(config) if "positional_embedding" in part.tensors else None


def _named(config, kind):
    known = "_class_name" in config or "architectures" in config
    named = {"architectures": [kind]} if kind.startswith(("CLIP", "T5")) else {"_class_name": kind}
    return dict(config) if known else {**named, **config}


def _projected(part):
    """The tensors, with the projection of Stable Diffusion 3's first tower, which its files lack: there is none."""
    if part.kind != "CLIPTextModelWithProjection" or "text_projection.weight" in part.tensors:
        return part.tensors
    tokens = next((t for name, t in part.tensors.items() if name.endswith("token_embedding.weight")), None)
    if tokens is None or len(tokens.shape) != 2:
        return part.tensors
    unit = Unit(tokens.path, jnp.dtype(tokens.dtype), (tokens.shape[1], tokens.shape[1]))
    return {**part.tensors, "text_projection.weight": unit}
