"""The PyTorch half of `gpu_train.py`: DiT-XL/2, torch.compile, SDPA, bfloat16 autocast, fused AdamW, an average.

    python benchmarks/gpu_train_torch.py            # where PyTorch with CUDA is; writes results/gpu_train_torch.json
    python benchmarks/gpu_train_torch.py --smoke    # a tiny network, on whatever is here

The network is that of `train_step_torch.py`, which `train_step.py` compares number by number with diffjax's.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import train_step_torch

RESULTS = Path(__file__).parent / "results" / "gpu_train_torch.json"
XL = dict(name="dit", patch=2, width=1152, depth=28, heads=16)
TINY = dict(name="dit", patch=2, width=64, depth=2, heads=2)
SHAPE, CLASSES = (32, 32, 4), 1000
# Dense bfloat16, NVIDIA's data sheets: as in diffjax/train/parallel/accelerators.py.
PEAKS = {"H200": 989.4e12, "H100 80GB HBM3": 989.4e12, "A100-SXM4-80GB": 312e12, "B200": 2250e12}


def shapes(model):
    """Names and shapes of the parameters, as diffjax has them."""
    width, depth, pixels = model["width"], model["depth"], model["patch"] ** 2 * SHAPE[-1]
    linear = {
        "cond/hidden": (256, width), "cond/out": (width, width), "inp": (pixels, width),
        "modulation": (width, 2 * width), "out": (width, pixels),
    }  # fmt: skip
    blocks = {
        "modulation": (width, 3 * width), "attention/qkv": (width, 3 * width), "attention/out": (width, width),
        "mlp/modulation": (width, 3 * width), "mlp/up": (width, 4 * width), "mlp/down": (4 * width, width),
    }  # fmt: skip
    found = {"cond/label/embedding": (CLASSES + 1, width)}
    for name, (a, b) in linear.items():
        found |= {name + "/kernel": (a, b), name + "/bias": (b,)}
    for name, (a, b) in blocks.items():
        found |= {f"blocks/{name}/kernel": (depth, a, b), f"blocks/{name}/bias": (depth, b)}
    return found


def flops_per_image(model):
    """Of a training step: three forward passes' products, 2 per multiply and add, by the closed form."""
    width, tokens = model["width"], (SHAPE[0] // model["patch"]) ** 2
    pixels = model["patch"] ** 2 * SHAPE[-1]
    block = 24 * tokens * width**2 + 4 * tokens**2 * width + 12 * width**2
    rest = 4 * tokens * pixels * width + 2 * (256 * width + width**2) + 4 * width**2
    return 3 * (model["depth"] * block + rest)


def measure(model, batch, compiled, steps, device):
    """The row of one batch size."""
    rng = np.random.default_rng(0)
    arrays = {n: 0.02 * rng.standard_normal(s, np.float32) for n, s in shapes(model).items()}
    net = train_step_torch.Net(arrays, model, SHAPE)
    net.p = {name: torch.nn.Parameter(p.detach().to(device)) for name, p in net.p.items()}
    net.places = net.places.to(device)
    params = list(net.p.values())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0, fused=True)
    image = torch.randn(batch, *SHAPE, device=device)
    label = torch.randint(CLASSES, (batch,), device=device)

    def loss_of():
        t, eps = torch.rand(batch, device=device), torch.randn_like(image)
        y = torch.where(torch.rand(batch, device=device) < 0.1, CLASSES, label)
        at = t[:, None, None, None]
        with torch.autocast(device, dtype=torch.bfloat16):
            out = net((1 - at) * image + at * eps, t, y)
        return F.mse_loss(out.float(), eps - image)

    loss_fn = torch.compile(loss_of) if compiled else loss_of

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss_fn().backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1e-4)

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    start = time.perf_counter()
    step()
    wait()
    first, times = time.perf_counter() - start, []
    for _ in range(3 + steps // 5):
        begin = time.perf_counter()
        for _ in range(5):
            step()
        wait()
        times.append((time.perf_counter() - begin) / 5)
    seconds, name = statistics.median(times[3:]), torch.cuda.get_device_name() if device == "cuda" else "cpu"
    peak = next((value for key, value in PEAKS.items() if name.endswith(key)), None)
    rate = batch * flops_per_image(model) / seconds
    return {
        "batch_size": batch, "compiled": compiled, "images_per_s": round(batch / seconds, 1),
        "step_ms": round(1e3 * seconds, 2), "mfu": round(rate / peak, 4) if peak else None,
        "tflops_per_s": round(rate / 1e12, 2),
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None,
        "first_step_s": round(first, 1), "device": name,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=(64, 128, 256))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--smoke", action="store_true", help="a tiny network; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rows = []
    for batch in (4,) if arguments.smoke else arguments.batches:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            model = TINY if arguments.smoke else XL
            rows.append(measure(model, batch, not arguments.eager, arguments.steps, device))
        except torch.OutOfMemoryError as error:
            rows.append({"batch_size": batch, "error": str(error)[:200]})
        print(json.dumps(rows[-1]), flush=True)
        if not arguments.smoke:
            report = {
                "command": "python benchmarks/gpu_train_torch.py",
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "rows": rows,
            }
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
