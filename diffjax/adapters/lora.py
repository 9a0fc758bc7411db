"""Low-rank adaptation: a product of two thin matrices that is added to a kernel, W + weight (alpha / rank) A B.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685. It is a function from parameters
to parameters, so every network takes it as it is:

    adapter = lora.init(key, params, [r"to_(q|k|v)/kernel$"], rank=8)

    def loss(adapter, params):
        return objective(model.apply(lora.apply(params, [(adapter, 1.0)]), x, t))

    gradients = jax.grad(loss)(adapter, params)

The product with the kernel's input is not computed by itself, so there is no dropout in front of A: the kernel does not
know its input.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.nn.functional import names_of
from diffjax.nn.norm import widen
from diffjax.registry import nearest

# Parameters whose first axis is that of the layers: those of `diffjax.nn.stack` and of `diffjax.models.dit`. Those of
# `diffjax.models.mlp` are `blocks/block0`, each by itself.
STACKED = re.compile(r"(?:^|/)(\d+):(\d+)/|^blocks/(?=(?:attention|mlp|modulation)/)")


class Pair(NamedTuple):
    """The two factors of the change of a kernel `[*layers, *window, C_in, C_out]`.

    Attributes:
      a: `[*layers, *window, C_in, rank]`, random at first.
      b: `[*layers, rank, C_out]`, zero at first.
    """

    a: jax.Array
    b: jax.Array


class Layer(NamedTuple):
    """The rank and alpha of one layer; rank 0 for a layer that is not adapted."""

    rank: int
    alpha: float


@partial(jax.tree_util.register_dataclass, data_fields=["pairs"], meta_fields=["layers", "use_rslora"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A pytree whose leaves are the factors; ranks and alphas are static.

    Attributes:
      pairs: by the name of the kernel, such as "transformer_blocks/0:12/attn1/to_q/kernel". Layers of one stack whose
        ranks differ are filled up with zeros, which stay zero under any optimiser that leaves what has no gradient.
      layers: `((name, (Layer, ...)), ...)`, one for each layer of the kernel.
      use_rslora: divide by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732).
    """

    pairs: dict[str, Pair]
    layers: tuple[tuple[str, tuple[Layer, ...]], ...]
    use_rslora: bool = False


def stacked(name: str) -> bool:
    """Whether the first axis of this parameter is that of layers."""
    return STACKED.search(name) is not None


def layers_of(name: str, shape: tuple[int, ...]) -> list[str]:
    """The name of a kernel layer by layer: "a/0:2/kernel" is ["a/0/kernel", "a/1/kernel"]; others are their own."""
    match = STACKED.search(name)
    if match is None:
        return [name]
    first = int(match[1] or 0)
    head, tail = (name[: match.start(1)], name[match.end(2) :]) if match[1] else ("blocks/", f"/{name[match.end() :]}")
    return [f"{head}{first + i}{tail}" for i in range(shape[0])]


