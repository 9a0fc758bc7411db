"""The launchers, with programs that only say how they were called in the place of diffjax, srun and gcloud."""

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"


@pytest.fixture
def program(tmp_path):
    """`program(name, lines)`: an executable; each call of one appends `name arguments` to the file `calls`."""

    def make(name, lines="exit 0"):
        path = tmp_path / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{tmp_path}/calls"\n{lines}\n')
        path.chmod(0o755)
        return path

    return make


def launch(script, tmp_path, *arguments, **variables):
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PAUSE": "0"} | variables
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)


@contextmanager
def running(**variables):
    """local.sh in a process group of its own, of which nothing is left afterwards."""
    command = ["bash", str(LAUNCH / "local.sh"), "train"]
    with subprocess.Popen(command, env=os.environ | variables, start_new_session=True) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir()))
def test_reads_as_bash(script):
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True).stderr == ""


# The exit code of the call with this number; the file counts the calls of each process.
NTH = """
id=${DIFFJAX_PROCESS_ID:-alone}
echo x >> "$0.$id"
codes=($CODES)
code=${codes[$(($(wc -l < "$0.$id") - 1))]}
if ((code > 128)); then kill -$((code - 128)) $$; fi
exit "$code"
"""


@pytest.mark.parametrize(
    "codes, ends, starts",
    [
        ("0", 0, 1),
        ("75 75 0", 0, 3),
        ("137 0", 0, 2),  # killed, as for want of memory
        ("75 2", 2, 2),
        ("1", 1, 1),
        ("75 75 75 75 75", 75, 4),
    ],
)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_local_starts_again_on_75(program, tmp_path, codes, ends, starts, processes):
    run = program("run", NTH)
    done = launch(
        "local.sh", tmp_path, "train", "--workdir=w", DIFFJAX=str(run), CODES=codes, PROCESSES=processes, RESTARTS="3"
    )
    assert done.returncode == ends, done.stderr
    assert calls(tmp_path) == ["run train --workdir=w"] * (starts * int(processes))
    assert done.stderr.count("starting again") == starts - 1


def test_local_tells_processes_apart(program, tmp_path):
    run = program("run", f'env | grep "DIFFJAX_\\|JAX_LOCAL" | sort > "{tmp_path}/env.$DIFFJAX_PROCESS_ID"')
    assert launch("local.sh", tmp_path, "train", DIFFJAX=str(run), PROCESSES="2").returncode == 0
    first, second = (dict(line.split("=") for line in (tmp_path / f"env.{i}").read_text().split()) for i in range(2))
    assert first["DIFFJAX_COORDINATOR"] == second["DIFFJAX_COORDINATOR"]
    assert first["DIFFJAX_NUM_PROCESSES"] == second["DIFFJAX_NUM_PROCESSES"] == "2"
    assert (first["DIFFJAX_PROCESS_ID"], second["DIFFJAX_PROCESS_ID"]) == ("0", "1")
    assert (first["JAX_LOCAL_DEVICE_IDS"], second["JAX_LOCAL_DEVICE_IDS"]) == ("0", "1")


def test_local_passes_a_signal_on_and_stops(program, tmp_path):
    run = program("run", 'trap "exit 75" TERM\nwhile :; do sleep 0.05; done')
    with running(DIFFJAX=str(run), PROCESSES="2") as process:
        until = time.monotonic() + 30
        while not (tmp_path / "calls").exists() or len(calls(tmp_path)) < 2:
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 75
    assert len(calls(tmp_path)) == 2


SAVES = """
import sys, time
from diffjax.train.survival.signals import caught_signals
with caught_signals() as caught:
    print("ready", file=open(sys.argv[1], "a"))
    while not caught:
        time.sleep(0.02)
    time.sleep(0.5)
    print("saved", file=open(sys.argv[1], "a"))
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_local_lets_a_run_save_after_a_signal_to_the_whole_group(program, tmp_path, number):
    (tmp_path / "saves.py").write_text(SAVES)
    state = tmp_path / "state"
    run = program("run", f'exec "{sys.executable}" "{tmp_path}/saves.py" "{state}"')
    with running(DIFFJAX=str(run), PYTHONPATH=str(LAUNCH.parents[1])) as process:
        until = time.monotonic() + 60
        while not state.exists() or not state.read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(process.pid, number)
        assert process.wait(30) == 75
    assert state.read_text().split() == ["ready", "saved"] and len(calls(tmp_path)) == 1


@pytest.mark.parametrize(
    "code, count, requeued", [(0, "0", False), (75, "0", True), (137, "3", True), (1, "0", False), (75, "5", False)]
)
def test_slurm_requeues_on_75(program, tmp_path, code, count, requeued):
    program("srun", f"exit {code}")
    program("scontrol")
    variables = dict(SLURM_JOB_ID="4711", SLURM_RESTART_COUNT=count, RESTARTS="5")
    assert launch("slurm.sbatch", tmp_path, "train", "--workdir=w", **variables).returncode == code
    expected = ["srun --kill-on-bad-exit=0 python -m diffjax train --workdir=w"]
    assert calls(tmp_path) == expected + ["scontrol requeue 4711"] * requeued


def test_tpu_pod_runs_the_command_on_every_worker(program, tmp_path):
    # What ssh would hand to the shell of a worker runs here, in a checkout of one file.
    launcher = tmp_path / "diffjax" / "experiments" / "launch" / "local.sh"
    launcher.parent.mkdir(parents=True)
    launcher.write_text('printf "%s\\n" "$DIFFJAX" "$@"\n')
    program(
        "gcloud", f'cd "{tmp_path}"\nfor a in "$@"; do case $a in --command=*) bash -c "${{a#--command=}}";; esac; done'
    )
    variables = dict(TPU_NAME="pod", ZONE="us-east5-a", PROJECT_ID="mine")
    done = launch("tpu_pod.sh", tmp_path, "start", "train", "--config.ema=('power(std=0.1)',)", **variables)
    assert done.returncode == 0, done.stderr
    words = shlex.split(calls(tmp_path)[0].partition(" --command")[0])
    assert words == "gcloud compute tpus tpu-vm ssh pod --zone=us-east5-a --project=mine --worker=all".split()
    until = time.monotonic() + 30
    log = tmp_path / "diffjax" / "diffjax.log"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert log.read_text().splitlines() == [".venv/bin/python -m diffjax", "train", "--config.ema=('power(std=0.1)',)"]
    assert int((tmp_path / "diffjax" / "diffjax.pid").read_text()) > 1
