"""How a network is computed, and layers of one shape that are run one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn.functional import rngs_of
from diffjax.nn.remat import remat


class Compute(NamedTuple):
    """How a network is computed, whatever it computes.

    Attributes:
      dtype: of the activations; parameters are cast to it where they are used, norms and softmax are float32 at least.
      attention: one of `diffjax.nn.IMPLEMENTATIONS`.
      scan: whether layers of one shape run in a `lax.scan`, which compiles in a time that does not grow with the depth.
      remat: one of `diffjax.nn.POLICIES`, for each layer.
    """

    dtype: Any = jnp.float32
    attention: str = "xla"
    scan: bool = True
    remat: str = "none"


def stack(make: Callable[[nnx.Rngs], nnx.Module], *bounds: int, rngs: nnx.Rngs) -> nnx.Dict:
    """Layers of one shape with their parameters stacked, as `{"0:12": layers}` for the layers 0 to 11.

    The name tells what the first axis of each parameter inside stands for; checkpoints have one entry for each layer.

    Args:
      make: builds one layer; it is mapped over keys.
      bounds: the first layer of each part and the end of the last, such as `0, 12`, or `0, 4, 12` for layers that lie
        in two parts, between which something else happens. Parts without layers are left out.
    """
    parts = {}
    for first, last in zip(bounds, bounds[1:], strict=False):
        if last > first:
            keys = jax.random.split(rngs.params(), last - first)
            parts[f"{first}:{last}"] = jax.vmap(lambda key: make(rngs_of(key)))(keys)
    return nnx.Dict(parts)


def parts_of(layers: nnx.Dict) -> Iterator[tuple[int, int, nnx.Module]]:
    """The parts of a `stack` in order: the first layer, how many, and the layers themselves."""
    bounds = ((*map(int, name.split(":")), part) for name, part in layers.items())
    for first, last, part in sorted(bounds, key=lambda bound: bound[0]):
        yield first, last - first, part


def run_stack(layers: nnx.Dict, body: Callable, x: Any, compute: Compute) -> tuple[Any, Any]:
    """Runs the layers of a `stack` one after another.

    Args:
      layers: as from `stack`.
      body: `(layer, x, index) -> (x, out)`, what one layer does; the index is traced.
      x: what is carried from layer to layer, of the same shapes and dtypes; any pytree.
      compute: whether the layers are scanned over, and what is kept for the backward pass.

    Returns:
      The last `x` and the `out` of all layers, stacked along a new first axis; None for that without layers.
    """
    outs = []

    def once(x, given):
        layer, index = given
        return body(layer, x, index)

    once = remat(once, compute.remat, scanned=compute.scan)
    for first, count, part in parts_of(layers):
        indices = jnp.arange(first, first + count)
        if compute.scan:
            x, out = jax.lax.scan(once, x, (part, indices))
            outs.append(out)
            continue
        # The gradient of a split is one concatenation; those of slices would be padded to the whole and added.
        leaves, tree = jax.tree.flatten(part)
        split = [jax.lax.split(leaf, (1,) * count) for leaf in leaves]
        for i in range(count):
            layer = jax.tree.unflatten(tree, [pieces[i][0] for pieces in split])
            x, out = once(x, (layer, indices[i]))
            outs.append(jax.tree.map(lambda a: a[None], out))
    if not outs:
        return x, None
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts) if len(parts) > 1 else parts[0], *outs)
