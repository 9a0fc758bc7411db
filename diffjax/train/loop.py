"""The training loop: from a config and a folder to checkpoints and metrics, resumable at any step."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
from collections.abc import Callable
from typing import NamedTuple, TextIO

import jax
from ml_collections import ConfigDict

from diffjax.train import config as configs
from diffjax.train import step as steps
from diffjax.train.checkpoint import versions
from diffjax.train.errors import WorkdirError
from diffjax.train.monitor.clock import Clock
from diffjax.train.monitor.meters import usage
from diffjax.train.monitor.profile import Profile
from diffjax.train.monitor.summary import summarize
from diffjax.train.optim import evaluation_params, snapshots
from diffjax.train.parallel import processes
from diffjax.train.parallel.peers import Watch
from diffjax.train.parts import prepare
from diffjax.train.session import (
    Session,
    contents,
    last_step,
    note,
    open_session,
    opening,
    with_programs,
    with_writers,
)
from diffjax.train.state import TrainState
from diffjax.train.survival import guard, history, recovery, saving
from diffjax.train.survival.workdir import locked, note_changes, refuse_changes, write_config, write_data_facts


class Result(NamedTuple):
    """How a training ended.

    Attributes:
      step: updates done and saved.
      signal: the signal that stopped it, or None if it reached its last step.
    """

    step: int
    signal: int | None


def train(
    config: ConfigDict,
    workdir: str,
    *,
    stream: TextIO | None = None,
    preview: Callable | None = None,
    peers: Watch | None = None,
    allow_changes: bool = False,
    early: Callable[[int], None] | None = None,
) -> Result:
    """Trains to `config.num_steps` (or `config.stop_at`), from the newest checkpoint in `workdir` if there is one.

    The same call goes on with an interrupted run, and ends with the same bits as an uninterrupted one on the same
    devices. SIGINT and SIGTERM save and return. What else can go wrong, and what then happens, is in docs/survival.md.

    Args:
      config: as `diffjax.train.config.defaults`; missing keys take their defaults.
      workdir: made if absent. Gets `config.json`, `data.json`, `checkpoints/`, `metrics.jsonl`, `summary.json`,
        `curves.png` and, if asked for, TensorBoard files, samples and a profile.
      stream: where progress is written; default `sys.stderr`.
      preview: `(config, parts) -> picture` with `picture(params, step) -> uint8 [H, W, 1 or 3]`, what to draw every
        `config.sample_every` steps, such as `diffjax.pipelines.preview.preview`; default nothing.
      peers: the other processes of the run, from `diffjax.train.parallel.processes.join`. Every process makes the same
        call, with a `workdir` that all of them see; the first one writes everything but its share of the checkpoints.
      allow_changes: goes on with another config than that of the run in `workdir`, and writes the differences to
        `config_history.jsonl`.
      early: called in a thread, where no others run with this process, with a SIGINT or SIGTERM that comes before the
        first step. It may end the process, which then has nothing to lose; default nothing: the signal waits until the
        step is compiled, and one step is made and saved.

    Raises:
      ConfigError: for a config that cannot run, or another config than that of the run in `workdir`.
      WorkdirError: if another process trains in `workdir`, it is a file, or it is gone when something is to be saved.
      CheckpointError: if a checkpoint cannot be written, or there are some and none can be read.
      NonFiniteError: if the loss, the gradient or the parameters stop being finite, as `config.guard` says.
    """
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise WorkdirError(f"workdir {workdir!r} is a file; give a folder, which is made if it does not exist")
    with processes.stop_requests(early) as asked, contextlib.ExitStack() as stack:
        config, parts = prepare(config)
        processes.agree("config", configs.flat(config) | versions(), "start all with one command and one installation")
        processes.agree("data", contents(parts.dataset.train), "every process must see the same files")
        os.makedirs(workdir, exist_ok=True)
        if processes.is_first():
            stack.enter_context(locked(workdir))
        stored = refuse_changes(workdir, config, allow=allow_changes)
        session = open_session(config, parts, workdir, stack, peers=peers, same_items=not allow_changes)
        # Before anything is read together: a process that sees other checkpoints would take other steps.
        seen = {"saved steps": session.checkpoints.steps()}
        processes.agree("checkpoints", seen, f"{workdir!r} must be one folder that all of them see")
        step, state = session.restart()
        session = with_writers(session, step, stream, stack)
        if step >= last_step(config):
            asks = f"the config asks for {last_step(config)}"
            note(session, step, f"{workdir} is at step {step}, and {asks}: nothing to do")
            return Result(step, None)
        if step:
            note(session, step, f"going on from step {step} of {last_step(config)}")
        elif config.init_from:
            note(session, step, f"beginning with the parameters of {config.init_from}")
        if text := saving.stretched(stored, config, step, parts.lr):
            note(session, step, text)
        if processes.is_first():
            changed = history.changed_items(session.iterator)
            note_changes(workdir, step, stored, config, changed)
            for text in changed:
                note(session, step, text)
            write_config(workdir, config)
            write_data_facts(workdir, config, parts.dataset)
        note(session, step, opening(config, parts))
        session = with_programs(session, step, state, preview)
        return recovery.persist(functools.partial(run, asked=asked), session, step, state)


def run(session: Session, step: int, state: TrainState, *, asked: Callable[[int], int | None]) -> Result:
    """The loop from `step` on, and the summary of it."""
    config, last, clock = session.config, last_step(session.config), Clock(step, session.config.batch_size)
    with contextlib.ExitStack() as stack:
        session = session._replace(profile=Profile(config.profile if processes.is_first() else (), session.workdir))
        stack.callback(session.profile.close)
        if config.ema_snapshots:
            session = session._replace(snapshots=snapshots.open_snapshots(session.workdir, step=step))
            stack.callback(saving.close_snapshots, session.snapshots)
        step, state, number = advance(session, clock, step, state, asked)
        session.checkpoints.wait()
    conclude(session, clock, step, state)
    if number:
        text = f"saved step {step} of {last} in {session.workdir}; the same command goes on from there"
        note(session, step, f"{signal.Signals(number).name}: {text}")
    return Result(step, number)


def advance(session: Session, clock: Clock, step: int, state: TrainState, asked: Callable) -> tuple:
    """`(step, state, signal or None)` after the last step; the device is waited for at checkpoints, and one step late
    at every log line."""
    config, last = session.config, last_step(session.config)
    fresh = lambda: guard.limited(session.programs.empty(), session.iterator.limit(config.guard.spike))
    window, pending, saved, number = fresh(), None, step or None, asked(step)
    while step < last and not (number and step == saved):
        session.profile.before(step)
        with clock.waiting():
            batch = next(session.iterator)
        state, window = session.programs.step(state, window, batch)
        step += 1
        session.terminal.advance(step)
        if session.peers:
            session.peers.step(step)
        if not number and (number := asked(step)):
            note(session, step, f"{signal.Signals(number).name}: saving step {step} ...")
        if pending:
            # The device already works on the next step, so fetching this window costs it nothing.
            pending = report(session, clock, state, *pending)
        if traced := session.profile.after(step, state):
            note(session, step, f"profile of steps {config.profile} in {traced}")
        ends = step == last or bool(number)
        saves, keeps = step % config.checkpoint_every == 0 or ends, snapshots.due(config.ema_snapshots, step, last)
        if step % config.log_every == 0 or saves or keeps:
            pending, window = (step, window), fresh()
        if saves or keeps:
            # A state is kept only after every step that led to it was seen to be finite; and as its window ends here,
            # a run that goes on from it has the windows of one that was never stopped.
            pending = report(session, clock, state, *pending)
        if keeps:
            with clock.paused("ema snapshots"):
                saving.keep_snapshot(session, step, state.ema)
        if saves:
            saved = step if save(session, clock, step, state, last=ends) else saved
            # The limit on the loss is that of a run that goes on from here.
            window = fresh()
        if session.picture and not number and (step % config.sample_every == 0 or step == last):
            draw(session, clock, step, state)
    return step, state, number


def report(session: Session, clock: Clock, state: TrainState, step: int, window: steps.Metrics) -> None:
    """Fetches a window that ended at `step`, leaves the loop if a step in it was bad, else logs it.

    Raises:
      BadWindow: if a step in it had a loss, gradient or parameters that are not finite, or a loss above the limit, and
        was not skipped.
    """
    window = jax.device_get(window)
    if window.bad_step != steps.NEVER:
        raise recovery.BadWindow(window, step)
    if guard.scalars(window):
        with clock.paused("evidence"):
            recovery.note_skipped(session, window, state)
    # Only now are its steps known to be done; when they were handed to the device says nothing.
    timing = clock.lap(step)
    session.windows.append(window)
    with clock.paused("counting FLOPs"):
        used = usage(timing, session.programs.flops(), list(session.mesh.devices.flat))
    if session.config.guard.spike and window.steps:
        session.iterator.note(float(window.loss) / int(window.steps))
    shown = steps.scalars(window) if window.steps else {}
    values = shown | guard.scalars(window) | {"lr": float(session.parts.lr(step - 1))} | timing | used
    if session.iterator.bad:
        values["bad_items"] = len(session.iterator.bad)
    session.writer.write_scalars(step, values)


def save(session: Session, clock: Clock, step: int, state: TrainState, *, last: bool) -> bool:
    """Hands the state over to be saved, scored by the mean loss since the save before; whether that worked."""
    metrics = {"loss": mean_loss(session.windows)}
    session.windows.clear()
    # Before the save: no checkpoint may be later than the rows that a killed process leaves.
    session.writer.flush()
    with clock.paused("checkpoints"):
        stored = json.loads(configs.to_json(session.config))
        return saving.keep(session, step, state, stored, metrics, last=last)


def draw(session: Session, clock: Clock, step: int, state: TrainState) -> None:
    """Samples from the parameters that the run is judged by: its first average, else what the optimiser evaluates."""
    # The steps that are still under way are no part of the pause.
    jax.block_until_ready(state)
    with clock.paused("samples"):
        own = lambda: evaluation_params(state.opt_state, state.params)
        params = state.ema[session.config.ema[0]] if session.config.ema else own()
        session.writer.write_images(step, {"samples": session.picture(params, step)})


def conclude(session: Session, clock: Clock, step: int, state: TrainState) -> None:
    """Writes the summary of this start of the run."""
    if not processes.is_first():
        return
    session.writer.flush()
    facts = {
        "step": step,
        "last_step": last_step(session.config),
        "batch_size": session.config.batch_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "devices": f"{session.mesh.size} {session.mesh.devices.flat[0].device_kind}",
        "checkpoints": session.checkpoints.steps(),
        "compile_seconds": round(session.compiling, 1),
        "bad_items": len(session.iterator.bad),
    }
    try:
        text = summarize(session.workdir, facts, clock.seconds())
    except OSError as error:
        # The run itself is saved.
        text = f"no summary in {session.workdir}: {type(error).__name__}: {error}"
    session.terminal.write_texts(step, {"summary": text})


def mean_loss(windows: list[steps.Metrics]) -> float:
    """The mean loss of the steps in all windows, which the best checkpoint is best at; NaN if all were skipped."""
    count = sum(int(w.steps) for w in windows)
    return sum(float(w.loss) for w in windows) / count if count else math.nan
