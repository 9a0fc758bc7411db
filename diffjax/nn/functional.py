"""A Flax NNX module as a pair of pure functions over a plain nested dict of arrays.

Nothing outside `diffjax.nn` and `diffjax.models` sees an NNX object: losses, samplers and optimisers get dicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import tree_flatten_with_path


class Fixed(nnx.Param):
    """A parameter that checkpoints carry and nobody trains, such as a table of positions: PyTorch calls it a buffer.

    It is used under `jax.lax.stop_gradient`; optimisers leave it as it is (`diffjax.core.types.Model.fixed`).
    """


class Functional(NamedTuple):
    """A module without its state.

    Attributes:
      init: `(key) -> params`, a nested dict of arrays with string keys, of the types in `shapes`; jittable.
      apply: `(params, *inputs, method=None, **settings) -> out`; `method` names another method of the module. Raises
        `ValueError` if the names or the shapes of `params` are not those of the module.
      shapes: the tree of `params` as `jax.ShapeDtypeStruct`.
      fixed: the names of those that are `Fixed`.
    """

    init: Callable[[jax.Array], dict]
    apply: Callable[..., Any]
    shapes: dict
    fixed: tuple[str, ...] = ()


class Stream(nnx.RngStream):
    """Flax's stream of keys with its count in Python: the same keys.

    Flax's own count is an array, and with it a network takes several times as long to trace.
    """

    def __init__(self, key: jax.Array, *, tag: str):
        super().__init__(key, tag=tag)
        self.drawn = 0

    def __call__(self) -> jax.Array:
        self.drawn += 1
        return jax.random.fold_in(self.key[...], self.drawn - 1)


def rngs_of(key: jax.Array) -> nnx.Rngs:
    """`nnx.Rngs(key)`, with a `Stream`."""
    rngs = nnx.Rngs(key)
    rngs.default = Stream(key, tag="default")
    return rngs


def functional(make: Callable[[nnx.Rngs], nnx.Module], param_dtype: Any = None) -> Functional:
    """The pure functions of the module that `make(rngs)` builds; `make` is only traced here, nothing is allocated.

    Args:
      make: builds the module.
      param_dtype: of what `init` returns, where that is of floating point; None for what the layers make, float32.

    Raises:
      ValueError: if the module holds anything but `nnx.Param` (random state, batch statistics): hidden state would
        be frozen into the functions.
    """

    def type_of(leaf):
        floating = param_dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating)
        return param_dtype if floating else leaf.dtype

    abstract = nnx.eval_shape(lambda: make(rngs_of(jax.random.key(0))))
    graph, abstract_params, rest = nnx.split(abstract, nnx.Param, ...)
    if jax.tree.leaves(rest):
        hidden = ", ".join(sorted(names_of(nnx.to_pure_dict(rest))))
        raise ValueError(
            f"module {type(abstract).__name__} holds state besides nnx.Param: {hidden}; "
            "pass keys and statistics as arguments of its call instead"
        )
    pure = nnx.to_pure_dict(abstract_params)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, type_of(leaf)), pure)
    fixed = tuple(name for name, leaf in names_of(abstract_params, nnx.Variable).items() if isinstance(leaf, Fixed))

    def init(key: jax.Array) -> dict:
        params = nnx.to_pure_dict(nnx.split(make(rngs_of(key)), nnx.Param, ...)[1])
        return jax.tree.map(lambda leaf: leaf.astype(type_of(leaf)), params)

    def apply(params: dict, *inputs, method: str | None = None, **settings):
        check_params(params, shapes)
        # Rules of differentiation take no arrays of numpy.
        module = nnx.merge(graph, jax.tree.map(jnp.asarray, params), rest)
        return (getattr(module, method) if method else module)(*inputs, **settings)

    return Functional(init, apply, shapes, fixed)


def names_of(tree, leaf: type | None = None) -> dict[str, Any]:
    """`{"a/b/c": leaf}` of a nested dict; instances of `leaf` are not looked into."""
    leaves, _ = tree_flatten_with_path(tree, is_leaf=leaf and (lambda node: isinstance(node, leaf)))
    return {"/".join(str(getattr(part, "key", part)) for part in path): leaf for path, leaf in leaves}


def numbered(layers: nnx.Dict) -> Iterator[tuple[str, nnx.Module]]:
    """The entries of a dictionary whose names are numbers, in the order of these numbers.

    Flax sorts names as text when it merges a module: "10" comes before "2" in the dictionary itself.
    """
    return ((name, layers[name]) for name in sorted(layers, key=int))


def nested(leaves: Mapping[str, Any]) -> dict:
    """The nested dict of `{"a/b/c": leaf}`, the inverse of `names_of`."""
    out: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        node = out
        for part in path:
            node = node.setdefault(part, {})
        node[last] = leaf
    return out


def check_params(params, shapes) -> None:
    """Raises `ValueError` unless `params` has exactly the names and shapes of `shapes`.

    `nnx.merge` matches leaves by order, so a renamed or reordered tree would otherwise load without complaint.
    """
    if jax.tree.structure(params) != jax.tree.structure(shapes):
        given, expected = names_of(params), names_of(shapes)
        missing, extra = expected.keys() - given.keys(), given.keys() - expected.keys()
        raise ValueError(
            f"params are not those of this network: missing {_some(missing)}, unexpected {_some(extra)}; "
            "pass what model.init returned, or a checkpoint of a network with the same settings"
        )
    wrong = [
        f"{name} {tuple(leaf.shape)} instead of {tuple(want.shape)}"
        for (name, want), leaf in zip(names_of(shapes).items(), jax.tree.leaves(params), strict=True)
        if tuple(leaf.shape) != tuple(want.shape)
    ]
    if wrong:
        raise ValueError(f"params have wrong shapes: {_some(wrong)}; were they saved with other settings?")


def _some(names) -> str:
    names, most = sorted(names), 4
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + rest
