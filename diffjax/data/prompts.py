"""Prompts with weights, and prompts longer than the text encoder's positions."""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.data.tokenizers import Tokenizer

STEP = 1.1  # of one pair of brackets
_PARTS = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[^\\()\[\]:]+|[\\:]")


def parse_prompt(prompt: str) -> list[tuple[str, float]]:
    r"""The parts of a prompt with their weights, in the syntax of stable-diffusion-webui.

    `(word)` is worth 1.1 times as much, `(word:1.3)` 1.3 times, `[word]` 1 / 1.1 times; brackets nest, and those that
    are not closed reach to the end. `\(` and the like are brackets of the text. `BREAK`, `AND` and changes from step to
    step, `[a:b:0.5]`, mean nothing here: they are text.

    >>> parse_prompt("an (important) word, (a [lesser] one:2)")
    [('an ', 1.0), ('important', 1.1), (' word, ', 1.0), ('a ', 2.0), ('lesser', 1.8181818181818181), (' one', 2.0)]
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def scale(start, factor):
        weights[start:] = [weight * factor for weight in weights[start:]]

    for part in _PARTS.findall(prompt):
        if part in opened:
            opened[part].append(len(texts))
        elif part[-1] == ")" and part[0] in ":)" and opened["("]:
            scale(opened["("].pop(), STEP if part == ")" else float(part[1:-1]))
        elif part == "]" and opened["["]:
            scale(opened["["].pop(), 1 / STEP)
        else:
            texts.append(part[1:] if len(part) == 2 and part[0] == "\\" else part)
            weights.append(1.0)
    for start in opened["("]:
        scale(start, STEP)
    for start in opened["["]:
        scale(start, 1 / STEP)
    merged: list[tuple[str, float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def prompt_chunks(
    tokenizer: Tokenizer, parts: Sequence[tuple[str, float]], length: int | None = None, least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """A prompt of any length as texts that the encoder takes, one behind the other.

    Args:
      tokenizer: that puts one or more tokens around a text, such as CLIP's.
      parts: as from `parse_prompt`; each is a text of its own for the tokenizer.
      length: of a chunk, with the tokens around it; None for the tokenizer's.
      least: how many chunks there are at least; those without text are empty prompts.

    Returns:
      `ids [n, length] int32`, each row with the tokens that begin and end a text and with padding, and their
      `weights [n, length] float32`, 1 for those tokens.

    Raises:
      ValueError: if the length is not known or leaves no room, or there is no token for padding.
    """
    length = tokenizer.max_length if length is None else length
    prefix, suffix = tokenizer.prefix, tokenizer.suffix
    room = 0 if length is None else length - len(prefix) - len(suffix)
    if room < 1:
        raise ValueError(f"chunks of length {length} leave no room for a text; give length=77 or the like")
    if tokenizer.pad is None:
        raise ValueError("this tokenizer has no token for padding, which the last chunk needs")
    texts = tokenizer.encode([text for text, _ in parts])
    ids = [i for text in texts for i in text]
    weights = [weight for text, (_, weight) in zip(texts, parts, strict=True) for _ in text]
    count = max(1, least, -(-len(ids) // room))
    out_ids, out_weights = np.full((count, length), tokenizer.pad, np.int32), np.ones((count, length), np.float32)
    for i in range(count):
        part = slice(i * room, (i + 1) * room)
        row = [*prefix, *ids[part], *suffix]
        out_ids[i, : len(row)] = row
        out_weights[i, len(prefix) : len(prefix) + len(weights[part])] = weights[part]
    return out_ids, out_weights


def weighted_tokens(
    tokenizer: Tokenizer, texts: Sequence[str], length: int | None = None, least: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with weights, each in as many chunks as the longest needs; `least` and what raises as `prompt_chunks`.

    Returns:
      `ids [B, n, length] int32` and `weights [B, n, length] float32`.
    """
    parts = [parse_prompt(text) for text in texts]
    least = max([least, *(len(prompt_chunks(tokenizer, part, length)[0]) for part in parts)])
    chunks = [prompt_chunks(tokenizer, part, length, least) for part in parts]
    return np.stack([ids for ids, _ in chunks]), np.stack([weights for _, weights in chunks])


def weigh_states(states: jax.Array, weights: jax.Array) -> jax.Array:
    """Text states `[..., L, D]` times the weights of their tokens `[..., L]`, with the mean of each text kept.

    As stable-diffusion-webui, which keeps the mean over all texts of a batch; here a text does not depend on others.
    """
    scaled = states * weights[..., None].astype(states.dtype)
    old, new = (jnp.mean(a, axis=(-2, -1), keepdims=True, dtype=jnp.float32) for a in (states, scaled))
    ratio = jnp.where(new == 0, 1.0, old / jnp.where(new == 0, 1.0, new))
    return (scaled * ratio).astype(states.dtype)
