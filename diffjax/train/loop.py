"""The training loop: from a config and a folder to checkpoints and metrics, resumable at any step."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import jax
from ml_collections import ConfigDict

from diffjax.data import batches
from diffjax.train import config as configs
from diffjax.train import step as steps
from diffjax.train.checkpoint import open_checkpoints, versions
from diffjax.train.errors import WorkdirError
from diffjax.train.monitor import writers
from diffjax.train.monitor.clock import Clock
from diffjax.train.monitor.meters import usage
from diffjax.train.monitor.profile import Profile
from diffjax.train.monitor.summary import summarize
from diffjax.train.optim import evaluation_params, snapshots
from diffjax.train.parallel import processes, sharding
from diffjax.train.parallel.flops import step_flops
from diffjax.train.parallel.peers import Watch
from diffjax.train.parts import Parts, prepare
from diffjax.train.setup import compile_step, first_state
from diffjax.train.state import CHECKPOINTS, TrainState, abstract_state
from diffjax.train.survival import guard, history, recovery, saving
from diffjax.train.workdir import locked, note_changes, refuse_changes, write_config


class Result(NamedTuple):
    """How a training ended.

    Attributes:
      step: updates done and saved.
      signal: the signal that stopped it, or None if it reached its last step.
    """

    step: int
    signal: int | None


class Session(NamedTuple):
    """What the loop works with: a compiled step, a source of batches, and where the results go."""

    config: ConfigDict
    parts: Parts
    mesh: Any
    step_fn: Any
    empty: Any
    iterator: Any
    checkpoints: Any
    writer: writers.Writer
    terminal: writers.Terminal
    picture: Callable | None  # `(params, step) -> image`, every `sample_every` steps
    flops: Callable[[], float]  # of one step
    workdir: str
    windows: list  # of metrics on the host, reported since the last checkpoint
    snapshots: Any = None  # of the averages, every `ema_snapshots` steps
    files: Any = None  # the part of `writer` that leaves files
    restart: Callable | None = None  # `() -> (step, state)` of the newest checkpoint
    peers: Watch | None = None  # the other processes of the run


def train(
    config: ConfigDict,
    workdir: str,
    *,
    stream: TextIO | None = None,
    preview: Callable | None = None,
    peers: Watch | None = None,
    allow_changes: bool = False,
) -> Result:
    """Trains to `config.num_steps` (or `config.stop_at`), from the newest checkpoint in `workdir` if there is one.

    The same call goes on with an interrupted run, and ends with the same bits as an uninterrupted one on the same
    devices. SIGINT and SIGTERM save and return. What else can go wrong, and what then happens, is in docs/survival.md.

    Args:
      config: as `diffjax.train.config.defaults`; missing keys take their defaults.
      workdir: made if absent. Gets `config.json`, `checkpoints/`, `metrics.jsonl`, `summary.json`, `curves.png` and, if
        asked for, TensorBoard files, samples and a profile.
      stream: where progress is written; default `sys.stderr`.
      preview: `(config, parts) -> picture` with `picture(params, step) -> uint8 [H, W, 1 or 3]`, what to draw every
        `config.sample_every` steps, such as `diffjax.pipelines.preview.preview`; default nothing.
      peers: the other processes of the run, from `diffjax.train.parallel.processes.join`. Every process makes the same
        call, with a `workdir` that all of them see; the first one writes everything but its share of the checkpoints.
      allow_changes: goes on with another config than that of the run in `workdir`, and writes the differences to
        `config_history.jsonl`.

    Raises:
      ConfigError: for a config that cannot run, or another config than that of the run in `workdir`.
      WorkdirError: if another process trains in `workdir`, it is a file, or it is gone when something is to be saved.
      CheckpointError: if a checkpoint cannot be written, or there are some and none can be read.
      NonFiniteError: if the loss, the gradient or the parameters stop being finite, as `config.guard` says.
    """
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise WorkdirError(f"workdir {workdir!r} is a file; give a folder, which is made if it does not exist")
    config, parts = prepare(config)
    processes.agree("config", configs.flat(config) | versions(), "start all with one command and one installation")
    os.makedirs(workdir, exist_ok=True)
    first = processes.is_first()
    lock = locked(workdir) if first else contextlib.nullcontext()
    with lock, processes.stop_requests() as asked, contextlib.ExitStack() as stack:
        stored = refuse_changes(workdir, config, allow=allow_changes)
        checkpoints = open_checkpoints(os.path.join(workdir, CHECKPOINTS), keep=config.keep, best_metric="loss")
        stack.callback(checkpoints.close)
        reading = dict(config.input, seed=config.seed, augment=parts.augment)
        mesh = sharding.make_mesh(sharding.parse_mesh(config.mesh))
        index, count = processes.input_share(sharding.batch_sharding(mesh), config.batch_size)
        share = dict(process_index=index, process_count=count)
        iterator = history.Batches(batches(parts.dataset.train, config.batch_size, **reading, **share))
        stack.callback(iterator.close)
        state_sharding = sharding.state_sharding(mesh, abstract_state(parts), parts.model.rules, config.sharding)
        restart = functools.partial(first_state, config, parts, checkpoints, iterator, state_sharding)
        # Before anything is read together: a process that sees other checkpoints would take other steps.
        seen = {"saved steps": checkpoints.steps()}
        processes.agree("checkpoints", seen, f"{workdir!r} must be one folder that all of them see")
        step, state = restart()
        quiet = None if first else stack.enter_context(open(os.devnull, "w"))
        terminal = writers.Terminal(quiet or stream or sys.stderr, last_step(config), step)
        files = saving.Files(lambda at: file_writers(config, workdir, at) if first else (), step, config.on_save_error)
        writer = writers.Several([terminal, files])
        stack.callback(writer.close)
        if step >= last_step(config):
            text = f"{workdir} is at step {step}, and the config asks for {last_step(config)}: nothing to do"
            terminal.write_texts(step, {"note": text})
            return Result(step, None)
        if text := saving.stretched(stored, config, step, parts.lr):
            terminal.write_texts(step, {"note": text})
        if first:
            note_changes(workdir, step, stored, config)
            write_config(workdir, config)
        checkpoints.reserve(state)
        terminal.write_texts(step, {"note": "compiling the training step ..."})
        step_fn, empty = compile_step(config, parts, mesh, state_sharding)
        processes.meet("compiled")
        picture = preview(config, parts) if preview and config.sample_every else None
        flops = functools.cache(lambda: step_flops(config, parts).model)
        session = Session(
            config, parts, mesh, step_fn, empty, iterator, checkpoints, writer, terminal, picture, flops, workdir, []
        )
        session = session._replace(peers=peers)
        if config.ema_snapshots:
            session = session._replace(snapshots=snapshots.open_snapshots(workdir, step=step))
            stack.callback(session.snapshots.close)
            text = snapshots.cost(config.ema_snapshots, last_step(config), state.ema)
            terminal.write_texts(step, {"note": text})
        session = session._replace(files=files, restart=restart)
        return recovery.persist(functools.partial(run, asked=asked), session, step, state)


def run(session: Session, step: int, state: TrainState, asked: Callable[[int], int | None]) -> Result:
    """The loop itself; the device is waited for at checkpoints, and one step late at every log line."""
    config, last = session.config, last_step(session.config)
    fresh = lambda: guard.limited(session.empty(), session.iterator.limit(config.guard.spike))
    window, pending, clock, saved = fresh(), None, Clock(step, config.batch_size), step or None
    profile = Profile(config.profile if processes.is_first() else (), session.workdir)
    signalled = asked(step)
    while step < last and not (signalled and step == saved):
        profile.before(step)
        with clock.waiting():
            batch = sharding.place_batch(next(session.iterator), session.mesh)
        state, window = session.step_fn(state, window, batch)
        step += 1
        session.terminal.advance(step)
        if session.peers:
            session.peers.step(step)
        signalled = signalled or asked(step)
        if pending:
            # The device already works on the next step, so fetching this window costs it nothing.
            pending = report(session, clock, state, *pending)
        if traced := profile.after(step, state):
            session.terminal.write_texts(step, {"note": f"profile of steps {config.profile} in {traced}"})
        ends = step == last or bool(signalled)
        keeps = snapshots.due(config.ema_snapshots, step, last)
        saves = step % config.checkpoint_every == 0 or ends
        if step % config.log_every == 0 or saves or keeps:
            pending, window = (step, window), fresh()
        if keeps:
            # As below, nothing is kept that was not seen to be finite.
            pending = report(session, clock, state, *pending)
            with clock.paused("ema snapshots"):
                snapshots.save(session.snapshots, step, state.ema)
        if saves:
            # A state is saved only after every step that led to it was seen to be finite; and as its window ends here,
            # a run that goes on from it has the windows of one that was never stopped.
            pending = pending and report(session, clock, state, *pending)
            metrics = {"loss": mean_loss(session.windows)}
            session.windows.clear()
            # Before the save: no checkpoint may be later than the rows that a killed process leaves.
            session.writer.flush()
            with clock.paused("checkpoints"):
                stored = json.loads(configs.to_json(config))
                if saving.keep(session, step, state, stored, metrics, last=ends):
                    saved = step
            # The limit on the loss is that of a run that goes on from here.
            window = fresh()
        if session.picture and (step % config.sample_every == 0 or step == last):
            with clock.paused("samples"):
                image = session.picture(averaged(session, state), step)
                session.writer.write_images(step, {"samples": image})
    profile.close()
    session.checkpoints.wait()
    conclude(session, clock, step, state)
    if signalled:
        name = signal.Signals(signalled).name
        text = f"{name}: saved step {step} of {last} in {session.workdir}; the same command goes on from there"
        session.terminal.write_texts(step, {"note": text})
    return Result(step, signalled)


def report(session: Session, clock: Clock, state: TrainState, step: int, window: steps.Metrics) -> None:
    """Fetches a window that ended at `step`, leaves the loop if a step in it was bad, else logs it.

    Raises:
      BadWindow: if a step in it had a loss, gradient or parameters that are not finite, or a loss above the limit, and
        was not skipped.
    """
    window = jax.device_get(window)
    if window.bad_step != steps.NEVER:
        raise recovery.BadWindow(window, step)
    recovery.note_skipped(session, window, state)
    # Only now are its steps known to be done; when they were handed to the device says nothing.
    timing = clock.lap(step)
    session.windows.append(window)
    with clock.paused("counting FLOPs"):
        used = usage(timing, session.flops(), list(session.mesh.devices.flat))
    if session.config.guard.spike and window.steps:
        session.iterator.note(float(window.loss) / int(window.steps))
    shown = steps.scalars(window) if window.steps else {}
    values = shown | guard.scalars(window) | {"lr": float(session.parts.lr(step - 1))} | timing | used
    if session.iterator.bad:
        values["bad_items"] = len(session.iterator.bad)
    session.writer.write_scalars(step, values)


def averaged(session: Session, state: TrainState) -> dict:
    """The parameters that the run is judged by: its first average, or the parameters where it keeps none."""
    own = lambda: evaluation_params(state.opt_state, state.params)
    return state.ema[session.config.ema[0]] if session.config.ema else own()


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
    }
    session.terminal.write_texts(step, {"summary": summarize(session.workdir, facts, clock.seconds())})


def mean_loss(windows: list[steps.Metrics]) -> float:
    """The mean loss of the steps in all windows, which the best checkpoint is best at; NaN if all were skipped."""
    count = sum(int(w.steps) for w in windows)
    return sum(float(w.loss) for w in windows) / count if count else math.nan


def last_step(config: ConfigDict) -> int:
    """The step to train to: `num_steps`, or `stop_at` if that is set and earlier."""
    return min(config.num_steps, config.stop_at or config.num_steps)


def file_writers(config: ConfigDict, workdir: str, step: int) -> Iterator[writers.Writer]:
    """The writers that leave files in `workdir`."""
    yield writers.Jsonl(os.path.join(workdir, writers.METRICS_FILE), upto=step)
    if config.tensorboard:
        board = writers.TensorBoard(os.path.join(workdir, "tensorboard"))
        board.write_hparams(configs.flat(config))
        yield board
    if config.sample_every:
        yield writers.Pictures(os.path.join(workdir, "samples"))
