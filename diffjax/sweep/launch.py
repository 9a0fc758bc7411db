"""How runs are run: one after another on this machine, or each as a job of a cluster through submitit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from diffjax.train.errors import RESUME

FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"
# Seconds that a run has to save in, where its job is taken away.
GRACE = 60.0


class Job(NamedTuple):
    """What it takes to run one training and its evaluation, in plain values that go to another machine.

    Attributes:
      name: of the run.
      config: path of its config as JSON.
      workdir: of the run.
      log: file that the output of its programs is added to.
      path: folders in which modules that the config names are looked for.
    """

    name: str
    config: str
    workdir: str
    log: str
    path: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
      status: `"finished"`, `"failed"` or `"interrupted"`: the last one goes on when it is started again.
      seconds: wall clock of it.
      message: the last line of its output, where it did not finish.
    """

    status: str
    seconds: float
    message: str = ""


def run_job(job: Job, caught: Sequence[int] = ()) -> Outcome:
    """Trains and evaluates in processes of their own; an interrupted training goes on where it was.

    Args:
      job: what to run.
      caught: signals that this process was sent, looked at twice a second; the first one is passed on.
    """
    begun = time.perf_counter()
    commands = (
        ("train", f"--config={job.config}", f"--workdir={job.workdir}"),
        ("eval", f"--workdir={job.workdir}", "--quick"),
    )
    for command in commands:
        code = call(command, job, caught)
        if code or caught:
            stopped = bool(caught) or code == RESUME or code >= 128 or code in (-signal.SIGINT, -signal.SIGTERM)
            return Outcome(
                INTERRUPTED if stopped else FAILED,
                time.perf_counter() - begun,
                f"diffjax {command[0]} ended with code {code}: {last_line(job.log)}",
            )
    return Outcome(FINISHED, time.perf_counter() - begun)


def call(command: Sequence[str], job: Job, caught: Sequence[int]) -> int:
    """Runs `diffjax COMMAND` to its end and returns its code; its output goes to the job's log."""
    path = os.pathsep.join(filter(None, (*job.path, os.environ.get("PYTHONPATH", ""))))
    with open(job.log, "ab") as log:
        # A session of its own: a Ctrl-C reaches it once, from here, and it saves before it stops.
        process = subprocess.Popen(
            [sys.executable, "-m", "diffjax", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        passed = False
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(timeout=0.5)
                if caught and not passed:
                    process.send_signal(caught[0])
                    passed = True
        finally:
            # submitit ends a job that is to go back into the queue by an exception: the run saves first.
            end(process)


def end(process: subprocess.Popen, grace: float = GRACE) -> None:
    """Asks a program to stop, which a training does once it has saved, and kills it `grace` seconds later."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()


def last_line(log: str) -> str:
    """The last line of a log that says something, without the progress that was written over it."""
    text = Path(log).read_bytes()[-4000:].decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]
    return lines[-1] if lines else "no output"


def locally(jobs: Sequence[Job], caught: Sequence[int]) -> Iterator[tuple[Job, Outcome]]:
    """Each job with its outcome, one after another; none is started once a signal was caught."""
    for job in jobs:
        if caught:
            return
        yield job, run_job(job, caught)


class Task:
    """A job as submitit's jobs want it: a callable that, where the cluster stops it, is put in the queue again."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self) -> Outcome:
        return run_job(self.job)

    def checkpoint(self):
        """What submitit submits in place of a job that ran out of time or was preempted."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def on_cluster(
    jobs: Sequence[Job], caught: Sequence[int], *, cluster: str, folder: str, options: dict, wait: float = 2.0
) -> Iterator[tuple[Job, Outcome]]:
    """Submits every job at once and gives each with its outcome as it ends; jobs outlive a sweep that is stopped.

    Args:
      jobs: what to run.
      caught: signals that this process was sent; once there is one, it waits no longer.
      cluster: `"slurm"`, or `"local"`: submitit's processes on this machine, all at once.
      folder: for submitit's files, shared by all machines.
      options: of `submitit.AutoExecutor.update_parameters`, such as `{"slurm_partition": "gpu", "timeout_min": 60}`.
      wait: seconds between looks at the queue.

    Raises:
      ModuleNotFoundError: without submitit.
      ValueError: for options that submitit does not take, or a machine without SLURM.
    """
    executor = make_executor(cluster, folder, options)
    with executor.batch():
        submitted = [executor.submit(Task(job)) for job in jobs]
    waiting = dict(zip(jobs, submitted, strict=True))
    while waiting and not caught:
        for job in [job for job, remote in waiting.items() if remote.done()]:
            yield job, outcome_of(waiting.pop(job))
        if waiting:
            time.sleep(wait)


def make_executor(cluster: str, folder: str, options: dict):
    """submitit's executor.

    Raises:
      ModuleNotFoundError, ValueError: as `on_cluster`.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("SLURM needs submitit: pip install 'diffjax[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**options)
    except (NameError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"submitit on {cluster!r} with {options}: {error}") from error
    return executor


def outcome_of(remote) -> Outcome:
    """The outcome of a submitit job that is done; what went wrong outside of our programs is a failure."""
    problem: Callable = remote.exception
    error = problem()
    return remote.result() if error is None else Outcome(FAILED, 0.0, f"job {remote.job_id}: {error}"[-500:])
