"""The training loop: from a config and a folder to checkpoints and metrics, resumable at any step."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffjax.data import batches
from diffjax.train import config as configs
from diffjax.train import log, sharding
from diffjax.train import step as steps
from diffjax.train.checkpoint import open_checkpoints
from diffjax.train.config import Parts
from diffjax.train.errors import ConfigError, NonFiniteError, WorkdirError
from diffjax.train.state import CHECKPOINTS, CONFIG_FILE, TrainState, abstract_state, init_state, read_config

LOCK_FILE = "lock"


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
    writer: log.Writer
    terminal: log.Terminal
    workdir: str
    windows: list  # of metrics on the host, reported since the last checkpoint


def train(config: ConfigDict, workdir: str, *, stream: TextIO | None = None) -> Result:
    """Trains to `config.num_steps` (or `config.stop_at`), from the newest checkpoint in `workdir` if there is one.

    The same call goes on with an interrupted run, and ends with the same bits as an uninterrupted one on the same
    devices. SIGINT and SIGTERM save and return.

    Args:
      config: as `diffjax.train.config.defaults`; missing keys take their defaults.
      workdir: made if absent. Gets `config.json`, `checkpoints/`, `metrics.jsonl` and, if asked for, TensorBoard files.
      stream: where progress is written; default `sys.stderr`.

    Raises:
      ConfigError: for a config that cannot run, or another config than that of the run in `workdir`.
      WorkdirError: if another process trains in `workdir`, or it is a file.
      NonFiniteError: if the loss, the gradient or the parameters stop being finite.
    """
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise WorkdirError(f"workdir {workdir!r} is a file; give a folder, which is made if it does not exist")
    config, parts = configs.prepare(config)
    os.makedirs(workdir, exist_ok=True)
    with locked(workdir), caught_signals() as caught, contextlib.ExitStack() as stack:
        refuse_changes(workdir, config)
        checkpoints = open_checkpoints(os.path.join(workdir, CHECKPOINTS), keep=config.keep, best_metric="loss")
        stack.callback(checkpoints.close)
        iterator = batches(parts.dataset.train, config.batch_size, seed=config.seed, augment=parts.augment)
        mesh = sharding.make_mesh(sharding.parse_mesh(config.mesh))
        state_sharding = sharding.state_sharding(mesh, abstract_state(parts), parts.model.rules, config.sharding)
        step, state = first_state(config, parts, checkpoints, iterator, state_sharding)
        terminal = log.Terminal(stream or sys.stderr, last_step(config), step)
        writer = log.Several([terminal, *file_writers(config, workdir, step)])
        stack.callback(writer.close)
        if step >= last_step(config):
            text = f"{workdir} is at step {step}, and the config asks for {last_step(config)}: nothing to do"
            terminal.write_texts(step, {"note": text})
            return Result(step, None)
        write_config(workdir, config)
        terminal.write_texts(step, {"note": "compiling the training step ..."})
        step_fn, empty = compile_step(config, parts, mesh, state_sharding)
        session = Session(config, parts, mesh, step_fn, empty, iterator, checkpoints, writer, terminal, workdir, [])
        return run(session, step, state, caught)


def run(session: Session, step: int, state: TrainState, caught: list[int]) -> Result:
    """The loop itself; the device is waited for at checkpoints, and one step late at every log line."""
    config, last = session.config, last_step(session.config)
    window, pending, clock, saved = session.empty(), None, Clock(step), step or None
    while step < last and not (caught and step == saved):
        with clock.waiting():
            batch = sharding.place_batch(next(session.iterator), session.mesh)
        state, window = session.step_fn(state, window, batch)
        step += 1
        session.terminal.advance(step)
        if pending:
            # The device already works on the next step, so fetching this window costs it nothing.
            pending = report(session, clock, *pending)
        ends = step == last or bool(caught)
        saves = step % config.checkpoint_every == 0 or ends
        if step % config.log_every == 0 or saves:
            pending, window = (step, window), session.empty()
        if saves:
            # A state is saved only after every step that led to it was seen to be finite; and as its window ends here,
            # a run that goes on from it has the windows of one that was never stopped.
            pending = report(session, clock, *pending)
            metrics = {"loss": mean_loss(session.windows)}
            session.windows.clear()
            # Before the save: no checkpoint may be later than the rows that a killed process leaves.
            session.writer.flush()
            with clock.paused():
                session.checkpoints.save(step, state, session.iterator, json.loads(configs.to_json(config)), metrics)
            saved = step
    session.checkpoints.wait()
    if caught:
        name = signal.Signals(caught[0]).name
        text = f"{name}: saved step {step} of {last} in {session.workdir}; the same command goes on from there"
        session.terminal.write_texts(step, {"note": text})
    return Result(step, caught[0] if caught else None)


def report(session: Session, clock: Clock, step: int, window: steps.Metrics) -> None:
    """Fetches a window, stops the run if a step in it was bad, else logs it."""
    window = check(session, window)
    # Only now are its steps known to be done; when they were handed to the device says nothing.
    timing = clock.lap(step)
    session.windows.append(window)
    values = steps.scalars(window) | {"lr": float(session.parts.lr(step - 1))} | timing
    session.writer.write_scalars(step, values)


def mean_loss(windows: list[steps.Metrics]) -> float:
    """The mean loss of the steps in all windows: what the best checkpoint is best at."""
    return sum(float(w.loss) for w in windows) / sum(int(w.steps) for w in windows)


def check(session: Session, window: steps.Metrics) -> steps.Metrics:
    """The window on the host.

    Raises:
      NonFiniteError: if a step in it had a loss, gradient or parameters that are not finite.
    """
    window = jax.device_get(window)
    if window.bad_step != steps.NEVER:
        session.checkpoints.wait()
        raise NonFiniteError(bad_step_message(window, session.checkpoints.steps(), session.workdir))
    return window


def bad_step_message(window: steps.Metrics, saved, workdir: str) -> str:
    """Which step went wrong, on what batch, what it can be repeated from, and what to try."""
    b = window.batch
    labels = " ".join(f"{i}:{n}" for i, n in enumerate(b.labels[:-1]) if n) + f" null:{b.labels[-1]}"
    folder = os.path.join(workdir, CHECKPOINTS)
    good = f"last good checkpoint: step {max(saved)} in {folder}" if saved else "no checkpoint yet"
    return (
        f"step {int(window.bad_step) + 1} is not finite: loss {b.loss:.4g}, gradient norm {b.grad_norm:.4g}, "
        f"parameter norm {b.param_norm:.4g}; "
        f"its batch: images min {b.min:.4g} mean {b.mean:.4g} max {b.max:.4g}, {100 * b.finite:.4g} % finite, "
        f"labels {labels}; {good}, nothing later was saved; lower config.optim.lr, set config.optim.clip, or look "
        "at the data"
    )


def first_state(config, parts: Parts, checkpoints, iterator, state_sharding) -> tuple[int, TrainState]:
    """The newest checkpoint (the iterator is set to it as well), or the initial state at step 0."""
    like = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract_state(parts),
        state_sharding,
    )
    restored = checkpoints.restore(like, iterator)
    if restored is not None:
        return int(restored[0]), restored[1]
    key = jax.random.key(config.seed)
    init = jax.jit(lambda key: init_state(parts, key), out_shardings=state_sharding).lower(key)
    # It runs once, and compiling it optimised takes longer than compiling the step: 22 s against 5 s for a small U-Net.
    return 0, init.compile(compiler_options={"xla_backend_optimization_level": 0})(key)


def compile_step(config, parts: Parts, mesh, state_sharding):
    """The compiled `(state, window, batch) -> (state, window)`, which consumes its state and window, and a maker of
    empty windows."""
    everywhere = sharding.replicated(mesh)
    jitted = jax.jit(
        steps.with_window(steps.make_train_step(parts, config)),
        in_shardings=(state_sharding, everywhere, sharding.batch_sharding(mesh)),
        out_shardings=(state_sharding, everywhere),
        donate_argnums=(0, 1),
    )
    blank = steps.empty_window(parts.dataset.num_classes)
    compiled = jitted.lower(abstract_state(parts), blank, abstract_batch(config, parts)).compile()
    return compiled, lambda: jax.device_put(blank, everywhere)


def abstract_batch(config, parts: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch."""
    return {
        "image": jax.ShapeDtypeStruct((config.batch_size, *parts.dataset.shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }


def refuse_changes(workdir: str, config: ConfigDict) -> None:
    """Compares the config with the one that the run in `workdir`, if there is one, was started with.

    Raises:
      ConfigError: if they differ in anything that the next update depends on; lists every difference.
    """
    if os.path.exists(os.path.join(workdir, CONFIG_FILE)):
        changed = configs.differences(read_config(workdir), config)
        if changed:
            raise ConfigError(
                f"{workdir!r} holds a run with another config (stored -> given): {'; '.join(changed)}; "
                "give the stored values to go on with it, or another --workdir to start afresh"
            )


def write_config(workdir: str, config: ConfigDict) -> None:
    """Writes `config.json` in one move, so that a reader never sees half of it."""
    path = os.path.join(workdir, CONFIG_FILE)
    with open(path + ".part", "w", encoding="utf-8") as file:
        file.write(configs.to_json(config) + "\n")
    os.replace(path + ".part", path)


def last_step(config: ConfigDict) -> int:
    """The step to train to: `num_steps`, or `stop_at` if that is set and earlier."""
    return min(config.num_steps, config.stop_at or config.num_steps)


def file_writers(config: ConfigDict, workdir: str, step: int) -> Iterator[log.Writer]:
    """The writers that leave files in `workdir`."""
    yield log.Jsonl(os.path.join(workdir, log.METRICS_FILE), upto=step)
    if config.tensorboard:
        board = log.TensorBoard(os.path.join(workdir, "tensorboard"))
        board.write_hparams(configs.flat(config))
        yield board


class Clock:
    """Rates between log lines, without the time of checkpoints: steps per second, and the share of the time that was
    spent waiting for data."""

    def __init__(self, step: int):
        self._start, self._step, self._waited = time.perf_counter(), step, 0.0

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def lap(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        elapsed = max(now - self._start, 1e-9)
        rates = {"steps_per_s": (step - self._step) / elapsed, "data_wait": self._waited / elapsed}
        self._start, self._step, self._waited = now, step, 0.0
        return rates


@contextlib.contextmanager
def locked(workdir: str):
    """Holds the lock of a folder; the system drops it when the process ends, however it ends.

    Raises:
      WorkdirError: if another process holds it.
    """
    with open(os.path.join(workdir, LOCK_FILE), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise WorkdirError(
                f"{workdir!r} is in use: process {owner} is training there; wait for it, stop it, "
                "or give another --workdir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextlib.contextmanager
def caught_signals():
    """A list that SIGINT and SIGTERM are appended to; a second one has its usual effect at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def catch(number, frame):
        caught.append(number)
        for s, handler in before.items():
            signal.signal(s, handler)

    for s in before:
        signal.signal(s, catch)
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def use_compile_cache() -> str | None:
    """Turns on JAX's compile cache on disk and returns its folder, or None where it is turned off.

    `JAX_COMPILATION_CACHE_DIR` chooses the folder, else it is `diffjax/jax` in the user's cache folder;
    `JAX_ENABLE_COMPILATION_CACHE=false` turns it off.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = os.path.join(home, "diffjax", "jax")
        jax.config.update("jax_compilation_cache_dir", folder)
    return folder