def init(
    key: jax.Array, params: Any, targets: Iterable[str], rank: int, alpha: float | None = None, *,
    ranks: Mapping[str, int] | None = None, alphas: Mapping[str, float] | None = None, use_rslora: bool = False,
) -> Adapter:  # fmt: skip
    """A new adapter, which changes nothing yet: A is uniform within 1 / sqrt(inputs), as in peft, B is zero.

    Args:
      key: consumed.
      params: of the network, or their shapes (`jax.eval_shape(model.init, key)`).
      targets: regexes, searched for in names such as "transformer_blocks/0:12/attn1/to_q/kernel", and for layers that
        are stacked in "transformer_blocks/7/attn1/to_q/kernel" as well, so that single ones can be chosen.
      rank, alpha: of all kernels; alpha None for the rank, which makes the factor 1.
      ranks, alphas: `{regex: value}` for kernels that have others; the first that fits counts.
      use_rslora: the factor is `alpha / sqrt(rank)`.

    Returns:
      An `Adapter` with float32 factors.

    Raises:
      ValueError: for a target that fits no kernel or is no regex, or a rank below 1.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    leaves = names_of(params).items()
    kernels = {name: tuple(leaf.shape) for name, leaf in leaves if name.rpartition("/")[2] == "kernel"}
    names = {name: layers_of(name, shape) for name, shape in kernels.items()}
    _check_regexes(*targets, *(ranks or ()), *(alphas or ()))
    _check_targets(targets, names)
    chosen = {}
    for name, layers in names.items():
        found = tuple(_layer(targets, (name, layer), (rank, ranks), (alpha, alphas)) for layer in layers)
        if any(layer.rank for layer in found):
            chosen[name] = found
    keys = jax.random.split(key, len(chosen))
    given = zip(keys, chosen.items(), strict=True)
    pairs = {name: _fresh(k, stacked(name), kernels[name], layers) for k, (name, layers) in given}
    return Adapter(pairs, tuple(chosen.items()), use_rslora)


def _check_regexes(*regexes):
    """Raises `ValueError` for what is no regular expression."""
    for regex in regexes:
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"lora: {regex!r} is no regular expression: {error}") from None


def _check_targets(targets, names):
    """Raises `ValueError` for no target, and for one that fits no layer, which is a mistake."""
    if not targets:
        raise ValueError("lora: no targets; expected regexes over the names of kernels, such as r'to_(q|k|v)/kernel$'")
    for target in targets:
        if not any(re.search(target, text) for name, layers in names.items() for text in (name, *layers)):
            known = f"there are {', '.join(list(names)[:5])}, ..." if names else "this network has none"
            raise ValueError(f"lora: target {target!r} fits no kernel; {known}{nearest(target, names)}")


def _layer(targets, names, ranks, alphas):
    """Rank and alpha of the layer with these names; `ranks` and `alphas` are `(default, {regex: value})`."""
    if not any(re.search(target, name) for target in targets for name in names):
        return Layer(0, 0.0)
    rank = _first(ranks[1], names, ranks[0])
    if type(rank) is not int or rank < 1:
        raise ValueError(f"lora: {names[-1]}: rank={rank!r}: expected a whole number above zero")
    return Layer(rank, float(_first(alphas[1], names, rank if alphas[0] is None else alphas[0])))


def _first(values, names, default):
    fits = (value for regex, value in (values or {}).items() if any(re.search(regex, name) for name in names))
    return next(fits, default)


def _fresh(key, stacked, shape, layers):
    stack, inner = (shape[:1], shape[1:]) if stacked else ((), shape)
    most = max(layer.rank for layer in layers)
    bound = 1 / math.sqrt(math.prod(inner[:-1]))
    a = jax.random.uniform(key, (*stack, *inner[:-1], most), jnp.float32, -bound, bound)
    kept = np.arange(most) < np.array([layer.rank for layer in layers])[:, None]
    kept = kept.reshape(*stack, *(1,) * (len(inner) - 1), most)
    return Pair(jnp.where(kept, a, 0.0), jnp.zeros((*stack, most, inner[-1]), jnp.float32))


def change(adapter: Adapter, name: str) -> jax.Array:
    """What the adapter adds to the kernel `name`, of the kernel's shape; float32 or wider."""
    pair, layers = adapter.pairs[name], dict(adapter.layers)[name]
    a, b = (widen(leaf) for leaf in pair)
    factors = np.array([_factor(layer, adapter.use_rslora) for layer in layers])
    factors = factors[:, None, None] if stacked(name) else factors[0]
    b = b * jnp.asarray(factors, b.dtype)
    # Between the layers and the rank: the window of a convolution.
    b = b.reshape(*b.shape[:-2], *(1,) * (a.ndim - b.ndim), *b.shape[-2:])
    # Accelerators round the inputs of products in float32, and this one is a parameter.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _factor(layer, use_rslora):
    return layer.alpha / (math.sqrt(layer.rank) if use_rslora else layer.rank) if layer.rank else 0.0


def apply(params: dict, adapters: Iterable[tuple[Adapter, float | jax.Array]]) -> dict:
    """The parameters of the network with adapters: W + sum of weight * change.

    Args:
      params: of the network; they are not changed.
      adapters: `(adapter, weight)`; weights are numbers or scalars, which may be traced.

    Returns:
      A tree like `params`. Sums are of float32 at least and have the kernel's own type in the end, so that in bfloat16
      a change below 1/256 of a weight is lost, as it is in a network that has been fused. New adapters (B zero) and
      weights of zero change no value. Differentiable; inside `jit` the sums live as long as they are needed.

    Raises:
      ValueError: for an adapter of another network, or one without a weight.
    """
    leaves = names_of(params)
    sums: dict[str, jax.Array] = {}
    for adapter, weight in _weighted(adapters):
        for name in adapter.pairs:
            added = weight * change(adapter, name)
            if name not in leaves or added.shape != leaves[name].shape:
                found = f"it is {tuple(leaves[name].shape)}" if name in leaves else "there is none of this name"
                raise ValueError(f"lora: the adapter is for a kernel {name} {tuple(added.shape)}; {found}")
            sums[name] = sums[name] + added if name in sums else added
    for name, added in sums.items():
        kernel = jnp.asarray(leaves[name])
        leaves[name] = (kernel + added).astype(kernel.dtype)
    return jax.tree.unflatten(jax.tree.structure(params), leaves.values())


def _weighted(adapters) -> list[tuple[Adapter, Any]]:
    """The pairs of adapters and weights; raises `ValueError` for what is none, such as an adapter alone."""
    pairs = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], Adapter)):
            raise ValueError(f"lora: expected pairs (adapter, weight), [(adapter, 1.0)], not {type(pair).__name__}")
    return pairs


def fuse(params: dict, adapters: Iterable[tuple[Adapter, float]]) -> dict:
    """`apply`, to keep: the parameters with the adapters in them, which cost nothing any more."""
    return apply(params, adapters)


def unfuse(params: dict, adapters: Iterable[tuple[Adapter, float]]) -> dict:
    """The parameters before `fuse` with the same adapters, up to rounding.

    Not exact: a sum that was rounded is not undone by a subtraction. In float32 a weight is off by about 1e-7 of its
    and the change's size, in bfloat16 by 1/256. Keep the parameters if you need them again.
    """
    return apply(params, [(adapter, -weight) for adapter, weight in _weighted(adapters)])
