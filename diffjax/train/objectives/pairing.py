"""Which noise goes with which image of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffjax.core.assignment import assign
from diffjax.core.types import Array

Pairing = Callable[[Array, Array], Array]


def ot(group: int = 0) -> Pairing:
    """`(x0 [B, ...], eps [B, ...]) -> eps` in the order that minimises the sum of `|x0 - eps|^2`, exactly.

    Pooladian et al. 2023, arXiv:2304.14772, section 4; Tong et al. 2024, arXiv:2302.00482, section 3.2. Both marginals
    of the batch stay what they are, the pairs become dependent.

    Args:
      group: rows of one assignment, which must divide the batch; 0 is the whole batch. Groups are neighbouring rows,
        assigned side by side, so the time grows with `group` and not with the batch.

    Raises:
      ValueError: for a negative group; in use, for one that does not divide the batch.
    """
    if not isinstance(group, int) or group < 0:
        raise ValueError(f"ot: group={group!r}: expected a number of rows, or 0 for the whole batch")

    def pair(x0, eps):
        rows = group or len(x0)
        if len(x0) % rows:
            raise ValueError(f"ot: group={group} does not divide the batch of {len(x0)}")

        def one(x0, eps):
            # |x0 - eps|^2 without the terms that no permutation changes.
            product = jnp.matmul(x0, eps.T, precision=jax.lax.Precision.HIGHEST)
            return eps[assign(-product)]

        grouped = lambda a: a.reshape(-1, rows, math.prod(a.shape[1:]))
        return jax.vmap(one)(grouped(x0.astype(eps.dtype)), grouped(eps)).reshape(eps.shape)

    return pair


PAIRINGS = {"ot": ot}
