"""Saves that fail: the run says so, keeps the last good checkpoint, and stops or goes on as configured."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffjax.train.checkpoint import CheckpointError
from diffjax.train.errors import WorkdirError
from diffjax.train.optim import snapshots
from diffjax.train.parallel import processes
from diffjax.train.survival.workdir import CONFIG_FILE

log = logging.getLogger(__name__)


def keep(session: Any, step: int, state: Any, config: Mapping, metrics: Mapping[str, float], *, last: bool) -> bool:
    """Whether the state was handed over to be saved.

    Under `config.on_save_error = "continue"` a save that fails, this one or the one before, which may fail while it is
    written in the background, is reported and the run goes on; the last save of a run must succeed under either policy.
    So must every save of several processes: they write one checkpoint together, and one that went on without the others
    would wait for them in vain.

    Raises:
      CheckpointError: if a save fails that must not.
      WorkdirError: if the folder of the run is gone.
    """
    if session.snapshots:
        # A run that goes on from this checkpoint takes no earlier snapshot anew.
        _attempt(session, step, session.snapshots.wait)
    # That the save before failed in the background comes to light here, and says nothing about this one.
    _attempt(session, step, session.checkpoints.wait)

    def save():
        require_workdir(session.workdir)
        session.checkpoints.save(step, state, session.iterator, config, metrics)

    return _attempt(session, step, save, must=last)


def keep_snapshot(session: Any, step: int, averages: Mapping[str, Any]) -> bool:
    """Whether the averages were handed over as a snapshot; what fails is borne or raised as by `keep`."""
    _attempt(session, step, session.snapshots.wait)

    def save():
        require_workdir(session.workdir)
        snapshots.save(session.snapshots, step, averages)

    return _attempt(session, step, save)


def close_snapshots(kept: Any) -> None:
    """Closes the snapshots of a run that ends or goes back. One that fails now is later than every checkpoint, and is
    taken anew by whatever goes on: no reason to hide why the run ends."""
    try:
        kept.close()
    except CheckpointError as error:
        log.warning("%s", error)


def settle(checkpoints: Any) -> None:
    """Waits for the save under way; of one process, a save that fails is a warning: the one before it is there.

    Raises:
      CheckpointError: if it fails in one of several processes, whose others know nothing of that.
    """
    try:
        checkpoints.wait()
    except CheckpointError as error:
        if processes.jax_count() > 1:
            raise
        log.warning("%s", error)


def _attempt(session: Any, step: int, write: Callable[[], Any], *, must: bool = False) -> bool:
    """Whether `write()` worked; one that did not is reported where failures are borne, else, and if it must, raises."""
    try:
        write()
        return True
    except (CheckpointError, WorkdirError) as error:
        if must or session.config.on_save_error != "continue" or processes.jax_count() > 1:
            raise
        text = f"{error}; training goes on, and the next save is tried at its time (config.on_save_error)"
        log.warning("%s", text)
        session.terminal.write_texts(step, {"note": text})
        return False


def require_workdir(workdir: str) -> None:
    """Raises `WorkdirError` if the folder of a run is no longer there, or another one has taken its place."""
    if not os.path.isfile(os.path.join(workdir, CONFIG_FILE)):
        raise WorkdirError(
            f"the folder of the run, {workdir!r}, is gone or no longer holds its {CONFIG_FILE}; nothing is saved into "
            "what took its place; bring it back, or start again with another --workdir"
        )


class Files:
    """The writers that leave files in the folder of a run, as one writer that says clearly when it cannot.

    Args:
      open_writers: `step -> writers` whose files go on from a step.
      step: the step to go on from.
      on_error: `"stop"` or `"continue"`, of `config.on_save_error`.
    """

    def __init__(self, open_writers: Callable[[int], Sequence[Any]], step: int, on_error: str):
        self._open, self._bear, self._failed = open_writers, on_error == "continue", False
        self._step, self._writers = step, list(open_writers(step))

    def write_scalars(self, step, scalars):
        self._each("write_scalars", step, scalars)

    def write_images(self, step, images):
        self._each("write_images", step, images)

    def write_texts(self, step, texts):
        self._each("write_texts", step, texts)

    def write_hparams(self, hparams):
        self._each("write_hparams", hparams)

    def flush(self):
        self._each("flush")

    def close(self):
        self._each("close")

    def rewind(self, step: int) -> None:
        """Goes on from an earlier step: rows that are later are dropped."""
        self._each("close")
        self._step, self._writers = step, None
        self._reopen()

    def _each(self, method: str, *args):
        if self._writers is None:
            self._reopen()
        for writer in self._writers or ():
            with self._told(f"cannot write the metrics with {type(writer).__name__}"):
                getattr(writer, method)(*args)

    def _reopen(self):
        with self._told(f"cannot drop the metrics after step {self._step}"):
            self._writers = list(self._open(self._step))

    @contextlib.contextmanager
    def _told(self, what: str):
        try:
            yield
        except OSError as error:
            text = f"{what}: {type(error).__name__}: {error}"
            if not self._bear:
                raise WorkdirError(f"{text}; free space or make the folder writable, then run it again") from error
            if not self._failed:
                log.warning("%s; training goes on, and rows are lost until it can be written again", text)
            self._failed = True


def stretched(stored: Any, config: Any, step: int, lr: Callable[[int], Any]) -> str | None:
    """One line on what another number of steps does to the learning rate of a run that goes on; None if it is the same.

    Args:
      stored: the config that the run was started with, or None.
      config: the one that it goes on with.
      step: that it goes on from.
      lr: learning rate by step, of `config`.
    """
    from diffjax.train import optim

    if stored is None or not step or stored.num_steps == config.num_steps:
        return None
    before = float(optim.build_lr(stored.optim, stored.num_steps)(step))
    return (
        f"config.num_steps {stored.num_steps} -> {config.num_steps}: the learning rate is laid out over all steps, so "
        f"at step {step} it is {float(lr(step)):.4g} where it would have been {before:.4g}"
    )
