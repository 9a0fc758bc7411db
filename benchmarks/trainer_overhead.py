"""What the trainer adds to its bare jitted step, with a log line every 50 steps.

    python benchmarks/trainer_overhead.py    # writes benchmarks/results/trainer_overhead.json

The trainer is `diffjax.train.loop.train` on the digits, with its input, windows of metrics, log files and terminal; the
bare step is `make_train_step` jitted with a donated state, on one batch that lies on the device, with nothing fetched.
A machine's speed drifts by more than what is measured here, so the two take turns: while the trainer pauses to draw
samples, every 10 steps, the bare step takes its 10. The overhead is the median over windows of 50 steps, given with the
interval that holds the true median in 95 % of such measurements (by order statistics).
"""

import argparse
import io
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from scipy import stats

import diffjax as dj
from configs.common import digits
from diffjax.data import batches
from diffjax.runtime import set_up
from diffjax.train.loop import train
from diffjax.train.parts import prepare
from diffjax.train.state import init_state
from diffjax.train.step import make_train_step

RESULTS = Path(__file__).parent / "results" / "trainer_overhead.json"
WINDOW, TURN = 50, 10
# How many windows of each, some minutes.
WINDOWS = {"mlp": 40, "dit": 24, "unet": 10}


def config_of(name, windows):
    """The digits recipe of a network, for some windows, without what happens every thousands of steps."""
    config = digits("", model=name)
    config.num_steps, config.log_every, config.checkpoint_every = WINDOW * windows, WINDOW, 10**9
    config.sample_every = TURN
    return config


def bare_steps(name):
    """`run() -> milliseconds per step` over a turn of the bare step."""
    config, parts = prepare(config_of(name, 1))
    step = jax.jit(make_train_step(parts, config), donate_argnums=0)
    batch = jax.device_put(next(batches(parts.dataset.train, config.batch_size, seed=0)))
    state = jax.jit(lambda key: init_state(parts, key))(jax.random.key(0))

    def run():
        nonlocal state
        start = time.perf_counter()
        for _ in range(TURN):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        return 1e3 * (time.perf_counter() - start) / TURN

    return run


def windows_in_turn(config, run):
    """`[(other, trainer)]` milliseconds per step: each window of a training, but the first two, beside the mean of the
    turns of `run` in it."""
    other = []

    def preview(config, parts):
        def picture(params, step):
            other.append(run())
            return np.zeros((1, 1, 1), np.uint8)

        return picture

    with tempfile.TemporaryDirectory() as folder:
        train(config, folder, stream=io.StringIO(), preview=preview)
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    ours = [1e3 / row["steps_per_s"] for row in rows if "steps_per_s" in row]
    theirs = np.reshape(other, (len(ours), -1)).mean(axis=1)
    return list(zip(theirs.tolist(), ours, strict=True))[2:]


def summary(times):
    """Medians of the times, of the ratios trainer / other, and the interval of the latter."""
    ratios = np.sort([trainer / other for other, trainer in times])
    # The k-th smallest and largest of n values hold the true median between them unless fewer than k lie on one side.
    k = max(int(stats.binom.ppf(0.025, len(ratios), 0.5)), 1)
    other, trainer = np.median(times, axis=0)
    return {
        "pairs": len(times),
        "other_ms": round(float(other), 3),
        "trainer_ms": round(float(trainer), 3),
        "ratio": float(np.median(ratios)),
        "interval": [float(ratios[k - 1]), float(ratios[-k])],
    }


def measure(name, windows):
    """The row of one network."""
    row = summary(windows_in_turn(config_of(name, windows), bare_steps(name)))
    return {
        "pairs": row["pairs"],
        "bare_ms": row["other_ms"],
        "trainer_ms": row["trainer_ms"],
        "overhead": round(row["ratio"] - 1, 4),
        "interval": [round(end - 1, 4) for end in row["interval"]],
    }


def about(command):
    """What a report says of where it was made."""
    return {
        "command": command,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "diffjax": dj.__version__},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=tuple(WINDOWS))
    parser.add_argument("--smoke", action="store_true", help="some windows of the smallest; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.networks = ("mlp",)
    set_up()
    rows = {}
    for name in arguments.networks:
        rows[name] = measure(name, 4 if arguments.smoke else WINDOWS[name])
        print(name, json.dumps(rows[name]), flush=True)
    report = about("python benchmarks/trainer_overhead.py") | {"networks": rows}
    if not arguments.smoke:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
