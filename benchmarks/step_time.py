"""Times of the digits networks on this machine: compilation, a training step, a forward pass, the sampler's share.

    python benchmarks/step_time.py            # writes benchmarks/results/step_time.json

Medians of `--repeats` calls after one warm-up, one process, nothing else running. `sampler_overhead` is the time of a
jitted 20-step DPM-Solver++ 2M run over that of 20 bare forward passes: what the loop costs on top of the network.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import diffjax as dj
from configs.common import digits
from diffjax.train.parts import prepare
from diffjax.train.state import init_state
from diffjax.train.step import make_train_step

RESULTS = Path(__file__).parent / "results"


def median_ms(call, repeats):
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(name, repeats):
    """The row of one network: its recipe's batch and settings."""
    config, parts = prepare(digits("", model=name))
    state = init_state(parts, jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.uniform(-1, 1, (config.batch_size, *parts.dataset.shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, config.batch_size), jnp.int32),
    }
    start = time.perf_counter()
    step = jax.jit(make_train_step(parts, config)).lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    t, y = jnp.zeros(config.batch_size), batch["label"]
    forward = jax.jit(lambda x: parts.model.apply(state.params, x, t, y))
    grid = dj.karras(dj.EDM(), 20)
    denoise = dj.denoiser(lambda x, t: parts.model.apply(state.params, x, t, y), parts.head)
    run = jax.jit(lambda x: dj.sample(dj.dpmpp_2m(), denoise, x, grid))
    forward_ms = median_ms(lambda: forward(batch["image"]), repeats)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "batch_size": config.batch_size,
        "compile_s": round(compile_s, 2),
        "train_step_ms": round(median_ms(lambda: step(state, batch), repeats), 2),
        "forward_ms": round(forward_ms, 2),
        "sampler_overhead": round(median_ms(lambda: run(batch["image"]), max(3, repeats // 5)) / (20 * forward_ms), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "step_time.json")
    arguments = parser.parse_args()
    report = {
        "command": f"python benchmarks/step_time.py --repeats={arguments.repeats}",
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "diffjax": dj.__version__},
        "networks": {name: measure(name, arguments.repeats) for name in ("unet", "dit", "mlp")},
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["networks"], indent=1))


if __name__ == "__main__":
    main()
