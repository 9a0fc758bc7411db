"""Runs that are killed at random moments, or whose files are damaged, end with the bits of the undisturbed run."""

import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.errors import RESUME

ROOT = Path(__file__).parents[2]
STEPS = 100
EVERY = 10
SETTINGS = {
    "num_steps": STEPS,
    "checkpoint_every": EVERY,
    "log_every": 20,
    "augment": "('shift(pixels=1)',)",
    "batch_size": 16,
    "sample_every": 0,
    "model.width": 16,
    "model.depth": 1,
    "ema": "('power(std=0.1)', 'decay(0.99)')",
}


def command(workdir):
    flags = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    return ["train", f"--config={ROOT / 'configs' / 'digits_mlp.py'}", f"--workdir={workdir}", *flags]


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """`launch(workdir)` starts `diffjax train` in a process of its own, forked after the imports to save seconds."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["JAX_PLATFORMS"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffjax.train.loop", "diffjax.data", "diffjax.models", "sklearn.datasets"])

    def start(workdir, errors=os.devnull):
        # Its exit code is that of the command; and what a forked server runs must have a name there.
        code = f"import os, sys; os.dup2(os.open({str(errors)!r}, os.O_CREAT | os.O_WRONLY), 2); "
        code += f"from diffjax import cli; sys.exit(cli.main({command(workdir)!r}))"
        process = context.Process(target=exec, args=(code, {}))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def undisturbed(launch, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(launch, workdir)
    return content(workdir)


def finish(launch, workdir, **how):
    process = launch(workdir, **how)
    process.join(300)
    assert process.exitcode == 0


def saved(workdir):
    return open_checkpoints(workdir / "checkpoints").steps()


def content(workdir):
    """The last checkpoint: every leaf's bytes and the state of the data iterator."""
    checkpoints = open_checkpoints(workdir / "checkpoints")
    info = checkpoints.info(STEPS)
    leaves = {}
    for part in ("params", "ema/power(std=0.1)", "ema/decay(0.99)", "opt_state"):
        step, tree = checkpoints.restore_part(part)
        assert step == STEPS
        leaves |= {(part, *path): np.asarray(leaf).tobytes() for path, leaf in flat(tree)}
    assert len(leaves) + 1 == len(info["leaves"])
    return {"leaves": leaves, "checksums": info["leaves"], "iterator": info["iterator"]}


def flat(tree, path=()):
    for key, value in tree.items():
        yield from flat(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def kill_after(launch, workdir, step, delay):
    """Kills a run `delay` seconds after its checkpoint of `step`, while it trains on."""
    process = launch(workdir)
    deadline = time.monotonic() + 120
    while not any(s >= step for s in saved(workdir)):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()


def test_two_kills_and_a_damaged_checkpoint(launch, undisturbed, tmp_path):
    rng = random.Random(0)
    workdir = tmp_path / "killed"
    for step in (2 * EVERY, 5 * EVERY):
        # A save takes tens of milliseconds, so some of the kills land inside one.
        kill_after(launch, workdir, step, rng.uniform(0, 0.05))
    damaged = Path(shutil.copytree(workdir, tmp_path / "damaged"))
    assert max(saved(workdir)) < STEPS
    finish(launch, workdir)
    assert content(workdir) == undisturbed

    before, last = saved(damaged)[-2:]
    for file in (damaged / "checkpoints" / str(last) / "state").glob("*.bin"):
        file.write_bytes(bytes(file.stat().st_size))
    finish(launch, damaged, errors=tmp_path / "errors")
    assert f"checkpoints/{last} is damaged: leaf '" in (tmp_path / "errors").read_text()
    assert content(damaged) == undisturbed


@pytest.mark.faults
def test_a_hundred_kills(launch, undisturbed, tmp_path):
    rng = random.Random(1)
    start = time.monotonic()
    finish(launch, tmp_path / "timed")
    whole = time.monotonic() - start
    kills, rounds = 0, 0
    while kills < 100:
        workdir = tmp_path / f"round{rounds}"
        rounds += 1
        while not (workdir.exists() and STEPS in saved(workdir)):
            process = launch(workdir)
            # From before the folder is made to after the last step.
            process.join(rng.uniform(0.0, 1.2 * whole) if kills < 100 else 300)
            if process.is_alive():
                process.kill()
                kills += 1
            process.join()
        finish(launch, workdir)
        assert content(workdir) == undisturbed


@pytest.mark.faults
def test_twenty_preemptions(launch, undisturbed, tmp_path):
    rng = random.Random(2)
    preempted, rounds = 0, 0
    while preempted < 20:
        workdir = tmp_path / f"round{rounds}"
        rounds += 1
        for step in sorted(rng.sample(range(EVERY, STEPS - 2 * EVERY, EVERY), 3)):
            if any(s >= step for s in saved(workdir)):
                continue
            code = stop_after(launch, workdir, step, rng.uniform(0, 0.05))
            assert code in (RESUME, 0) and (code == 0) == (STEPS in saved(workdir))
            preempted += code == RESUME
        finish(launch, workdir)
        assert content(workdir) == undisturbed


def stop_after(launch, workdir, step, delay):
    """The exit code of a run that gets SIGTERM `delay` seconds after its checkpoint of `step` or a later one."""
    process = launch(workdir)
    deadline = time.monotonic() + 120
    while process.is_alive() and not any(s >= step for s in saved(workdir)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    process.terminate()
    process.join(120)
    return process.exitcode
