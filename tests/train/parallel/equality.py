"""Trains a tiny network of a family in several modes on 8 CPU devices, and prints how far each ends from one device.

`python equality.py FAMILY PRECISION MODE...` prints one JSON object. A family joins with an entry in FAMILIES.
"""

import collections
import json
import os
import re
import sys

# The comparison is of arithmetic; most of the time would be spent on optimised machine code for it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffjax.train import setup
from diffjax.train.parallel.mesh import make_mesh, parse_mesh, place
from diffjax.train.parallel.sharding import state_sharding
from diffjax.train.parts import prepare
from diffjax.train.state import abstract_state, init_state

STEPS, BATCH, DEVICES = 10, 16, 8

FAMILIES = {
    "dit": dict(name="dit", patch=2, width=16, depth=2, heads=4, mlp_ratio=2.0),
    "unet": dict(name="unet", width=8, mults=(1, 2), blocks=1, attention=(4,), head_width=4, groups=2),
    "mlp": dict(name="mlp", width=16, depth=1),
}
# Keys of the config; those of `model` go to the network.
MODES = {
    "data": dict(),
    "fsdp": dict(sharding="fsdp"),
    "tensor": dict(sharding="rules", mesh="data=4,tensor=2"),
    "sequence": dict(mesh="data=2,sequence=4"),
    "data x fsdp x tensor": dict(sharding="rules", mesh="data=2,fsdp=2,tensor=2"),
    "fsdp x sequence": dict(sharding="rules", mesh="fsdp=4,sequence=2"),
    "fsdp x tensor x sequence, microbatches, remat": dict(
        sharding="rules", mesh="fsdp=2,tensor=2,sequence=2", microbatch=4, model=dict(remat="full")
    ),
    "data x fsdp x tensor, microbatches, remat": dict(
        sharding="rules", mesh="data=2,fsdp=2,tensor=2", microbatch=2, model=dict(remat="dots")
    ),
    "pmap": dict(sharding="pmap"),
    "pmap, microbatches": dict(sharding="pmap", microbatch=1),
    "pmap without its mean": dict(sharding="pmap"),
    "microbatches, unrolled": dict(microbatch=1, accumulate_loop="unroll"),
    "microbatches, scanned": dict(microbatch=1, accumulate_loop="scan"),
    "remat": dict(model=dict(remat="full")),
    "layers unrolled": dict(model=dict(scan=False)),
}
PRECISIONS = {
    # No clipping: it is what hides a gradient that is wrong by a factor.
    "fp32": dict(optim=dict(name="sgd", lr=0.05, b1=0.0, clip=0.0), model=dict(dtype="float32")),
    "fp64": dict(optim=dict(name="adamw", lr=1e-3, weight_decay=0.01, clip=1.0), model=dict(dtype="float64")),
}


def settings(family, precision, mode):
    mode, precision = dict(MODES.get(mode, {})), PRECISIONS[precision]
    model = FAMILIES[family] | precision["model"] | mode.pop("model", {})
    return ConfigDict(dict(batch_size=BATCH, num_steps=STEPS, optim=precision["optim"], model=model, **mode))


def randomised(init, dtype):
    """Initial parameters with noise: at the start the output is zero, and so are most gradients."""

    def noisy(key):
        leaves, tree = jax.tree.flatten(init(key))
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
        noise = [0.1 * jax.random.normal(k, a.shape, jnp.float32) for k, a in zip(keys, leaves, strict=True)]
        return tree.unflatten([(a + n).astype(dtype) for a, n in zip(leaves, noise, strict=True)])

    return noisy


def abstract_batch(config, parts, shape=None):
    """That of a run, but for images of the dtype of the parameters: a loss is computed in that of its images."""
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    batch = RUNS_BATCH(config, parts, shape)
    return batch | {"image": batch["image"].update(dtype=dtype)}


RUNS_BATCH, setup.abstract_batch = setup.abstract_batch, abstract_batch


def train(family, precision, mode):
    config, parts = prepare(settings(family, precision, mode))
    if mode == "pmap without its mean":
        jax.lax.pmean = lambda grads, axis: grads
    dtype = jnp.float64 if precision == "fp64" else jnp.float32
    parts = parts._replace(model=parts.model._replace(init=randomised(parts.model.init, dtype)))
    one = mode == "one device"
    mesh = make_mesh(devices=jax.devices()[:1]) if one else make_mesh(parse_mesh(config.mesh))
    state = jax.tree.map(np.asarray, jax.jit(lambda: init_state(parts, jax.random.key(0)))())
    where = state_sharding(mesh, abstract_state(parts), parts.model.rules, config.sharding)
    step_fn, empty, _ = setup.compile_step(config, parts, mesh, where)
    start, state, losses = state.params, place(state, where), []
    for i in range(STEPS):
        items = parts.dataset.train[BATCH * i : BATCH * (i + 1)]
        state, window = step_fn(state, empty(), items | {"image": items["image"].astype(dtype)})
        losses.append(float(window.loss))
    text = step_fn.as_text() if hasattr(step_fn, "as_text") else ""
    kinds = re.findall(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    leaves = jax.tree.leaves(state.params)
    facts = dict(
        losses=losses,
        collectives=dict(collections.Counter(kinds)),
        bytes=sum(leaf.nbytes for leaf in leaves),
        bytes_per_device=sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
        dtypes=sorted({str(leaf.dtype) for leaf in leaves}),
    )
    return start, jax.tree.map(np.asarray, state.params), facts


def apart(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(x - y))) for x, y in pairs)


def main(family, precision, *modes):
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", precision == "fp64")
    start, truth, facts = train(family, precision, "one device")
    out = {"one device": facts | {"moved": apart(start, truth)}}
    for mode in modes:
        _, params, facts = train(family, precision, mode)
        out[mode] = facts | {"apart": apart(truth, params)}
        print(mode, out[mode]["apart"], facts["collectives"], file=sys.stderr, flush=True)
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
