"""How much host memory `diffjax.convert.load` and `save` take besides the parameters.

    python benchmarks/load_memory.py --gb=4

A DiT of this size, whose float32 tensors are drawn one at a time as they are written, is loaded in a process of its own
on the CPU, where the parameters themselves lie in host memory; it then saves them again. `VmHWM` of /proc/self/status
is the most that was ever resident (reset before each part where the kernel allows), `RssAnon` what is at the end,
without the pages of files. What counts is the peak without what was there before and without the bytes of the
parameters; it should stay below the largest parameter, a stack of layers.

The result is written to `benchmarks/results/load_memory.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "load_memory.json"
HEAD, PIECE = 72, 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=4.0, help="size of the checkpoint, at least 0.1")
    parser.add_argument("--folder", help="where the checkpoint is written for a while")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments.gb, folder)
    found["command"] = f"python benchmarks/load_memory.py --gb={arguments.gb:g}"
    found["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, cpu"
    found["versions"] = {name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))


def config_of(gb: float) -> dict:
    """A DiT of about `gb` GB of float32 parameters: 28 layers, as wide as that takes."""
    # A layer has 18 width**2 parameters and embeds 1000 labels.
    heads = round((gb * 1e9 / 4 / 28 / 18) ** 0.5 / HEAD)
    return {"_class_name": "DiTTransformer2DModel", "num_attention_heads": heads, "attention_head_dim": HEAD}


def measure(gb: float, folder: str) -> dict:
    """Writes the checkpoint, and loads and saves it in a process of its own; what that took, in MB and seconds."""
    write(config_of(gb), Path(folder, "source"))
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    source = "import sys; from load_memory import child; child(*sys.argv[1:])"
    argv = [sys.executable, "-c", source, f"{folder}/source", f"{folder}/again"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(argv, env=environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(config: dict, folder: Path) -> None:
    """A checkpoint of random numbers, the same few for all tensors, one tensor in memory at a time."""
    import jax

    from diffjax.convert.weights.folders.save import write_folder
    from diffjax.convert.weights.places.layout import layout
    from diffjax.convert.weights.tensors import Source
    from diffjax.models import from_config
    from diffjax.nn.functional import names_of

    numbers = np.random.default_rng(0).normal(size=PIECE).astype(np.float32)
    model = from_config(config)
    places = layout(names_of(jax.eval_shape(model.init, jax.random.key(0))))
    draw = lambda shape: Source(numbers.dtype, shape, lambda: np.resize(numbers, shape))
    write_folder(folder, model.config, {key: draw(p.shape) for p in places.values() for key in p.keys})


def child(source: str, target: str) -> None:
    """Loads and saves, and prints what it took."""
    import jax

    from diffjax.convert import load, save

    jax.block_until_ready(jax.device_put(np.zeros(8)))
    reset()
    before, start = memory()["VmRSS"], time.perf_counter()
    model, params = load(source)
    load_s, after = time.perf_counter() - start, memory()
    leaves = jax.tree.leaves(params)
    size, largest = sum(leaf.nbytes for leaf in leaves) / 1e6, max(leaf.nbytes for leaf in leaves) / 1e6
    resets = reset()
    held, start = memory()["VmRSS"], time.perf_counter()
    save(model, params, target)
    save_s = time.perf_counter() - start
    at_save = memory()
    found = dict(
        parameters=sum(leaf.size for leaf in leaves),
        parameters_mb=size,
        largest_parameter_mb=largest,
        largest_tensor_mb=max(leaf.nbytes / (leaf.shape[0] if leaf.ndim > 2 else 1) for leaf in leaves) / 1e6,
        before_mb=before,
        load_peak_mb=after["VmHWM"],
        load_anonymous_at_end_mb=after["RssAnon"],
        load_above_parameters_mb=after["VmHWM"] - before - size,
        load_s=load_s,
        save_above_parameters_mb=at_save["VmHWM"] - held if resets else None,
        save_s=save_s,
    )
    print(json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in found.items()}))


def memory() -> dict[str, float]:
    """VmHWM, VmRSS and RssAnon of this process in MB."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(rows[name].split()[0]) * 1024 / 1e6 for name in ("VmHWM", "VmRSS", "RssAnon")}


def reset() -> bool:
    """Sets VmHWM to what is resident now; whether the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
