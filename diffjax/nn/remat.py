"""Which activations are kept for the backward pass, and which are computed again.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable

import jax


def _products(primitive, *_, **__) -> bool:
    return primitive.name in ("dot_general", "conv_general_dilated")


def _products_of_weights(primitive, *_, **params) -> bool:
    if primitive.name == "dot_general":
        (_, _), (left, right) = params["dimension_numbers"]
        return not left and not right
    return primitive.name == "conv_general_dilated"


# What is kept: everything; the block's input; also the results of products; of those with weights only, so not the
# [tokens, tokens] matrices of attention.
POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _products,
    "dots_no_batch": _products_of_weights,
}


def policy_name(remat: str | bool) -> str:
    """The name of a policy; `True` is `"full"` and `False` is `"none"`."""
    return {True: "full", False: "none"}[remat] if isinstance(remat, bool) else remat


def remat(block: Callable, policy: str, *, scanned: bool = False) -> Callable:
    """`block` with the activations that `policy` (one of `POLICIES`) does not keep computed again when they are needed.

    Args:
      block: a function of arrays.
      policy: `"none"` keeps all; `"full"` none but the inputs of `block`; `"dots"` the results of matrix products and
        convolutions; `"dots_no_batch"` those of products with weights only.
      scanned: whether `block` is the body of a `lax.scan`, across which nothing can be merged.
    """
    if policy == "none":
        return block
    return jax.checkpoint(block, policy=POLICIES[policy], prevent_cse=not scanned)
