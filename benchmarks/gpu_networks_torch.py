"""The PyTorch half of `gpu_networks.py`: classes of diffusers, bfloat16, SDPA, eager and with torch.compile.

    python benchmarks/gpu_networks_torch.py            # where PyTorch with CUDA is; writes gpu_networks_torch.json
    python benchmarks/gpu_networks_torch.py --smoke    # tiny networks, on whatever is here

The same configs, batches and inputs, which are read from `gpu_networks.py`; FLOPs are counted by PyTorch's own
`FlopCounterMode` and a backward pass counts as two forward ones, as there. Convolutions are channels last.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import diffusers
import gpu_networks
import torch
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results" / "gpu_networks_torch.json"
# Dense bfloat16, NVIDIA's data sheets: as in diffjax/train/parallel/accelerators.py.
PEAKS = {"H200": 989.4e12, "H100 80GB HBM3": 989.4e12, "A100-SXM4-80GB": 312e12, "B200": 2250e12}


def inputs_of(setting, device):
    """Floating-point inputs in bfloat16, images as `[B, C, H, W]`."""
    given = {}
    for name, array in gpu_networks.drawn(setting).items():
        value = torch.from_numpy(array).to(device)
        value = value.long() if array.dtype.kind == "i" else value.bfloat16()
        given[name] = value.permute(0, 3, 1, 2) if value.ndim == 4 else value
    return given


def call(kind, module, given):
    """The output of diffusers, as it comes."""
    x, t = given["x"], given["t"]
    if kind == "DiTTransformer2DModel":
        return module(x, t, given["y"]).sample
    if kind == "SD3Transformer2DModel":
        return module(x, given["context"], given["pooled"], t).sample
    if kind == "FluxTransformer2DModel":
        places = torch.zeros(given["context"].shape[1], 3, device=x.device, dtype=x.dtype)
        return module(
            x, given["context"], given["pooled"], t, given["positions"], places, given["guidance"]
        ).sample
    added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if "pooled" in given else None
    return module(x, t, given["context"], added_cond_kwargs=added).sample


def measure(name, compiled, *, steps, smoke, device):
    """The row of one network."""
    setting = gpu_networks.setting_of(name, smoke)
    kind, given = setting["kind"], inputs_of(setting, device)
    torch.manual_seed(0)
    module = getattr(diffusers, kind)(**setting["config"]).to(device, torch.bfloat16).eval()
    module = module.to(memory_format=torch.channels_last) if "UNet" in kind else module
    params = list(module.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(kind, module, given)
    flops, ran = counter.get_total_flops(), torch.compile(module) if compiled else module

    def forward():
        with torch.no_grad():
            return call(kind, ran, given)

    def both():
        loss = call(kind, ran, given).float().square().mean()
        return torch.autograd.grad(loss, params, allow_unused=True)

    cuda = device == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    device_name = torch.cuda.get_device_name() if cuda else "cpu"
    peak = next((value for key, value in PEAKS.items() if device_name.endswith(key)), None)
    row = {"network": name, "compiled": compiled, **gpu_networks.describe(setting)}
    for what, function, factor in (("forward", forward, 1), ("both", both, 3)):
        start = time.perf_counter()
        function()
        wait()
        first, times = time.perf_counter() - start, []
        for _ in range(2 + steps):
            begin = time.perf_counter()
            function()
            wait()
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times[2:])
        row[what] = {
            "ms": round(1e3 * seconds, 2), "first_s": round(first, 1),
            "tflops_per_s": round(factor * flops / seconds / 1e12, 2),
            "mfu": round(factor * flops / seconds / peak, 4) if peak else None,
        }  # fmt: skip
    row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None
    return row | {"forward_tflop": round(flops / 1e12, 4), "device": device_name}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(gpu_networks.NETWORKS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="tiny networks; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device, rows = "cuda" if torch.cuda.is_available() else "cpu", []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    for name in arguments.networks:
        for compiled in (False,) if arguments.eager else (False, True):
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                rows.append(measure(name, compiled, steps=arguments.steps, smoke=arguments.smoke, device=device))
            except torch.OutOfMemoryError as error:
                rows.append({"network": name, "compiled": compiled, "error": str(error)[:200]})
            print(json.dumps(rows[-1]), flush=True)
            if not arguments.smoke:
                report = {
                    "command": "python benchmarks/gpu_networks_torch.py",
                    "versions": {
                        "python": platform.python_version(), "torch": torch.__version__,
                        "diffusers": diffusers.__version__,
                    },
                    "rows": rows,
                }  # fmt: skip
                arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
