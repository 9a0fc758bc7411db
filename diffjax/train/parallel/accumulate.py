"""The gradient of a batch: at once, or in microbatches that need less memory and give the same.

A row loss is `loss_fn(params, rows, key) -> (losses [b], aux)`: `rows` is a pytree of arrays `[b, ...]`, in which all
that is random was drawn before, for the whole batch; `key` is for dropout alone; every leaf of `aux` is `[b, ...]` too.
So a part of the rows has the losses that it has within the batch, whoever computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LOOPS = ("auto", "scan", "unroll")

RowLoss = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]]
# (params, rows, key) -> (losses [b], aux, gradient of the mean loss)
Gradient = Callable[[Any, Any, jax.Array], tuple[jax.Array, Any, Any]]


def whole(loss_fn: RowLoss) -> Gradient:
    """The gradient over all rows at once: `(params, rows, key) -> (losses [b], aux, grads of their mean)`."""

    def mean(params, rows, key):
        losses, aux = loss_fn(params, rows, key)
        return jnp.mean(losses), (losses, aux)

    def gradient(params, rows, key):
        (_, (losses, aux)), grads = jax.value_and_grad(mean, has_aux=True)(params, rows, key)
        return losses, aux, grads

    return gradient


def microbatches(
    loss_fn: RowLoss,
    *,
    rows: int,
    groups: int = 1,
    loop: str = "auto",
    place: Callable[[Any], Any] = lambda rows: rows,
    place_grads: Callable[[Any], Any] = lambda grads: grads,
) -> Gradient:
    """`whole(loss_fn)` computed from a part of the rows at a time; equal to it up to the order of the sums.

    Dropout draws from `fold_in(key, i)` in the i-th part, so with dropout the masks, not their law, depend on `rows`.

    Args:
      loss_fn: a row loss.
      rows: how many rows each group works on at once, 0 for all of them; must divide its share of the batch.
      groups: into how many contiguous parts the batch is split over devices. Every group takes its own rows in order,
        so none of them moves to another device.
      loop: `"scan"` compiles one part whatever their number; `"unroll"` repeats it; `"auto"` unrolls on the CPU, whose
        compiler makes gradients of convolutions 10 to 60 times slower inside a loop, and scans elsewhere.
      place: keeps the rows of each part, `[groups * rows, ...]`, split over the groups.
      place_grads: keeps the gradient of each part where the parameters lie.

    Raises:
      ValueError: for an unknown loop, and from the gradient if the rows do not divide.
    """
    if loop not in LOOPS:
        raise ValueError(f"unknown accumulate_loop {loop!r}; known: {', '.join(LOOPS)}")
    at_once = whole(loss_fn)

    def gradient(params, part, key):
        losses, aux, grads = at_once(params, place(part), key)
        return losses, aux, place_grads(grads)

    if not rows:
        return gradient

    def accumulated(params, batch, key):
        total = len(jax.tree.leaves(batch)[0])
        if total % (rows * groups):
            raise ValueError(f"{total} rows do not divide into {groups} groups' microbatches of {rows} rows")
        n = total // (rows * groups)
        if n == 1:
            return gradient(params, batch, key)
        parts = jax.tree.map(lambda a: _deal(a, n, groups), batch)

        def add(grads, part_and_index):
            part, i = part_and_index
            losses, aux, new = gradient(params, part, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, grads, new), (losses, aux)

        grads, (losses, aux) = _loop(add, jax.tree.map(jnp.zeros_like, params), parts, n=n, loop=loop)
        back = jax.tree.map(lambda a: _collect(a, groups), (losses, aux))
        return *back, jax.tree.map(lambda g: g / n, grads)

    return accumulated


def _loop(body, carry, parts, *, n: int, loop: str):
    if loop == "scan" or (loop == "auto" and jax.default_backend() != "cpu"):
        return jax.lax.scan(body, carry, (parts, jnp.arange(n)))
    found = []
    for i in range(n):
        carry, out = body(carry, (jax.tree.map(lambda a, i=i: a[i], parts), i))
        found.append(out)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)


def _deal(a: jax.Array, n: int, groups: int) -> jax.Array:
    """`[B, ...] -> [n, B / n, ...]`: the i-th part has the i-th rows of every group."""
    dealt = a.reshape(groups, n, -1, *a.shape[1:]).swapaxes(0, 1)
    return dealt.reshape(n, -1, *a.shape[1:])


def _collect(a: jax.Array, groups: int) -> jax.Array:
    """The inverse of `_deal`."""
    n, rows, *rest = a.shape
    return a.reshape(n, groups, -1, *rest).swapaxes(0, 1).reshape(n * rows, *rest)
