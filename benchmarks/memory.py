"""Memory of a forward and backward pass at published sizes, by attention and rematerialisation: compiled, never run.

    python benchmarks/memory.py            # writes benchmarks/results/memory.json
    python benchmarks/memory.py --quick    # tiny sizes; writes nothing

`temp_gib` is what XLA's CPU compiler plans for intermediate results (`memory_analysis`), besides parameters, inputs and
gradients; on accelerators it plans otherwise, with the same large arrays. Of layers that are not in a loop it merges
what `remat` would compute again, on a CPU alone: see the U-Net. Networks are of fewer layers than published,
in bfloat16, unless they say otherwise, at batch 1; the loss is the mean square of the output.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "memory.json"
SD = dict(
    _class_name="UNet2DConditionModel", cross_attention_dim=768, block_out_channels=(320, 640),
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
)  # fmt: skip
DIT = dict(
    _class_name="DiTTransformer2DModel", num_attention_heads=16, attention_head_dim=72, num_layers=6, sample_size=64
)
SD3 = dict(
    _class_name="SD3Transformer2DModel", num_layers=4, num_attention_heads=24, attention_head_dim=64,
    caption_projection_dim=1536, joint_attention_dim=4096, pooled_projection_dim=2048, sample_size=128, in_channels=16,
)  # fmt: skip
FLUX = dict(_class_name="FluxTransformer2DModel", num_layers=1, num_single_layers=2, guidance_embeds=True)
# Each network's config, and the shapes of its inputs.
NETWORKS = {
    "SD 1.5 U-Net, two of four levels, 64 x 64 latents": (
        SD, dict(x=(1, 64, 64, 4), t=(1,), context=(1, 77, 768)),
    ),
    "DiT-XL/2, 6 of 28 blocks, 1024 tokens": (DIT, dict(x=(1, 64, 64, 4), t=(1,), y=(1,))),
    "SD3, 4 of 24 blocks, 4096 + 333 tokens": (
        SD3, dict(x=(1, 128, 128, 16), t=(1,), context=(1, 333, 4096), pooled=(1, 2048)),
    ),
    "Flux, 1 of 19 double and 2 of 38 single blocks, 4096 + 512 tokens": (
        FLUX,
        dict(x=(1, 4096, 64), t=(1,), context=(1, 512, 4096), pooled=(1, 768), guidance=(1,), positions=(4096, 3)),
    ),
}  # fmt: skip
QUICK = {
    "DiT, tiny": (
        DIT | dict(num_attention_heads=2, attention_head_dim=8, num_layers=2), dict(x=(1, 64, 64, 4), t=(1,), y=(1,))
    )
}
SETTINGS = [(attention, remat) for attention in ("xla", "chunked") for remat in ("none", "dots", "full")]


def measure(name, attention, remat, quick):
    """The row of one setting."""
    import jax
    import jax.numpy as jnp

    from diffjax.models import from_config

    config, inputs = (QUICK if quick else NETWORKS)[name]
    model = from_config(config, dtype="bfloat16", param_dtype="bfloat16", attention=attention, remat=remat)
    given = {k: jax.ShapeDtypeStruct(s, jnp.int32 if k == "y" else jnp.float32) for k, s in inputs.items()}

    def loss(params, given):
        x, t = given.pop("x"), given.pop("t")
        return jnp.mean(model.apply(params, x, t, **given) ** 2)

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    start = time.perf_counter()
    facts = jax.jit(jax.grad(loss)).lower(shapes, given).compile().memory_analysis()
    return {
        "network": name, "attention": attention, "remat": remat, "temp_gib": round(facts.temp_size_in_bytes / 2**30, 3),
        "parameters_gib": round(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes)) / 2**30, 3),
        "compile_s": round(time.perf_counter() - start, 1),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.one:
        return print(json.dumps(measure(*json.loads(arguments.one), arguments.quick)))
    # What machine code the loops become has no bearing on what lies in memory between them.
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    rows, environment = [], os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": fast}
    for name in QUICK if arguments.quick else NETWORKS:
        for setting in SETTINGS:
            # A process each: a compiler that has run keeps memory of its own.
            command = [sys.executable, __file__, "--one", json.dumps((name, *setting))] + ["--quick"] * arguments.quick
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
            rows.append(json.loads(done.stdout))
            print(json.dumps(rows[-1]), flush=True)
            if not arguments.quick:
                versions = {"python": platform.python_version(), "jax": metadata.version("jax")}
                report = {"command": "python benchmarks/memory.py", "compiler": "CPU", "versions": versions}
                arguments.out.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
