"""What the training loop works with: opened from a config and a folder, one part after the other."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

import numpy as np
from ml_collections import ConfigDict

from diffjax.data import batches
from diffjax.train import config as configs
from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.checkpoint.params import CHECKPOINTS
from diffjax.train.monitor import writers
from diffjax.train.optim import snapshots
from diffjax.train.parallel import processes, sharding
from diffjax.train.parallel.peers import Watch
from diffjax.train.parts import Parts
from diffjax.train.setup import Programs, compile_step, first_state
from diffjax.train.state import TrainState, abstract_state
from diffjax.train.survival import history, saving


class Session(NamedTuple):
    """A run that is open for training.

    Attributes:
      config, parts, workdir: of the run.
      mesh: all devices.
      places: a tree of shardings like the state.
      iterator: of batches, with the memory of what went wrong.
      checkpoints: of the run.
      peers: the other processes of the run, or None.
      terminal, files: the writers for a person, and those that leave files.
      writer: both.
      programs: the compiled step and what belongs to it.
      compiling: seconds that the compiled step took to make.
      picture: `(params, step) -> image`, every `sample_every` steps, or None.
      windows: of metrics on the host, reported since the last checkpoint.
      profile: the trace of chosen steps.
      snapshots: of the averages, every `ema_snapshots` steps, or None.
    """

    config: ConfigDict
    parts: Parts
    workdir: str
    mesh: Any
    places: Any
    iterator: Any
    checkpoints: Any
    peers: Watch | None
    terminal: Any = None
    files: Any = None
    writer: Any = None
    programs: Programs | None = None
    compiling: float = 0.0
    picture: Callable | None = None
    windows: list | None = None
    profile: Any = None
    snapshots: Any = None

    def restart(self) -> tuple[int, TrainState]:
        """`(step, state)` of the newest checkpoint, to which the iterator is set, or of the start."""
        return first_state(self.config, self.parts, self.checkpoints, self.iterator, self.places)


def open_session(
    config: ConfigDict,
    parts: Parts,
    workdir: str,
    stack: contextlib.ExitStack,
    *,
    peers: Watch | None = None,
    same_items: bool = True,
) -> Session:
    """The run with its checkpoints and its input, both closed with `stack`; `same_items` as for `batches`."""
    checkpoints = open_checkpoints(os.path.join(workdir, CHECKPOINTS), keep=config.keep, best_metric="loss")
    stack.callback(checkpoints.close)
    mesh = sharding.make_mesh(sharding.parse_mesh(config.mesh))
    index, count = processes.input_share(sharding.batch_sharding(mesh), config.batch_size)
    reading = dict(config.input, seed=config.seed, augment=parts.augment, process_index=index, process_count=count)
    source = batches(parts.dataset.train, config.batch_size, same_items=same_items, **reading)
    iterator = history.Batches(source)
    stack.callback(iterator.close)
    places = sharding.state_sharding(mesh, abstract_state(parts), parts.model.rules, config.sharding)
    return Session(config, parts, workdir, mesh, places, iterator, checkpoints, peers, windows=[])


def contents(source: Any) -> dict[str, Any]:
    """What must be the same of the images to train on wherever batches are read: how many, and how many a bucket."""
    buckets = getattr(source, "buckets", None)
    return {"images": len(source), "images in each bucket": None if buckets is None else np.bincount(buckets).tolist()}


def with_writers(session: Session, step: int, stream: TextIO | None, stack: contextlib.ExitStack) -> Session:
    """The session that shows and writes what happens from `step` on; only the first process does either."""
    config, first = session.config, processes.is_first()
    quiet = None if first else stack.enter_context(open(os.devnull, "w"))
    terminal = writers.Terminal(quiet or stream or sys.stderr, last_step(config), step)
    make = lambda at: file_writers(config, session.workdir, at) if first else ()
    files = saving.Files(make, step, config.on_save_error)
    writer = writers.Several([terminal, files])
    stack.callback(writer.close)
    return session._replace(terminal=terminal, files=files, writer=writer)


def with_programs(session: Session, step: int, state: TrainState, preview: Callable | None) -> Session:
    """The session with its compiled step, and what draws its samples."""
    config, parts = session.config, session.parts
    session.checkpoints.reserve(state)
    note(session, step, "compiling the training step ...")
    begun = time.perf_counter()
    programs = compile_step(config, parts, session.mesh, session.places)
    session = session._replace(programs=programs, compiling=time.perf_counter() - begun)
    processes.meet("compiled")
    picture = preview(config, parts) if preview and config.sample_every else None
    if config.ema_snapshots:
        note(session, step, snapshots.cost(config.ema_snapshots, last_step(config), state.ema))
    return session._replace(picture=picture)


def note(session: Session, step: int, text: str) -> None:
    """Shows a line of text on the terminal."""
    session.terminal.write_texts(step, {"note": text})


def opening(config: ConfigDict, parts: Parts) -> str:
    """One line on what a run is about to train on, for its first look: a wrong folder shows here."""
    dataset = parts.dataset
    shapes = " or ".join("x".join(map(str, shape)) for shape in dataset.shapes)
    classes = f"{dataset.num_classes} classes" if dataset.num_classes else "no classes"
    return (
        f"{len(dataset.train)} images of {shapes} to train on, {len(dataset.heldout)} held out, {classes}; "
        f"{last_step(config)} steps of {config.batch_size}"
    )


def last_step(config: ConfigDict) -> int:
    """The step to train to: `num_steps`, or `stop_at` if that is set and earlier."""
    return min(config.num_steps, config.stop_at or config.num_steps)


def file_writers(config: ConfigDict, workdir: str, step: int) -> Iterator[writers.Writer]:
    """The writers that leave files in `workdir`."""
    yield writers.Jsonl(os.path.join(workdir, writers.METRICS_FILE), upto=step)
    if config.tensorboard:
        board = writers.TensorBoard(os.path.join(workdir, "tensorboard"), upto=step)
        board.write_hparams(configs.flat(config))
        yield board
    if config.sample_every:
        yield writers.Pictures(os.path.join(workdir, "samples"))
