"""Runs of two processes of two devices each: equal to one process, and stopped and resumed together."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.errors import RESUME

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "batch_size": 16,
    "model.width": 16,
    "model.depth": 1,
    "optim.warmup": 0,
    "checkpoint_every": 20,
    "log_every": 10,
    "sample_every": 0,
    "ema": "('power(std=0.1)',)",
}


class Processes:
    """`diffjax train` in `count` processes with `4 // count` devices each."""

    def __init__(self, workdir, count=2, each=None, **settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # Not what pytest itself runs with, but what decides the numbers must be the same for all.
        environ = os.environ | {"JAX_NUM_CPU_DEVICES": str(4 // count), "JAX_PLATFORMS": "cpu"}
        self.logs = [Path(f"{workdir}.{i}.log") for i in range(count)]
        self.all = []
        for i, log in enumerate(self.logs):
            mine = SETTINGS | settings | ((each or {}).get(i, {}))
            flags = [f"--config.{key}={value}" for key, value in mine.items()]
            joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={i}"]
            config = f"--config={ROOT / 'configs' / 'digits_mlp.py'}"
            command = [sys.executable, "-m", "diffjax", "train", config, f"--workdir={workdir}", *flags]
            command += joined if count > 1 else []
            with open(log, "w") as stream:
                self.all.append(subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT, env=environ))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.all:
            process.kill()
            process.wait()

    def wait(self, timeout=300):
        """The exit codes."""
        until = time.monotonic() + timeout
        return [process.wait(max(until - time.monotonic(), 0.1)) for process in self.all]

    def said(self, index):
        """What a process has written, without the lines of C++ libraries."""
        return [line for line in self.logs[index].read_text().splitlines() if line.startswith("diffjax:")]


def finish(workdir, **settings):
    with Processes(workdir, **settings) as run:
        codes = run.wait()
        assert set(codes) == {0}, [log.read_text()[-3000:] for log in run.logs]


def until_saved(run, workdir, step):
    until = time.monotonic() + 200
    while not any(s >= step for s in saved(workdir)):
        assert all(p.poll() is None for p in run.all) and time.monotonic() < until
        time.sleep(0.02)


def saved(workdir):
    return open_checkpoints(workdir / "checkpoints").steps()


def leaves(workdir, step=None):
    """Every leaf of the last checkpoint, by name."""
    found = {}
    for part in ("params", "ema/power(std=0.1)", "opt_state"):
        at, tree = open_checkpoints(workdir / "checkpoints").restore_part(part, step)
        stack = [((part,), tree)]
        while stack:
            path, node = stack.pop()
            if isinstance(node, dict):
                stack += [((*path, key), value) for key, value in node.items()]
            else:
                found[path] = np.asarray(node)
    return at, found


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def assert_same_bits(a, b):
    (step, first), (other, second) = leaves(a), leaves(b)
    assert step == other and first.keys() == second.keys()
    for path, leaf in first.items():
        assert leaf.tobytes() == second[path].tobytes(), path


# SGD, because Adam's first steps divide by the size of the gradient and turn rounding into steps of full length.
PLAIN = {"optim.name": "sgd", "optim.clip": 1.0, "num_steps": 20, "augment": "('shift(pixels=1)',)"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fsdp", pytest.param("data", marks=pytest.mark.faults)])
def test_two_processes_train_what_one_does(tmp_path, mode):
    """With half of each batch read by each, the same parameters but for the order of sums: 20 steps in float32."""
    finish(tmp_path / "one", count=1, sharding=mode, **PLAIN)
    finish(tmp_path / "two", count=2, sharding=mode, **PLAIN)
    (_, one), (_, two) = leaves(tmp_path / "one"), leaves(tmp_path / "two")
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        np.testing.assert_allclose(two[path], leaf, rtol=1e-5, atol=1e-6, err_msg=str(path))
    # The first window ends long before the parameters have moved much: other rows would show.
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    # Gloo's threads write "[Gloo] Rank 1 is connected to 1 peer ranks. ..." piece by piece, each into the other's line.
    rows = (tmp_path / "two.1.log").read_text().splitlines()
    assert [row for row in rows if row.strip() and "Gloo" not in row and "peer ranks" not in row] == []


@pytest.mark.faults
def test_two_processes_show_the_samples_of_one(tmp_path):
    """Of parameters that no process holds as a whole."""
    settings = PLAIN | {"sharding": "fsdp", "sample_every": 20, "sample.steps": 2}
    sheets = []
    for count in (1, 2):
        finish(tmp_path / str(count), count=count, **settings)
        [picture] = (tmp_path / str(count) / "samples").iterdir()
        sheets.append(np.asarray(Image.open(picture).convert("L"), int))
    # Rounding in float32 moves a grey level by one at most.
    assert sheets[0].shape == sheets[1].shape and np.abs(sheets[0] - sheets[1]).max() <= 1


LONG = {"num_steps": 200}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(workdir, **LONG)
    return workdir


@pytest.mark.faults
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_process_that_dies_or_freezes_stops_the_other(tmp_path, undisturbed, victim, number):
    workdir = tmp_path / "run"
    with Processes(workdir, **LONG) as run:
        until_saved(run, workdir, 40)
        run.all[victim].send_signal(number)
        start = time.monotonic()
        assert run.all[1 - victim].wait(90) == RESUME
        assert time.monotonic() - start < 60
        (line,) = run.said(1 - victim)
        assert f"process {1 - victim} of 2: process {victim}" in line or "one of the 2 processes" in line
        assert "start all of them again" in line
    assert max(saved(workdir)) < 200
    finish(workdir, **LONG)
    assert_same_bits(workdir, undisturbed)
    assert losses(workdir) == losses(undisturbed)


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_one_saves_and_stops_all_at_one_step(tmp_path, undisturbed, number):
    workdir = tmp_path / "run"
    with Processes(workdir, **LONG) as run:
        until_saved(run, workdir, 40)
        run.all[1].send_signal(number)
        assert run.wait(60) == [RESUME, RESUME]
        step = max(saved(workdir))
        assert 40 < step < 200
        assert f"SIGTERM: saved step {step} of 200" in run.logs[0].read_text()
    finish(workdir, **LONG)
    assert_same_bits(workdir, undisturbed)


@pytest.mark.faults
def test_goes_on_with_another_number_of_processes(tmp_path):
    """2 -> 1 -> 2 processes on four devices: the same parameters but for the order of sums."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    plain = PLAIN | {"num_steps": 60, "sharding": "fsdp"}
    finish(whole, count=1, **plain)
    for count, stop in ((2, 20), (1, 40), (2, 60)):
        finish(parts, count=count, stop_at=stop, **plain)
    (_, first), (_, second) = leaves(whole), leaves(parts)
    for path, leaf in first.items():
        np.testing.assert_allclose(second[path], leaf, rtol=2e-5, atol=2e-6, err_msg=str(path))


