"""Where the parameters of a run lie on its mesh, and with them averages and optimiser states.

A jitted step whose inputs carry these shardings needs no other change: XLA inserts the communication.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffjax.registry import nearest
from diffjax.train import paths
from diffjax.train.parallel.mesh import (
    AXES,
    batch_axes,
    batch_groups,
    batch_sharding,
    make_mesh,
    parse_mesh,
    place,
    place_batch,
    replicated,
)

__all__ = [
    "MODES",
    "batch_sharding",
    "make_mesh",
    "param_sharding",
    "parse_mesh",
    "place",
    "place_batch",
    "replicated",
    "state_sharding",
]

log = logging.getLogger(__name__)

Rules = Sequence[tuple[str, Sequence]]
MODES = ("data", "fsdp", "rules", "pmap")


def param_sharding(mesh: Mesh, params: Any, rules: Rules = (), mode: str = "data") -> Any:
    """A tree of `NamedSharding` like `params`.

    Args:
      mesh: as from `make_mesh`.
      params: arrays or `jax.ShapeDtypeStruct`.
      rules: for the mode `"rules"`: `[(regex over "a/b/c" names, axes), ...]` with a mesh axis name, a tuple of names
        or None per array axis (None for those left out). The first rule that matches wins and every parameter must be
        covered. Of the axes `data`, `fsdp`, `tensor`, `sequence` those that the mesh lacks count as 1. Mesh axes that
        do not divide their array axis are dropped there, and that is logged.
      mode: `"data"` and `"pmap"` put a copy on every device; `"fsdp"` splits the largest axis of each parameter that
        divides over all axes that split the batch (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3), and copies
        parameters that have none; `"rules"`.

    Raises:
      ValueError: for an unknown mode or mesh axis, an uncovered parameter, or more axes than the parameter has.
    """
    leaves = paths.named_leaves(params)
    if mode not in MODES:
        raise ValueError(f"unknown sharding {mode!r}; known: {', '.join(MODES)}{nearest(mode, MODES)}")
    if mode == "rules":
        axes = paths.match(rules, leaves, "sharding")
    else:
        axes = {n: _largest(leaf.shape, mesh) if mode == "fsdp" else () for n, leaf in leaves.items()}
    table = {n: NamedSharding(mesh, spec_of(n, leaf.shape, axes[n], mesh)) for n, leaf in leaves.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: table[paths.name(path)], params)


def state_sharding(mesh: Mesh, state: Any, rules: Rules = (), mode: str = "data") -> Any:
    """A tree of `NamedSharding` like `state`, in which averages and optimiser moments lie where their parameter does.

    A leaf of `state` follows the parameter whose name ends the leaf's own (`ema/.../a/b` and `opt_state/0/mu/a/b`
    follow `a/b`) if the shapes agree, the longest such name first. If the leaf lacks one axis of that parameter, as a
    factored second moment does, and it is clear which, it follows on the others. Every other leaf, such as a step
    count, is copied.

    Args:
      mesh: as from `make_mesh`.
      state: a pytree with a field `params`, whose names the rules speak of; arrays or `jax.ShapeDtypeStruct`.
      rules, mode: as `param_sharding`.

    Raises:
      ValueError: as `param_sharding`.
    """
    params = state.params
    tree = param_sharding(mesh, params, rules, mode)
    table = {
        paths.components(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True
        )
    }

    def follow(path, leaf):
        parts = paths.components(path)
        known = [table[parts[i:]] for i in range(len(parts)) if parts[i:] in table]
        same = [sharding for shape, sharding in known if shape == leaf.shape]
        spec = (
            same[0] if same else next(filter(None, (_without_axis(mesh, leaf.shape, *found) for found in known)), None)
        )
        return spec or replicated(mesh)

    return jax.tree_util.tree_map_with_path(follow, state)


def spec_of(name: str, shape: Sequence[int], axes: Sequence, mesh: Mesh) -> PartitionSpec:
    """The axes of a rule for an array of `shape`, without those that the mesh lacks or that do not divide.

    Raises:
      ValueError: for a name that is no axis, or more axes than the array has.
    """
    if len(axes) > len(shape):
        raise ValueError(f"sharding rule for {name!r} has {len(axes)} axes {tuple(axes)}, its shape is {shape}")
    spec = []
    for size, entry in zip(shape, axes, strict=False):
        group = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for axis in group:
            if axis not in mesh.shape and axis not in AXES:
                hint = nearest(axis, mesh.axis_names)
                raise ValueError(f"{name!r}: unknown mesh axis {axis!r}; known: {', '.join(mesh.axis_names)}{hint}")
        group = wanted = tuple(axis for axis in group if axis in mesh.shape)
        while size % math.prod(mesh.shape[axis] for axis in group):
            group = group[:-1]
        if group != wanted:
            log.info("%s %s: axis of size %d is split over %s, not %s", name, tuple(shape), size, group, wanted)
        spec.append(group or None)
    return PartitionSpec(*spec)


def _largest(shape: tuple[int, ...], mesh: Mesh) -> tuple:
    """All batch axes on the largest array axis that their product divides, the last of equals, or on none."""
    fits = [i for i, size in enumerate(shape) if size and size % batch_groups(mesh.shape) == 0]
    if not fits:
        return ()
    best = max(fits, key=lambda i: (shape[i], i))
    return (None,) * best + (batch_axes(mesh),)


def _without_axis(mesh, shape, full, sharding):
    """For an array of `shape`, if that is `full` without one axis, the `sharding` of `full` without it; else None."""
    spec = (*sharding.spec, *(None,) * (len(full) - len(sharding.spec)))
    gone = [i for i in range(len(full)) if (*full[:i], *full[i + 1 :]) == tuple(shape)]
    # Of a square matrix nothing says whether these are its rows or its columns.
    if len(full) == 1 or len(gone) != 1:
        return None
    return NamedSharding(mesh, PartitionSpec(*spec[: gone[0]], *spec[gone[0] + 1 :]))
