"""What the trainer adds to its bare jitted step, with a log line every 50 steps.

    python benchmarks/trainer_overhead.py    # writes benchmarks/results/trainer_overhead.json

The trainer is `diffjax.train.loop.train` on the digits, with its input, windows of metrics, log files and terminal; the
bare step is `make_train_step` jitted with a donated state, on one batch that lies on the device, with nothing fetched.
Rounds alternate between the two; a time is the median over rounds and windows of 50 steps, but a run's first.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax

import diffjax as dj
from configs.common import digits
from diffjax.data import batches
from diffjax.runtime import set_up
from diffjax.train.loop import train
from diffjax.train.parts import prepare
from diffjax.train.state import init_state
from diffjax.train.step import make_train_step

RESULTS = Path(__file__).parent / "results" / "trainer_overhead.json"
WINDOW = 50


def config_of(name, windows):
    """The digits recipe of a network, for some windows, without what happens every thousands of steps."""
    config = digits("", model=name)
    config.num_steps, config.log_every, config.checkpoint_every = WINDOW * windows, WINDOW, 10**9
    config.sample_every = 0
    return config


def trained(name, windows):
    """Milliseconds per step of every window of a training, but the first."""
    with tempfile.TemporaryDirectory() as folder:
        train(config_of(name, windows), folder, stream=io.StringIO())
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [1e3 / row["steps_per_s"] for row in rows if "steps_per_s" in row][1:]


def bare_step(name, windows):
    """`run() -> milliseconds per step of every window` of the bare step."""
    config, parts = prepare(config_of(name, windows))
    step = jax.jit(make_train_step(parts, config), donate_argnums=0)
    batch = jax.device_put(next(batches(parts.dataset.train, config.batch_size, seed=0)))
    state = jax.jit(lambda key: init_state(parts, key))(jax.random.key(0))

    def run():
        nonlocal state
        times = []
        for _ in range(windows):
            start = time.perf_counter()
            for _ in range(WINDOW):
                state, _ = step(state, batch)
            jax.block_until_ready(state)
            times.append(1e3 * (time.perf_counter() - start) / WINDOW)
        return times[1:]

    return run


def measure(name, rounds, windows):
    """The row of one network."""
    run = bare_step(name, windows)
    run()
    pairs = [(run(), trained(name, windows)) for _ in range(rounds)]
    bare = statistics.median(t for round, _ in pairs for t in round)
    ours = statistics.median(t for _, round in pairs for t in round)
    return {"bare_ms": round(bare, 3), "trainer_ms": round(ours, 3), "overhead": round(ours / bare - 1, 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=("unet", "dit", "mlp"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="one round of the smallest; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.networks, arguments.rounds, arguments.windows = ("mlp",), 1, 2
    set_up()
    rows = {}
    for name in arguments.networks:
        rows[name] = measure(name, arguments.rounds, arguments.windows)
        print(name, json.dumps(rows[name]), flush=True)
    report = {
        "command": "python benchmarks/trainer_overhead.py",
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "diffjax": dj.__version__},
        "networks": rows,
    }
    if not arguments.smoke:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
