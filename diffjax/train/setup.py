"""What stands ready before the first step: the state in its place, and the compiled step."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from diffjax.train import step as steps
from diffjax.train.init_from import first_state_from
from diffjax.train.parallel import sharding
from diffjax.train.parts import Parts
from diffjax.train.state import TrainState, abstract_state, init_state


def first_state(config, parts: Parts, checkpoints, iterator, state_sharding) -> tuple[int, TrainState]:
    """The newest checkpoint (the iterator is set to it as well), or the state at step 0: the initial one, or the one
    that `config.init_from` gives."""
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_state(parts),
        state_sharding,
    )
    restored = checkpoints.restore(like, iterator)
    if restored is not None:
        return int(restored[0]), restored[1]
    if config.init_from:
        return 0, first_state_from(config, parts, state_sharding)
    key = jax.random.key(config.seed)
    init = jax.jit(lambda key: init_state(parts, key), out_shardings=state_sharding).lower(key)
    # It runs once, and compiling it optimised takes longer than compiling the step: 22 s against 5 s for a small U-Net.
    return 0, init.compile(compiler_options={"xla_backend_optimization_level": 0})(key)


def compile_step(config, parts: Parts, mesh, state_sharding):
    """The compiled `(state, window, batch) -> (state, window)`, which consumes its state and window, and a maker of
    empty windows."""
    everywhere = sharding.replicated(mesh)
    jitted = jax.jit(
        steps.with_window(steps.make_train_step(parts, config)),
        in_shardings=(state_sharding, everywhere, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, everywhere),
        donate_argnums=(0, 1),
    )
    blank = steps.empty_window(parts.dataset.num_classes, parts.objective.terms)
    compiled = jitted.lower(abstract_state(parts), blank, abstract_batch(config, parts)).compile()
    return compiled, lambda: jax.device_put(blank, everywhere)


def abstract_batch(config, parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    return {
        "image": jax.ShapeDtypeStruct((config.batch_size, *parts.dataset.shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }


def use_compile_cache() -> str | None:
    """Turns on JAX's compile cache on disk and returns its folder, or None where it is turned off.

    `JAX_COMPILATION_CACHE_DIR` chooses the folder, else it is `diffjax/jax` in the user's cache folder;
    `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = os.path.join(home, "diffjax", "jax")
        jax.config.update("jax_compilation_cache_dir", folder)
    return folder
