"""Prompts as the conditions of text-to-image networks: Stable Diffusion, SDXL, SD3 and FLUX.1.

Each function returns the keywords of the network's call, `network.apply(params, x, t, **conditions)`, made by the
checkpoint's text encoders. What they do is what the pipelines that these networks were published with do: a text that
is longer than its encoder is cut. With `weighted` it is not, and its words have weights (`diffjax.data.parse_prompt`).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.adapters.textual_inversion import TABLE
from diffjax.core.types import Model
from diffjax.data.prompts import weigh_states, weighted_tokens
from diffjax.data.tokenizers import Tokenizer
from diffjax.models.text.clip import TextOutput, clip_skip
from diffjax.nn.functional import names_of

# Tokens of T5 that SD3 and FLUX.1 were trained with.
T5_LENGTH = {"sd3": 256, "flux": 512}


class TextEncoder(NamedTuple):
    """A text encoder and its tokenizer, as `load_tokenizer` and `diffjax.convert.load` return them.

    Attributes:
      truncate: whether texts that are too long are cut; False for an error.
    """

    tokenizer: Tokenizer
    model: Model
    params: dict
    truncate: bool = True

    def __call__(self, texts: str | Sequence[str], length: int | None = None, **settings) -> Any:
        """What the network returns for texts, each padded or cut to `length` tokens; None for the tokenizer's own.

        Raises:
          ValueError: for no text, one that is too long, where none is to be cut, or a word that the network lacks.
        """
        ids = self.tokenizer(_many(texts), length=length, truncate=self.truncate).ids
        return self.model.apply(self.params, _known(self, ids), **settings)


def sd_prompt(
    encoder: TextEncoder, texts: str | Sequence[str], *, skip: int = 0, weighted: bool = False, chunks: int = 1
) -> dict[str, jax.Array]:
    """`context [B, L, D]` for Stable Diffusion 1 and 2: the last hidden state, normalised.

    Args:
      encoder: CLIP's text tower.
      texts: one, or many.
      skip: how many layers earlier the state is taken ("clip skip").
      weighted: read weights, and texts of any length: L is that of n chunks behind one another, of which each is a text
        for the encoder. All texts have as many as the longest needs: guidance has the prompt and the other one of equal
        length if both are made in one call.
      chunks: with `weighted`, how many there are at least.

    Raises:
      ValueError: for no text, one that may not be cut, or an encoder that is none of CLIP's towers.
    """
    _check_towers(encoder)
    if not weighted:
        return {"context": encoder(texts, skip=skip).last}
    return {"context": _weighted(encoder, texts, lambda out: out.last, chunks, skip=skip)[0]}


def sdxl_prompt(
    first: TextEncoder | None, second: TextEncoder, texts: str | Sequence[str], *, skip: int = 0,
    weighted: bool = False, chunks: int = 1,
) -> dict[str, jax.Array]:  # fmt: skip
    """`context [B, L, D1 + D2]` and `pooled [B, P]` for SDXL (arXiv:2307.01952).

    Args:
      first: CLIP's text tower; None for the refiner, which has the second alone.
      second: OpenCLIP's with a projection, which makes `pooled`.
      texts: one, or many.
      skip: how many layers before the last but one the states are taken.
      weighted, chunks: as for `sd_prompt`; both encoders have equally many chunks, and `pooled` is that of the first,
        without weights.

    Raises:
      ValueError: as `sd_prompt`; for a second encoder without a projection.
    """
    encoders = [encoder for encoder in (first, second) if encoder is not None]
    _check_towers(*encoders)
    state = lambda out: clip_skip(out, skip + 1)
    if weighted:
        chunks = max(_chunks(encoder, texts, chunks) for encoder in encoders)
        found = [_weighted(encoder, texts, state, chunks) for encoder in encoders]
        states, pooled = [states for states, _ in found], _projected(found[-1][1])[:, 0]
    else:
        outs = [encoder(texts) for encoder in encoders]
        states, pooled = [state(out) for out in outs], _projected(outs[-1])
    return {"context": jnp.concatenate(states, axis=-1), "pooled": pooled}


def _chunks(encoder: TextEncoder, texts, least) -> int:
    return weighted_tokens(encoder.tokenizer, _many(texts), least=least)[0].shape[1]


def _many(texts) -> list[str]:
    """One text or many as a list; raises `ValueError` for none."""
    several = [texts] if isinstance(texts, str) else [] if texts is None else list(texts)
    if not several or not all(isinstance(text, str) for text in several):
        raise ValueError(f"texts={reprlib.repr(texts)}: expected a text, or a list of them")
    return several


def _check_towers(*encoders: TextEncoder) -> None:
    """Raises `ValueError` for an encoder of a class that is none of CLIP's text towers."""
    for encoder in encoders:
        kind, *_ = encoder.model.config.get("architectures") or ["CLIPTextModel"]
        if not kind.startswith("CLIPText"):
            raise ValueError(f"a {kind} in the place of CLIP's text tower, a CLIPTextModel, with a projection or not")


def _known(encoder: TextEncoder, ids: np.ndarray) -> jax.Array:
    """The ids for the network; raises `ValueError` for one beyond its table of tokens, of which there would be NaN."""
    tables = [leaf.shape[0] for name, leaf in names_of(encoder.params).items() if re.search(TABLE, name)]
    if tables and ids.max() >= tables[0]:
        raise ValueError(
            f"the tokenizer gives the id {ids.max()}, and the text encoder knows {tables[0]} tokens: new words go into "
            "both, by the tokenizer's `extended` and by `diffjax.adapters.textual_inversion.add` with its `extended`"
        )
    return jnp.asarray(ids)


def _weighted(encoder: TextEncoder, texts, state, chunks, **settings) -> tuple[jax.Array, TextOutput]:
    """States `[B, n * L, D]` times the weights of their words; the vectors that the network returns `[B, n, ...]`."""
    ids, weights = weighted_tokens(encoder.tokenizer, _many(texts), least=chunks)
    count, length = ids.shape[:2], ids.shape[2]
    out = encoder.model.apply(encoder.params, _known(encoder, ids.reshape(-1, length)), **settings)
    states = weigh_states(state(out).reshape(*count, length, -1), jnp.asarray(weights))
    split = lambda vector: None if vector is None else vector.reshape(*count, -1)
    out = out._replace(pooled=split(out.pooled), text_embeds=split(out.text_embeds))
    return states.reshape(count[0], -1, states.shape[-1]), out


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
      ValueError: as `sdxl_prompt`; without T5 and `width`, or for a width that does not hold both CLIPs' states.
    """
    _check_towers(first, second)
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

    Raises:
      ValueError: as `sd_prompt`.
    """
    _check_towers(clip)
    return {"context": t5(texts, length), "pooled": clip(texts).pooled}


def flux_shift(tokens: int, *, low: float = 0.5, high: float = 1.15, few: int = 256, many: int = 4096) -> float:
    """`mu` of a scheduler with dynamic shifting, from how many tokens the image has: on the line through two ends.

    The arguments are the scheduler's `base_shift`, `max_shift`, `base_image_seq_len` and `max_image_seq_len`.
    """
    return low + (tokens - few) * (high - low) / (many - few)


def no_prompt(conditions: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Zeros in the place of a prompt: what SDXL takes for none (`force_zeros_for_empty_prompt`).

    `time_ids` stay as they are: they tell of the image, not of the prompt.
    """
    return {name: value if name == "time_ids" else jnp.zeros_like(value) for name, value in conditions.items()}


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
