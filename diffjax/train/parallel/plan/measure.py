"""The process that pretends to have the devices of a mesh: reads a config on stdin, prints the fields of a `Plan`."""

from __future__ import annotations

import glob
import json
import math
import os
import sys
import time

import jax
from ml_collections import ConfigDict

from diffjax.train.parallel import sharding
from diffjax.train.parallel.flops import step_flops
from diffjax.train.parallel.plan.hlo import collectives
from diffjax.train.parallel.plan.kept import kept_activations
from diffjax.train.parts import prepare
from diffjax.train.setup import trace_step
from diffjax.train.state import abstract_state


def measure(config: ConfigDict, folder: str) -> dict:
    """The fields of a `Plan`, in the process that pretends to have the devices."""
    config, parts = prepare(config)
    mesh = sharding.make_mesh(sharding.parse_mesh(config.mesh))
    state = abstract_state(parts)
    places = sharding.state_sharding(mesh, state, parts.model.rules, config.sharding)
    start = time.perf_counter()
    traced = trace_step(config, parts, mesh, places)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    rows = sharding.batch_sharding(mesh).shard_shape((config.batch_size,))[0]
    at_once = min(rows, config.get("microbatch", 0) or rows)
    per_row, fixed = kept_activations(config, parts)
    ways = mesh.size * rows / config.batch_size
    # Copies of parameters lie as the parameters do.
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    share = _bytes_each(state.params, places.params) / whole
    trees = {
        "parameters": (state.params, places.params),
        "gradients": (state.params, places.params),
        "optimiser": (state.opt_state, places.opt_state),
        "averages": (state.ema, places.ema),
    }
    return dict(
        mesh=dict(mesh.shape), sharding=config.sharding, batch_size=config.batch_size, rows=at_once,
        dtype=str(parts.model.config.get("dtype", "float32")),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        state={name: _bytes_each(*tree) for name, tree in trees.items()},
        activations=per_row * at_once / ways + fixed * share,
        temporary=memory.temp_size_in_bytes if memory else 0,
        flops=step_flops(config, parts, traced.jaxpr),
        collectives=collectives(_partitioned(folder, compiled), mesh.size) if mesh.size > 1 else [],
        seconds=seconds,
    )  # fmt: skip


def _bytes_each(tree, places) -> float:
    """Bytes of a tree on one device."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves)


def _partitioned(folder: str, compiled) -> str:
    """The program as the partitioner leaves it: the CPU back end has not yet made float32 of bfloat16."""
    files = glob.glob(os.path.join(folder, "*after_spmd-partitioning*"))
    if not files:
        return compiled.as_text()
    with open(max(files, key=os.path.getsize), encoding="utf-8") as stream:
        return stream.read()


def _main() -> None:
    job = json.load(sys.stdin)
    try:
        answer = measure(ConfigDict(json.loads(job["config"])), job["folder"])
    except ValueError as error:
        answer = {"error": str(error)}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main()
