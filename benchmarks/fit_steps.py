"""Fits samplers of 5 and 8 calls to digits64 on every process, and measures them from other noise.

    python benchmarks/fit_steps.py               # writes results/fit_steps.json, row by row
    python benchmarks/fit_steps.py --processes vp --kinds jump

The fit sees 128 starts of its own and the denoiser, no data: `jump` begins with the flow of the Gaussian it finds in
the trajectories, `plain` spends the first call there. Errors are those of `nfe_vs_error.py`, from its 256 starts.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import targets

import diffjax as dj

RESULTS = Path(__file__).parent / "results" / "fit_steps.json"
SCHEDULES = {"vp": dj.ddpm, "cosine": dj.squared_cosine, "edm": dj.EDM, "flow": dj.Flow}
STARTS = 128


def row(target, name: str, nfe: int, *, jump: bool) -> dict:
    """Errors of a fitted sampler and of what it began with, and the seconds that the fit took."""
    schedule, process = SCHEDULES[name](), targets.PROCESSES[name]()
    denoise = dj.Mixture(target.weights, target.means, target.covs).denoise
    wall, cpu = time.perf_counter(), time.process_time()
    steps = dj.fit_steps(denoise, nfe, schedule, (jax.random.key(1), (STARTS, target.dim)), jump=jump)
    took = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    x = jnp.asarray(targets.unit_noise(target) * steps.levels.sigma[0], jnp.float32)
    ends = jax.jit(lambda x: dj.sample(steps.solver, denoise, x, steps.levels))(x)
    found = targets.errors(target, ends, targets.ends(target, process))
    figures = found | {"before": steps.before, "held out": steps.after} | took
    return {"calls": steps.nfe} | {key: float(f"{value:.4g}") for key, value in figures.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--budgets", nargs="+", type=int, default=[5, 8])
    parser.add_argument("--kinds", nargs="+", default=["jump", "plain"], choices=["jump", "plain"])
    args = parser.parse_args()
    target = targets.digits64()
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if report.get("target") != target.digest:
        report = {"target": target.digest, "starts": STARTS, "jax": jax.__version__, "rows": {}}
    for kind in args.kinds:
        for name in args.processes:
            for nfe in args.budgets:
                found = row(target, name, nfe, jump=kind == "jump")
                report["rows"].setdefault(kind, {}).setdefault(name, {})[str(nfe)] = found
                targets.dump(report, RESULTS)
                print(kind, name, nfe, found, flush=True)


if __name__ == "__main__":
    main()
