"""Prompts as the conditions of text-to-image networks: Stable Diffusion, SDXL, SD3 and FLUX.1.

Each function returns the keywords of the network's call, `network.apply(params, x, t, **conditions)`, made by the
checkpoint's text encoders. What they do is what the pipelines that these networks were published with do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffjax.core.types import Model
from diffjax.data.tokenizers import Tokenizer
from diffjax.models.text.clip import TextOutput, clip_skip

# Tokens of T5 that SD3 and FLUX.1 were trained with.
T5_LENGTH = {"sd3": 256, "flux": 512}


class TextEncoder(NamedTuple):
    """A text encoder and its tokenizer, as `load_tokenizer` and `diffjax.convert.load` return them."""

    tokenizer: Tokenizer
    model: Model
    params: dict

    def __call__(self, texts: str | Sequence[str], length: int | None = None, **settings) -> Any:
        """What the network returns for texts, each padded or cut to `length` tokens; None for the tokenizer's own."""
        ids = jnp.asarray(self.tokenizer(texts, length=length).ids)
        return self.model.apply(self.params, ids, **settings)


def sd_prompt(encoder: TextEncoder, texts: str | Sequence[str], *, skip: int = 0) -> dict[str, jax.Array]:
    """`context [B, L, D]` for Stable Diffusion 1 and 2: the last hidden state, normalised.

    Args:
      encoder: CLIP's text tower.
      skip: how many layers earlier the state is taken ("clip skip").
    """
    return {"context": encoder(texts, skip=skip).last}


def sdxl_prompt(
    first: TextEncoder | None, second: TextEncoder, texts: str | Sequence[str], *, skip: int = 0
) -> dict[str, jax.Array]:
    """`context [B, L, D1 + D2]` and `pooled [B, P]` for SDXL (arXiv:2307.01952).

    Args:
      first: CLIP's text tower; None for the refiner, which has the second alone.
      second: OpenCLIP's with a projection, which makes `pooled`.
      skip: how many layers before the last but one the states are taken.
    """
    outs = [encoder(texts) for encoder in (first, second) if encoder is not None]
    states = jnp.concatenate([clip_skip(out, skip + 1) for out in outs], axis=-1)
    return {"context": states, "pooled": _projected(outs[-1])}


def size_ids(
    count: int, size: tuple[int, int], *, original: tuple[int, int] | None = None, corner: tuple[int, int] = (0, 0)
) -> jax.Array:
    """SDXL's `time_ids [count, 6]`: original height and width, top and left of the crop, height and width, in pixels.

    Args:
      size: (height, width) of the image.
      original: of the image before it was scaled and cropped; None for `size`.
      corner: where the crop began.
    """
    row = (*(original or size), *corner, *size)
    return jnp.tile(jnp.asarray(row, jnp.float32), (count, 1))


def sd3_prompt(
    first: TextEncoder, second: TextEncoder, third: TextEncoder | None, texts: str | Sequence[str], *,
    width: int | None = None, length: int = T5_LENGTH["sd3"], skip: int = 0,
) -> dict[str, jax.Array]:  # fmt: skip
    """`context [B, L + length, D]` and `pooled [B, P]` for Stable Diffusion 3 and 3.5 (arXiv:2403.03206).

    The states of both CLIPs side by side, filled up with zeros to the width of T5's, in front of these.

    Args:
      first, second: CLIP's and OpenCLIP's text towers, with projections.
      third: T5; None leaves zeros in its place, of the width `width`.
      width: of the context, `joint_attention_dim`; None for that of T5.
      length: tokens of T5.
      skip: how many layers before the last but one CLIP's states are taken.

    Raises:
      ValueError: without T5 and `width`, or for a width that does not hold both CLIPs' states.
    """
    outs = [encoder(texts) for encoder in (first, second)]
    pair = jnp.concatenate([clip_skip(out, skip + 1) for out in outs], axis=-1)
    if third is None and width is None:
        raise ValueError("sd3_prompt: without T5 the width of the context is not known: give width=")
    t5 = jnp.zeros((len(pair), length, width), pair.dtype) if third is None else third(texts, length)
    missing = t5.shape[-1] - pair.shape[-1]
    if missing < 0:
        raise ValueError(f"sd3_prompt: the context is {t5.shape[-1]} wide, and both CLIPs' states {pair.shape[-1]}")
    pair = jnp.pad(pair, ((0, 0), (0, 0), (0, missing)))
    pooled = jnp.concatenate([_projected(out) for out in outs], axis=-1)
    return {"context": jnp.concatenate([pair, t5], axis=1), "pooled": pooled}


def flux_prompt(
    clip: TextEncoder, t5: TextEncoder, texts: str | Sequence[str], *, length: int = T5_LENGTH["flux"]
) -> dict[str, jax.Array]:  # fmt: skip
    """`context [B, length, D]` of T5 and `pooled [B, P]` of CLIP for FLUX.1; padding is seen like text.

    Args:
      length: tokens of T5; FLUX.1 schnell was trained with 256.
    """
    return {"context": t5(texts, length), "pooled": clip(texts).pooled}


def flux_shift(tokens: int, *, low: float = 0.5, high: float = 1.15, few: int = 256, many: int = 4096) -> float:
    """`mu` of a scheduler with dynamic shifting, from how many tokens the image has: on the line through two ends.

    The arguments are the scheduler's `base_shift`, `max_shift`, `base_image_seq_len` and `max_image_seq_len`.
    """
    return low + (tokens - few) * (high - low) / (many - few)


def no_prompt(conditions: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Zeros in the place of a prompt: what SDXL takes for none (`force_zeros_for_empty_prompt`)."""
    return {name: jnp.zeros_like(value) for name, value in conditions.items()}


def both(cond: Mapping[str, jax.Array], uncond: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The conditions of `2 B` samples for `diffjax.guidance.cfg`: the prompts first.

    Raises:
      ValueError: for conditions of other names or shapes.
    """
    shapes = [{name: jnp.shape(value) for name, value in given.items()} for given in (cond, uncond)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"both: conditions of shapes {shapes[0]} and {shapes[1]}; expected the same")
    return {name: jnp.concatenate([value, uncond[name]]) for name, value in cond.items()}


def _projected(out: TextOutput) -> jax.Array:
    if out.text_embeds is None:
        raise ValueError("this text encoder has no projection: it must be a CLIPTextModelWithProjection")
    return out.text_embeds
