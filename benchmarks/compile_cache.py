"""How long a training takes from its start to its first step, with an empty compile cache and with its own from before.

    python benchmarks/compile_cache.py    # writes benchmarks/results/compile_cache.json

Every start is a process of its own, from the command to the first row of metrics.jsonl. `phases` says where the time
went, in seconds: `imports` until the trainer is there, `prepare` (checks, traces of the network), `first_state`
(compiled and computed), `compile_step` (traced, lowered, compiled or read from the cache), `rest` (the first step).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "compile_cache.json"
CONFIGS = ("digits_unet", "digits_dit", "digits_mlp")

# Runs the command line with a clock around the parts of the trainer.
CHILD = """
import json, sys, time
start = float(sys.argv[1])
phases = {}
from diffjax import cli
from diffjax.train import loop, session
phases["imports"] = time.time() - start
def timed(name, f):
    def run(*args, **kwargs):
        begin = time.time()
        out = f(*args, **kwargs)
        phases[name] = phases.get(name, 0.0) + time.time() - begin
        return out
    return run
for module, name in ((loop, "prepare"), (session, "first_state"), (session, "compile_step")):
    setattr(module, name, timed(name, getattr(module, name)))
code = cli.main(sys.argv[3:])
with open(sys.argv[2], "w") as stream:
    json.dump(phases, stream)
sys.exit(code)
"""


def start(name, cache):
    """Seconds from the command to the first row, and by phase."""
    with tempfile.TemporaryDirectory() as folder:
        run, phases = os.path.join(folder, "run"), os.path.join(folder, "phases.json")
        flags = ["train", f"--config=configs/{name}.py", f"--workdir={run}"]
        flags += ["--config.stop_at=1", "--config.log_every=1", "--config.sample_every=0"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        begin = time.time()
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, repr(begin), phases, *flags],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        rows = Path(run) / "metrics.jsonl"
        while process.poll() is None and not (rows.exists() and rows.stat().st_size):
            time.sleep(0.005)
        seconds = time.time() - begin
        _, errors = process.communicate(timeout=600)
        if process.returncode:
            raise RuntimeError(errors.decode()[-2000:])
        found = json.loads(Path(phases).read_text())
    return seconds, found | {"rest": seconds - sum(found.values())}


def measure(name, repeats):
    """The row of one config: `repeats` cold starts, each followed by a warm one."""
    cold, warm = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(start(name, cache))
            warm.append(start(name, cache))
    middle = lambda runs: sorted(runs, key=lambda run: run[0])[len(runs) // 2]
    rounded = lambda phases: {key: round(value, 2) for key, value in phases.items()}
    return {
        "cold_s": round(middle(cold)[0], 2),
        "warm_s": round(middle(warm)[0], 2),
        "ratio": round(statistics.median(w[0] / c[0] for c, w in zip(cold, warm, strict=True)), 3),
        "phases_cold": rounded(middle(cold)[1]),
        "phases_warm": rounded(middle(warm)[1]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="*", default=CONFIGS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="one start of each kind of the smallest; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.configs, arguments.repeats = ("digits_mlp",), 1
    from importlib import metadata

    rows = {}
    for name in arguments.configs:
        rows[name] = measure(name, arguments.repeats)
        print(name, json.dumps(rows[name]), flush=True)
    report = {
        "command": "python benchmarks/compile_cache.py",
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("jax", "diffjax")},
        "configs": rows,
    }
    if not arguments.smoke:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
