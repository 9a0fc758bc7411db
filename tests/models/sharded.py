"""Networks on 8 CPU devices beside one, forward and backward: `python sharded.py CLASS...` prints one JSON object.

For each class: by how much the outputs and gradients differ, in units of what is allowed; the share of the parameters'
bytes on a device; and the kinds of communication in the compiled program.
"""

import json
import math
import os
import re
import sys
from pathlib import Path

# The comparison is of arithmetic; most of the time would be spent on optimised machine code for it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
sys.path.insert(0, str(Path(__file__).parent.parent / "parity"))

import drawn
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffjax.models import from_config
from diffjax.train.parallel.sharding import make_mesh, param_sharding, parse_mesh

MESH = "data=2,fsdp=2,tensor=2"
# Sums in another order: of 64 layers with sums of 1000 terms, each rounded by 2^-24, about 1e-4 of the largest where
# errors add up; a forgotten sum or one too many changes all by more than a half.
RELATIVE, FLOOR = 1e-4, 1e-6


def measure(kind):
    case = drawn.small(kind)
    model = from_config(case.config)
    params = drawn.params_of(model)
    both = jax.value_and_grad(drawn.total_of(case), has_aux=True)
    (_, out), grads = jax.jit(both)(params, case.inputs)
    mesh = make_mesh(parse_mesh(MESH))
    where = param_sharding(mesh, params, model.rules, "rules")
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch = jax.tree.map(lambda a: rows if a.ndim and len(a) % 2 == 0 else whole, case.inputs)
    step = jax.jit(both, in_shardings=(where, batch), out_shardings=(None, where))
    compiled = step.lower(params, case.inputs).compile()
    placed = jax.device_put(params, where)
    (_, out_8), grads_8 = compiled(placed, jax.device_put(case.inputs, batch))
    found = {"gradient" + jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(grads_8)}
    truth = {"gradient" + jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(grads)}
    apart = worst(truth, found) | worst(out, out_8)
    name = max(apart, key=apart.get)
    sizes = [(leaf.nbytes, leaf.addressable_shards[0].data.nbytes) for leaf in jax.tree.leaves(placed)]
    kinds = re.findall(r"(all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(", compiled.as_text())
    return {
        "apart": apart[name], "where": name, "outputs": sorted(out),
        "share": sum(here for _, here in sizes) / sum(size for size, _ in sizes), "collectives": sorted(set(kinds)),
    }  # fmt: skip


def worst(truth, found):
    """For each array its largest difference in units of the tolerance; infinite where one is not finite."""
    most = max(float(np.abs(np.asarray(a)).max()) for a in truth.values())
    apart = {}
    for name, a in truth.items():
        a, b = np.asarray(a, np.float64), np.asarray(found[name], np.float64)
        apart[name] = float(np.abs(a - b).max() / (RELATIVE * np.abs(a).max() + FLOOR * most))
        apart[name] = apart[name] if math.isfinite(apart[name]) else math.inf
    return apart


def main(*kinds):
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    out = {}
    for kind in kinds:
        out[kind] = measure(kind)
        print(kind, out[kind], file=sys.stderr, flush=True)
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
