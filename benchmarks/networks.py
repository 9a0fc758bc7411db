"""Networks of published checkpoints beside PyTorch's, in one run: the same weights and inputs, float32, two threads.

    python benchmarks/networks.py --oracle .venv-oracle/bin/python    # writes benchmarks/results/networks.json
    python benchmarks/networks.py --oracle .venv-oracle/bin/python --quick    # tiny sizes; writes nothing

Forward, and forward with the gradients of all parameters for the sum of the output times a fixed array. PyTorch's side
(`networks_torch.py`) builds the class of diffusers or transformers with its own initial weights and noise on top of
each, and saves it; ours loads that folder, and both must agree on the output and on the norm of the gradient. PyTorch
is eager, with its own attention, and the faster of its two memory formats is taken for convolutions. Ours is compiled
with its layers one after another (`scan=False`), or as the loop over layers that is the default (`..._scanned`). Both
keep freed memory between steps. Rounds alternate between the two and each goes first in turn; a time is the median over
rounds of the median over steps, `ratio` the median over rounds of PyTorch's time over ours, `quartile` the lower
quartile of that.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

THREADS = 2
# XLA makes as many threads as there are cores it may run on.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:THREADS]))

# What the caller has set for either side would be no part of the record.
for name in [name for name in os.environ if name.startswith(("XLA_", "OMP_", "MKL_", "KMP_", "MALLOC_"))]:
    del os.environ[name]

from diffjax.runtime import keep_freed_memory  # noqa: E402

keep_freed_memory()
# The same, as the environment of a process says it.
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from processes import Peer  # noqa: E402

import diffjax as dj  # noqa: E402
from diffjax.convert import load  # noqa: E402

HERE = Path(__file__).parent
SD = dict(
    cross_attention_dim=768, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)  # fmt: skip
VAE = dict(down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1)
# The class, its config, and the inputs of the call: shapes of normal numbers, or (shape, end) of whole ones. `least` is
# the ratio that is asked for.
NETWORKS = {
    "dit_s": dict(
        kind="DiTTransformer2DModel", least=1.0,
        config=dict(num_attention_heads=6, attention_head_dim=64, num_layers=3, sample_size=32),
        inputs=dict(x=(8, 32, 32, 4), t=((8,), 1000), y=((8,), 1000)),
    ),
    "dit_s_scanned": dict(
        kind="DiTTransformer2DModel", scan=True,
        config=dict(num_attention_heads=6, attention_head_dim=64, num_layers=3, sample_size=32),
        inputs=dict(x=(8, 32, 32, 4), t=((8,), 1000), y=((8,), 1000)),
    ),
    "unet": dict(
        kind="UNet2DModel", least=0.75,
        config=dict(
            sample_size=32, block_out_channels=(64, 128, 128), layers_per_block=1,
            down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, add_attention=False,
        ),
        inputs=dict(x=(8, 32, 32, 3), t=((8,), 1000)),
    ),
    "unet_condition": dict(
        kind="UNet2DConditionModel", config=dict(SD, block_out_channels=(128, 256), attention_head_dim=8),
        inputs=dict(x=(2, 32, 32, 4), t=((2,), 1000), context=(2, 77, 768)),
    ),
    "vae_decode": dict(
        kind="AutoencoderKL", config=dict(VAE, block_out_channels=(64, 128, 256)), inputs=dict(z=(2, 32, 32, 4)),
    ),
    "clip_l_text": dict(
        kind="CLIPTextModel",
        config=dict(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, eos_token_id=49407
        ),
        inputs=dict(ids=((4, 77), 49407)),
    ),
}  # fmt: skip
SMALLER = {
    "dit_s": (dict(num_attention_heads=2, attention_head_dim=8, num_layers=2), dict(x=(2, 8, 8, 4))),
    "dit_s_scanned": (dict(num_attention_heads=2, attention_head_dim=8, num_layers=2), dict(x=(2, 8, 8, 4))),
    "unet": (dict(block_out_channels=(32, 32, 32)), dict(x=(2, 8, 8, 3))),
    "unet_condition": (dict(block_out_channels=(32, 32)), dict(x=(2, 8, 8, 4))),
    "vae_decode": (dict(block_out_channels=(32, 32, 32)), dict(z=(2, 8, 8, 4))),
    "clip_l_text": (dict(hidden_size=24, intermediate_size=48, num_hidden_layers=2), dict(ids=((2, 77), 49407))),
}


def quick(name):
    config, inputs = SMALLER[name]
    setting = NETWORKS[name]
    batch = {k: ((2,), v[1]) if v[0] == (8,) else v for k, v in setting["inputs"].items()}
    return setting | dict(config=setting["config"] | config, inputs=batch | inputs)


def drawn(inputs):
    rng = np.random.default_rng(0)
    whole = lambda spec: isinstance(spec[0], tuple)
    return {
        k: rng.integers(0, spec[1], spec[0]).astype(np.int32) if whole(spec) else rng.standard_normal(spec, np.float32)
        for k, spec in inputs.items()
    }


def call(model, params, given):
    """The first output, as an array."""
    kind = model.config.get("_class_name") or model.config["architectures"][0]
    if kind == "AutoencoderKL":
        return model.apply(params, given["z"], method="decode")
    if kind == "CLIPTextModel":
        return model.apply(params, given["ids"]).last
    rest = {k: v for k, v in given.items() if k not in "xt"}
    return model.apply(params, given["x"], given["t"], **rest)


class Ours:
    """Two compiled functions on one input."""

    def __init__(self, folder, given, scan):
        model, self.params = load(folder, scan=scan)
        self.given = jax.device_put(given)
        self.output = np.asarray(call(model, self.params, self.given))
        probe = jnp.asarray(np.random.default_rng(1).standard_normal(self.output.shape, np.float32))
        forward = lambda params, given: call(model, params, given)
        loss = lambda params, given: jnp.sum(forward(params, given) * probe)
        start = time.perf_counter()
        lowered = {"forward": jax.jit(forward), "both": jax.jit(jax.grad(loss))}
        self.runs = {k: f.lower(self.params, self.given).compile() for k, f in lowered.items()}
        self.compile_s = time.perf_counter() - start
        gradients = jax.tree.leaves(self.runs["both"](self.params, self.given))
        self.norm = float(np.sqrt(sum(np.sum(np.square(g), dtype=np.float64) for g in gradients)))

    def time(self, what, steps):
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            jax.block_until_ready(self.runs[what](self.params, self.given))
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)


def measure(setting, peer, rounds, steps):
    """The row of one network."""
    given = drawn(setting["inputs"])
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/inputs.npz", **given)
        answer = peer.ask({"folder": folder, "kind": setting["kind"], "config": setting["config"]})
        ours = Ours(f"{folder}/network", given, scan=setting.get("scan", False))
        apart = float(np.max(np.abs(np.load(f"{folder}/output.npy") - ours.output)))
    if apart > 1e-3 * np.std(ours.output):
        raise RuntimeError(f"{setting['kind']}: the networks differ, outputs are {apart:.2g} apart")
    if abs(ours.norm / answer["norm"] - 1) > 1e-3:
        raise RuntimeError(f"{setting['kind']}: norms of gradients differ, {ours.norm:.6g} and {answer['norm']:.6g}")
    row = {
        "class": setting["kind"], "config": setting["config"], "inputs": setting["inputs"],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(ours.params)), "torch": answer["torch"],
        "format": answer["format"], "outputs_apart": float(f"{apart:.2g}"),
        "compile_s": round(ours.compile_s, 2),
    }  # fmt: skip
    for what in ("forward", "both"):
        ask = lambda steps, what=what: peer.ask({"what": what, "steps": steps})["ms"]
        ours.time(what, 2), ask(2)
        pairs = []
        for i in range(rounds):
            first = ask(steps) if i % 2 else None
            pairs.append((ours.time(what, steps), first or ask(steps)))
        ratios = [b / a for a, b in pairs]
        row[what] = {
            "diffjax_ms": round(statistics.median(a for a, _ in pairs), 2),
            "torch_ms": round(statistics.median(b for _, b in pairs), 2),
            "ratio": round(statistics.median(ratios), 3), "quartile": round(float(np.quantile(ratios, 0.25)), 3),
            "ratios": [round(r, 3) for r in ratios],
        }  # fmt: skip
    least = setting.get("least")
    met = lambda: all(row[what]["ratio"] >= least for what in ("forward", "both"))
    return row | ({"least": least, "met": met()} if least else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", required=True, help="a Python with torch, diffusers and transformers")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--quick", action="store_true", help="tiny networks; writes nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "networks.json")
    arguments = parser.parse_args()
    given = {"HF_HUB_OFFLINE": "1", **KEPT}
    peer, rows = Peer(arguments.oracle, str(HERE / "networks_torch.py"), str(THREADS), environment=given), {}
    for name in arguments.networks:
        setting = quick(name) if arguments.quick else NETWORKS[name]
        rows[name] = measure(setting, peer, arguments.rounds, arguments.steps)
        print(name, json.dumps(rows[name]), flush=True)
    peer.close()
    report = {
        "command": "python benchmarks/networks.py --oracle .venv-oracle/bin/python"
        f" --rounds {arguments.rounds} --steps {arguments.steps}",
        "device": f"{jax.devices()[0].device_kind}, {THREADS} of {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "diffjax": dj.__version__},
        "networks": rows,
    }
    if not arguments.quick:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
