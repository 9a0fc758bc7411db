"""Networks of published checkpoints on one accelerator at their real size: time, MFU and memory, bfloat16.

    python benchmarks/gpu_networks.py            # writes benchmarks/results/gpu_networks.json
    python benchmarks/gpu_networks.py --smoke    # tiny networks, on whatever is here; writes nothing

Forward, and forward with the gradients of all parameters, with random parameters of bfloat16. The U-Nets and DiT are
whole; of SD3 and Flux some blocks are left out, which leaves those that remain as they are. Every setting is a process
of its own, so that `memory_gib` is its own peak. FLOPs are counted from the trace of the computation (`flops.py`), MFU
by the peak of `accelerators.py`; a backward pass counts as two forward ones. `gpu_networks_torch.py` is the same in
PyTorch.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

from processes import alone

RESULTS = Path(__file__).parent / "results" / "gpu_networks.json"
SDXL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=2048,
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
SD3 = dict(
    num_layers=8, num_attention_heads=24, attention_head_dim=64, caption_projection_dim=1536, joint_attention_dim=4096,
    pooled_projection_dim=2048, sample_size=128, in_channels=16, out_channels=16,
)  # fmt: skip
DIT = dict(num_attention_heads=16, attention_head_dim=72, num_layers=28, sample_size=32, out_channels=8)
# The class, its config, the shape of one sample of each input (whole numbers below `end` as (shape, end)), the batch.
NETWORKS = {
    "sd15": dict(
        kind="UNet2DConditionModel", config=dict(cross_attention_dim=768), batch=8,
        inputs=dict(x=(64, 64, 4), t=((), 1000), context=(77, 768)),
    ),
    "sdxl": dict(
        kind="UNet2DConditionModel", config=SDXL, batch=4,
        inputs=dict(x=(128, 128, 4), t=((), 1000), context=(77, 2048), pooled=(1280,), time_ids=((6,), 1024)),
    ),
    "dit_xl_2": dict(
        kind="DiTTransformer2DModel", config=DIT, batch=64, inputs=dict(x=(32, 32, 4), t=((), 1000), y=((), 1000))
    ),
    "sd3_8_blocks": dict(
        kind="SD3Transformer2DModel", config=SD3, batch=4,
        inputs=dict(x=(128, 128, 16), t=((), 1000), context=(333, 4096), pooled=(2048,)),
    ),
    "flux_2_double_4_single": dict(
        kind="FluxTransformer2DModel", config=dict(num_layers=2, num_single_layers=4, guidance_embeds=True), batch=2,
        inputs=dict(x=(4096, 64), t=(), context=(512, 4096), pooled=(768,), guidance=()),
    ),
}  # fmt: skip
SMOKE = {
    "sd15": (
        dict(block_out_channels=(32, 32, 32, 32), attention_head_dim=4, cross_attention_dim=16),
        dict(x=(16, 16, 4), t=((), 1000), context=(7, 16)),
    ),
    "sdxl": (
        dict(block_out_channels=(32, 64, 64), attention_head_dim=2, transformer_layers_per_block=1),
        dict(NETWORKS["sdxl"]["inputs"], x=(16, 16, 4), context=(7, 2048)),
    ),
    "dit_xl_2": (dict(num_attention_heads=2, attention_head_dim=8, num_layers=2), dict(NETWORKS["dit_xl_2"]["inputs"])),
    "sd3_8_blocks": (
        dict(num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16),
        dict(NETWORKS["sd3_8_blocks"]["inputs"], x=(16, 16, 16), context=(7, 4096)),
    ),
    "flux_2_double_4_single": (
        dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16, axes_dims_rope=(4, 6, 6)),
        dict(NETWORKS["flux_2_double_4_single"]["inputs"], x=(64, 64), context=(7, 4096)),
    ),
}  # fmt: skip
ATTENTION = ("xla", "cudnn", "tokamax")


def setting_of(name, smoke):
    setting = NETWORKS[name]
    if not smoke:
        return setting
    config, inputs = SMOKE[name]
    return setting | dict(config=setting["config"] | config, inputs=inputs, batch=2)


def drawn(setting):
    """The inputs, numpy arrays with the batch in front."""
    import numpy as np

    rng, batch = np.random.default_rng(0), setting["batch"]

    def draw(spec):
        if len(spec) == 2 and isinstance(spec[0], tuple):
            return rng.integers(0, spec[1], (batch, *spec[0])).astype(np.int32)
        return rng.standard_normal((batch, *spec)).astype(np.float32)

    given = {name: draw(spec) for name, spec in setting["inputs"].items()}
    if setting["kind"] == "FluxTransformer2DModel":
        side = int(given["x"].shape[1] ** 0.5)
        rows, columns = np.divmod(np.arange(side * side), side)
        given["positions"] = np.stack([0 * rows, rows, columns], -1).astype(np.float32)
    return given


def measure(name, attention, *, steps, smoke):
    """The row of one setting, measured in this process."""
    import jax
    import jax.numpy as jnp

    from diffjax.models import from_config
    from diffjax.train.parallel.accelerators import accelerator_of
    from diffjax.train.parallel.flops import count_flops

    setting = setting_of(name, smoke)
    config = {"_class_name": setting["kind"]} | setting["config"]
    model = from_config(config, dtype="bfloat16", param_dtype="bfloat16", attention=attention)
    params = jax.jit(model.init)(jax.random.key(0))
    given = jax.device_put(drawn(setting))

    def forward(params, given, model=model):
        rest = {k: v for k, v in given.items() if k not in ("x", "t")}
        return model.apply(params, given["x"], given["t"], **rest)

    both = jax.grad(lambda params, given: jnp.mean(forward(params, given) ** 2))
    # Of the network without fused kernels, whose operations nobody counts.
    plain = from_config(config, dtype="bfloat16")
    flops = count_flops(lambda params, given: forward(params, given, plain), params, given)
    device = jax.devices()[0]
    known, row = accelerator_of(device.device_kind), {"network": name, "attention": attention, **describe(setting)}
    for what, function, factor in (("forward", forward, 1), ("both", both, 3)):
        start = time.perf_counter()
        run = jax.jit(function).lower(params, given).compile()
        compile_s, times = time.perf_counter() - start, []
        for _ in range(2 + steps):
            begin = time.perf_counter()
            jax.block_until_ready(run(params, given))
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times[2:])
        row[what] = {
            "ms": round(1e3 * seconds, 2), "compile_s": round(compile_s, 1),
            "tflops_per_s": round(factor * flops / seconds / 1e12, 2),
            "mfu": round(factor * flops / seconds / known.peak_flops, 4) if known else None,
        }  # fmt: skip
    memory = device.memory_stats() or {}
    row["memory_gib"] = round(memory["peak_bytes_in_use"] / 2**30, 2) if "peak_bytes_in_use" in memory else None
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    return row | {"forward_tflop": round(flops / 1e12, 4), "device": device.device_kind, "versions": versions}


def describe(setting):
    return {"class": setting["kind"], "config": setting["config"], "batch_size": setting["batch"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--attention", nargs="*", default=ATTENTION)
    parser.add_argument("--smoke", action="store_true", help="tiny networks; writes nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.one:
        return print(json.dumps(measure(*json.loads(arguments.one), steps=arguments.steps, smoke=arguments.smoke)))
    rows, flags = [], [f"--steps={arguments.steps}", *["--smoke"] * arguments.smoke]
    for name in arguments.networks:
        for attention in arguments.attention:
            named = {"network": name, "attention": attention}
            rows.append(named | alone(__file__, (name, attention), *flags))
            print(json.dumps(rows[-1]), flush=True)
            if not arguments.smoke:
                # After every row: what was measured survives a machine that is taken away.
                report = {"command": "python benchmarks/gpu_networks.py", "rows": rows}
                arguments.out.parent.mkdir(exist_ok=True, parents=True)
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
