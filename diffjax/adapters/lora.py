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

# Parameters whose first axis is that of the layers: `diffjax.nn.stack`, and the blocks of `diffjax.models.dit`.
STACKED = re.compile(r"(?:^|/)(\d+):(\d+)/|^blocks/(?=[a-z])")


class Pair(NamedTuple):
    """The two factors of the change of a kernel `[*layers, *window, C_in, C_out]`.

    Attributes:
      a: `[*layers, *window, C_in, rank]`, random at first.
      b: `[*layers, rank, C_out]`, zero at first.
    """

    a: jax.Array
    b: jax.Array


class Part(NamedTuple):
    """The rank and alpha of one layer; rank 0 for a layer that is not adapted."""

    rank: int
    alpha: float


@partial(jax.tree_util.register_dataclass, data_fields=["pairs"], meta_fields=["parts", "use_rslora"])
@dataclasses.dataclass(frozen=True)
class Adapter:
    """A pytree whose leaves are the factors; ranks and alphas are static.

    Attributes:
      pairs: by the name of the kernel, such as "transformer_blocks/0:12/attn1/to_q/kernel". Layers of one stack whose
        ranks differ are filled up with zeros, which stay zero under any optimiser that leaves what has no gradient.
      parts: `((name, (Part, ...)), ...)`, a part for each layer of the kernel.
      use_rslora: divide by the root of the rank (Kalajdzievski 2023, arXiv:2312.03732).
    """

    pairs: dict[str, Pair]
    parts: tuple[tuple[str, tuple[Part, ...]], ...]
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
    use_dora: bool = False,
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
      use_dora: not supported.

    Returns:
      An `Adapter` with float32 factors.

    Raises:
      ValueError: for a target that fits no kernel, a rank below 1, or DoRA.
    """
    if use_dora:
        raise ValueError("lora: use_dora=True: DoRA's magnitudes are not supported; leave it out")
    targets = [targets] if isinstance(targets, str) else list(targets)
    kernels = {name: tuple(leaf.shape) for name, leaf in names_of(params).items() if _is_kernel(name)}
    # By target, the layers that it fits: a target without any is a mistake.
    hits = {target: 0 for target in targets}
    chosen: dict[str, tuple[Part, ...]] = {}
    for name, shape in kernels.items():
        parts = []
        for layer in layers_of(name, shape):
            fits = [target for target in targets if re.search(target, name) or re.search(target, layer)]
            for target in fits:
                hits[target] += 1
            value = _of(ranks, (name, layer), rank) if fits else 0
            if fits and (type(value) is not int or value < 1):
                raise ValueError(f"lora: {layer}: rank={value!r}: expected a whole number above zero")
            default = value if alpha is None else alpha
            parts.append(Part(value, float(_of(alphas, (name, layer), default)) if fits else 0.0))
        if any(part.rank for part in parts):
            chosen[name] = tuple(parts)
    _check_hits(hits, kernels)
    keys = jax.random.split(key, len(chosen))
    given = zip(keys, chosen.items(), strict=True)
    pairs = {name: _fresh(k, stacked(name), kernels[name], parts) for k, (name, parts) in given}
    return Adapter(pairs, tuple(chosen.items()), use_rslora)


def _is_kernel(name):
    return name.rpartition("/")[2] == "kernel"


def _check_hits(hits, kernels):
    if not hits:
        raise ValueError("lora: no targets; expected regexes over the names of kernels, such as r'to_(q|k|v)/kernel$'")
    for target, count in hits.items():
        if not count:
            some = ", ".join(list(kernels)[:5])
            hint = nearest(target, kernels)
            raise ValueError(f"lora: target {target!r} fits no kernel; there are {some}, ...{hint}")


def _of(values, names, default):
    fits = (v for regex, v in (values or {}).items() if any(re.search(regex, name) for name in names))
    return next(fits, default)


def _fresh(key, stacked, shape, parts):
    stack, inner = (shape[:1], shape[1:]) if stacked else ((), shape)
    most = max(part.rank for part in parts)
    bound = 1 / math.sqrt(math.prod(inner[:-1]))
    a = jax.random.uniform(key, (*stack, *inner[:-1], most), jnp.float32, -bound, bound)
    kept = np.arange(most) < np.array([part.rank for part in parts])[:, None]
    kept = kept.reshape(*stack, *(1,) * (len(inner) - 1), most)
    return Pair(jnp.where(kept, a, 0.0), jnp.zeros((*stack, most, inner[-1]), jnp.float32))


def change(adapter: Adapter, name: str) -> jax.Array:
    """What the adapter adds to the kernel `name`, of the kernel's shape; float32 or wider."""
    pair, parts = adapter.pairs[name], dict(adapter.parts)[name]
    a, b = (widen(leaf) for leaf in pair)
    factors = np.array([_factor(part, adapter.use_rslora) for part in parts])
    factors = factors[:, None, None] if stacked(name) else factors[0]
    b = b * jnp.asarray(factors, b.dtype)
    # Between the layers and the rank: the window of a convolution.
    b = b.reshape(*b.shape[:-2], *(1,) * (a.ndim - b.ndim), *b.shape[-2:])
    # Accelerators round the inputs of products in float32, and this one is a parameter.
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _factor(part, use_rslora):
    return part.alpha / (math.sqrt(part.rank) if use_rslora else part.rank) if part.rank else 0.0


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
      ValueError: for an adapter of another network.
    """
    leaves = names_of(params)
    sums: dict[str, jax.Array] = {}
    for adapter, weight in adapters:
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


def fuse(params: dict, adapters: Iterable[tuple[Adapter, float]]) -> dict:
    """`apply`, to keep: the parameters with the adapters in them, which cost nothing any more."""
    return apply(params, adapters)


def unfuse(params: dict, adapters: Iterable[tuple[Adapter, float]]) -> dict:
    """The parameters before `fuse` with the same adapters, up to rounding.

    Not exact: a sum that was rounded is not undone by a subtraction. In float32 a weight is off by about 1e-7 of its
    and the change's size, in bfloat16 by 1/256. Keep the parameters if you need them again.
    """
    return apply(params, [(adapter, -weight) for adapter, weight in adapters])
