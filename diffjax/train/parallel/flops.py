"""Floating-point operations of a function, counted in its jaxpr.

2 per multiply and add of matrix products and convolutions, as in the accelerators' peaks; elementwise work is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.extend.core import jaxprs_in_params


class Flops(NamedTuple):
    """Operations of one training step over the whole batch, on all devices together; with self-conditioning the mean
    over steps with and without an estimate.

    Attributes:
      model: what the mathematics takes: the forward pass and the gradients. MFU is made of this one (Chowdhery et al.
        2022, arXiv:2204.02311, appendix B).
      hardware: what is computed, with what rematerialisation repeats.
    """

    model: float
    hardware: float


def step_flops(config, parts, jaxpr=None) -> Flops:
    """`Flops` of one training step of a filled config and its parts; the step is only traced, and not even that if its
    closed `jaxpr`, for any mesh, is given and the network rematerialises nothing."""
    from diffjax.train.objectives import network_of
    from diffjax.train.setup import abstract_batch
    from diffjax.train.state import abstract_state
    from diffjax.train.step import make_train_step

    inputs, share = (abstract_state(parts), abstract_batch(config, parts)), parts.objective.self_condition or 1.0
    count = lambda parts: count_flops(make_train_step(parts, config), *inputs, share=share)
    hardware = count(parts) if jaxpr is None else flops(jaxpr.jaxpr, share)
    settings = dict(config.model)
    if not remat_of(settings):
        return Flops(hardware, hardware)
    kept = settings | {"remat": False if isinstance(settings["remat"], bool) else "none"}
    facts = dict(shape=parts.dataset.shape, num_classes=parts.dataset.num_classes)
    plain = network_of(parts.objective, kept, **facts)
    return Flops(count(parts._replace(model=plain)), hardware)


def remat_of(settings: dict):
    """The rematerialisation that a network's settings ask for; something false for none."""
    remat = settings.get("remat")
    return None if remat in ("none", "") else remat


def count_flops(f: Callable, *args, share: float = 1.0) -> float:
    """Operations of `f(*args)`; arguments may be `jax.ShapeDtypeStruct`, nothing is computed. `share` as in `flops`."""
    return flops(jax.make_jaxpr(f)(*args).jaxpr, share)


def flops(jaxpr, share: float = 1.0) -> float:
    """Operations of a jaxpr.

    Scans count once per iteration, loops of unknown length one iteration, the body of a `shard_map` once per device.
    XLA's own `cost_analysis` counts the body of a scan once.

    Args:
      jaxpr: as in `jax.make_jaxpr(f)(*args).jaxpr`.
      share: how often a conditional takes its dearest branch; else it takes its cheapest.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / features
        elif name.startswith("dot_product_attention"):
            total += _fused_attention(eqn, backward="_bwd" in name)
        elif name == "cond":
            costs = [flops(branch.jaxpr, share) for branch in eqn.params["branches"]]
            total += share * max(costs) + (1 - share) * min(costs)
        else:
            total += _times(eqn) * sum(flops(sub, share) for sub in jaxprs_in_params(eqn.params))
    return total


def _times(eqn) -> int:
    """How often the jaxprs inside an equation run."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        shape, manual = eqn.params["mesh"].shape, eqn.params.get("manual_axes")
        return math.prod(size for axis, size in shape.items() if manual is None or axis in manual)
    return 1


def _fused_attention(eqn, *, backward: bool) -> float:
    """cuDNN's attention on `[B, T, N, H]` (layout 0) or `[B, N, T, H]`: two products, and four in the backward pass
    (what it recomputes of the forward pass is left out)."""
    query, key = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    keys = key[1] if eqn.params["layout"] in (0, "BTNH") else key[2]
    return (8.0 if backward else 4.0) * math.prod(query) * keys
