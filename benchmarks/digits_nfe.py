"""The trained digits network: sample quality against network calls, our samplers beside the peers', one network.

    diffjax train --config=configs/digits.py --workdir=runs/digits
    python benchmarks/digits_nfe.py --workdir=runs/digits      # writes benchmarks/results/digits_nfe.json

The peers run in the environment `--oracle` and call the network of this process through a pipe; where it is missing,
their rows in the file are kept. All start from the
same noise and labels and end at sigma = 0, without guidance, x0 clipped to the data's range as in `diffjax eval`.
`fd_relu` is that of docs/digits.md; `distance` is the median over samples of the root mean square distance to where
the network's own probability flow ends (Heun in 119 calls), over sigma_data.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import ours
import targets

import diffjax as dj
from diffjax import sampling
from diffjax.pipelines import judge as judges
from diffjax.pipelines.evaluate import stratified
from diffjax.pipelines.sampler import guided_denoiser, settings_for
from diffjax.train.state import load_run

HERE = Path(__file__).parent
BUDGETS = (5, 8, 10, 20)
S_MIN, S_MAX = 0.002, 20.0  # of configs/digits.py
REFERENCE_STEPS = 60
PEERS = (
    "diffusers EDM DPM++2M karras",
    "diffusers EDM DPM++2M exponential",
    "diffusers EDM DPM++3M karras",
    "diffusers DPM++2M lu",
    "diffusers UniPC-3 karras",
    "diffusers UniPC-3 exponential",
    "diffusers DEIS-3 karras",
    "diffusers DEIS-3 exponential",
    "k-diffusion Heun karras",
    "k-diffusion LMS karras",
    "k-diffusion DPM++2M SDE eta=0 karras",
)


class Network:
    """The run's denoiser in batches of one size; `x0(y, s)` in Karras' coordinates, and samples of our solvers."""

    def __init__(self, run, labels, batch=128):
        self.run, self.labels, self.batch, self.programs = run, labels, batch, {}
        self.shape = (len(labels), *run.dataset.shape)
        settings = settings_for(run, guidance=1.0)
        self.make = lambda params, y: guided_denoiser(
            run, lambda x, t, y: run.model.apply(params, x, t, y), y, settings
        )
        self.plain = jax.jit(lambda params, y, x, level: self.make(params, y)(x, level).x0)

    def batches(self, call, x):
        """`call(x, labels)` on batches of `batch`, the last one padded."""
        pad = -len(x) % self.batch
        xs, ys = (np.concatenate([a, a[:pad]]) for a in (np.asarray(x, np.float32), self.labels))
        out = [call(xs[i : i + self.batch], ys[i : i + self.batch]) for i in range(0, len(xs), self.batch)]
        return np.concatenate([np.asarray(a, np.float64) for a in out])[: len(x)]

    def x0(self, y, s):
        level = dj.Level(*(jnp.asarray(a, jnp.float32) for a in self.run.schedule(s)))
        return self.batches(lambda x, labels: self.plain(self.run.params, labels, x, level), y)

    def sample(self, solver, levels, unit, length):
        """Ends of a run from `sigma * unit`; grids are padded to `length`, so that a solver is compiled once."""
        if (solver, length) not in self.programs:
            run = lambda params, y, x, levels: sampling.sample(solver, self.make(params, y), x, levels)
            self.programs[solver, length] = jax.jit(run)
        program = self.programs[solver, length]
        levels = dj.Level(*(np.pad(a, (0, length + 1 - len(a)), mode="edge") for a in levels))
        padded = dj.Level(*(jnp.asarray(a, jnp.float32) for a in levels))
        return self.batches(lambda x, y: program(self.run.params, y, x, padded), unit * levels.sigma[0])


class Oracle:
    """The peers' process, which asks this one for denoised images."""

    def __init__(self, python: Path):
        command = [python, HERE / "peers.py", "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def sample(self, peer: str, nfe: int, unit, network: Network) -> tuple[np.ndarray, int]:
        """Ends of a peer's run from `s_max * unit`, and how often it called the network."""
        shape = unit.shape
        job = {"peer": peer, "nfe": nfe, "shape": [shape[0], int(np.prod(shape[1:]))], "s_min": S_MIN, "s_max": S_MAX}
        self._write(json.dumps(job).encode() + b"\n" + np.asarray(unit, np.float64).tobytes())
        while True:
            message = json.loads(self.process.stdout.readline())
            array = np.frombuffer(self.process.stdout.read(8 * unit.size), np.float64).reshape(shape)
            if "calls" in message:
                return array, message["calls"]
            self._write(network.x0(array, message["s"]).tobytes())

    def _write(self, data: bytes):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def methods(network: Network) -> dict:
    """`{name: nfe -> (solver, levels)}`: ours on the run's schedule and range."""
    schedule = dj.EDM(S_MIN, S_MAX)  # the run's schedule between these ends
    karras = lambda n: dj.karras(schedule, n)
    out = {}
    exponential = lambda n: dj.exponential(schedule, n)
    fixed = [("ddim", karras), ("dpmpp_2m", karras), ("heun", karras), ("deis", exponential), ("unipc", exponential)]
    for name, grid in fixed:
        made = ours.solver(name, *([3] if name == "unipc" else []))
        most = lambda nfe, made=made: max([n for n in range(1, nfe + 1) if made.nfe(n) <= nfe], default=1)
        label = f"{name} {'karras' if grid is karras else 'exponential'}"
        out[label] = lambda nfe, made=made, grid=grid, most=most: (made, grid(most(nfe)))
    mean, std = data_statistics(network.run)
    stats = dj.Gaussian(mean, std**2)
    out["recommend"] = lambda nfe: sampling.recommend(schedule, nfe)
    out["recommend, variance"] = lambda nfe: sampling.recommend(schedule, nfe, stats=stats)
    return out


def data_statistics(run) -> tuple[np.ndarray, float]:
    """Mean of the training images, in their shape, and the root mean variance of a pixel."""
    images = np.stack([run.dataset.train[i]["image"] for i in range(len(run.dataset.train))]).astype(np.float64)
    return images.mean(0), float(np.sqrt(images.var(0).mean()))


def table(report: dict) -> list[str]:
    """FD-relu, with the distance to the network's own flow in brackets, as Markdown; ours first."""
    lines = ["", "| sampler | " + " | ".join(f"NFE {n}" for n in BUDGETS) + " |", "|" + "---|" * (len(BUDGETS) + 1)]
    rows = {name: row for name, row in report["rows"].items() if name != "exact flow"}
    for name in sorted(rows, key=lambda name: (name in PEERS, rows[name][str(BUDGETS[2])][0])):
        cells = [f"{rows[name][str(n)][0]:.3f} ({rows[name][str(n)][2]:.2g})" for n in BUDGETS]
        lines.append("| " + " | ".join([name if name in PEERS else f"ours: {name}", *cells]) + " |")
    exact = next(iter(report["rows"]["exact flow"].values()))[0]
    floor, spread = report["floor"]
    note = f"FD-relu, and in brackets the distance. The network's own flow, followed exactly, has FD-relu {exact:.3f};"
    return [*lines, "", note, f"the halves floor is {floor:.3f} ± {spread:.3f}.", ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=HERE.parent / "runs" / "digits")
    parser.add_argument("--oracle", type=Path, default=HERE.parent / ".venv-oracle" / "bin" / "python")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "digits_nfe.json")
    parser.add_argument("--methods", default="", help="only those with this in their name; other rows are kept")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmark.md", help="gets the table")
    arguments = parser.parse_args()
    run = load_run(os.fspath(arguments.workdir))
    labels = stratified(run.dataset, len(run.dataset.heldout))
    network, judge = Network(run, labels), judges.judge_of(run)
    unit = np.random.default_rng(0).standard_normal(network.shape)
    sigma_data = data_statistics(run)[1]
    grid = dj.karras(run.schedule, REFERENCE_STEPS, s_min=S_MIN, s_max=S_MAX)
    exact = network.sample(ours.solver("heun", "alpha"), grid, unit, REFERENCE_STEPS)
    kept = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else {}
    wanted = lambda name: arguments.methods in name and (name not in PEERS or arguments.oracle.exists())
    rows = {name: row for name, row in kept.items() if not wanted(name)}

    def judged(name, nfe, x, calls):
        found = judges.brief(judge, np.asarray(run.dataset.to_pixels(x)), labels)
        away = np.sqrt(np.mean((x - exact) ** 2, axis=(1, 2, 3))) / sigma_data
        values = [found["fd_relu"], found["fd_tanh"], float(np.median(away)), calls]
        rows.setdefault(name, {})[nfe] = [round(value, 5) for value in values]
        print(name, nfe, *rows[name][nfe], flush=True)

    judged("exact flow", 2 * REFERENCE_STEPS - 1, exact, 2 * REFERENCE_STEPS - 1)
    for name, plan in ((name, plan) for name, plan in methods(network).items() if wanted(name)):
        for nfe in BUDGETS:
            solver, levels = plan(nfe)
            x = network.sample(solver, levels, unit, 1 + max(BUDGETS))
            judged(name, nfe, x, solver.nfe(len(levels.t) - 1))
    if arguments.oracle.exists():
        oracle = Oracle(arguments.oracle)
        for name in filter(wanted, PEERS):
            for nfe in BUDGETS:
                judged(name, nfe, *oracle.sample(name, nfe, unit, network))
        oracle.close()
    report = {
        "command": "python benchmarks/digits_nfe.py",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {time.process_time():.0f} s of CPU",
        "versions": {name: metadata.version(name) for name in ("diffjax", "jax", "numpy", "scikit-learn")},
        "columns": ["fd_relu", "fd_tanh", "distance", "calls"],
        "floor": judge.floor,
        "rows": rows,
    }
    report = json.loads(json.dumps(report))
    targets.dump(report, arguments.out)
    if arguments.page.exists():
        targets.write_between(arguments.page, "digits", table(report))


if __name__ == "__main__":
    main()
