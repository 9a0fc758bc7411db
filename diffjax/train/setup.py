"""What stands ready before the first step: the state in its place, and the compiled step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffjax.train import step as steps
from diffjax.train.checkpoint.init_from import first_state_from
from diffjax.train.parallel import accumulate, pmap, processes, sharding
from diffjax.train.parallel.activations import constrained
from diffjax.train.parallel.flops import step_flops
from diffjax.train.parallel.mesh import batch_groups
from diffjax.train.parts import Parts
from diffjax.train.state import TrainState, abstract_state, init_state
from diffjax.train.survival import guard


def first_state(config, parts: Parts, checkpoints, iterator, state_sharding) -> tuple[int, TrainState]:
    """The newest checkpoint (the iterator is set to it as well), or the state at step 0: the initial one, or the one
    that `config.init_from` gives.

    Raises:
      ConfigError: for a source that does not fit, or processes that do not see one folder.
      CheckpointError: if there are checkpoints and none can be read.
    """
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_state(parts),
        state_sharding,
    )
    restored = checkpoints.restore(like, iterator)
    if restored is not None:
        return int(restored[0]), restored[1]
    # Folders that differ show in their checkpoints; without any, only so.
    processes.share(checkpoints.directory.parent)
    if config.init_from:
        return 0, first_state_from(config, parts, state_sharding)
    key = jax.random.key(config.seed)
    init = jax.jit(lambda key: init_state(parts, key), out_shardings=state_sharding).lower(key)
    # It runs once, and compiling it optimised takes longer than compiling the step.
    return 0, init.compile(compiler_options={"xla_backend_optimization_level": 0})(key)


class Programs(NamedTuple):
    """What `compile_step` makes.

    Attributes:
      step: the compiled `(state, window, batch) -> (state, window)`, which consumes its state and window; its batch
        holds the rows that this process has read, as for `sharding.place_batch`.
      empty: `() -> window`, with no step in it.
      flops: `() -> float`, model FLOPs of one step (of images of the data's first shape).
    """

    step: Callable
    empty: Callable
    flops: Callable[[], float]


def compile_step(config, parts: Parts, mesh, state_sharding) -> Programs:
    """The training step compiled for the mesh, for images of every shape of the data."""
    traced = {s: trace_step(config, parts, mesh, state_sharding, s) for s in parts.dataset.shapes}
    compiled = {s: t.lower().compile() for s, t in traced.items()}
    blank = guard.guarded(config.guard, steps.empty_window(parts.dataset.num_classes, parts.objective.terms))
    everywhere = sharding.replicated(mesh)
    feeds = [] if everywhere.is_fully_addressable else [lambda batch: sharding.place_batch(batch, mesh)]
    if config.sharding == "pmap":
        feeds.append(lambda batch: pmap.split(batch, mesh.size))
    step_fn = compiled[parts.dataset.shape]
    if feeds or len(compiled) > 1:

        def step_fn(state, window, batch):
            program = compiled[batch["image"].shape[1:]]
            return program(state, window, functools.reduce(lambda rows, feed: feed(rows), feeds, batch))

    # Without feeds the call itself places the batch, which takes less of the host's time than `place_batch`.
    empty = lambda: sharding.place(blank, everywhere)
    jaxpr = traced[parts.dataset.shape].jaxpr
    return Programs(step_fn, empty, functools.cache(lambda: step_flops(config, parts, jaxpr).model))


def trace_step(config, parts: Parts, mesh, state_sharding, shape=None) -> jax.stages.Traced | pmap.Mapped:
    """The step `(state, window, batch) -> (state, window)` traced for the mesh, in the mode `config.sharding`, for
    images of `shape`, by default that of the data.

    Its `lower().compile()` has XLA's memory analysis and the optimised HLO. In the mode `"pmap"` its batch is
    `[devices, B / devices, ...]`.
    """
    mapped = config.sharding == "pmap"
    gradient = _gradient(config, mesh, None if mapped else state_sharding.params)
    step = guard.with_window(config.guard, steps.make_train_step(parts, config, gradient))
    blank = guard.guarded(config.guard, steps.empty_window(parts.dataset.num_classes, parts.objective.terms))
    inputs = abstract_state(parts), blank, abstract_batch(config, parts, shape)
    if mapped:
        return pmap.trace(step, mesh, *inputs)
    everywhere = sharding.replicated(mesh)
    jitted = jax.jit(
        constrained(step, mesh, parts.model.activations),
        in_shardings=(state_sharding, everywhere, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, everywhere),
        donate_argnums=(0, 1),
    )
    return jitted.trace(*inputs)


def _gradient(config, mesh, param_sharding):
    """How the step takes the gradient of a loss over rows; under `pmap`, where there is no `param_sharding`, of its own
    rows on each device."""
    settings = dict(rows=config.microbatch, loop=config.accumulate_loop)
    if param_sharding is None:
        return lambda loss_fn: pmap.own_rows(accumulate.microbatches(loss_fn, **settings))
    if mesh.size > 1:
        pin = jax.lax.with_sharding_constraint
        settings |= dict(
            groups=batch_groups(mesh.shape),
            place=lambda rows: pin(rows, sharding.batch_sharding(mesh)),
            place_grads=lambda grads: pin(grads, param_sharding),
        )
    return lambda loss_fn: accumulate.microbatches(loss_fn, **settings)


def abstract_batch(config, parts: Parts, shape=None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch, of images of `shape` or of the data's only or first one."""
    return {
        "image": jax.ShapeDtypeStruct((config.batch_size, *(shape or parts.dataset.shape)), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
