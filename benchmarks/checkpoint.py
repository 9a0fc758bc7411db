"""How long a save of a large state keeps the training step waiting, and what it costs besides.

    python benchmarks/checkpoint.py --gib=2 --folder=runs/checkpoint_benchmark

The state is fp32 arrays of 64 MiB. A "step" updates every number of it in place (the state is donated), so that it is
as hard on memory as a training step and much shorter. The time of `save` is what the step waits for; the step after it
is compared with the others, because work that a save puts off into the next step would count as well; and so are the
steps during the write in the background, which shares cores and memory with them. With `--gib=G` the process needs
2 G GiB of memory: the state, and the host's copy of it, which is asked for before the first step.

The result is added to `benchmarks/results/checkpoint.json`, one entry for each size.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from diffjax.train.checkpoint import open_checkpoints, versions

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"
PIECE = 64 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the state")
    parser.add_argument("--saves", type=int, default=3, help="saves to measure, after one that is not")
    parser.add_argument("--folder", default="runs/checkpoint_benchmark", help="where to write; emptied")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    try:
        found = measure(arguments.gib, arguments.saves, arguments.folder)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[f"{arguments.gib:g}"] = found
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1))


def measure(gib: float, saves: int, folder: str) -> dict:
    """What a save of `gib` GiB costs: seconds, as medians over the saves."""
    count = max(round(gib * 2**30 / PIECE), 1)
    state = [jnp.full(PIECE // 4, float(i)) for i in range(count)]
    step = jax.jit(lambda leaves: [0.999 * leaf + 0.001 for leaf in leaves], donate_argnums=0)
    step = step.lower(state).compile()
    checkpoints = open_checkpoints(folder)
    start = time.perf_counter()
    checkpoints.reserve(state)
    # Training compiles its step meanwhile; here there is nothing else to do than to wait.
    checkpoints._staging._filling.join()
    reserved = time.perf_counter() - start
    rows = []
    for at in range(saves + 1):
        plain = []
        for _ in range(5):
            state, seconds = timed(step, state)
            plain.append(seconds)
        start = time.perf_counter()
        checkpoints.save(at + 1, state)
        blocked = time.perf_counter() - start
        state, after = timed(step, state)
        during, whole = [], time.perf_counter()
        while checkpoints._manager.is_saving_in_progress():
            state, seconds = timed(step, state)
            during.append(seconds)
        checkpoints.wait()
        rows.append(
            (blocked, after - statistics.median(plain), statistics.median(plain), during, whole, time.perf_counter())
        )
    checkpoints.close()
    rows = rows[1:]
    usual = statistics.median(row[2] for row in rows)
    median = lambda values: round(statistics.median(values), 4)
    blocked = statistics.median(row[0] for row in rows)
    return {
        "state_gib": round(count * PIECE / 2**30, 3),
        "blocked_s": round(blocked, 4),
        "blocked_share_at_one_save_a_minute": round(blocked / 60, 5),
        "copy_gib_per_s": round(count * PIECE / 2**30 / blocked, 2),
        "step_after_longer_by_s": median(row[1] for row in rows),
        "write_in_background_s": median(row[5] - row[4] for row in rows),
        "step_s": round(usual, 4),
        "step_during_write_s": median(statistics.fmean(row[3]) if row[3] else usual for row in rows),
        "reserve_once_s": round(reserved, 2),
        "saves": len(rows),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {jax.devices()[0].platform}",
        "load_average_at_the_end": round(os.getloadavg()[0], 1),
        "versions": versions(),
    }


def timed(step, state):
    """`(state, seconds)` of one step."""
    start = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return state, time.perf_counter() - start


if __name__ == "__main__":
    main()
