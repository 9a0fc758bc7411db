"""The networks that look at finished images in pipelines: CLIP's vision tower and what is concluded from its embedding.

`blacken` does what the pipelines do with images that are found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.text.clip import RULES as CLIP_RULES
from diffjax.models.text.clip import ProjectedVision, VisionSettings, VisionTower, vision_of
from diffjax.nn import Compute, Fixed, Linear, scope, widen

RULES = ((r"^[pw]_head/kernel$", ("fsdp", None)), (r"^(concept|special_care)_embeds(_weights)?$", ()), *CLIP_RULES)
CONCEPTS, SPECIAL = 17, 3


class ConceptOutput(NamedTuple):
    """What `stable_diffusion_safety_checker` says, float32 and bool.

    Attributes:
      scores: `[B, 17]`, how much nearer an image is to each concept than its threshold allows, as cosines.
      special: `[B, 3]`, the same for the concepts that make the others stricter.
      nsfw: `[B]`, whether a score is above zero, rounded to thousandths.
    """

    scores: jax.Array
    special: jax.Array
    nsfw: jax.Array


class HeadOutput(NamedTuple):
    """What `if_safety_checker` says, float32 and bool.

    Attributes:
      nsfw_score, watermark_score: `[B]`, the two heads' numbers.
      nsfw, watermark: `[B]`, whether they are above their thresholds.
    """

    nsfw_score: jax.Array
    watermark_score: jax.Array
    nsfw: jax.Array
    watermark: jax.Array


def blacken(images: jax.Array, flags: jax.Array) -> jax.Array:
    """Images `[B, ...]`, those whose flag `[B]` is set all zero; zero is black where images lie in [0, 1]."""
    return jnp.where(flags.reshape(-1, *(1,) * (images.ndim - 1)), jnp.zeros_like(images), images)


def cosines(a: jax.Array, b: jax.Array) -> jax.Array:
    """`[N, D]` and `[M, D]` as `[N, M]`."""
    a, b = (widen(x) for x in (a, b))
    # Under the root: the gradient of the root of zero is not finite.
    a, b = (x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24)) for x in (a, b))
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def judge(to_concepts: jax.Array, thresholds: jax.Array, to_special: jax.Array, special: jax.Array) -> ConceptOutput:
    """The verdict on cosines `[B, 17]` and `[B, 3]` with thresholds `[17]` and `[3]`.

    Once a special concept is found, scores are larger by 0.01: those of the special ones that follow as well.
    """
    positive = lambda scores: jnp.round(scores * 1000) > 0
    stricter = jnp.zeros(len(to_special), to_special.dtype)
    found = []
    for i in range(special.shape[0]):
        found.append(to_special[:, i] - special[i] + stricter)
        stricter = jnp.where(positive(found[-1]), 0.01, stricter)
    scores = to_concepts - thresholds + stricter[:, None]
    return ConceptOutput(scores, jnp.stack(found, 1), jnp.any(positive(scores), 1))


class ConceptChecker(nnx.Module):
    """The module of `stable_diffusion_safety_checker`."""

    def __init__(self, c: VisionSettings, width: int, *, kind: str, compute: Compute, rngs):
        self.vision_model = VisionTower(c, kind=kind, compute=compute, rngs=rngs)
        self.visual_projection = Linear(c.hidden_size, width, bias=False, dtype=compute.dtype, rngs=rngs)
        ones = lambda *shape: Fixed(jnp.ones(shape, jnp.float32))
        self.concept_embeds, self.special_care_embeds = ones(CONCEPTS, width), ones(SPECIAL, width)
        self.concept_embeds_weights, self.special_care_embeds_weights = ones(CONCEPTS), ones(SPECIAL)

    def __call__(self, x: jax.Array) -> ConceptOutput:
        fixed = lambda name: widen(jax.lax.stop_gradient(getattr(self, name)[...]))
        with scope("vision_model"):
            pooled = self.vision_model(x).pooled
        embeds = self.visual_projection(pooled)
        near = {name: cosines(embeds, fixed(name)) for name in ("concept_embeds", "special_care_embeds")}
        thresholds = {name: fixed(f"{name}_weights") for name in near}
        return judge(*(part[name] for name in near for part in (near, thresholds)))


class HeadChecker(nnx.Module):
    """The module of `if_safety_checker`."""

    def __init__(self, c: VisionSettings, *, kind: str, compute: Compute, rngs):
        self.vision_model = ProjectedVision(c, kind=kind, compute=compute, rngs=rngs)
        self.p_head, self.w_head = (Linear(c.projection_dim, 1, dtype=compute.dtype, rngs=rngs) for _ in range(2))

    def __call__(self, x, *, nsfw_threshold=0.5, watermark_threshold=0.5) -> HeadOutput:
        with scope("vision_model"):
            embeds = self.vision_model(x).image_embeds
        nsfw, watermark = (widen(head(embeds))[:, 0] for head in (self.p_head, self.w_head))
        return HeadOutput(nsfw, watermark, nsfw > nsfw_threshold, watermark > watermark_threshold)


def stable_diffusion_safety_checker(config: Mapping[str, Any], **how) -> Model:
    """`StableDiffusionSafetyChecker` by the config of a checkpoint (Rando et al. 2022, arXiv:2210.04610, explains it).

    Args:
      config: that of a `CLIPModel` (`diffjax.models.text.clip`), whose text tower is not there.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, image_size, image_size, 3]) -> ConceptOutput`, for images that are normalised as
      the checkpoint's preprocessor says.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    kind = "StableDiffusionSafetyChecker"
    vision, width = vision_of(kind, config)
    make = lambda compute, rngs: ConceptChecker(vision, width, kind=kind, compute=compute, rngs=rngs)
    return settings.model(kind, config, make, settings.how(kind, **how), RULES)


def if_safety_checker(config: Mapping[str, Any], **how) -> Model:
    """`IFSafetyChecker`, that of DeepFloyd IF, by the config of a checkpoint.

    Args:
      config: that of a `CLIPModel` (`diffjax.models.text.clip`), whose text tower is not there.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, image_size, image_size, 3], *, nsfw_threshold=0.5, watermark_threshold=0.5) ->
      HeadOutput`, for images that are normalised as the checkpoint's preprocessor says.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    kind = "IFSafetyChecker"
    vision, _ = vision_of(kind, config)
    make = lambda compute, rngs: HeadChecker(vision, kind=kind, compute=compute, rngs=rngs)
    return settings.model(kind, config, make, settings.how(kind, **how), RULES)
