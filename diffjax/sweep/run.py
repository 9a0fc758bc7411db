"""`diffjax sweep`: every combination of a grid trained and evaluated, and what they came to in a table and a plot."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from diffjax import files
from diffjax.sweep import launch, table
from diffjax.sweep.grid import parse_grid
from diffjax.sweep.launch import FAILED, FINISHED, Job
from diffjax.sweep.plan import SWEEP_FILE, Run, plan_runs, refuse_other_config, short_names
from diffjax.train import config as configs
from diffjax.train.errors import RESUME, WorkdirError
from diffjax.train.survival.signals import caught_signals

STATUS_FILE, LOCK_FILE, LOGS, CONFIGS = "status.json", "lock", "logs", "configs"
RUNS_CSV, TABLE, PLOT = "runs.csv", "table.md", "sweep.png"
# The sweep's lock lets in one writer at a time.
write = functools.partial(files.write_text, tag="sweep")


def sweep(
    config: ConfigDict,
    grid: str,
    out: str | os.PathLike,
    *,
    seeds: Sequence[int] = (),
    cluster: str = "",
    options: dict | None = None,
    path: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Trains and evaluates every combination of a grid for every seed; 0, 1 if a run failed, 75 if stopped.

    It is stopped by a signal, or has runs that were interrupted by themselves and none that failed.

    The same call goes on: finished runs are left as they are, interrupted ones resume, failed ones are tried again,
    and a longer grid or more seeds add to what is there. A run that fails does not stop the others. Into `out` go a
    folder a run, `logs/`, `runs.csv` (a row a run), `table.md` (a row a combination) and `sweep.png`.

    Args:
      config: what the runs share.
      grid: as for `parse_grid`.
      out: folder of the sweep, made if absent.
      seeds: for every combination; default the config's own.
      cluster: empty to run here, one after another; `"slurm"` for a job each, through submitit.
      options: of the jobs, for submitit.
      path: folders in which modules that the config names are looked for.
      dry_run: list the runs on stdout and start none.

    Raises:
      ConfigError: if any combination cannot run (all of them are listed), or `out` holds a sweep of another config.
      WorkdirError: if another process sweeps there.
    """
    out = os.fspath(out)
    runs = plan_runs(config, parse_grid(grid), seeds, out, here=cluster != "slurm")
    refuse_other_config(out, config)
    if dry_run:
        for run in runs:
            sys.stdout.write(f"{'finished' if table.finished_report(run) else 'to do':9} {run.workdir}\n")
        return 0
    for folder in (out, os.path.join(out, LOGS), os.path.join(out, CONFIGS)):
        os.makedirs(folder, exist_ok=True)
    with locked(out), caught_signals() as caught:
        stored = {"config": json.loads(configs.to_json(configs.fill(config))), "grid": grid, "seeds": list(seeds)}
        write(os.path.join(out, SWEEP_FILE), json.dumps(stored, indent=1) + "\n")
        jobs = [job_of(run, out, path) for run in runs if table.finished_report(run) is None]
        sys.stdout.write(f"runs: {len(runs)}, finished already: {len(runs) - len(jobs)}; logs in {out}/{LOGS}\n")
        if cluster:
            folder = os.path.join(out, "jobs")
            ended = launch.on_cluster(jobs, caught, cluster=cluster, folder=folder, options=options or {})
        else:
            ended = launch.locally(jobs, caught)
        return follow(runs, jobs, ended, caught, out)


def follow(runs: list[Run], jobs: list[Job], ended: Iterator, caught: list[int], out: str) -> int:
    """Reports each job as it ends, keeps the table up to date, and returns the exit code."""
    status = read_status(out)
    named, failed = {run.name: run for run in runs}, []
    for number, (job, outcome) in enumerate(ended, 1):
        before = status.get(job.name, {}).get("seconds", 0.0)
        state = outcome.status
        if state == FINISHED and table.finished_report(named[job.name]) is None:
            state, outcome = FAILED, outcome._replace(message="it ended well but left no report of its last step")
        status[job.name] = {"status": state, "seconds": round(before + outcome.seconds, 2), "message": outcome.message}
        write(os.path.join(out, STATUS_FILE), json.dumps(status, indent=1) + "\n")
        write_results(runs, status, out)
        failed += [job.name] * (state == FAILED)
        found = table.results(named[job.name])
        shown = [f"{table.COLUMNS[key]} {found[key]:.4g}" for key in table.COLUMNS if key in found][:3]
        text = ", ".join(shown) if state == FINISHED else outcome.message
        sys.stdout.write(f"[{number}/{len(jobs)}] {job.name}: {state} in {outcome.seconds:.0f} s, {text}\n")
        sys.stdout.flush()
    write_results(runs, status, out)
    sys.stdout.write(Path(out, TABLE).read_text(encoding="utf-8"))
    if failed:
        sys.stderr.write(f"diffjax: {len(failed)} of {len(runs)} failed: {', '.join(failed)}; see {out}/{LOGS}\n")
    left = sum(table.finished_report(run) is None for run in runs)
    if caught:
        told = f"stopped by signal {caught[0]}, {left} of {len(runs)} left"
        sys.stderr.write(f"diffjax: {told}; the same command goes on\n")
        return RESUME
    if left and not failed:
        sys.stderr.write(f"diffjax: {left} of {len(runs)} interrupted; the same command goes on\n")
        return RESUME
    return 1 if left else 0


def job_of(run: Run, out: str, path: Sequence[str]) -> Job:
    """Writes the config of a run and returns its job."""
    config = os.path.join(out, CONFIGS, run.name + ".json")
    write(config, configs.to_json(run.config) + "\n")
    log = os.path.join(out, LOGS, run.name + ".log")
    return Job(run.name, *(os.path.abspath(p) for p in (config, run.workdir, log)), tuple(path))


def write_results(runs: list[Run], status: dict, out: str) -> None:
    """`runs.csv`, `table.md`, and `sweep.png` once a run has finished."""
    from diffjax import viz

    rows = table.rows_of(runs, status)
    write(os.path.join(out, RUNS_CSV), table.as_csv(rows))
    write(os.path.join(out, TABLE), table.as_markdown(runs, rows))
    short, groups = short_names([run.values for run in runs]), table.combinations(runs, rows)
    drawn = [key for key in table.DRAWN if any(key in row for row in rows)][:3]
    if drawn:
        names = [table.label(settings, short) for settings in groups]
        panels = {
            table.COLUMNS[key]: [[row[key] for row in members if key in row] for members in groups.values()]
            for key in drawn
        }
        viz.save(viz.sweep_dots(names, panels), os.path.join(out, PLOT))


def read_status(out: str) -> dict:
    """How the jobs of earlier calls ended, by name of the run."""
    path = Path(out, STATUS_FILE)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def locked(out: str) -> contextlib.AbstractContextManager[None]:
    """Holds the sweep's lock while the block lasts.

    Raises:
      WorkdirError: if another process holds it.
    """

    def refusal(owner):
        given = f"{out!r} is in use: process {owner} sweeps there"
        return WorkdirError(f"{given}; wait for it, stop it, or give another --out")

    return files.locked(os.path.join(out, LOCK_FILE), refusal)
