"""What a sampler costs beside the network: compilation, time per step, host work, retraces.

    python benchmarks/overhead.py [--oracle .venv-oracle/bin/python]

1,000 points in two dimensions, a network of one product, so that nothing but the sampler is timed. With an environment
that has diffusers and k-diffusion, their samplers run the same problem in the same run; without it, ours alone.
Writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "overhead.json"
LENGTHS = (10, 50, 250, 1000)

PEERS = """
import json, statistics, sys, time, types
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LMSDiscreteScheduler, UniPCMultistepScheduler

for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets"):
    sys.modules.setdefault(name, types.ModuleType(name))
torch.set_num_threads(1)
x = torch.randn(1000, 2)

def timed(run, repeats=5):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)

out = {}
for make in (DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, LMSDiscreteScheduler):
    def run():
        scheduler = make()
        scheduler.set_timesteps(50)
        state = x.clone()
        for t in scheduler.timesteps:
            state = scheduler.step(0.1 * scheduler.scale_model_input(state, t), t, state).prev_sample
    out["diffusers " + make.__name__] = timed(run)
import importlib.util, importlib.metadata
spec = [f for f in importlib.metadata.files("k-diffusion") if str(f).endswith("k_diffusion/sampling.py")][0].locate()
package = types.ModuleType("k_diffusion"); package.__path__ = [str(spec.parent)]; sys.modules["k_diffusion"] = package
utils = types.ModuleType("k_diffusion.utils"); sys.modules["k_diffusion.utils"] = utils; package.utils = utils
utils.append_dims = lambda a, n: a[(...,) + (None,) * (n - a.ndim)]
loader = importlib.util.spec_from_file_location("k_diffusion.sampling", spec)
k = importlib.util.module_from_spec(loader); sys.modules["k_diffusion.sampling"] = k; loader.loader.exec_module(k)
sigmas = k.get_sigmas_karras(50, 0.002, 80.0)
for name in ("sample_euler", "sample_dpmpp_2m"):
    run = lambda: getattr(k, name)(lambda y, s, **_: 0.1 * y, 80 * x, sigmas, disable=True)
    out["k-diffusion " + name] = timed(run)
print(json.dumps(out))
"""


def timed(run, repeats: int = 20) -> float:
    """Median milliseconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def ours() -> dict:
    """Compile seconds and run milliseconds of every solver and length; callbacks and traces of the programs."""
    import jax
    import jax.numpy as jnp

    import diffjax as dj

    x = 80 * jax.random.normal(jax.random.key(0), (1000, 2))
    network = lambda x, level: dj.Prediction(0.1 * x, (x - 0.1 * level.alpha * x) / level.sigma)
    solvers = {
        "ddim": dj.ddim(),
        "dpmpp_2m": dj.dpmpp_2m(),
        "unipc(3)": dj.unipc(3),
        "heun": dj.heun(),
        "adams": dj.adams(),
        "lms": dj.lms(),
        "sde_adams": dj.sde_adams(),
    }
    out = {}
    for name, solver in solvers.items():
        row, traces = {}, []

        def program(x, levels, key, solver=solver, traces=traces):
            traces.append(1)
            return dj.sample(solver, network, x, levels, key)

        for n in LENGTHS:
            levels = dj.Level(*(jnp.asarray(field) for field in dj.karras(dj.EDM(), n)))
            start = time.perf_counter()
            compiled = jax.jit(program).lower(x, levels, jax.random.key(0)).compile()
            row[str(n)] = {"compile_s": round(time.perf_counter() - start, 2)}
            text = compiled.as_text()
            row[str(n)]["host_calls"] = text.count("callback") + text.count("infeed") + text.count("outfeed")
            run = lambda compiled=compiled, levels=levels: jax.block_until_ready(compiled(x, levels, jax.random.key(0)))
            run()
            row[str(n)]["ms"] = round(timed(run, 5 if n > 100 else 20), 3)
        jitted, before = jax.jit(program), len(traces)
        for schedule in (dj.EDM(), dj.VP(), dj.Flow()):
            for spacing in (dj.karras, dj.asinh, dj.exponential):
                jitted(x, spacing(schedule, 12), jax.random.key(0))
        out[name] = row | {"traces_of_9_grids": len(traces) - before}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", default=".venv-oracle/bin/python", help="a Python with diffusers and k-diffusion")
    args = parser.parse_args()
    import jax

    results = {
        "command": "python benchmarks/overhead.py",
        "machine": f"{platform.machine()}, {jax.default_backend()}",
        "jax": jax.__version__,
        "ours": ours(),
    }
    if Path(args.oracle).exists():
        done = subprocess.run([args.oracle, "-W", "ignore", "-c", PEERS], capture_output=True, text=True, check=True)
        results["peers_ms_50_steps"] = json.loads(done.stdout.strip().splitlines()[-1])
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, row in results["ours"].items():
        cells = "  ".join(f"{n}: {row[str(n)]['compile_s']} s, {row[str(n)]['ms']} ms" for n in LENGTHS)
        print(f"{name:12} {cells}  traces {row['traces_of_9_grids']}  host calls {row['50']['host_calls']}")
    for name, ms in results.get("peers_ms_50_steps", {}).items():
        print(f"{name:44} {ms:.1f} ms")


if __name__ == "__main__":
    main()
