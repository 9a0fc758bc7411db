"""Textual inversion: new words, learned as further rows of a text encoder's table of tokens.

Gal et al. 2022, "An Image is Worth One Word", arXiv:2208.01618. What is learned is `{token: rows [n, width]}`, a pytree
by itself; `add` puts it behind the table and is differentiable, so that a gradient for it leaves the encoder alone:

    rows = init(params, "<cat>", like=2368)
    larger = from_config(extended(encoder.config, 1))
    gradients = jax.grad(lambda rows: objective(larger, add(params, rows)[0]))(rows)

A token with several vectors is written as that many words, `<cat> <cat>_1 <cat>_2`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffjax.nn.functional import names_of

# The table of CLIP, and those of T5, BERT and language models.
TABLE = r"(^|/)(token_embedding|shared|word_embeddings|embed_tokens|wte)/embedding$"


def table_of(params: Any, table: str = TABLE) -> str:
    """The name of the one parameter `[count, width]` that the regex `table` finds.

    Raises:
      ValueError: if it finds none or several.
    """
    found = [name for name in names_of(params) if re.search(table, name)]
    if len(found) != 1:
        told = ", ".join(found) if found else "none, among " + ", ".join(list(names_of(params))[:5]) + ", ..."
        raise ValueError(f"textual inversion: {table!r} is to find one table of tokens; it finds {told}")
    return found[0]


def words(token: str, count: int) -> list[str]:
    """What a token with `count` vectors is called in a vocabulary: `<cat>`, `<cat>_1`, `<cat>_2`, ..."""
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def init(params: Any, token: str, *, like: int, count: int = 1, table: str = TABLE) -> dict[str, jax.Array]:
    """New rows for a token, all equal to that of the id `like`, a word near to what is to be learned (section 4).

    Returns:
      `{token: [count, width]}`.

    Raises:
      ValueError: for an id that the table does not have.
    """
    rows = names_of(params)[table_of(params, table)]
    if not 0 <= like < len(rows) or count < 1:
        raise ValueError(f"textual inversion: like={like}, count={count}: the table has {len(rows)} rows")
    return {token: jnp.broadcast_to(jnp.asarray(rows)[like], (count, rows.shape[1]))}


def add(
    params: dict, rows: Mapping[str, jax.Array], *, table: str = TABLE, vocabulary: Collection[str] = ()
) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """The parameters of an encoder with new tokens.

    Args:
      params: of a text encoder; they are not changed.
      rows: `{token: [n, width] or [width]}`, put behind the table in this order.
      table: see `table_of`.
      vocabulary: words that there are already.

    Returns:
      A tree like `params` with a table `[count + new, width]` of its own dtype, for the network whose config is
      `extended`; and the ids of each token's vectors, `{token: (count, count + 1, ...)}`.

    Raises:
      ValueError: for rows of another width, or a word that there is already.

    The ids lie above that of the end of a text. An encoder that finds the end as the largest id, as CLIP's does whose
    config has `eos_token_id=2`, pools a new token in its place; the states of all tokens are as they should be.
    """
    name, leaves = table_of(params, table), names_of(params)
    old = jnp.asarray(leaves[name])
    ids: dict[str, tuple[int, ...]] = {}
    parts, count, seen = [old], len(old), set(vocabulary)
    for token, given in rows.items():
        part = jnp.atleast_2d(given)
        if part.ndim != 2 or part.shape[1] != old.shape[1]:
            raise ValueError(
                f"textual inversion: {token!r} has shape {jnp.shape(given)}; the table's rows have {old.shape[1]}"
            )
        for word in words(token, len(part)):
            if word in seen:
                raise ValueError(f"textual inversion: {word!r} is in the vocabulary already; choose another name")
            seen.add(word)
        ids[token] = tuple(range(count, count + len(part)))
        parts.append(part.astype(old.dtype))
        count += len(part)
    leaves[name] = jnp.concatenate(parts)
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values()), ids


def extended(config: Mapping[str, Any], new: int) -> dict[str, Any]:
    """The config of an encoder with `new` more tokens, for `diffjax.models.from_config`.

    Raises:
      ValueError: for a config without `vocab_size`.
    """
    if "vocab_size" not in config:
        told = f"a config with {', '.join(config)} has no vocab_size; give it, the number of rows of the table"
        raise ValueError(f"textual inversion: {told}")
    return {**config, "vocab_size": config["vocab_size"] + new}


def restrict(gradients: dict, first: int, *, table: str = TABLE) -> dict:
    """Gradients of all parameters of an encoder, zero but for the rows of the table from `first` on.

    For optimisers that hold the whole tree. One that changes what has no gradient, such as by weight decay, is to be
    masked as well; it is simpler to differentiate for the rows themselves.
    """
    name = table_of(gradients, table)
    kept = {key: jnp.zeros_like(leaf) for key, leaf in names_of(gradients).items()}
    kept[name] = names_of(gradients)[name].at[:first].set(0)
    return jax.tree.unflatten(jax.tree.structure(gradients), kept.values())
