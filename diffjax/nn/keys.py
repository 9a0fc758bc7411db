"""Keys of random numbers that may be absent: without one a call draws nothing."""

from __future__ import annotations

from collections.abc import Sequence

import jax


def split_key(key: jax.Array | None, count: int = 2) -> Sequence[jax.Array | None] | jax.Array:
    """`count` keys from one, or as many None from None."""
    return (None,) * count if key is None else jax.random.split(key, count)


def fold_key(key: jax.Array | None, index: int | jax.Array) -> jax.Array | None:
    """The key of number `index`, or None from None."""
    return None if key is None else jax.random.fold_in(key, index)