@pytest.mark.faults
def test_other_configs_are_refused(tmp_path):
    with Processes(tmp_path / "run", each={1: {"optim.lr": 0.5}}, **LONG) as run:
        assert run.wait(120) == [2, 2]
        for i in range(2):
            (line,) = run.said(i)
            assert "processes 0 and 1 of 2 differ in the config (optim.lr: 0.002 | 0.5)" in line
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.faults
def test_an_error_in_one_stops_the_other_with_its_words(tmp_path):
    with Processes(tmp_path / "run", each={1: {"batch_size": 10**6}}, **LONG) as run:
        assert run.wait(120) == [2, 2]
        assert "batch_size" in run.said(1)[0] and "process 1 of 2" in run.said(1)[0]
        assert "process 0 of 2: process 1 of 2 failed" in run.said(0)[0] and "batch_size" in run.said(0)[0]


@pytest.mark.faults
def test_numbers_that_are_not_finite_stop_both_alike(tmp_path):
    with Processes(tmp_path / "run", **(LONG | {"optim.lr": "1e30", "optim.clip": "0"})) as run:
        assert run.wait(120) == [1, 1]
        lines = [run.said(i)[0].partition(": step ")[2] for i in range(2)]
        assert "not finite" in lines[0]
        assert lines[0] == lines[1]


@pytest.mark.faults
def test_the_launcher_of_one_machine_brings_a_killed_process_back(tmp_path, undisturbed):
    workdir = tmp_path / "run"
    environ = os.environ | {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu", "PROCESSES": "2", "PAUSE": "1"}
    environ["DIFFJAX"] = f"{sys.executable} -m diffjax"
    flags = [f"--config.{key}={value}" for key, value in (SETTINGS | LONG).items()]
    script = ROOT / "experiments" / "launch" / "local.sh"
    command = ["bash", script, "train", "--config=configs/digits_mlp.py", f"--workdir={workdir}", *flags]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, cwd=ROOT, env=environ, stderr=log) as launcher:
        until = time.monotonic() + 200
        while not any(step >= 40 for step in saved(workdir)):
            assert launcher.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        children = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(children[1]), signal.SIGKILL)
        assert launcher.wait(400) == 0
    assert "local.sh: ended with 75 137; starting again (1 of 100)" in (tmp_path / "log").read_text()
    assert_same_bits(workdir, undisturbed)
