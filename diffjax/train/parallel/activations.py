"""Where activations lie while a step runs: a network's rules over the names that it gives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from diffjax.nn import tapped
from diffjax.train.parallel.mesh import batch_axes
from diffjax.train.parallel.sharding import spec_of

BATCH = "batch"


def constraint(mesh: Mesh, rules: Sequence[tuple[str, Sequence]]) -> Callable[[str, jax.Array], jax.Array]:
    """`(name, x) -> x` for `diffjax.nn.tapped`, which pins the activations that the rules name to the mesh.

    Args:
      mesh: as from `make_mesh`.
      rules: `[(regex over names, axes), ...]`, the first that matches wins; axes as for parameters, with `"batch"` for
        all axes that split the batch. Array axes that a rule leaves out are not split. Activations without a rule lie
        where XLA puts them.

    Raises:
      ValueError: from the function, if `sequence` does not divide the tokens: every device would then work on all.
    """
    compiled = [(re.compile(regex), tuple(axes)) for regex, axes in rules]

    def constrain(name, x):
        axes = next((axes for regex, axes in compiled if regex.search(name)), None)
        if axes is None:
            return x
        for size, axis in zip(x.shape, axes, strict=False):
            if axis == "sequence" and size % mesh.shape.get(axis, 1):
                raise ValueError(
                    f"{size} tokens in {name!r} do not divide over {mesh.shape[axis]} devices along 'sequence'; "
                    "choose a sequence axis that divides them"
                )
        spec = spec_of(name, x.shape, [batch_axes(mesh) if axis == BATCH else axis for axis in axes], mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    return constrain


def constrained(function: Callable, mesh: Mesh, rules: Sequence[tuple[str, Sequence]]) -> Callable:
    """`function` with the activations of the networks in it pinned to the mesh; itself for a mesh of one device."""
    if mesh.size == 1:
        return function

    def with_constraints(*args):
        with tapped(constraint(mesh, rules)):
            return function(*args)

    return with_constraints


def named_axes(rules: Sequence[tuple[str, Sequence]]) -> set[str]:
    """All axis names in a rule list, of parameters or activations."""
    groups = [(axis,) if isinstance(axis, str) else tuple(axis or ()) for _, axes in rules for axis in axes]
    return {axis for group in groups for axis in group}
