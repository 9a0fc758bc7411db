"""Training DiT-XL/2 on one accelerator: images per second, MFU and memory, by batch size and rematerialisation.

    python benchmarks/gpu_train.py            # writes benchmarks/results/gpu_train.json
    python benchmarks/gpu_train.py --smoke    # a tiny network, on whatever is here

Latents of 32 x 32 x 4 in bfloat16, float32 parameters, AdamW and an average, noise for data that lies on the device:
the compiled step of the trainer on `configs/dit_xl_2.py`. Every setting is a process of its own, so that `memory_gib`
is its own peak. MFU is made of the model FLOPs, without what rematerialisation repeats, and the peak of
`accelerators.py`. `gpu_train_torch.py` is the same in PyTorch.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

from processes import alone

RESULTS = Path(__file__).parent / "results" / "gpu_train.json"
# (batch, remat, attention)
SWEEP = (
    (64, "none", "xla"), (64, "none", "cudnn"), (128, "none", "cudnn"), (256, "none", "cudnn"),
    (256, "dots_no_batch", "cudnn"), (256, "full", "cudnn"), (512, "full", "cudnn"),
)  # fmt: skip
SMOKE = ((8, "none", "xla"), (8, "full", "xla"))
TINY = {"width": 64, "depth": 2, "heads": 2}


def measure(batch, remat, attention, *, steps, tiny):
    """The row of one setting, measured in this process."""
    import jax
    import numpy as np

    from diffjax.train import config as configs
    from diffjax.train.parallel import sharding
    from diffjax.train.parallel.accelerators import accelerator_of
    from diffjax.train.parallel.flops import step_flops
    from diffjax.train.parts import prepare
    from diffjax.train.setup import compile_step
    from diffjax.train.state import abstract_state, init_state

    config = configs.load(f"configs/dit_xl_2.py:batch={batch}")
    config.model = dict(config.model) | {"remat": remat, "attention_impl": attention} | (TINY if tiny else {})
    config, parts = prepare(config)
    mesh = sharding.make_mesh(sharding.parse_mesh("data=1"), devices=jax.devices()[:1])
    where = sharding.state_sharding(mesh, abstract_state(parts), parts.model.rules, "data")
    start = time.perf_counter()
    step, empty, _ = compile_step(config, parts, mesh, where)
    compile_s = time.perf_counter() - start
    state = jax.jit(lambda key: init_state(parts, key), out_shardings=where)(jax.random.key(0))
    rng = np.random.default_rng(0)
    rows = {
        "image": rng.standard_normal((batch, *parts.dataset.shape)).astype(np.float32),
        "label": rng.integers(0, parts.dataset.num_classes, batch).astype(np.int32),
    }
    placed, window = sharding.place_batch(rows, mesh), empty()
    times = []
    for _ in range(3 + steps // 5):
        begin = time.perf_counter()
        for _ in range(5):
            state, window = step(state, window, placed)
        # Fetching a number waits for the device on every platform.
        float(jax.device_get(window.loss))
        times.append((time.perf_counter() - begin) / 5)
    device, seconds, flops = jax.devices()[0], statistics.median(times[3:]), step_flops(config, parts)
    known, memory = accelerator_of(device.device_kind), device.memory_stats() or {}
    return {
        "batch_size": batch, "remat": remat, "attention": attention,
        "images_per_s": round(batch / seconds, 1), "step_ms": round(1e3 * seconds, 2),
        "mfu": round(flops.model / seconds / known.peak_flops, 4) if known else None,
        "tflops_per_s": round(flops.model / seconds / 1e12, 2),
        "hardware_tflops_per_s": round(flops.hardware / seconds / 1e12, 2),
        "memory_gib": round(memory["peak_bytes_in_use"] / 2**30, 2) if "peak_bytes_in_use" in memory else None,
        "compile_s": round(compile_s, 1), "device": device.device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batches", type=int, nargs="*", help="only the settings of these batch sizes")
    parser.add_argument("--smoke", action="store_true", help="a tiny network; writes nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.one:
        setting = json.loads(arguments.one)
        return print(json.dumps(measure(*setting, steps=arguments.steps, tiny=arguments.smoke)))
    rows, flags = [], [f"--steps={arguments.steps}", *["--smoke"] * arguments.smoke]
    for setting in SMOKE if arguments.smoke else SWEEP:
        if not arguments.batches or setting[0] in arguments.batches:
            named = dict(zip(("batch_size", "remat", "attention"), setting, strict=True))
            rows.append(named | alone(__file__, setting, *flags))
            print(json.dumps(rows[-1]), flush=True)
            if not arguments.smoke:
                # After every row: what was measured survives a machine that is taken away.
                report = {"command": "python benchmarks/gpu_train.py", "config": "configs/dit_xl_2.py", "rows": rows}
                arguments.out.parent.mkdir(exist_ok=True, parents=True)
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
